"""The gateway's links to attention workers and routers, and what every process of the cluster last said of itself.

All links carry control frames only. A worker may be given requests while its link is open and it calls itself ready.
`ready` of a router means that it reaches all experts of its node and all other routers; what it lacks is in `missing`.
Experts have no link here: their routers report them.
"""

import asyncio
import contextlib
from typing import Any, Protocol

from common.config import ClusterConfig
from common.errors import LinkClosed, Rejected, WireError
from common.ids import ProcessId, Role
from common.request import TokenEvent, tokens_of
from common.status import ProcessStatus, State, status_frame
from common.transport.base import Link
from common.transport.buffers import Buffer
from common.wire.header import Header
from services.gateway.rebalance import Rebalancer

_ROUND_S = 0.5  # callers within this time share one round of status requests
_MAX_PROCESSES = 4096  # in one status frame


class Listener(Protocol):
    """Who wants to know what happens at attention workers. Plain calls that never raise."""

    def on_tokens(self, worker: int, event: TokenEvent) -> None:
        """New tokens of a request."""
        ...

    def on_worker(self, worker: int, ready: bool) -> None:
        """A worker became ready or stopped being so; its requests go on."""
        ...

    def on_worker_lost(self, worker: int, reason: str) -> None:
        """The link to a worker is gone and every request there with it."""
        ...


