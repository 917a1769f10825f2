"""What a gate adds to its scores before it chooses: the checkpoint's bias, and what balancing adds to that."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class GateBias:
    """`tensor` fp32 [experts] is what the gate of a layer reads; None: nothing."""

    def __init__(self, own: Tensor | None) -> None:
        """`own` is the checkpoint's, if it has one."""
        self._own = self.tensor = own

    def open(self, num_experts: int, device: str) -> None:
        """To be called before the first step of a gate that shall be balanced: `tensor` stays the same memory then."""
        self.tensor = torch.zeros(num_experts, device=device)
        self.adjust(np.zeros(num_experts))

    def adjust(self, by: npt.NDArray[np.float64]) -> None:
        """From the next launch on, the checkpoint's bias plus `by` [experts]; in place, so captured graphs see it."""
        assert self.tensor is not None, "a gate that was not opened"
        there = torch.from_numpy(by.astype(np.float32))
        if self.tensor.is_cuda:  # from pageable memory the copy would wait for the stream
            there = there.pin_memory().to(self.tensor.device, non_blocking=True)
        self.tensor.copy_(there if self._own is None else self._own + there)
