"""What a message costs: our transport, plain asyncio streams and pyzmq, two processes, one run, one table.

    python -m tests.bench.transport [--seconds 1.5] [--idle 20] [--json FILE]

Per size: round trip (one message at a time), messages per second one way (credits or a window of 64 unacknowledged),
and CPU microseconds per message of the sending and of the receiving process in that flood. Every system moves its
payload into memory that the application can read as one piece. uvloop everywhere; ratios are ours over theirs. Then
the CPU that connected but idle processes use together, in percent of one core. No figure is asserted anywhere.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import struct
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop

from common.ids import ProcessId, Role
from common.transport.base import Hello
from common.transport.environment import set_ucx_environment
from common.wire.header import Header, Kind
from tests.bench.environment import facts
from tests.bench.ucx_alone import round_trip

SIZES = (64, 4096, 65536, 1 << 20)
WINDOW = 64
SECRET = b"a secret for a benchmark, 32 byt"
ACK_EVERY = 16
_LENGTH = struct.Struct("<I")


def _hello(role: Role, index: int = 0) -> Hello:
    return Hello(ProcessId(role, index), 0, os.getpid(), "bench", 1, "fp8")


# A message of one byte announces what follows: a flood (F) or an echo (E).


class Atoll:
    """Our transport."""

    name = "atoll"

    class _Server:
        def __init__(self):
            self.echo = True

        on_open = on_close = lambda *_: None

        def on_control(self, link, message):
            self.echo = message["echo"]
            link.send_control({})

        def on_message(self, link, header, payload):
            if self.echo:
                link.post(header, payload)
            elif header.target:
                link.post(header)
            payload.release()

    async def serve(self, path):
        from common.transport.ucx import UcxTransport

        self._transport = UcxTransport(SECRET)
        await self._transport.listen(f"unix:{path}", _hello(Role.ROUTER), self._Server())

    async def connect(self, path):
        from common.transport.ucx import UcxTransport

        self._transport = UcxTransport(SECRET)
        self._answer, self._num_answers = asyncio.Event(), 0
        self._link = await self._transport.connect(
            f"unix:{path}", _hello(Role.EXPERT), self, timeout_s=10
        )

    on_open = on_close = lambda *_: None

    def on_control(self, link, message):
        self._answer.set()

    def on_message(self, link, header, payload):
        if payload is not None:
            payload.release()
        self._num_answers += 1
        self._answer.set()

    async def mode(self, echo):
        self._answer.clear()
        self._link.send_control({"echo": echo})
        await self._answer.wait()

    def _post(self, nbytes, flags=0):
        payload = self._transport.pool.acquire(nbytes)
        self._link.post(Header(Kind.EXPERT_IN, target=flags), payload)
        payload.release()

    async def round_trip(self, nbytes):
        self._answer.clear()
        self._post(nbytes)
        await self._answer.wait()

    async def flood(self, nbytes, count):
        """Acknowledged like the others: every 16th message is answered with as many bytes as the others answer."""
        self._num_answers = 0
        for num in range(1, count + 1):
            while num - self._num_answers * ACK_EVERY > WINDOW:
                self._answer.clear()
                await self._answer.wait()
            self._post(nbytes, flags=num % ACK_EVERY == 0)
        while self._num_answers * ACK_EVERY < count:
            self._answer.clear()
            await self._answer.wait()

    async def close(self):
        await self._transport.close()


class Streams:
    """asyncio streams on uvloop, TCP on loopback: a length, then the payload."""

    name = "asyncio streams"

    async def serve(self, path):
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=4 << 20)
        path.write_text(str(server.sockets[0].getsockname()[1]))

    async def _serve(self, reader, writer):
        echo, received = True, 0
        while head := await reader.read(4):
            (nbytes,) = _LENGTH.unpack(head + await reader.readexactly(4 - len(head)))
            body = await reader.readexactly(nbytes)
            if nbytes == 1:
                echo, received = body == b"E", 0
                writer.write(_LENGTH.pack(1) + b"k")
            elif echo:
                writer.write(_LENGTH.pack(nbytes))
                writer.write(body)
            else:
                received += 1
                if received % ACK_EVERY == 0:
                    writer.write(_LENGTH.pack(1) + b"k")
            await writer.drain()

    async def connect(self, path):
        port = int(path.read_text())
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port, limit=4 << 20)
        self._bodies = {nbytes: bytes(nbytes) for nbytes in SIZES}

    async def _receive(self):
        (nbytes,) = _LENGTH.unpack(await self._reader.readexactly(4))
        return await self._reader.readexactly(nbytes)

    async def mode(self, echo):
        self._writer.write(_LENGTH.pack(1) + (b"E" if echo else b"F"))
        await self._receive()

    async def round_trip(self, nbytes):
        self._writer.write(_LENGTH.pack(nbytes))
        self._writer.write(self._bodies[nbytes])
        await self._receive()

    async def flood(self, nbytes, count):
        acknowledged = 0
        for num in range(count):
            while num - acknowledged >= WINDOW:
                await self._receive()
                acknowledged += ACK_EVERY
            self._writer.write(_LENGTH.pack(nbytes))
            self._writer.write(self._bodies[nbytes])
            await self._writer.drain()
        while acknowledged < count:
            await self._receive()
            acknowledged += ACK_EVERY

    async def close(self):
        self._writer.close()


class Zmq:
    """pyzmq's asyncio API over ipc, ROUTER at the server and DEALER at the client."""

    name = "pyzmq"

    async def serve(self, path):
        import zmq
        import zmq.asyncio

        socket = zmq.asyncio.Context().socket(zmq.ROUTER)
        socket.bind(f"ipc://{path}")
        self._task = asyncio.ensure_future(self._serve(socket))

    async def _serve(self, socket):
        echo, received = True, 0
        while True:
            who, body = await socket.recv_multipart(copy=False)
            if len(body.buffer) == 1:
                echo, received = body.bytes == b"E", 0
                await socket.send_multipart([who, b"k"])
            elif echo:
                await socket.send_multipart([who, body], copy=False)
            else:
                received += 1
                if received % ACK_EVERY == 0:
                    await socket.send_multipart([who, b"k"])

    async def connect(self, path):
        import zmq
        import zmq.asyncio

        self._socket = zmq.asyncio.Context().socket(zmq.DEALER)
        self._socket.connect(f"ipc://{path}")
        self._bodies = {nbytes: bytes(nbytes) for nbytes in SIZES}

    async def mode(self, echo):
        await self._socket.send(b"E" if echo else b"F")
        await self._socket.recv()

    async def round_trip(self, nbytes):
        await self._socket.send(self._bodies[nbytes], copy=False)
        await self._socket.recv(copy=False)

    async def flood(self, nbytes, count):
        acknowledged = 0
        for num in range(count):
            while num - acknowledged >= WINDOW:
                await self._socket.recv()
                acknowledged += ACK_EVERY
            await self._socket.send(self._bodies[nbytes], copy=False)
        while acknowledged < count:
            await self._socket.recv()
            acknowledged += ACK_EVERY

    async def close(self):
        self._socket.close(linger=0)


