"""Payloads whose rows lie in device memory: pooled blocks, and pieces of them that travel on a tag of their own.

A payload is its row segment and then its tables. In this form the rows are a `DeviceRows` and the buffer holds the
tables, in pinned memory, so that the device can write there. `device` may be the CPU: a process without a GPU that
talks to processes with one, and every test of this form.

Only whoever asks for this form imports torch.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.transport.buffers import Buffer, BufferPool
from common.transport.seam import Fence, Seam

_MIN_NBYTES = 1 << 16
_MOST_VIEWS = 32  # of a block, which the next payload of the same shape finds again


class DeviceBlock:
    """A stretch of device memory owned by reference count (one reference at `take`)."""

    owner: Any = None  # of a `NeighbourBlock`: the link to whose peer the memory belongs
    offer: int = 0  # likewise: the port's name of rows to be returned, 0 of a landing
    __slots__ = (
        "_count",
        "_give_back",
        "_views",
        "address",
        "capacity",
        "on_host",
        "shared",
        "tensor",
    )

    def __init__(self, tensor: torch.Tensor, give_back: Callable[["DeviceBlock"], None]) -> None:
        self.tensor = tensor  # uint8 [capacity]
        self.address = tensor.data_ptr()
        self.capacity = tensor.numel()
        self.on_host = not tensor.is_cuda
        self.shared: Any = None  # with neighbours: the port's, made at the first need
        self._views: dict[tuple[torch.dtype, int, int, int], torch.Tensor] = {}
        self._count = 1
        self._give_back = give_back

    def __repr__(self) -> str:
        return f"<DeviceBlock [{self.capacity} bytes | {self._count} references]>"

    def retain(self) -> "DeviceBlock":
        """Take one more reference."""
        self._count += 1
        return self

    def rows(self, offset: int, nbytes: int) -> "DeviceRows":
        """A piece of the block, with a reference of its own."""
        assert 0 <= offset <= offset + nbytes <= self.capacity, "rows outside their block"
        self._count += 1
        return DeviceRows(self, offset, nbytes)

    def matrix(self, dtype: torch.dtype, offset: int, num_rows: int, width: int) -> torch.Tensor:
        """[num_rows, width] from byte `offset` (a multiple of the element's size) on, a view."""
        key = dtype, offset, num_rows, width
        view = self._views.get(key)
        if view is None:
            typed, start = self.tensor.view(dtype), offset // dtype.itemsize
            assert start + num_rows * width <= typed.numel(), "rows outside their block"
            if len(self._views) == _MOST_VIEWS:
                self._views.clear()
            view = self._views[key] = typed.as_strided((num_rows, width), (width, 1), start)
        return view

    def release(self) -> None:
        """Drop a reference; the last one gives the block back to its pool."""
        assert self._count > 0, "release of a free block"
        self._count -= 1
        if self._count == 0:
            self._give_back(self)


class NeighbourBlock(DeviceBlock):
    """Memory of the process at the other end of the link `owner`, which this device reaches.

    Kernels and copies read it, or write to it where it is a landing; rows are not sent on from there.
    """

    __slots__ = ("offer", "owner")

    def __init__(
        self, link: object, tensor: torch.Tensor, give_back: Callable[[DeviceBlock], None]
    ) -> None:
        super().__init__(tensor, give_back)
        self.owner = link
        self.offer = 0

    def take_again(self) -> bool:
        """With one reference, as it was made. False when somebody holds it."""
        is_free = self._count == 0
        if is_free:
            self._count = 1
        return is_free


class DeviceRows:
    """`nbytes` of a block from byte `offset` on: the row segment of one payload. Each holder releases once.

    `fence` is passed when whatever writes the rows is done: a link posts the header at once and the rows then.
    """

    __slots__ = ("block", "fence", "nbytes", "offset")

    def __init__(self, block: DeviceBlock, offset: int, nbytes: int) -> None:
        self.block = block
        self.offset = offset
        self.nbytes = nbytes
        self.fence: Any = None

    def __repr__(self) -> str:
        return f"<DeviceRows [{self.nbytes} bytes at {self.offset} of {self.block!r}]>"

    @property
    def tensor(self) -> torch.Tensor:
        """The rows as bytes: uint8 [nbytes], a view."""
        return self.block.tensor[self.offset : self.offset + self.nbytes]

    def retain(self) -> "DeviceRows":
        """Take one more reference."""
        self.block._count += 1
        return self

    def release(self) -> None:
        """Drop a reference."""
        self.block.release()

    @property
    def address(self) -> int:
        """Where they begin."""
        return self.block.address + self.offset

    @property
    def on_device(self) -> bool:
        """False where the device is the CPU."""
        return not self.block.on_host


class DevicePool(BufferPool):
    """Buffers whose row segment lies in the memory of `device`. `rows_outstanding` is zero when idle."""

    apart = True

    def __init__(
        self,
        device: str,
        *,
        max_kept_nbytes: int = 256 << 20,
        max_kept_device_nbytes: int = 4 << 30,
    ) -> None:
        super().__init__(max_kept_nbytes=max_kept_nbytes)
        self.device = torch.device(device)
        self.polled = self.device.type != "cpu"
        self.rows_outstanding = 0
        self._max_kept_device_nbytes = max_kept_device_nbytes
        self._kept_device_nbytes = 0
        self._free_blocks: dict[int, list[DeviceBlock]] = {}

    def __repr__(self) -> str:
        return (
            f"<DevicePool {self.device} [{self.outstanding} buffers, {self.rows_outstanding} blocks outstanding"
            f" | {self._kept_device_nbytes} bytes kept]>"
        )

    def acquire(self, nbytes: int, *, rows_nbytes: int = 0) -> Buffer:
        """A buffer whose first `rows_nbytes` lie in device memory."""
        buffer = super().acquire(nbytes - rows_nbytes)
        if rows_nbytes:
            buffer.rows = self.acquire_rows(rows_nbytes)
        return buffer

    def acquire_rows(self, nbytes: int) -> DeviceRows:
        """Device memory for a row segment, with one reference."""
        return DeviceRows(self.take(nbytes), 0, nbytes)

    def acquire_with(self, rows: DeviceRows, tables_nbytes: int = 0) -> Buffer:
        """A buffer for these rows (taking over the caller's reference) and `tables_nbytes` of tables."""
        buffer = super().acquire(tables_nbytes)
        buffer.rows = rows
        return buffer

    def take(self, nbytes: int) -> DeviceBlock:
        """Device memory of at least `nbytes`, with one reference; what it holds is whatever was there before."""
        capacity = max(_MIN_NBYTES, 1 << (nbytes - 1).bit_length())
        free = self._free_blocks.get(capacity)
        self.rows_outstanding += 1
        if free:
            block = free.pop()
            self._kept_device_nbytes -= capacity
            block._count = 1
            return block
        with torch.inference_mode(mode=False):
            tensor = torch.empty(capacity, dtype=torch.uint8, device=self.device)
        return DeviceBlock(tensor, self._take_back_block)

    def adopt(self, tensor: torch.Tensor) -> DeviceRows:
        """Rows that a kernel made: sent from where they lie. `tensor` is contiguous and not written to any more."""
        assert tensor.is_contiguous(), "rows must be contiguous"
        self.rows_outstanding += 1
        flat = tensor.view(-1).view(torch.uint8)
        return DeviceRows(DeviceBlock(flat, self._forget_block), 0, flat.numel())

    def _take_back_block(self, block: DeviceBlock) -> None:
        self.rows_outstanding -= 1
        if self._kept_device_nbytes + block.capacity <= self._max_kept_device_nbytes:
            self._kept_device_nbytes += block.capacity
            self._free_blocks.setdefault(block.capacity, []).append(block)

    def _forget_block(self, block: DeviceBlock) -> None:
        self.rows_outstanding -= 1

    def _storage(self, nbytes: int) -> npt.NDArray[np.uint8]:
        if self.device.type == "cpu":
            return super()._storage(nbytes)
        # the array keeps the tensor, and so the pinned memory, alive
        pinned: npt.NDArray[np.uint8] = torch.empty(
            nbytes, dtype=torch.uint8, pin_memory=True
        ).numpy()
        return pinned


def open_copy(device: torch.device) -> Callable[[int, int, int], object]:
    """A copy (to address, from address, bytes) that the device makes in its turn, on the stream that is current now.

    By the driver: 3.9 us where torch's copy takes 7.9 in a loop (Xeon, 2026-11-25), and views of both sides before it.
    Raises RuntimeError when the driver refuses.
    """
    if device.type == "cpu":
        return ctypes.memmove
    copy = ctypes.CDLL("libcuda.so.1").cuMemcpyAsync
    copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    stream: int = torch.cuda.current_stream(device).cuda_stream

    def call(to: int, source: int, nbytes: int) -> None:
        status = copy(to, source, nbytes, stream)
        if status != 0:
            raise RuntimeError(f"CUDA driver error {status} in a copy of {nbytes} bytes")

    return call


def tensor_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Memory that somebody else owns, as uint8 [nbytes]."""
    with torch.inference_mode(mode=False):
        empty = torch.empty(0, dtype=torch.uint8, device=device)
        storage: Any = torch._C._construct_storage_from_data_pointer(address, empty.device, nbytes)
        return empty.set_(storage)


def open_context(device: str) -> None:
    """Make the device's context: UCX chooses its transports by what is there when it starts."""
    torch.empty(1, device=device)


def open_seam(device: str) -> Seam:
    """The seam of a process that computes on `device`."""
    if torch.device(device).type == "cpu":
        return Seam()
    return Seam(_StreamEvent)


class _StreamEvent:
    """An event of the stream that was current when it was made: asking for the stream costs more than recording."""

    __slots__ = ("query", "record")

    def __init__(self) -> None:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.query: Callable[[], bool] = event.query
        self.record: Callable[[], None] = partial(event.record, torch.cuda.current_stream())


def release_behind(seam: Seam, *held: Buffer | DeviceRows | DeviceBlock) -> Fence:
    """Release when the device has read it: kernels launched so far may still do so, and a receive would not wait."""
    fence = seam.fence()
    for item in held:
        fence.then(item.release)
    return fence
