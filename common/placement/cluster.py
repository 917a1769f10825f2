"""The placement that a cluster TOML means for a model. Pure."""

from common.config import ClusterConfig
from common.ids import Role
from common.model.hf_config import ModelConfig
from common.placement.plan import Plan, column_plan


def cluster_plan(config: ClusterConfig, model: ModelConfig) -> Plan:
    """Every process computes the same plan from the same TOML and config.json.

    Raises ConfigError when the expert workers cannot hold every expert.
    """
    return column_plan(
        epoch=config.cluster.epoch,
        moe_layers=model.moe_layers,
        num_experts=model.num_experts,
        experts_per_gpu=config.placement.experts_per_gpu,
        nodes=tuple(spec.node for spec in config.of_role(Role.EXPERT)),
    )
