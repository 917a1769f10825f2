"""Who is let in: a peer without the secret, or one that disagrees, gets one clear sentence on both sides."""

import asyncio
import contextlib
import logging
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import AuthError, DeadlineExceeded, LinkClosed, WireError
from common.ids import Role
from common.transport.control import ControlLimits
from common.transport.handshake import MAX_HANDSHAKE_NBYTES, Handshake
from common.transport.ucx import UcxTransport
from tests.contract.harness import LIMITS, ROUTER, SECRET, Peer, hello, run

OTHER_SECRET = b"another secret of many bytes, oh"


def sides(mine=None, theirs=None, secret=SECRET, version=1):
    dialler = Handshake(
        secret, mine or hello(), dialling=True, nonce=os.urandom(32), where="there", version=version
    )
    listener = Handshake(
        SECRET, theirs or ROUTER, dialling=False, nonce=os.urandom(32), where="here"
    )
    return dialler, listener


def shake(dialler, listener):
    """Carry frames until both are done."""
    answer = listener.feed(bytearray(dialler.start()))
    proof = dialler.feed(bytearray(answer))
    assert listener.feed(bytearray(proof)) == b""
    return dialler, listener


# -- the state machine alone


def test_both_learn_who_the_other_is():
    dialler, listener = shake(*sides(hello(index=3, node=2), ROUTER))
    assert (dialler.peer.process, listener.peer.process) == (ROUTER.process, hello(index=3).process)
    assert listener.peer.node == 2


def test_sealed_frames_both_ways():
    dialler, listener = shake(*sides())
    for num in range(3):
        for sender, receiver in ((dialler, listener), (listener, dialler)):
            body = b"x" * num * 1000
            data = bytearray(sender.seal(body))
            tail = data.pop()
            assert receiver.unseal(data, 10_000) is None, "incomplete"
            data.append(tail)
            assert receiver.unseal(data, 10_000) == body
            assert data == b""


def test_a_replayed_a_skipped_and_a_reflected_frame():
    for attack in ("replay", "skip", "reflect"):
        dialler, listener = shake(*sides())
        first, second = dialler.seal(b"one"), dialler.seal(b"two")
        if attack == "reflect":
            with pytest.raises(WireError, match="modified, replayed or lost"):
                dialler.unseal(bytearray(first), 100)
            continue
        if attack == "replay":
            assert listener.unseal(bytearray(first), 100) == b"one"
            second = first
        with pytest.raises(WireError, match="modified, replayed or lost"):
            listener.unseal(bytearray(second), 100)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 255))
def test_any_modified_byte_of_a_sealed_frame(where, flip):
    dialler, listener = shake(*sides())
    data = bytearray(dialler.seal(b'{"m":{"plan":1}}'))
    data[where % len(data)] ^= flip
    with contextlib.suppress(WireError):
        assert listener.unseal(data, 1000) is None  # a longer length: waits for more


@settings(deadline=None)
@given(st.integers(0, 2), st.integers(0, 2**31), st.integers(1, 255))
def test_any_modified_byte_of_the_handshake(frame, where, flip):
    """It fails, or stays incomplete; what it never does is open, or raise anything else."""
    dialler, listener = sides()

    def through(data, num):
        data = bytearray(data)
        if num == frame:
            data[where % len(data)] ^= flip
        return data

    try:
        answer = listener.feed(through(dialler.start(), 0))
        proof = dialler.feed(through(answer, 1)) if answer else b""
        if proof:
            listener.feed(through(proof, 2))
    except AuthError:
        pass
    assert listener.peer is None


