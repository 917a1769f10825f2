"""Time every kernel on this machine's GPU against its floor and torch.

`PYTHONPATH=. python tests/bench/kernels_on_gpu.py OUT.json --commit HASH` writes one results file of kernels/results.
Times are device times of a replayed CUDA graph (device_time.py); weights
rotate over more than four times the L2. A floor counts every byte of weights, scales, input and output once, at the
file's own measured ceilings. An operation that fails becomes a record with its failure, never a silent gap.
"""

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import device_time as timing
import torch
import triton
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from kernels import expert_ffn, gate, mla_decode, mla_prefill, norm_rope, ops
from kernels.reference import expert_ffn as reference
from kernels.reference import gate as reference_gate
from kernels.reference.quant import dequantise, rows_view
from kernels.reference.quant import quantise as reference_quantise

WIDTH, TOP_K, EXPERTS = 7168, 8, 256
ROTATE_NBYTES = 260 << 20  # more than four times the L2 of an H200 (60 MB)
Record = dict[str, Any]


class Floor(NamedTuple):
    """Microseconds of the slowest of a card's units, steadily and in bursts (device_time)."""

    us: float
    burst_us: float


class Bench:
    """Ceilings of this card, and the records so far, written to `out` after each."""

    def __init__(self, out: Path, commit: str) -> None:
        self.out = out
        self.ceilings = {
            "read_bytes": timing.read_bandwidth(), "copy_bytes": timing.copy_bandwidth(),
            "bf16_flop": timing.bf16_peak(), "fp8_flop": timing.fp8_peak(),
        }  # fmt: skip
        self.records: list[Record] = []
        self.header = {
            "commit": commit,
            "card": torch.cuda.get_device_name(),
            "driver": _driver(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "ceilings": {f"{k}_per_s": c.per_s for k, c in self.ceilings.items()},
            "burst_ceilings": {f"{k}_per_s": c.burst_per_s for k, c in self.ceilings.items()},
            "ceilings_watts": {k: round(c.watts) for k, c in self.ceilings.items()},
            "power_limit_watts": timing.power_limit(),
        }

    def floor(self, *, read: float = 0, copy: float = 0, bf16: float = 0, fp8: float = 0) -> Floor:
        """The largest of the given work, each at its ceiling."""
        work = {"read_bytes": read, "copy_bytes": copy, "bf16_flop": bf16, "fp8_flop": fp8}
        return Floor(
            max(w / self.ceilings[k].per_s * 1e6 for k, w in work.items()),
            max(w / self.ceilings[k].burst_per_s * 1e6 for k, w in work.items()),
        )

    def add(
        self,
        op: str,
        shape: dict[str, int | str],
        calls: Sequence[Callable[[], object]],
        floor: Floor,
        peer: tuple[str, Sequence[Callable[[], object]]],
        error: Callable[[], float],
    ) -> None:
        """Measure an operation and its peer."""
        record: Record = {
            "op": op, "shape": shape, "floor_us": round(floor.us, 2), "burst_floor_us": round(floor.burst_us, 2),
        }  # fmt: skip
        try:
            record["error"] = error()
            ours = timing.time_calls(calls)
            record |= {
                "us": round(ours.us, 2),
                "spread_us": [round(ours.low_us, 2), round(ours.high_us, 2)],
                "watts": round(ours.watts),
                "mhz": round(ours.mhz),
                "burst_us": round(ours.burst_us, 2),
                "burst_mhz": round(ours.burst_mhz),
            }
        except Exception as failure:
            record |= {"us": None, "failure": f"{type(failure).__name__}: {failure}"[:300]}
        record["peer"] = peer[0]
        try:
            theirs = timing.time_calls(peer[1])
            record |= {
                "peer_us": round(theirs.us, 2),
                "peer_burst_us": round(theirs.burst_us, 2),
                "peer_watts": round(theirs.watts),
                "peer_mhz": round(theirs.mhz),
            }
        except Exception as failure:
            record |= {"peer_us": None, "peer_failure": str(failure)[:300]}
        self.records.append(record)
        self.out.write_text(json.dumps(self.header | {"records": self.records}, indent=1) + "\n")
        told = {k: v for k, v in record.items() if k not in ("op", "shape", "peer")}
        sys.stdout.write(f"{op} {shape} {told}\n")
        sys.stdout.flush()
        torch.cuda.empty_cache()


def _error(got: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(got.double() - expected) / torch.linalg.norm(expected))


def _copies(nbytes: int, most: int = 32) -> int:
    return max(2, min(most, ROTATE_NBYTES // nbytes + 1))


def _experts(hidden: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)

    def scales(*shape: int) -> Tensor:
        return torch.rand(*shape, device="cuda") * 0.02 + 0.01

    blocks = hidden // 128
    return [
        (weight(2 * hidden, WIDTH), scales(2 * blocks, WIDTH // 128),
         weight(WIDTH, hidden), scales(WIDTH // 128, blocks))
        for _ in range(_copies(3 * hidden * WIDTH))
    ]  # fmt: skip


def _exact_expert(q: Tensor, s: Tensor, weights: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    gate_up, gate_up_scales, down, down_scales = weights
    hidden = down.shape[1]
    w = reference.dequantise_weight(gate_up, gate_up_scales, halves=2).double()
    both = dequantise(q, s, torch.float64) @ w.t()
    h = reference_quantise((silu(both[:, :hidden]) * both[:, hidden:]).float())
    del w, both
    return (
        dequantise(*h, torch.float64) @ reference.dequantise_weight(down, down_scales).double().t()
    )


def _chain(x: Tensor, weights: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The library's way: quantise, block-scaled product, SwiGLU, quantise, block-scaled product."""
    q, s = ops.quantise(x)
    both = expert_ffn.scaled_product(q, s.t().contiguous().t(), *weights[:2])
    hidden = both.shape[1] // 2
    q, s = ops.quantise(silu(both[:, :hidden]) * both[:, hidden:])
    return expert_ffn.scaled_product(q, s.t().contiguous().t(), *weights[2:])


def bench_expert_ffn(bench, hidden, m, experts):
    """One whole expert on m rows."""
    x = torch.randn(m, WIDTH, device="cuda", dtype=torch.bfloat16)
    q, s = ops.quantise(x)
    x = torch.cat([x, x.new_zeros(-m % 4, WIDTH)])  # the library's chain takes rows by fours
    check = min(m, 512)
    nbytes = sum(t.nbytes for t in experts[0]) + q.nbytes + s.nbytes + 2 * m * WIDTH
    bench.add(
        "expert_ffn",
        {"rows": m, "width": WIDTH, "hidden": hidden},
        [lambda w=w: ops.expert_ffn(q, s, *w) for w in experts],
        bench.floor(read=nbytes, fp8=6 * m * WIDTH * hidden),
        (
            "quantise, scaled_mm, SwiGLU, quantise, scaled_mm",
            [lambda w=w: _chain(x, w) for w in experts],
        ),
        lambda: _error(
            ops.expert_ffn(q, s, *experts[0])[:check],
            _exact_expert(q[:check], s[:check], experts[0]),
        ),
    )


def bench_rows(bench: Bench, n: int) -> None:
    """quant, pack and combine of n rows."""
    xs = [
        torch.randn(n, WIDTH, device="cuda", dtype=torch.bfloat16)
        for _ in range(_copies(2 * n * WIDTH))
    ]
    row, scales, shape = WIDTH, WIDTH // 32, {"rows": n, "width": WIDTH}
    outs = [torch.empty(n * (row + scales), dtype=torch.uint8, device="cuda") for _ in xs]
    place = {"rows_offset": 0, "scales_offset": n * row}

    def quantised() -> float:
        ops.quantise_rows(xs[0], outs[0], **place)
        got = rows_view(outs[0], 0, n, WIDTH, torch.float8_e4m3fn)
        expected = reference_quantise(xs[0])[0]
        return float((got.view(torch.uint8) != expected.view(torch.uint8)).float().mean())

    bench.add(
        "quant", shape,
        [lambda x=x, o=o: ops.quantise_rows(x, o, **place) for x, o in zip(xs, outs, strict=True)],
        bench.floor(copy=n * (2 * WIDTH + row + scales)),
        ("torch, op by op", [lambda x=x: reference_quantise(x) for x in xs]), quantised,
    )  # fmt: skip
    index = torch.randperm(n, device="cuda").int()
    copies = [torch.empty_like(o) for o in outs]
    ends = {"row_nbytes": row, "source_offset": 0, "out_offset": 0, "scale_nbytes": scales,
            "source_scales": n * row, "out_scales": n * row}  # fmt: skip

    def packed() -> float:
        ops.pack(outs[0], copies[0], index, **ends)
        wanted = outs[0][: n * row].view(n, row)[index.long()].flatten()
        return float((copies[0][: n * row] != wanted).float().mean())

    bench.add(
        "pack", shape,
        [lambda a=a, b=b: ops.pack(a, b, index, **ends) for a, b in zip(outs, copies, strict=True)],
        bench.floor(copy=2 * n * (row + scales)),
        ("torch.index_select", [
            lambda a=a: a.view(n, row + scales).index_select(0, index) for a in outs]), packed,
    )  # fmt: skip


def bench_combine(bench: Bench, n: int) -> None:
    """combine of n rows with 8 pairs each."""
    nbytes = 2 * n * TOP_K * WIDTH
    sources = [
        torch.randn(n * TOP_K, WIDTH, device="cuda", dtype=torch.bfloat16)
        for _ in range(_copies(nbytes))
    ]
    slots = torch.randperm(n * TOP_K, device="cuda").view(n, TOP_K).int()
    weights = torch.rand(n, TOP_K, device="cuda")
    out = torch.empty(n, WIDTH, device="cuda", dtype=torch.bfloat16)

    def combined() -> float:
        ops.combine(sources[0], slots, weights, out)
        chosen = sources[0][slots[:64].long()].double()
        return _error(out[:64], (chosen * weights[:64].double().unsqueeze(-1)).sum(1))

    def eager(source: Tensor) -> Tensor:
        chosen = source.index_select(0, slots.flatten()).view(n, TOP_K, WIDTH)
        return torch.einsum("nkw,nk->nw", chosen, weights.bfloat16())

    bench.add(
        "combine", {"rows": n, "width": WIDTH, "top_k": TOP_K},
        [lambda s=s: ops.combine(s, slots, weights, out) for s in sources],
        bench.floor(copy=nbytes + 2 * n * WIDTH),
        ("torch, gather and einsum", [lambda s=s: eager(s) for s in sources]), combined,
    )  # fmt: skip
    if n <= 128:  # what the network has just written lies in L2
        bench.add(
            "combine", {"rows": n, "width": WIDTH, "top_k": TOP_K, "source": "in L2"},
            [lambda: ops.combine(sources[0], slots, weights, out)],
            bench.floor(copy=nbytes + 2 * n * WIDTH),
            ("torch, gather and einsum", [lambda: eager(sources[0])]), combined,
        )  # fmt: skip


def bench_gate(bench: Bench, n: int) -> None:
    """The V3 gate on ready logits."""
    logits = [torch.randn(n, EXPERTS, device="cuda") for _ in range(16)]
    bias = torch.randn(EXPERTS, device="cuda") * 0.1
    options = {"top_k": 8, "num_groups": 8, "top_k_groups": 4, "norm_topk_prob": True,
               "routed_scaling_factor": 2.5}  # fmt: skip
    eye = torch.eye(EXPERTS, device="cuda")

    def chosen() -> float:
        ids, weights = gate.choose(logits[0], bias, **options)
        want_ids, want = reference_gate.gate_v3(logits[0], eye, bias, **options)
        (ids, order), (want_ids, want_order) = ids.sort(1), want_ids.sort(1)
        same = bool((ids == want_ids).all())
        return (
            _error(weights.gather(1, order), want.gather(1, want_order).double()) if same else 1.0
        )

    bench.add(
        "gate", {"rows": n, "experts": EXPERTS},
        [lambda x=x: gate.choose(x, bias, **options) for x in logits],
        bench.floor(copy=n * (EXPERTS * 4 + 64)),
        ("torch, op by op", [lambda x=x: reference_gate.gate_v3(x, eye, bias, **options) for x in logits]),
        chosen,
    )  # fmt: skip


def bench_mla_decode(bench: Bench, requests: int, context: int, rope: int, *, fp8: bool) -> None:
    """One decode step over pages in random order; rope 64 is V3, 16 the reference model's 128 heads of 56."""
    heads, latent, page = 128, 512, 64
    pages = requests * context // page
    plain = [
        torch.randn(pages, page, latent + rope, device="cuda", dtype=torch.bfloat16)
        for _ in range(2)
    ]
    caches = [_fp8_cache(c, latent) if fp8 else c for c in plain]
    table = torch.randperm(pages, device="cuda").int().view(requests, -1)
    queries = torch.randn(requests, heads, latent + rope, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((requests,), context, device="cuda", dtype=torch.int32)
    scale = (128 + 64) ** -0.5 if rope == 64 else 56**-0.5

    def run(cache: Tensor) -> Tensor:
        return mla_decode.mla_decode_paged(
            queries, cache, table, lengths, scale=scale, latent=latent, max_context=context
        )

    def attended() -> float:
        keys = plain[0][table[1].long()].view(context, latent + rope).double()
        weights = torch.softmax(queries[1].double() @ keys.t() * scale, -1)
        return _error(run(caches[0])[1], weights @ keys[:, :latent])

    def library(
        cache: Tensor,
    ) -> Tensor:  # contiguous keys: the gather of pages is not charged to it
        keys = cache.view(requests, 1, context, latent + rope)
        return scaled_dot_product_attention(
            queries.unsqueeze(1), keys, keys[..., :latent], scale=scale
        )

    shape: dict[str, int | str] = {"rows": requests, "context": context, "heads": heads,
                                   "rope": rope, "cache": "fp8" if fp8 else "bf16"}  # fmt: skip
    bench.add(
        "mla_decode", shape, [lambda c=c: run(c) for c in caches],
        bench.floor(
            read=caches[0].nbytes + queries.nbytes + 2 * requests * heads * latent,
            bf16=2 * heads * requests * context * (2 * latent + rope),
        ),
        ("scaled_dot_product_attention, contiguous bf16 keys", [lambda c=c: library(c) for c in plain]),
        attended,
    )  # fmt: skip


def bench_mla_prefill(bench: Bench, rows: int) -> None:
    """One prompt of DeepSeek-V3's heads, keys and values expanded."""
    heads, width, value = 128, 192, 128
    q, k = (torch.randn(rows, heads, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(rows, heads, value, device="cuda", dtype=torch.bfloat16)
    starts = torch.tensor([0, rows], device="cuda", dtype=torch.int32)
    scale = width**-0.5

    def run() -> Tensor:
        return mla_prefill.mla_prefill_rows(q, k, v, starts, starts, scale=scale, max_rows=rows)

    def attended() -> float:
        last = rows - 1
        weights = torch.softmax(
            q[last].double().unsqueeze(1) @ k.double().permute(1, 2, 0) * scale, -1
        )
        return _error(run()[last], (weights @ v.double().transpose(0, 1)).squeeze(1))

    def library() -> Tensor:
        by_head = [t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
        return scaled_dot_product_attention(*by_head, is_causal=True, scale=scale)

    bench.add(
        "mla_prefill", {"rows": rows, "heads": heads, "qk": width, "v": value}, [run],
        bench.floor(bf16=heads * rows * (rows + 1) * (width + value)),
        ("scaled_dot_product_attention, causal", [library]), attended,
    )  # fmt: skip


def _fp8_cache(cache: Tensor, latent: int) -> Tensor:
    pages, page, width = cache.shape
    out = torch.zeros(
        pages, page, latent + latent // 32 + 2 * (width - latent), dtype=torch.uint8, device="cuda"
    )
    slots = torch.arange(pages * page, device="cuda")
    norm_rope.cache_write(cache.view(-1, width), out, slots, latent=latent)
    return out


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def main() -> None:
    """Measure everything and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", required=True, help="hash of the code that runs")
    given = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(given.out, given.commit)
    sys.stdout.write(f"{bench.ceilings}\n")
    for n in (128, 4096):
        bench_rows(bench, n)
        bench_combine(bench, n)
    bench_gate(bench, 128)
    for rope, fp8 in ((64, False), (64, True), (16, False)):
        bench_mla_decode(bench, 64, 4096, rope, fp8=fp8)
    bench_mla_prefill(bench, 4096)
    for hidden in (2048, 18432):
        experts = _experts(hidden)
        for m in (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
            bench_expert_ffn(bench, hidden, m, experts)


if __name__ == "__main__":
    main()
