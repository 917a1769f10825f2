"""The attention service: requests from gateways in, tokens out; rows to the router of its node, combined rows back.

Every lane is one task of the service's TaskGroup. All state of requests changes between two awaits of a lane or in a
callback of a link, never inside a forward pass: a sequence that ends meanwhile is only marked.
"""

import asyncio
import logging
import os
import time
from dataclasses import asdict
from typing import Any

from common.config import ClusterConfig
from common.errors import AtollError, LinkClosed, Retryable, WireError
from common.ids import Role
from common.obs.trace import open_recorder
from common.request import FinishReason, Request, TokenEvent, tokens_frame
from common.status import ProcessStatus, State, status_frame
from common.transport.base import Hello, Link, Transport, tell
from common.transport.buffers import Buffer
from common.transport.device import DeviceRows
from common.transport.dial import keep_connected
from common.transport.factory import open_transport
from common.transport.outbox import Outbox
from common.waiting import poll_until
from common.wire.blocks import combined_rows
from common.wire.header import Header, Kind, Landed, Wire
from services.attention.lane import StepTimes
from services.attention.moe_client import MoeClient
from services.attention.requests import Requests
from services.attention.resident import Forward, Resident

log = logging.getLogger(__name__)
_TICK_S = 0.25
_PATIENCE_S = 1.0  # more than routers have: they know better who owes what


