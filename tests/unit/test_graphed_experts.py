"""Experts on few rows as graphs, here run step by step: buckets, buffers that all share, experts that are dropped."""

import pytest
import torch

from kernels import ops
from services.expert.bank import MAX_BATCH_ROWS, Call
from services.expert.device_bank import DeviceBank
from services.expert.device_experts import DeviceExpert, GraphedExperts, GroupedExperts
from services.expert.engine import compute

WIDTH, HIDDEN = 256, 128


def expert(seed):
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape):
        return (torch.randn(*shape, generator=generator) * 20).to(torch.float8_e4m3fn)

    gate_up, down = weight(2 * HIDDEN, WIDTH), weight(WIDTH, HIDDEN)
    return DeviceExpert(gate_up, down, torch.full((2, 2), 0.01), torch.full((2, 1), 0.01))


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ops.quantise(torch.randn(count, WIDTH, generator=generator))


def bank():
    experts = {(0, 0): expert(1), (0, 1): expert(2)}
    experts[0, 8] = experts[0, 0]  # one that stands for another
    counts, hashes = dict.fromkeys(experts, 0), dict.fromkeys(experts, "h")
    graphed = GraphedExperts(WIDTH, torch.device("cpu"))
    return DeviceBank(WIDTH, "m", {}, hashes, counts, experts, graphed)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 128, 129])
def test_a_bucket_computes_what_the_expert_does(count):
    held = bank()
    given, scales = rows(count)
    for place in ((0, 0), (0, 1)):
        assert torch.equal(held.ffn(*place, given, scales), held.experts[place](given, scales))


