"""Reads a host for the doctor: software, limits, ports, clock, secret, network devices. Thin: it decides nothing.

Roots of /sys and /proc are arguments, so that a test can show it another machine.
"""

import ctypes
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from common.transport.port import is_compiled
from deploy.doctor import facts

PACKAGES = ("atoll", "torch", "ucxx-cu13", "libucx-cu13", "numpy", "aiohttp", "uvloop")
_TORCH = """
import json, sys
import torch
sees = torch.cuda.is_available()
print(json.dumps({"cuda": torch.version.cuda or "", "sees": sees}))
"""
_CHILD_S = 60.0
_STA_UNSYNC = 0x40  # linux/timex.h
_UNIT = Path("/etc/systemd/system/atoll-expert@.service")
INSTALLED_TOML = Path("/etc/atoll/cluster.toml")


def software() -> facts.Software:
    """Versions; torch in a process of its own, which may fail in any way."""
    packages = {name: software_version(name) for name in PACKAGES}
    python = platform.python_version()
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _TORCH],
            capture_output=True,
            text=True,
            timeout=_CHILD_S,
            check=True,
        )
        told = json.loads(asked.stdout)
    except subprocess.CalledProcessError as exc:
        last = exc.stderr.strip().splitlines()[-1:] or [f"exit code {exc.returncode}"]
        return facts.Software(python, packages, torch_problem=last[0])
    except (subprocess.TimeoutExpired, ValueError) as exc:
        return facts.Software(python, packages, torch_problem=f"{exc}")
    return facts.Software(
        python, packages, told["cuda"], bool(told["sees"]), compiles=is_compiled()
    )


def software_version(name: str) -> str:
    """Of an installed package, "" without it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def limits(unit: Path = _UNIT) -> facts.Limits:
    """Those of the installed service, which has its own, else of this process."""
    if unit.is_file():
        asked = subprocess.run(
            ["systemctl", "show", "atoll-expert@0", "--property=LimitNOFILE,LimitMEMLOCK"],
            capture_output=True,
            text=True,
            check=False,
        )
        told = dict(line.split("=", 1) for line in asked.stdout.splitlines() if "=" in line)
        if "LimitNOFILE" in told:
            files, locked = (_limit(told[f"Limit{name}"]) for name in ("NOFILE", "MEMLOCK"))
            return facts.Limits(files, files, locked, "atoll's units")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return facts.Limits(soft, hard, locked, "this shell")


def _limit(text: str) -> int:
    return -1 if text == "infinity" else int(text)


def ports(wanted: tuple[tuple[int, str], ...]) -> tuple[facts.Port, ...]:
    """Each is tried; the holder of a taken one is found where /proc may be read."""
    found = []
    for port, process in wanted:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("0.0.0.0", port))
                sock.listen()
                found.append(facts.Port(port, process, is_free=True))
            except OSError as exc:
                taken = exc.errno == errno.EADDRINUSE
                holder = _holder(port) if taken else ""
                problem = "" if taken else str(exc.strerror)
                found.append(facts.Port(port, process, False, holder, problem))
    return tuple(found)


def _holder(port: int) -> str:
    """Command line of the process that listens there, "" when it is somebody else's."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not os.path.exists(table):
            continue
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir()):
                return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:  # not ours, or gone
            continue
    return ""


def ephemeral_ports(proc: Path = Path("/proc")) -> tuple[int, int]:
    """First and last port that the kernel gives to outgoing connections and that are not reserved."""
    low, high = (proc / "sys/net/ipv4/ip_local_port_range").read_text().split()
    return int(low), int(high)


class _Timex(ctypes.Structure):
    """The start of `struct timex` (adjtimex(2)); the kernel writes 208 bytes."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def clock() -> facts.Clock:
    """What the kernel knows of its own clock."""
    timex = _Timex()
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex)) < 0:
        return facts.Clock(None)
    return facts.Clock(not timex.status & _STA_UNSYNC, timex.maxerror / 1e6)


def secret(path: Path | None, salt: str) -> facts.Secret | None:
    """Mode and length; the digest is salted, so that it tells secrets apart for one run only."""
    if path is None:
        return None
    try:
        mode = path.stat().st_mode & 0o7777
        content = path.read_bytes().strip()
    except OSError as exc:
        return facts.Secret(str(path), problem=str(exc.strerror))
    digest = hashlib.blake2b(content, key=salt.encode(), digest_size=8).hexdigest()
    return facts.Secret(str(path), mode, len(content), digest)


def installed_toml(path: Path = INSTALLED_TOML) -> str:
    """Digest of the cluster TOML that the units read, "" without one."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def nics(sys_dir: Path = Path("/sys")) -> tuple[facts.Nic, ...]:
    """Network devices that are up (without loopback), with their RDMA ports; then RDMA ports of no such device."""
    rdma = {port.rdma: port for port in _rdma_ports(sys_dir)}
    found = []
    for path in sorted((sys_dir / "class/net").glob("*")):
        if path.name == "lo" or _read(path / "operstate") not in ("up", "unknown"):
            continue
        device = path / "device"
        names = sorted(p.name for p in (device / "infiniband").glob("*"))
        own = [port for name in names for port in rdma if port.startswith(f"{name}:")]
        speed = _number(_read(path / "speed")) / 8e3  # Mbit/s
        for port in own:
            nic = rdma.pop(port)
            found.append(
                facts.Nic(path.name, port, nic.is_active, nic.gb_per_s, nic.pci_path, nic.numa_node)
            )
        if not own:
            place = _pci_path(device)
            numa = int(_number(_read(device / "numa_node")) if place else -1)
            found.append(facts.Nic(path.name, "", True, max(0.0, speed), place, numa))
    return (*found, *rdma.values())


def _rdma_ports(sys_dir: Path) -> list[facts.Nic]:
    found = []
    for path in sorted((sys_dir / "class/infiniband").glob("*/ports/*")):
        device = path.parents[1]
        found.append(
            facts.Nic(
                name=device.name,
                rdma=f"{device.name}:{path.name}",
                is_active="ACTIVE" in _read(path / "state"),
                gb_per_s=_number(_read(path / "rate").partition(" ")[0])
                / 8,  # "400 Gb/sec (4X NDR)"
                pci_path=_pci_path(device / "device"),
                numa_node=int(_number(_read(device / "device/numa_node") or "-1")),
            )
        )
    return found


def _pci_path(device: Path) -> str:
    """Its place in sysfs, "" for a virtual device."""
    real = str(device.resolve())
    return real if device.exists() and "/pci" in real else ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # some files of a device that is down cannot be read
        return ""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def memory_gb_per_s() -> float:
    """numpy copying 32 MiB: the best of five."""
    source, target = np.ones(32 << 20, np.uint8), np.zeros(32 << 20, np.uint8)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        target[:] = source
        times.append(time.perf_counter() - started)
    return source.nbytes / min(times) / 1e9
