"""The trace files of a cluster as spans on one clock. Pure but for `read`.

Processes of one host share a monotonic clock. The clocks of two hosts are joined by the messages between their
routers: with d the smallest difference (received - sent) seen in each direction, the offset is half the difference of
the two, as NTP has it (RFC 5905, section 8); its error is at most half the sum of both smallest delays.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Span:
    """See `common.obs.trace`; times are nanoseconds."""

    name: str
    block: int
    layer: int
    lane: int
    start: int
    end: int
    count: int = 0


@dataclass(frozen=True, slots=True)
class Process:
    """One process's spans, in the order in which they were recorded."""

    name: str
    node: int
    host: str
    spans: tuple[Span, ...]
    dropped: int = 0

    @property
    def role(self) -> str:
        """attention, router or expert."""
        return self.name.rpartition("-")[0]

    @property
    def index(self) -> int:
        """Which of its role."""
        return int(self.name.rpartition("-")[2])


def parse(document: dict[str, Any]) -> Process:
    """One trace file. Raises KeyError, TypeError or ValueError for anything else."""
    spans = tuple(Span(str(s[0]), *map(int, s[1:])) for s in document["spans"])
    return Process(
        str(document["process"]), int(document["node"]), str(document["host"]), spans,
        int(document["dropped"]),
    )  # fmt: skip


def read(directory: Path) -> list[Process]:
    """Every trace file of a directory, on one clock. Raises ConfigError naming the file that is none."""
    processes = []
    for path in sorted(directory.glob("*.json")):
        try:
            processes.append(parse(json.loads(path.read_text())))
        except (OSError, KeyError, TypeError, ValueError) as exc:
            raise ConfigError(f"{path} is not a trace: {type(exc).__name__} {exc}") from exc
    if not processes:
        raise ConfigError(f"{directory} holds no trace")
    return align(processes)


def align(processes: Sequence[Process]) -> list[Process]:
    """The same processes with every host's times on the first host's clock.

    Raises ConfigError for a host whose routers exchanged no message with those of the hosts before.
    """
    hosts = list(dict.fromkeys(p.host for p in processes))
    offsets = {hosts[0]: 0}
    delays = _smallest_delays(processes)
    while len(offsets) < len(hosts):
        joined = [
            (known, new)
            for known in offsets
            for new in hosts
            if new not in offsets and (known, new) in delays and (new, known) in delays
        ]
        if not joined:
            rest = ", ".join(h for h in hosts if h not in offsets)
            raise ConfigError(f"no message joins the clock of host {rest} to the others")
        known, new = joined[0]
        offsets[new] = offsets[known] + (delays[known, new] - delays[new, known]) // 2
    return [_shifted(p, offsets[p.host]) for p in processes]


def _shifted(process: Process, offset: int) -> Process:
    if not offset:
        return process
    spans = (replace(s, start=s.start - offset, end=s.end - offset) for s in process.spans)
    return replace(process, spans=tuple(spans))


def _smallest_delays(processes: Iterable[Process]) -> dict[tuple[str, str], int]:
    """(sending host, receiving host) -> smallest received - sent over the messages between routers."""
    routers = [p for p in processes if p.role == "router"]
    host_of = {p.node: p.host for p in routers}
    sources: dict[int, tuple[int, int]] = {}  # block -> node, when its relays were posted
    answers: dict[tuple[int, int], int] = {}  # block, node -> when its partial was posted
    for p in routers:
        for s in p.spans:
            if s.name == "dispatch":
                sources[s.block] = p.node, s.end
            elif s.name == "expert_out":
                answers[s.block, p.node] = max(s.end, answers.get((s.block, p.node), s.end))
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for p in routers:
        for s in p.spans:
            if s.name == "relay" and s.block in sources:
                node, sent = sources[s.block]
                found[host_of[node], p.host].append(s.start - sent)
            elif s.name == "partial" and (s.block, s.count) in answers:
                found[host_of[s.count], p.host].append(s.start - answers[s.block, s.count])
    return {pair: min(values) for pair, values in found.items()}
