"""Trains the demo model: a small DeepSeek-V3 (MLA, sigmoid gate with groups and correction bias, FP8 weights).

    python -m deploy.demo.train --data build/demo --out build/demo/model

The file holds the whole recipe: the model, written for training and not for serving; batches; the loop; the export to
`model.safetensors` and `config.json` as DeepSeek-V3 stores them. Weights are rounded to FP8 in 128x128 blocks in every
forward pass from the first step on (straight-through gradient), so the exported model is the one that was trained.
Formulas: DeepSeek-V3 technical report (arXiv 2412.19437), sections 2.1 and 3.3; transformers, `models/deepseek_v3`.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as fn

from common.model.writer import quantise_blocks
from deploy.demo import fp8

SOURCES = {"sotu": 0.66, "moby": 0.09, "docs": 0.25}  # share of the sequences of a batch
BIAS_SPEED = 1e-3  # V3's gamma: what an overloaded expert's correction bias loses per step
BOS = 0
DEFAULTS = {"steps": 4300, "batch": 40, "length": 1024, "rate": 3e-3, "decay": 1.2, "dropout": 0.15}
DEFAULTS |= {"max-seconds": 1200.0, "eval-every": 430, "seed": 1}


@dataclass(frozen=True, slots=True)
class Shape:
    """The model's sizes, under the names of Hugging Face's config.json. Multiples of 128 keep FP8 blocks whole."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 6
    first_k_dense_replace: int = 1
    intermediate_size: int = 1024
    moe_intermediate_size: int = 128
    n_routed_experts: int = 16
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    n_shared_experts: int = 1
    routed_scaling_factor: float = 2.0
    norm_topk_prob: bool = True
    num_attention_heads: int = 8
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 1024


class Linear(nn.Module):
    """x [..., in] -> [..., out] through FP8-rounded weights."""

    def __init__(self, num_in: int, num_out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_out, num_in) * 0.04 * scale)

    def forward(self, x: Tensor) -> Tensor:
        return fn.linear(x, fp8.rounded(self.weight))


class Norm(nn.Module):
    """RMSNorm over the last dimension, computed in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return fn.rms_norm(x.float(), self.weight.shape, self.weight, 1e-6).to(x.dtype)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of [batch, heads, tokens, dim] over interleaved pairs (2i, 2i+1), positions from 0."""
    half = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=torch.float32) / x.shape[-1]
    angle = torch.arange(x.shape[-2], device=x.device).float()[:, None] * theta**-half
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    cos, sin = angle.cos(), angle.sin()  # [tokens, dim / 2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention: queries and keys/values pass through narrow latents, one rotary key per token."""

    def __init__(self, s: Shape, residual_scale: float) -> None:
        super().__init__()
        self.s = s
        heads, nope, rope = s.num_attention_heads, s.qk_nope_head_dim, s.qk_rope_head_dim
        self.q_a_proj = Linear(s.hidden_size, s.q_lora_rank)
        self.q_a_layernorm = Norm(s.q_lora_rank)
        self.q_b_proj = Linear(s.q_lora_rank, heads * (nope + rope))
        self.kv_a_proj_with_mqa = Linear(s.hidden_size, s.kv_lora_rank + rope)
        self.kv_a_layernorm = Norm(s.kv_lora_rank)
        self.kv_b_proj = Linear(s.kv_lora_rank, heads * (nope + s.v_head_dim))
        self.o_proj = Linear(heads * s.v_head_dim, s.hidden_size, residual_scale)

    def forward(self, x: Tensor) -> Tensor:
        s = self.s
        nope = s.qk_nope_head_dim
        heads = (*x.shape[:2], s.num_attention_heads, -1)
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(heads).transpose(1, 2)
        q_nope, q_rope = q[..., :nope], q[..., nope:]  # [batch, heads, tokens, width]
        compressed = self.kv_a_proj_with_mqa(x)
        latent, k_rope = compressed[..., : s.kv_lora_rank], compressed[..., s.kv_lora_rank :]
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(heads).transpose(1, 2)
        k_nope, v = kv[..., :nope], kv[..., nope:]
        k_rope = rotate(k_rope[:, None], s.rope_theta).expand_as(q_rope)
        q = torch.cat((q_nope, rotate(q_rope, s.rope_theta)), -1)
        out = fn.scaled_dot_product_attention(q, torch.cat((k_nope, k_rope), -1), v, is_causal=True)
        y: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return y


