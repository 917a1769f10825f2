"""Combine: float64 references, one fixed order bit for bit, exact mode, subsets, poison."""

import pytest
import torch

from kernels.reference.combine import OTHER, combine, combine_fp8, slot_table, sum_partials
from kernels.reference.quant import quantise, rows_view

WIDTH = 200


def problem(n, top_k, seed, dtype=torch.float32, drop=0.3):
    """Pairs sorted by row and expert, their rows in an arena in another order, and the answer in float64."""
    g = torch.Generator().manual_seed(seed)
    pairs = [(i, j) for i in range(n) for j in range(top_k) if torch.rand((), generator=g) > drop]
    pair_rows = torch.tensor([i for i, _ in pairs], dtype=torch.int32)
    weights = torch.rand(len(pairs), generator=g)
    slots = torch.randperm(len(pairs) + 5, generator=g)[: len(pairs)].int()
    source = torch.full((len(pairs) + 5, WIDTH), float("nan"))
    source[slots.long()] = torch.randn(len(pairs), WIDTH, generator=g) * 10
    source = source.to(dtype)
    expected = torch.zeros(n, WIDTH, dtype=torch.float64)
    terms = source[slots.long()].double() * weights.double().unsqueeze(1)
    expected.index_add_(0, pair_rows.long(), terms)
    return source, pair_rows, slots, weights, expected


@pytest.mark.parametrize(
    ("source_dtype", "out_dtype", "tolerance"),
    [
        (torch.bfloat16, torch.bfloat16, 2**-8),
        (torch.bfloat16, torch.float32, 1e-6),
        (torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.float64, 1e-14),
    ],
)
@pytest.mark.parametrize("n", [1, 3, 127, 129])
def test_against_float64(n, source_dtype, out_dtype, tolerance):
    source, rows, slots, weights, expected = problem(n, 8, n, source_dtype)
    table, table_weights = slot_table(rows, slots, weights, n)
    out = torch.full((n, WIDTH), float("nan"), dtype=out_dtype)
    combine(source, table, table_weights, out)
    assert torch.linalg.norm(out.double() - expected) <= tolerance * torch.linalg.norm(expected)


def test_the_order_is_a_plain_loop_bit_for_bit():
    source, rows, slots, weights, _ = problem(40, 8, 7)
    table, table_weights = slot_table(rows, slots, weights, 40)
    out = torch.empty(40, WIDTH)
    combine(source, table, table_weights, out)
    expected = torch.zeros(40, WIDTH)
    for pair, i in enumerate(rows.tolist()):
        expected[i] = expected[i] + weights[pair] * source[slots[pair]]
    assert torch.equal(out, expected)
    backwards = torch.empty_like(out)  # the mutation: another order gives other bits
    combine(source, table.flip(1), table_weights.flip(1), backwards)
    assert not torch.equal(out, backwards)


def test_arrival_order_and_other_rows_change_no_bit():
    source, rows, slots, weights, _ = problem(129, 8, 8, torch.bfloat16)
    table, table_weights = slot_table(rows, slots, weights, 129)
    out = torch.empty(129, WIDTH, dtype=torch.bfloat16)
    combine(source, table, table_weights, out)
    order = torch.randperm(source.shape[0])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    moved = torch.where(table >= 0, place[table.clamp_min(0).long()], -1).int()
    for part in (slice(0, 1), slice(5, 8), slice(0, 129)):
        again = torch.empty_like(out[part])
        combine(source[order], moved[part], table_weights[part], again)
        assert torch.equal(again, out[part])


def test_large_blocks_are_cut_without_changing_a_bit(monkeypatch):
    source, rows, slots, weights, _ = problem(60, 4, 9)
    table, table_weights = slot_table(rows, slots, weights, 60)
    whole, cut = torch.empty(60, WIDTH), torch.empty(60, WIDTH)
    combine(source, table, table_weights, whole)
    monkeypatch.setattr("kernels.reference.combine._CHUNK_ELEMENTS", 7 * 4 * WIDTH)
    combine(source, table, table_weights, cut)
    assert torch.equal(whole, cut)


