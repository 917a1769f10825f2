"""How far a card is from a NIC, in the words of `nvidia-smi topo`. Pure.

A PCI device's path in sysfs (`/sys/devices/pci0000:80/0000:80:01.0/0000:81:00.0/...`) lists the bridges between it and
its host bridge: what two paths have in common is what their traffic need not leave.
"""

from enum import IntEnum


class Distance(IntEnum):
    """Nearest first. GPUDirect RDMA is fast up to PXB; from PHB on traffic passes the CPU."""

    PIX = 0  # behind the same switch port or bridge
    PXB = 1  # several bridges, no host bridge
    PHB = 2  # the host bridge of a CPU
    NODE = 3  # between host bridges of one NUMA node
    SYS = 4  # between NUMA nodes


def distance(first: str, second: str, *, same_numa: bool) -> Distance | None:
    """Between two devices, None when one of the paths is unknown."""
    left, right = _bridges(first), _bridges(second)
    if not left or not right:
        return None
    if left[0] != right[0]:
        return Distance.NODE if same_numa else Distance.SYS
    common = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        common += 1
    if common == 1:
        return Distance.PHB
    # what lies between the last common bridge and the two devices
    between = len(left) + len(right) - 2 * common
    return Distance.PIX if between <= 4 else Distance.PXB


def _bridges(path: str) -> list[str]:
    """From the host bridge to the device: `pci0000:80`, `0000:80:01.0`, ..."""
    parts = path.strip("/").split("/")
    start = next((i for i, part in enumerate(parts) if part.startswith("pci")), None)
    if start is None:
        return []
    return [parts[start], *(p for p in parts[start + 1 :] if p.count(":") == 2 and "." in p)]