class Mlp(nn.Module):
    """SwiGLU: down(fn.silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int, residual_scale: float) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden)
        self.up_proj = Linear(width, hidden)
        self.down_proj = Linear(hidden, width, residual_scale)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(fn.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Gate(nn.Module):
    """Which experts, with what weight. `bias` steers the choice and never the weight (V3, section 2.1.2)."""

    bias: Tensor
    load: Tensor

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.weight = nn.Parameter(torch.randn(s.n_routed_experts, s.hidden_size) * 0.04)
        self.register_buffer("bias", torch.zeros(s.n_routed_experts))
        self.register_buffer("load", torch.zeros(s.n_routed_experts))  # rows of the last batch

    def forward(self, x: Tensor) -> Tensor:
        """[rows, hidden] -> weights [rows, experts], zero where an expert was not chosen."""
        s = self.s
        with torch.autocast(x.device.type, enabled=False):
            scores = fn.linear(x.float(), self.weight).sigmoid()
        with torch.no_grad():
            choice = scores + self.bias
            groups = choice.view(len(x), s.n_group, -1).topk(2).values.sum(-1)
            kept = torch.zeros_like(groups).scatter(1, groups.topk(s.topk_group).indices, 1.0)
            kept = kept.repeat_interleave(s.n_routed_experts // s.n_group, 1)
            chosen = choice.masked_fill(kept == 0, -math.inf).topk(s.num_experts_per_tok).indices
            mask = torch.zeros_like(scores).scatter(1, chosen, 1.0)
            if self.training:
                self.load.copy_(mask.sum(0))
        weights = scores * mask
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * s.routed_scaling_factor

    @torch.no_grad()
    def balance(self) -> None:
        """Auxiliary-loss-free balancing: overloaded experts become less attractive, the others more."""
        self.bias += BIAS_SPEED * (self.load.mean() - self.load).sign()


class Moe(nn.Module):
    """Routed experts and the shared one.

    All experts compute every row and the gate's zeros discard what was not chosen: three plain products over the
    concatenated experts. At 16 experts of width 128 that is faster on a large GPU than sorting rows by expert.
    """

    def __init__(self, s: Shape, residual_scale: float) -> None:
        super().__init__()
        experts, hidden, width = s.n_routed_experts, s.moe_intermediate_size, s.hidden_size
        self.gate = Gate(s)
        self.gate_proj = nn.Parameter(torch.randn(experts, hidden, width) * 0.04)
        self.up_proj = nn.Parameter(torch.randn(experts, hidden, width) * 0.04)
        self.down_proj = nn.Parameter(torch.randn(experts, width, hidden) * 0.04 * residual_scale)
        self.shared_experts = Mlp(width, hidden * s.n_shared_experts, residual_scale)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # [rows, hidden]
        weights = self.gate(rows).to(x.dtype)
        gated = fn.silu(fn.linear(rows, fp8.rounded(self.gate_proj).flatten(0, 1)))
        hidden = gated * fn.linear(rows, fp8.rounded(self.up_proj).flatten(0, 1))
        hidden = (hidden.view(*weights.shape, -1) * weights[..., None]).flatten(1)
        down = fp8.rounded(self.down_proj).transpose(1, 2).flatten(0, 1)  # [experts * moe, hidden]
        y: Tensor = fn.linear(hidden, down.T).view_as(x) + self.shared_experts(x)
        return y


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual and dropout."""

    def __init__(self, s: Shape, index: int, dropout: float) -> None:
        super().__init__()
        scale = (2 * s.num_hidden_layers) ** -0.5
        self.input_layernorm = Norm(s.hidden_size)
        self.self_attn = Attention(s, scale)
        self.post_attention_layernorm = Norm(s.hidden_size)
        dense = index < s.first_k_dense_replace
        self.mlp = Mlp(s.hidden_size, s.intermediate_size, scale) if dense else Moe(s, scale)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x)))
        y: Tensor = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return y


class Model(nn.Module):
    """Token ids [batch, tokens + 1] -> mean next-token cross-entropy. The output head is the embedding."""

    def __init__(self, s: Shape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab_size, s.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(s, i, dropout) for i in range(s.num_hidden_layers))
        self.norm = Norm(s.hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.embed_tokens(ids[:, :-1]))
        for layer in self.layers:
            x = layer(x)
        logits = fn.linear(self.norm(x), self.embed_tokens.weight)
        return fn.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    def gates(self) -> Iterator[Gate]:
        """The gates of the MoE layers, in order."""
        return (module for module in self.modules() if isinstance(module, Gate))


class Batches:
    """Random windows of the training arrays, kept on the device. Half of them start where a document does."""

    def __init__(self, folder: Path, length: int, device: str, seed: int) -> None:
        self._length = length
        self._rng = torch.Generator(device).manual_seed(seed)
        self._device = device
        self._window = torch.arange(length + 1, device=device)
        self._tokens, self._starts = [], []
        for source in SOURCES:
            tokens = load_tokens(folder / f"train_{source}.bin").to(device)
            starts = (tokens == BOS).nonzero().flatten()
            self._tokens.append(tokens)
            self._starts.append(starts[starts < len(tokens) - length - 1])

    def draw(self, batch: int) -> Tensor:
        """[batch, length + 1], each source in its share."""
        rows = []
        shares = np.diff(np.round(np.cumsum([0.0, *SOURCES.values()]) * batch)).astype(int)
        for tokens, starts, share in zip(self._tokens, self._starts, shares, strict=True):
            where = self._random(len(tokens) - self._length - 1, share)
            where[::2] = starts[self._random(len(starts), share)[::2]]
            rows.append(tokens[where[:, None] + self._window])
        return torch.cat(rows).long()

    def _random(self, high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=self._rng, device=self._device)


