"""Views of payload buffers as numbers and rows: where `common.wire.blocks` meets torch. Nothing is copied here
unless the name says so. Offsets are those of the layouts, whether the rows lie in the buffer or in device memory.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from common.errors import WireError
from common.transport.buffers import Buffer
from common.wire.blocks import RowSegment, RowType, check_payload, num_scales, row_segment
from common.wire.header import HEADER_NBYTES

if TYPE_CHECKING:
    from common.transport.device import DeviceRows

TORCH_DTYPES = {
    RowType.FP8: torch.float8_e4m3fn,
    RowType.BF16: torch.bfloat16,
    RowType.FP32: torch.float32,
    RowType.FP64: torch.float64,
}


def numbers(buffer: Buffer, offset: int, count: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """`count` numbers from byte `offset` of the payload on, a view."""
    return np.frombuffer(buffer.view, dtype, count, HEADER_NBYTES + offset - buffer.rows_nbytes)


def int32s(buffer: Buffer, offset: int, count: int) -> list[int]:
    """`count` integers from byte `offset` of the payload on: for a few, where even an array would cost more."""
    start = HEADER_NBYTES + offset - buffer.rows_nbytes
    return buffer.view[start : start + 4 * count].cast("i").tolist()


def put_bytes(buffer: Buffer, offset: int, array: npt.NDArray[Any]) -> None:
    """Copy a contiguous array to byte `offset` of the payload: a tenth of what a view of the payload costs."""
    if array.nbytes == 0:
        return
    start = HEADER_NBYTES + offset - buffer.rows_nbytes
    buffer.view[start : start + array.nbytes] = array.data.cast("B")


def storage_of(buffer: Buffer) -> torch.Tensor:
    """Headroom and payload, uint8, a view that the buffer keeps for the next time."""
    if buffer.tensor is None:
        with torch.inference_mode(mode=False):
            buffer.tensor = torch.from_numpy(buffer.storage)
    storage: torch.Tensor = buffer.tensor
    return storage


def row_bytes(buffer: Buffer) -> torch.Tensor:
    """The memory in which a payload's rows lie, uint8, from byte 0 of the payload on, a view."""
    return torch.from_numpy(buffer.array) if buffer.rows is None else buffer.rows.tensor


def check_rows_apart(what: str, payload: Buffer | None, segment: RowSegment) -> "DeviceRows":
    """The rows of a payload that must have exactly this segment in device memory; raises WireError otherwise."""
    if payload is None or payload.rows is None or payload.rows.nbytes != segment.end:
        apart = 0 if payload is None else payload.rows_nbytes
        raise WireError(f"{what} has {apart} bytes of rows in device memory, not {segment.end}")
    return payload.rows


def byte_rows(buffer: Buffer, segment: RowSegment) -> npt.NDArray[np.uint8]:
    """The rows of a segment as bytes, uint8 [num_rows, width * element size], a view."""
    nbytes = segment.width * int(segment.row_type)
    end = segment.rows_offset + segment.num_rows * nbytes
    return buffer.array[segment.rows_offset : end].reshape(segment.num_rows, nbytes)


def scale_rows(buffer: Buffer, segment: RowSegment) -> npt.NDArray[np.float32]:
    """The scales of an FP8 segment, fp32 [num_rows, ceil(width / 128)], a view."""
    count = num_scales(segment.width)
    flat = numbers(buffer, segment.scales_offset, segment.num_rows * count, np.float32)
    return flat.reshape(segment.num_rows, count)


def rows_of(buffer: Buffer, segment: RowSegment) -> torch.Tensor:
    """The rows of a segment in their own dtype, [num_rows, width], a view."""
    dtype, rows = TORCH_DTYPES[segment.row_type], buffer.rows
    if rows is not None:
        start = rows.offset + segment.rows_offset
        return rows.block.matrix(dtype, start, segment.num_rows, segment.width)
    count = segment.num_rows * segment.width
    if count == 0:
        return torch.empty((segment.num_rows, segment.width), dtype=dtype)
    start = HEADER_NBYTES + segment.rows_offset
    flat = torch.frombuffer(buffer.view, dtype=dtype, count=count, offset=start)
    return flat.view(segment.num_rows, segment.width)


def landing_of(buffer: Buffer, segment: RowSegment) -> torch.Tensor | None:
    """Where the asker wants the rows of the answer, which are this segment, a view; None: anywhere."""
    landing = buffer.landing
    if landing is None or landing.nbytes != segment.end:
        return None
    dtype = TORCH_DTYPES[segment.row_type]
    return landing.block.matrix(dtype, landing.offset, segment.num_rows, segment.width)


def scales_of(buffer: Buffer, segment: RowSegment) -> torch.Tensor:
    """The scales of an FP8 segment, fp32 [num_rows, ceil(width / 128)], a view."""
    count, rows = num_scales(segment.width), buffer.rows
    if rows is None:
        return torch.from_numpy(scale_rows(buffer, segment))
    start = rows.offset + segment.scales_offset
    return rows.block.matrix(torch.float32, start, segment.num_rows, count)


def check_rows(
    payload: Buffer | None, num_rows: int, width: int, row_type: RowType, what: str
) -> tuple[Buffer, RowSegment]:
    """The one row segment that a payload is. Raises WireError when its size is another."""
    segment = row_segment(num_rows, width, row_type)
    declared = 0 if payload is None else payload.nbytes + payload.rows_nbytes
    check_payload(what, declared, segment.end)
    if payload is None:
        raise WireError(f"{what} without payload")
    if payload.rows is not None and payload.nbytes:
        raise WireError(f"{what} has only {payload.rows_nbytes} of {segment.end} bytes as rows")
    return payload, segment


def write_rows(buffer: Buffer, segment: RowSegment, rows: torch.Tensor) -> None:
    """Copy rows [num_rows, width] into a segment, rounding to its row type (not for FP8: that is quantisation)."""
    rows_of(buffer, segment).copy_(rows)


class RowPick:
    """Rows of a segment gathered once, in the order of `index`, to be copied in ranges into several payloads."""

    __slots__ = ("_rows", "_scales")

    def __init__(
        self, source: Buffer, segment: RowSegment, index: npt.NDArray[np.integer[Any]]
    ) -> None:
        self._rows = byte_rows(source, segment).take(index, axis=0)
        self._scales = (
            scale_rows(source, segment).take(index, axis=0)
            if segment.row_type is RowType.FP8
            else None
        )

    def copy_to(self, target: Buffer, into: RowSegment, start: int, stop: int) -> None:
        """Copy picked rows `start` to `stop` into a segment of the same type; for FP8 their scales too."""
        put_bytes(target, into.rows_offset, self._rows[start:stop])
        if self._scales is not None:
            put_bytes(target, into.scales_offset, self._scales[start:stop])
