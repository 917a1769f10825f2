"""Pooled payload buffers with reference counts: who holds the last reference gives the memory back.

A buffer has `HEADER_NBYTES` of headroom before its payload, so that header and payload of a host message leave as one
contiguous message without a copy. Sizes are rounded up to powers of two; the pool keeps what comes back, up to a bound.

A payload is a row segment and then tables (`common.wire.blocks`). Here both lie in the one host buffer; where rows live
in device memory (`common.transport.device`) they are `Buffer.rows`, and the buffer holds the tables alone.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.errors import WireError
from common.wire.header import HEADER_NBYTES

if TYPE_CHECKING:
    from common.transport.device import DeviceRows

_MIN_NBYTES = 1024


class Buffer:
    """`nbytes` of payload in host memory, owned by reference count (one reference at `acquire`).

    `rows` are the leading bytes of the payload where these lie in device memory, else None.
    `landing` is where the asker wants the rows of the answer to this message, where that can be reached: valid while
    the buffer is held, for an answer over the same link.
    `headroom_busy` is True while a send reads the headroom: another send of the same payload must not write there.
    `address` is where the headroom begins.
    """

    __slots__ = (
        "_count",
        "_give_back",
        "address",
        "capacity",
        "headroom_busy",
        "landing",
        "nbytes",
        "on_free",
        "rows",
        "storage",
        "tensor",
        "view",
    )

    def __init__(
        self, storage: npt.NDArray[np.uint8], give_back: Callable[["Buffer"], None]
    ) -> None:
        self.storage = storage  # headroom, then capacity for the payload
        self.tensor: Any = None  # the same as torch sees it: see `common.tensors.storage_of`
        self.view = storage.data  # ten times cheaper to slice and to pack into than the array
        self.address: int = storage.ctypes.data
        self.capacity = storage.nbytes - HEADER_NBYTES
        self.nbytes = 0
        self.rows: DeviceRows | None = None
        self.landing: DeviceRows | None = None
        self.on_free: Callable[[], None] | None = None  # set by a link that must return a credit
        self.headroom_busy = False
        self._count = 0
        self._give_back = give_back

    def __repr__(self) -> str:
        return f"<Buffer [{self.nbytes} bytes | {self._count} references]>"

    @property
    def rows_nbytes(self) -> int:
        """Bytes of the payload that lie apart, before those in this buffer."""
        return 0 if self.rows is None else self.rows.nbytes

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """The payload without `rows`, uint8 [nbytes], a view."""
        return self.storage[HEADER_NBYTES : HEADER_NBYTES + self.nbytes]

    @property
    def message(self) -> npt.NDArray[np.uint8]:
        """Headroom and payload together, uint8 [HEADER_NBYTES + nbytes], a view."""
        return self.storage[: HEADER_NBYTES + self.nbytes]

    def retain(self) -> "Buffer":
        """Take one more reference."""
        assert self._count > 0, "retain of a free buffer"
        self._count += 1
        return self

    def release(self) -> None:
        """Drop a reference; the last one gives the buffer back to its pool."""
        assert self._count > 0, "release of a free buffer"
        self._count -= 1
        if self._count == 0:
            on_free, self.on_free = self.on_free, None
            rows, self.rows = self.rows, None
            landing, self.landing = self.landing, None
            if rows is not None:
                rows.release()
            if landing is not None:
                landing.release()
            self._give_back(self)
            if on_free is not None:
                on_free()


class BufferPool:
    """Buffers by power-of-two capacity. `outstanding` counts those not given back: zero when idle."""

    apart = False  # True: rows lie in a memory of their own, `Buffer.rows`
    polled = False  # True: transfers of these buffers end without waking anybody (device memory)
    hands_on = True  # False: somebody could not read a neighbour's rows that were handed on

    def __init__(self, *, max_kept_nbytes: int = 256 << 20) -> None:
        self.outstanding = 0
        self._max_kept_nbytes = max_kept_nbytes
        self._kept_nbytes = 0
        self._free: dict[int, list[Buffer]] = {}

    def __repr__(self) -> str:
        return f"<BufferPool [{self.outstanding} outstanding | {self._kept_nbytes} bytes kept]>"

    def acquire(self, nbytes: int, *, rows_nbytes: int = 0) -> Buffer:
        """A buffer for `nbytes` of payload, with one reference; its content is whatever was there before.

        `rows_nbytes` of them, the first, are rows: a pool of device memory puts those there.
        """
        del rows_nbytes
        # the headroom comes on top, else a payload of exactly a power of two would take twice its size
        capacity = _MIN_NBYTES if nbytes <= _MIN_NBYTES else 1 << (nbytes - 1).bit_length()
        free = self._free.get(capacity)
        if free:
            buffer = free.pop()
            self._kept_nbytes -= capacity
        else:
            buffer = Buffer(self._storage(HEADER_NBYTES + capacity), self._take_back)
        buffer.nbytes = nbytes
        buffer._count = 1
        self.outstanding += 1
        return buffer

    def acquire_rows(self, nbytes: int) -> "DeviceRows":
        """Device memory for rows that come apart. Raises WireError here: this process takes whole payloads."""
        raise WireError(f"{nbytes} bytes of rows apart, to a process without device buffers")

    def acquire_text(self, sentence: str) -> Buffer:
        """A buffer that holds a sentence in UTF-8 (the payload of FAILED), cut at 4096 bytes."""
        text = np.frombuffer(sentence.encode()[:4096], np.uint8)
        buffer = self.acquire(len(text))
        buffer.array[:] = text
        return buffer

    def _storage(self, nbytes: int) -> npt.NDArray[np.uint8]:
        return np.empty(nbytes, np.uint8)

    def _take_back(self, buffer: Buffer) -> None:
        self.outstanding -= 1
        capacity = buffer.capacity
        if self._kept_nbytes + capacity <= self._max_kept_nbytes:
            self._kept_nbytes += capacity
            free = self._free.get(capacity)
            if free is None:
                self._free[capacity] = [buffer]
            else:
                free.append(buffer)
