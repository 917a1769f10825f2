"""What can be known to fail before anything is started: a port in use, a model larger than the memory, no such host."""

import errno
import math
import socket
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.config import LOCAL, ClusterConfig
from common.errors import ConfigError, ModelError
from common.model.hf_config import load_config
from common.plan_file import cluster_plan

WORKER_NBYTES = (
    12 << 20
)  # own memory of a forked worker without weights (measured: 8 MB, and some for links)
_CPU_ITEMSIZE = 4  # bytes of a weight on CPU, whatever the file stores
_LOOPBACK = (LOCAL, "localhost", "127.0.0.1", "::1")


def check(config: ClusterConfig) -> None:
    """Raises ConfigError or ModelError with one sentence."""
    for i, node in enumerate(config.nodes):
        if node.host not in _LOOPBACK:
            raise ConfigError(
                f"atoll up starts every process on this host, but nodes[{i}] is on {node.host} "
                f"(--local runs it here all the same)"
            )
    if config.gateway.port:
        check_port(config.gateway.host, config.gateway.port)
    key_file = config.gateway.api_key_file
    if key_file is not None and not key_file.is_file():
        raise ConfigError(f"API key file {key_file}: no such file")
    if not config.model.path.is_dir():
        raise ModelError(f"model {config.model.path}: no such directory")
    if config.placement.plan is not None:
        cluster_plan(config, load_config(config.model.path))
    if config.cluster.device == "cpu":
        check_memory(config, available_nbytes())


def check_port(host: str, port: int) -> None:
    """Raises ConfigError when nothing can listen there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen()
    except OSError as exc:
        reason = "it is in use" if exc.errno == errno.EADDRINUSE else exc.strerror
        raise ConfigError(f"cannot listen on port {port} of {host}: {reason}") from exc


def check_memory(config: ClusterConfig, available: int) -> None:
    """Raises ModelError when the weights of all workers together do not fit in `available` bytes."""
    expert, other = checkpoint_elements(config.model.path)
    attention = sum(node.attention for node in config.nodes)
    needed = (expert + attention * other) * _CPU_ITEMSIZE
    needed += len(config.processes()) * WORKER_NBYTES
    if needed > available:
        raise ModelError(
            f"{config.model.path} needs {needed / 2**30:.1f} GiB of memory for {config.num_expert_workers} "
            f"expert and {attention} attention workers, this machine has {available / 2**30:.1f} GiB available"
        )


def available_nbytes() -> int:
    """Memory that can be used without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 1 << 62


def checkpoint_elements(directory: Path) -> tuple[int, int]:
    """Elements of the routed experts and of everything else, from the files' headers. Raises ModelError."""
    expert = other = 0
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  -- no mapping
                    size = math.prod(tensors.get_slice(name).get_shape())
                    if ".mlp.experts." in name:
                        expert += size
                    else:
                        other += size
        except (OSError, SafetensorError) as exc:
            raise ModelError(f"{file}: truncated or not a safetensors file: {exc}") from exc
    return expert, other