def test_exact_mode_does_not_depend_on_the_nodes_that_experts_are_on():
    source, rows, slots, weights, _ = problem(200, 8, 10, drop=0.0)
    answers = []
    for nodes in (1, 2, 4):
        partials, lists = [], []
        for node in range(nodes):
            mine = torch.arange(len(rows)) % 8 * nodes // 8 == node
            table, table_weights = slot_table(rows[mine], slots[mine], weights[mine], 200)
            partial = torch.empty(200, WIDTH, dtype=torch.float64)
            combine(source, table, table_weights, partial)
            partials.append(partial)
            lists.append(None)
        out = torch.empty(200, WIDTH)
        sum_partials(partials, lists, out)
        answers.append(out)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_partials_of_a_subset_of_the_rows():
    parts = [torch.randn(3, WIDTH).bfloat16(), torch.randn(5, WIDTH).bfloat16()]
    out = torch.full((5, WIDTH), float("nan"), dtype=torch.bfloat16)
    sum_partials(parts, [torch.tensor([4, 0, 2], dtype=torch.int32), None], out)
    expected = torch.zeros(5, WIDTH)
    expected[[4, 0, 2]] += parts[0].float()
    expected += parts[1].float()
    assert torch.equal(out, expected.bfloat16())


def test_nothing_to_add_is_zero_and_nan_stays_nan_in_its_row():
    out = torch.full((2, WIDTH), float("nan"))
    combine(torch.empty(0, WIDTH), torch.full((2, 3), -1).int(), torch.zeros(2, 3), out)
    assert torch.equal(out, torch.zeros(2, WIDTH))
    source = torch.ones(2, WIDTH)
    source[1, 7] = float("nan")
    combine(source, torch.tensor([[0, -1], [0, 1]]).int(), torch.ones(2, 2), out)
    assert torch.equal(out[0], torch.ones(WIDTH))
    assert out[1].isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_a_plain_sum_of_two_sources_has_the_bits_of_a_sum_of_partials(dtype, seed):
    g = torch.Generator().manual_seed(seed)
    n, shares = 30, 5
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    own, partials, lists, columns, end = seed % shares, [], [], [], 0
    for share in range(shares):
        rows = torch.randperm(n, generator=g)[: 10 + share].sort().values
        partial = torch.randn(len(rows), WIDTH, generator=g, dtype=torch.float64) * 100
        first = OTHER if share == own else end
        end += 0 if share == own else len(rows)
        column = torch.full((n,), -1, dtype=torch.int32)
        column[rows] = torch.arange(len(rows), dtype=torch.int32) + first
        partials.append(partial.to(wide if share == own else dtype))
        lists.append(rows)
        columns.append(column)
    expected, out = torch.empty(n, WIDTH), torch.full((n, WIDTH), float("nan"))
    sum_partials(partials, lists, expected)
    source = torch.cat([part for share, part in enumerate(partials) if share != own])
    slots = torch.stack(columns, 1)
    combine(source, slots, None, out, partials[own])
    assert torch.equal(out, expected)
    combine(source, slots.flip(1), None, out, partials[own])
    assert dtype is torch.float64 or not torch.equal(out, expected), "mutation: another order"


def test_fp8_out_is_the_quantised_sum():
    source, rows, slots, weights, _ = problem(20, 4, 11, torch.bfloat16)
    table, table_weights = slot_table(rows, slots, weights, 20)
    out = torch.empty(20, WIDTH)
    combine(source, table, table_weights, out)
    payload = torch.full((20 * WIDTH + 20 * 8,), 0xFF, dtype=torch.uint8)
    combine_fp8(source, table, table_weights, payload, rows_offset=0, scales_offset=20 * WIDTH)
    q, scales = quantise(out)
    assert torch.equal(payload[: 20 * WIDTH], q.view(torch.uint8).flatten())
    assert torch.equal(rows_view(payload, 20 * WIDTH, 20, 2, torch.float32), scales)
