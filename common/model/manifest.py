"""Content hashes: what an expert's weights are, so that weights on the wrong expert cannot answer.

A hash covers dtype, shape and raw bytes of the expert's tensors (weights and scales). The model's hash covers
config.json, the tensor index and every expert's hash. Hashes are cached by each file's path, size and mtime.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.config import ClusterConfig
from common.errors import ModelError
from common.model.hf_config import load_config, read_json
from common.model.loader import expert_tensor_names
from common.model.slices import sliced_config
from common.model.source import Source, open_checkpoint

HASH_NBYTES = 16


@dataclass(frozen=True, slots=True)
class Manifest:
    """`model_hash` of the whole, `expert_hashes` by (layer, expert); hexadecimal."""

    model_hash: str
    expert_hashes: dict[tuple[int, int], str]


def hash_expert(checkpoint: Source, layer: int, expert: int) -> str:
    """Hash of one expert's tensors. Raises ModelError when one is missing or truncated."""
    digest = hashlib.blake2b(digest_size=HASH_NBYTES)
    for name in expert_tensor_names(checkpoint, layer, expert):
        entry = checkpoint.entry(name)
        # the name without its layer and expert: equal weights have equal hashes wherever they lie
        digest.update(f"{name.split('.', 6)[-1]} {entry.dtype} {entry.shape}\n".encode())
        digest.update(checkpoint.content(name))
    return digest.hexdigest()


def cluster_manifest(config: ClusterConfig) -> Manifest:
    """The manifest that every process of a cluster computes. Raises ModelError."""
    return build_manifest(
        config.model.path, cache_dir=config.model.cache_dir, slices=config.placement.expert_slices
    )


def build_manifest(directory: Path, *, cache_dir: Path | None = None, slices: int = 1) -> Manifest:
    """Hash a whole checkpoint, or take the cached result when no file changed. Raises ModelError.

    With `slices` each expert's slices are hashed by themselves, as experts (`common.model.slices`).
    """
    config = sliced_config(load_config(directory), slices)
    with open_checkpoint(directory, slices) as checkpoint:
        key = _file_key(directory, checkpoint, slices)
        cached = _load(cache_dir, key)
        if cached is not None:
            return cached
        experts = {
            (layer, expert): hash_expert(checkpoint, layer, expert)
            for layer in config.moe_layers
            for expert in range(config.num_experts)
        }
        digest = hashlib.blake2b((directory / "config.json").read_bytes(), digest_size=HASH_NBYTES)
        for name in checkpoint.names:
            entry = checkpoint.entry(name)
            digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
    for (layer, expert), value in sorted(experts.items()):
        digest.update(f"{layer} {expert} {value}\n".encode())
    manifest = Manifest(digest.hexdigest(), experts)
    _store(cache_dir, key, manifest)
    return manifest


def _file_key(directory: Path, checkpoint: Source, slices: int) -> str:
    digest = hashlib.blake2b(b"" if slices == 1 else bytes(slices), digest_size=HASH_NBYTES)
    for path in [directory / "config.json", *checkpoint.files]:
        try:
            stat = path.stat()
        except OSError as exc:
            raise ModelError(f"{path}: {exc.strerror}") from exc
        digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _load(cache_dir: Path | None, key: str) -> Manifest | None:
    if cache_dir is None or not (cache_dir / f"{key}.json").exists():
        return None
    try:
        stored = read_json(cache_dir / f"{key}.json")
        experts = {
            (int(layer), int(expert)): str(value) for layer, expert, value in stored["experts"]
        }
        return Manifest(str(stored["model"]), experts)
    except (ModelError, KeyError, TypeError, ValueError):
        return None  # a damaged cache is a miss


def _store(cache_dir: Path | None, key: str, manifest: Manifest) -> None:
    """Write atomically: several workers may do so at once. A cache that cannot be written is only slower."""
    if cache_dir is None:
        return
    document = {
        "model": manifest.model_hash,
        "experts": [[*place, value] for place, value in sorted(manifest.expert_hashes.items())],
    }
    with suppress(OSError):
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = cache_dir / f"{key}.{os.getpid()}.partial"
        partial.write_text(json.dumps(document))
        partial.replace(cache_dir / f"{key}.json")
