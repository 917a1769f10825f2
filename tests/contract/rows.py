"""Networks and handlers for tests of rows in device memory, and how these post and answer.

The device is the CPU, whatever ATOLL_TEST_DEVICE says: all peers are in one process. The form on the wire is the same.
`test_volleys` has processes that share a device.
"""

import ctypes
import struct

import torch

from common.transport.device import DevicePool
from common.transport.ucx import UcxTransport
from common.wire.header import Header, Kind
from tests.contract.harness import LIMITS, ROUTER, DeviceUcxNet, InprocNet, Peer, hello
from tests.device import synchronise


class ReachingPort:
    """A port to whom rows offered in the host memory of this process are in reach, as those of a device are."""

    def __init__(self, port):
        self._port = port

    def __getattr__(self, name):
        return getattr(self._port, name)

    def reach_rows(self, offer):
        if offer & 1 == 0:  # UCX's own
            return 0, 0, 0
        place = struct.Struct("QQI256x4x")
        (rows, _, _), (landing, wanted, _) = place.iter_unpack(
            ctypes.string_at(offer - 1 + 16, 2 * place.size)
        )
        return rows, landing if wanted else 0, wanted

    def return_rows(self, offer):
        self._port.discard_rows(offer)


class ReachingUcxNet(DeviceUcxNet):
    """Rows and landings are used where they are."""

    def transport(self, limits=LIMITS, **options) -> UcxTransport:
        made = super().transport(limits, **options)
        start = made._start

        def reaching():
            plane = start()
            plane.port = (
                ReachingPort(plane.port) if not isinstance(plane.port, ReachingPort) else plane.port
            )
            return plane

        made._start = reaching
        return made


class DeviceInprocNet(InprocNet):
    def transport(self, limits=LIMITS, **options):
        made = self._fabric.transport(
            link_limits=limits, pool=options.get("pool", DevicePool("cpu"))
        )
        self.transports.append(made)
        return made


NETS = {"inproc": DeviceInprocNet, "ucx": DeviceUcxNet, "reaching": ReachingUcxNet}


class RowsPeer(Peer):
    """Keeps (header, rows, tables) of everything; `answer` makes answers to requests."""

    def __init__(self, answer=None):
        super().__init__()
        self.got, self.places, self.answer = [], [], answer

    def on_message(self, link, header, payload):
        rows = tables = b""
        if payload is not None:
            tables = payload.array.tobytes()
            if payload.rows is not None:
                rows = payload.rows.tensor.cpu().numpy().tobytes()
                self.places.append((payload.rows.block, payload.rows.offset))
        self.got.append((header, rows, tables))
        if self.answer is not None and header.kind is Kind.EXPERT_IN:
            self.answer(link, header, rows)
        if payload is not None:
            payload.release()
        self._note("message", link)


class LandedPeer(RowsPeer):
    """Takes answers in short whose rows landed; `num_landed` of them."""

    num_landed = 0

    def on_landed(self, link, answer, landing):
        self.num_landed += 1
        self.places.append((landing.block, landing.offset))
        self.got.append((answer, landing.tensor.cpu().numpy().tobytes(), b""))
        self._note("message", link)


class HoldingPeer(RowsPeer):
    """Keeps payloads."""

    def on_message(self, link, header, payload):
        self.got.append((header, payload))
        self._note("message", link)


class ManualEvent:
    """A CUDA event that is passed when the test says so."""

    passed = False

    def record(self):
        pass

    def query(self):
        return ManualEvent.passed


def check_no_block_leaked(net):
    pools = [transport.pool for transport in net.transports]
    assert [p.rows_outstanding for p in pools if isinstance(p, DevicePool)] == [0] * len(pools)


def payload_of(pool, rows: bytes, tables: bytes):
    buffer = pool.acquire(len(rows) + len(tables), rows_nbytes=len(rows))
    if rows:
        buffer.rows.tensor.copy_(torch.frombuffer(bytearray(rows), dtype=torch.uint8))
        synchronise(pool.device)
    if tables:
        buffer.view[128 : 128 + len(tables)] = tables
    return buffer


def post(link, header, pool, rows: bytes, tables: bytes, landing=None):
    """One message, whose payload is the link's from now on."""
    buffer = payload_of(pool, rows, tables)
    link.post(header, buffer, landing=landing)
    buffer.release()


async def linked(net, here, there, **options):
    dialler, listener = net.transport(**options), net.transport()
    address = await listener.listen(net.address(), ROUTER, there)
    link = await dialler.connect(address, hello(), here, timeout_s=5)
    await there.until(lambda: bool(there.links))
    return link, dialler, listener


def answering(pool_of, nbytes=None, kind=Kind.EXPERT_OUT):
    def answer(link, header, rows):
        body = bytes(b ^ 0xFF for b in rows)[:nbytes]
        buffer = payload_of(
            pool_of(), body if kind is Kind.EXPERT_OUT else b"", b"" if body else b"x"
        )
        link.post(header.derive(kind, target=0, payload_nbytes=0), buffer)
        buffer.release()

    return answer


async def asked(net, here, num=1, **options):
    """A link, its other end, and there the answers to `num` questions, with rows where they are wanted.

    The answers (header, buffer) are still to be posted and released.
    """
    there = HoldingPeer()
    link, dialler, listener = await linked(net, here, there, **options)
    for block in range(num):
        place = dialler.pool.acquire_rows(4096)
        post(
            link, Header(Kind.EXPERT_IN, block=block), dialler.pool, bytes(100), b"", landing=place
        )
        place.release()
    await there.until(lambda: len(there.got) == num)
    answers = []
    for header, payload in there.got:
        reply = header.derive(Kind.EXPERT_OUT, target=0, payload_nbytes=0)
        answers.append((reply, listener.pool.acquire_with(payload.landing.retain())))
        payload.release()
    return link, there.links[0], answers
