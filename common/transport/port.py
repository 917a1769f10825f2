"""Tag messages of one UCX worker: post, poll, and a call when an operation has ended.

A port has two forms of one interface: compiled (`port.c`), and over UCXX's Python API, which needs no compiler and
takes 9 us more for a send and as much for its receive (DECISIONS.md). Memory is given by address, and must stay until
the operation has ended.
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

log = logging.getLogger(__name__)

IN_PROGRESS = 1  # ucs_status_t; 0 is success, below 0 an error
CANCELED = -16  # UCS_ERR_CANCELED
_MAX_ARRIVALS = 256  # per poll, so that a flood cannot keep completions and timers waiting
# at import: a warm parent then has it for all that it forks
_compiled = compiled(Path(__file__).with_name("port.c"), needs=("libucx",))
_EVERY_BIT = (1 << 64) - 1

Foreign = Any  # an object of UCXX, or a number that the compiled port understands

Ended = Callable[[int], object]  # is told the status
Arrived = Callable[[int, int, Foreign], object]  # tag, bytes, the message for `receive`


class Port(Protocol):
    """What a link does with UCX. Statuses: 0 done (`ended` is not called), 1 under way, below 0 failed."""

    @property
    def num_open(self) -> int:
        """Operations that have not ended."""
        ...

    def send(
        self, to: Foreign, address: int, nbytes: int, on_device: bool, tag: int, ended: Ended, /
    ) -> int:
        """Post a send to an endpoint's `to`; returns a status."""
        ...

    def receive(self, message: Foreign, address: int, nbytes: int, ended: Ended, /) -> int:
        """Receive a message that `poll` told of, all its `nbytes`, into host memory; returns a status."""
        ...

    def expect(
        self, tag: int, address: int, nbytes: int, on_device: bool, ended: Ended, /
    ) -> tuple[int, Foreign]:
        """Post a receive of exactly `nbytes`; returns a status and what `cancel` wants. Only the tag says of whom."""
        ...

    def cancel(self, operation: Foreign, /) -> None:
        """End an `expect` that is under way: `ended` is called soon, with an error unless it was too late."""
        ...

    def poll(self, arrived: Arrived, /) -> bool:
        """Progress, tell of what arrived and call what ended; True when there was anything."""
        ...

    def arm(self) -> bool:
        """False when there is still something to do, else the worker's descriptor wakes at the next event."""
        ...

    def settle(self) -> None:
        """The worker is gone: call what it ended."""
        ...


def is_compiled() -> bool:
    """Whether ports of this process are the fast ones."""
    return _compiled is not None


def open_port(library: Foreign, worker: Foreign, tag: int, mask: int) -> Port:
    """A port of a UCXX worker, which finds by probing what has `tag` under `mask`."""
    path = loaded_library("libucp")
    if _compiled is None or path is None:
        return UcxxPort(library, worker, tag, mask)
    _compiled.use_library(str(path))
    port: Port = _compiled.Port(worker.handle, tag, mask)
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

    def send(
        self, to: Foreign, address: int, nbytes: int, on_device: bool, tag: int, ended: Ended, /
    ) -> int:
        array = self._view(address, nbytes, on_device)
        try:
            request = to.tag_send(array, self._tag(tag))
        except Exception as exc:  # the endpoint has failed, which its callback says too
            log.debug("a send failed: %s", exc)
            return CANCELED
        return self._posted(request, array, ended)[0]

    def receive(self, message: Foreign, address: int, nbytes: int, ended: Ended, /) -> int:
        array = self._view(address, nbytes, False)
        return self._posted(self._worker.tag_recv_with_handle(array, message), array, ended)[0]

    def expect(
        self, tag: int, address: int, nbytes: int, on_device: bool, ended: Ended, /
    ) -> tuple[int, Foreign]:
        array = self._view(address, nbytes, on_device)
        request = self._worker.tag_recv(array, self._tag(tag), self._mask(_EVERY_BIT))
        return self._posted(request, array, ended)

    def _posted(self, request: Foreign, array: Foreign, ended: Ended) -> tuple[int, Foreign]:
        status: int = request.status
        if status == IN_PROGRESS:
            self._open.append((request, array, ended))
        return status, request

    def _view(self, address: int, nbytes: int, on_device: bool) -> Foreign:
        if on_device:
            return self._array(_DeviceMemory(address, nbytes))
        return self._array((ctypes.c_char * nbytes).from_address(address))

    def cancel(self, operation: Foreign, /) -> None:
        for index, (request, _, ended) in enumerate(self._open):
            if request is operation:
                del self._open[index]
                self._ended.append((CANCELED, ended))
                return

    def poll(self, arrived: Arrived, /) -> bool:
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


class _DeviceMemory:
    """Memory of a GPU as UCXX takes it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip
