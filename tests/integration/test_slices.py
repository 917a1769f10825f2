"""Experts cut along their hidden dimension: the slices add up, and no bit depends on where they are."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import AuthError, ConfigError, ModelError
from common.ids import Role
from common.model.checkpoint import Checkpoint
from common.model.hf_config import load_config
from common.model.loader import load_expert
from common.model.manifest import build_manifest, hash_expert
from common.model.slices import SlicedCheckpoint, sliced_config
from tests.inproc_cluster import inproc_cluster
from tests.oracle.configs import CONFIGS, OracleConfig
from tests.oracle.reference import Reference, build_checkpoint

FP8 = OracleConfig("sliced-fp8", {"moe_intermediate_size": 256}, storage="F8_E4M3", seed=3)
PROMPT = list(range(2, 22))
NUM_TOKENS = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return build_checkpoint(tmp_path_factory.getbasetemp() / "slices", CONFIGS[0])


@pytest.fixture(scope="module")
def fp8_model(tmp_path_factory) -> Path:
    return build_checkpoint(tmp_path_factory.getbasetemp() / "slices-fp8", FP8)


@pytest.mark.parametrize("slices", [2, 4])
def test_slices_are_the_expert(model, slices):
    config = load_config(model)
    inner = config.moe_intermediate_size // slices
    with Checkpoint(model) as whole, SlicedCheckpoint(model, slices) as sliced:
        expert = load_expert(whole, config, 1, 5)
        parts = [
            load_expert(sliced, sliced_config(config, slices), 1, 5 * slices + s)
            for s in range(slices)
        ]
        gate = torch.cat([part.gate_up[:inner] for part in parts])
        up = torch.cat([part.gate_up[inner:] for part in parts])
        assert torch.equal(torch.cat([gate, up]), expert.gate_up)
        assert torch.equal(torch.cat([part.down for part in parts], dim=1), expert.down)
        hashes = {hash_expert(sliced, 1, e) for e in range(16 * slices)}
        assert len(hashes) == 16 * slices, "every slice has a hash of its own"
        assert len(sliced.names) == len(whole.names) + 3 * 3 * 16 * (slices - 1)


def test_slices_of_fp8_experts_take_their_scales_along(fp8_model):
    config = load_config(fp8_model)
    with Checkpoint(fp8_model) as whole, SlicedCheckpoint(fp8_model, 2) as sliced:
        expert = load_expert(whole, config, 1, 3)
        parts = [load_expert(sliced, sliced_config(config, 2), 1, 6 + s) for s in range(2)]
    assert torch.equal(torch.cat([part.down for part in parts], dim=1), expert.down)
    gates, ups = zip(*(part.gate_up.chunk(2) for part in parts), strict=True)
    assert torch.equal(torch.cat([*gates, *ups]), expert.gate_up)


def test_what_cannot_be_cut_is_one_sentence(model, fp8_model):
    with pytest.raises(ModelError, match="hidden width 64 do not divide into 3 slices"):
        sliced_config(load_config(model), 3)
    with pytest.raises(ModelError, match="4 slices of 64 cut through the FP8 blocks of 128x128"):
        sliced_config(load_config(fp8_model), 4)
    with pytest.raises(ModelError, match="does not divide into 5 slices"):
        SlicedCheckpoint(model, 5).entry("model.layers.1.mlp.experts.0.down_proj.weight")


def test_the_manifest_is_another_with_slices(model, tmp_path):
    one, two = (build_manifest(model, cache_dir=tmp_path, slices=k) for k in (1, 2))
    assert one == build_manifest(model, cache_dir=tmp_path)
    assert two == build_manifest(model, cache_dir=tmp_path, slices=2)
    assert one.model_hash != two.model_hash, "who cuts otherwise is not of this cluster"
    assert not set(one.expert_hashes.values()) & set(two.expert_hashes.values())


def logits_of(model: Path, run_dir: Path, tokens: list[int], **layout) -> torch.Tensor:
    async def main() -> torch.Tensor:
        slices = layout["expert_slices"]
        workers = 16 * slices // layout.get("experts_per_gpu", 1)
        async with inproc_cluster(model, run_dir, ep=workers, **layout) as cluster:
            return await cluster.logits(tokens)

    return asyncio.run(main())


def test_greedy_tokens_are_those_of_transformers(model, tmp_path):
    run = Reference(model, tmp_path / "fp32").generate(PROMPT, NUM_TOKENS, keep_logits=True)
    tokens = PROMPT + run.tokens[:-1]
    for slices in (2, 4):
        (tmp_path / str(slices)).mkdir()
        logits = logits_of(model, tmp_path / str(slices), tokens, expert_slices=slices)
        ours = logits[len(PROMPT) - 1 :]
        wrong = [i for i, t in enumerate(run.tokens) if int(ours[i].argmax()) != t]
        assert not [i for i in wrong if not run.excused_at(i)], wrong
        torch.testing.assert_close(ours, torch.stack(run.logits), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "layout",
    [{"nodes": 1}, {"nodes": 3}, {"nodes": 2, "routers": 2}, {"nodes": 3, "experts_per_gpu": 4},
     {"nodes": 3, "dispatch": "unicast"}],
    ids=str,
)  # fmt: skip
def test_no_bit_depends_on_where_the_slices_are(model, tmp_path, layout):
    def run(name: str, **options) -> torch.Tensor:
        (tmp_path / name).mkdir()
        return logits_of(model, tmp_path / name, PROMPT, expert_slices=2, **options)

    assert torch.equal(run("here", **layout), run("two", nodes=2))


def test_a_worker_with_another_slice_is_refused(model, tmp_path):
    async def main() -> None:
        async with inproc_cluster(model, tmp_path, ep=32, expert_slices=2) as cluster:
            router = cluster.of(Role.ROUTER)[0]
            peer = router._experts[0].peer
            router.placement._checked(SimpleNamespace(peer=peer), peer.facts["experts"])
            of_slice_1 = router.manifest.expert_hashes[1, 1]
            held = [[1, 0, of_slice_1] if e[0] == 1 else e for e in peer.facts["experts"]]
            with pytest.raises(AuthError, match="as expert 0 of layer 1, the checkpoint's is"):
                router.placement._checked(SimpleNamespace(peer=peer), held)

    asyncio.run(main())


def test_too_few_workers_for_the_slices(model, tmp_path):
    async def main() -> None:
        async with inproc_cluster(model, tmp_path, ep=16, expert_slices=2):
            pass

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(main())
    (error,) = caught.value.exceptions
    assert isinstance(error, ConfigError)
    assert "32 experts at 1 per GPU need 32 expert workers, the cluster has 16" in str(error)
