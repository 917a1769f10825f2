"""The placement of a router while it changes: what its workers hold, what other routers serve, who must be told.

`services.router.epochs` says which plans are served, `common.placement.handover` has the frames. What is decided here
is only when a peer may be asked: an expert worker once it holds, by the manifest's hashes, what every binding plan
gives it; another router once it serves the epoch in force. Until then what they are owed waits in their outboxes.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from common.config import ClusterConfig, ProcessSpec
from common.errors import AuthError, ConfigError, WireError
from common.ids import ProcessId, Role
from common.model.hf_config import ModelConfig
from common.model.manifest import Manifest
from common.placement.handover import Report
from common.placement.plan import Place, Plan, check_plan
from common.plan_file import placement_path, read_placement, write_placement
from common.transport.base import Link, tell
from common.transport.outbox import Outbox
from services.router.dataflow import Dataflow

log = logging.getLogger(__name__)


class Placement:
    """Handler of everything about plans. `on_change` is called after an outbox opened or the plan in force changed."""

    def __init__(
        self, config: ClusterConfig, spec: ProcessSpec, model: ModelConfig, manifest: Manifest,
        flow: Dataflow, on_change: Callable[[Role], None],
    ) -> None:  # fmt: skip
        self._config, self._spec, self._model, self._manifest = config, spec, model, manifest
        self._flow, self._on_change = flow, on_change
        self._base, self.epochs = flow.plan, flow.epochs
        self._path = placement_path(config, spec.id)
        self._decided = -1  # the last epoch that the gateway told us is in force
        self._links: dict[ProcessId, Link] = {}  # of every role
        self._held: dict[int, dict[Place, str]] = {}  # by connected worker: hashes of its experts
        self._asked: dict[
            Link, tuple[int, set[Place]]
        ] = {}  # of a worker: number, what it shall hold
        self._announced: dict[Link, int] = {}  # to the attention worker at the other end
        self._served: dict[Link, set[int]] = {}  # epochs of the router at the other end
        left = read_placement(self._path, self._base)
        if left is not None:
            self.epochs.restore(left.epoch, left.plans)
            log.info("%s: %r from %s", spec.id, self.epochs, self._path)

    # ---- links ---------------------------------------------------------------------------------

    def opened(self, link: Link) -> None:
        """Tell the peer what it must know; a worker that holds everything may be asked at once.

        Raises AuthError for a worker with other weights than the checkpoint's.
        """
        peer = link.peer.process
        if peer.role is Role.EXPERT:
            self._held[peer.index] = self._checked(link, link.peer.facts["experts"])
        self._links[peer] = link
        if peer.role is Role.EXPERT:
            self._ask_to_hold([link])
            self._look_at(peer.index)
        elif peer.role is Role.ROUTER:
            tell([link], self._serves())
        elif peer.role is Role.ATTENTION:
            self._announce()
        elif peer.role is Role.GATEWAY:
            tell([link], self._report().to_json())

    def closed(self, link: Link) -> None:
        """A worker lost before the candidate is in force makes it impossible: its successor would hold us up."""
        peer = link.peer.process
        self._asked.pop(link, None)
        self._served.pop(link, None)
        self._announced.pop(link, None)
        if self._links.get(peer) is not link:
            return
        del self._links[peer]
        self._announce()  # perhaps it was that router which spoke against it
        if peer.role is Role.EXPERT:
            held, candidate = self._held.pop(peer.index), self.epochs.candidate
            if candidate is not None:
                epoch = candidate.plan.epoch
                lacking = self.epochs.residents(epoch, peer.index) - held.keys()
                if self.epochs.residents(epoch, peer.index):
                    did = "loaded" if lacking else "was ready"
                    self._impossible(f"{peer} was lost while it {did} for epoch {epoch}")

    def on_control(self, link: Link, message: dict[str, Any]) -> None:
        """Take a frame. Raises WireError for what no gateway sends."""
        peer = link.peer.process
        if self._links.get(peer) is not link:
            return  # a newer link has replaced it: that gateway has nothing to say any more
        match message.get("type"), peer.role:
            case "held", Role.EXPERT:
                self._on_held(link, message)
            case "serves", Role.ROUTER:
                self._on_serves(link, message)
            case "prepare" | "commit" as kind, Role.GATEWAY:
                self._on_plan(kind, message["plan"])
            case "abort", Role.GATEWAY:
                candidate = self.epochs.candidate
                if candidate is not None and self.epochs.abort():
                    current = self.epochs.current.epoch
                    log.warning("epoch %d is given up, %d stays", candidate.plan.epoch, current)
                self._changed()
            case "retire", Role.GATEWAY:
                self.epochs.retire()
                self._changed()

    # ---- what others hold and serve ------------------------------------------------------------

    def _on_held(self, link: Link, message: dict[str, Any]) -> None:
        worker = link.peer.process.index
        if message["id"] != self._asked[link][0]:
            return  # it may have dropped since what it held then
        try:
            self._held[worker] = self._checked(link, message["experts"])
        except AuthError as exc:
            self._held[worker] = {}
            self._impossible(str(exc))
        if error := message.get("error"):
            self._impossible(f"{link.peer.process}: {error}")
        self._look_at(worker)
        self._vote()

    def _checked(self, link: Link, experts: Iterable[tuple[int, int, str]]) -> dict[Place, str]:
        """Raises AuthError when a hash of what the worker shall hold is not the manifest's."""
        peer = link.peer.process
        if peer.index not in self._flow.experts:
            raise AuthError(f"{peer} belongs to another node than {self._spec.id}")
        held = {(layer, expert): digest for layer, expert, digest in experts}
        wanted = self.epochs.wanted(peer.index)
        for (layer, expert), digest in sorted(held.items()):
            expected = self._manifest.expert_hashes[layer, expert]
            if (layer, expert) in wanted and digest != expected:
                raise AuthError(
                    f"{peer} holds {digest} as expert {expert} of layer {layer}, the checkpoint's is {expected}"
                )
        return held

    def _look_at(self, worker: int) -> None:
        """Ask a worker for what it owes once it holds what binds us."""
        link, outbox = self._links[ProcessId(Role.EXPERT, worker)], self._flow.experts[worker]
        if outbox.link is not link and self.epochs.binding(worker) <= set(self._held[worker]):
            self._open(outbox, link)

    def _on_serves(self, link: Link, message: dict[str, Any]) -> None:
        digests = {int(epoch): digest for epoch, digest in message["plans"]}
        for epoch, digest in self.epochs.digests.items():
            if digests.get(epoch, digest) != digest:
                link.close(
                    f"{link.peer.process} has another plan than {self._spec.id} for the same epoch {epoch}"
                )
                return
        self._served[link] = set(digests)
        self._look_at_router(link)
        self._announce()

    def _look_at_router(self, link: Link) -> None:
        """Ask another router for what it owes once it serves what is in force here."""
        outbox, served = self._flow.routers[link.peer.node], self._served.get(link, ())
        if outbox.link is not link and self.epochs.current.epoch in served:
            self._open(outbox, link)

    def _open(self, outbox: Outbox, link: Link) -> None:
        outbox.opened(link)
        self._on_change(link.peer.process.role)

    # ---- plans ---------------------------------------------------------------------------------

    def _on_plan(self, kind: str, document: dict[str, Any]) -> None:
        candidate = self.epochs.candidate
        if candidate is not None and document.get("epoch") == candidate.plan.epoch:
            plan = candidate.plan
        else:
            plan = self._parsed(document)
        if kind == "commit":
            self._decided = plan.epoch
        if self.epochs.prepare(plan):
            self._changed()
            absent = [w for w in self._flow.experts if w not in self._held]
            absent = [w for w in absent if self.epochs.residents(plan.epoch, w)]
            if absent:
                self._impossible(f"expert-{absent[0]} is not connected")
        self._vote()

    def _parsed(self, document: dict[str, Any]) -> Plan:
        try:
            plan = Plan.from_json(document)
            check_plan(
                plan, moe_layers=self._model.moe_layers, num_experts=self._model.num_experts,
                nodes=self._base.nodes, experts_per_gpu=self._config.placement.experts_per_gpu,
            )  # fmt: skip
        except ConfigError as exc:
            raise WireError(f"plan of the gateway: {exc}") from exc
        return plan

    def _vote(self) -> None:
        """Say that we are ready for the candidate once this node's workers hold what it gives them.

        A candidate that is in force elsewhere then is so here, too.
        """
        candidate = self.epochs.candidate
        if candidate is None:
            return
        decided = candidate.plan.epoch == self._decided
        if not candidate.ready and (decided or not candidate.error):
            for worker in self._flow.experts:
                wanted = self.epochs.residents(candidate.plan.epoch, worker)
                if not wanted <= self._held.get(worker, {}).keys():
                    return
            candidate.ready = True
            try:
                self._save()  # first: our successor must serve what we promised
            except ConfigError as exc:
                candidate.ready = False
                self._impossible(str(exc))
                return
            tell(self.links(Role.ROUTER), self._serves())
            self._tell_gateways()
        if decided and candidate.ready and self.epochs.commit(candidate.plan):
            log.info("in force: %r", candidate.plan)
            self._changed()
            self._announce()
            self._on_change(Role.EXPERT)

    def _impossible(self, sentence: str) -> None:
        """The candidate cannot be served here; the gateway will have it dropped, unless it is in force elsewhere."""
        candidate = self.epochs.candidate
        if candidate is not None and not candidate.error:
            log.warning("epoch %d: %s", candidate.plan.epoch, sentence)
            candidate.error = sentence
            self._tell_gateways()

    # ---- telling -------------------------------------------------------------------------------

    def _changed(self) -> None:
        """The plans that we serve are others now."""
        try:
            self._save()
        except ConfigError as exc:  # a successor will be told by the gateway
            log.error("%s", exc)
        self._ask_to_hold(self.links(Role.EXPERT))
        for worker in list(self._held):
            self._look_at(worker)
        for link in self.links(Role.ROUTER):
            self._look_at_router(link)
        tell(self.links(Role.ROUTER), self._serves())
        self._tell_gateways()

    def _save(self) -> None:
        """Raises ConfigError."""
        epochs = self.epochs
        write_placement(self._path, self._base, epochs.current.epoch, epochs.binding_plans)

    def _announce(self) -> None:
        """Tell attention workers the epoch in force, unless another router shows that ours is out of date."""
        epoch, served = self.epochs.current.epoch, self._served.values()
        if self._flow.routers and not (served and all(epoch in each for each in served)):
            return
        for link in self.links(Role.ATTENTION):
            if self._announced.get(link) != epoch:
                self._announced[link] = epoch
                tell([link], {"type": "epoch", "epoch": epoch})

    def _ask_to_hold(self, links: Iterable[Link]) -> None:
        for link in links:
            wanted = self.epochs.wanted(link.peer.process.index)
            number, before = self._asked.get(link, (0, None))
            if wanted != before:
                held = self._held[link.peer.process.index]
                for place in held.keys() - wanted:  # dropped as soon as it reads this
                    del held[place]
                self._asked[link] = number + 1, wanted
                tell([link], {"type": "hold", "id": number + 1, "experts": sorted(wanted)})

    def _serves(self) -> dict[str, Any]:
        return {"type": "serves", "plans": list(self.epochs.digests.items())}

    def _report(self) -> Report:
        epochs, candidate = self.epochs, self.epochs.candidate
        if candidate is None:
            return Report(epochs.current, tuple(epochs.served))
        return Report(
            epochs.current, tuple(epochs.served), candidate.plan.epoch, candidate.ready, candidate.error
        )  # fmt: skip

    def _tell_gateways(self) -> None:
        tell(self.links(Role.GATEWAY), self._report().to_json())

    def links(self, role: Role) -> list[Link]:
        """Open links to peers of a role, one each."""
        return [link for process, link in self._links.items() if process.role is role]
