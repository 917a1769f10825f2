"""What an attention worker holds from start to end: its weights, its latent cache, its limits."""

from dataclasses import dataclass
from typing import Self

from common.config import ClusterConfig
from common.model.hf_config import ModelConfig, load_config
from common.model.manifest import cluster_manifest
from services.attention.latent_cache import LatentCache
from services.attention.model import AttentionModel
from services.attention.pages import PageAllocator
from services.attention.scheduler import Scheduler

MAX_WAITING = 4096


@dataclass(slots=True)
class Resident:
    """`config` is the model's; the cache has room for `attention.cache_tokens` tokens."""

    config: ModelConfig
    model_hash: str
    model: AttentionModel
    cache: LatentCache

    @classmethod
    def load(cls, config: ClusterConfig) -> Self:
        """Read every weight but the routed experts'. Raises ModelError."""
        model_config = load_config(config.model.path)
        manifest = cluster_manifest(config)
        limits = config.attention
        model = AttentionModel.load(
            config.model.path, max_context=limits.max_context or model_config.max_position
        )
        num_pages = -(-limits.cache_tokens // limits.page_tokens)
        cache = LatentCache(model_config, num_pages, page_tokens=limits.page_tokens)
        return cls(model_config, manifest.model_hash, model, cache)

    def scheduler(self, config: ClusterConfig) -> Scheduler:
        """An empty scheduler over this cache."""
        limits = config.attention
        return Scheduler(
            PageAllocator(self.cache.num_pages, limits.page_tokens),
            num_lanes=limits.microbatches,
            max_batch_tokens=limits.max_batch_tokens,
            max_requests=limits.max_requests,
            max_waiting=MAX_WAITING,
            max_context=self.model.max_context,
        )
