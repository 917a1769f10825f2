"""Causal attention of prompt rows whose keys and values were expanded from the latent, sequences of any length.

Floor: FLOP / bf16 peak.
"""

import torch
import triton
from torch import Tensor

from kernels import mla_prefill_hopper
from kernels.hopper import blocks_of

_LOG2_E = 1.4426950408889634


def mla_prefill_rows(
    queries: Tensor, keys: Tensor, values: Tensor, starts_q: Tensor, starts_k: Tensor, *,
    scale: float, max_rows: int,
) -> Tensor:  # fmt: skip
    """Causal attention: bf16 [rows, heads, v] for queries bf16 [rows, heads, qk] of several sequences.

    keys [tokens, heads, qk] and values [tokens, heads, v], bf16; sequence i has queries starts_q[i] .. starts_q[i + 1]
    (int32 [sequences + 1]) and keys starts_k[i] .. starts_k[i + 1], its queries being the last of its tokens; no
    sequence has more than `max_rows` queries. All contiguous.
    Raises ValueError for qk and v that are no multiples of 8 or above 192 and 128.
    """
    rows, heads, width = queries.shape
    value_width = values.shape[-1]
    if width % 8 or value_width % 8 or width > 192 or value_width > 128:
        raise ValueError(
            f"queries of {width} and values of {value_width} columns must have multiples of 8, at most 192 and 128"
        )
    value_parts = -(-value_width // 64)
    parts = max(-(-width // 64), value_parts)
    out = torch.empty(rows, heads, value_width, dtype=queries.dtype, device=queries.device)
    if rows:
        keys_block = mla_prefill_hopper.KEYS.value
        grid = (triton.cdiv(max_rows, mla_prefill_hopper.ROWS), heads, starts_q.shape[0] - 1)
        mla_prefill_hopper.attend_rows[grid](
            blocks_of(queries, 64, 1, 64), blocks_of(keys, keys_block, 1, 64),
            blocks_of(values, keys_block, 1, 64), out, starts_q, starts_k, scale * _LOG2_E, heads,
            value_width, parts, value_parts, num_warps=4, maxnreg=168,
        )  # fmt: skip
    return out
