"""Messages of one UCX worker: post, poll, and a call when an operation has ended.

A port has two forms of one interface: compiled (`port.c`), and over UCXX's Python API, which needs no compiler and
takes 9 us more for a send and as much for its receive (DECISIONS.md). Memory is given by address, and must stay until
the operation has ended. Only the compiled one carries rows in device memory (`RowsPort`).
"""

import ctypes
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from common.compiled import compiled
from common.transport.carriers import loaded_library
from common.transport.credits import CreditRules

log = logging.getLogger(__name__)

IN_PROGRESS = 1  # ucs_status_t; 0 is success, below 0 an error
CANCELED = -16  # UCS_ERR_CANCELED
NO_RESOURCE = -2  # UCS_ERR_NO_RESOURCE: no room for rows that are handed on
UNREACHABLE = -6  # UCS_ERR_UNREACHABLE: the receiver does not reach them
_MAX_ARRIVALS = 256  # per poll, so that a flood cannot keep completions and timers waiting
# at import: a warm parent then has it for all that it forks
_compiled = compiled(Path(__file__).with_name("port.c"), needs=("libucx",))

Foreign = Any  # an object of UCXX, or a number that the compiled port understands

Ended = Callable[[int], object]  # is told the status
Arrived = Callable[[int, int, Foreign], object]  # tag, bytes, the message for `receive`
AllLanded = Callable[[list[tuple[int, tuple[int, ...]]]], object]  # (sender, fields of Landed) each
Announced = Callable[[int, bytes, int, int], object]  # tag, head, bytes of rows, for `receive_rows`


class Port(Protocol):
    """What a link does with UCX. Statuses: 0 done (`ended` is not called), 1 under way, below 0 failed."""

    @property
    def num_open(self) -> int:
        """Operations that have not ended."""
        ...

    def send(self, to: Foreign, address: int, nbytes: int, tag: int, ended: Ended, /) -> int:
        """Post a send from host memory to an endpoint's `to`; returns a status."""
        ...

    def receive(self, message: Foreign, address: int, nbytes: int, ended: Ended, /) -> int:
        """Receive a message that `poll` told of, all its `nbytes`, into host memory; returns a status."""
        ...

    def poll(self, arrived: Arrived, announced: Announced, landed: AllLanded, /) -> bool:
        """Progress, tell of what arrived and call what ended; True when there was anything.

        Messages of neighbours are told of whole, as bytes; others are to be received. Answers of neighbours whose rows
        have landed are told of together, and are counted already.
        """
        ...

    def arm(self) -> bool:
        """False when there is still something to do, else the worker's descriptor wakes at the next event."""
        ...

    def settle(self) -> None:
        """The worker is gone: call what it ended."""
        ...


class RowsPort(Port, Protocol):
    """A port that also moves rows, which may lie in device memory, and knows neighbours (`common.transport.neighbour`).

    Rows are announced with up to `max_head` bytes. A neighbour's inbox is a file of `inbox_nbytes`.
    """

    max_head: int
    inbox_nbytes: int

    def send_rows(
        self, to: Foreign, tag: int, head: int, head_nbytes: int,
        address: int, nbytes: int, on_device: bool, shared: Foreign,
        landing: int, landing_nbytes: int, landing_shared: Foreign, ended: Ended, /,
    ) -> int:  # fmt: skip
        """Post rows and the `head_nbytes` at address `head`, which may be written to again; returns a status.

        At `landing` the rows of the answer are wanted. `shared` and `landing_shared` are the memory that these are in,
        for a neighbour; None: it cannot reach them.
        """
        ...

    def send_together(
        self, template: bytes, on_device: bool, block: int, shared: Foreign, landings: int,
        landings_shared: Foreign, parts: list[tuple[Any, ...]], calls: list[Any], /,
    ) -> list[int]:  # fmt: skip
        """`send_rows` for many messages that differ little from the header `template`; returns their statuses.

        Rows are in the memory at address `block`, places of answers in that at `landings`. Where `shared` is `poll`'s
        name of rows that a neighbour offers, these are handed on, whole: the receiver reads them there. A part:
        (to, tag, block's number, target, num_rows, num_pairs, credits, answer, place, nbytes, landing's place,
        landing_nbytes, what follows the header).
        """
        ...

    def receive_rows(
        self, data: int, address: int, nbytes: int, on_device: bool, ended: Ended, /
    ) -> int:
        """Receive rows that `poll` told of, all their `nbytes`; returns a status."""
        ...

    def share(self, address: int, nbytes: int, on_device: bool, /) -> Foreign:
        """Let neighbours reach that memory for as long as the object lives; None when UCX refuses."""
        ...

    def reach_rows(self, data: int, /) -> tuple[int, int, int]:
        """Where rows that `poll` told of are for this process, and the landing of their answer and its bytes.

        0 for what is out of reach: rows are then received, and else returned when they have been read.
        """
        ...

    def return_rows(self, data: int, /) -> None:
        """Nobody reads them any more."""
        ...

    def discard_rows(self, data: int, /) -> None:
        """The same rows are not wanted."""
        ...

    def open_inbox(self, file: int, sender: int, /) -> int:
        """A neighbour whose messages come through that file; raises OSError when it cannot be mapped."""
        ...

    def meet(self, neighbour: int, to: Foreign, file: int, counts: "LinkCounts", /) -> int:
        """The neighbour at the endpoint `to`, with its own inbox (-1: out of reach): what to send to from now on.

        From now on an answerer may take its messages, and writes to the link's counts.
        """
        ...

    def part(self, neighbour: int, /) -> None:
        """Its endpoint is closed: what was agreed with it ends as canceled."""
        ...

    def answer_with(self, answerer: object, /) -> None:
        """Let the answerer in that capsule (`answerer.h`) have what neighbours ask, before `poll` tells of it."""
        ...

    def forward_with(self, forwarder: object, /) -> None:
        """Show the forwarder in that capsule (`forwarder.h`) what neighbours ask, before `poll` tells of it."""
        ...


