"""What a step on the device works on: tensors that stay where they are, so that captured graphs find them again.

A lane has one `LaneState`. `fill` lays a step out in pinned memory and copies it over; each half layer then reads and
writes the state in place. A step of generated tokens only is padded to a bucket with idle rows: they write no cache
slot, look at one entry of the null page, and nobody reads what they compute.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from common.transport.device import DeviceBlock, DeviceRows, release_behind
from common.transport.seam import Seam
from common.wire.blocks import RowSegment, RowType, num_scales, row_segment
from kernels import ops
from services.attention.batch import Span

SPLIT_TOKENS = 4096  # contexts are told to the decode kernel in multiples of what one program takes
BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
IDLE_SLOT = -1


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Prompt rows of a step, sequence after sequence; `rows` None: all of them."""

    rows: Tensor | None  # int64 [prompt rows]
    starts_q: Tensor  # int32 [sequences + 1]
    starts_k: Tensor
    context: Tensor  # int64 [all tokens]: cache slots of every token that the rows may look at
    max_rows: int


class LaneState:
    """Buffers of one lane for steps of up to `max_rows` rows and sequences of up to `max_pages` pages."""

    def __init__(
        self, *, max_rows: int, max_pages: int, width: int, top_k: int, rope: int, page_tokens: int,
        null_page: int, device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.max_rows, self.page_tokens, self.null_page = max_rows, page_tokens, null_page
        self.device = device
        self.buckets = [b for b in BUCKETS if b < max_rows] + [max_rows]
        pinned = device.type == "cuda"

        def on_device(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        def on_host(*shape: int, kind: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=kind, pin_memory=pinned)

        shapes = {
            "token_ids": (max_rows,), "positions": (max_rows,), "slots": (max_rows,),
            "context": (max_rows,), "table": (max_rows, max_pages),
        }  # fmt: skip
        kinds = {"context": torch.int32, "table": torch.int32}
        self._host = {n: on_host(*s, kind=kinds.get(n, torch.int64)) for n, s in shapes.items()}
        self._arrays = {n: t.numpy() for n, t in self._host.items()}
        self._inputs = {n: torch.zeros_like(t, device=device) for n, t in self._host.items()}
        self.h = on_device(max_rows, width)
        self.x = on_device(max_rows, width)  # normed input of the experts
        self.routed = on_device(max_rows, width)
        self.shared = on_device(max_rows, width)
        self.cos = on_device(max_rows, rope // 2, kind=torch.float32)
        self.sin = on_device(max_rows, rope // 2, kind=torch.float32)
        self.width = width
        segment = row_segment(max_rows, width, RowType.FP8)
        self.block = DeviceBlock(
            on_device(segment.end, kind=torch.uint8), _keep
        )  # of the experts' rows
        self.experts = on_host(max_rows, top_k, kind=torch.int32)  # written by the device
        self.weights = on_host(max_rows, top_k, kind=torch.float32)
        self.place = on_host(2, kind=torch.int64)  # of the experts' answer: address, number of rows
        self._place = self.place.numpy().data
        self._kept: DeviceRows | None = None  # the answer that is in
        self._held: DeviceRows | None = None  # the answer whose rows `place` says
        self._count = on_device(1, kind=torch.int64)  # of layers whose rows the device has written
        self._told = on_host(1, kind=torch.int64)  # the same
        self._seen = self._told.numpy().data
        self.num_launched = 0
        self.num_rows = self.bucket = self.max_context = 0
        self.graph_key: tuple[int, ...] | None = None  # equal for equal launches; None: one by one
        self.prompt: PromptPart | None = None
        self.decode_rows: Tensor | None = None  # int64; None: all rows
        self.last_rows: list[int] = []

    def __repr__(self) -> str:
        return f"<LaneState [{self.num_rows} rows in {self.bucket} of {self.max_rows}]>"

    def input(self, name: str) -> Tensor:
        """One of token_ids, positions, slots (int64 [bucket]), context (int32 [bucket]), table (int32)."""
        return self._inputs[name][: self.bucket]

    @property
    def segment(self) -> RowSegment:
        """Where in `block` a bucket's quantised rows and their scales lie."""
        return row_segment(self.bucket, self.width, RowType.FP8)

    @property
    def rows(self) -> Tensor:
        """The experts' rows, e4m3 [bucket, width], a view."""
        return self.block.matrix(torch.float8_e4m3fn, 0, self.bucket, self.width)

    @property
    def scales(self) -> Tensor:
        """Their scales, fp32 [bucket, ceil(width / 128)], a view."""
        start, count = self.segment.scales_offset, num_scales(self.width)
        return self.block.matrix(torch.float32, start, self.bucket, count)

    def outgoing(self) -> DeviceRows:
        """What is sent of them, a reference: no more scales than rows, which lie behind the bucket's."""
        return self.block.rows(0, self._sent_nbytes)

    def publish(self, ids: Tensor, gate_weights: Tensor) -> None:
        """Launch the last of what writes a layer's rows, ids and weights."""
        b = self.bucket
        ops.publish(ids, gate_weights, self.experts[:b], self.weights[:b], self._count, self._told)

    def keep(self, rows: DeviceRows) -> None:
        """An answer is in, whose rows will be read where they are: takes a reference."""
        self._kept = rows.retain()

    def answered(self) -> None:
        """The answer is in, kept or else in `answer`. Its layer was published, so the one before has been read."""
        before, self._held, self._kept = self._held, self._kept, None
        self._place[0] = self.answer.data_ptr() if self._held is None else self._held.address
        self._place[1] = self.num_rows
        if before is not None:
            before.release()

    def let_go(self, seam: Seam) -> None:
        """Of answers that were kept, once the device has done what was launched so far."""
        release_behind(seam, *[one for one in (self._held, self._kept) if one is not None])
        self._held = self._kept = None

    def published(self) -> Callable[[], bool]:
        """Asks whether the device has written those of the layer launched last: a look into memory."""
        wanted, seen = self.num_launched, self._seen
        return lambda: seen[0] >= wanted

    def last_row_index(self) -> Tensor | None:
        """Last row of each span, int64 on the device; None: every row is one."""
        if len(self.last_rows) == self.num_rows:
            return None
        return self._on_device(self.last_rows, torch.int64)

    def _on_device(self, values: Sequence[int] | np.ndarray, dtype: torch.dtype) -> Tensor:
        there = torch.as_tensor(np.asarray(values), dtype=dtype)
        if self.device.type == "cuda":  # from pageable memory the copy would wait for the stream
            there = there.pin_memory()
        return there.to(self.device, non_blocking=True)

    def fill(self, spans: Sequence[Span]) -> None:
        """Lay out a step. Raises ValueError when it has more than `max_rows` rows."""
        self.num_rows = sum(len(span.token_ids) for span in spans)
        if not 0 < self.num_rows <= self.max_rows:
            raise ValueError(
                f"a step of {self.num_rows} rows, this lane takes 1 to {self.max_rows}"
            )
        has_prompt = any(span.start < span.num_prompt for span in spans)
        place = bisect.bisect_left(self.buckets, self.num_rows)
        self.bucket = self.num_rows if has_prompt else self.buckets[place]
        a = self._arrays
        if self.num_rows == len(spans):
            self._lay_out_rows(spans)
        else:
            self._lay_out(spans)
        longest = int(a["context"][: self.num_rows].max())
        idle = slice(self.num_rows, self.bucket)
        for name, value in (
            ("token_ids", 0),
            ("positions", 0),
            ("slots", IDLE_SLOT),
            ("context", 1),
        ):
            a[name][idle] = value
        a["table"][idle, :1] = self.null_page
        self.max_context = -(-longest // SPLIT_TOKENS) * SPLIT_TOKENS
        for name, host in self._host.items():
            self._inputs[name][: self.bucket].copy_(host[: self.bucket], non_blocking=True)
        self.prompt, self.decode_rows = self._parts(spans) if has_prompt else (None, None)
        self.graph_key = None if has_prompt else (id(self), self.bucket, self.max_context)
        # what every layer of the step needs
        n, sent = self.num_rows, row_segment(self.num_rows, self.width, RowType.FP8)
        self._sent_nbytes = sent.end + self.segment.scales_offset - sent.scales_offset
        self.choice = self.experts[:n], self.weights[:n]
        self.answer = self.routed[:n]

    def _lay_out(self, spans: Sequence[Span]) -> None:
        a, first = self._arrays, 0
        self.last_rows = []
        for span in spans:
            count = len(span.token_ids)
            rows = slice(first, first + count)
            end = span.start + count
            positions = np.arange(span.start, end)
            pages = np.asarray(span.pages[: -(-end // self.page_tokens)], np.int32)
            a["token_ids"][rows] = span.token_ids
            a["positions"][rows] = positions
            a["slots"][rows] = _slots(pages, positions, self.page_tokens)
            a["context"][rows] = positions + 1
            a["table"][rows, : len(pages)] = pages
            first += count
            self.last_rows.append(first - 1)

    def _lay_out_rows(self, spans: Sequence[Span]) -> None:
        """The same for spans of one token each, as most steps have hundreds of."""
        a, n, size = self._arrays, len(spans), self.page_tokens
        positions = np.fromiter((span.start for span in spans), np.int64, n)
        num_pages = positions // size + 1
        used = zip(spans, num_pages.tolist(), strict=True)
        pages = np.fromiter(
            chain.from_iterable(span.pages[:num] for span, num in used), np.int32, num_pages.sum()
        )
        ends = num_pages.cumsum()
        columns = np.arange(len(pages)) - (ends - num_pages).repeat(num_pages)
        a["token_ids"][:n] = [span.token_ids[0] for span in spans]
        a["positions"][:n] = positions
        a["slots"][:n] = pages[ends - 1].astype(np.int64) * size + positions % size
        a["context"][:n] = positions + 1
        a["table"][np.arange(n).repeat(num_pages), columns] = pages
        self.last_rows = list(range(n))

    def _parts(self, spans: Sequence[Span]) -> tuple[PromptPart, Tensor | None]:
        prompt_rows: list[int] = []
        starts_q, starts_k = [0], [0]
        context: list[np.ndarray] = []
        first = max_rows = 0
        for span in spans:
            count = len(span.token_ids)
            prompts = max(0, min(span.num_prompt - span.start, count))
            if prompts:
                end = span.start + prompts
                prompt_rows.extend(range(first, first + prompts))
                pages = np.asarray(span.pages, np.int32)
                context.append(_slots(pages, np.arange(end), self.page_tokens))
                starts_q.append(starts_q[-1] + prompts)
                starts_k.append(starts_k[-1] + end)
                max_rows = max(max_rows, prompts)
            first += count

        on_device = self._on_device
        every = len(prompt_rows) == self.num_rows
        part = PromptPart(
            None if every else on_device(prompt_rows, torch.int64), on_device(starts_q, torch.int32),
            on_device(starts_k, torch.int32), on_device(np.concatenate(context), torch.int64), max_rows,
        )  # fmt: skip
        rest = sorted(set(range(self.num_rows)) - set(prompt_rows))
        return part, on_device(rest, torch.int64) if rest else None


def _keep(block: DeviceBlock) -> None:
    """It is a lane's for as long as this process lives."""


def _slots(pages: np.ndarray, positions: np.ndarray, page_tokens: int) -> np.ndarray:
    slots: np.ndarray = pages[positions // page_tokens].astype(np.int64) * page_tokens
    slots += positions % page_tokens
    return slots
