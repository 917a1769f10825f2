"""A peer in a process of its own: `python -m tests.contract.child ADDRESS KIND [apart]`, prints `ready` when it can be
killed. With `apart` rows lie apart, so that a process of this host is a neighbour.

KIND: `echo` answers everything; `hold` takes messages and never releases them; `flood` sends large messages to whoever
connects; `dial` dials ADDRESS and floods.
"""

import asyncio
import contextlib
import sys

import uvloop

from common.errors import AtollError
from common.ids import Role
from common.transport.device import DevicePool
from common.transport.link import LinkLimits
from common.transport.ucx import UcxTransport
from tests.contract.harness import SECRET, Peer, hello, send, send_apart

FLOOD_NBYTES = 4 << 20


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


async def main(address, kind, apart=""):
    pool = DevicePool("cpu") if apart else None
    transport = UcxTransport(SECRET, link_limits=LinkLimits(window=8), pool=pool)
    peer = _Flooding(transport) if kind in ("flood", "dial") else Peer(
        echo=kind == "echo", hold=kind == "hold"
    )  # fmt: skip
    if kind == "dial":
        await transport.connect(address, hello(Role.EXPERT, 1), peer, timeout_s=5)
    else:
        await transport.listen(address, hello(Role.ROUTER), peer)
    print("ready", flush=True)
    await asyncio.sleep(60)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
