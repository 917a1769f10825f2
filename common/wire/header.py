"""The fixed binary header of every data message. Pure: bytes in, values out.

Decides what a message says about itself; the layout of payloads is `common.wire.blocks`.

Invariants: 128 bytes, little endian, no optional field. A header that a correct peer would not send raises
`WireError` naming the field; nothing is allocated before `payload_nbytes` was checked against the caller's limit.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from common.errors import WireError

HEADER_NBYTES = 128
MAGIC = 0xA701
VERSION = 5

# magic version kind | wire layer | epoch width | block | trace | num_rows num_pairs | target attempt microbatch
# landed | payload | credits | queue compute combine (us, u32) | rows | answer
_FIELDS = "<HBB BxH II Q Q II HHHBx Q I4x 8x III4x Q I4x"
_LAYOUT = struct.Struct(
    f"{_FIELDS} {HEADER_NBYTES - struct.calcsize(_FIELDS)}x"
)  # padded with zeros
CREDITS_OFFSET = struct.calcsize(
    "<HBB BxH II Q Q II HHHBx Q"
)  # a link fills `credits` in at the last moment


class Kind(IntEnum):
    """What a data message is; the arrow says who sends it to whom."""

    DISPATCH = 1  # attention -> source router: rows, chosen experts, gate weights
    RELAY = 2  # source router -> router of another node: each needed row once, and who wants it
    EXPERT_IN = 3  # router -> expert worker: rows of one block, sorted by expert
    EXPERT_OUT = 4  # expert -> router: as many rows back, in the same order
    PARTIAL = 5  # router of another node -> source router: one pre-reduced row per row of the RELAY
    COMBINED = 6  # source router -> attention: one row per row of the DISPATCH
    CREDIT = 7  # no payload: returns credits when nothing else travels that way
    FAILED = 8  # answer to any request that cannot be answered; payload is a UTF-8 sentence
    EXPERT_PICK = (
        9  # router -> expert worker: EXPERT_IN of rows that are still where the router found them
    )


class Wire(IntEnum):
    """Element type of rows on the dispatch hop (`--wire`)."""

    FP8 = 1
    BF16 = 2
    FP32 = 3

    @classmethod
    def parse(cls, name: str) -> "Wire":
        """`fp8`, `bf16` or `fp32`; raises ValueError for another name."""
        try:
            return cls[name.upper()]
        except KeyError:
            raise ValueError(f"wire must be fp8, bf16 or fp32, not {name!r}") from None


REQUESTS = frozenset({Kind.DISPATCH, Kind.RELAY, Kind.EXPERT_IN, Kind.EXPERT_PICK})
ANSWERS = frozenset({Kind.EXPERT_OUT, Kind.PARTIAL, Kind.COMBINED, Kind.FAILED})
_KINDS = {int(kind): kind for kind in Kind}
_WIRES = {int(wire): wire for wire in Wire}


@dataclass(slots=True)
class Header:
    """One data message's header. Sizes are counts of rows or bytes, times are microseconds.

    `block` identifies a block of rows of one attention worker, layer and micro-batch for its whole life (worker index
    in the top 16 bits, a counter below): it is the key of re-sends and of de-duplication. `target` is a worker index
    (EXPERT_IN/PICK/OUT) or a node id (RELAY/PARTIAL). `attempt` counts re-sends. `credits`, `rows_nbytes`, `answer` and
    `landed` are filled by the link: how many leading bytes of the payload travel apart (device memory), the number of
    the place where the asker wants the rows of the answer (0: anywhere), and 1 in an answer whose rows are there.
    """

    kind: Kind
    wire: Wire = Wire.FP8
    layer: int = 0
    epoch: int = 0
    width: int = 0
    block: int = 0
    trace: int = 0
    num_rows: int = 0
    num_pairs: int = 0
    target: int = 0
    attempt: int = 0
    microbatch: int = 0
    payload_nbytes: int = 0
    credits: int = 0
    queue_us: int = 0
    compute_us: int = 0
    combine_us: int = 0
    rows_nbytes: int = 0
    answer: int = 0
    landed: int = 0

    def derive(
        self, kind: Kind, *, target: int, num_rows: int = 0, num_pairs: int = 0, payload_nbytes: int
    ) -> "Header":
        """A header about the same block: the next hop of a request, or the answer to it."""
        return Header(
            kind, self.wire, self.layer, self.epoch, self.width, self.block, self.trace,
            num_rows, num_pairs, target, self.attempt, self.microbatch, payload_nbytes,
            answer=self.answer,
        )  # fmt: skip

    def template(self, kind: Kind) -> bytes:
        """The 128 bytes that headers of `kind` about the same block have in common: see `derive`."""
        return _LAYOUT.pack(
            MAGIC, VERSION, kind, self.wire, self.layer, self.epoch, self.width, self.block, self.trace,
            0, 0, 0, self.attempt, self.microbatch, 0, 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip

    def pack_into(self, buffer: bytearray | memoryview, offset: int = 0) -> None:
        """Write the 128 bytes at `offset`. Raises WireError when a value does not fit its field."""
        try:
            _LAYOUT.pack_into(
                buffer, offset, MAGIC, VERSION, self.kind, self.wire, self.layer, self.epoch,
                self.width, self.block, self.trace, self.num_rows, self.num_pairs, self.target,
                self.attempt, self.microbatch, self.landed, self.payload_nbytes, self.credits,
                self.queue_us, self.compute_us, self.combine_us, self.rows_nbytes, self.answer,
            )  # fmt: skip
        except struct.error as exc:
            raise WireError(f"header field out of range in {self}: {exc}") from exc

    @classmethod
    def unpack_from(
        cls, buffer: bytes | bytearray | memoryview, offset: int = 0, *, max_payload_nbytes: int
    ) -> "Header":
        """Parse and check 128 bytes. Raises WireError naming the field that is wrong."""
        if len(buffer) - offset < HEADER_NBYTES:
            raise WireError(
                f"message of {len(buffer) - offset} bytes, a header has {HEADER_NBYTES}"
            )
        (magic, version, kind, wire, layer, epoch, width, block, trace, num_rows, num_pairs,
         target, attempt, microbatch, landed, payload_nbytes, credits, queue_us, compute_us, combine_us,
         rows_nbytes, answer) = _LAYOUT.unpack_from(buffer, offset)  # fmt: skip
        if magic != MAGIC:
            raise WireError(f"magic {magic:#06x}, expected {MAGIC:#06x}")
        if version != VERSION:
            raise WireError(f"wire version {version}, this process speaks {VERSION}")
        if payload_nbytes > max_payload_nbytes:
            raise WireError(f"payload of {payload_nbytes} bytes, the limit is {max_payload_nbytes}")
        if rows_nbytes > payload_nbytes:
            raise WireError(f"{rows_nbytes} bytes of rows in a payload of {payload_nbytes}")
        known_kind, known_wire = (
            _KINDS.get(kind),
            _WIRES.get(wire),
        )  # a third of what Kind(kind) costs
        if known_kind is None:
            raise WireError(f"kind {kind} is not one of {[int(k) for k in Kind]}")
        if known_wire is None:
            raise WireError(f"wire {wire} is not one of {[int(w) for w in Wire]}")
        return cls(known_kind, known_wire, layer, epoch, width, block, trace, num_rows, num_pairs,
                   target, attempt, microbatch, payload_nbytes, credits,
                   queue_us, compute_us, combine_us, rows_nbytes, answer, landed)  # fmt: skip


class Landed(NamedTuple):
    """What counts of an answer's header whose rows are where the asker wants them, and which has nothing else."""

    kind: int
    layer: int
    block: int
    payload_nbytes: int
    queue_us: int
    compute_us: int
    combine_us: int
    answer: int
