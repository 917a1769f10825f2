"""How the launcher learns that workers and the whole cluster are ready: systemd's notify protocol, then GET /ready."""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

from deploy.local.run_dir import write_atomically
from deploy.local.worker import Worker

POLL_S = 0.05
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid


class NotifySocket:
    """Receives READY=1 of every worker on one socket; the kernel says which process sent it."""

    def __init__(self, path: Path, on_ready: Callable[[int], None]) -> None:
        self.path = path
        self._on_ready = on_ready
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setblocking(False)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock.bind(str(path))
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._receive)

    def close(self) -> None:
        """Stop listening."""
        asyncio.get_running_loop().remove_reader(self._sock.fileno())
        self._sock.close()
        self.path.unlink(missing_ok=True)

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, ancillary, _, _ = self._sock.recvmsg(
                    4096, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
                if b"READY=1" in data.split(b"\n") and ancillary:
                    self._on_ready(_CREDENTIALS.unpack(ancillary[0][2])[0])


async def wait_until_ready(run_dir: Path) -> str:
    """Poll GET /ready until it answers 200; returns the gateway's URL, which it writes into `gateway-0.url`."""
    file = run_dir / "gateway-0.url"
    while True:
        # read anew each time: a gateway that died before it was ready comes back on another port
        url = file.read_text().strip() if file.exists() else ""
        if url and await status_of(url, "/ready") == 200:
            return url
        await asyncio.sleep(POLL_S)


async def status_of(url: str, path: str) -> int:
    """HTTP status of a GET, 0 when there is no answer."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(5.0):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                writer.write(f"GET {path} HTTP/1.0\r\nHost: {parts.netloc}\r\n\r\n".encode())
                status_line = await reader.readline()
            finally:
                writer.close()
            return int(status_line.split()[1])
    except (OSError, TimeoutError, ValueError, IndexError):
        return 0


def write_ready_file(path: Path, url: str, workers: Iterable[Worker]) -> None:
    """Whoever waits for the cluster finds its URL and processes here, whole or not at all."""
    document = {"url": url, "processes": [worker.as_json() for worker in workers]}
    write_atomically(path, json.dumps(document, indent=1) + "\n")
