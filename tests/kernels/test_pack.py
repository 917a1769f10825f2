"""Packing: every byte of every row where it belongs, nothing else touched."""

import pytest
import torch

from kernels.reference.pack import pack, pack_blocks, route, unpack

ROW, SCALE = 200, 8


def buffers(n, seed):
    g = torch.Generator().manual_seed(seed)
    source = torch.randint(0, 256, (16 + n * ROW + n * SCALE,), generator=g, dtype=torch.uint8)
    where = {"row_nbytes": ROW, "scale_nbytes": SCALE}
    return g, source, where | {"source_offset": 16, "source_scales": 16 + n * ROW}


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("n", [1, 3, 127, 129, 1000])
def test_pack_then_unpack_is_the_identity_on_the_chosen_rows(n, index_dtype):
    g, source, where = buffers(n, n)
    index = torch.randperm(n, generator=g)[: max(1, n // 2)].to(index_dtype)
    m = index.numel()
    block = torch.full((m * (ROW + SCALE) + 64,), 7, dtype=torch.uint8)
    pack(source, block, index, **where, out_offset=32, out_scales=32 + m * ROW)
    assert torch.all(block[:32] == 7)
    assert torch.all(block[-32:] == 7)
    rows = source[16 : 16 + n * ROW].view(n, ROW)
    assert torch.equal(block[32 : 32 + m * ROW].view(m, ROW), rows[index.long()])

    back = torch.zeros_like(source)
    unpack(
        block,
        back,
        index,
        row_nbytes=ROW,
        scale_nbytes=SCALE,
        source_offset=32,
        source_scales=32 + m * ROW,
        out_offset=16,
        out_scales=16 + n * ROW,
    )
    expected = torch.zeros_like(source)
    for i in index.tolist():
        for start, size in ((16 + i * ROW, ROW), (16 + n * ROW + i * SCALE, SCALE)):
            expected[start : start + size] = source[start : start + size]
    assert torch.equal(back, expected)


def test_rows_without_scales_leave_the_scales_alone():
    source = torch.arange(40, dtype=torch.uint8)
    out = torch.zeros(16, dtype=torch.uint8)
    pack(source, out, torch.tensor([3, 1]), row_nbytes=8, source_offset=0, out_offset=0)
    assert out.tolist() == [*range(24, 32), *range(8, 16)]


def test_a_row_outside_its_buffer_is_refused():
    source, out = torch.zeros(32, dtype=torch.uint8), torch.zeros(32, dtype=torch.uint8)
    place = {"row_nbytes": 8, "source_offset": 0, "out_offset": 0}
    with pytest.raises((IndexError, RuntimeError)):
        pack(source, out, torch.tensor([4]), **place)
    with pytest.raises(RuntimeError):
        pack(source, out, torch.zeros(5, dtype=torch.int64), **place)
    with pytest.raises((IndexError, RuntimeError)):
        unpack(source, out, torch.tensor([4]), **place)


@pytest.mark.parametrize("n", [1, 3, 129])
def test_route_lists_each_wanted_row_once_in_order(n):
    g = torch.Generator().manual_seed(n)
    experts = torch.stack([torch.randperm(16, generator=g)[:4] for _ in range(n)]).int()
    destinations = (torch.arange(16) // 4).int()
    destinations[5] = -1
    rows, counts = route(experts, destinations, 5)
    for d in range(5):
        wanted = [i for i in range(n) if d in destinations[experts[i].long()].tolist()]
        assert rows[d, : counts[d]].tolist() == wanted
        assert torch.all(rows[d, counts[d] :] == -1)


def test_pack_blocks_lays_out_what_a_single_pack_would():
    n, stride = 50, 16384
    _, source, where = buffers(n, 9)
    experts = torch.randint(0, 8, (n, 2), generator=torch.Generator().manual_seed(1)).int()
    rows, counts = route(experts, torch.arange(8).int(), 8)
    out = torch.zeros(8 * stride, dtype=torch.uint8)
    pack_blocks(source, out, rows, counts, **where, block_nbytes=stride)
    for d in range(8):
        m = int(counts[d])
        scales = -(-m * ROW // 16) * 16
        single = torch.zeros(stride, dtype=torch.uint8)
        pack(source, single, rows[d, :m], **where, out_offset=0, out_scales=scales)
        assert torch.equal(out[d * stride : (d + 1) * stride], single)
    with pytest.raises(RuntimeError, match="do not fit"):
        pack_blocks(source, out, rows, counts, **where, block_nbytes=64)
