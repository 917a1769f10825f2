"""What transformers says: greedy continuations of a checkpoint, with the margins by which each choice was made.

Independent of our loader and model: tensors are read with the safetensors library and FP8 is dequantised here.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common.model.writer import write_random
from tests.oracle.configs import OracleConfig

LOGIT_GAP = 1e-4  # a choice between two logits this close is nobody's error
GATE_GAP = 1e-5


@dataclass
class ReferenceRun:
    """One greedy continuation. Gaps are per generated token; a gate gap covers that token and its whole context."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logit_gaps: list[float] = field(default_factory=list)
    gate_gaps: list[float] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def excused_at(self, index: int) -> bool:
        """Whether another token at `index` could be a near-tie and no error."""
        return self.logit_gaps[index] < LOGIT_GAP or self.gate_gaps[index] < GATE_GAP


@dataclass(frozen=True)
class Verdict:
    """How a continuation compares; `first_difference` is None when identical."""

    first_difference: int | None
    excused: bool

    @property
    def good(self) -> bool:
        """Identical, or different from a near-tie on."""
        return self.first_difference is None or self.excused


def compare(run: ReferenceRun, tokens: list[int]) -> Verdict:
    """Judge our tokens against the reference's."""
    for index, (theirs, ours) in enumerate(zip(run.tokens, tokens, strict=True)):
        if theirs != ours:
            return Verdict(index, run.excused_at(index))
    return Verdict(None, excused=False)


def build_checkpoint(directory: Path, config: OracleConfig) -> Path:
    """Write a configuration's checkpoint once; returns `directory`."""
    if not (directory / "config.json").exists():
        write_random(
            directory,
            config.config,
            seed=config.seed,
            storage=config.storage,
            max_shard_nbytes=config.max_shard_nbytes,
        )
    return directory


class Reference:
    """transformers' model of a checkpoint in fp32 on CPU with eager attention."""

    def __init__(self, checkpoint: Path, scratch: Path) -> None:
        """`scratch` receives an fp32 copy of the checkpoint, as transformers would dequantise FP8 to bf16."""
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()

        _write_fp32(checkpoint, scratch)
        with _quiet():
            # its grouped expert kernel refuses widths that are no multiple of 16 bytes
            self.model = AutoModelForCausalLM.from_pretrained(
                scratch,
                dtype=torch.float32,
                attn_implementation="eager",
                experts_implementation="eager",
            ).eval()
        assert self.model.config.model_type in ("deepseek_v3", "deepseek_v2")
        self.expert_rows: dict[str, torch.Tensor] = {}
        self._gate_gaps: list[torch.Tensor] = []  # of the last forward pass, one per gate
        for name, module in self.model.named_modules():
            if type(module).__name__.endswith("TopkRouter"):
                module.register_forward_hook(self._hook(name))

    def generate(
        self, prompt: list[int], num_tokens: int, *, keep_logits: bool = False
    ) -> ReferenceRun:
        """Greedy continuation of `num_tokens` tokens; end-of-sequence tokens are tokens like others."""
        run = ReferenceRun(prompt)
        cache, gate_gap = None, float("inf")
        inputs = torch.tensor([prompt])
        with torch.inference_mode(), _quiet():
            for _ in range(num_tokens):
                self._gate_gaps.clear()
                out = self.model(input_ids=inputs, past_key_values=cache, use_cache=True)
                cache, logits = out.past_key_values, out.logits[0, -1].float()
                best = logits.topk(2).values
                gate_gap = min(gate_gap, *(float(gaps.min()) for gaps in self._gate_gaps))
                run.tokens.append(int(logits.argmax()))
                run.logit_gaps.append(float(best[0] - best[1]))
                run.gate_gaps.append(gate_gap)
                if keep_logits:
                    run.logits.append(logits)
                inputs = torch.tensor([[run.tokens[-1]]])
        return run

    def choices(self, prompt: list[int], tokens: list[int]) -> ReferenceRun:
        """What it would say after every prefix of `tokens`, in one pass.

        Equal to `tokens` throughout, it is its greedy continuation; else they part where `generate` would.
        """
        self._gate_gaps.clear()
        with torch.inference_mode(), _quiet():
            logits = self.model(input_ids=torch.tensor([prompt + tokens[:-1]])).logits[0].float()
        first = len(prompt) - 1
        best = logits[first:].topk(2).values
        gate_gaps = torch.stack(self._gate_gaps).amin(0).cummin(0).values
        return ReferenceRun(
            prompt,
            tokens=logits[first:].argmax(-1).tolist(),
            logit_gaps=(best[:, 0] - best[:, 1]).tolist(),
            gate_gaps=gate_gaps[first:].tolist(),
        )

    def _hook(self, name: str):
        def hook(module, inputs, outputs) -> None:
            logits, _, ids = outputs
            self._gate_gaps.append(_smallest_gaps(module, logits))
            counts = torch.bincount(ids.flatten(), minlength=logits.shape[-1])
            self.expert_rows[name] = self.expert_rows.get(name, 0) + counts

        return hook


def _smallest_gaps(module: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """Least distance between the last chosen and the next expert or group, for each row of a gate."""
    bias = getattr(module, "e_score_correction_bias", None)
    rows, experts = logits.shape
    groups, kept = module.num_group or 1, module.topk_group or 1
    if bias is not None:
        choice = logits.sigmoid() + bias
        group_scores = choice.view(rows, groups, -1).topk(2, dim=-1).values.sum(-1)
    else:
        choice = logits.softmax(-1)
        if module.topk_method == "greedy":
            groups = kept = 1
        group_scores = choice.view(rows, groups, -1).amax(-1)
    gaps = torch.full((rows,), float("inf"))
    if kept < groups:
        ordered = group_scores.sort(descending=True).values
        gaps = ordered[:, kept - 1] - ordered[:, kept]
        worst = ordered[:, kept - 1 : kept]
        outside = (group_scores < worst).unsqueeze(-1)
        choice = choice.view(rows, groups, -1).masked_fill(outside, -1.0).view(rows, -1)
    if module.top_k < experts:
        ordered = choice.sort(descending=True).values
        gaps = gaps.minimum(ordered[:, module.top_k - 1] - ordered[:, module.top_k])
    return gaps


def _write_fp32(checkpoint: Path, scratch: Path) -> None:
    scratch.mkdir(parents=True, exist_ok=True)
    document = json.loads((checkpoint / "config.json").read_text())
    document.pop("quantization_config", None)
    (scratch / "config.json").write_text(json.dumps(document))
    raw: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        raw |= load_file(path)
    weights = {
        name: _widen(tensor, raw.get(name + "_scale_inv"))
        for name, tensor in raw.items()
        if not name.endswith("_scale_inv")
    }
    save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})


def _widen(tensor: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    wide = tensor.to(torch.float32)
    if scales is not None:
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                block = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
                wide[block] *= scales[row, column]
    return wide


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns about zero-element shared experts and its own deprecations; neither is ours to fail on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
