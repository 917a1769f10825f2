"""Triton kernels on a GPU against the references and float64: fresh inputs, odd shapes, outliers, poisoned outputs."""

import math

import pytest
import torch
from ffn_cases import error, exact, expert, rows
from markers import on_gpu

from kernels import ops, swiglu, tile
from kernels.block_gemm import tile_gemm
from kernels.graphs import Replays
from kernels.reference import combine as ref_combine
from kernels.reference import gate as ref_gate
from kernels.reference import pack as ref_pack
from kernels.reference import paged as ref_paged
from kernels.reference import projection as ref_projection
from kernels.reference import quant as ref_quant
from kernels.reference.combine import OTHER

ROWS = (1, 3, 127, 129, 1000)
BF16 = 6e-3  # relative error by norm of bf16 operands and results
# FP8 tensor cores keep about 14 bits of a sum: the hidden row differs from float64 by 1e-3 and some of its roundings
# to e4m3 (steps of 2^-3 to 2^-4) fall to the other side
FP8 = 2e-2


def outliers(n, width, dtype):
    x = torch.randn(n, width) * torch.randn(n, 1).exp()
    x[torch.rand(n, width) < 0.002] *= 1e3
    x[n // 2, ::2] = 0
    x[n // 2, 1::2] = -0.0
    x[n // 3] *= 2.0**-126  # scales of 2**-126 and little more
    x[n - 1] *= 2.0**-60 if n > 3 else 1
    return x.to(dtype)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [7168, 200, 56])
@pytest.mark.parametrize("n", ROWS)
def test_quantise_has_the_bits_of_the_reference(n, width, dtype):
    x = outliers(n, width, dtype)
    q, scales = ref_quant.quantise(x)
    scales_at = -(-n * width // 16) * 16
    payload = torch.full((scales_at + scales.numel() * 4 + 16,), 0xFF, dtype=torch.uint8).cuda()
    ops.quantise_rows(x.cuda(), payload, rows_offset=0, scales_offset=scales_at)
    got = payload.cpu()
    assert torch.equal(got[: n * width], q.view(torch.uint8).flatten())
    assert torch.equal(got[scales_at:-16], scales.view(torch.uint8).flatten())
    assert torch.all(got[-16:] == 0xFF)
    place = {"num_rows": n, "width": width, "rows_offset": 0, "scales_offset": scales_at}
    back = ops.dequantise_rows(payload, **place, dtype=torch.float32)
    assert torch.equal(back.cpu(), ref_quant.dequantise(q, scales, torch.float32))


@on_gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_spoils_its_block_and_no_other(bad):
    x = torch.randn(3, 300, device="cuda")
    x[1, 200] = bad
    back = ops.dequantise(*ops.quantise(x), torch.float32)
    assert back[1, 128:256].isnan().all()
    assert back[[0, 2]].isfinite().all()
    assert back[1, :128].isfinite().all()


@on_gpu
@pytest.mark.parametrize(
    ("source_dtype", "out_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
)
@pytest.mark.parametrize(("n", "width"), [(1, 7168), (3, 200), (129, 7168), (1000, 56)])
def test_combine_has_the_bits_of_the_reference(n, width, source_dtype, out_dtype):
    source = torch.randn(n * 8 + 3, width).to(source_dtype)
    slots = torch.randperm(n * 8 + 3)[: n * 8].view(n, 8).int()
    slots[torch.rand(n, 8) < 0.2] = -1
    weights = torch.rand(n, 8)
    expected = torch.empty(n, width, dtype=out_dtype)
    ref_combine.combine(source, slots, weights, expected)
    out = torch.full((n, width), float("nan"), dtype=out_dtype, device="cuda")
    ops.combine(source.cuda(), slots.cuda(), weights.cuda(), out)
    assert torch.equal(out.cpu(), expected)
    if out_dtype is torch.bfloat16:
        nbytes = -(-n * width // 16) * 16
        payload, same = (torch.zeros(nbytes + n * 256, dtype=torch.uint8) for _ in range(2))
        place = {"rows_offset": 0, "scales_offset": nbytes}
        ref_combine.combine_fp8(source, slots, weights, same, **place)
        payload = payload.cuda()
        ops.combine_fp8(source.cuda(), slots.cuda(), weights.cuda(), payload, **place)
        assert torch.equal(payload.cpu(), same)


@on_gpu
def test_sums_of_partials_have_the_bits_of_the_reference():
    for dtype in (torch.float64, torch.bfloat16):
        parts = [torch.randn(3, 200).to(dtype), torch.randn(9, 200).to(dtype)]
        lists = [torch.tensor([4, 0, 2], dtype=torch.int32), None]
        expected = torch.empty(9, 200)
        ref_combine.sum_partials(parts, lists, expected)
        out = torch.full((9, 200), float("nan"), device="cuda")
        place = [None if r is None else r.cuda() for r in lists]
        ops.sum_partials([p.cuda() for p in parts], place, out)
        assert torch.equal(out.cpu(), expected)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        parts[1] = parts[1].to(wide)
        slots = torch.arange(9, dtype=torch.int32).add(OTHER).repeat(2, 1).T.contiguous()
        slots[:, 1] = -1
        slots[[4, 0, 2], 1] = slots[[4, 0, 2], 0]
        slots[[4, 0, 2], 0] = torch.arange(3, dtype=torch.int32)
        on_card = torch.full((9, 200), float("nan"), device="cuda")
        ops.combine(parts[0].cuda(), slots.cuda(), None, on_card, parts[1].cuda())
        assert torch.equal(on_card.cpu(), expected)


@on_gpu
@pytest.mark.parametrize("n", ROWS)
def test_packing_moves_the_same_bytes(n):
    source = torch.randint(0, 256, (16 + n * 224,), dtype=torch.uint8)
    place = {
        "row_nbytes": 200,
        "source_offset": 16,
        "scale_nbytes": 24,
        "source_scales": 16 + n * 200,
    }
    experts = torch.stack([torch.randperm(16)[:4] for _ in range(n)]).int()
    destinations = (torch.arange(16) // 4).int()
    listed, counts = ref_pack.route(experts, destinations, 5)
    got, got_counts = ops.route(experts.cuda(), destinations.cuda(), 5)
    assert torch.equal(got.cpu(), listed)
    assert torch.equal(got_counts.cpu(), counts)
    stride = 256 * (n + 1)
    out = torch.zeros(5 * stride, dtype=torch.uint8)
    on_card = out.cuda()
    ref_pack.pack_blocks(source, out, listed, counts, **place, block_nbytes=stride)
    ops.pack_blocks(source.cuda(), on_card, got, got_counts, **place, block_nbytes=stride)
    assert torch.equal(on_card.cpu(), out)
    index = torch.randperm(n)[: max(1, n // 2)].int()
    for move in ("pack", "unpack"):
        out = torch.zeros_like(source)
        on_card = out.cuda()
        ends = {"out_offset": 0, "out_scales": n * 200}
        getattr(ref_pack, move)(source, out, index, **place, **ends)
        getattr(ops, move)(source.cuda(), on_card, index.cuda(), **place, **ends)
        assert torch.equal(on_card.cpu(), out)


@on_gpu
@pytest.mark.parametrize("gap", [0, 3 * 7168])
@pytest.mark.parametrize(
    ("n", "width", "counts"), [(128, 7168, [128] * 8), (3, 56, [1, 3]), (1000, 512, [5, 700, 1])]
)
def test_pieces_are_gathered_by_tables_in_pinned_memory(n, width, counts, gap):
    """Twice: the second launch is one that was looked up. Rows and scales come as from a wider segment."""
    scales_at = -(-n * width // 16) * 16 + gap
    source = torch.randint(0, 256, (scales_at + n * 8,), dtype=torch.uint8)
    for _ in range(2):
        index = torch.randint(0, n, (sum(counts),), dtype=torch.int32)
        pieces, place, start = [], 0, 0
        for count in counts:
            scales = -(-count * width // 16) * 16
            pieces.append((start, count, place, place + scales))
            start, place = start + count, place + -(-(scales + count * 8) // 256) * 256
        rest = torch.randint(0, 256, (4096 + 4 * n,), dtype=torch.uint8)
        pieces_at = -(-index.numel() * 4 // 256) * 256
        rest_at = pieces_at + -(-len(pieces) * 32 // 256) * 256
        tables = torch.zeros(rest_at + rest.numel(), dtype=torch.uint8)
        tables[: index.numel() * 4] = index.view(torch.uint8)
        tables[pieces_at : pieces_at + len(pieces) * 32] = (
            torch.tensor(pieces).view(torch.uint8).flatten()
        )
        tables[rest_at:] = rest
        out, copy = (
            torch.full((size,), 0xFF, dtype=torch.uint8) for size in (place, rest.numel() + 512)
        )
        wanted, found = (out.clone(), copy.clone()), (out.cuda(), copy.cuda())
        where = {
            "index_offset": 0, "pieces_offset": pieces_at, "num_pieces": len(pieces), "max_rows": max(counts),
            "row_nbytes": width, "source_offset": 0, "scale_nbytes": 8, "source_scales": scales_at,
            "rest_from": rest_at, "rest_at": 256, "rest_nbytes": rest.numel(),
        }  # fmt: skip
        ref_pack.gather_pieces(source, wanted[0], tables, wanted[1], **where)
        ops.gather_pieces(source.cuda(), found[0], tables.pin_memory(), found[1], **where)
        for want, got in zip(wanted, found, strict=True):
            assert torch.equal(got.cpu(), want)


@on_gpu
@pytest.mark.parametrize("width", [7168, 144, 200])
def test_rows_go_into_a_graph_and_out_of_it(width):
    for n in (1, 3, 127, 128):
        given = torch.randint(0, 256, (n, width), dtype=torch.uint8, device="cuda")
        scales, most = torch.rand(n, -(-width // 128), device="cuda"), 128
        to_rows, to_scales = (
            torch.zeros(most, width).byte().cuda(),
            torch.zeros(most, scales.shape[1]).cuda(),
        )
        places, outputs = (
            torch.zeros(most + 1).long().cuda(),
            torch.randn(most, width).bfloat16().cuda(),
        )
        outs = [torch.full((n + 1, width), float("nan")).bfloat16().cuda() for _ in range(2)]
        first = n // 3  # rows of a call before
        order = torch.arange(first, n, dtype=torch.int32).pin_memory()
        memory = given.data_ptr(), scales.data_ptr()
        fields = [first, *memory, outs[0].data_ptr(), 0] if first else []
        fields += [n, *memory, outs[1].data_ptr(), order.data_ptr()]
        calls, count = torch.zeros(3, 1 + 5 * most).long(), torch.ones(1).long().cuda()
        calls[1, : 1 + len(fields)] = torch.tensor([len(fields) // 5, *fields])
        calls, told = calls.pin_memory(), torch.zeros(1).long().pin_memory()
        ops.stage(to_rows, to_scales, places, calls, count, 2 * width)
        ops.deliver(outputs, places)
        ops.tell(count, told)
        torch.cuda.synchronize()
        assert (int(told), int(count)) == (2, 2)
        assert torch.equal(to_rows[:n], given)
        assert torch.equal(to_scales[:n], scales)
        assert not to_rows[n:].any()
        assert torch.equal(outs[0][:first], outputs[:first])
        assert torch.equal(outs[1][: n - first], outputs[first:n])
        assert outs[0][first:].isnan().all(), "written behind the rows"
        assert outs[1][n - first :].isnan().all(), "written behind the rows"


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [7168, 200])
def test_rows_that_lie_anywhere_are_added_as_torch_adds_them(width, dtype):
    for n in (1, 3, 127, 128):
        h, shared, rows = (outliers(160, width, dtype).cuda() for _ in range(3))
        place = torch.tensor([rows[8 : 8 + n].data_ptr(), n]).pin_memory()
        for other in (shared, None):
            got, wanted = h.clone(), h.clone()
            ops.add_placed(got, place, other)
            added = rows[8 : 8 + n]
            wanted[:n] += added if other is None else added + shared[:n]
            assert torch.equal(got, wanted)


@on_gpu
@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize(("width", "hidden"), [(7168, 2048), (512, 192), (256, 64), (1024, 1408)])
@pytest.mark.parametrize("n", ROWS)
def test_expert_against_float64(n, width, hidden, reproducible):
    weights, (q, scales) = expert(width, hidden, device="cuda"), rows(n, width, device="cuda")
    got = ops.expert_ffn(q, scales, *weights, reproducible=reproducible)
    assert error(got, exact(q, scales, weights)) < FP8


@on_gpu
@pytest.mark.parametrize(
    ("width", "hidden"),  # one item a worker, two, a round of 128 columns, and what is left beside one or two
    [(7168, 2048), (7168, 8192), (256, 16896), (256, 16960), (7168, 18432), (384, 33856)],
)  # fmt: skip
def test_reproducible_expert_has_one_order_for_any_number_of_rows(width, hidden):
    weights, (q, scales) = expert(width, hidden, device="cuda"), rows(300, width, device="cuda")
    scales[2, 1] = float("nan")
    whole = ops.expert_ffn(q, scales, *weights, reproducible=True)
    assert whole[2].isnan().all()
    assert whole.isfinite().all(1).sum() == 299
    for n in (1, 3, 16, 17, 32, 33, 64, 65, 96, 128, 129):
        part = ops.expert_ffn(q[:n], scales[:n], *weights, reproducible=True)
        assert torch.equal(part.view(torch.int16), whole[:n].view(torch.int16))


@on_gpu
@pytest.mark.parametrize("n", [129, 200, 256, 300, 1000, 2048, 4097])
@pytest.mark.parametrize(("width", "hidden"), [(7168, 2048), (1024, 2304), (640, 768)])
def test_many_rows_have_the_bits_of_stored_sums(n, width, hidden):
    """Big and small units, K of which 4 blocks are no part, a bad scale, rows and halves that are not there."""
    gate_up, gate_up_scales, down, down_scales = expert(width, hidden, device="cuda")
    q, scales = rows(n, width, device="cuda", seed=n)
    scales[n // 3, 0] = float("nan")
    both = torch.empty(n, 2 * hidden, device="cuda")
    tile_gemm(q, scales, gate_up, gate_up_scales, both, 2)
    h, h_scales = swiglu.swiglu_dense(both, scales_by_block=False)
    wanted = torch.empty(n, width, dtype=torch.bfloat16, device="cuda")
    tile_gemm(h, h_scales, down, down_scales, wanted, 1)
    x_scales = tile.turned(scales)
    assert torch.equal(x_scales[:, :n].nan_to_num(-1.0), scales.t().nan_to_num(-1.0))
    got_h = torch.full_like(h.view(torch.uint8), 0xFF).view(h.dtype)
    got_scales = torch.full((h_scales.shape[1], x_scales.shape[1]), -7.0, device="cuda")
    tile.multiply(q, x_scales, gate_up, gate_up_scales, got_h, got_scales)
    got = torch.full_like(wanted.view(torch.int16), -1).view(wanted.dtype)
    tile.multiply(got_h, got_scales, down, down_scales, got)
    for found, expected in ((got_h, h), (got_scales[:, :n].t(), h_scales), (got, wanted)):
        assert torch.equal(found.contiguous().view(torch.uint8), expected.view(torch.uint8))
    assert torch.all(got_scales[:, n:] == -7)
    assert got[n // 3].isnan().all()
    assert got[n // 3 + 1 :].isfinite().all()


@on_gpu
@pytest.mark.parametrize(
    ("most", "sizes"),
    [(128, (1, 3, 17, 63, 64, 65, 127)), (300, (129, 255, 299)), (2100, (1000, 1793, 2047))],
)
def test_within_a_regime_a_row_depends_on_no_other_row(most, sizes):
    weights, (q, scales) = expert(7168, 2048, device="cuda"), rows(most, 7168, device="cuda")
    whole = ops.expert_ffn(q, scales, *weights)
    for n in sizes:
        assert torch.equal(ops.expert_ffn(q[:n], scales[:n], *weights), whole[:n])


@on_gpu
@pytest.mark.parametrize(("width", "hidden"), [(7168, 2048), (7168, 18432), (512, 192), (272, 64)])
def test_rows_of_an_expert_go_where_each_is_wanted(width, hidden):
    weights, (q, scales) = (
        expert(width, hidden, device="cuda"),
        rows(128, width, device="cuda"),
    )
    for most, n in ((8, 0), (8, 1), (16, 16), (32, 17), (64, 33), (64, 64), (128, 127), (128, 128)):
        wanted = ops.expert_ffn(q[:most], scales[:most], *weights)
        outs = torch.full((2, n + 1, width), float("nan")).bfloat16().cuda()
        order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
        which = order % 2  # of the two memories
        places = torch.zeros(1 + most, dtype=torch.int64)
        places[0] = n
        places[1 : 1 + n] = outs.data_ptr() + (which * (n + 1) + order) * 2 * width
        ops.expert_ffn_placed(q[:most], scales[:most], *weights, places.cuda())
        torch.cuda.synchronize()
        assert torch.equal(outs[which, order], wanted[:n])
        assert outs[1 - which, order].isnan().all(), "a row that nobody wants there"
        assert outs[:, n].isnan().all(), "written behind the rows"


@on_gpu
def test_grouped_experts_have_the_bits_of_single_ones():
    experts = [expert(1024, 256, device="cuda", seed=s) for s in range(4)]
    q, scales = rows(200, 1024, device="cuda")
    listed = [(0, 0, 70), (1, 70, 70), (3, 70, 71), (2, 71, 190), (0, 190, 200)]
    groups = torch.tensor(listed, dtype=torch.int32, device="cuda")
    stacked = [torch.stack(parts) for parts in zip(*experts, strict=True)]
    got = ops.expert_ffn_grouped(q, scales, groups, *stacked, max_rows=129)
    for e, start, end in listed:
        part = slice(start, end)
        single = ops.expert_ffn(
            q[part].contiguous(), scales[part].contiguous(), *experts[e], reproducible=True
        )
        assert torch.equal(got[part], single)


@on_gpu
@pytest.mark.parametrize("which", [1, 3])
def test_mutation_scales_of_another_block_are_seen(which):
    weights, (q, scales) = list(expert(512, 256, device="cuda")), rows(9, 512, device="cuda")
    expected = exact(q, scales, weights)
    weights[which] = weights[which].roll(1, 0)
    assert not error(ops.expert_ffn(q, scales, *weights), expected) < FP8


@on_gpu
@pytest.mark.parametrize(
    ("n", "experts", "groups", "top_groups", "top_k"),
    [(128, 256, 8, 4, 8), (1000, 64, 1, 1, 6), (127, 160, 8, 3, 6), (3, 384, 1, 1, 8)],
)
def test_gates_choose_what_the_references_choose(n, experts, groups, top_groups, top_k):
    logits, bias, eye = torch.randn(n, experts), torch.randn(experts), torch.eye(experts)
    common = {
        "top_k": top_k,
        "num_groups": groups,
        "top_k_groups": top_groups,
        "routed_scaling_factor": 2.5,
    }
    for name, args, extra in (
        ("gate_v3", (logits, eye, bias), {"norm_topk_prob": True}),
        ("gate_v2", (logits, eye), {"num_experts": experts}),
        ("gate_v2", (logits, eye, bias / 4 - 2), {"num_experts": experts}),
    ):
        expected = getattr(ref_gate, name)(*args, **common, **extra)
        got = getattr(ops, name)(*(a.cuda() for a in args), **common, **extra)
        (ids, order), (want, want_order) = got[0].cpu().sort(1), expected[0].sort(1)
        assert torch.equal(ids, want)
        weights = got[1].cpu().gather(1, order)
        assert torch.allclose(weights, expected[1].gather(1, want_order), rtol=1e-5, atol=1e-6)


@on_gpu
@pytest.mark.parametrize("n", [1, 127, 512, 8192])
def test_a_graph_tells_in_host_memory_what_it_has_written_before_it_ends(n):
    """Each replay's number comes after its ids, and long before the end of what is launched behind it."""
    ids, weights = torch.zeros(n, 8, dtype=torch.int32, device="cuda"), torch.zeros(n, 8).cuda()
    to_ids, to_weights = torch.zeros(n, 8).int().pin_memory(), torch.zeros(n, 8).pin_memory()
    count, told = torch.zeros(1).long().cuda(), torch.zeros(1).long().pin_memory()
    seen = told.numpy().data

    def step():
        ids.add_(1)
        weights.add_(0.5)
        ops.publish(ids, weights, to_ids, to_weights, count, told)
        torch.cuda._sleep(2_000_000)  # about a millisecond

    replays = Replays(torch.device("cuda"))
    early = 0
    for number in range(1, 200):
        replays.run("step", step)
        behind = torch.cuda.Event()
        behind.record()
        while seen[0] < number:
            pass
        early += not behind.query()
        assert seen[0] == number
        assert (to_ids.numpy() == number).all()
        assert (to_weights.numpy() == 0.5 * number).all()
    torch.cuda.synchronize()
    assert early


@on_gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("heads", "rope", "page"), [(128, 64, 64), (128, 16, 64), (64, 64, 128), (192, 16, 64), (16, 64, 16)]
)  # fmt: skip
def test_decode_over_poisoned_pages(heads, rope, page, fp8):
    latent, contexts = 512, [1, 63, 64, 65, 129, 192, 193, 1000, 4096, 4097, 5000]
    pages = [-(-c // page) for c in contexts]
    width = latent + latent // 32 + 2 * rope if fp8 else latent + rope
    kind = torch.uint8 if fp8 else torch.bfloat16
    cache = torch.full((sum(pages), page, width), 255 if fp8 else float("nan"), dtype=kind)
    table, order, start = (
        torch.zeros(len(contexts), max(pages)).int(),
        torch.randperm(sum(pages)),
        0,
    )
    for i, (tokens, count) in enumerate(zip(contexts, pages, strict=True)):
        table[i, :count] = order[start : start + count]
        start += count
        token = torch.arange(tokens)
        slots = table[i, token // page].long() * page + token % page
        ref_paged.cache_write(
            torch.randn(tokens, latent + rope).bfloat16(), cache, slots, latent=latent
        )
    queries = torch.randn(len(contexts), heads, latent + rope).bfloat16()
    context = torch.tensor(contexts, dtype=torch.int32)
    place = {"scale": 0.07, "latent": latent, "max_context": 5000}
    expected = ref_paged.mla_decode_paged(queries.float(), cache, table, context, **place)
    args = [t.cuda() for t in (queries, cache, table, context)]
    got = ops.mla_decode_paged(*args, **place)
    assert error(got.cpu(), expected.double()) < BF16
    alone = ops.mla_decode_paged(args[0][9:10], args[1], args[2][9:10], args[3][9:10], **place)
    assert torch.equal(alone, got[9:10])  # bits depend on a request's own context only


@on_gpu
@pytest.mark.parametrize("size", [1e-3, 300.0, 1e4, 1e6])
def test_an_fp8_cache_is_multiplied_within_the_range_of_f16(size):
    latent, tokens, page = 512, 1000, 64
    cache = torch.full((16, page, latent + latent // 32 + 128), 255, dtype=torch.uint8)
    entries = torch.randn(tokens, latent + 64) * size
    entries[:, latent:] /= size
    ref_paged.cache_write(entries.bfloat16(), cache, torch.arange(tokens), latent=latent)
    queries = torch.randn(1, 128, latent + 64)
    queries[..., :latent] /= max(size, 1)
    table, context = torch.arange(16).int()[None], torch.tensor([tokens], dtype=torch.int32)
    place = {"scale": 0.07, "latent": latent, "max_context": 1024}
    args = queries.bfloat16(), cache, table, context
    expected = ref_paged.mla_decode_paged(queries.bfloat16().float(), *args[1:], **place)
    got = ops.mla_decode_paged(*(a.cuda() for a in args), **place).cpu()
    if size == 1e6:
        assert got.isnan().all()  # and no wrong number
    else:
        assert error(got, expected.double()) < BF16


@on_gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("climb", [-9.0, 0.5, 7.0, 9.0])
def test_decode_where_scores_climb(climb, fp8):
    """By that many powers of two from one block of keys to the next: sums are scaled anew at once, late, or seldom."""
    latent, tokens, page = 512, 1000, 64
    entries, queries = torch.randn(tokens, latent + 64), torch.randn(1, 128, latent + 64) * 0.05
    entries[:, -1], queries[..., -1] = climb * (torch.arange(tokens) // 64), 1.0
    width, kind = (latent + 144, torch.uint8) if fp8 else (latent + 64, torch.bfloat16)
    cache = torch.zeros(16, page, width, dtype=kind)
    ref_paged.cache_write(entries.bfloat16(), cache, torch.arange(tokens), latent=latent)
    table, context = torch.arange(16).int()[None], torch.tensor([tokens], dtype=torch.int32)
    place = {"scale": math.log(2), "latent": latent, "max_context": 1024}
    args = queries.bfloat16(), cache, table, context
    expected = ref_paged.mla_decode_paged(queries.bfloat16().float(), *args[1:], **place)
    got = ops.mla_decode_paged(*(a.cuda() for a in args), **place).cpu()
    assert error(got, expected.double()) < BF16


@on_gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_cache_write_and_norm_rope(fp8):
    x, weight, angle = (
        torch.randn(129, 576).bfloat16(),
        torch.randn(512).bfloat16(),
        torch.randn(129, 32),
    )
    args = (x, weight, angle.cos(), angle.sin())
    for interleaved in (False, True):
        expected = ref_paged.norm_rope(*args, eps=1e-6, interleaved=interleaved)
        got = ops.norm_rope(*(a.cuda() for a in args), eps=1e-6, interleaved=interleaved)
        assert error(got.cpu(), expected.double()) < 1e-3
    shape = (4, 64, 512 + 16 + 128) if fp8 else (4, 64, 576)
    cache = torch.zeros(shape, dtype=torch.uint8 if fp8 else torch.bfloat16)
    on_card, slots = cache.cuda(), torch.randperm(256)[:129]
    slots[5] = -1
    ref_paged.cache_write(x, cache, slots, latent=512)
    ops.cache_write(x.cuda(), on_card, slots.cuda(), latent=512)
    assert torch.equal(on_card.cpu(), cache)


@on_gpu
@pytest.mark.parametrize(
    ("width", "value"), [(192, 128), (128, 128), (128, 64), (56, 56), (48, 72)]
)
def test_prefill_of_ragged_sequences(width, value):
    counts = [(1, 1), (3, 300), (64, 64), (65, 129), (127, 127), (128, 256), (200, 200), (130, 131)]
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in zip(*counts, strict=True)]
    q = torch.randn(int(starts[0][-1]), 16, width).bfloat16()
    k, v = (torch.randn(int(starts[1][-1]), 16, w).bfloat16() for w in (width, value))
    place = {"scale": width**-0.5, "max_rows": 200}
    expected = ref_paged.mla_prefill_rows(q, k, v, *starts, **place)

    def run(*args):
        return ops.mla_prefill_rows(*(a.cuda() for a in args), **place).cpu()

    got = run(q, k, v, *starts)
    assert error(got, expected.double()) < BF16
    # Bits depend on no other sequence, nor on how many of its own rows come at once.
    for i, (n, count) in enumerate(counts):
        mine = [slice(int(s[i]), int(s[i + 1])) for s in (starts[0], starts[1], starts[1])]
        others = [torch.full_like(t, float("nan")) for t in (q, k, v)]
        for to, source, where in zip(others, (q, k, v), mine, strict=True):
            to[where] = source[where]
        assert torch.equal(run(*others, *starts)[mine[0]], got[mine[0]])
        first = n // 3  # these have come before
        own = [t[where] for t, where in zip((q, k, v), mine, strict=True)]
        ends = [torch.tensor([0, m], dtype=torch.int32) for m in (n - first, count)]
        assert torch.equal(run(own[0][first:], *own[1:], *ends), got[mine[0]][first:])


@on_gpu
@pytest.mark.parametrize("m", [1, 3, 17, 33, 64, 65, 129, 512])
@pytest.mark.parametrize(("n", "k"), [(2064, 7168), (7168, 1536), (7168, 7168), (24576, 1536)])
def test_fp8_linear(m, n, k):
    q, scales = rows(m, k)
    weight, weight_scales = expert(k, n)[2:]  # down of an expert: [k, n]
    weight, weight_scales = weight.t().contiguous(), weight_scales.t().contiguous()
    wide = ref_projection.dequantise_weight(weight, weight_scales).double()
    expected = ref_projection.dequantise(q, scales, torch.float64) @ wide.t()
    args = (q, scales, weight, weight_scales)
    got = ops.fp8_linear(*(a.cuda() for a in args))
    assert got.shape == (m, n)
    assert error(got.cpu(), expected) < BF16
    assert error(ref_projection.fp8_linear(*args), expected) < BF16


@on_gpu
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "nope", "rope"), [(128, 40, 16), (128, 128, 64), (4, 32, 16)])
def test_rope_queries(heads, nope, rope, interleaved):
    query = torch.randn(129, heads, nope + rope).bfloat16()
    angle = torch.randn(129, rope // 2)
    expected, got = (torch.full((129, heads, 512 + rope), 7.0).bfloat16() for _ in range(2))
    place = {"nope": nope, "interleaved": interleaved}
    ref_projection.rope_queries(query, angle.cos(), angle.sin(), expected, **place)
    got = got.cuda()
    ops.rope_queries(query.cuda(), angle.cos().cuda(), angle.sin().cuda(), got, **place)
    assert (got[..., :512] == 7).all()
    assert error(got.cpu(), expected.double()) < 1e-3
