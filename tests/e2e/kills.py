"""How processes of a running cluster are killed, and what is waited for afterwards."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from tests.e2e.harness import Cluster


async def eventually(
    check: Callable[[], Awaitable[Any]], what: str, *, within_s: float = 30.0
) -> Any:
    """Poll until `check` gives something true."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if found := await check():
            return found
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within {within_s:g} s: {what}")


async def state(cluster: Cluster) -> list[dict[str, Any]]:
    """`processes` of /cluster."""
    return list((await cluster.fetch("GET", "/cluster"))["processes"])


async def pid_of(cluster: Cluster, role: str, index: int) -> int:
    """Of a process that is ready, else 0."""
    (entry,) = [p for p in await state(cluster) if (p["role"], p["index"]) == (role, index)]
    return int(entry["pid"]) if entry["state"] == "ready" else 0


async def stop_while_they_owe(cluster: Cluster, *experts: int) -> list[int]:
    """Stop experts and wait until a router counts a block that one of them owes; their pids. Killed if that fails."""

    async def owes() -> bool:
        routers = [p for p in await state(cluster) if p["role"] == "router"]
        owed = [r["counters"]["owed_by_expert"] for r in routers]
        return any(by_expert.get(str(e), 0) > 0 for by_expert in owed for e in experts)

    victims: list[int] = []
    for expert in experts:
        up = partial(pid_of, cluster, "expert", expert)
        victims.append(await eventually(up, f"expert-{expert} is up"))
    for victim in victims:
        os.kill(victim, signal.SIGSTOP)
    try:
        await eventually(owes, f"one of the experts {experts} owes a block")
    except BaseException:
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        raise
    return victims


async def replaced(cluster: Cluster, role: str, index: int, victim: int) -> None:
    """Wait for the successor of a process."""

    async def check() -> bool:
        return await pid_of(cluster, role, index) not in (0, victim)

    await eventually(check, f"{role}-{index} has a successor", within_s=60)