@pytest.mark.parametrize("counts", [[3], [128], [129], [60, 2, 70]], ids=str)
def test_rows_that_are_picked_from_a_block(counts):
    """Whatever way they are computed: as a graph, as they are, by several experts."""
    held, (given, scales) = bank(), rows(200)
    picked, plain = [], []
    for seed, count in enumerate(counts):
        index = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:count]
        segments = [(seed % 2, count - 1), (8, 1)] if count == 60 else [(0, count)]
        table = torch.cat([torch.zeros(20, dtype=torch.uint8), index.int().view(torch.uint8)])
        picked.append(Call(given, scales, segments, None, (table, 20, count)))
        chosen = given.view(torch.uint8)[index].view(given.dtype)
        plain.append(Call(chosen, scales[index], segments))
        own = picked[-1].with_own_rows()
        assert torch.equal(own.rows.float(), chosen.float())
        assert torch.equal(own.scales, scales[index])
    for got, wanted in zip(compute(held, 0, picked), compute(held, 0, plain), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("where", ["stage", "tell"])
def test_a_graph_that_cannot_be_launched_leaves_nothing_for_the_next(where, monkeypatch):
    held, (given, scales) = bank(), rows(9)
    held.together(0, [Call(given, scales, [(0, 9)])])
    with monkeypatch.context() as patch:
        patch.setattr(ops, where, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            held.together(0, [Call(given[:5], scales[:5], [(0, 5)])])
    for count in (3, 9, 2, 8, 7):
        call = Call(given[:count], scales[:count], [(1, count)])
        (output,) = held.together(0, [call])
        assert held.written()()
        assert torch.equal(output, held.experts[0, 1](*call.quantised))


def test_a_call_that_cannot_be_brought_takes_no_turn():
    held, (given, scales) = bank(), rows(9)
    crooked = torch.zeros(5 * WIDTH + 16, dtype=torch.uint8)
    crooked = crooked[1 : 1 + 5 * WIDTH].view(5, WIDTH).view(given.dtype)
    with pytest.raises(AssertionError, match="not aligned"):
        held.together(0, [Call(crooked, scales[:5], [(0, 5)])])
    (output,) = held.together(0, [Call(given, scales, [(0, 9)])])
    assert held.written()()
    assert torch.equal(output, held.experts[0, 0](given, scales))


def test_a_turn_that_is_not_over_is_not_written_over(monkeypatch):
    """The device is slow: what does not fit behind its turns is computed without a graph, all with the same result."""
    held, (given, scales) = bank(), rows(40)
    behind = []
    monkeypatch.setattr(held.graphed._graphs, "run", lambda key, step: behind.append(step))
    calls, outputs = [], []
    for n in range(12):
        calls.append(Call(given[n : 2 * n + 1], scales[n : 2 * n + 1], [(0, n + 1)]))
        outputs.append(compute(held, 0, calls[-1:])[0])
        assert (held.written() is None) == (n >= 8)
    last = held.ffn(0, 1, given, scales)
    assert len(behind) == 8
    for step in behind[:3]:
        step()
    outputs.append(compute(held, 0, calls[:1])[0])
    assert len(behind) == 9, "there is room again"
    for step in behind[3:]:
        step()
    assert held.written()()
    for call, output in zip([*calls, calls[0]], outputs, strict=True):
        assert torch.equal(output, held.experts[0, 0](*call.quantised))
    assert torch.equal(last, held.experts[0, 1](given, scales))


def test_what_is_computed_without_a_graph_is_told_by_an_event():
    held = bank()
    held.together(0, [Call(*rows(9), [(0, 9)])])
    assert held.written() is not None
    compute(held, 0, [Call(*rows(129), [(0, 129)])])
    assert held.written() is None


def test_an_answer_outlives_the_next_call():
    held = bank()
    first = held.ffn(0, 0, *rows(8, seed=1))
    kept = first.clone()
    held.ffn(0, 1, *rows(8, seed=2))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("counts", [[8], [129], [3, 5], [130, 2]], ids=str)
def test_outputs_go_where_they_are_wanted(counts):
    held = bank()
    calls = [Call(*rows(count, seed=i), [(0, count)]) for i, count in enumerate(counts)]
    expected = compute(held, 0, calls)
    for call, output in zip(calls, expected, strict=True):
        call.out = torch.full_like(output, float("nan"))
    for call, output, wanted in zip(calls, compute(held, 0, calls), expected, strict=True):
        assert output is call.out
        assert torch.equal(output, wanted)


@pytest.mark.parametrize("counts", [(3, 5, 1), (64, 64), (1, 127), (100, 29)], ids=str)
@pytest.mark.parametrize("are_placed", [True, False])
def test_calls_of_one_expert_are_one_graph_if_they_fit(counts, are_placed, monkeypatch):
    held, replays = bank(), []
    monkeypatch.setattr(
        GraphedExperts, "_compute", lambda *args, real=GraphedExperts._compute: replays.append(real(*args))
    )  # fmt: skip
    calls = [Call(*rows(count, seed=i), [(0, count)]) for i, count in enumerate(counts)]
    wanted = [held.experts[0, 0](call.rows, call.scales) for call in calls]
    if are_placed:
        for call, output in zip(calls, wanted, strict=True):
            call.out = torch.full_like(output, float("nan"))
    for call, output, expected in zip(calls, compute(held, 0, calls), wanted, strict=True):
        assert torch.equal(output, expected)
        assert not are_placed or output is call.out
    fits = sum(counts) <= held.max_batch_rows
    assert len(replays) == (1 if fits else 0)
    assert held.rows[0, 0] == sum(counts)


def test_how_many_rows_are_computed_together():
    assert (bank().max_batch_rows, packed_bank().max_batch_rows) == (128, MAX_BATCH_ROWS)


def test_an_output_of_another_type_stays_where_it_is():
    held = bank()
    given, scales = rows(8)
    out = torch.full((8, WIDTH), float("nan"), dtype=torch.float64)
    (output,) = compute(held, 0, [Call(given, scales, [(0, 8)], out)])
    assert output.dtype is torch.bfloat16
    assert torch.equal(output, held.ffn(0, 0, given, scales))
    assert out.isnan().all()


def test_what_an_earlier_call_left_reaches_nobody():
    held = bank()
    poisoned, scales = rows(8, seed=1)
    bad = torch.full((8, WIDTH), float("nan")).to(torch.float8_e4m3fn)
    held.ffn(0, 0, bad, torch.ones_like(scales))
    few, few_scales = poisoned[:3], scales[:3]
    assert torch.equal(held.ffn(0, 0, few, few_scales), held.experts[0, 0](few, few_scales))


def test_graphs_go_with_the_last_place_that_has_their_weights(monkeypatch):
    held, forgotten = bank(), []
    monkeypatch.setattr(GraphedExperts, "forget", lambda self, network: forgotten.append(network))
    network = held.experts[0, 0]
    held.drop((0, 0))
    assert forgotten == []
    held.drop((0, 8))
    assert forgotten == [network]
    assert (0, 8) not in held


def packed_bank(size=3):
    """Three experts of a layer, of which `size` have a slot."""
    held = bank()
    loose = [expert(seed) for seed in (1, 2, 3)]
    held.experts, held.hashes, held.rows = {}, {}, {}
    held.grouped = GroupedExperts(loose[0], size, torch.device("cpu"))
    for i, one in enumerate(loose):
        held.add((0, i), one, "h")
    return held


@pytest.mark.parametrize("size", [3, 2])
@pytest.mark.parametrize("counts", [(3, 0, 5), (1, 70, 64), (100, 90, 129), (500, 500, 500)])
def test_experts_together_compute_what_each_does(size, counts):
    held, start, expected = packed_bank(size), 0, []
    given, scales = rows(sum(counts))
    segments = [(e, n) for e, n in enumerate(counts) if n]
    for e, n in segments:
        part = slice(start, start + n)
        expected.append(held.experts[0, e](given[part], scales[part]))
        start += n
    (out,) = compute(held, 0, [Call(given, scales, segments)])
    assert torch.equal(out, torch.cat(expected))
    assert held.rows == {(0, e): n for e, n in enumerate(counts)}
    ran_together = held.together(0, [Call(given, scales, segments)]) is not None
    assert ran_together == (size == 3)


def test_calls_of_one_layer_are_computed_together():
    held = packed_bank()
    (a, a_scales), (b, b_scales) = rows(9, seed=1), rows(4, seed=2)
    calls = [Call(a, a_scales, [(0, 4), (2, 5)]), Call(b, b_scales, [(0, 4)])]
    first, second = compute(held, 0, calls)
    assert torch.equal(first[:4], held.experts[0, 0](a[:4], a_scales[:4]))
    assert torch.equal(first[4:], held.experts[0, 2](a[4:], a_scales[4:]))
    assert torch.equal(second, held.experts[0, 0](b, b_scales))


def test_a_slot_that_was_given_up_serves_the_next_expert():
    held = packed_bank()
    held.drop((0, 1))
    new = expert(9)
    held.add((0, 7), new, "h")
    given, scales = rows(6)
    (together,) = held.together(0, [Call(given, scales, [(0, 2), (7, 4)])])
    assert torch.equal(together[2:], new(given[2:], scales[2:]))
