"""What an attention worker holds from start to end: its weights, its latent cache, its limits; on CPU or on a GPU."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from common.config import ClusterConfig
from common.model.hf_config import ModelConfig, load_config
from common.model.manifest import cluster_manifest
from common.model.source import open_checkpoint
from common.obs.trace import Recorder
from services.attention.gate_balance import GateBalance
from services.attention.gate_bias import GateBias
from services.attention.lane import Lane, StepTimes
from services.attention.latent_cache import LatentCache
from services.attention.model import AttentionModel
from services.attention.moe_client import MoeClient
from services.attention.pages import PageAllocator
from services.attention.scheduler import Scheduler, Slice

MAX_WAITING = 4096


class Forward(Protocol):
    """A lane of either kind."""

    async def forward(
        self, slices: list[Slice], *, all_rows: bool = False
    ) -> tuple[torch.Tensor, list[int]]: ...


log = logging.getLogger(__name__)

NewLane = Callable[[int, MoeClient, StepTimes, Recorder | None], Forward]


@dataclass(slots=True)
class Resident:
    """`config` is the model's; the cache has room for `attention.cache_tokens` tokens; `new_lane` makes a lane.

    `balance` lowers the scores of overloaded experts, where `attention.gate_bias_max` allows that.
    """

    config: ModelConfig
    model_hash: str
    cache: LatentCache
    max_context: int
    new_lane: NewLane
    balance: GateBalance | None

    @classmethod
    def load(cls, config: ClusterConfig) -> Self:
        """Read every weight but the routed experts'. Raises ModelError."""
        model_config = load_config(config.model.path)
        manifest = cluster_manifest(config)
        max_context = config.attention.max_context or model_config.max_position
        load = _on_cpu if config.cluster.device == "cpu" else _on_gpu
        cache, max_context, new_lane, balance = load(config, model_config, max_context)
        return cls(model_config, manifest.model_hash, cache, max_context, new_lane, balance)

    def scheduler(self, config: ClusterConfig) -> Scheduler:
        """An empty scheduler over this cache."""
        limits = config.attention
        return Scheduler(
            PageAllocator(self.cache.num_pages, limits.page_tokens),
            num_lanes=limits.microbatches,
            max_batch_tokens=limits.max_batch_tokens,
            max_requests=limits.max_requests,
            max_waiting=MAX_WAITING,
            max_context=self.max_context,
        )


def _on_cpu(
    config: ClusterConfig, model_config: ModelConfig, max_context: int
) -> tuple[LatentCache, int, NewLane, GateBalance | None]:
    model = AttentionModel.load(config.model.path, max_context=max_context)
    cache = _cache(config, model_config)
    balance = _balance(config, model_config, model.gate_biases)

    def new_lane(i: int, moe: MoeClient, times: StepTimes, trace: Recorder | None) -> Forward:
        return Lane(i, model, cache, moe, times, trace, balance)

    return cache, model.max_context, new_lane, balance


def _on_gpu(
    config: ClusterConfig, model_config: ModelConfig, max_context: int
) -> tuple[LatentCache, int, NewLane, GateBalance | None]:
    # loaded here: on CPU nobody needs them
    from services.attention.device_clock import DeviceClock
    from services.attention.device_lane import DeviceLane
    from services.attention.device_model import DeviceModel
    from services.attention.device_weights import load_device_weights

    device, dtype = config.cluster.device, torch.bfloat16
    with open_checkpoint(config.model.path) as checkpoint:
        weights = load_device_weights(checkpoint, model_config, device=device, dtype=dtype)
    cache = _cache(config, model_config, dtype=dtype, device=device)
    model = DeviceModel(model_config, weights, cache, max_context=max_context)
    balance = _balance(config, model_config, model.gate_biases)  # its gates are others to compile
    model.warm_up(model.state(config.attention.max_batch_tokens))
    clock = DeviceClock() if config.cluster.trace_events else None

    def new_lane(i: int, moe: MoeClient, times: StepTimes, trace: Recorder | None) -> Forward:
        if trace is not None and clock is not None:
            trace.resolve = clock.ns
        moe.packing = "post"
        state = model.state(config.attention.max_batch_tokens)
        return DeviceLane(i, model, state, moe, times, trace, clock, balance)

    return cache, model.max_context, new_lane, balance


def _balance(
    config: ClusterConfig, model_config: ModelConfig, gates: Mapping[int, GateBias]
) -> GateBalance | None:
    """What balances the gates of a model, before its first step; None when outputs shall stay the model's own."""
    most = config.attention.gate_bias_max
    if not most:
        return None
    log.warning(
        "gate_bias_max = %g: scores of overloaded experts are lowered by up to that, so outputs differ from the "
        "model's own and depend on other requests", most,
    )  # fmt: skip
    for gate in gates.values():
        gate.open(model_config.num_experts, config.cluster.device)
    return GateBalance(model_config.num_experts, most, lambda i, by: gates[i].adjust(by))


def _cache(
    config: ClusterConfig, model_config: ModelConfig, *, dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> LatentCache:  # fmt: skip
    limits = config.attention
    num_pages = -(-limits.cache_tokens // limits.page_tokens)
    return LatentCache(
        model_config, num_pages, page_tokens=limits.page_tokens, dtype=dtype, device=device
    )
