"""The shipped demo model is what its files say: it loads in transformers, says and routes what the references hold."""

import json

import numpy as np
import pytest
import torch
from jinja2 import Environment
from safetensors import safe_open
from tokenizers import Tokenizer

from deploy.demo import fp8
from deploy.demo.train import Model, Shape
from tests.demo_model import MODEL, REFERENCE, bits_per_byte, held_out, perplexity
from tests.oracle.make_demo_reference import Recorder, load_skew
from tests.oracle.reference import LOGIT_GAP, Reference

MOE_LAYERS, EXPERTS, TOP_K = 5, 16, 4
METRICS = json.loads((REFERENCE / "metrics.json").read_text())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small get slower with more, far slower on busy cores
    yield Reference(MODEL, tmp_path_factory.mktemp("demo"))
    torch.set_num_threads(threads)


def test_fits_the_repository():
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) < 16_000_000


def test_weights_are_stored_as_deepseek_v3_stores_them():
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        names = set(file.keys())
        quantized = {n for n in names if n + "_scale_inv" in names}
        for name in quantized:
            rows, cols = file.get_slice(name).get_shape()
            assert file.get_tensor(name).dtype == torch.float8_e4m3fn
            scales = file.get_tensor(name + "_scale_inv")
            assert scales.dtype == torch.float32
            assert scales.shape == (-(-rows // 128), -(-cols // 128))
        plain = {n for n in names - quantized if not n.endswith("_scale_inv")}
    kinds = ("norm.weight", "gate.weight", "gate.e_score_correction_bias", "embed_tokens.weight")
    assert all(name.endswith(kinds) for name in plain)
    assert len(quantized) == 6 * 5 + 3 + MOE_LAYERS * 3 * (EXPERTS + 1)


def test_logits_reproduce(reference):
    stored = np.load(REFERENCE / "logits.npz")
    ids = held_out()[0].ids
    with torch.inference_mode():
        logits = reference.model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits[stored["positions"]], stored["logits"], atol=2e-3)


@pytest.mark.parametrize("index", [0, 9])
def test_greedy_continuations_reproduce(reference, index):
    record = json.loads((REFERENCE / "greedy.json").read_text())[index]
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert tokenizer.encode(record["prompt"], add_special_tokens=False).ids == record["prompt_ids"]
    run = reference.generate(record["prompt_ids"], 32)
    for ours, theirs, gap in zip(run.tokens, record["token_ids"], run.logit_gaps, strict=False):
        if ours != theirs:
            assert gap < LOGIT_GAP
            break


def test_perplexity_and_routing_of_some_windows(reference):
    windows = held_out()
    recorder = Recorder(reference.model)
    logits = {}
    for window in windows[:2]:
        with torch.inference_mode():
            logits[tuple(window.ids)] = reference.model(torch.tensor([window.ids])).logits[0]

    def log_probs(ids):
        scores = logits[tuple(ids)][:-1].log_softmax(-1)
        return scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    expected = METRICS["by_source"]["sotu"]
    assert perplexity([w.ids for w in windows[:2]], log_probs) < 1.5 * expected["perplexity"]
    assert bits_per_byte(windows[:2], log_probs) < 1.3 * expected["bits_per_byte"]
    trace = np.load(REFERENCE / "routing.npz")
    num_tokens = sum(len(window.ids) for window in windows[:2])
    ours = recorder.arrays()["expert_ids"]
    same = (ours == trace["expert_ids"][:, :num_tokens]).all(-1).mean()
    assert same > 0.999  # a near-tie may fall differently on another processor


def test_training_network_computes_what_transformers_computes(reference):
    model = Model(Shape(), dropout=0.0).eval()
    weights = reference.model.state_dict()
    for name, parameter in model.named_parameters():
        theirs = f"model.{name}"
        if ".mlp.gate_proj" in name and theirs not in weights:
            fused = weights[theirs.replace("gate_proj", "experts.gate_up_proj")]
            parameter.data.copy_(fused[:, : fused.shape[1] // 2])
        elif ".mlp.up_proj" in name and theirs not in weights:
            fused = weights[theirs.replace("up_proj", "experts.gate_up_proj")]
            parameter.data.copy_(fused[:, fused.shape[1] // 2 :])
        elif theirs not in weights:
            parameter.data.copy_(weights[theirs.replace("mlp.down_proj", "mlp.experts.down_proj")])
        else:
            parameter.data.copy_(weights[theirs])
    for gate, layer in zip(model.gates(), reference.model.model.layers[1:], strict=True):
        gate.bias.copy_(layer.mlp.gate.e_score_correction_bias)
    ids = torch.tensor([held_out()[0].ids[:200]])
    with torch.inference_mode():
        logits = reference.model(ids[:, :-1]).logits[0]
        theirs = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
        assert model(ids).item() == pytest.approx(theirs, abs=1e-3)


def test_rounding_is_its_own_inverse():
    weight = torch.randn(256, 160)
    once = fp8.rounded(weight)
    assert (once - weight).abs().max() / weight.abs().max() < 0.04
    torch.testing.assert_close(fp8.rounded(once), once)


def test_trace_has_the_promised_form():
    trace = np.load(REFERENCE / "routing.npz")
    ids, weights, layers = (trace[k] for k in ("expert_ids", "gate_weights", "layer_index"))
    assert (ids.dtype, weights.dtype, layers.dtype) == (np.int16, np.float16, np.int16)
    assert ids.shape == weights.shape
    assert ids.shape[0] == MOE_LAYERS
    assert ids.shape[1] == sum(len(window.ids) for window in held_out()) >= 20_000
    assert ids.shape[2] == TOP_K
    assert (np.diff(ids, axis=-1) > 0).all()  # ascending, none twice
    groups = [len(set(row)) for row in (ids // 4).reshape(-1, TOP_K)[::97].tolist()]
    assert max(groups) <= 2
    np.testing.assert_allclose(weights.astype(np.float32).sum(-1), 2.0, atol=5e-3)
    reported = METRICS["load_max_over_mean"].values()
    assert load_skew(ids) == pytest.approx(list(reported))


def test_chat_template_renders_the_trained_format():
    source = json.loads((MODEL / "tokenizer_config.json").read_text())["chat_template"]
    messages = [
        {"role": "user", "content": "What about peace?"},
        {"role": "assistant", "content": "It is good."},
        {"role": "user", "content": "And war?"},
    ]
    text = Environment().from_string(source).render(messages=messages, add_generation_prompt=True)
    assert text == (
        "<|bos|><|user|>What about peace?<|assistant|>It is good.<|eos|><|user|>And war?<|assistant|>"
    )
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert (ids[0], ids[1], ids[-1]) == (0, 2, 3)