def parse_report(entry: dict[str, Any]) -> ProcessStatus:
    """One process of a status frame. Raises WireError on anything that is not one."""
    try:
        counters, missing = entry["counters"], entry.get("missing", "")
        if not isinstance(counters, dict) or not isinstance(missing, str):
            raise TypeError("counters or missing")
        return ProcessStatus(
            Role(entry["role"]), entry["index"], entry["node"], entry["pid"], State(entry["state"]), counters, missing
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise WireError(f"malformed process in a status frame: {entry!r:.200}") from exc


class Refresh:
    """One round of status requests; `missing` are the links that have not answered."""

    def __init__(self, number: int, missing: set[ProcessId], *, now: float) -> None:
        self.number = number
        self.started_at = now
        self.missing = missing
        self.done = asyncio.Event()
        if not missing:
            self.done.set()

    def answered(self, process: ProcessId) -> None:
        """One link less to wait for."""
        self.missing.discard(process)
        if not self.missing:
            self.done.set()


class Backends:
    """Handler of all links of the gateway, and the view of the cluster they give."""

    def __init__(self, config: ClusterConfig, own: ProcessStatus) -> None:
        self._own = own
        self._expected = [spec.id for spec in config.processes() if spec.id != own.id]
        self._reports = {
            spec.id: ProcessStatus.of(spec.id, node=spec.node)
            for spec in config.processes()
            if spec.id != own.id
        }
        self._told_by: dict[ProcessId, ProcessId] = {}  # who reported a process last
        self._links: dict[ProcessId, Link] = {}
        self._refresh: Refresh | None = None
        self._refreshes = 0
        self.listener: Listener | None = None  # set once, before the first link opens
        self.rebalancer = Rebalancer(config, self.tell, self._lost_workers)

    def __repr__(self) -> str:
        missing = len(self.missing())
        return f"<Backends [links {len(self._links)} | {'ready' if not missing else f'{missing} missing'}]>"

    # --- Handler -------------------------------------------------------------------------------------------------

    def on_open(self, link: Link) -> None:
        """A worker or router is reachable: ask for its state at once."""
        process = link.peer.process
        if process not in self._reports or process.role not in (Role.ATTENTION, Role.ROUTER):
            link.close(f"{process} is no peer of the gateway")
            return
        older, self._links[process] = self._links.get(process), link
        if older is not None:
            self._forget(process, "it connected again")
            older.close("replaced by a newer link")
        self.rebalancer.opened(process)
        report = self._reports[process]
        report.pid, report.state = link.peer.pid, State.STARTING
        with contextlib.suppress(LinkClosed):  # on_close follows
            link.send_control({"type": "status_request", "id": 0})

    def on_control(self, link: Link, message: dict[str, Any]) -> None:
        """Tokens and status; a frame that no correct peer sends closes the link."""
        try:
            self._dispatch(link, message)
        except (WireError, Rejected, KeyError, TypeError, ValueError, AttributeError) as exc:
            link.close(f"malformed control frame: {exc!r:.200}")
        except LinkClosed:
            pass  # the answer could not be sent; on_close follows

    def on_message(self, link: Link, header: Header, payload: Buffer | None) -> None:
        """No data travels to a gateway."""
        if payload is not None:
            payload.release()
        link.close(f"data message {header!r:.100} on a control-only link")

    def on_close(self, link: Link, error: LinkClosed) -> None:
        """A peer is gone: so are its requests, and what it reported is history."""
        process = link.peer.process
        if self._links.get(process) is not link:
            return  # replaced before
        del self._links[process]
        self._reports[process].state = State.LOST
        self._forget(process, str(error))
        self.rebalancer.closed(process)

    # --- for the dispatcher and the HTTP side --------------------------------------------------------------------

    def send(self, worker: int, frame: dict[str, Any]) -> None:
        """Send a frame to an attention worker. Raises LinkClosed."""
        self.tell(ProcessId(Role.ATTENTION, worker), frame)

    def tell(self, process: ProcessId, frame: dict[str, Any]) -> None:
        """Send a frame to an attention worker or router. Raises LinkClosed."""
        link = self._links.get(process)
        if link is None:
            raise LinkClosed(f"{process} is not connected")
        link.send_control(frame)

    async def refresh(self, *, deadline_s: float) -> None:
        """Ask everybody for a status and wait until all answered, at most `deadline_s`. Rounds are shared."""
        refresh = self.ask()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await refresh.done.wait()
        refresh.done.set()  # after a deadline: the next call starts a round of its own

    def ask(self) -> "Refresh":
        """Send everybody a status request, unless a round has begun just now."""
        now = asyncio.get_running_loop().time()
        running = self._refresh
        if running and not running.done.is_set() and now - running.started_at < _ROUND_S:
            return running
        self._refreshes += 1
        self._refresh = refresh = Refresh(self._refreshes, set(self._links), now=now)
        for process, link in list(self._links.items()):
            try:
                link.send_control({"type": "status_request", "id": refresh.number})
            except LinkClosed:
                refresh.answered(process)
        return refresh

    def processes(self) -> list[dict[str, Any]]:
        """All processes of the cluster in their last known state, this one included."""
        return [self._reports[process].to_json() for process in self._expected] + [
            self._own.to_json()
        ]

    def missing(self) -> list[str]:
        """What keeps the cluster from answering requests, in sentences; empty when it is ready."""
        workers = [r for r in self._reports.values() if r.id.role is Role.ATTENTION]
        sentences = []
        if all(report.state is not State.READY for report in workers):
            listed = ", ".join(map(_describe, workers))
            sentences.append(f"no attention worker is ready: {listed}")
        sentences += [
            _describe(report)
            for report in self._reports.values()
            if report.id.role is Role.ROUTER and report.state is not State.READY
        ]
        return sentences

    # --- internals -----------------------------------------------------------------------------------------------

    def _dispatch(self, link: Link, message: dict[str, Any]) -> None:
        process = link.peer.process
        if self._links.get(process) is not link:
            return
        match message["type"]:
            case "tokens" if process.role is Role.ATTENTION and self.listener is not None:
                for event in tokens_of(message):
                    self.listener.on_tokens(process.index, event)
            case "status":
                self._on_status(process, message)
            case "status_request":
                own = [self._own.to_json()]
                link.send_control(status_frame(message["id"], own))
            case _:
                self.rebalancer.on_frame(process, message)

    def _on_status(self, sender: ProcessId, message: dict[str, Any]) -> None:
        entries = message["processes"]
        if len(entries) > _MAX_PROCESSES:
            raise WireError(f"{len(entries)} processes in one status frame")
        for entry in entries:
            self._take(sender, parse_report(entry))
        if self._refresh is not None and message["id"] == self._refresh.number:
            self._refresh.answered(sender)

    def _take(self, sender: ProcessId, report: ProcessStatus) -> None:
        """A process with a link here speaks for itself; others are believed to whoever reports them."""
        known = self._reports.get(report.id)
        if known is None or (sender != report.id and report.id.role is not Role.EXPERT):
            return
        was_ready, is_ready = known.state is State.READY, report.state is State.READY
        self._reports[report.id] = report
        self._told_by[report.id] = sender
        if report.id.role is Role.ATTENTION and was_ready != is_ready:
            assert self.listener is not None, "links opened before the listener was set"
            self.listener.on_worker(report.id.index, is_ready)

    def _lost_workers(self) -> frozenset[int]:
        reports = self._reports.values()
        return frozenset(
            r.id.index for r in reports if r.id.role is Role.EXPERT and r.state is State.LOST
        )

    def _forget(self, process: ProcessId, reason: str) -> None:
        if self._refresh is not None:
            self._refresh.answered(process)
        if process.role is Role.ROUTER:
            for report in self._reports.values():
                if report.id.role is Role.EXPERT and self._told_by.get(report.id) == process:
                    report.state = State.LOST  # nobody can say; this router will when it is back
        elif self.listener is not None:
            self.listener.on_worker_lost(process.index, reason)


def _describe(report: ProcessStatus) -> str:
    reason = f" ({report.missing})" if report.missing and report.state is not State.LOST else ""
    return f"{report.id} is {report.state}{reason}"
