"""What an expert worker holds follows what its routers ask for: loaded, dropped, and answered for."""

import asyncio
from types import SimpleNamespace

import pytest
import torch

from common.errors import ModelError
from common.ids import ProcessId, Role
from services.expert.bank import Bank
from services.expert.device_bank import DeviceBank, DeviceExpert
from services.expert.holdings import Holdings


class Router:
    """A router's link; what it is answered."""

    def __init__(self, index: int) -> None:
        self.peer = SimpleNamespace(process=ProcessId(Role.ROUTER, index))
        self.answers: list[dict] = []

    def send_control(self, message) -> None:
        self.answers.append(message)


def read(place):
    if place[1] == 13:
        raise ModelError("tensor 13 is missing")
    if place[1] == 14:
        raise torch.OutOfMemoryError("no room")
    return f"weights {place}", f"hash {place}"


def holds(bank) -> set:
    assert set(bank.weights) == set(bank.hashes) == set(bank.rows)
    return set(bank.hashes)


def run(num_routers, body) -> None:
    async def main() -> None:
        bank = Bank(8, "m", {}, {})
        holdings = Holdings(bank, read, num_routers)
        task = asyncio.ensure_future(holdings.run())

        async def answered(router, count):
            async with asyncio.timeout(5):
                while len(router.answers) < count:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            return router.answers[-1]

        await body(holdings, bank, answered)
        task.cancel()

    asyncio.run(main())


def test_an_expert_goes_when_no_router_wants_it():
    async def body(holdings, bank, answered) -> None:
        first, second = Router(0), Router(1)
        holdings.want(first, 1, [[1, 0], [1, 1]])
        answer = await answered(first, 1)
        assert answer["experts"] == [[1, 0, "hash (1, 0)"], [1, 1, "hash (1, 1)"]]
        assert (answer["id"], answer["error"]) == (1, "")
        holdings.want(first, 2, [[1, 0]])
        await answered(first, 2)
        assert holds(bank) == {(1, 0), (1, 1)}, "the other router has not spoken"
        holdings.want(second, 1, [[1, 1], [1, 2]])
        await answered(second, 1)
        assert holds(bank) == {(1, 0), (1, 1), (1, 2)}
        holdings.want(second, 2, [[1, 0]])
        await answered(second, 2)
        assert holds(bank) == {(1, 0)}

    run(2, body)


@pytest.mark.parametrize(("expert", "sentence"), [(13, "tensor 13 is missing"), (14, "no room")])
def test_what_cannot_be_loaded_is_said_and_tried_again_when_asked_again(expert, sentence):
    async def body(holdings, bank, answered) -> None:
        router = Router(0)
        holdings.want(router, 1, [[1, 0], [1, expert], [2, 5]])
        answer = await answered(router, 1)
        assert answer["error"] == f"expert {expert} of layer 1: {sentence}"
        assert holds(bank) == {(1, 0), (2, 5)}
        holdings.read = lambda place: ("weights", "hash")
        holdings.want(router, 2, [[1, expert]])
        assert (await answered(router, 2))["error"] == ""
        assert holds(bank) == {(1, expert)}

    run(1, body)


def test_a_question_that_is_overtaken_is_answered_by_the_later_one():
    async def body(holdings, bank, answered) -> None:
        router = Router(0)
        holdings.want(router, 1, [[1, e] for e in range(5)])
        holdings.want(router, 2, [[1, 7]])
        answer = await answered(router, 1)
        assert (answer["id"], answer["experts"]) == (2, [[1, 7, "hash (1, 7)"]])

    run(1, body)


def test_graphs_go_with_the_last_place_that_stands_for_their_weights():
    """A graph would read memory that is free, and be replayed for a later expert with the same id."""
    forgotten: list[DeviceExpert] = []
    shared, own = (DeviceExpert(torch.zeros(2, 1), torch.zeros(1, 1)) for _ in range(2))
    bank = DeviceBank(1, "m", {}, {}, {}, {}, SimpleNamespace(forget=forgotten.append))
    for place, network in (((1, 0), shared), ((1, 1), shared), ((1, 2), own)):
        bank.add(place, network, "hash")
    bank.drop((1, 0))
    assert forgotten == []
    bank.drop((1, 2))
    bank.drop((1, 1))
    assert [network is shared for network in forgotten] == [False, True]
    assert not bank.experts
    assert not bank.hashes
