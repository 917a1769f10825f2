"""Plans on disk, and the plan that a cluster TOML means for a model: its plan file's, else one column per worker.

A rebalance puts another plan in force than the TOML's. Each router keeps that one, and what else it still serves, in a
file of the run directory, so that restarted processes of its host come up with it. The file names the plan of the TOML
that it started from: with another TOML, plan or epoch it is nobody's.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from common.config import ClusterConfig
from common.errors import ConfigError
from common.ids import ProcessId, Role
from common.model.hf_config import ModelConfig
from common.placement.plan import Place, Plan, check_plan, column_plan


def cluster_plan(config: ClusterConfig, model: ModelConfig) -> Plan:
    """Every process computes the same plan from the same files. Its epoch is the TOML's, whatever the file's was.

    Raises ConfigError when the expert workers cannot hold every expert, or the plan file is for another cluster.
    """
    nodes = tuple(spec.node for spec in config.of_role(Role.EXPERT))
    epoch, per_gpu = config.cluster.epoch, config.placement.experts_per_gpu
    if config.placement.plan is None:
        return column_plan(
            epoch=epoch,
            moe_layers=model.moe_layers,
            num_experts=model.num_experts,
            experts_per_gpu=per_gpu,
            nodes=nodes,
        )
    plan = read_plan(config.placement.plan)
    try:
        check_plan(
            plan,
            moe_layers=model.moe_layers,
            num_experts=model.num_experts,
            nodes=nodes,
            experts_per_gpu=per_gpu,
        )
    except ConfigError as exc:
        raise ConfigError(f"plan {config.placement.plan}: {exc}") from exc
    return Plan(epoch, plan.holders, plan.nodes)


def read_plan(path: Path) -> Plan:
    """Raises ConfigError naming the file when it cannot be read or is no plan."""
    try:
        return Plan.from_json(json.loads(path.read_bytes()))
    except OSError as exc:
        raise ConfigError(f"plan {path}: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"plan {path}: not JSON: {exc}") from exc
    except ConfigError as exc:
        raise ConfigError(f"plan {path}: {exc}") from exc


def write_plan(path: Path, plan: Plan) -> None:
    """Replace the file at once, so that no reader sees half of it. Raises ConfigError when it cannot be written."""
    _replace(path, plan.to_json(), "plan")


def _replace(path: Path, document: dict[str, Any], what: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(orjson.dumps(document) + b"\n")
        partial.replace(path)
    except OSError as exc:
        raise ConfigError(f"{what} {path}: {exc.strerror}") from exc


@dataclass(frozen=True, slots=True)
class Placement:
    """The plans that a router serves, ascending; `epoch` is the one in force."""

    epoch: int
    plans: tuple[Plan, ...]


def placement_path(config: ClusterConfig, router: ProcessId) -> Path:
    """Where a router keeps its placement."""
    return config.cluster.run_dir / f"{router}.placement"


def read_placement(path: Path, base: Plan) -> Placement | None:
    """What a router left; None when it left nothing for the TOML's plan `base`, or the file is damaged."""
    try:
        document = orjson.loads(path.read_bytes())
        if document["base"] != [base.epoch, base.digest]:
            return None
        plans = tuple(Plan.from_json(plan) for plan in document["plans"])
        if document["epoch"] not in {plan.epoch for plan in plans}:
            return None
        return Placement(int(document["epoch"]), plans)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, ConfigError):
        return None


def write_placement(path: Path, base: Plan, epoch: int, plans: Sequence[Plan]) -> None:
    """Replace the file at once. Raises ConfigError when it cannot be written."""
    document = {
        "base": [base.epoch, base.digest],
        "epoch": epoch,
        "plans": [plan.to_json() for plan in plans],
    }
    _replace(path, document, "placement")


def first_residents(config: ClusterConfig, model: ModelConfig, worker: int) -> list[Place]:
    """What an expert worker loads when it starts, ascending: what its node's router last served, else the TOML's."""
    base = cluster_plan(config, model)
    router = config.routers_of(base.nodes[worker])[0].id
    placement = read_placement(placement_path(config, router), base)
    plans = (base,) if placement is None else placement.plans
    return sorted({place for plan in plans for place in plan.residents(worker)})
