"""What a block's rows are gathered by, and their answers summed by: tables in one piece of memory. Pure arithmetic.

    index int32 [num_places] | pieces int64 [num_pieces, 4] | slots int32 [num_rows, most] | weights fp32, as slots

each from a multiple of 256 bytes on, so that a device gets all with one copy. A *place* is a position in the order in
which rows are sent; a *piece*, places one behind the other, is the rows of one message. Pieces lie in one block.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.wire.blocks import RowType, row_segment

Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
ALIGN = 256  # of tables and of pieces, so that copies are as wide as they can be


Piece = tuple[int, int, int, int]
"""The rows of places `start` to `stop`, from byte `place` of the block on, `nbytes` long."""


@dataclass(slots=True)
class Tables:
    """`ats` are the bytes of `memory` where index, pieces, slots and weights begin.

    Without `weighted` all weights are one and not there; without answers `shape`, that of slots, is (0, 0). A place of
    `slots[i]` holds an answer to row i, in the order of the sum; -1 beyond its last.
    """

    memory: bytearray
    ats: tuple[int, int, int, int]
    num_places: int
    shape: tuple[int, int]
    weighted: bool
    pieces: list[Piece]
    nbytes: int  # of the block

    @property
    def index(self) -> Int32s:
        """Which row is at each place, [num_places], a view."""
        return np.frombuffer(self.memory, np.int32, self.num_places, self.ats[0])

    @property
    def slots(self) -> Int32s:
        """A view."""
        flat = np.frombuffer(self.memory, np.int32, self.shape[0] * self.shape[1], self.ats[2])
        return flat.reshape(self.shape)

    @property
    def weights(self) -> Floats | None:
        """A view."""
        if not self.weighted:
            return None
        flat = np.frombuffer(self.memory, np.float32, self.shape[0] * self.shape[1], self.ats[3])
        return flat.reshape(self.shape)


def tables_of(
    index: npt.NDArray[Any], spans: Iterable[tuple[int, int]], width: int, row_type: RowType,
    slots: Int32s | None = None, weights: Floats | None = None,
) -> Tables:  # fmt: skip
    """`index` [num_places], divided into messages at `spans` (first place, end), of rows of `width`."""
    pieces, rows, end = [], [], 0
    for start, stop in spans:
        segment = row_segment(stop - start, width, row_type)
        pieces.append((start, stop, end, segment.end))
        rows.append((start, stop - start, end, end + segment.scales_offset))
        end += -(-segment.end // ALIGN) * ALIGN
    table = np.array(rows, np.int64)
    ats, size = [], 0
    arrays: list[npt.NDArray[Any] | None] = [index.astype(np.int32), table, slots, weights]
    for array in arrays:
        ats.append(size)
        size += 0 if array is None else -(-array.nbytes // ALIGN) * ALIGN
    memory = bytearray(size)
    whole = np.frombuffer(memory, np.uint8)
    for array, at in zip(arrays, ats, strict=True):
        if array is not None and array.nbytes:
            whole[at : at + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()
    a, b, c, d = ats
    shape = (0, 0) if slots is None else (slots.shape[0], slots.shape[1])
    return Tables(memory, (a, b, c, d), len(index), shape, weights is not None, pieces, end)
