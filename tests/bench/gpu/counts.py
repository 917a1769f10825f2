"""What the processes of a cluster count, asked of its routers over control links as a gateway asks."""

import asyncio
import os
from typing import Any

from common.config import ClusterConfig
from common.errors import LinkClosed
from common.ids import ProcessId, Role
from common.transport.base import Hello, Link
from common.transport.buffers import Buffer
from common.transport.dial import keep_connected
from common.transport.factory import open_transport
from common.wire.header import Header

Entries = dict[str, dict[str, Any]]  # by name: the entry of a status frame
_ANSWER_S = 10.0
_MESSAGES = ("messages_in", "messages_out", "bytes_in", "bytes_out")


class Statuses:
    """Links to every router. Implements `common.transport.base.Handler`."""

    def __init__(self, config: ClusterConfig, model_hash: str, tasks: asyncio.TaskGroup) -> None:
        self._config, self._hash = config, model_hash
        self._transport = open_transport(config, data=False)
        self._routers = config.of_role(Role.ROUTER)
        self._links: dict[ProcessId, Link] = {}
        self._number = 0
        self._answers: dict[ProcessId, list[dict[str, Any]]] = {}
        self._all = asyncio.Event()
        self._tasks = [
            tasks.create_task(keep_connected(self._transport, r.address, self._hello, self))
            for r in self._routers
        ]

    def _hello(self) -> Hello:
        cluster = self._config.cluster
        return Hello(
            ProcessId(Role.GATEWAY, 0), 0, os.getpid(), self._hash, cluster.epoch, cluster.wire, data=False
        )  # fmt: skip

    def on_open(self, link: Link) -> None:
        self._links[link.peer.process] = link

    def on_close(self, link: Link, error: LinkClosed) -> None:
        self._links.pop(link.peer.process, None)

    def on_message(self, link: Link, header: Header, payload: Buffer | None) -> None:
        raise AssertionError("data on a control link")

    def on_control(self, link: Link, message: dict[str, Any]) -> None:
        if message.get("type") == "status" and message.get("id") == self._number:
            self._answers[link.peer.process] = message["processes"]
            if len(self._answers) == len(self._routers):
                self._all.set()

    async def read(self) -> Entries:
        """Every router's and expert's entry. Raises TimeoutError, LinkClosed."""
        self._number += 1
        self._answers.clear()
        self._all.clear()
        for link in list(self._links.values()):
            link.send_control({"type": "status_request", "id": self._number})
        async with asyncio.timeout(_ANSWER_S):
            await self._all.wait()
        entries = [entry for answer in self._answers.values() for entry in answer]
        return {f"{entry['role']}-{entry['index']}": entry for entry in entries}

    async def all_ready(self) -> bool:
        """Whether every router is linked to all of its peers."""
        if len(self._links) < len(self._routers):
            return False
        try:
            entries = await self.read()
        except (TimeoutError, LinkClosed):
            return False
        return all(e["state"] == "ready" for e in entries.values() if e["role"] == "router")

    async def close(self) -> None:
        """Close the links."""
        for task in self._tasks:
            task.cancel()
        await self._transport.close()


def per_block(before: Entries, after: Entries, own: dict[str, int], blocks: int) -> dict[str, Any]:
    """Differences of two statuses per block; `own` is what the attention worker counted meanwhile.

    Raises AssertionError where a message was lost, late or sent again: such a run counts something else.
    """
    routers = [_difference(before[n], e) for n, e in sorted(after.items()) if e["role"] == "router"]
    experts = [_difference(before[n], e) for n, e in sorted(after.items()) if e["role"] == "expert"]
    assert not any(c[key] for c in routers for key in ("late", "failed", "rerouted", "resent"))
    assert not any(c["failed"] for c in experts)
    source = [r for r in routers if r["blocks"]]
    others = [r for r in routers if not r["blocks"]]
    crossing = {
        key: sum(r[f"crossed_{key}"] for r in source)
        for key in ("rows", "unicast_rows", "bytes_out", "bytes_in")
    }
    crossed = sum(r["crossed_bytes_out"] + r["crossed_bytes_in"] for r in others)
    crossed_out = crossing["bytes_out"] + sum(r["crossed_bytes_out"] for r in others)
    assert crossed == crossing["bytes_out"] + crossing["bytes_in"], "bytes lost between nodes"
    to_experts = sum(r["bytes_out"] for r in routers) - crossed_out - own["bytes_in"]
    from_experts = sum(r["bytes_in"] for r in routers) - crossed_out - own["bytes_out"]
    rows = [c["rows"] for c in experts]
    return {
        "between_nodes": {key: round(value / blocks, 1) for key, value in crossing.items()},
        "attention": {key: value / blocks for key, value in own.items()},
        "source_router": _mean(source, blocks),
        "other_routers": _mean(others, blocks) | {"messages_most": _most(others, blocks)},
        "experts": {
            "asked": round(sum(c["calls"] for c in experts) / blocks, 2),
            "rows": round(sum(rows) / blocks, 2),
            "rows_most": round(max(rows) / blocks, 2),
            "messages": round(2 * sum(c["calls"] for c in experts) / blocks, 2),
            "bytes_in": round(to_experts / blocks),
            "bytes_out": round(from_experts / blocks),
            "compute_us": round(sum(c["compute_us"] for c in experts) / blocks, 1),
        },
    }  # fmt: skip


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Of the counters, with those of links to other nodes added up."""
    old, new = _flat(before["counters"]), _flat(after["counters"])
    return {key: value - old.get(key, 0) for key, value in new.items()}


def _flat(counters: dict[str, Any]) -> dict[str, float]:
    flat = {k: v for k, v in counters.items() if isinstance(v, int | float)}
    links = counters.get("links", {}).values()
    ways = [(link[way], f"crossed_bytes_{way}") for link in links for way in ("out", "in")]
    for traffic, key in [*ways, *(({"bytes": 0}, f"crossed_bytes_{w}") for w in ("out", "in"))]:
        flat[key] = flat.get(key, 0) + traffic["bytes"]
    for key in ("rows", "unicast_rows"):
        flat[f"crossed_{key}"] = sum(link["out"][key] for link in links)
    return flat


def _mean(routers: list[dict[str, float]], blocks: int) -> dict[str, float]:
    """Of one of these routers per block."""
    keys = (*_MESSAGES, "split_us", "combine_us", "busy_us")
    if not routers:
        return {}
    return {
        key: round(sum(r[key] for r in routers) / len(routers) / blocks, 1)
        for key in keys
        if key in routers[0]
    }


def _most(routers: list[dict[str, float]], blocks: int) -> float:
    """Messages of the busiest."""
    counts = [r["messages_in"] + r["messages_out"] for r in routers]
    return round(max(counts, default=0) / blocks, 1)
