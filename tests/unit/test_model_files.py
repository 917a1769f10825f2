"""Checkpoint files: byte ranges, what is refused, dequantisation, hashes, and the writer's determinism."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from common.errors import ModelError
from common.model.checkpoint import INDEX, SINGLE, Checkpoint
from common.model.loader import dequantise, load_attention_weights, load_expert
from common.model.manifest import build_manifest, hash_expert
from common.model.safetensors_file import SafetensorsFile, write_safetensors
from common.model.small import small_config, write_small_model
from common.model.writer import quantise_blocks, write_random

EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def tensor(
    dtype: str = "F32", shape: tuple[Any, ...] = (2,), offsets: tuple[Any, ...] = (0, 8)
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "sentence"),
    [
        (b"{", b"", "the header is not valid JSON"),
        ([], b"", "must be a JSON object"),
        ({"a": tensor()}, b"\0" * 4, "tensor a ends at byte .*, the file is truncated at"),
        ({"a": tensor(), "b": tensor(offsets=(4, 12))}, b"\0" * 12, "tensors a and b overlap"),
        ({"a": tensor(shape=(3,))}, b"\0" * 8, r"tensor a of shape \[3\] in F32 needs 12 bytes"),
        ({"a": tensor(dtype="F4")}, b"\0" * 8, "tensor a has dtype 'F4'"),
        ({"a": tensor(shape=(-2,))}, b"\0" * 8, "tensor a has a shape or offset"),
        ({"a": tensor(offsets=(8, 0))}, b"\0" * 8, "its offsets give -8"),
        ({"a": tensor(offsets=(0,))}, b"\0" * 8, "tensor a has no dtype, shape and two"),
        ({"a": 3}, b"\0" * 8, "tensor a has no dtype, shape and two"),
    ],
)
def test_bad_header(tmp_path: Path, header: Any, data: bytes, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        SafetensorsFile(raw_file(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize(
    "content", [b"", b"\1\0\0", struct.pack("<Q", 1 << 60), struct.pack("<Q", 99)]
)
def test_no_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.safetensors: (truncated|header of)"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_our_files_are_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(4).to(torch.bfloat16),
        "c": torch.randn(2, 2).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 7),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors.items())
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644, "others serve it, too"
    theirs = load_file(tmp_path / "x.safetensors")
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        for name, value in tensors.items():
            assert torch.equal(theirs[name].float(), value.float())
            assert torch.equal(file.read(name).float(), value.float())
            assert file.read(name).dtype is value.dtype


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_random(path, small_config() | {"num_hidden_layers": 2}, max_shard_nbytes=1 << 19)
    return path


def test_a_worker_reads_only_its_own_bytes(directory: Path) -> None:
    from common.model.hf_config import load_config

    config = load_config(directory)
    expert_nbytes = 3 * config.hidden_size * config.moe_intermediate_size * 4
    with Checkpoint(directory) as checkpoint:
        load_expert(checkpoint, config, 1, 3)
        assert checkpoint.nbytes_read == expert_nbytes
    with Checkpoint(directory) as checkpoint:
        load_attention_weights(checkpoint, config)
        total = sum(checkpoint.entry(name).nbytes for name in checkpoint.names)
        experts = config.num_experts * len(config.moe_layers) * expert_nbytes
        assert checkpoint.nbytes_read == total - experts
        assert len(checkpoint.files) > 1


def rewrite(
    source: Path, target: Path, change: dict[str, torch.Tensor | None], **config: Any
) -> Path:
    """A copy with tensors replaced or (None) left out."""
    target.mkdir()
    document = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(document))
    with Checkpoint(source) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.names}
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    write_safetensors(target / SINGLE, tensors.items())
    return target


def load_all(path: Path) -> None:
    from common.model.hf_config import load_config

    config = load_config(path)
    with Checkpoint(path) as checkpoint:
        load_attention_weights(checkpoint, config)
        load_expert(checkpoint, config, 1, 3)


@pytest.mark.parametrize(
    ("change", "config", "sentence"),
    [
        ({EXPERT: None}, {}, f"tensor {EXPERT} is missing"),
        ({"model.norm.weight": None}, {}, "tensor model.norm.weight is missing"),
        (
            {EXPERT: torch.zeros(3, 4)},
            {},
            rf"tensor {EXPERT} has shape \[3, 4\], config.json means \[128, 64\]",
        ),
        ({EXPERT: torch.zeros(128, 64, dtype=torch.int8)}, {}, f"tensor {EXPERT} has dtype I8"),
        (
            {EXPERT: torch.zeros(128, 64, dtype=torch.float8_e4m3fn)},
            {},
            "has no quantization_config",
        ),
        (
            {EXPERT: torch.zeros(128, 64, dtype=torch.float8_e4m3fn)},
            {"quantization_config": {"quant_method": "fp8"}},
            f"{EXPERT}_scale_inv is missing",
        ),
        (
            {EXPERT: torch.zeros(128, 64, dtype=torch.float8_e4m3fn)}
            | {f"{EXPERT}_scale_inv": torch.zeros(2, 1)},
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
            r"scale_inv has shape \[2, 1\], blocks of 128x128 mean \[1, 1\]",
        ),
    ],
)
def test_wrong_tensors(
    directory: Path,
    tmp_path: Path,
    change: dict[str, torch.Tensor | None],
    config: dict[str, Any],
    sentence: str,
) -> None:
    with pytest.raises(ModelError, match=sentence):
        load_all(rewrite(directory, tmp_path / "copy", change, **config))


def test_truncated_file(directory: Path, tmp_path: Path) -> None:
    copy = rewrite(directory, tmp_path / "copy", {})
    data = (copy / SINGLE).read_bytes()
    (copy / SINGLE).write_bytes(data[: len(data) // 2])
    with pytest.raises(
        ModelError, match=r"model\.safetensors: tensor .* ends at byte .* truncated"
    ):
        load_all(copy)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({}, "weight_map is missing"),
        ({"weight_map": {"a": "../secret"}}, "no file name"),
        ({"weight_map": {"model.embed_tokens.weight": "gone.safetensors"}}, "No such file"),
    ],
)
def test_bad_index(directory: Path, tmp_path: Path, index: dict[str, Any], sentence: str) -> None:
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=sentence):
        load_all(tmp_path)


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is neither model"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("shape", [(128, 128), (200, 130), (5, 300), (1, 1)])
def test_fp8_blocks_of_any_shape(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape) * torch.rand(shape[0], 1) * 3
    quantised, scales = quantise_blocks(weight, (128, 128))
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    back = dequantise(quantised, scales, (128, 128))
    for row in range(shape[0]):
        for column in range(shape[1]):
            if row % 67 == 0 and column % 43 == 0:
                expected = quantised[row, column].float() * scales[row // 128, column // 128]
                assert back[row, column] == expected
    assert (back - weight).abs().max() <= weight.abs().max() / 16


@pytest.mark.parametrize("storage", ["F32", "F16", "BF16", "F8_E4M3"])
def test_writer_is_deterministic_and_seeds_differ(tmp_path: Path, storage: str) -> None:
    config = small_config(6) | {"num_hidden_layers": 2}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random(tmp_path / name, config, seed=seed, storage=storage)
    a, b, c = ((tmp_path / name / SINGLE).read_bytes() for name in "abc")
    assert a == b
    assert a != c
    load_all(tmp_path / "a")


def test_small_model_is_complete_and_made_once(tmp_path: Path) -> None:
    path = write_small_model(tmp_path / "small", num_experts=5)
    before = (path / SINGLE).stat().st_mtime_ns
    assert write_small_model(path, num_experts=5) == path
    assert (path / SINGLE).stat().st_mtime_ns == before
    assert [child.name for child in tmp_path.iterdir()] == ["small"]
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    text = "Grüße, <|user|>日本\n  tabs\t"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode("abc").ids) == 3
    assert max(ids) < small_config()["vocab_size"] == tokenizer.get_vocab_size()


def test_expert_hash_follows_the_bytes(directory: Path, tmp_path: Path) -> None:
    with Checkpoint(directory) as checkpoint:
        first, again, other = (hash_expert(checkpoint, 1, expert) for expert in (3, 3, 4))
        weight = checkpoint.read(EXPERT)
    assert first == again != other
    weight[0, 0] += 1e-3
    with Checkpoint(rewrite(directory, tmp_path / "copy", {EXPERT: weight})) as checkpoint:
        assert hash_expert(checkpoint, 1, 3) != first
        assert hash_expert(checkpoint, 1, 4) == other


def test_manifest_is_cached_until_a_file_changes(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, cache = rewrite(directory, tmp_path / "copy", {}), tmp_path / "cache"
    manifest = build_manifest(copy, cache_dir=cache)
    assert set(manifest.expert_hashes) == {(1, expert) for expert in range(16)}
    with monkeypatch.context() as patch:
        patch.setattr("common.model.manifest.hash_expert", None)  # a second hashing would fail
        assert build_manifest(copy, cache_dir=cache) == manifest
    for stored in cache.iterdir():
        stored.write_text("{")
    assert build_manifest(copy, cache_dir=cache) == manifest
    with Checkpoint(copy) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.names}
    tensors[EXPERT][0, 0] += 1
    write_safetensors(copy / SINGLE, tensors.items())
    changed = build_manifest(copy, cache_dir=cache)
    assert changed.model_hash != manifest.model_hash
    assert changed.expert_hashes[1, 3] != manifest.expert_hashes[1, 3]
    assert changed.expert_hashes[1, 4] == manifest.expert_hashes[1, 4]