@settings(deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_garbage_is_refused_or_incomplete(data, dialling):
    end = sides()[0 if dialling else 1]
    with contextlib.suppress(AuthError):
        end.feed(bytearray(data))
    assert end.peer is None


def test_a_recorded_handshake_cannot_be_replayed():
    dialler, listener = sides()
    challenge = dialler.start()
    proof = dialler.feed(bytearray(listener.feed(bytearray(challenge))))
    fresh = sides()[1]
    fresh.feed(bytearray(challenge))
    with pytest.raises(AuthError, match="does not have the cluster secret"):
        fresh.feed(bytearray(proof))


def test_a_short_secret_is_refused():
    with pytest.raises(AuthError, match="at least 16"):
        Handshake(b"short", hello(), dialling=True, nonce=bytes(32), where="x")


# -- over a real socket


MISMATCHES = {
    "model": (
        "m1",
        "router-0 has model m0, expert-0 has m1",
        "expert-0 has model m1, router-0 has m0",
    ),
    "epoch": (2, "router-0 has epoch 1, expert-0 has 2", "expert-0 has epoch 2, router-0 has 1"),
    "wire": (
        "bf16",
        "router-0 has wire fp8, expert-0 has bf16",
        "expert-0 has wire bf16, router-0 has fp8",
    ),
}


@pytest.mark.parametrize("field", MISMATCHES)
def test_both_sides_name_the_mismatch(ucx, caplog, field):
    value, said_here, said_there = MISMATCHES[field]

    async def main():
        listener, dialler, there, here = ucx.transport(), ucx.transport(), Peer(), Peer()
        address = await listener.listen(ucx.address(), ROUTER, there)
        with pytest.raises(AuthError, match=said_here):
            await dialler.connect(address, hello(**{field: value}), here, timeout_s=5)
        await asyncio.sleep(0.05)
        assert said_there in caplog.text
        assert here.calls == there.calls == []

    with caplog.at_level(logging.WARNING):
        run(ucx, main)


@pytest.mark.parametrize("field", MISMATCHES)
def test_both_implementations_refuse_a_mismatch(net, field):
    async def main():
        listener, dialler, there, here = net.transport(), net.transport(), Peer(), Peer()
        address = await listener.listen(net.address(), ROUTER, there)
        with pytest.raises(AuthError, match=f"router-0 has {field}"):
            await dialler.connect(
                address, hello(**{field: MISMATCHES[field][0]}), here, timeout_s=5
            )

    run(net, main)


def test_a_wrong_secret(ucx, caplog):
    async def main():
        listener, there = ucx.transport(), Peer()
        dialler = UcxTransport(OTHER_SECRET, link_limits=LIMITS)
        ucx.transports.append(dialler)
        address = await listener.listen(ucx.address(), ROUTER, there)
        with pytest.raises(
            AuthError, match=r"router-0 at .* does not have the cluster secret of expert-0"
        ):
            await dialler.connect(address, hello(), Peer(), timeout_s=5)
        await asyncio.sleep(0.05)
        assert "refused router-0: another cluster secret" in caplog.text
        for secret in (SECRET, OTHER_SECRET):
            assert secret.decode() not in caplog.text
            assert secret.hex() not in caplog.text
        assert there.calls == []

    with caplog.at_level(logging.DEBUG):
        run(ucx, main)


def test_another_protocol_version(ucx, monkeypatch):
    async def main():
        listener, dialler = ucx.transport(), ucx.transport()
        address = await listener.listen(ucx.address(), ROUTER, Peer())
        made = Handshake.__init__

        def newer(self, *args, **kwargs):
            made(self, *args, **kwargs, version=2 if kwargs["dialling"] else 1)

        monkeypatch.setattr(Handshake, "__init__", newer)
        with pytest.raises(AuthError, match="speaks protocol version 1, expert-0 speaks 2"):
            await dialler.connect(address, hello(), Peer(), timeout_s=5)

    run(ucx, main)


async def raw(address):
    return await asyncio.open_unix_connection(address.removeprefix("unix:"))


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": bytes(200),
    "random": os.urandom(500),
    "huge frame": struct.pack("<4sHBBI", b"ATOL", 1, 1, 0, MAX_HANDSHAKE_NBYTES + 1),
    "out of order": struct.pack("<4sHBBI", b"ATOL", 1, 3, 0, 0),
    "not json": struct.pack("<4sHBBI", b"ATOL", 1, 1, 0, 3) + b"{]}",
    "json of another shape": struct.pack("<4sHBBI", b"ATOL", 1, 1, 0, 10) + b'{"nonce":1',
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_cut_off_and_others_go_on(ucx, data):
    async def main():
        listener, dialler, there = ucx.transport(), ucx.transport(), Peer()
        address = await listener.listen(ucx.address(), ROUTER, there)
        reader, writer = await raw(address)
        writer.write(data)
        await asyncio.wait_for(reader.read(), 5)  # EOF well before the handshake's deadline
        writer.close()
        await dialler.connect(address, hello(), Peer(), timeout_s=5)
        assert [what for what, _ in there.calls] == ["open"]

    run(ucx, main)


def test_a_mute_peer_loses_its_slot(ucx, caplog):
    """Half-open connections beyond the bound push out the oldest, and the deadline takes the rest."""

    async def main():
        listener = ucx.transport(control=ControlLimits(handshake_timeout_s=1.0, max_handshakes=4))
        address = await listener.listen(ucx.address(), ROUTER, Peer())
        mute = []
        for _ in range(10):
            mute.append(await raw(address))
            mute[-1][1].write(b"ATOL")
            await asyncio.sleep(0)
        await ucx.transport().connect(address, hello(), Peer(), timeout_s=5)
        for reader, writer in mute:
            with contextlib.suppress(OSError):
                assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
        assert "did not finish its handshake" in caplog.text

    run(ucx, main)


def test_a_listener_that_says_nothing(ucx, tmp_path):
    async def main():
        path = f"{tmp_path}/mute"
        server = await asyncio.start_unix_server(lambda _reader, writer: held.append(writer), path)
        held = []
        with pytest.raises(DeadlineExceeded, match=r"did not answer within 0.2 s"):
            await ucx.transport().connect(f"unix:{path}", hello(), Peer(), timeout_s=0.2)
        server.close()
        for writer in held:
            writer.close()

    run(ucx, main)


def test_nobody_listens(net):
    async def main():
        with pytest.raises(LinkClosed, match="cannot be reached"):
            await net.transport().connect(net.address(), hello(), Peer(), timeout_s=5)

    run(net, main)


def test_an_authenticated_peer_that_falls_silent(ucx, monkeypatch):
    monkeypatch.setattr("common.transport.ucx_link._FIRST_FRAME_S", 0.2)

    async def main():
        listener, there = ucx.transport(), Peer()
        address = await listener.listen(ucx.address(), ROUTER, there)
        reader, writer = await raw(address)
        mine = Handshake(SECRET, hello(), dialling=True, nonce=os.urandom(32), where="x")
        writer.write(mine.start())
        received = bytearray()
        while mine.peer is None:
            received += await reader.read(4096)
            writer.write(mine.feed(received))
        assert await asyncio.wait_for(reader.read(), 5) == b""
        assert there.calls == []
        assert "[0 links" in repr(listener)
        writer.close()

    run(ucx, main)


@pytest.mark.parametrize("attack", ["oversize", "modified", "not json", "no message"])
def test_a_bad_frame_after_the_handshake_closes_the_link(ucx, attack):
    """The attacker here knows the secret: even then nothing but its own link suffers."""

    async def main():
        listener = ucx.transport(control=ControlLimits(max_frame_nbytes=10_000))
        there = Peer()
        address = await listener.listen(ucx.address(), ROUTER, there)
        reader, writer = await raw(address)
        mine = Handshake(
            SECRET, hello(Role.GATEWAY, data=False), dialling=True, nonce=os.urandom(32), where="x"
        )
        writer.write(mine.start())
        received = bytearray()
        while mine.peer is None:
            received += await reader.read(4096)
            writer.write(mine.feed(received))
        writer.write(mine.seal(b'{"init":{"facts":{"a":1},"window":4}}'))
        await there.until(lambda: bool(there.links))
        assert there.links[0].peer.facts == {"a": 1}
        body = {"oversize": bytes(10_001), "not json": b"{]", "no message": b"{}"}.get(
            attack, b"{}"
        )
        frame = bytearray(mine.seal(body))
        if attack == "modified":
            frame[-1] ^= 1
        writer.write(frame)
        await there.until(lambda: bool(there.closed))
        assert "gateway-0" in str(there.closed[0][1])
        writer.close()

    run(ucx, main)


def test_tcp_control_sockets(ucx):
    async def main():
        listener, dialler, there, here = ucx.transport(), ucx.transport(), Peer(), Peer()
        address = await listener.listen("tcp://127.0.0.1:0", ROUTER, there)
        assert not address.endswith(":0")
        link = await dialler.connect(
            address, hello(facts={"hash": "ab" * 20_000}), here, timeout_s=5
        )
        link.send_control({"x": "y" * 100_000})
        await there.until(lambda: bool(there.controls))
        assert there.links[0].peer.facts["hash"] == "ab" * 20_000

    run(ucx, main)
