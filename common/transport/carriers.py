"""Which transports UCX really chose for an endpoint ("tcp/eth0", "cuda_ipc/cuda"), and what they should be.

ucxx does not say, so UCX's own `ucp_ep_query` is asked (ucp.h, UCP_EP_ATTR_FIELD_TRANSPORTS; since UCX 1.13) in the
library that this process has loaded already: 3 to 6 us, only when a link opens or somebody reads /cluster.
"""

import ctypes
import functools
from collections.abc import Collection, Iterable
from enum import StrEnum
from pathlib import Path

_TRANSPORTS = 1 << 3  # UCP_EP_ATTR_FIELD_TRANSPORTS
_MAX_CARRIERS = 32  # UCX itself has at most 16 (UCP_MAX_LANES)
_RDMA_PREFIXES = ("rc", "dc", "ud", "ib", "gga", "srd")
_SHM = ("posix", "sysv", "cma", "knem", "xpmem")


class LinkClass(StrEnum):
    """What carries the bytes of a link, fastest last."""

    SELF = "self"
    TCP = "tcp"
    SHM = "shm"
    RDMA = "rdma"
    CUDA_IPC = "cuda_ipc"


class _Entry(ctypes.Structure):
    _fields_ = (("transport", ctypes.c_char_p), ("device", ctypes.c_char_p))


class _Transports(ctypes.Structure):
    _fields_ = (
        ("entries", ctypes.POINTER(_Entry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
    )


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_sockaddr", ctypes.c_char * 128),
        ("remote_sockaddr", ctypes.c_char * 128),
        ("transports", _Transports),
        ("user_data", ctypes.c_void_p),
    )


def loaded_library(name: str, maps: Path = Path("/proc/self/maps")) -> Path | None:
    """The file of a shared library of this process (`libucp`, `libuct_ib`), None while it is not loaded."""
    for line in maps.read_text().splitlines():
        path = line.partition("/")[2]
        if path.rpartition("/")[2].startswith(f"{name}.so"):
            return Path("/" + path)
    return None


@functools.cache
def _library() -> ctypes.CDLL | None:
    path = loaded_library("libucp")
    library = None if path is None else ctypes.CDLL(str(path))  # the loaded one, not a second copy
    return library if hasattr(library, "ucp_ep_query") else None


def carriers_of(endpoint_handle: int) -> tuple[str, ...]:
    """What carries an endpoint, as "transport/device", sorted; empty when this UCX does not tell."""
    library = _library()
    if library is None or not endpoint_handle:
        return ()
    entries = (_Entry * _MAX_CARRIERS)()
    attributes = _Attributes(field_mask=_TRANSPORTS)
    attributes.transports = _Transports(entries, _MAX_CARRIERS, ctypes.sizeof(_Entry))
    status = library.ucp_ep_query(ctypes.c_void_p(endpoint_handle), ctypes.byref(attributes))
    if status != 0:
        return ()
    found = entries[: min(attributes.transports.num_entries, _MAX_CARRIERS)]
    return tuple(sorted({f"{e.transport.decode()}/{e.device.decode()}" for e in found}))


def classes_of(carriers: Iterable[str]) -> set[LinkClass]:
    """The link classes among carriers; a transport of no class (cuda_copy, which only stages) gives none."""
    found = {_class_of(carrier.partition("/")[0]) for carrier in carriers}
    return {link_class for link_class in found if link_class is not None}


def _class_of(transport: str) -> LinkClass | None:
    if transport in _SHM:
        return LinkClass.SHM
    if transport.startswith(_RDMA_PREFIXES):
        return LinkClass.RDMA
    return LinkClass(transport) if transport in list(LinkClass) else None


def expected_class(*, same_host: bool, device: str, has_rdma: bool) -> LinkClass:
    """What a data link should use: NVLink or PCIe between cards of a host, the NIC's RDMA between hosts that have it.

    On one host without cards it is TCP by decision (DECISIONS.md).
    """
    if same_host:
        return LinkClass.CUDA_IPC if device == "cuda" else LinkClass.TCP
    return LinkClass.RDMA if has_rdma else LinkClass.TCP


def complaint(carriers: Collection[str], expected: LinkClass) -> str:
    """Why these carriers are not what they should be; empty when they are, or when UCX does not tell."""
    found = classes_of(carriers)
    if not carriers or expected in found:
        return ""
    if expected is LinkClass.TCP and found - {LinkClass.SELF}:
        return ""  # something faster
    return f"it uses {', '.join(carriers)}, expected is {expected}"


def has_rdma_devices(root: Path = Path("/sys/class/infiniband")) -> bool:
    """True when this host has a NIC that the kernel's RDMA stack knows and that has a port in use."""
    return any("ACTIVE" in path.read_text() for path in root.glob("*/ports/*/state"))