def load_tokens(path: Path) -> Tensor:
    """A uint16 file as int32."""
    return torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int32))


@torch.no_grad()
def evaluate(model: Model, folder: Path, length: int, device: str) -> dict[str, float]:
    """Held-out loss in nats per token, by source (at most 32 windows each)."""
    model.eval()
    losses = {}
    for source in SOURCES:
        tokens = load_tokens(folder / f"val_{source}.bin").to(device).long()
        count = min(32, (len(tokens) - 1) // length)
        windows = tokens[: count * length + 1].unfold(0, length + 1, length)  # [count, length + 1]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            losses[source] = sum(model(window[None]).item() for window in windows) / count
    model.train()
    return losses


def export(model: Model, shape: Shape, folder: Path) -> None:
    """Write model.safetensors (FP8 blocks; embeddings, norms and gates in bf16) and config.json as V3 has them."""
    tensors: dict[str, Tensor] = {}

    def put(name: str, weight: Tensor) -> None:
        quantized, scale = quantise_blocks(weight.detach(), fp8.BLOCK)
        tensors[f"{name}.weight"] = quantized.cpu().contiguous()
        tensors[f"{name}.weight_scale_inv"] = scale.cpu().contiguous()

    for path, module in model.named_modules():
        name = f"model.{path}"
        if isinstance(module, Linear):
            put(name, module.weight)
        elif isinstance(module, Norm | nn.Embedding | Gate):
            tensors[f"{name}.weight"] = module.weight.detach().to(torch.bfloat16).cpu()
        if isinstance(module, Gate):
            # Only differences matter; a minimum of 0 keeps every score + bias positive for any reader.
            bias = module.bias - module.bias.min()
            tensors[f"{name}.e_score_correction_bias"] = bias.cpu()
        if isinstance(module, Moe):
            for i in range(shape.n_routed_experts):
                for part in ("gate_proj", "up_proj", "down_proj"):
                    put(f"{name}.experts.{i}.{part}", getattr(module, part)[i])
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  {weights.name}\n")  # atoll doctor compares
    config = json.loads(Path(__file__).with_name("config.base.json").read_text()) | asdict(shape)
    config["num_key_value_heads"] = shape.num_attention_heads
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_optimizer(model: Model, rate: float, decay: float) -> torch.optim.Optimizer:
    """AdamW; matrices decay (strongly: the text is seen some 50 times), norms do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def train(args: argparse.Namespace) -> None:
    """The loop. The learning rate falls with the larger of steps done and time used, so it always ends low."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape()
    model = Model(shape, args.dropout).to(device)
    batches = Batches(args.data, args.length, device, args.seed)
    optimizer = make_optimizer(model, args.rate, args.decay)
    compiled = torch.compile(model) if args.compile else model
    args.out.mkdir(parents=True, exist_ok=True)
    log, began, step, progress = "", time.perf_counter(), 0, 0.0
    loss = torch.zeros(())
    while progress < 1.0:
        progress = max((step + 1) / args.steps, (time.perf_counter() - began) / args.max_seconds)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, (step + 1) / 200) * (0.01 + 0.99 * cosine)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = compiled(batches.draw(args.batch))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if progress < 0.9:
            for gate in model.gates():
                gate.balance()
        step += 1
        if step % args.eval_every == 0 or progress >= 1.0:
            seconds = time.perf_counter() - began
            held_out = evaluate(model, args.data, args.length, device)
            log += report(step, seconds, loss.item(), held_out, model)
            export(model, shape, args.out)
    fp8.rounding = False
    held_out = evaluate(model, args.data, args.length, device)
    log += report(step, time.perf_counter() - began, loss.item(), held_out, model)
    (args.out / "log.jsonl").write_text(log)


def report(step: int, seconds: float, loss: float, held_out: dict[str, float], model: Model) -> str:
    """One line of the log, printed too. Losses in nats per token; load of the last batch, worst layer."""
    skew = max((gate.load.max() / gate.load.mean()).item() for gate in model.gates())
    record: dict[str, float] = {"step": step, "seconds": seconds, "loss": loss, "fp8": fp8.rounding}
    record |= {f"held_out_{source}": value for source, value in held_out.items()} | {"skew": skew}
    line = json.dumps({key: round(value, 4) for key, value in record.items()})
    print(line, flush=True)
    return line + "\n"


def main() -> None:
    """Parse the command line and train. The defaults are those of the shipped model."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
