"""What tests and benchmarks do to a device that services never do between messages."""

import torch


def synchronise(device: torch.device | str) -> None:
    """Wait for everything launched."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
