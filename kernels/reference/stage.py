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
    rows: Tensor, scales: Tensor, out: Tensor, to_rows: Tensor, to_scales: Tensor, places: Tensor,
    first: int = 0, picks: Picks | None = None,
) -> None:  # fmt: skip
    """See `kernels.stage.stage`."""
    if picks is not None:
        chosen = picked(picks).to(rows.device).long()
        rows, scales = rows.view(torch.uint8)[chosen], scales[chosen]
    end = first + rows.shape[0]
    to_rows[first:end].view(torch.uint8).copy_(rows.view(torch.uint8))
    to_scales[first:end].copy_(scales)
    places[0] = end
    out_nbytes = out.shape[1] * out.element_size()
    places[1 + first : 1 + end] = out.data_ptr() + torch.arange(len(rows)) * out_nbytes


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
