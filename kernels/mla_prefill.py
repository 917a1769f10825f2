"""Causal attention of prompt rows whose keys and values were expanded from the latent, sequences of any length.

One program per 128 rows of one sequence and one head; pages of 64 keys in ascending order with a running softmax
(arXiv 2205.14135), so a row's bits depend on its own position and context alone. Where the widths allow, prefill_hopper
does it. Floor: FLOP / bf16 peak.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import prefill_hopper
from kernels.hopper import blocks_of

_LOG2_E = 1.4426950408889634
_BLOCKS = (128, 64, 3, 8)  # rows and keys of a step, stages, warps


@triton.jit
def _prefill(
    Q, K, V, OUT, STARTS_Q, STARTS_K, scale2, heads, QK: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """QK columns are taken as A + B, both padded to powers of two, so that 192 costs no padding to 256."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    q0, q1 = tl.load(STARTS_Q + sequence), tl.load(STARTS_Q + sequence + 1)
    k0, k1 = tl.load(STARTS_K + sequence), tl.load(STARTS_K + sequence + 1)
    # The longest tiles first: they decide when the grid ends.
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    if m0 >= q1 - q0:
        return
    before = (k1 - k0) - (q1 - q0)  # tokens of context in front of the first row
    m = m0 + tl.arange(0, BM)
    m_ok = m < q1 - q0
    a, b, dv = tl.arange(0, A), tl.arange(0, B), tl.arange(0, DVP)
    b_ok = A + b < QK
    q_at = Q + ((q0 + m).to(tl.int64) * heads + head)[:, None] * QK
    qa = tl.load(q_at + a[None, :], mask=m_ok[:, None], other=0.0)
    qb = tl.load(q_at + A + b[None, :], mask=m_ok[:, None] & b_ok[None, :], other=0.0)
    acc = tl.zeros((BM, DVP), tl.float32)
    maximum = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    end = tl.minimum(before + m0 + BM, k1 - k0)
    whole = (before + m0 + 1) // BN * BN  # keys that every row of the tile sees
    k_at = K + (k0.to(tl.int64) * heads + head) * QK
    v_at = V + (k0.to(tl.int64) * heads + head) * DV
    n = tl.arange(0, BN)
    for n0 in tl.range(0, whole, BN, num_stages=STAGES):
        row = (n0 + n).to(tl.int64)[:, None] * heads
        ka = tl.load(k_at + row * QK + a[None, :])
        kb = tl.load(k_at + row * QK + A + b[None, :], mask=b_ok[None, :], other=0.0)
        v = tl.load(v_at + row * DV + dv[None, :], mask=(dv < DV)[None, :], other=0.0)
        scores = tl.dot(qb, kb.T, tl.dot(qa, ka.T))
        new = tl.maximum(maximum, tl.max(scores, 1) * scale2)
        shrink = tl.exp2(maximum - new)
        weight = tl.exp2(scores * scale2 - new[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None])
        maximum = new
    for n0 in tl.range(whole, end, BN, num_stages=1):
        row = (n0 + n).to(tl.int64)[:, None] * heads
        n_ok = (n0 + n < k1 - k0)[:, None]
        ka = tl.load(k_at + row * QK + a[None, :], mask=n_ok, other=0.0)
        kb = tl.load(k_at + row * QK + A + b[None, :], mask=n_ok & b_ok[None, :], other=0.0)
        v = tl.load(v_at + row * DV + dv[None, :], mask=n_ok & (dv < DV)[None, :], other=0.0)
        scores = tl.dot(qb, kb.T, tl.dot(qa, ka.T))
        scores = tl.where((n0 + n)[None, :] <= before + m[:, None], scores, float("-inf"))
        new = tl.maximum(maximum, tl.max(scores, 1) * scale2)
        shrink = tl.exp2(maximum - new)
        weight = tl.exp2(scores * scale2 - new[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None])
        maximum = new
    at = OUT + ((q0 + m).to(tl.int64) * heads + head)[:, None] * DV + dv[None, :]
    tl.store(at, acc / total[:, None], mask=m_ok[:, None] & (dv < DV)[None, :])


def _halves(width: int) -> tuple[int, int]:
    """Two powers of two that cover `width` columns: 192 = 128 + 64, 56 = 32 + 24 (32)."""
    first = 1 << (width.bit_length() - 1)
    return (first // 2, first // 2) if first == width else (first, max(16, _padded(width - first)))


def _padded(width: int) -> int:
    return 1 << (width - 1).bit_length()


def mla_prefill_rows(
    queries: Tensor, keys: Tensor, values: Tensor, starts_q: Tensor, starts_k: Tensor, *,
    scale: float, max_rows: int,
) -> Tensor:  # fmt: skip
    """Causal attention: bf16 [rows, heads, v] for queries bf16 [rows, heads, qk] of several sequences.

    keys [tokens, heads, qk] and values [tokens, heads, v], bf16; sequence i has queries starts_q[i] .. starts_q[i + 1]
    (int32 [sequences + 1]) and keys starts_k[i] .. starts_k[i + 1], its queries being the last of its tokens; no
    sequence has more than `max_rows` queries.
    """
    rows, heads, width = queries.shape
    value_width = values.shape[-1]
    out = torch.empty(rows, heads, value_width, dtype=queries.dtype, device=queries.device)
    if rows and width in prefill_hopper.WIDTHS and value_width in prefill_hopper.VALUE_WIDTHS:
        block, keys_block = prefill_hopper.ROWS, prefill_hopper.KEYS.value
        grid = (triton.cdiv(max_rows, block), heads, starts_q.shape[0] - 1)
        prefill_hopper.attend_rows[grid](
            blocks_of(queries.flatten(1), 64, 64), blocks_of(keys.flatten(1), keys_block, 64),
            blocks_of(values.flatten(1), keys_block, value_width), out, starts_q, starts_k,
            scale * _LOG2_E, heads, width // 64, value_width, num_warps=4, maxnreg=168,
        )  # fmt: skip
    elif rows:
        first, second = _halves(width)
        block, keys_block, stages, warps = _BLOCKS
        grid = (triton.cdiv(max_rows, block), heads, starts_q.shape[0] - 1)
        _prefill[grid](
            queries, keys, values, out, starts_q, starts_k, scale * _LOG2_E, heads, width, first,
            second, value_width, triton.next_power_of_2(value_width), block, keys_block, stages,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
