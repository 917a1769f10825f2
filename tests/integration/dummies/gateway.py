"""A dummy gateway: listens, says where, answers every GET with 200."""

import asyncio

from common.ids import Role
from dummies.service import Dummy, run


class Gateway(Dummy):
    """Ready as soon as it listens."""

    async def start(self, tasks):
        await super().start(tasks)
        self.server = await asyncio.start_server(
            self.answer, self.config.gateway.host, self.config.gateway.port
        )
        host, port = self.server.sockets[0].getsockname()[:2]
        (self.config.cluster.run_dir / "gateway-0.url").write_text(f"http://{host}:{port}\n")

    async def answer(self, reader, writer):
        await reader.readline()
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n")
        await writer.drain()
        writer.close()

    async def stop(self):
        if hasattr(self, "server"):
            self.server.close()


run(Role.GATEWAY, Gateway)
