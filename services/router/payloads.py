"""Requests of a router as bytes: what a DISPATCH or RELAY says, and the buffers of RELAY and EXPERT_IN.

Layouts are `common.wire.blocks`; who gets what is `services.router.plan`. Readers raise WireError for what a correct
peer would not send.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from common.errors import WireError
from common.tensors import numbers, put_bytes
from common.transport.buffers import Buffer
from common.wire.blocks import (
    RowSegment,
    check_payload,
    dispatch_layout,
    expert_in_layout,
    relay_layout,
)
from common.wire.header import Header, Kind
from services.router.plan import NodeShare, WorkerShare, check_experts, check_pairs
from services.router.rows import Piece, Rows

Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


def read_dispatch(
    header: Header, payload: Buffer, num_experts: int, slices: int
) -> tuple[RowSegment, Int32s, Floats]:
    """Where the rows lie, and the experts and gate weights of each, [num_rows, top_k * slices].

    `num_experts` counts slices: expert e of the model is e * slices and the next ones.
    """
    top_k, odd = divmod(header.num_pairs, header.num_rows)
    layout = dispatch_layout(header.num_rows, header.width, top_k, header.wire)
    check_payload("DISPATCH", header.payload_nbytes, layout.nbytes)
    if odd or top_k == 0:
        raise WireError(f"{header.num_pairs} pairs for {header.num_rows} rows")
    experts = numbers(payload, layout.experts, header.num_pairs, np.int32)
    weights = numbers(payload, layout.weights, header.num_pairs, np.float32)
    check_experts(experts, num_experts // slices)
    if slices > 1:
        every = experts[:, None] * np.int32(slices) + np.arange(slices, dtype=np.int32)
        experts, weights, top_k = every.ravel(), weights.repeat(slices), top_k * slices
    return layout.rows, experts.reshape(-1, top_k), weights.reshape(-1, top_k)


def read_relay(
    header: Header, payload: Buffer, node: int, num_experts: int
) -> tuple[RowSegment, NodeShare]:
    """Where the rows lie, and this node's share: all of them."""
    layout = relay_layout(header.num_rows, header.width, header.num_pairs, header.wire)
    check_payload("RELAY", header.payload_nbytes, layout.nbytes)
    pair_rows = numbers(payload, layout.pair_rows, header.num_pairs, np.int32)
    experts = numbers(payload, layout.experts, header.num_pairs, np.int32)
    weights = numbers(payload, layout.weights, header.num_pairs, np.float32)
    check_pairs(pair_rows, experts, num_rows=header.num_rows, num_experts=num_experts)
    return layout.rows, NodeShare(node, np.arange(header.num_rows), pair_rows, experts, weights)


def relay_pieces(request: Header, shares: Sequence[NodeShare]) -> list[Piece]:
    """The RELAY of each share, whose rows are in places one behind the other."""
    pieces, start = [], 0
    for share in shares:
        num_rows, num_pairs = len(share.rows), len(share.pair_rows)
        layout = relay_layout(num_rows, request.width, num_pairs, request.wire)
        pieces.append(Piece(start, start + num_rows, layout.rows, layout.nbytes))
        start += num_rows
    return pieces


def relay(request: Header, share: NodeShare, buffer: Buffer) -> Header:
    """The RELAY that asks another node for its share of a DISPATCH: its pairs go into `buffer`, behind the rows."""
    num_rows, num_pairs = len(share.rows), len(share.pair_rows)
    layout = relay_layout(num_rows, request.width, num_pairs, request.wire)
    put_bytes(buffer, layout.pair_rows, share.pair_rows)
    put_bytes(buffer, layout.experts, share.experts)
    put_bytes(buffer, layout.weights, share.weights)
    return request.derive(
        Kind.RELAY, target=share.node, num_rows=num_rows, num_pairs=num_pairs, payload_nbytes=layout.nbytes
    )  # fmt: skip


def expert_in(request: Header, share: WorkerShare, piece: Piece, buffer: Buffer) -> Header:
    """The EXPERT_IN for one worker's share: its segments go into `buffer`, behind the rows of `piece`."""
    segments = share.segments
    put_bytes(buffer, piece.segment.end, segments)
    return request.derive(
        Kind.EXPERT_IN, target=share.worker, num_rows=share.stop - share.start, num_pairs=len(segments),
        payload_nbytes=piece.nbytes,
    )  # fmt: skip


def rows_again(
    memory: Rows, asked: Header, payload: Buffer, pieces: Sequence[Piece]
) -> list[Buffer]:
    """The rows of an EXPERT_IN that was made here, for others: `pieces` count places from its first."""
    layout = expert_in_layout(asked.num_rows, asked.width, asked.num_pairs, asked.wire)
    return memory.gather(payload, layout.rows, np.arange(asked.num_rows), pieces)
