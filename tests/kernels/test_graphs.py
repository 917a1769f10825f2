"""Steps replayed by key: on a GPU what was captured, on CPU the step itself."""

import torch
from ffn_cases import expert, rows
from markers import on_gpu

from kernels.graphs import Replays
from services.expert.bank import Call
from services.expert.device_experts import DeviceExpert, GraphedExperts


def test_without_capture_every_step_is_run():
    replays, seen = Replays(torch.device("cpu")), []
    for number in range(3):
        replays.run("same", lambda number=number: seen.append(number))
    assert seen == [0, 1, 2]
    assert repr(replays) == "<Replays [0 captured | 0 replays]>"


def test_memory_of_forgotten_graphs_is_not_captured_into(monkeypatch):
    """As on a GPU, where torch ends the pool with its last graph; seen there to refuse the next capture."""
    replays = Replays(torch.device("cpu"))
    replays._captures, pools = True, []

    def capture(self, step):
        pools.append(self._pool)
        self._pool = self._pool or len(pools)
        return step

    monkeypatch.setattr(Replays, "_capture", capture)
    replays.run("a", list)
    replays.run("b", list)
    replays.forget("a")
    replays.run("c", list)
    for key in "bc":
        replays.forget(key)
    replays.run("d", list)
    assert pools == [None, 1, 1, None]


@on_gpu
def test_a_key_is_captured_once_until_it_is_forgotten():
    replays, steps = Replays(torch.device("cuda")), []
    x = torch.zeros(4, device="cuda")

    def step():
        steps.append(1)
        x.add_(1)

    for _ in range(4):
        replays.run("add", step)
    assert len(steps) == 2, "run once, captured once"
    assert x.tolist() == [4.0] * 4
    assert repr(replays) == "<Replays [1 captured | 3 replays]>"
    replays.forget("add")
    replays.run("add", step)
    assert (len(steps), x.tolist()) == (4, [5.0] * 4)


def check_graphed_expert(device, width, hidden):
    """It computes what the expert does, wherever its outputs are wanted."""
    network = DeviceExpert(*(expert(width, hidden, device=device)[i] for i in (0, 2, 1, 3)))
    graphed = GraphedExperts(width, torch.device(device))
    # a graph is captured at the first of a bucket, and replayed after
    for sizes in ((5,), (128,), (3, 2), (1,), (100, 28), (1, 40, 59)):
        n, calls, wanted, first = sum(sizes), [], [], 0
        q, scales = rows(n, width, device=device)
        memory = torch.full((n + 2, width), float("nan"), device=device).bfloat16()
        for size in sizes:
            part = slice(first, first + size)
            out = memory[1 + first : 1 + first + size] if size != 3 else None
            if size % 2:
                calls.append(Call(q[part], scales[part], [], out))
            else:  # of all rows these, as a neighbour's memory and a message say
                index = torch.arange(first, first + size, dtype=torch.int32)
                table = torch.cat([torch.zeros(4, dtype=torch.uint8), index.view(torch.uint8)])
                table = table.pin_memory() if device == "cuda" else table
                calls.append(Call(q, scales, [], out, (table, 4, size)))
            wanted.append(network(q[part], scales[part]))
            first += size
        for call, output, expected in zip(calls, graphed(network, calls), wanted, strict=True):
            assert call.out is None or output is call.out
            assert torch.equal(output, expected)
        assert memory[0].isnan().all()
        assert memory[n + 1].isnan().all()


def test_a_graphed_expert_step_by_step():
    check_graphed_expert("cpu", 256, 128)


@on_gpu
def test_a_graphed_expert_on_a_gpu():
    check_graphed_expert("cuda", 7168, 2048)
