"""The real services as processes on the cards of this machine: attention and routers on GPU 0, experts on GPU 1.

With more `cards` experts are spread over all but the first, with one card everything is on it. Processes that share a
card need NVIDIA's MPS, which `mps` runs for a benchmark.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

from common.config import (
    AttentionSection,
    ClusterConfig,
    ClusterSection,
    GatewaySection,
    LimitsSection,
    ModelSection,
    Node,
    PlacementSection,
)
from common.ids import ProcessId, Role

# torch would start CUDA in this process to count them, before MPS is there
NUM_CARDS = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
DEVICE = "cuda" if NUM_CARDS else "cpu"  # to try the benchmarks without a GPU
_READY_S = 240.0
Launch = tuple[str, ProcessId, str, list[str]]  # name, the first process in it, module, arguments


def gpu_config(
    model: Path, run_dir: Path, *, experts: int, experts_per_gpu: int = 1, nodes: int = 1,
    routers: int = 1, divide: str = "destinations", microbatches: int = 1, wire: str = "fp8", trace_events: int = 0,
    max_requests: int = 512, max_context: int = 2048, cache_tokens: int = 1 << 18, spin_us: int = -1,
) -> ClusterConfig:  # fmt: skip
    """One attention worker, `experts` expert workers spread over `nodes` virtual nodes of this machine."""
    each = [experts // nodes + (i < experts % nodes) for i in range(nodes)]
    return ClusterConfig(
        model=ModelSection(path=model),
        nodes=tuple(
            Node(attention=int(i == 0), experts=e, routers=routers) for i, e in enumerate(each)
        ),
        cluster=ClusterSection(
            wire=wire, run_dir=run_dir, device=DEVICE, trace_events=trace_events, spin_us=spin_us
        ),
        placement=PlacementSection(experts_per_gpu=experts_per_gpu, routers_divide=divide),
        attention=AttentionSection(
            microbatches=microbatches, max_requests=max_requests, max_context=max_context,
            cache_tokens=cache_tokens,
        ),
        gateway=GatewaySection(port=0),
        limits=LimitsSection(drain_deadline_s=3.0),
    )  # fmt: skip


def card_of(process: ProcessId, cards: int) -> int:
    """Experts in turn on all of the first `cards` but one, where there are two."""
    cards = min(cards, NUM_CARDS)
    return 1 + process.index % (cards - 1) if process.role is Role.EXPERT and cards > 1 else 0


class GpuCluster:
    """The processes of a cluster, from entering to leaving; `without` leaves a role to the caller."""

    def __init__(
        self, config: ClusterConfig, *, without: Role | None = None, cards: int = 2
    ) -> None:
        port = 0
        if without is None:
            port = _free_port()
        self.config = replace(config, gateway=replace(config.gateway, port=port))
        self.url = f"http://127.0.0.1:{port}"
        self._without, self._cards = without, cards
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        run_dir = self.config.cluster.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        secret = self.config.secret_path
        secret.write_text(secrets.token_hex(32))
        secret.chmod(0o600)
        file = run_dir / "cluster.toml"
        file.write_text(self.config.to_toml())
        for name, process, module, arguments in self.launches():
            environ = os.environ | {"OMP_NUM_THREADS": "1"}
            if process.role is not Role.GATEWAY:
                environ["CUDA_VISIBLE_DEVICES"] = str(card_of(process, self._cards))
            command = [sys.executable, "-m", *_profiled(name), module, "--cluster", str(file)]
            with (run_dir / f"{name}.log").open("wb") as log:
                self._processes[name] = subprocess.Popen(
                    [*command, *arguments], env=environ, stdout=log, stderr=log
                )
        if self._without is None:
            try:
                self._wait_ready()
            except BaseException:
                self.stop()
                raise
        return self

    def launches(self) -> Iterator[Launch]:
        """What to start."""
        for spec in self.config.processes():
            role = spec.id.role
            if role is not self._without and (role is not Role.GATEWAY or self._without is None):
                yield str(spec.id), spec.id, f"services.{role}", ["--index", str(spec.id.index)]

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + _READY_S
        while True:
            self.check()
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"{self.url}/ready", timeout=5).status == 200:
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"not ready within {_READY_S:g} s:\n{self.logs()}")
            time.sleep(0.2)

    def check(self) -> None:
        """Raise RuntimeError with the logs when a process has ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise RuntimeError(
                    f"{name} ended with {process.returncode}:\n{self.log_of(name)[-3000:]}"
                )

    def log_of(self, name: str) -> str:
        """What a process has written."""
        return (self.config.cluster.run_dir / f"{name}.log").read_text(errors="replace")

    def logs(self) -> str:
        """The last lines of every process."""
        return "\n".join(
            f"--- {name}\n" + "\n".join(self.log_of(name).splitlines()[-6:])
            for name in self._processes
        )

    def stop(self) -> None:
        """Gateway and attention first, as the launcher does; whoever does not end is killed."""
        order = ("gateway", "attention", "router", "expert")
        for role in order:
            ending = [p for name, p in self._processes.items() if name.startswith(role)]
            for process in ending:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
            for process in ending:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self._processes.clear()


def _profiled(name: str) -> list[str]:
    """A sampling profiler for the processes that ATOLL_PROFILE names, into the directory ATOLL_PROFILE_OUT."""
    if name not in os.environ.get("ATOLL_PROFILE", "").split(","):
        return []
    out = Path(os.environ["ATOLL_PROFILE_OUT"]) / f"{name}.txt"
    return ["tests.bench.sample", str(out)]


def _free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _has_cuda() -> bool:
    """Whether the driver has been started here: it looks for MPS once, and keeps its device open."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) == "/dev/nvidia-uvm":
                return True
    return False


@contextlib.contextmanager
def mps() -> Iterator[None]:
    """NVIDIA's MPS daemon with directories of its own, unless one runs already."""
    if DEVICE == "cpu" or "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="mps-") as directory:
        if _has_cuda():
            raise RuntimeError(
                "CUDA has started in this process, which would not be a client of MPS"
            )
        os.environ["CUDA_MPS_PIPE_DIRECTORY"] = os.environ["CUDA_MPS_LOG_DIRECTORY"] = directory
        subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True)
        try:
            yield
        finally:
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", check=False, timeout=30)
            del os.environ["CUDA_MPS_PIPE_DIRECTORY"], os.environ["CUDA_MPS_LOG_DIRECTORY"]


def as_client_of_mps() -> None:
    """Go on in a process of its own under `mps`, which waits for its clients to end, and exit as that does."""
    if DEVICE == "cuda" and "CUDA_MPS_PIPE_DIRECTORY" not in os.environ:
        with mps():
            sys.exit(subprocess.run(sys.orig_argv, check=False).returncode)
