"""Random weights by name: what workers read is the same wherever they read it, and the whole model computes."""

import json

import pytest
import torch

from common.errors import ConfigError, ModelError
from common.model.hf_config import load_config
from common.model.loader import dequantise, load_attention_weights, load_expert
from common.model.manifest import build_manifest
from common.model.names import SCALE_SUFFIX
from common.model.presets import PRESETS, RANDOM_FILE, preset_config, write_random_source
from common.model.small import small_config
from common.model.source import open_checkpoint
from common.model.writer import write_random
from deploy.cli import main

FP8 = {"quantization_config": preset_config("deepseek-v3")["quantization_config"]}


@pytest.fixture
def source(tmp_path):
    return write_random_source(tmp_path / "random", small_config() | FP8, distinct_experts=3)


def test_the_same_tensors_as_a_checkpoint_of_that_config(tmp_path, source):
    write_random(tmp_path / "files", small_config(), storage="F8_E4M3")
    with open_checkpoint(tmp_path / "files") as files, open_checkpoint(source) as random:
        assert random.names == files.names
        for name in files.names:
            ours, theirs = random.entry(name), files.entry(name)
            assert ours.shape == theirs.shape, name
            tensor = random.read(name)
            assert tuple(tensor.shape) == ours.shape
            assert tensor.nbytes == ours.nbytes
            if not name.endswith("mlp.gate.weight"):  # fp32 here, bf16 in FP8 checkpoints of ours
                assert ours.dtype == theirs.dtype, name
            if tensor.numel() > 10_000 and not name.endswith(SCALE_SUFFIX):
                spread = [float(wide(source, name).std()) for source in (random, files)]
                assert spread[0] == pytest.approx(spread[1], rel=0.12), (
                    name
                )  # scales of blocks differ


def wide(source, name):
    """A tensor in fp32, with its scales."""
    tensor = source.read(name)
    if name + SCALE_SUFFIX in source:
        return dequantise(tensor, source.read(name + SCALE_SUFFIX), (128, 128))
    return tensor.float()


def test_what_is_read_follows_from_seed_and_name_alone(tmp_path, source):
    name = "model.layers.2.self_attn.o_proj.weight"
    with open_checkpoint(source) as first, open_checkpoint(source) as second:
        second.read("model.norm.weight")
        same = [c.read(name).view(torch.uint8) for c in (first, second)]
    assert torch.equal(*same)
    write_random_source(source, small_config() | FP8, seed=1, distinct_experts=3)
    with open_checkpoint(source) as other:
        assert not torch.equal(other.read(name).view(torch.uint8), same[0])


def test_experts_share_weights_and_hashes(source):
    config = load_config(source)
    hashes = build_manifest(source).expert_hashes
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.stands_for(2, 7) == (2, 1)
        one, four, five = (load_expert(checkpoint, config, 1, e).down for e in (1, 4, 5))
    assert torch.equal(one, four)
    assert not torch.equal(four, five)
    assert hashes[1, 1] == hashes[1, 4] != hashes[1, 5]
    assert hashes[1, 1] != hashes[2, 1]


def test_activations_stay_finite(source):
    config = load_config(source)
    with open_checkpoint(source) as checkpoint:
        weights = load_attention_weights(checkpoint, config)
    x = torch.randn(4, config.hidden_size)
    out = x @ weights.layers[1].attention.kv_a.t()
    assert 0.5 < float(out.std()) < 3.0  # gain 1.5


def test_biases_of_gates_may_be_given(tmp_path, source):
    name, other = (f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2))
    given = torch.linspace(-1, 1, 16).tolist()
    with open_checkpoint(source) as random:
        theirs = random.read(other)
    write_random_source(source, small_config() | FP8, distinct_experts=3, given={name: given})
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.read(name).tolist() == pytest.approx(given)
        assert checkpoint.read(name).dtype == torch.float32
        assert torch.equal(checkpoint.read(other), theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"seed": "x"},
        {"distinct_experts": 0},
        {"given": [1.0]},
        {"given": {"model.layers.1.mlp.gate.e_score_correction_bias": [0.0] * 15}},
        {"given": {"model.layers.1.mlp.gate.e_score_correction_bias": 0.0}},
        {"given": {"model.layers.0.mlp.gate.e_score_correction_bias": [0.0] * 16}},  # dense
        {"given": {"model.norm.weight": [1.0] * 128}},
    ],
)
def test_bad_settings_are_one_sentence(source, settings):
    good = json.loads((source / RANDOM_FILE).read_text())
    (source / RANDOM_FILE).write_text(json.dumps((good | settings) if settings else {}))
    with pytest.raises(ModelError, match=str(source)):
        open_checkpoint(source)


def test_unknown_tensors_are_named(source):
    with (
        open_checkpoint(source) as checkpoint,
        pytest.raises(ModelError, match=r"no\.such\.tensor"),
    ):
        checkpoint.entry("no.such.tensor")


def test_presets(tmp_path):
    for name in PRESETS:
        config = load_config(write_random_source(tmp_path / name, preset_config(name, layers=4)))
        assert (config.num_layers, config.num_experts, config.hidden_size) == (4, 256, 7168)
        assert list(config.moe_layers) == [3]
        assert config.fp8_block == (128, 128)
    reference = load_config(tmp_path / "reference-61l-256e")
    assert (reference.moe_intermediate_size, reference.qk_head_dim, reference.v_head_dim) == (
        18432, 56, 56,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="4 to 61 layers, not 3"):
        preset_config("deepseek-v3", layers=3)
    with pytest.raises(ConfigError, match="deepseek-v3"):
        preset_config("other")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--preset", "deepseek-v3"], "--preset needs --device cuda"),
        (["--layers", "5"], "--layers needs --preset"),
        (["--preset", "deepseek-v3", "--model", "x", "--device", "cuda"], "give one"),
        (["--preset", "deepseek-v3", "--device", "cuda", "--layers", "2"], "4 to 61 layers"),
        (["--device", "cuda", "--wire", "fp32"], "exact mode, is computed on CPU"),
        (["--preset", "deepseek-v3", "--device", "cuda", "--distinct-experts", "0"], "at least 1"),
        (
            ["--device", "cuda", "--wire", "fp32", "--oversubscribe"],
            "exact mode, is computed on CPU",
        ),
    ],
)
def test_mistakes_on_the_command_line(capsys, arguments, sentence):
    assert main(["up", *arguments]) == 2
    assert sentence in capsys.readouterr().err