SYSTEMS = (Atoll, Streams, Zmq)


def _serve(system, path, pipe: Connection):
    async def main():
        server = system()
        await server.serve(path)
        pipe.send("ready")
        loop, wanted = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(pipe.fileno(), wanted.set)
        while True:
            await wanted.wait()
            wanted.clear()
            if pipe.recv() == "stop":
                return
            pipe.send(time.process_time())

    set_ucx_environment(local=True)
    uvloop.run(main())
    os._exit(0)  # no goodbye: what is measured is over


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def _measure(client, nbytes, seconds, pipe):
    await client.mode(True)
    for _ in range(50):
        await client.round_trip(nbytes)
    trips, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        await client.round_trip(nbytes)
        trips.append((time.perf_counter() - start) * 1e6)
    await client.mode(False)
    count = max(8, int(seconds / percentile(trips, 0.5) * 1e6 * 2) // ACK_EVERY) * ACK_EVERY
    await client.flood(nbytes, 4 * ACK_EVERY)

    def server_cpu():
        pipe.send("cpu")
        return pipe.recv()

    before, mine, start = server_cpu(), time.process_time(), time.perf_counter()
    await client.flood(nbytes, count)
    took, mine = time.perf_counter() - start, time.process_time() - mine
    theirs = server_cpu() - before
    return {
        "p50_us": percentile(trips, 0.5),
        "p99_us": percentile(trips, 0.99),
        "messages_per_s": count / took,
        "send_cpu_us": mine / count * 1e6,
        "receive_cpu_us": theirs / count * 1e6,
    }


def measure(system, folder, seconds):
    """All sizes of one system, as {size: figures}."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    path = Path(folder) / system.__name__
    process = spawn.Process(target=_serve, args=(system, path, theirs), daemon=True)
    process.start()
    ours.recv()

    async def main():
        client = system()
        await client.connect(path)
        figures = {size: await _measure(client, size, seconds, ours) for size in SIZES}
        ours.send("stop")
        await client.close()
        return figures

    try:
        return uvloop.run(main())
    finally:
        process.join(5)
        process.kill()


def _idle_peer(path, pipe: Connection):
    async def main():
        client = Atoll()
        await client.connect(path)
        for _ in range(20):
            await client.round_trip(4096)
        pipe.send(os.getpid())
        await asyncio.sleep(3600)

    set_ucx_environment(local=True)
    uvloop.run(main())


def _cpu_ticks(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def measure_idle(folder, num_processes, seconds):
    """CPU of a listener and its connected, silent peers together, in percent of one core."""
    spawn = multiprocessing.get_context("spawn")
    path = Path(folder) / "idle"
    ours, theirs = spawn.Pipe()
    processes = [spawn.Process(target=_serve, args=(Atoll, path, theirs), daemon=True)]
    processes[0].start()
    ours.recv()
    pids = [processes[0].pid]
    try:
        for _ in range(num_processes - 1):
            processes.append(spawn.Process(target=_idle_peer, args=(path, theirs), daemon=True))
            processes[-1].start()
            pids.append(ours.recv())
        time.sleep(1)
        before, start = sum(map(_cpu_ticks, pids)), time.monotonic()
        time.sleep(seconds)
        ticks = sum(map(_cpu_ticks, pids)) - before
        return ticks / os.sysconf("SC_CLK_TCK") / (time.monotonic() - start) * 100
    finally:
        for process in processes:
            process.kill()


def show(results, idle, num_idle):
    print(f"{'system':16} {'bytes':>8} {'p50 us':>8} {'p99 us':>8} {'msg/s':>9} {'send us':>8} {'recv us':>8}"
          f" {'rtt ours/theirs':>16} {'msg/s ours/theirs':>18}")  # fmt: skip
    for name, sizes in results.items():
        for size, row in sizes.items():
            ours = results["atoll"][size]
            print(
                f"{name:16} {size:8} {row['p50_us']:8.0f} {row['p99_us']:8.0f} {row['messages_per_s']:9.0f} "
                f"{row['send_cpu_us']:8.1f} {row['receive_cpu_us']:8.1f} "
                f"{ours['p50_us'] / row['p50_us']:16.2f} "
                f"{ours['messages_per_s'] / row['messages_per_s']:18.2f}"
            )
    print(f"idle: {num_idle} connected processes use {idle:.2f} % of one core together")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.5, help="per size and system")
    parser.add_argument("--idle", type=int, default=20, help="idle processes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    set_ucx_environment(local=True)
    with tempfile.TemporaryDirectory() as folder:
        results = {s.name: measure(s, folder, options.seconds) for s in SYSTEMS}
        idle = measure_idle(folder, options.idle, max(3.0, options.seconds))
    show(results, idle, options.idle)
    figures = {"results": results, "ucx_alone": round_trip(), "idle_percent": idle}
    print("UCX alone:", figures["ucx_alone"])
    if options.json:
        figures |= facts() | {"idle_processes": options.idle}
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
