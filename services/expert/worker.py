"""The expert service: dials the routers of its node, computes what comes, answers. It keeps nothing between calls.

Blocks that arrive while one is computed wait in the batcher and are computed together, by layer: one turn of the event
loop takes one batch, so that messages go on being received between batches. A device that idles gets the first at once.
"""

import asyncio
import logging
import os
import time
from functools import partial
from typing import Any

import torch

from common.config import ClusterConfig
from common.errors import AtollError, LinkClosed, WireError
from common.ids import Role
from common.obs.trace import open_recorder
from common.status import ProcessStatus, State, status_frame
from common.tensors import TORCH_DTYPES, write_rows
from common.transport.base import Hello, Link, Transport
from common.transport.buffers import Buffer
from common.transport.device import DevicePool, DeviceRows
from common.transport.dial import keep_connected
from common.transport.factory import open_transport
from common.waiting import poll_until
from common.wire.blocks import EXPERT_OUT_ROWS, RowSegment, row_segment
from common.wire.header import Header, Kind
from services.expert.batcher import Batcher, Waiting
from services.expert.device_bank import load_bank, read_one
from services.expert.engine import compute, parse
from services.expert.holdings import Holdings

MAX_BATCHES = 2  # launched at a time: the device goes on without waiting, later blocks gather in the batcher meanwhile
Call = Waiting[tuple[Link, Header, Buffer]]
_ASKED = (Kind.EXPERT_IN, Kind.EXPERT_PICK)
log = logging.getLogger(__name__)


