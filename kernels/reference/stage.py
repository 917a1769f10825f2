"""What passes between steps on buffers that stay where they are and the outside, as `kernels.stage` does it."""

import ctypes

import torch
from torch import Tensor

Picks = tuple[Tensor, int, int]
"""Which rows: `count` numbers int32 from a byte on of memory (uint8), which may be pinned. (memory, byte, count)"""


def picked(picks: Picks) -> Tensor:
    """The numbers, a view."""
    memory, at, count = picks
    return memory[at : at + 4 * count].view(torch.int32)


def stage(
    to_rows: Tensor,
    to_scales: Tensor,
    places: Tensor,
    calls: Tensor,
    count: Tensor,
    out_nbytes: int,
) -> None:
    """See `kernels.stage.stage`."""
    num, *fields = calls[int(count) % calls.shape[0]].tolist()
    row_nbytes, scale_nbytes = to_rows.shape[1] * to_rows.element_size(), 4 * to_scales.shape[1]
    first = 0
    for call in range(num):
        end, rows, scales, out, picks = fields[5 * call : 5 * call + 5]
        for i in range(first, end):
            source = i - first
            if picks:
                source = ctypes.c_int32.from_address(picks + 4 * source).value
            ctypes.memmove(to_rows[i].data_ptr(), rows + source * row_nbytes, row_nbytes)
            ctypes.memmove(to_scales[i].data_ptr(), scales + source * scale_nbytes, scale_nbytes)
            places[1 + i] = out + (i - first) * out_nbytes
        first = end
    places[0] = first


def tell(count: Tensor, told: Tensor) -> None:
    """See `kernels.stage.tell`."""
    told.copy_(count.add_(1))


def add_placed(h: Tensor, place: Tensor, shared: Tensor | None) -> None:
    """See `kernels.stage.add_placed`."""
    (address, n), width = place.tolist(), h.shape[1]
    if n == 0:
        return
    memory = (ctypes.c_char * (n * width * h.element_size())).from_address(address)
    rows = torch.frombuffer(memory, dtype=h.dtype).view(n, width)
    h[:n] += rows if shared is None else rows + shared[:n]


def deliver(staged: Tensor, places: Tensor) -> None:
    """See `kernels.stage.deliver`."""
    n, *addresses = places.tolist()
    for row, address in zip(staged[:n], addresses, strict=False):
        ctypes.memmove(address, row.data_ptr(), row.nbytes)


def publish(
    ids: Tensor, weights: Tensor, to_ids: Tensor, to_weights: Tensor, count: Tensor, told: Tensor
) -> None:
    """Copy ids and weights to host memory, count a step, int64 [1], and then tell the number there, in `told`.

    Whoever reads the number there sees the copies, and what was launched before has written: on every device.
    """
    to_ids.copy_(ids)
    to_weights.copy_(weights)
    told.copy_(count.add_(1))
