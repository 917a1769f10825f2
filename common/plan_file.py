"""Plans on disk, and the plan that a cluster TOML means for a model: its plan file's, else one column per worker."""

import json
import os
from pathlib import Path

from common.config import ClusterConfig
from common.errors import ConfigError
from common.ids import Role
from common.model.hf_config import ModelConfig
from common.placement.plan import Plan, check_plan, column_plan


def cluster_plan(config: ClusterConfig, model: ModelConfig) -> Plan:
    """Every process computes the same plan from the same files. Its epoch is the TOML's, whatever the file's was.

    Raises ConfigError when the expert workers cannot hold every expert, or the plan file is for another cluster.
    """
    epoch = config.cluster.epoch
    if config.placement.plan is None:
        return column_plan(
            epoch=epoch,
            moe_layers=model.moe_layers,
            num_experts=model.num_experts * config.placement.expert_slices,
            experts_per_gpu=config.placement.experts_per_gpu,
            nodes=tuple(spec.node for spec in config.of_role(Role.EXPERT)),
        )
    plan = read_plan(config.placement.plan)
    try:
        check_cluster_plan(plan, config, model)
    except ConfigError as exc:
        raise ConfigError(f"plan {config.placement.plan}: {exc}") from exc
    return Plan(epoch, plan.holders, plan.nodes)


def check_cluster_plan(plan: Plan, config: ClusterConfig, model: ModelConfig) -> None:
    """Raises ConfigError unless the plan is for this cluster and model."""
    check_plan(
        plan,
        moe_layers=model.moe_layers,
        num_experts=model.num_experts * config.placement.expert_slices,
        nodes=tuple(spec.node for spec in config.of_role(Role.EXPERT)),
        experts_per_gpu=config.placement.experts_per_gpu,
    )


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
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(plan.to_json()) + "\n")
        partial.replace(path)
    except OSError as exc:
        raise ConfigError(f"plan {path}: {exc.strerror}") from exc
