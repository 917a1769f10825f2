"""A peer in a process of its own: `python -m tests.contract.child ADDRESS KIND`, prints `ready` when it can be killed.

KIND: `echo` answers everything; `hold` takes messages and never releases them; `flood` sends large messages to whoever
connects; `dial` dials ADDRESS and floods.
"""

import asyncio
import contextlib
import sys

import uvloop

from common.errors import AtollError
from common.ids import Role
from common.transport.link import LinkLimits
from common.transport.ucx import UcxTransport
from tests.contract.harness import SECRET, Peer, hello, send

FLOOD_NBYTES = 4 << 20


class _Flooding(Peer):
    def __init__(self, transport):
        super().__init__()
        self._transport = transport

    def on_open(self, link):
        super().on_open(link)
        with contextlib.suppress(AtollError):
            for block in range(32):
                send(self._transport, link, bytes(FLOOD_NBYTES), block=block)


async def main(address, kind):
    transport = UcxTransport(SECRET, link_limits=LinkLimits(window=8))
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
