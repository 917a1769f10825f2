"""Requests of a router as bytes: what a DISPATCH or RELAY says.

Layouts are `common.wire.blocks`; who gets what is `services.router.plan`. Readers raise WireError for what a correct
peer would not send.
"""

import numpy as np
import numpy.typing as npt

from common.errors import WireError
from common.tensors import numbers
from common.transport.buffers import Buffer
from common.wire.blocks import (
    RowSegment,
    check_payload,
    dispatch_layout,
    relay_layout,
    wider_segment,
)
from common.wire.header import HEADER_NBYTES, Header
from services.router.plan import BlockPairs, NodeShare, check_experts, check_pairs

Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


def read_dispatch(
    header: Header, payload: Buffer, num_experts: int, slices: int
) -> tuple[RowSegment, BlockPairs]:
    """Where the rows lie, and their pairs, [num_rows, top_k * slices].

    Of slices, `num_experts` in all, expert e of the model is e * slices and the next ones. Else whoever divides the
    block checks the ids.
    """
    top_k, odd = divmod(header.num_pairs, header.num_rows)
    layout = dispatch_layout(header.num_rows, header.width, top_k, header.wire)
    rows, gap = layout.rows, 0
    if payload.rows is not None and payload.rows.nbytes != rows.end:
        rows = wider_segment(rows, payload.rows.nbytes)
        gap = rows.end - layout.rows.end
    check_payload("DISPATCH", header.payload_nbytes, layout.nbytes + gap)
    if odd or top_k == 0:
        raise WireError(f"{header.num_pairs} pairs for {header.num_rows} rows")
    experts = numbers(payload, gap + layout.experts, header.num_pairs, np.int32)
    weights = numbers(payload, gap + layout.weights, header.num_pairs, np.float32)
    if slices > 1:
        check_experts(experts, num_experts // slices)
        every = experts[:, None] * np.int32(slices) + np.arange(slices, dtype=np.int32)
        experts, weights, top_k = every.ravel(), weights.repeat(slices), top_k * slices
    return rows, BlockPairs(experts.reshape(-1, top_k), weights.reshape(-1, top_k))


def read_relay(
    header: Header, payload: Buffer, node: int, num_experts: int
) -> tuple[RowSegment, NodeShare]:
    """Where the rows lie, and this node's share: all of them."""
    layout = relay_layout(header.num_rows, header.width, header.num_pairs, header.wire)
    check_payload("RELAY", header.payload_nbytes, layout.nbytes)
    start = HEADER_NBYTES + layout.pair_rows - payload.rows_nbytes
    tail = bytes(payload.view[start : HEADER_NBYTES + payload.nbytes])
    share = NodeShare(node, np.arange(header.num_rows, dtype=np.int32), header.num_pairs, tail)
    check_pairs(share.pair_rows, share.experts, num_rows=header.num_rows, num_experts=num_experts)
    return layout.rows, share