class _Counts:
    """What the compiled port has in C."""


_InPort: Any = _Counts if _compiled is None else _compiled.Counts


class LinkCounts(CreditRules, _InPort):  # type: ignore[misc]
    """Of one link, written to by the port too: credits, and the numbers of messages.

    `tag`: what those of this side begin with. `next`: the message to deliver next; `sent`: the one to be sent next.
    `by_ring`: none has come in another way than through the inbox of a neighbour. `takes_landed`: `poll` may tell of
    answers in short.
    """

    tag: int
    next: int
    sent: int
    by_ring: bool
    takes_landed: bool

    def __init__(self, send_window: int, receive_window: int, *, takes_landed: bool) -> None:
        super().__init__(send_window, receive_window)
        self.tag = self.next = self.sent = 0
        self.by_ring, self.takes_landed = True, takes_landed


def is_compiled() -> bool:
    """Whether ports of this process are the fast ones."""
    return _compiled is not None


def open_port(library: Foreign, context: Foreign, worker: Foreign, tag: int, mask: int) -> Port:
    """A port of a UCXX worker, which finds by probing what has `tag` under `mask` (and more, not `tag` alone)."""
    path = loaded_library("libucp")
    if _compiled is None or path is None:
        return UcxxPort(library, worker, tag, mask)
    _compiled.use_library(str(path))
    port: Port = _compiled.Port(context.handle, worker.handle, tag, mask)
    return port


def peer_of(port: Port, endpoint: Foreign) -> Foreign:
    """What `send` wants of a UCXX endpoint."""
    return endpoint if isinstance(port, UcxxPort) else endpoint.handle


class UcxxPort:
    """A port over UCXX's core API. A request keeps no reference to its memory, and dropping it cancels it."""

    def __init__(self, library: Foreign, worker: Foreign, tag: int, mask: int) -> None:
        from ucxx._lib.arr import Array

        self._array = Array
        self._tag, self._mask = library.UCXXTag, library.UCXXTagMask
        self._worker: Foreign = worker
        self._probe: Foreign = partial(worker.tag_probe, self._tag(tag), self._mask(mask), True)
        self._open: list[tuple[Foreign, Foreign, Ended]] = []  # request, its view of the memory
        self._ended: deque[tuple[int, Ended]] = deque()  # whose calls are still to be made

    @property
    def num_open(self) -> int:
        return len(self._open) + len(self._ended)

    def send(self, to: Foreign, address: int, nbytes: int, tag: int, ended: Ended, /) -> int:
        array = self._view(address, nbytes)
        try:
            request = to.tag_send(array, self._tag(tag))
        except Exception as exc:  # the endpoint has failed, which its callback says too
            log.debug("a send failed: %s", exc)
            return CANCELED
        return self._posted(request, array, ended)

    def receive(self, message: Foreign, address: int, nbytes: int, ended: Ended, /) -> int:
        array = self._view(address, nbytes)
        return self._posted(self._worker.tag_recv_with_handle(array, message), array, ended)

    def _posted(self, request: Foreign, array: Foreign, ended: Ended) -> int:
        status: int = request.status
        if status == IN_PROGRESS:
            self._open.append((request, array, ended))
        return status

    def _view(self, address: int, nbytes: int) -> Foreign:
        return self._array((ctypes.c_char * nbytes).from_address(address))

    def poll(self, arrived: Arrived, announced: Announced, landed: AllLanded, /) -> bool:
        del announced, landed
        self._worker.progress()
        num = 0
        while num < _MAX_ARRIVALS and (probed := self._probe()).matched:
            num += 1
            arrived(probed.sender_tag.value, probed.length, probed)
        left = []
        for entry in self._open:
            status = entry[0].status
            if status == IN_PROGRESS:
                left.append(entry)
            else:
                self._ended.append((status, entry[2]))
        self._open = left
        return self._call_ended() or num > 0

    def _call_ended(self) -> bool:
        """One by one: when a call raises, the rest is for the next time."""
        worked = bool(self._ended)
        while self._ended:
            status, ended = self._ended.popleft()
            ended(status)
        return worked

    def arm(self) -> bool:
        armed: bool = self._worker.arm()
        return armed

    def settle(self) -> None:
        self._worker = self._probe = None  # nobody else may keep the worker, and its descriptors
        self._ended += [(CANCELED, ended) for _, _, ended in self._open]
        self._open.clear()
        self._call_ended()
