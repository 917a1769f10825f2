"""The arithmetic of an expert worker: rows of several calls in, one output row per row, in the same order."""

import numpy as np
import torch

from common.errors import WireError
from common.tensors import numbers, rows_of
from common.transport.buffers import Buffer
from common.wire.blocks import (
    RowType,
    check_payload,
    expert_in_layout,
)
from common.wire.header import Header
from kernels import ops
from services.expert.bank import Bank

Tensor = torch.Tensor


def parse(
    header: Header, payload: Buffer | None, bank: Bank
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Rows fp32 [num_rows, width] of an EXPERT_IN, and its (expert, number of rows) segments.

    Raises WireError when the payload does not fit the header, or asks for an expert that is not resident.
    """
    layout = expert_in_layout(header.num_rows, header.width, header.num_pairs, header.wire)
    check_payload("EXPERT_IN", header.payload_nbytes, layout.nbytes)
    if payload is None or header.num_rows == 0 or header.width != bank.width:
        raise WireError(
            f"EXPERT_IN of {header.num_rows} rows of width {header.width}, the model has {bank.width}"
        )
    segments = (
        numbers(payload, layout.segments, header.num_pairs * 2, np.int32).reshape(-1, 2).tolist()
    )
    if (
        any(count < 1 for _, count in segments)
        or sum(count for _, count in segments) != header.num_rows
    ):
        raise WireError(f"EXPERT_IN segments do not cover its {header.num_rows} rows")
    for expert, _ in segments:
        if (header.layer, expert) not in bank:
            raise WireError(f"expert {expert} of layer {header.layer} is not resident here")
    if layout.rows.row_type is RowType.FP8:
        rows = ops.dequantise_rows(
            torch.from_numpy(payload.array), num_rows=header.num_rows, width=header.width,
            rows_offset=layout.rows.rows_offset, scales_offset=layout.rows.scales_offset, dtype=torch.float32,
        )  # fmt: skip
    else:
        rows = rows_of(payload, layout.rows).to(torch.float32)
    return rows, [(expert, count) for expert, count in segments]


def compute(
    bank: Bank, layer: int, calls: list[tuple[Tensor, list[tuple[int, int]]]]
) -> list[Tensor]:
    """Outputs of several calls of one layer, each [num_rows, width] fp32; calls for the same expert share one pass."""
    if len(calls) == 1 and len(calls[0][1]) == 1:  # one block for one expert: nothing to regroup
        rows, ((expert, _),) = calls[0]
        return [bank.ffn(layer, expert, rows)]
    by_expert: dict[
        int, list[tuple[int, int, int]]
    ] = {}  # expert -> (call, first row, last row + 1)
    for index, (_, segments) in enumerate(calls):
        start = 0
        for expert, count in segments:
            by_expert.setdefault(expert, []).append((index, start, start + count))
            start += count
    outputs = [torch.empty_like(rows) for rows, _ in calls]
    for expert, parts in by_expert.items():
        pieces = [calls[index][0][start:end] for index, start, end in parts]
        result = bank.ffn(layer, expert, pieces[0] if len(pieces) == 1 else torch.cat(pieces))
        for (index, start, end), piece in zip(
            parts, torch.split(result, [len(p) for p in pieces]), strict=True
        ):
            outputs[index][start:end] = piece
    return outputs
