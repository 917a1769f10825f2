"""The router service: links to attention workers, to its node's experts and to the other nodes' routers.

Holds who is connected and whether the node is complete; what happens to messages is `services.router.dataflow`. An
expert worker is routed to only after the content hashes of its weights match the checkpoint's manifest: weights on the
wrong expert are refused at the door (`services.router.placement`).
"""

import asyncio
import logging
import os
from collections.abc import Iterable
from functools import partial
from typing import Any

from common.config import ClusterConfig, ProcessSpec
from common.errors import AuthError, LinkClosed
from common.ids import ProcessId, Role
from common.model.hf_config import load_config
from common.model.manifest import cluster_manifest
from common.model.slices import sliced_config
from common.obs.trace import open_recorder
from common.plan_file import cluster_plan
from common.status import ProcessStatus, State, status_frame
from common.transport.base import Hello, Link, Transport, tell
from common.transport.buffers import Buffer
from common.transport.device import DeviceRows
from common.transport.dial import keep_connected
from common.transport.factory import open_transport
from common.transport.outbox import Outbox
from common.waiting import poll_until
from common.wire.blocks import combined_rows
from common.wire.header import Header, Landed, Wire
from services.router.dataflow import Dataflow
from services.router.placement import Placement
from services.router.plan import split_by_node, split_unicast
from services.router.routes import rail_between, rail_of_worker
from services.router.status import StatusGather

log = logging.getLogger(__name__)
_TICK_S = 0.25
_STATUS_WAIT_S = 0.5


