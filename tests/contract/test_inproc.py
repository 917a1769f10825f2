"""What only the in-process network can do: no event loop, a manual clock, a script, replay from a seed."""

import pytest

from common.errors import AuthError, LinkClosed
from common.transport.inproc import LOST, InprocFabric
from common.transport.link import LinkLimits
from common.wire.header import Header, Kind
from tests.contract.harness import ROUTER, hello


class Log:
    """A synchronous handler that writes down when what happened."""

    def __init__(self, fabric, name="", echo=False):
        self.fabric, self.name, self.echo = fabric, name, echo
        self.lines, self.links = [], []

    def _note(self, *what):
        self.lines.append((self.fabric.now_us, self.name, *what))

    def on_open(self, link):
        self.links.append(link)

    def on_message(self, link, header, payload):
        self._note("message", header.block)
        if self.echo:
            link.post(header, payload)
        if payload is not None:
            payload.release()

    def on_control(self, link, message):
        self._note("control", message)

    def on_close(self, link, error):
        self._note("close", str(error))


def post(transport, link, block, nbytes=10):
    payload = transport.pool.acquire(nbytes)
    link.post(Header(Kind.EXPERT_IN, block=block), payload)
    payload.release()


def star(fabric, num_links, **limits):
    """One listener with `num_links` dialled links."""
    hub, log = fabric.transport(link_limits=LinkLimits(**limits)), Log(fabric, "hub", echo=True)
    hub.listen_now("hub", ROUTER, log)
    spokes = []
    for index in range(num_links):
        transport, seen = (
            fabric.transport(link_limits=LinkLimits(**limits)),
            Log(fabric, f"{index}"),
        )
        link = transport.connect_now("hub", hello(index=index), seen)
        spokes.append((transport, seen, link))
    return hub, log, spokes


def test_a_manual_clock():
    fabric = InprocFabric(script=lambda *_: 100)
    _, log, [(transport, seen, link)] = star(fabric, 1)
    post(transport, link, 1)
    assert fabric.advance(99) == 0
    assert log.lines == []
    fabric.advance(1)
    assert log.lines == [(100, "hub", "message", 1)]
    fabric.run_until_idle()
    assert seen.lines == [(200, "0", "message", 1)]
    assert transport.pool.outstanding == 0


def jittery(_sender, _receiver, chance):
    return chance.randrange(500)


def replay(seed):
    fabric = InprocFabric(seed, script=jittery)
    hub, log, spokes = star(fabric, 5, window=4)
    for block in range(20):
        for transport, _, link in spokes:
            post(transport, link, block)
    spokes[2][2].send_control({"x": 1})
    fabric.advance(700)
    spokes[3][0].crash()
    fabric.run_until_idle()
    assert hub.pool.outstanding == 0
    return [log.lines, *(seen.lines for _, seen, _ in spokes)]


def test_a_run_replays_from_its_seed():
    assert replay(1) == replay(1)
    assert replay(1) != replay(2)


def test_reorder_across_links_but_never_within_one():
    fabric = InprocFabric(3, script=jittery)
    _, log, spokes = star(fabric, 4, window=64)
    for block in range(50):
        for index, (transport, _, link) in enumerate(spokes):
            post(transport, link, index * 1000 + block)
    fabric.run_until_idle()
    order = [block for _, _, _, block in log.lines]
    assert sorted(order) != order
    for index in range(4):
        assert [b for b in order if b // 1000 == index] == [index * 1000 + b for b in range(50)]


def test_a_lost_message_closes_its_link_and_no_other():
    losses = iter([0, 0, LOST])
    fabric = InprocFabric(script=lambda *_: next(losses, 0))
    _, log, [(first, seen, link), (second, other, fine)] = star(fabric, 2)
    post(first, link, 1)
    fabric.run_until_idle()
    post(first, link, 2)
    post(first, link, 3)
    fabric.run_until_idle()
    assert [line[2] for line in seen.lines] == ["message", "close"]
    assert "lost a message" in seen.lines[-1][3]
    assert [line[3] for line in log.lines if line[2] == "message"] == [1], "nothing after a gap"
    post(second, fine, 4)
    fabric.run_until_idle()
    assert other.lines[-1][2:] == ("message", 4)
    assert first.pool.outstanding == 0


def test_a_crash_is_seen_by_peers_only():
    fabric = InprocFabric()
    hub, log, [(transport, seen, _)] = star(fabric, 1)
    transport.crash()
    fabric.run_until_idle()
    assert [line[2] for line in log.lines] == ["close"]
    assert seen.lines == []
    hub.crash()
    with pytest.raises(LinkClosed, match="cannot be reached"):
        fabric.transport().connect_now("hub", hello(), seen)


def test_the_handshake_refuses_what_ucx_refuses():
    fabric = InprocFabric()
    star(fabric, 0)
    with pytest.raises(AuthError, match="router-0 has epoch 1, expert-0 has 9"):
        fabric.transport().connect_now("hub", hello(epoch=9), Log(fabric))


def test_a_network_that_never_rests_is_reported():
    fabric = InprocFabric()
    _, _, [(transport, seen, link)] = star(fabric, 1)
    seen.echo = True
    post(transport, link, 1)
    with pytest.raises(RuntimeError, match="not idle after 500 events"):
        fabric.run_until_idle(max_events=500)
