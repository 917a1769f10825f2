"""Reads driver, cards, peer access, MPS and GPUDirect for the doctor, through NVML: no CUDA context is made."""

import ctypes
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from deploy.doctor import facts

_DMABUF_SUPPORTED = 124  # CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED, cuda.h
_DMABUF_KERNEL = (5, 12)
# GB/s each way of one NVLink, by its version (NVML counts 1-based)
_NVLINK_GB_PER_S = {1: 20.0, 2: 25.0, 3: 25.0, 4: 25.0, 5: 50.0}
_PCIE_GB_PER_S = {3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}  # of one lane each way
_PEER_WORDS = {
    0: "ok",
    1: "the chipset does not support it",
    2: "the GPU does not support it",
    3: "the topology does not support it",
    4: "disabled in the registry",
    5: "not supported",
}


def nvidia(mps_dir: Path, nvml: Any = None) -> facts.Nvidia:  # noqa: ANN401  -- pynvml, or a test's
    """Everything; without a driver an empty record that says why."""
    if nvml is None:
        import pynvml

        nvml = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as exc:
        return facts.Nvidia(problem=str(exc))
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        version = nvml.nvmlSystemGetCudaDriverVersion()
        return facts.Nvidia(
            driver=str(nvml.nvmlSystemGetDriverVersion()),
            cuda=f"{version // 1000}.{version % 1000 // 10}",
            gpus=tuple(_gpu(nvml, i, handle) for i, handle in enumerate(handles)),
            pairs=tuple(
                _pair(nvml, i, handles[i], j, handles[j])
                for i in range(len(handles))
                for j in range(i + 1, len(handles))
            ),
            has_peermem=_has_module("nvidia_peermem") or _has_module("nv_peer_mem"),
            has_dmabuf=bool(handles) and _has_dmabuf(),
            mps_control=shutil.which("nvidia-cuda-mps-control") or "",
            mps_is_running=_mps_is_running(mps_dir),
        )
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int, handle: Any) -> facts.Gpu:  # noqa: ANN401
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    pci = nvml.nvmlDeviceGetPciInfo(handle)
    device = Path(
        f"/sys/bus/pci/devices/{pci.domain & 0xFFFF:04x}:{pci.bus:02x}:{pci.device:02x}.0"
    )

    def told(question: Callable[..., Any], *arguments: object, unknown: Any = 0) -> Any:  # noqa: ANN401
        """An answer that not every card or driver gives."""
        try:
            return question(handle, *arguments)
        except nvml.NVMLError:
            return unknown

    clock_mhz = told(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_MEM)
    width_bits = told(nvml.nvmlDeviceGetMemoryBusWidth)
    lane = _PCIE_GB_PER_S.get(told(nvml.nvmlDeviceGetMaxPcieLinkGeneration), 0.0)
    numa = device / "numa_node"
    return facts.Gpu(
        index=index,
        name=str(nvml.nvmlDeviceGetName(handle)),
        capability=".".join(map(str, nvml.nvmlDeviceGetCudaComputeCapability(handle))),
        total_nbytes=int(memory.total),
        used_nbytes=int(memory.used),
        pci_path=str(device.resolve()) if device.exists() else "",
        numa_node=int(numa.read_text()) if numa.exists() else -1,
        is_exclusive=told(nvml.nvmlDeviceGetComputeMode) == nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS,
        memory_gb_per_s=2 * clock_mhz * width_bits / 8 / 1e3,  # double data rate
        pcie_gb_per_s=lane * told(nvml.nvmlDeviceGetMaxPcieLinkWidth),
    )


def _pair(nvml: Any, i: int, first: Any, j: int, second: Any) -> facts.GpuPair:  # noqa: ANN401
    try:
        status = nvml.nvmlDeviceGetP2PStatus(first, second, nvml.NVML_P2P_CAPS_INDEX_READ)
        by_nvlink = nvml.nvmlDeviceGetP2PStatus(first, second, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == 0
    except nvml.NVMLError as exc:
        return facts.GpuPair(i, j, str(exc))
    words = _PEER_WORDS.get(status, f"NVML says {status}")
    return facts.GpuPair(i, j, words, _nvlink_gb_per_s(nvml, first) if by_nvlink else 0.0)


def _nvlink_gb_per_s(nvml: Any, handle: Any) -> float:  # noqa: ANN401
    total = 0.0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        with suppress(nvml.NVMLError):
            if nvml.nvmlDeviceGetNvLinkState(handle, link):
                version = nvml.nvmlDeviceGetNvLinkVersion(handle, link)
                total += _NVLINK_GB_PER_S.get(version, _NVLINK_GB_PER_S[5])
    return total


def _has_module(name: str, sys_dir: Path = Path("/sys")) -> bool:
    return (sys_dir / "module" / name).is_dir()


def _has_dmabuf() -> bool:
    """Whether the driver exports GPU memory as a dmabuf, and the kernel's RDMA stack takes it."""
    release = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    device, value = ctypes.c_int(), ctypes.c_int()
    asked = (
        cuda.cuInit(0) == 0
        and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
        and cuda.cuDeviceGetAttribute(ctypes.byref(value), _DMABUF_SUPPORTED, device) == 0
    )
    return asked and value.value == 1 and release >= _DMABUF_KERNEL


def _mps_is_running(mps_dir: Path, proc: Path = Path("/proc")) -> bool:
    """A control daemon and the pipe on which this cluster's processes would look for it."""
    given = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    if not any((directory / "control").exists() for directory in (mps_dir, Path(given))):
        return False
    for comm in proc.glob("[0-9]*/comm"):
        with suppress(OSError):
            if comm.read_text().startswith("nvidia-cuda-mps"):
                return True
    return False
