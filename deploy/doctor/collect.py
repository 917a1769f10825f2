"""All facts of this host: readings beside one another, then the measured transfers, alone."""

import asyncio
import socket
import threading
import time
from pathlib import Path

from common.transport.carriers import LinkClass
from deploy.doctor import facts, read_gpus, read_host, transfers
from deploy.doctor.need import Need

_SOCKET_NBYTES = 64 << 20
_SOCKET_CHUNK = 1 << 20
_ROUNDS = 3


async def collect(name: str, need: Need, *, salt: str, full: bool) -> facts.Host:
    """`salt` is this run's, for the secret's digest."""
    nics = read_host.nics()
    nvidia = read_gpus.nvidia(Path(need.mps_dir))
    ucx, software, model = await asyncio.gather(
        transfers.about(),
        asyncio.to_thread(read_host.software),
        asyncio.to_thread(_model, need.model, full=full),
    )
    memory_gb_per_s = await asyncio.to_thread(read_host.memory_gb_per_s)
    socket_gb_per_s = await asyncio.to_thread(plain_socket_gb_per_s)
    measured = await transfers.measure_all(_ends(need, ucx, nics, nvidia))
    return facts.Host(
        name=name,
        software=software,
        ucx=ucx,
        nvidia=nvidia,
        nics=nics,
        limits=read_host.limits(),
        ephemeral_ports=read_host.ephemeral_ports(),
        ports=read_host.ports(need.ports),
        clock=read_host.clock(),
        secret=read_host.secret(need.secret, salt),
        model=model,
        installed_toml=read_host.installed_toml(),
        memory_gb_per_s=memory_gb_per_s,
        socket_gb_per_s=socket_gb_per_s,
        transfers=measured,
    )


def _ends(
    need: Need, ucx: facts.Ucx, nics: tuple[facts.Nic, ...], nvidia: facts.Nvidia
) -> list[transfers.Ends]:
    """What can be measured here: each class whose medium exists, whether or not UCX can use it."""
    if ucx.problem:
        return []
    classes = [LinkClass.SELF, LinkClass.SHM, LinkClass.TCP]
    ends = [transfers.local_ends(link_class) for link_class in classes]
    if need.device == "cuda" and nvidia.gpus:
        num_gpus = len(nvidia.gpus)
        place = f"GPU 0 to {num_gpus - 1}" if num_gpus > 1 else "one card"
        ends.append(transfers.local_ends(LinkClass.CUDA_IPC, place=place, num_gpus=num_gpus))
    rails = [nic.rdma for nic in nics if nic.rdma and nic.is_active]
    return [*ends, *(transfers.local_ends(LinkClass.RDMA, place=rail) for rail in rails)]


def _model(directory: Path, *, full: bool) -> facts.Model:
    try:
        from deploy.doctor import read_model  # needs torch, which may be what is wrong
    except Exception as exc:
        return facts.Model(str(directory), problem=f"not looked at, torch fails: {exc}")
    return read_model.model(directory, full=full)


def plain_socket_gb_per_s() -> float:
    """A TCP connection on loopback: 64 MiB and an answer, the best of three."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_swallow, args=(server,), daemon=True)
        thread.start()
        chunk = bytes(_SOCKET_CHUNK)
        best = float("inf")
        with socket.create_connection(server.getsockname(), timeout=10) as sock:
            for _ in range(_ROUNDS):
                started = time.perf_counter()
                for _ in range(_SOCKET_NBYTES // _SOCKET_CHUNK):
                    sock.sendall(chunk)
                sock.recv(1)
                best = min(best, time.perf_counter() - started)
        thread.join(timeout=10)
    return _SOCKET_NBYTES / best / 1e9


def _swallow(server: socket.socket) -> None:
    sock, _ = server.accept()
    with sock:
        room = memoryview(bytearray(_SOCKET_CHUNK))
        while True:
            left = _SOCKET_NBYTES
            while left:
                count = sock.recv_into(room[: min(left, _SOCKET_CHUNK)])
                if not count:
                    return
                left -= count
            sock.sendall(b"x")
