"""Runs `common.transport.transfer_probe`: one pair of processes per class of link, here or on two hosts.

Ends of all classes start together, since loading costs more than measuring; they measure one after the other.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.transport.carriers import LinkClass
from common.transport.environment import set_ucx_environment
from common.transport.transfer_probe import DEADLINE_S
from deploy.doctor import facts

PROBE = "common.transport.transfer_probe"
# cuda_ipc and rc need something for host memory and for finding each other
_TLS = {
    LinkClass.SELF: "self",
    LinkClass.SHM: "sysv,posix,cma,self",
    LinkClass.TCP: "tcp,self",
    LinkClass.CUDA_IPC: "cuda_ipc,cuda_copy,tcp,self",
    LinkClass.RDMA: "rc,self",
}
_MAX_LINE = 1 << 20


@dataclass(frozen=True, slots=True)
class Ends:
    """The two processes of one measurement: a command and what is set for it; `receiver` None for SELF."""

    link_class: LinkClass
    place: str
    sender: tuple[str, ...]
    receiver: tuple[str, ...] | None
    environment: Mapping[str, str]


def environment_of(link_class: LinkClass, *, devices: str = "") -> dict[str, str]:
    """What makes UCX use that class and nothing faster, as the product would set the rest."""
    variables = {"UCX_TLS": _TLS[link_class]}
    if devices:
        variables["UCX_NET_DEVICES"] = devices
    set_ucx_environment(local=link_class is LinkClass.TCP and devices == "lo", environ=variables)
    return variables


def local_ends(link_class: LinkClass, *, place: str = "", num_gpus: int = 0) -> Ends:
    """Both ends on this host."""
    python = (sys.executable, "-m", PROBE)
    devices = {LinkClass.TCP: "lo", LinkClass.RDMA: place, LinkClass.CUDA_IPC: "lo"}
    variables = environment_of(link_class, devices=devices.get(link_class, ""))
    if link_class is LinkClass.SELF:
        return Ends(link_class, place, (*python, "self"), None, variables)
    cuda = link_class is LinkClass.CUDA_IPC
    on = ("cuda:0", f"cuda:{num_gpus - 1}") if cuda else ("cpu", "cpu")
    return Ends(
        link_class, place, (*python, "sender", on[0]), (*python, "receiver", on[1]), variables
    )


async def measure_all(all_ends: Sequence[Ends]) -> tuple[facts.Transfer, ...]:
    """Every one of them; a failed one says so in its `problem`."""
    started = await asyncio.gather(*(_Pair.start(ends) for ends in all_ends))
    results = []
    try:
        for ends, pair in zip(all_ends, started, strict=True):
            try:
                told = await asyncio.wait_for(pair.run(), DEADLINE_S)
            except* TimeoutError:  # an OSError too, without words
                told = {"problem": f"nothing came back within {DEADLINE_S} s"}
            except* (OSError, ValueError, KeyError, EOFError) as group:
                told = {"problem": f"{_first(group)}"}
            told["carriers"] = tuple(told.get("carriers", ()))
            results.append(facts.Transfer(ends.link_class, ends.place, **told))
    finally:
        for pair in started:
            await pair.stop()
    return tuple(results)


async def about() -> facts.Ucx:
    """Which UCX is loaded here, whatever the environment lets it use."""
    variables = os.environ | {"UCX_TLS": "all", "UCX_LOG_LEVEL": "fatal"}
    variables.pop("UCX_NET_DEVICES", None)
    process = await _start((sys.executable, "-m", PROBE, "about"), variables)
    try:
        told = await asyncio.wait_for(_read(process), DEADLINE_S)
    except TimeoutError:
        return facts.Ucx(problem=f"it did not load within {DEADLINE_S} s")
    except (OSError, ValueError, EOFError) as exc:
        return facts.Ucx(problem=str(exc))
    finally:
        await _end(process)
    directory = os.path.dirname(told["library"])
    modules = os.listdir(os.path.join(directory, "ucx")) if directory else []
    return facts.Ucx(
        library=told["library"],
        version=told["version"],
        is_wheel="site-packages/libucx" in told["library"],
        has_ib_module=any(name.startswith("libuct_ib.so") for name in modules),
        resources=tuple(told["resources"]),
    )


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception in it."""
    (first, *_) = group.exceptions
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


class _Pair:
    """Two started processes that have not been told of each other."""

    def __init__(self, processes: list[asyncio.subprocess.Process]) -> None:
        self._processes = processes

    @classmethod
    async def start(cls, ends: Ends) -> "_Pair":
        """Start them; they load meanwhile."""
        commands = [c for c in (ends.sender, ends.receiver) if c is not None]
        # UCX_LOG_LEVEL stays the user's: with it set, what UCX says is the explanation that a failure names
        variables = {**os.environ, **ends.environment}
        if "UCX_LOG_LEVEL" in os.environ:
            variables["UCX_LOG_LEVEL"] = os.environ["UCX_LOG_LEVEL"]
        return cls([await _start(command, variables) for command in commands])

    async def run(self) -> dict[str, Any]:
        """Exchange the addresses; what the sender then tells."""
        if len(self._processes) == 2:
            async with asyncio.TaskGroup() as both:  # when one ends early, nobody reads the other
                told = [both.create_task(_read(process)) for process in self._processes]
            addresses = [task.result() for task in reversed(told)]
            for process, address in zip(self._processes, addresses, strict=True):
                assert process.stdin is not None
                process.stdin.write(json.dumps({"address": address["address"]}).encode() + b"\n")
                await process.stdin.drain()
        return await _read(self._processes[0])

    async def stop(self) -> None:
        """End both, whatever they do."""
        for process in self._processes:
            await _end(process)


async def _start(
    command: Sequence[str], environment: Mapping[str, str]
) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, limit=_MAX_LINE
    )


async def _read(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """The next JSON line. Raises EOFError with the last thing that the process complained of."""
    assert process.stdout is not None
    assert process.stderr is not None
    while line := await process.stdout.readline():
        if line.startswith(b"{"):  # UCX's own log goes to stdout too
            told: dict[str, Any] = json.loads(line)
            return told
        sys.stderr.write(line.decode(errors="replace"))
    complaint = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
    code = await process.wait()
    raise EOFError(complaint[-1] if complaint else f"the process ended with {code}")


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.communicate()