class AttentionWorker:
    """One attention process. Implements `common.service.Service` and `common.transport.base.Handler`."""

    def __init__(
        self, config: ClusterConfig, index: int, transport: Transport | None = None
    ) -> None:
        self.config = config
        self.spec = config.process(Role.ATTENTION, index)
        self.transport = transport or open_transport(config)
        self.draining = False
        self.trace = open_recorder(config, self.spec)
        self.times = StepTimes()
        self._lanes: list[Forward] = []
        self._work: list[asyncio.Event] = []
        self._gateways: set[Link] = set()
        self._told_epoch = config.cluster.epoch  # to the gateways: no earlier block is on its way

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Load the weights, listen for gateways, dial the routers, start the lanes."""
        self.resident = Resident.load(self.config)
        wire = Wire.parse(self.config.cluster.wire)
        self.moe = MoeClient(
            self.spec.id.index, self.resident.config.hidden_size, wire,
            self.config.cluster.epoch, self.transport.pool, self.config.limits.block_deadline_s + _PATIENCE_S,
            combined_rows(wire, self.config.cluster.device), self.transport.seam, self.trace,
            routers={r.id.index: Outbox(str(r.id)) for r in self.config.routers_of(self.spec.node)},
            by_block=self.config.routers_divide_blocks,
        )  # fmt: skip
        self.requests = Requests(
            self.resident.scheduler(self.config),
            self.resident.config.eos_token_ids,
            self.resident.config.vocab_size,
        )
        for lane in range(self.config.attention.microbatches):
            self._lanes.append(self.resident.new_lane(lane, self.moe, self.times, self.trace))
            self._work.append(asyncio.Event())
            tasks.create_task(self._run_lane(lane), name=f"lane {lane}")
        await self.transport.listen(self.spec.address, self._hello(), self)
        for router in self.config.routers_of(self.spec.node):
            tasks.create_task(
                keep_connected(self.transport, router.address, self._hello, self),
                name=f"link to {router.id}",
            )
        tasks.create_task(self._tick(), name="deadlines")

    async def drain(self) -> None:
        """Finish what was accepted; gateways are told not to send more."""
        self.draining = True
        self._push_status()
        await poll_until(lambda: not self.requests.num_open)

    async def stop(self) -> None:
        """Close the links."""
        await self.transport.close()
        if self.trace is not None:
            self.trace.write()

    # ---- lanes ---------------------------------------------------------------------------------

    async def _run_lane(self, index: int) -> None:
        lane, work = self._lanes[index], self._work[index]
        while True:
            work.clear()
            slices = self.requests.scheduler.schedule(index)
            if not slices:
                await work.wait()
                continue
            self.requests.begin(slices)
            all_rows = self.requests.want_all_rows(slices)
            try:
                logits, best = await lane.forward(slices, all_rows=all_rows)
            except AtollError as exc:
                self._send(self.requests.failed(slices, str(exc)))
            else:
                started = time.monotonic_ns()
                self._send(self.requests.advance(slices, logits, best, all_rows=all_rows))
                if self.trace is not None:
                    self.trace.span(
                        "sample", 0, 0, index, started, time.monotonic_ns(), len(slices)
                    )
            self._admit()

    def _admit(self) -> None:
        for sequence in self.requests.scheduler.admit():
            self.resident.cache.clear(sequence.pages)
            self._work[sequence.lane].set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.moe.expire()
            if self.moe.oldest_epoch != self._told_epoch:
                self._told_epoch = self.moe.oldest_epoch
                tell(self._gateways, {"type": "epochs", "oldest": self._told_epoch})
            self._send(self.requests.expire(time.monotonic_ns()))
            self._admit()

    # ---- links ---------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        return Hello(
            self.spec.id, self.spec.node, os.getpid(), self.resident.model_hash,
            self.config.cluster.epoch, self.config.cluster.wire,
        )  # fmt: skip

    def on_open(self, link: Link) -> None:
        """A gateway came. A router that is back is asked again what it owes when it has told its epoch."""
        if link.peer.process.role is Role.GATEWAY:
            self._gateways.add(link)
            link.send_control(status_frame(None, [self._status().to_json()]))
            link.send_control({"type": "epochs", "oldest": self._told_epoch})

    def on_close(self, link: Link, error: LinkClosed) -> None:
        """A lost router owes its blocks until it is back; a lost gateway's requests have no reader any more."""
        log.warning("%s", error)
        if link.peer.process.role is Role.ROUTER:
            self.moe.router_lost(link)
            self._push_status()
        else:
            self._gateways.discard(link)
            self.requests.gateway_lost(link)

    def on_message(self, link: Link, header: Header, payload: Buffer | None) -> None:
        """An answer from the router."""
        if header.kind not in (Kind.COMBINED, Kind.FAILED):
            if payload is not None:
                payload.release()
            raise WireError(f"{header.kind.name} sent to an attention worker")
        self.moe.on_message(link, header, payload)

    def on_landed(self, link: Link, answer: Landed, landing: DeviceRows) -> None:
        """Likewise, of rows that are where they were wanted."""
        self.moe.on_landed(link, answer, landing)

    def on_control(self, link: Link, message: dict[str, Any]) -> None:
        """A frame of a gateway (`common.request`), or a router's epoch (`common.placement.handover`)."""
        kind = message.get("type")
        if kind == "epoch" and link.peer.process.role is Role.ROUTER:
            if self.moe.in_force(link, message["epoch"]):
                self._push_status()
        elif kind == "submit":
            self._submit(link, message)
        elif kind == "cancel":
            self.requests.cancel(link, str(message.get("id")))
        elif kind == "status_request":
            link.send_control(status_frame(message.get("id"), [self._status().to_json()]))

    def _submit(self, link: Link, message: dict[str, Any]) -> None:
        try:
            request = Request.from_json(message)
            if self.draining:
                raise Retryable(f"{self.spec.id} is draining")
            self.requests.submit(link, request, time.monotonic_ns())
        except (AtollError, KeyError, TypeError, ValueError) as exc:
            event = TokenEvent(
                str(message.get("id")),
                finish_reason=FinishReason.ERROR,
                error=str(exc),
                retryable=isinstance(exc, Retryable),
            )
            self._send([(link, event)])
        self._admit()

    def _send(self, events: list[tuple[Link, TokenEvent]]) -> None:
        for gateway in self._gateways:
            theirs = [event for link, event in events if link is gateway]
            if theirs:
                tell([gateway], tokens_frame(theirs))

    # ---- status --------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Ready while every router of the node is connected."""
        if self.draining:
            return State.DRAINING
        return State.STARTING if self._absent() else State.READY

    def _absent(self) -> list[str]:
        return [outbox.name for outbox in self.moe.routers.values() if outbox.link is None]

    def _status(self) -> ProcessStatus:
        scheduler = self.requests.scheduler
        return ProcessStatus.of(
            self.spec.id, node=self.spec.node, pid=os.getpid(), state=self.state,
            counters={
                **asdict(self.times), **{f"moe_{k}": v for k, v in asdict(self.moe.times).items()},
                "running": scheduler.num_running, "waiting": len(scheduler.waiting),
                "cache_pages_free": scheduler.pages.num_free,
                "owed": sum(map(len, self.moe.routers.values())),
                "resent": sum(outbox.num_resent for outbox in self.moe.routers.values()),
                "carriers": self.transport.carriers(),
                **(self.resident.balance.counters() if self.resident.balance else {}),
            },
            missing=f"not connected: {', '.join(absent)}" if (absent := self._absent()) else "",
        )  # fmt: skip

    def _push_status(self) -> None:
        tell(self._gateways, status_frame(None, [self._status().to_json()]))
