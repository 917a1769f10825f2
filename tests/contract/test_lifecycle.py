"""Opening and closing: either side, at any moment, cancelled at any await; and what outlives it (nothing)."""

import asyncio
import gc
import logging
import os
import stat
from pathlib import Path

import pytest

from common.errors import ConfigError, LinkClosed
from common.ids import Role
from common.transport.dial import backoff_s, keep_connected
from common.wire.header import Header, Kind
from tests.contract.harness import LIMITS, ROUTER, Peer, hello, pair, run, send


@pytest.mark.parametrize("side", ["dialler", "listener"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_close_from_either_side(net, side, loop):
    async def main():
        here, there = Peer(), Peer(hold=True)
        link, back, dialler, _ = await pair(net, here, there)
        for block in range(LIMITS.window + 3):
            send(dialler, link, bytes(400_000), block=block)
        await there.until(lambda: bool(there.messages))
        closing = link if side == "dialler" else back
        closing.close("enough")
        closing.close("twice")
        with pytest.raises(LinkClosed, match="closed here: enough"):
            closing.post(Header(Kind.DISPATCH))
        await here.until(lambda: bool(here.closed))
        await there.until(lambda: bool(there.closed))
        other = there if side == "dialler" else here
        assert "closed the link: enough" in str(other.closed[0][1])
        await asyncio.sleep(0.02)
        for peer in (here, there):
            assert [what for what, _ in peer.calls].count("close") == 1
            assert peer.calls[-1][0] == "close", "nothing may follow on_close"
        there.let_go()

    run(net, main, loop=loop)


@pytest.mark.parametrize("moment", ["on_open", "on_message", "on_control", "on_close"])
def test_a_handler_that_raises_closes_only_its_link(net, caplog, moment):
    async def main():
        good, bad = Peer(echo=True), Peer()
        listener, dialler = net.transport(), net.transport()

        def broken(*arguments):
            if moment == "on_message":
                arguments[2].release()
            raise RuntimeError("a bug in the handler")

        setattr(bad, moment, broken)
        good_address = await listener.listen(net.address(), ROUTER, good)
        bad_address = await listener.listen(net.address(), hello(Role.ROUTER, 1), bad)
        here, lost = Peer(), Peer()
        link = await dialler.connect(good_address, hello(), here, timeout_s=5)
        doomed = await dialler.connect(bad_address, hello(), lost, timeout_s=5)
        try:
            doomed.send_control({"a": 1})
            send(dialler, doomed, b"x")
        except LinkClosed:
            pass
        if moment == "on_close":
            await bad.until(lambda: len(bad.calls) == 3)
            bad.links[0].close("now")
        await lost.until(lambda: bool(lost.closed))
        send(dialler, link, b"still here")
        await here.until(lambda: bool(here.messages))
        assert "raised" in caplog.text

    with caplog.at_level(logging.ERROR):
        run(net, main)


def test_closing_within_a_callback(net):
    async def main():
        here, there = Peer(), Peer()
        link, _, dialler, _ = await pair(net, here, there)
        seen = []

        def on_message(link, header, payload):
            link.close("one is enough")
            seen.append(len(there.closed))
            payload.release()

        there.on_message = on_message
        for _ in range(5):
            send(dialler, link, b"x")
        await here.until(lambda: bool(here.closed))
        await there.until(lambda: bool(there.closed))
        assert seen == [0], "on_close comes after the callback, and no message after the close"

    run(net, main)


class _CancelAtStep:
    """Runs an awaitable and throws CancelledError in at its n-th suspension."""

    def __init__(self, coroutine, step):
        self._coroutine, self._step = coroutine, step
        self.reached = False

    def __await__(self):
        steps = self._coroutine.__await__()
        value = None
        for _ in range(self._step):
            try:
                value = steps.send(None)
            except StopIteration as stop:
                return stop.value
            yield value
        try:
            waited = steps.send(None)
        except StopIteration as stop:
            return stop.value
        self.reached = True
        if waited is not None:
            waited._asyncio_future_blocking = False
            waited.cancel()
        steps.throw(asyncio.CancelledError())
        raise AssertionError("cancellation was swallowed")


async def cancelled_at(step, coroutine):
    """True when `coroutine` got as far as its `step`-th await, and was cancelled there."""
    guard = _CancelAtStep(coroutine, step)
    try:
        await guard
    except asyncio.CancelledError:
        assert guard.reached
    return guard.reached


@pytest.mark.parametrize("what", ["connect", "listen", "close"])
def test_cancelled_at_every_await(net, what):
    """Afterwards the same call works, and both handlers saw as many closes as opens."""

    async def main():
        for step in range(50):
            listener, dialler, there, here = net.transport(), net.transport(), Peer(), Peer()
            address = net.address()
            if what == "listen":
                reached = await cancelled_at(step, listener.listen(address, ROUTER, there))
                if reached:
                    await listener.listen(address, ROUTER, there)
                link = await dialler.connect(address, hello(), here, timeout_s=5)
            else:
                await listener.listen(address, ROUTER, there)
                call = dialler.connect(address, hello(), here, timeout_s=5)
                if what == "connect":
                    reached = await cancelled_at(step, call)
                    link = await dialler.connect(address, hello(), here, timeout_s=5)
                else:
                    link = await call
                    send(dialler, link, bytes(1 << 20))
                    reached = await cancelled_at(step, dialler.close())
                    await dialler.close()
                    await there.until(lambda there=there: bool(there.closed))
            if what != "close":
                send(dialler, link, b"works")
                await there.until(lambda there=there: bool(there.messages))
            await dialler.close()
            await listener.close()
            await asyncio.sleep(0.01)
            for peer in (here, there):
                calls = [name for name, _ in peer.calls]
                assert calls.count("open") == calls.count("close")
            if not reached:
                assert step > 0
                return
        raise AssertionError("no end of awaits")

    run(net, main, loop="asyncio")


def test_the_listener_closes_while_peers_connect(net):
    async def main():
        for _ in range(5):
            listener, there = net.transport(), Peer()
            address = await listener.listen(net.address(), ROUTER, there)
            diallers = [net.transport() for _ in range(3)]
            heres = [Peer() for _ in diallers]
            tasks = [
                asyncio.ensure_future(d.connect(address, hello(), h, timeout_s=5))
                for d, h in zip(diallers, heres, strict=True)
            ]
            await asyncio.sleep(0)
            await listener.close()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for result, here in zip(results, heres, strict=True):
                if isinstance(result, BaseException):
                    assert isinstance(result, LinkClosed)
                else:
                    await here.until(lambda here=here: bool(here.closed))

    run(net, main)


def test_links_come_and_go_between_the_same_two(net):
    async def main():
        listener, dialler, there = net.transport(), net.transport(), Peer(echo=True)
        address = await listener.listen(net.address(), ROUTER, there)
        for turn in range(30):
            here = Peer()
            link = await dialler.connect(address, hello(), here, timeout_s=5)
            for block in range(5):
                send(dialler, link, bytes([turn]) * 300_000, block=block)
            await here.until(lambda here=here: bool(here.messages))
            assert {body[0] for _, body in here.messages} == {turn}
            link.close("next")
            await here.until(lambda here=here: bool(here.closed))

    run(net, main)


def test_two_links_at_once_between_the_same_two(net):
    async def main():
        listener, dialler, there = net.transport(), net.transport(), Peer(echo=True)
        address = await listener.listen(net.address(), ROUTER, there)
        first, second = Peer(), Peer()
        one = await dialler.connect(address, hello(), first, timeout_s=5)
        two = await dialler.connect(address, hello(index=1), second, timeout_s=5)
        send(dialler, one, b"1")
        await first.until(lambda: bool(first.messages))
        one.close("the other stays")
        await first.until(lambda: bool(first.closed))
        send(dialler, two, b"2" * 500_000)
        await second.until(lambda: bool(second.messages))

    run(net, main)


def test_a_poll_that_raises_is_not_the_last(ucx):
    """What was left when something raised has no event of its own to wake the reactor."""

    class Broken:
        num_open = polls = 0

        def poll(self, *told):
            self.polls += 1
            if self.polls == 1:
                raise RuntimeError("broken")
            return False

        def arm(self):
            return True

    async def main():
        link, *_ = await pair(ucx, Peer(), Peer())
        reactor = link._plane.reactor
        reactor._loop.remove_reader(reactor._fd)
        await asyncio.sleep(0.05)  # nothing is scheduled any more
        assert not reactor._kicked
        whole, reactor.port = reactor.port, Broken()
        with pytest.raises(RuntimeError, match="broken"):
            reactor.pump()
        for _ in range(3):
            await asyncio.sleep(0)
        broken, reactor.port = reactor.port, whole
        reactor._loop.add_reader(reactor._fd, reactor._readable)
        assert broken.polls == 2

    run(ucx, main)


def test_who_waits_for_what_came_goes_before_the_next_poll(ucx):
    """A descriptor that stays readable, as UCX's does until it is armed, must not poll in between."""

    class Counting:
        num_open = polls = 0

        def poll(self, *told):
            self.polls += 1
            if self.polls == 1:  # something came, and somebody waits for it
                loop.call_soon(lambda: seen.append(self.polls))
            return self.polls == 1

        def arm(self):
            return True

    seen, loop = [], None

    async def main():
        nonlocal loop
        loop = asyncio.get_running_loop()
        link, *_ = await pair(ucx, Peer(), Peer())
        reactor = link._plane.reactor
        loop.remove_reader(reactor._fd)
        await asyncio.sleep(0.05)
        whole, reactor.port = reactor.port, Counting()
        reactor._is_busy, was = lambda: True, reactor._is_busy
        reactor.pump()
        before = reactor.port.polls
        reactor._readable()
        for _ in range(3):
            await asyncio.sleep(0)
        reactor._is_busy, reactor.port = was, whole
        loop.add_reader(reactor._fd, reactor._readable)
        assert seen == [before]

    run(ucx, main)


def test_nothing_works_after_close(net):
    async def main():
        transport = net.transport()
        await transport.close()
        await transport.close()
        with pytest.raises(LinkClosed, match="the transport is closed"):
            await transport.connect(net.address(), hello(), Peer(), timeout_s=5)
        with pytest.raises(LinkClosed, match="the transport is closed"):
            await transport.listen(net.address(), hello(), Peer())

    run(net, main)


def test_an_address_in_use(net):
    async def main():
        address = await net.transport().listen(net.address(), ROUTER, Peer())
        with pytest.raises(ConfigError, match=r"cannot listen on .*in use"):
            await net.transport().listen(address, ROUTER, Peer())

    run(net, main)


def mode(path: Path) -> int | None:
    """Permissions of a file, None when there is none."""
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else None


def test_the_socket_file(ucx):
    """Private to its user, gone after close, and a successor's is left alone."""

    async def main():
        first = ucx.transport()
        address = await first.listen(ucx.address(), ROUTER, Peer())
        path = Path(address.removeprefix("unix:"))
        assert mode(path) == 0o600
        os.unlink(path)
        second = ucx.transport()
        await second.listen(address, ROUTER, Peer())
        await first.close()
        assert mode(path) == 0o600
        await second.close()
        assert mode(path) is None

    run(ucx, main)


@pytest.mark.parametrize(
    "address", ["router", "unix:relative", "tcp://host", "tcp://:70000", "http://x:1"]
)
def test_a_malformed_address(ucx, address):
    async def main():
        with pytest.raises(ConfigError, match="neither tcp"):
            await ucx.transport().connect(address, hello(), Peer(), timeout_s=1)

    run(ucx, main)


def test_no_file_descriptor_or_thread_is_left(ucx):
    async def main():
        for turn in range(8):
            here, there = Peer(), Peer(echo=True)
            link, _, dialler, listener = await pair(ucx, here, there)
            send(dialler, link, bytes(100_000))
            await here.until(lambda here=here: bool(here.messages))
            await dialler.close()
            await listener.close()
            ucx.transports.clear()
            del link, _, dialler, listener, here, there
            await asyncio.sleep(0.01)
            gc.collect()
            if turn == 2:
                before = len(os.listdir("/proc/self/fd"))
        assert len(os.listdir("/proc/self/fd")) <= before

    run(ucx, main)


def test_keep_connected_comes_back_every_time(net):
    async def main():
        dialler, here, address = net.transport(), Peer(), net.address()
        async with asyncio.TaskGroup() as tasks:
            keeper = tasks.create_task(keep_connected(dialler, address, hello, here))
            for turn in range(3):
                await asyncio.sleep(0.02)
                listener, there = net.transport(), Peer()
                await listener.listen(address, ROUTER, there)
                await here.until(lambda turn=turn: len(here.links) == turn + 1)
                await listener.close()
                await here.until(lambda turn=turn: len(here.closed) == turn + 1)
            keeper.cancel()

    run(net, main)


def test_keep_connected_outlives_a_refusal(net, caplog):
    """A rolling restart: the other side has the old epoch for a while."""

    async def main():
        dialler, listener, here, address = net.transport(), net.transport(), Peer(), net.address()
        await listener.listen(address, ROUTER, Peer())
        async with asyncio.TaskGroup() as tasks:
            keeper = tasks.create_task(
                keep_connected(dialler, address, lambda: hello(epoch=2), here, max_s=0.05)
            )
            while "router-0 has epoch 1, expert-0 has 2" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)  # several more attempts
            assert not keeper.done()
            assert caplog.text.count("router-0 has epoch 1, expert-0 has 2") == 1, "said once"
            await listener.close()
            renewed = net.transport()
            await renewed.listen(address, hello(Role.ROUTER, epoch=2), Peer())
            await here.until(lambda: bool(here.links))
            keeper.cancel()
        await here.until(lambda: bool(here.closed))

    with caplog.at_level(logging.ERROR, "common.transport.dial"):
        run(net, main)


def test_back_off_grows_to_its_cap():
    assert [backoff_s(n, 0.0) for n in (0, 5, 1000)] == [0.01, 0.01, 0.01]
    assert backoff_s(0, 0.999) < 0.021
    assert 0.9 < backoff_s(1000, 0.999) <= 1.0


def num_epolls() -> int:
    """Descriptors of this process that watch others."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()]
    return sum("eventpoll" in link for link in links)


def test_no_descriptor_of_a_worker_outlives_its_transport(net):
    """Not even until garbage is collected: that may be in a forked child, which would take those of its parent."""

    async def once() -> int:
        here, there = Peer(), Peer()
        link, _, dialler, listener = await pair(net, here, there)
        send(dialler, link, bytes(1000), block=1)
        await there.until(lambda: bool(there.messages))
        await dialler.close()
        await listener.close()
        await asyncio.sleep(0.01)
        return num_epolls()

    async def main():
        await once()  # UCX keeps a thread of its own from the first worker on
        gc.collect()
        gc.disable()
        try:
            assert await once() >= await once()
        finally:
            gc.enable()

    run(net, main)