class ExpertWorker:
    """One expert process. Implements `common.service.Service` and `common.transport.base.Handler`."""

    def __init__(
        self, config: ClusterConfig, index: int, transport: Transport | None = None
    ) -> None:
        self.config = config
        self.spec = config.process(Role.EXPERT, index)
        self.transport = transport or open_transport(config)
        self.state = State.STARTING
        self.trace = open_recorder(config, self.spec)
        self.counters = {
            "calls": 0,
            "rows": 0,
            "batches": 0,
            "queue_us": 0,
            "compute_us": 0,
            "failed": 0,
        }
        self.batcher: Batcher[tuple[Link, Header, Buffer]] = Batcher(0)  # of the bank's size
        self._scheduled = False
        self._in_flight = 0  # batches that the device computes
        self._ended_ns = 0  # of the last one that it has computed

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Load the resident experts, then keep dialling the routers of its node."""
        self.bank = load_bank(self.config, self.spec.id.index)
        self.batcher.max_rows = self.bank.max_batch_rows
        self.loop = asyncio.get_running_loop()
        self.desk = self.bank.open_desk(self._answered)
        if self.desk is not None:
            self.transport.answer_with(self.desk.answerer)
            log.info("small questions of neighbours are answered without Python")
        routers = self.config.routers_of(self.spec.node)
        self.holdings = Holdings(self.bank, partial(read_one, self.config), len(routers))
        tasks.create_task(self.holdings.run(), name="holdings")
        for router in routers:
            tasks.create_task(
                keep_connected(self.transport, router.address, self._hello, self),
                name=f"link to {router.id}",
            )
        self.state = State.READY

    async def drain(self) -> None:
        """Answer what waits."""
        self.state = State.DRAINING
        await poll_until(lambda: self._is_idle)

    @property
    def _is_idle(self) -> bool:
        """Nothing waits or is computed."""
        desk_waits = self.desk is not None and self.desk.num_waiting
        return not (len(self.batcher) or self._in_flight or desk_waits)

    async def stop(self) -> None:
        """Close the links."""
        await self.transport.close()
        if self.trace is not None:
            self.trace.write()

    def _hello(self) -> Hello:
        facts = {
            "experts": [
                [layer, expert, digest] for (layer, expert), digest in self.bank.hashes.items()
            ]
        }
        return Hello(
            self.spec.id, self.spec.node, os.getpid(), self.bank.model_hash,
            self.config.cluster.epoch, self.config.cluster.wire, facts=facts,
        )  # fmt: skip

    # ---- links ---------------------------------------------------------------------------------

    def on_open(self, link: Link) -> None:
        """The router verified our hashes, or it will close the link."""
        log.info("connected to %s", link.peer.process)

    def on_close(self, link: Link, error: LinkClosed) -> None:
        """Whoever asked will ask again on the next link."""
        log.warning("%s", error)

    def on_control(self, link: Link, message: dict[str, Any]) -> None:
        """Answer status requests; hold what routers ask for."""
        if message.get("type") == "hold":
            self.holdings.want(link, message["id"], message["experts"])
        elif message.get("type") == "status_request":
            rows = {f"{layer}:{expert}": n for (layer, expert), n in self.bank.rows.items()}
            status = ProcessStatus.of(
                self.spec.id, node=self.spec.node, pid=os.getpid(), state=self.state,
                counters={**self.counters, "waiting": len(self.batcher), "rows_by_expert": rows},
            )  # fmt: skip
            link.send_control(status_frame(message.get("id"), [status.to_json()]))

    # ---- calls ---------------------------------------------------------------------------------

    def on_message(self, link: Link, header: Header, payload: Buffer | None) -> None:
        """Queue a question; the batch is computed after everything that has arrived by now was queued too."""
        if header.kind not in _ASKED or payload is None:
            if payload is not None:
                payload.release()
            raise WireError(f"{header.kind.name} sent to an expert")
        self.batcher.add(
            header.layer, Waiting(header.num_rows, time.monotonic_ns(), (link, header, payload))
        )
        self._schedule()

    def _schedule(self) -> None:
        if not self.batcher or self._scheduled or self._in_flight >= MAX_BATCHES:
            return
        self._scheduled = True
        if self._in_flight == 0 and self.transport.pool.polled:  # a device that idles need not wait
            self._run()
        else:
            self.loop.call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        layer, batch = self.batcher.next_batch()
        started = time.monotonic_ns()
        calls, parsed = [], []
        for call in batch:
            link, header, payload = call.item
            try:
                parsed.append(parse(header, payload, self.bank))
                calls.append(call)
            except AtollError as exc:
                self._fail(link, header, str(exc))
        if not calls:
            self._done(batch)
            return
        self._in_flight += 1
        written = None
        try:
            outputs = compute(self.bank, layer, parsed)
            written = self.bank.written()
        except Exception as exc:  # whatever it was, the routers wait for an answer
            log.exception("layer %d could not be computed", layer)
            refuse = partial(self._fail_all, calls, f"{self.spec.id}: {exc}")
            self.transport.seam.fence().then(refuse)  # what was launched may write into landings
            calls, outputs = [], []
        fence = self.transport.seam.fence(written)
        if fence.passed:
            self._computed(batch, calls, outputs, started)
        else:
            fence.then(partial(self._computed, batch, calls, outputs, started))
        self._schedule()

    def _computed(
        self, batch: list[Call], calls: list[Call], outputs: list[torch.Tensor], started_ns: int
    ) -> None:
        """The device has computed a batch: answer, and give the rows that came back to their pool."""
        self._in_flight -= 1
        if calls:
            self._answer_all(calls, outputs, started_ns)
        self._done(batch)

    def _done(self, batch: list[Call]) -> None:
        for call in batch:
            call.item[2].release()
        self._schedule()

    def _answer_all(self, calls: list[Call], outputs: list[torch.Tensor], started_ns: int) -> None:
        ended_ns = time.monotonic_ns()
        started_ns = max(started_ns, self._ended_ns)  # what was launched early has waited till then
        self._ended_ns = ended_ns
        compute_us = (ended_ns - started_ns) // 1000
        for call, rows in zip(calls, outputs, strict=True):
            link, header, payload = call.item
            if self.trace is not None:
                place = header.trace, header.layer, header.microbatch
                self.trace.span("queue", *place, call.since_ns, started_ns, len(calls))
                self.trace.span("compute", *place, started_ns, ended_ns, len(calls))
            queue_us = (started_ns - call.since_ns) // 1000
            self._answer(link, header, payload, rows, queue_us, compute_us)
        self.counters["batches"] += 1
        self.counters["compute_us"] += compute_us

    def _answered(
        self, layer: int, expert: int, num_rows: int, trace: int, microbatch: int, since_ns: int, ended_ns: int,
    ) -> None:  # fmt: skip
        """The desk has answered a question, which it computed at once."""
        self._ended_ns = ended_ns
        if (layer, expert) in self.bank:  # else it was given up meanwhile
            self.bank.rows[layer, expert] += num_rows
        self.counters["calls"] += 1
        self.counters["rows"] += num_rows
        self.counters["batches"] += 1
        self.counters["compute_us"] += (ended_ns - since_ns) // 1000
        if self.trace is not None:
            place = trace, layer, microbatch
            self.trace.span("queue", *place, since_ns, since_ns, 1)
            self.trace.span("compute", *place, since_ns, ended_ns, 1)

    def _answer(
        self, link: Link, request: Header, asked: Buffer, rows: torch.Tensor, queue_us: int, compute_us: int
    ) -> None:  # fmt: skip
        self.counters["calls"] += 1
        self.counters["rows"] += request.num_rows
        self.counters["queue_us"] += queue_us
        segment = row_segment(request.num_rows, request.width, EXPERT_OUT_ROWS[request.wire])
        header = request.derive(
            Kind.EXPERT_OUT,
            target=request.target,
            num_rows=request.num_rows,
            payload_nbytes=segment.end,
        )
        header.queue_us, header.compute_us = queue_us, compute_us
        landing = asked.landing
        if landing is not None and rows.data_ptr() != landing.address:
            landing = None  # they are elsewhere
        if landing is None or not link.post_landed(header, landing):
            self._post(link, header, self._buffer(segment, rows, landing))

    def _buffer(
        self, segment: RowSegment, rows: torch.Tensor, landing: DeviceRows | None
    ) -> Buffer:
        """A payload of computed rows: in device memory they are sent from where they lie, if their type is right."""
        pool = self.transport.pool
        if not isinstance(pool, DevicePool):
            buffer = pool.acquire(segment.end)
            write_rows(buffer, segment, rows)
            return buffer
        if landing is not None:
            return pool.acquire_with(landing.retain())
        if (
            rows.dtype is TORCH_DTYPES[segment.row_type]
            and rows.is_contiguous()
            and rows.nbytes == segment.end
        ):
            return pool.acquire_with(pool.adopt(rows))
        buffer = pool.acquire(segment.end, rows_nbytes=segment.end)
        write_rows(buffer, segment, rows)
        assert buffer.rows is not None, "rows in device memory"
        buffer.rows.fence = self.transport.seam.fence()
        return buffer

    def _fail_all(self, calls: list[Call], sentence: str) -> None:
        for call in calls:
            self._fail(call.item[0], call.item[1], sentence)

    def _fail(self, link: Link, request: Header, sentence: str) -> None:
        self.counters["failed"] += 1
        buffer = self.transport.pool.acquire_text(sentence)
        header = request.derive(Kind.FAILED, target=request.target, payload_nbytes=buffer.nbytes)
        self._post(link, header, buffer)

    def _post(self, link: Link, header: Header, buffer: Buffer) -> None:
        try:
            link.post(header, buffer)
        except LinkClosed:
            pass  # the router asks again on the next link
        finally:
            buffer.release()
