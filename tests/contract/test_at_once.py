"""Requests of neighbours that a link delivers at once: the same as step by step, whatever they say."""

import ctypes
import random

import pytest

from common.transport.link import LinkLimits, LinkState
from common.transport.ucx_arrivals import UcxArrivals
from common.wire.header import Header, Kind
from tests.contract.harness import pair, run
from tests.contract.rows import RowsPeer, post

WINDOW = 6
LIMITS = LinkLimits(window=WINDOW, max_queued=16, max_payload_nbytes=1 << 20)
CHANGES = (
    "kind", "unknown kind", "magic", "wire", "landed", "payload", "rows", "credits", "answer", "swapped", "again",
    "early", "offered", "short", "apart", "no credit", "too large",
)  # fmt: skip


class Changing:
    """A port whose next message with rows is another than the link has made."""

    def __init__(self, real, order):
        self._real, self._order, self.change = real, order, None

    def __getattr__(self, name):
        return getattr(self._real, name)

    def send_rows(self, to, tag, head, head_nbytes, address, nbytes, *rest):
        change, self.change = self.change, None
        message = bytearray(ctypes.string_at(head, head_nbytes))
        if change is not None:
            header = Header.unpack_from(message, max_payload_nbytes=1 << 30)
            if change == "kind":
                header.kind = self._order.choice(list(Kind))
            elif change == "landed":
                header.landed = 1
            elif change == "payload":
                header.payload_nbytes += self._order.choice([1, 16])
            elif change == "rows":
                header.rows_nbytes -= self._order.choice([1, 16])
            elif change == "credits":
                header.credits += self._order.choice([1, 1000])
            elif change == "answer":
                header.kind, header.answer = Kind.EXPERT_OUT, 77
            header.pack_into(message)
            if change in ("unknown kind", "magic", "wire"):
                message[{"magic": 0, "unknown kind": 3, "wire": 4}[change]] = 0xEE
            tag += {"early": 1, "swapped": 1, "back": -1, "again": -1, "apart": 1 << 56}.get(
                change, 0
            )
            nbytes -= 16 * (change == "offered")
            del message[-1 if change == "short" else len(message) :]
        memory = (ctypes.c_char * len(message)).from_buffer(message)
        at = ctypes.addressof(memory)
        return self._real.send_rows(to, tag, at, len(message), address, nbytes, *rest)


class Taking(RowsPeer):
    """Writes down what it is given, and keeps some of it while `keeps_all` is not said."""

    def __init__(self, order):
        super().__init__()
        self.order, self.seen, self.keeps_all = order, [], False

    def on_message(self, link, header, payload):
        rows = payload.rows and payload.rows.tensor.numpy().tobytes()
        landing = payload.landing and payload.landing.nbytes
        self.seen.append((header, payload.array.tobytes(), rows, landing))
        self.held.append(payload)
        if not self.keeps_all and (len(self.held) == WINDOW // 2 or self.order.random() < 0.5):
            self.let_go()

    def on_close(self, link, error):
        self.let_go()
        super().on_close(link, error)


@pytest.fixture
def net(in_reach):
    return in_reach


def outcome(net, change, seed):
    """What is delivered of twelve requests, one of them changed, and what has become of the link."""
    order, found = random.Random(seed), []

    async def main():
        there = Taking(random.Random(seed))
        link, back, dialler, listener = await pair(net, RowsPeer(), there, LIMITS)
        port = Changing(link._port, order)
        link._port, wrong = port, order.randrange(1, 9)
        there.keeps_all = change == "no credit"
        for block in range(12):
            port.change = change if block == wrong else None
            if change == "swapped" and block == wrong + 1:
                port.change = "back"
            if change == "no credit":
                link._credits.available = WINDOW
            landing = dialler.pool.acquire_rows(4096) if order.random() < 0.5 else None
            is_large = port.change == "too large"
            rows = bytes([block + 1]) * (2 << 20 if is_large else order.choice([64, 4096]))
            header = Header(order.choice([Kind.DISPATCH, Kind.EXPERT_PICK]), block=block)
            post(link, header, dialler.pool, rows, bytes([block]) * 32, landing=landing)
            if landing is not None:
                landing.release()
            for transport in (listener, dialler):
                transport._plane.reactor.pump()
        counts = back._credits
        found.append((
            there.seen, back.state, str(back._error), counts.next, counts.available, counts.owed, counts._unreturned,
            counts.by_ring,
        ))  # fmt: skip
        there.let_go()

    run(net, main, leak_free=False)
    return found[0]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("seed", range(2))
def test_requests_taken_at_once_are_those_taken_step_by_step(net, monkeypatch, change, seed):
    taken, real = [], UcxArrivals._take_at_once
    monkeypatch.setattr(
        UcxArrivals, "_take_at_once", lambda *args: taken.append(real(*args)) or taken[-1]
    )
    at_once = outcome(net, change, seed)
    assert any(taken)
    monkeypatch.setattr(UcxArrivals, "_take_at_once", lambda *_: False)
    assert at_once == outcome(net, change, seed)
    goes_on = at_once[1] is LinkState.OPEN
    assert goes_on == (change in ("swapped", "apart")) or change == "kind"


def test_what_overtakes_the_control_socket_waits(net):
    async def main():
        there = Taking(random.Random(0))
        link, back, dialler, listener = await pair(net, RowsPeer(), there, LIMITS)
        back.state = LinkState.OPENING
        for block in range(3):
            post(link, Header(Kind.DISPATCH, block=block), dialler.pool, bytes(64), bytes(16))
            listener._plane.reactor.pump()
        assert not there.seen
        back.state = LinkState.OPEN
        back.deliver_early()
        assert [header.block for header, *_ in there.seen] == [0, 1, 2]
        there.let_go()

    run(net, main)
