"""A peer in a process of its own: `python -m tests.contract.child ADDRESS KIND [DEVICE]`, prints `ready` when it can be
killed. With a device rows lie apart, in its memory, so that a process of this host is a neighbour.

KIND: `echo` answers everything; `hold` takes messages and never releases them; `flood` sends large messages to whoever
connects, `offer` one, of the rows OFFERED; `dial` dials ADDRESS and floods; `invert` answers rows with their
complement, where it is wanted, and nothing whose tables do not have the checksum `num_pairs`.
"""

import asyncio
import contextlib
import sys
import zlib

import torch
import uvloop

from common.errors import AtollError
from common.ids import Role
from common.transport.device import DevicePool, open_context, open_seam
from common.transport.link import LinkLimits
from common.transport.ucx import UcxTransport
from common.wire.header import Header, Kind
from tests.contract.harness import SECRET, Peer, hello, send, send_apart
from tests.device import synchronise

FLOOD_NBYTES = 4 << 20
OFFERED = bytes(i * 7 % 251 for i in range(100_000))


class _Flooding(Peer):
    def __init__(self, transport):
        super().__init__()
        self._transport = transport

    def on_open(self, link):
        super().on_open(link)
        with contextlib.suppress(AtollError):
            for block in range(32):
                if self._transport.pool.apart:
                    send_apart(self._transport, link, FLOOD_NBYTES, 1000, block=block)
                else:
                    send(self._transport, link, bytes(FLOOD_NBYTES), block=block)


class _Offering(Peer):
    def __init__(self, transport):
        super().__init__()
        self._pool = transport.pool

    def on_open(self, link):
        super().on_open(link)
        payload = self._pool.acquire(len(OFFERED), rows_nbytes=len(OFFERED))
        payload.rows.tensor.copy_(torch.frombuffer(bytearray(OFFERED), dtype=torch.uint8))
        synchronise(self._pool.device)
        link.post(Header(Kind.DISPATCH), payload)
        payload.release()


class _Inverting(Peer):
    def __init__(self, transport):
        super().__init__()
        self._pool = transport.pool

    def on_message(self, link, header, payload):
        if zlib.crc32(payload.array) == header.num_pairs:
            landing, rows = payload.landing, payload.rows
            out = self._pool.acquire_rows(rows.nbytes) if landing is None else landing.retain()
            torch.bitwise_not(rows.tensor, out=out.tensor)
            synchronise(self._pool.device)
            answer = self._pool.acquire_with(out)
            link.post(header.derive(Kind.EXPERT_OUT, target=0, payload_nbytes=0), answer)
            answer.release()
        payload.release()


async def main(address, kind, device=""):
    options = {}
    if device:
        open_context(device)
        options = {"pool": DevicePool(device), "seam": open_seam(device)}
    transport = UcxTransport(SECRET, link_limits=LinkLimits(window=8), **options)
    peer = Peer(echo=kind == "echo", hold=kind == "hold")
    if kind in ("flood", "dial"):
        peer = _Flooding(transport)
    elif kind == "offer":
        peer = _Offering(transport)
    elif kind == "invert":
        peer = _Inverting(transport)
    if kind == "dial":
        await transport.connect(address, hello(Role.EXPERT, 1), peer, timeout_s=5)
    else:
        await transport.listen(address, hello(Role.ROUTER), peer)
    print("ready", flush=True)
    await asyncio.sleep(60)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
