"""The arithmetic of an expert worker: rows of several calls in, one output row per row, in the same order."""

import numpy as np
import torch

from common.errors import WireError
from common.tensors import (
    int32s,
    landing_of,
    numbers,
    row_bytes,
    rows_of,
    scales_of,
    storage_of,
)
from common.transport.buffers import Buffer
from common.wire.blocks import (
    DISPATCH_ROWS,
    EXPERT_OUT_ROWS,
    RowSegment,
    RowType,
    check_payload,
    expert_in_layout,
    expert_pick_layout,
    row_segment,
    wider_segment,
)
from common.wire.header import HEADER_NBYTES, Header, Kind
from kernels import ops
from services.expert.bank import Bank, Call, joined, own_rows

Tensor = torch.Tensor
Pairs = list[tuple[int, int]]  # segments: (expert, its rows)


def parse(header: Header, payload: Buffer | None, bank: Bank) -> Call:
    """Rows of an EXPERT_IN or EXPERT_PICK, on a GPU as they came, on CPU in fp32, and its segments.

    Raises WireError when the payload does not fit the header, or asks for an expert that is not resident.
    """
    if payload is None or header.num_rows == 0 or header.width != bank.width:
        raise WireError(
            f"{header.kind.name} of {header.num_rows} rows of width {header.width}, the model has {bank.width}"
        )
    apart = payload.rows is not None and not payload.rows.block.on_host
    if header.kind is Kind.EXPERT_PICK:
        picking = expert_pick_layout(payload.rows_nbytes, header.num_rows, header.num_pairs)
        check_payload("EXPERT_PICK", header.payload_nbytes, picking.nbytes)
        if not apart:
            raise WireError("EXPERT_PICK without rows in device memory")
        pairs = _segments(header, payload, picking.segments, bank)
        call = _picked(header, payload, picking.picks, pairs)
    else:
        layout = expert_in_layout(header.num_rows, header.width, header.num_pairs, header.wire)
        check_payload(header.kind.name, header.payload_nbytes, layout.nbytes)
        pairs = _segments(header, payload, layout.segments, bank)
        call = _whole(payload, layout.rows, pairs, apart=apart)
    if apart:
        answer = row_segment(header.num_rows, header.width, EXPERT_OUT_ROWS[header.wire])
        call.out = landing_of(payload, answer)
        assert payload.rows is not None, "rows apart"
        if payload.rows.block.owner is not None and not bank.copies(call):
            return call.with_own_rows()  # they would be read many times
    return call


def _segments(header: Header, payload: Buffer, start: int, bank: Bank) -> Pairs:
    """Segments, which begin at byte `start` of the payload."""
    flat = int32s(payload, start, header.num_pairs * 2)
    pairs, total = list(zip(flat[::2], flat[1::2], strict=True)), 0
    for expert, count in pairs:
        total += count
        if count < 1:
            total = -1
            break
        if (header.layer, expert) not in bank:
            raise WireError(f"expert {expert} of layer {header.layer} is not resident here")
    if total != header.num_rows:
        raise WireError(f"{header.kind.name} segments do not cover its {header.num_rows} rows")
    return pairs


def _whole(payload: Buffer, segment: RowSegment, pairs: Pairs, *, apart: bool) -> Call:
    """The rows of an EXPERT_IN."""
    is_fp8 = segment.row_type is RowType.FP8
    if apart:
        scales = scales_of(payload, segment) if is_fp8 else None
        return Call(rows_of(payload, segment), scales, pairs)
    if is_fp8:
        rows = ops.dequantise_rows(
            row_bytes(payload), num_rows=segment.num_rows, width=segment.width,
            rows_offset=segment.rows_offset, scales_offset=segment.scales_offset, dtype=torch.float32,
        )  # fmt: skip
    else:
        rows = rows_of(payload, segment)
        if rows.dtype is not torch.float32:
            rows = rows.to(torch.float32)
    return Call(rows, None, pairs)


def _picked(header: Header, payload: Buffer, start: int, pairs: Pairs) -> Call:
    """The block of an EXPERT_PICK; which of its rows, byte `start` of the payload and what follows say."""
    (of_block,) = int32s(payload, start, 1)
    index = numbers(payload, start + 4, header.num_rows, np.uint32)
    last = int(index[index.argmax()])  # a fourth of what max takes
    if of_block < 1 or last >= of_block:  # negative ones are huge
        raise WireError(f"EXPERT_PICK of row {last} of a block of {of_block} rows")
    row_type, nbytes = DISPATCH_ROWS[header.wire], payload.rows_nbytes
    segment = row_segment(of_block, header.width, row_type)
    if nbytes != segment.end:
        segment = wider_segment(segment, nbytes)
    scales = scales_of(payload, segment) if row_type is RowType.FP8 else None
    picks = storage_of(payload), HEADER_NBYTES + start - nbytes + 4, header.num_rows
    return Call(rows_of(payload, segment), scales, pairs, picks=picks)


def compute(bank: Bank, layer: int, calls: list[Call]) -> list[Tensor]:
    """Outputs of several calls of one layer, each [num_rows, width]; calls for the same expert share one pass."""
    outputs = bank.together(layer, calls)
    if outputs is None:
        outputs = _by_expert(bank, layer, own_rows(calls))
    return [_placed(call, output) for call, output in zip(calls, outputs, strict=True)]


def _placed(call: Call, output: Tensor) -> Tensor:
    """The output where it is wanted, if its type is right."""
    if call.out is None or output is call.out or output.dtype is not call.out.dtype:
        return output
    return call.out.copy_(output)


def _by_expert(bank: Bank, layer: int, calls: list[Call]) -> list[Tensor]:
    """Each expert's rows of all calls in one pass."""
    if len(calls) == 1 and len(calls[0].segments) == 1:  # nothing to be regrouped
        (call,) = calls
        ((expert, _),) = call.segments
        return [bank.ffn(layer, expert, call.rows, call.scales)]
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
