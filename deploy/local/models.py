"""Which checkpoint `atoll up` serves, and how many expert workers it needs.

The default model is `deploy/demo/model` where it is there, else a small random one, made at first use in the cache
directory. Random models are made in a process of their own: the launcher itself stays free of torch.
"""

import os
import subprocess
import sys
from pathlib import Path

from common.errors import ConfigError, Fatal, ModelError
from common.model.hf_config import read_json
from common.model.presets import preset_config, write_random_source

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"
DEFAULT_EXPERTS = 16
DEMO_NAME = "atoll-demo"  # its directory is called model
MAX_RANDOM_EXPERTS = 1024
_FORMAT = 2  # part of the cache's name: raised when the writer makes other bytes
_ROOT = Path(__file__).parents[2]
_MAKE = """
import sys
from pathlib import Path
from common.model.small import write_small_model
write_small_model(Path(sys.argv[1]), num_experts=int(sys.argv[2]))
"""


def choose(
    model: Path | None, *, ep: int | None, experts_per_gpu: int | None
) -> tuple[Path, int, int]:
    """(checkpoint, number of expert workers, experts per worker). Raises ConfigError, ModelError."""
    for name, value in (("ep", ep), ("experts-per-gpu", experts_per_gpu)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, not {value}")
    if model is not None:
        model = model.absolute()
        return (model, *split(num_experts(model), ep=ep, experts_per_gpu=experts_per_gpu))
    demo = DEMO_MODEL if (DEMO_MODEL / "config.json").exists() else None
    default = num_experts(demo) if demo is not None else DEFAULT_EXPERTS
    each = experts_per_gpu or 1
    if ep is None or ep == -(-default // each):
        return demo or random_model(default), -(-default // each), each
    return random_model(ep * each), ep, each


def split(experts: int, *, ep: int | None, experts_per_gpu: int | None) -> tuple[int, int]:
    """(workers, experts per worker) for a layer of `experts`. Raises ConfigError when the two numbers do not fit."""
    each = experts_per_gpu or (1 if ep is None else -(-experts // ep))
    workers = -(-experts // each)
    if ep is not None and ep != workers:
        raise ConfigError(
            f"--ep {ep} does not fit: {experts} experts at {each} per GPU need {workers} expert workers"
        )
    return workers, each


def num_experts(directory: Path) -> int:
    """Experts of a layer. Raises ModelError when there is no such directory or its config.json does not say."""
    path = directory / "config.json"
    if not directory.is_dir():
        raise ModelError(f"model {directory}: no such directory")
    count = read_json(path).get("n_routed_experts")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ModelError(f"{path}: n_routed_experts must be a whole number above 0, not {count!r}")
    return count


def random_model(experts: int) -> Path:
    """A small model with that many experts per layer; the same bytes on every machine."""
    if experts > MAX_RANDOM_EXPERTS:
        raise ConfigError(f"a random model has at most {MAX_RANDOM_EXPERTS} experts, not {experts}")
    directory = _cache() / f"random-v{_FORMAT}-e{experts}"
    if (directory / "config.json").exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", _MAKE, str(directory), str(experts)]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    made = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path})
    if made.returncode != 0:
        raise Fatal(f"the model with {experts} experts could not be made in {directory}")
    return directory


def preset(name: str, layers: int | None, distinct_experts: int | None) -> Path:
    """A preset's directory, whose weights are made where they are read. Raises ConfigError."""
    distinct = 8 if distinct_experts is None else distinct_experts
    if distinct < 1:
        raise ConfigError(f"--distinct-experts must be at least 1, not {distinct}")
    config = preset_config(name, layers=0 if layers is None else layers)
    directory = _cache() / f"{name}-l{config['num_hidden_layers']}-d{distinct}"
    return write_random_source(directory, config, distinct_experts=distinct)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "atoll"
