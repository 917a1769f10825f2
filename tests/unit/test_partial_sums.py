"""A block's partials, however it is divided, asked anew and answered: the bits of a plain loop over nodes."""

import random

import numpy as np
import pytest
import torch

from common.errors import WireError
from common.tensors import rows_of
from common.transport.buffers import BufferPool
from common.transport.device import DevicePool
from common.transport.outbox import Outbox
from common.transport.seam import Seam
from common.wire.blocks import DISPATCH_ROWS, PARTIAL_ROWS, row_segment
from common.wire.header import Header, Kind, Wire
from services.router.block import SourceWork
from services.router.plan import NodeShare, side_by_side, split_pairs
from services.router.rows import sum_dtype
from services.router.rows_apart import open_rows

WIDTH, HOME, ROWS, NODES = 40, 2, 23, 6


def block_of(rng, pool, wire):
    """Rows of which each has pairs on some nodes, as a DISPATCH in `pool`, and the shares of it."""
    pairs = [
        (row, node) for row in range(ROWS) for node in range(NODES) if rng.random() < rng.random()
    ]
    pairs += [(row, rng.randrange(NODES)) for row in {*range(ROWS)} - {row for row, _ in pairs}]
    pair_rows, nodes = np.array(sorted(pairs), np.int32).T
    weights = np.ones(len(pairs), np.float32)
    shares = split_pairs(np.arange(ROWS), pair_rows.copy(), nodes.copy(), weights, nodes)
    segment = row_segment(ROWS, WIDTH, DISPATCH_ROWS[wire])
    payload = pool.acquire(segment.end, rows_nbytes=segment.end)
    request = Header(Kind.DISPATCH, wire, 1, 1, WIDTH, num_rows=ROWS)
    return SourceWork(request, None, None, segment), payload, shares


def ask(source, memory, payload, calls, some):
    """What the dataflow does with shares, nothing sent; where the partials of other nodes may land."""
    wire = source.request.wire
    source.shares |= calls
    source.waiting |= calls.keys()
    slots = source.place(calls, HOME, some=some)
    relays = {call: share for call, share in calls.items() if share.node != HOME}
    rows = [share.rows for share in relays.values()]
    tables = side_by_side(rows, WIDTH, source.rows.row_type, slots)
    gathered, outputs = memory.fan_out(
        payload, source.rows, tables, source.request, Kind.RELAY, PARTIAL_ROWS[wire]
    )
    source.add(outputs, calls, HOME)
    landings = {}
    outbox, pieces = Outbox("of a node that is away"), tables.pieces
    asks = [(n, 0, 1, b"", piece, piece[0]) for n, piece in zip(relays, pieces, strict=True)]
    gathered.ask([outbox] * len(asks), asks, outputs, 0)
    for number in relays:
        landing = outbox.owed(number).landing
        landings[number] = None if landing is None else landing.retain()
        outbox.settle(number)
    gathered.leave()
    return landings


def test_a_block_whose_rows_are_not_apart_is_refused_and_leaves_nothing():
    pool = DevicePool("cpu")
    memory = open_rows(pool, Seam())
    segment = row_segment(2, WIDTH, DISPATCH_ROWS[Wire.FP8])
    tables = side_by_side(
        [np.arange(2, dtype=np.int32)], WIDTH, DISPATCH_ROWS[Wire.FP8], np.zeros((2, 1), np.int32)
    )
    payload, request = pool.acquire(segment.end), Header(Kind.DISPATCH, Wire.FP8)
    with pytest.raises(WireError, match="0 bytes of rows in device memory"):
        memory.fan_out(payload, segment, tables, request, Kind.RELAY, PARTIAL_ROWS[Wire.FP8])
    payload.release()
    assert pool.outstanding == pool.rows_outstanding == 0


def arrive(source, pool, call, partial, landing, rng):
    """A partial comes to its landing, or in memory of its own."""
    if source.shares[call].node == HOME:
        source.own[call].copy_(partial)
        return source.arrived(call)
    segment = row_segment(len(partial), WIDTH, PARTIAL_ROWS[source.request.wire])
    if landing is None or rng.random() < 0.3:
        buffer = pool.acquire(segment.end, rows_nbytes=segment.end)
        rows_of(buffer, segment).copy_(partial)
        source.put(call, buffer, segment)
    else:
        buffer = pool.acquire_with(landing.retain())
        rows_of(buffer, segment).copy_(partial)
    buffer.release()
    return source.arrived(call)


def plain(source, partials):
    """Ascending node, then question, from zero; float64 sums are rounded once."""
    acc = torch.zeros(ROWS, WIDTH, dtype=sum_dtype(source.request.wire))
    for call in sorted(partials, key=lambda call: (source.shares[call].node, call)):
        for row, term in zip(source.shares[call].rows.tolist(), partials[call], strict=True):
            acc[row] = acc[row] + term.to(acc.dtype)
    return acc


@pytest.mark.parametrize("wire", list(Wire))
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_any_shares_in_any_order_have_the_bits_of_a_plain_loop(seed, apart, wire):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pool = DevicePool("cpu") if apart else BufferPool()
    memory = open_rows(pool, Seam())
    source, payload, shares = block_of(rng, pool, wire)
    some = seed % 3 == 2  # one rail of several: it has not all nodes
    shares = [share for share in shares if not some or share.node % 2 == 0 or share is shares[0]]
    numbers = iter(range(100, 200))

    def numbered(parts: list[NodeShare]) -> dict[int, NodeShare]:
        return {next(numbers): share for share in sorted(parts, key=lambda s: s.node == HOME)}

    landings = ask(source, memory, payload, numbered(shares), some)
    partials, held = {}, [landings]

    def partial_of(call):
        own = source.shares[call].node == HOME
        dtype = sum_dtype(wire) if own or wire is Wire.FP32 else torch.bfloat16
        scale = 10.0 ** rng.randrange(-3, 4)
        return torch.randn(len(source.shares[call].rows), WIDTH).to(dtype) * scale

    moves = seed % 4
    while source.waiting:
        call = rng.choice(sorted(source.waiting))
        if moves and rng.random() < 0.4:  # its node is lost: every pair is asked of some other node
            moves -= 1
            share = source.shares.pop(call)
            source.waiting.discard(call)
            others = [node for node in range(NODES) if node != share.node]
            nodes = np.array([rng.choice(others) for _ in share.pair_rows], np.int32)
            parts = split_pairs(share.rows, share.pair_rows, share.experts, share.weights, nodes)
            old = landings.get(call)
            landings = landings | ask(source, memory, payload, numbered(parts), some)
            held.append({c: landings[c] for c in landings if all(c not in h for h in held)})
            if old is not None:  # its answer comes all the same, and nobody wants it
                old.tensor.fill_(0x7F)
            continue
        partials[call] = partial_of(call)
        done = arrive(source, pool, call, partials[call], landings.get(call), rng)
        assert done == (not source.waiting)
    out = torch.full((len(source.ids) if some else ROWS, WIDTH), float("nan"))
    source.sum_into(out)
    expected = plain(source, partials).float()
    if some:
        rows = {row for share in source.shares.values() for row in share.rows.tolist()}
        assert source.ids.tolist() == sorted(rows)
        expected = expected[torch.from_numpy(source.ids).long()]
    assert torch.equal(out, expected)
    memory.release(*source.outputs)
    payload.release()
    for landing in (place for places in held for place in places.values() if place is not None):
        landing.release()
    assert pool.outstanding == 0
    assert getattr(pool, "rows_outstanding", 0) == 0
