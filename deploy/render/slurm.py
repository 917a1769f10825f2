"""A cluster as one sbatch script, which carries its cluster TOML: what was submitted runs, whatever is edited later.

Hosts, GPUs and ports come from the allocation (`deploy.slurm.allocation`); what the steps do is `atoll slurm step`, the
supervisor of `atoll up` for one role on one node.
"""

import math
import re
import sys
from pathlib import Path
from string import Template

from common.config import ClusterConfig
from common.errors import ConfigError
from deploy.render import gpus
from deploy.render.description import START_ORDER, describe

_TEMPLATE = Path(__file__).parent / "slurm.sbatch"
_END_OF_TOML = "END_OF_CLUSTER_TOML"
_LAUNCH_S = 10.0  # for Slurm to deliver signals and to end steps


def render(config: ClusterConfig) -> dict[str, str]:
    """Relative path -> text. Raises ConfigError when the cluster's name cannot be a job's, UnrenderableError."""
    gpus.check(config)
    name = config.cluster.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"cluster.name {name!r} cannot be a job's name: letters, digits, . _ -")
    toml = config.to_toml()
    if _END_OF_TOML in toml:
        raise ConfigError(f"{_END_OF_TOML} cannot be part of a cluster TOML in a script")
    num_gpus = _gpus_per_node(config)
    values = {
        "name": name,
        "nodes": str(len(config.nodes)),
        "gpu_lines": f"#SBATCH --gpus-per-node={num_gpus}\n" if num_gpus else "",
        "drain_s": str(drain_s(config)),
        "steps": " ".join(f"'{step}'" for step in _steps(config)),
        "atoll": _quoted(Path(sys.executable).parent / "atoll"),
        "toml": toml,
        "end": _END_OF_TOML,
    }
    return {"atoll.sbatch": Template(_TEMPLATE.read_text()).substitute(values)}


def drain_s(config: ClusterConfig) -> int:
    """Seconds before the time limit at which the job starts to drain: gateway and attention workers, then the rest."""
    return math.ceil(2 * describe(config).stop_deadline_s + _LAUNCH_S)


def _steps(config: ClusterConfig) -> list[str]:
    """What `atoll slurm` is called with, in start order."""
    mps = ["mps"] if config.cluster.device == "cuda" else []
    return [*mps, *(f"step --role {role}" for role in START_ORDER)]


def _gpus_per_node(config: ClusterConfig) -> int:
    """Of the fullest node; where the TOML leaves it open, one for every expert and attention worker."""
    if config.cluster.device != "cuda":
        return 0
    return max(node.gpus or gpus.num_workers(node) for node in config.nodes)


def _quoted(path: Path) -> str:
    """For single quotes of bash. Raises ConfigError for what would end them."""
    if "'" in str(path) or "\n" in str(path):
        raise ConfigError(f"{path}: a path with a quote or newline cannot be in a script")
    return f"'{path}'"
