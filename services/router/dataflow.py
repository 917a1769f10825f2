"""Messages through a router: split, fan out, gather, sum, answer. Plain calls, no await, one pass per message.

Decides nothing about links, indices, replicas and epochs: services.router.{worker,plan,routes,epochs}.
Invariant: a request is in `_sources` or `_works` exactly while its origin waits for an answer; every message that is
owed an answer is in an outbox.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from common.errors import AtollError, LinkClosed, WireError
from common.obs.trace import Recorder
from common.placement.plan import Plan
from common.tensors import check_rows
from common.transport.base import Hello, Link, tell
from common.transport.buffers import Buffer, BufferPool
from common.transport.device import DeviceRows, release_behind
from common.transport.outbox import Call, Outbox
from common.transport.seam import Seam
from common.wire.blocks import EXPERT_OUT_ROWS, PARTIAL_ROWS, RowSegment, RowType
from common.wire.header import Header, Kind, Landed, Wire
from services.router import payloads
from services.router.ahead import Ahead, open_ahead
from services.router.answers import Answers
from services.router.block import Int32s, NodeWork, SourceWork, Work
from services.router.calls import Calls
from services.router.counters import Counters
from services.router.epochs import Epochs
from services.router.failover import calls_to_move, shares_to_move
from services.router.load import ExpertLoad
from services.router.plan import BlockPairs, NodeShare, check_experts, fan_out, split_by_node
from services.router.routes import Routes
from services.router.rows import Rows, rows_again
from services.router.rows_apart import open_rows


@dataclass(slots=True)
class Dataflow:
    """Blocks in flight through one of the `num_rails` routers of `node`. `plan` is the first epoch's placement."""

    node: int
    plan: Plan
    num_experts: int  # slices count
    pool: BufferPool
    experts: dict[int, Outbox]  # by worker index: the workers of this node
    routers: dict[int, Outbox]  # by node id: the router at the other end of this rail
    index: int = 0  # of this router in the cluster
    rail: int = 0
    num_rails: int = 1
    slices: int = 1  # of an expert
    split: Callable[..., list[NodeShare]] = split_by_node  # a block by destination
    answer_rows: RowType = RowType.FP32  # compute dtype of the attention workers' device
    trace: Recorder | None = None
    clock_ns: Callable[[], int] = time.monotonic_ns
    counters: Counters = field(default_factory=Counters)
    seam: Seam = field(default_factory=Seam)
    ahead: Ahead | None = field(init=False)
    calls: Calls = field(init=False)
    epochs: Epochs = field(init=False)
    load: ExpertLoad = field(init=False)
    _sources: dict[int, SourceWork] = field(default_factory=dict)  # by the block that was asked for
    # by the RELAY, our share of a DISPATCH, or one that is all ours
    _works: dict[int, NodeWork] = field(default_factory=dict)
    _rows: Rows = field(init=False)
    _answers: Answers = field(init=False)

    def __post_init__(self) -> None:
        self.epochs = Epochs(self.plan, self.node, rail=self.rail, num_rails=self.num_rails)
        self.load = ExpertLoad(self.num_experts)
        self._rows = open_rows(self.pool, self.seam)
        self._answers = Answers(
            self.node, self.num_rails, self.pool, self._rows, self.answer_rows, self.counters, self.clock_ns
        )  # fmt: skip
        self.calls = Calls(self.index, self.plan.nodes, self.experts, self.routers, self.counters)
        self.ahead = open_ahead(self.pool, self.calls)

    def __repr__(self) -> str:
        owed = sum(len(outbox) for outbox in self.experts.values())
        return (
            f"<Dataflow node {self.node} [{len(self._sources)} blocks | {len(self._works)} node shares"
            f" | {owed} owed by experts | {sum(map(len, self.routers.values()))} by routers]>"
        )

    def warm_up(self, width: int, wire: Wire, depth: int) -> None:
        """See `services.router.rows.Rows.warm_up`."""
        self._rows.warm_up(width, wire, depth, self.answer_rows)

    @property
    def num_in_flight(self) -> int:
        """Blocks and node shares that somebody waits for."""
        return len(self._sources) + len(self._works)

    # ---- requests ------------------------------------------------------------------------------

    def on_message(self, link: Link, header: Header, payload: Buffer | None) -> None:
        """Take one data message (and its payload). A bad request is answered with FAILED, not with a dead link."""
        self.counters.received(header)
        started = 0 if self.trace is None else self.clock_ns()
        try:
            if header.kind in (Kind.DISPATCH, Kind.RELAY):
                try:
                    self._on_request(link, header, payload)
                except AtollError as exc:
                    self._forget(header.block)
                    self._fail(link, header, str(exc))
            elif header.kind in (Kind.EXPERT_OUT, Kind.PARTIAL):
                self._on_answer(link, header, payload)
            elif header.kind is Kind.FAILED:
                self._on_failed(link, header, payload)
            else:
                raise WireError(f"{header.kind.name} sent to a router")
            self._trace(link, header.kind, header, started)
        finally:
            if payload is not None:
                payload.release()

    def _trace(self, link: Link, kind: Kind, about: Header, started_ns: int) -> None:
        if self.trace is not None:
            who = link.peer.process.index if kind is Kind.EXPERT_OUT else link.peer.node
            place = about.trace, about.layer, about.microbatch
            self.trace.span(kind.name.lower(), *place, started_ns, self.clock_ns(), who)

    def _on_request(self, link: Link, header: Header, payload: Buffer | None) -> None:
        routes = self.epochs.routes(header.epoch, header.layer)
        if payload is None or header.num_rows == 0:
            raise WireError(f"{header.kind.name} without rows")
        self._forget(header.block)  # sent again on a new link: the old answer has nowhere to go
        started = self.clock_ns()
        take = self._on_dispatch if header.kind is Kind.DISPATCH else self._on_relay
        take(link, header, payload, routes)
        self.counters.split_us += (self.clock_ns() - started) // 1000

    def _on_dispatch(self, link: Link, header: Header, payload: Buffer, routes: Routes) -> None:
        rows, pairs = payloads.read_dispatch(header, payload, self.num_experts, self.slices)
        if self.num_rails == 1 and routes.is_whole(header.layer):
            self._start_work(header.block, link, header, routes, pairs, payload, rows)
        else:
            self._start_source(SourceWork(header, link, routes, rows), pairs, payload)
        self.counters.blocks += 1
        if self.rail == 0:  # counted while others are at work
            self.load.add(header.layer, pairs.experts, self.clock_ns())

    def _start_source(self, source: SourceWork, pairs: BlockPairs, payload: Buffer) -> None:
        """A block that several nodes or rails may have shares of."""
        header, routes = source.request, source.routes
        if routes.has_replicas(header.layer):
            check_experts(pairs.experts, self.num_experts)  # else `split` does
        table = routes.senders(header.layer, pairs.experts, self.calls.fleet)
        shares = self.split(pairs.experts, pairs.weights, routes.node_of_worker.take(table))
        if not shares:  # every pair is for the node's other rails
            self._post(source.origin, *self._answers.combined(source))
            return
        self._sources[header.block] = source
        if payload.landing is not None or routes.has_replicas(header.layer):
            source.payload = payload.retain()
        self._post_shares(source, shares, payload, table)

    def _post_shares(
        self, source: SourceWork, shares: list[NodeShare], payload: Buffer, table: Int32s
    ) -> None:
        """Ask nodes for their shares; `table` [num_experts] is the choice of workers that led to them."""
        ours_last = sorted(shares, key=lambda share: share.node == self.node)
        source.shares |= (calls := {self.calls.number(): share for share in ours_last})
        source.waiting |= calls.keys()
        self.calls.sources |= dict.fromkeys(calls, source)
        self._ask_routers(source, calls, payload, table)
        *_, (last, share) = calls.items()
        if share.node == self.node:
            origin, routes = source.origin, source.routes
            self._start_work(last, origin, source.request, routes, share, payload, source.rows)

    def _ask_routers(
        self, source: SourceWork, calls: dict[int, NodeShare], payload: Buffer, table: Int32s
    ) -> None:
        """RELAYs for the shares of other nodes, and places for the partials of all."""
        request, row_type = source.request, PARTIAL_ROWS[source.request.wire]
        relays, tables = source.relays(calls, self.node, some=self.num_rails > 1)
        gathered, outputs = self._rows.fan_out(payload, source.rows, tables, request, Kind.RELAY, row_type)  # fmt: skip
        source.add(outputs, calls, self.node)
        self.calls.ask_routers(source, relays, tables.pieces, gathered, table, self.clock_ns())

    def _on_relay(self, link: Link, header: Header, payload: Buffer, routes: Routes) -> None:
        rows, share = payloads.read_relay(header, payload, self.node, self.num_experts)
        self.counters.crossed(
            link.peer.node, header.kind, header, header.num_rows, header.num_pairs, header.payload_nbytes, inward=True,
        )  # fmt: skip
        self._start_work(header.block, link, header, routes, share, payload, rows)

    def _start_work(
        self, key: int, link: Link, request: Header, routes: Routes, pairs: NodeShare | BlockPairs,
        payload: Buffer, segment: RowSegment,
    ) -> None:  # fmt: skip
        """Fan a node's share, or all pairs of a block, out to its workers; rows index the segment."""
        table = routes.workers(request.layer, pairs.experts, self.calls.fleet)
        of_block = self._rows.handed_on(payload, segment)
        ahead = self.ahead if of_block and isinstance(pairs, BlockPairs) else None
        left = None if ahead is None else ahead.take(request, table)
        plan = (
            left.plan if left else fan_out(pairs, table, request.width, segment.row_type, of_block)
        )
        gathered, outputs = self._rows.fan_out(
            payload, segment, plan.tables, request, Kind.EXPERT_IN, EXPERT_OUT_ROWS[request.wire], left
        )  # fmt: skip
        work = NodeWork(key, request, link, routes, plan.tables.shape[0], outputs)
        self._works[key] = work
        asked = plan.shares, plan.tables.pieces, gathered, self.clock_ns()
        self.calls.ask_experts(work, *asked, left.first if left else 0)
        if ahead is not None:
            ahead.learn(request, routes, table, outputs, left)
        if key not in self.calls.sources:  # else the sum is one of several
            self._answers.prepare(work, payload)

    # ---- answers -------------------------------------------------------------------------------

    def on_landed(self, link: Link, answer: Landed, landing: DeviceRows) -> None:
        """`on_message` of an answer whose rows are in their places. Raises WireError if these are another's."""
        self.counters.received(answer)
        started = 0 if self.trace is None else self.clock_ns()
        question = self.calls.question(peer := link.peer, answer)
        if question is None:
            return
        owed, item = question
        if owed.landing is not landing:
            raise WireError(f"{peer.process} answered {answer.block} with rows of another")
        self._answered(peer, owed, item, answer)
        if self.trace is not None:  # a kind takes long to find
            self._trace(link, Kind(answer.kind), item.request, started)

    def _on_answer(self, link: Link, header: Header, payload: Buffer | None) -> None:
        """Its rows are copied to where they are summed, unless they came there."""
        question = self.calls.question(link.peer, header)
        if question is None:
            return
        owed, item = question
        rows = EXPERT_OUT_ROWS if header.kind is Kind.EXPERT_OUT else PARTIAL_ROWS
        row_type, width = rows[item.request.wire], item.request.width
        payload, segment = check_rows(payload, owed.num_rows, width, row_type, header.kind.name)
        if payload.rows is None or payload.rows is not owed.landing:
            item.put(owed.number, payload, segment)
            if payload.rows is not None:  # the device has yet to read them
                release_behind(self.seam, payload.retain())
        self._answered(link.peer, owed, item, header)

    def _answered(self, peer: Hello, owed: Call, item: Work, answer: Header | Landed) -> None:
        """The rows of an answer are in their places."""
        call, node = owed.number, peer.node
        if isinstance(item, NodeWork):
            if item.arrived(call, answer):
                del self._works[item.key]
                self._finish_work(item)  # before what nobody waits for
            self.calls.settle_expert(peer.process.index, call)
            return
        self.counters.crossed(
            node, Kind.PARTIAL, item.request, owed.num_rows, owed.num_pairs, answer.payload_nbytes, inward=True
        )  # fmt: skip
        self.calls.settle_router(node, call)
        item.timing.include(answer)
        self._partial_arrived(item, call)

    def _finish_work(self, work: NodeWork) -> None:
        source = self.calls.sources.pop(work.key, None)
        if source is None:
            self._post(work.origin, *self._answers.of_node(work))
            self._rows.release(work.outputs)
            return
        source.timing.include(work.timing)
        self._answers.share(source, work)
        self._partial_arrived(source, work.key)

    def _partial_arrived(self, source: SourceWork, call: int) -> None:
        if source.arrived(call):
            self._post(source.origin, *self._answers.combined(source))
            self._close(source.request.block)

    # ---- workers lost and found ----------------------------------------------------------------

    def membership_changed(self) -> None:
        """A worker or router came or went (`calls.fleet` is up to date): what the dead owe goes to replicas at once.

        What has no living replica waits in the outbox of the dead one.
        """
        waiting: list[Work] = [*self._works.values(), *self._sources.values()]
        for item in waiting:
            if item.routes.has_replicas(item.request.layer):
                try:
                    self._move(item)
                except AtollError as exc:
                    self._forget(item.request.block)
                    self._fail(item.origin, item.request, str(exc))

    def _move(self, item: Work) -> None:
        if isinstance(item, NodeWork):
            for call, old, parts in calls_to_move(item, self.calls.fleet):
                asked = self.experts[old.worker].owed(call)
                assert asked is not None, "a question that is in no outbox"
                pieces, gathered = rows_again(self._rows, item.request, asked, old, parts)
                self.calls.settle_expert(old.worker, call)
                del item.waiting[call]
                self.calls.ask_experts(item, parts, pieces, gathered, self.clock_ns())
                self.counters.rerouted += 1
        elif item.payload is not None:
            for call, share, shares, table in shares_to_move(item, self.calls.fleet):
                self._cancel_share(share.node, call)
                del item.shares[call]
                item.waiting.discard(call)
                self._post_shares(item, shares, item.payload, table)
                self.counters.rerouted += 1

    def _cancel_share(self, node: int, call: int) -> None:
        """A share is no longer wanted of that node."""
        if node == self.node:
            self.calls.sources.pop(call, None)
            self._forget_work(call)
            return
        self.calls.settle_router(node, call)
        if (link := self.routers[node].link) is not None:
            tell([link], {"type": "cancel", "block": call})

    # ---- failures ------------------------------------------------------------------------------

    def _on_failed(self, link: Link, header: Header, payload: Buffer | None) -> None:
        sentence = "" if payload is None else payload.array.tobytes().decode("utf-8", "replace")
        if not self._fail_call(header.block, f"{link.peer.process}: {sentence}"):
            self.counters.late += 1

    def _fail_call(self, call: int, sentence: str) -> bool:
        """Fail the block that a question was about; False when nobody waits for it any more."""
        work = self.calls.works.get(call)
        item = self.calls.sources.get(call if work is None else work.key) or work
        if item is None:
            return False
        self._forget(item.request.block)
        self._fail(item.origin, item.request, sentence)
        return True

    def expire(self, limit_s: float) -> None:
        """Fail every block that a peer has owed for longer than `limit_s`, naming who owes it."""
        for call, sentence in self.calls.overdue(self.clock_ns(), limit_s):
            self._fail_call(call, sentence)

    def origin_closed(self, link: Link) -> None:
        """Nobody waits any more for what this link asked: drop it. Late answers find nothing and are dropped too."""
        for table in (self._sources, self._works):
            for block in [b for b, item in table.items() if item.origin is link]:
                self._forget(block)

    def cancelled(self, link: Link, key: int) -> None:
        """Another router no longer wants the share that it asked for."""
        if key in self._works and self._works[key].origin is link:
            self._forget_work(key)

    def _fail(self, link: Link, request: Header, sentence: str) -> None:
        self.counters.failed += 1
        buffer = self.pool.acquire_text(sentence)
        header = request.derive(Kind.FAILED, target=self.node, payload_nbytes=buffer.nbytes)
        self._post(link, header, buffer)

    def _forget(self, block: int) -> None:
        """Drop a request, whoever made it, and every question about it."""
        self._forget_work(block)
        if (source := self._close(block)) is None:
            return
        for call, share in source.shares.items():
            if share.node == self.node:
                self.calls.sources.pop(call, None)
                self._forget_work(call)
            else:
                self.calls.settle_router(share.node, call)

    def _close(self, block: int) -> SourceWork | None:
        """A DISPATCH is answered, or its answer not wanted any more."""
        if (source := self._sources.pop(block, None)) is not None:
            self._rows.release(*source.outputs)
            if source.payload is not None:
                source.payload.release()
                source.payload = None
        return source

    def _forget_work(self, key: int) -> None:
        work = self._works.pop(key, None)
        if work is not None:
            self._rows.release(work.outputs)
            if (prepared := work.prepared) is not None:
                work.prepared = None  # which may know the work
                prepared.buffer.release()
            for call, share in work.waiting.items():
                self.calls.settle_expert(share.worker, call)

    # ---- sending -------------------------------------------------------------------------------

    def _post(self, link: Link, header: Header, buffer: Buffer) -> None:
        """Post an answer; an origin that is gone will ask again, so a closed link loses nothing."""
        try:
            link.post(header, buffer)
            self.counters.posted(header)
        except LinkClosed:
            self.counters.late += 1
        finally:
            buffer.release()