class RouterWorker:
    """One router process. Implements `common.service.Service` and `common.transport.base.Handler`."""

    def __init__(
        self, config: ClusterConfig, index: int, transport: Transport | None = None
    ) -> None:
        self.config = config
        self.spec = config.process(Role.ROUTER, index)
        self.transport = transport or open_transport(config, net_device=self.spec.net_device)
        self.draining = False
        self.trace = open_recorder(config, self.spec)
        self._experts: dict[int, Link] = {}
        self._expert_status: dict[int, dict[str, Any]] = {}
        self._gateways: set[Link] = set()
        self._status = StatusGather(self._entries, wait_s=_STATUS_WAIT_S)
        self._last_state: tuple[State, str] | None = None
        self._told_here: frozenset[int] = frozenset()  # experts that gateways know of

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Listen for attention workers, experts and later routers; dial the earlier routers."""
        model = load_config(self.config.model.path)
        self.manifest = cluster_manifest(self.config)
        self.plan = cluster_plan(self.config, model)
        own = [w for w, node in enumerate(self.plan.nodes) if node == self.spec.node]
        self.num_rails = len(self.config.routers_of(self.spec.node))
        self.reported = [
            w for w in own if rail_of_worker(w, self.plan.nodes, self.num_rails) == self.spec.rail
        ]
        routers = self._counterparts()
        slices = self.config.placement.expert_slices
        by_block = self.config.routers_divide_blocks
        unicast = self.config.placement.dispatch == "unicast"
        self.flow = Dataflow(
            self.spec.node, self.plan, model.num_experts * slices, self.transport.pool, slices=slices,
            experts={w: Outbox(f"expert-{w}") for w in own},
            routers={node: Outbox(str(spec.id)) for node, spec in routers.items()},
            index=self.spec.id.index, rail=0 if by_block else self.spec.rail,
            num_rails=1 if by_block else self.num_rails,
            answer_rows=combined_rows(Wire.parse(self.config.cluster.wire), self.config.cluster.device),
            trace=self.trace, seam=self.transport.seam,
            split=partial(split_unicast, self.spec.node) if unicast else split_by_node,
        )  # fmt: skip
        if self.flow.ahead is not None:
            self.transport.forward_with(self.flow.ahead.forwarder)
        wire = Wire.parse(self.config.cluster.wire)
        self.flow.warm_up(model.hidden_size, wire, model.top_k * slices)
        self.placement = Placement(
            self.config,
            self.spec,
            sliced_config(model, slices),
            self.manifest,
            self.flow,
            self._look,
        )
        await self.transport.listen(self.spec.address, self._hello(), self)
        for spec in routers.values():
            if spec.id.index < self.spec.id.index:
                tasks.create_task(
                    keep_connected(self.transport, spec.address, self._hello, self),
                    name=f"link to {spec.id}",
                )
        tasks.create_task(self._tick(), name="deadlines")

    def _counterparts(self) -> dict[int, ProcessSpec]:
        """By node: the router that this one talks to."""
        found = {}
        for node in set(range(len(self.config.nodes))) - {self.spec.node}:
            theirs = self.config.routers_of(node)
            if self.config.routers_divide_blocks:
                found[node] = theirs[self.spec.rail]
            elif rail_between(self.spec.node, node, self.num_rails) == self.spec.rail:
                found[node] = theirs[rail_between(node, self.spec.node, len(theirs))]
        return found

    def _is_counterpart(self, link: Link) -> bool:
        outbox = self.flow.routers.get(link.peer.node)
        return outbox is not None and outbox.name == str(link.peer.process)

    async def drain(self) -> None:
        """Finish the blocks in flight."""
        self.draining = True
        self._push_state()
        await poll_until(lambda: not self.flow.num_in_flight)

    async def stop(self) -> None:
        """Close the links."""
        await self.transport.close()
        if self.flow.ahead is not None:
            self.flow.ahead.close()
        if self.trace is not None:
            self.trace.write()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            if self.flow.num_in_flight:
                self.flow.expire(self.config.limits.block_deadline_s)

    # ---- links ---------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        return Hello(
            self.spec.id, self.spec.node, os.getpid(), self.manifest.model_hash,
            self.config.cluster.epoch, self.config.cluster.wire,
        )  # fmt: skip

    def on_open(self, link: Link) -> None:
        """What the peer owed before its link was lost is posted again once it has the placement for it."""
        peer = link.peer.process
        if peer.role is Role.ROUTER and not self._is_counterpart(link):
            raise AuthError(f"{peer} is on another rail than {self.spec.id}")
        if peer.role is Role.GATEWAY:
            self._gateways.add(link)
            link.send_control(status_frame(None, self._entries()))
        self.placement.opened(link)
        if peer.role is Role.EXPERT:
            self._experts[peer.index] = link
        elif peer.role is Role.ROUTER:
            self._tell_lost([link])
        log.info("%s is connected", peer)
        self._look(peer.role)

    def on_close(self, link: Link, error: LinkClosed) -> None:
        """What the peer owes stays in its outbox; what it asked for is dropped."""
        log.warning("%s", error)
        peer = link.peer.process
        if peer.role is Role.EXPERT:
            self.flow.experts[peer.index].closed(link)
            if self._experts.get(peer.index) is link:
                del self._experts[peer.index]
        elif peer.role is Role.ROUTER and self._is_counterpart(link):
            self.flow.routers[link.peer.node].closed(link)
        self._gateways.discard(link)
        self.placement.closed(link)
        self.flow.origin_closed(link)
        self._look(peer.role)

    def on_message(self, link: Link, header: Header, payload: Buffer | None) -> None:
        """Every data message is the dataflow's."""
        self.flow.on_message(link, header, payload)

    def on_landed(self, link: Link, answer: Landed, landing: DeviceRows) -> None:
        """Likewise."""
        self.flow.on_landed(link, answer, landing)

    def on_control(self, link: Link, message: dict[str, Any]) -> None:
        """Status questions from gateways, answers from experts, what other routers lost or want no more."""
        if message.get("type") == "status_request":
            experts = [self._experts[w] for w in self.reported if w in self._experts]
            self._status.ask(link, message.get("id"), experts)
        elif message.get("type") == "lost" and link.peer.process.role is Role.ROUTER:
            if self.flow.calls.lost_at(link.peer.node, message["workers"]):
                self.flow.membership_changed()
                self._push_state()
        elif message.get("type") == "cancel":
            self.flow.cancelled(link, message["block"])
        elif message.get("type") == "status" and link.peer.process.role is Role.EXPERT:
            (self._expert_status[link.peer.process.index],) = message["processes"]
            self._status.answered(link, message.get("id"))
        elif message.get("type") == "routing_request":
            sample = self.flow.load.sample(self.flow.clock_ns())
            link.send_control({"type": "routing", **sample.to_json()})
        else:
            self.placement.on_control(link, message)

    def _look(self, role: Role) -> None:
        """Somebody of this role came or went: what the lost owe goes to replicas, and whoever asks us is told."""
        if self.flow.calls.look():
            if role is Role.EXPERT:
                self._tell_lost(self.placement.links(Role.ROUTER))
            self.flow.membership_changed()
        self._push_state()

    def _tell_lost(self, links: Iterable[Link]) -> None:
        """Routers that could use replicas elsewhere must know which workers of this node cannot answer."""
        if self.has_replicas:
            tell(links, {"type": "lost", "workers": [w for w in self.needed if self._lacks(w)]})

    @property
    def needed(self) -> list[int]:
        """Workers of this node that hold something by the plan in force."""
        return [w for w in self.flow.experts if self.placement.epochs.holds_any(w)]

    @property
    def has_replicas(self) -> bool:
        """Whether any plan served has replicas."""
        return self.placement.epochs.has_replicas

    def _lacks(self, worker: int) -> bool:
        return self.flow.experts[worker].link is None

    # ---- status --------------------------------------------------------------------------------

    def _state(self) -> tuple[State, str]:
        living, current = self.flow.calls.fleet.alive.tolist(), self.placement.epochs.current
        absent = [
            f"expert-{w}"
            for w in self.needed
            if not living[w] and not (self.has_replicas and current.covered(w, living))
        ]
        absent += [outbox.name for outbox in self.flow.routers.values() if outbox.link is None]
        if self.draining:
            return State.DRAINING, ""
        if absent:
            return (
                State.STARTING,
                f"not connected: {', '.join(absent[:4])}{' ...' if absent[4:] else ''}",
            )
        return State.READY, ""

    def _entries(self) -> list[dict[str, Any]]:
        state, missing = self._state()
        owed = {str(w): len(outbox) for w, outbox in self.flow.experts.items()}
        resent = sum(
            o.num_resent for o in (*self.flow.experts.values(), *self.flow.routers.values())
        )
        own = ProcessStatus.of(
            self.spec.id, node=self.spec.node, pid=os.getpid(), state=state, missing=missing,
            counters={
                **self.flow.counters.to_json(), "in_flight": self.flow.num_in_flight,
                "epoch": self.placement.epochs.current.epoch, "epochs_served": self.placement.epochs.served,
                "expert_load": self.flow.load.to_json(self.flow.clock_ns()),
                "resent": resent, "owed_by_expert": owed,
                "carriers": self.transport.carriers(),
            },
        )  # fmt: skip
        return [own.to_json(), *(self._expert_entry(w) for w in self.reported)]

    def _expert_entry(self, worker: int) -> dict[str, Any]:
        link = self._experts.get(worker)
        last = self._expert_status.get(worker)
        if link is not None and last is not None and last["pid"] == link.peer.pid:
            return last
        return ProcessStatus.of(
            ProcessId(Role.EXPERT, worker), node=self.spec.node,
            pid=0 if link is None else link.peer.pid,
            state=State.LOST if link is None else State.READY,
        ).to_json()  # fmt: skip

    def _push_state(self) -> None:
        """Tell gateways when this node's state changes, or who of its experts is here.

        Who comes while others are awaited is told with the last: a frame per link would be many at the start.
        """
        state, here = self._state(), frozenset(self._experts)
        awaiting = state[0] is State.STARTING and here >= self._told_here
        if state != self._last_state or (here != self._told_here and not awaiting):
            self._last_state, self._told_here = state, here
            tell(self._gateways, status_frame(None, self._entries()))
