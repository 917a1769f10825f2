"""The arithmetic of an expert worker: rows of several calls in, one output row per row, in the same order."""

import torch

from common.errors import WireError
from common.tensors import int32s, landing_of, row_bytes, rows_of, scales_of
from common.transport.buffers import Buffer
from common.wire.blocks import (
    EXPERT_OUT_ROWS,
    RowType,
    check_payload,
    expert_in_layout,
    row_segment,
)
from common.wire.header import Header
from kernels import ops
from services.expert.bank import Bank, Call, joined

Tensor = torch.Tensor


def parse(header: Header, payload: Buffer | None, bank: Bank) -> Call:
    """Rows of an EXPERT_IN, on a GPU as they came, on CPU in fp32, and its segments.

    Raises WireError when the payload does not fit the header, or asks for an expert that is not resident.
    """
    layout = expert_in_layout(header.num_rows, header.width, header.num_pairs, header.wire)
    check_payload("EXPERT_IN", header.payload_nbytes, layout.nbytes)
    if payload is None or header.num_rows == 0 or header.width != bank.width:
        raise WireError(
            f"EXPERT_IN of {header.num_rows} rows of width {header.width}, the model has {bank.width}"
        )
    flat = int32s(payload, layout.segments, header.num_pairs * 2)
    pairs, total = list(zip(flat[::2], flat[1::2], strict=True)), 0
    for expert, count in pairs:
        total += count
        if count < 1:
            total = -1
            break
        if (header.layer, expert) not in bank:
            raise WireError(f"expert {expert} of layer {header.layer} is not resident here")
    if total != header.num_rows:
        raise WireError(f"EXPERT_IN segments do not cover its {header.num_rows} rows")
    is_fp8 = layout.rows.row_type is RowType.FP8
    if payload.rows is not None and not payload.rows.block.on_host:
        answer = row_segment(header.num_rows, header.width, EXPERT_OUT_ROWS[header.wire])
        rows = rows_of(payload, layout.rows)
        scales = scales_of(payload, layout.rows) if is_fp8 else None
        if payload.rows.block.owner is not None and not bank.copies(rows, scales):
            rows = rows.view(torch.uint8).clone().view(rows.dtype)  # they would be read many times
            scales = None if scales is None else scales.clone()
        return Call(rows, scales, pairs, landing_of(payload, answer))
    if is_fp8:
        rows = ops.dequantise_rows(
            row_bytes(payload), num_rows=header.num_rows, width=header.width,
            rows_offset=layout.rows.rows_offset, scales_offset=layout.rows.scales_offset, dtype=torch.float32,
        )  # fmt: skip
    else:
        rows = rows_of(payload, layout.rows)
        if rows.dtype is not torch.float32:
            rows = rows.to(torch.float32)
    return Call(rows, None, pairs)


def compute(bank: Bank, layer: int, calls: list[Call]) -> list[Tensor]:
    """Outputs of several calls of one layer, each [num_rows, width]; calls for the same expert share one pass."""
    outputs = bank.together(layer, calls)
    if outputs is None and len(calls) == 1 and len(calls[0].segments) == 1:
        (call,) = calls  # one block for one expert: no regrouping
        ((expert, _),) = call.segments
        outputs = [bank.ffn(layer, expert, call.rows, call.scales)]
    elif outputs is None:
        outputs = _regrouped(bank, layer, calls)
    return [_placed(call, output) for call, output in zip(calls, outputs, strict=True)]


def _placed(call: Call, output: Tensor) -> Tensor:
    """The output where it is wanted, if its type is right."""
    if call.out is None or output is call.out or output.dtype is not call.out.dtype:
        return output
    return call.out.copy_(output)


def _regrouped(bank: Bank, layer: int, calls: list[Call]) -> list[Tensor]:
    by_expert: dict[int, list[tuple[int, slice]]] = {}  # expert -> (call, its rows)
    for index, call in enumerate(calls):
        start = 0
        for expert, count in call.segments:
            by_expert.setdefault(expert, []).append((index, slice(start, start + count)))
            start += count
    outputs: list[Tensor | None] = [None] * len(calls)
    for expert, parts in by_expert.items():
        rows = joined([calls[index].rows[part] for index, part in parts])
        scales = None
        if calls[0].scales is not None:
            scales = joined([calls[index].quantised[1][part] for index, part in parts])
        result = bank.ffn(layer, expert, rows, scales)
        pieces = torch.split(result, [part.stop - part.start for _, part in parts])
        for (index, part), piece in zip(parts, pieces, strict=True):
            if len(calls[index].segments) == 1:
                outputs[index] = piece
                continue
            if outputs[index] is None:
                outputs[index] = piece.new_empty(calls[index].rows.shape)
            outputs[index][part] = piece  # type: ignore[index]
    return [output for output in outputs if output is not None]
