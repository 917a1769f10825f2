"""RMS norm, rotary embedding and the write into the latent cache: one pass over memory each, one program per row.

Semantics: kernels/reference/{norm,rope,cache}.py. Floor: bytes in and out / copy bandwidth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quant import quantise_blocks
from kernels.reference.quant import SCALE_MIN


@triton.jit
def _normalise(x, weight, eps, width, DTYPE: tl.constexpr):
    """weight * x / rms(x) over one row: rounded to the row's dtype before the weight, as transformers does."""
    mean = tl.sum(x * x, 0) / width
    return (x * tl.rsqrt(mean + eps)).to(DTYPE).to(tl.float32) * weight


@triton.jit
def _rotate(X, OUT, COS, SIN, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """One rotated vector of 2 * HALF: real halves, then imaginary halves."""
    i = tl.arange(0, HALF)
    if INTERLEAVED:
        real, imaginary = tl.load(X + 2 * i).to(tl.float32), tl.load(X + 2 * i + 1).to(tl.float32)
    else:
        real, imaginary = tl.load(X + i).to(tl.float32), tl.load(X + HALF + i).to(tl.float32)
    cos, sin = tl.load(COS + i).to(tl.float32), tl.load(SIN + i).to(tl.float32)
    tl.store(OUT + i, real * cos - imaginary * sin)
    tl.store(OUT + HALF + i, imaginary * cos + real * sin)


@triton.jit
def _rms_norm(X, WEIGHT, OUT, eps, width, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, C)
    x = tl.load(X + row * width + i, mask=i < width, other=0.0).to(tl.float32)
    weight = tl.load(WEIGHT + i, mask=i < width, other=0.0).to(tl.float32)
    y = _normalise(x, weight, eps, width, X.dtype.element_ty)
    tl.store(OUT + row * width + i, y, mask=i < width)


@triton.jit
def _norm_rope(
    X, WEIGHT, COS, SIN, OUT, eps, x_stride, LATENT: tl.constexpr, C: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, C)
    x = tl.load(X + row * x_stride + i, mask=i < LATENT, other=0.0).to(tl.float32)
    weight = tl.load(WEIGHT + i, mask=i < LATENT, other=0.0).to(tl.float32)
    out = OUT + row * (LATENT + 2 * HALF)
    tl.store(out + i, _normalise(x, weight, eps, LATENT, X.dtype.element_ty), mask=i < LATENT)
    _rotate(
        X + row * x_stride + LATENT,
        out + LATENT,
        COS + row * HALF,
        SIN + row * HALF,
        HALF,
        INTERLEAVED,
    )


@triton.jit
def _cache_write(ENTRIES, CACHE, SLOTS, width, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + row)
    i = tl.arange(0, C)
    if slot >= 0:
        x = tl.load(ENTRIES + row * width + i, mask=i < width)
        tl.store(CACHE + slot * width + i, x, mask=i < width)


@triton.jit
def _cache_write_fp8(
    ENTRIES, CACHE, SLOTS, LATENT: tl.constexpr, ROPE: tl.constexpr, MIN: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + row)
    if slot >= 0:
        BLOCKS: tl.constexpr = LATENT // 128
        entry = CACHE + slot * (LATENT + LATENT // 32 + 2 * ROPE)
        source = ENTRIES + row * (LATENT + ROPE)
        block = tl.arange(0, BLOCKS)
        at = block[:, None] * 128 + tl.arange(0, 128)[None, :]
        q, scale = quantise_blocks(tl.load(source + at).to(tl.float32), MIN)
        tl.store(entry.to(tl.pointer_type(tl.float8e4nv)) + at, q)
        tl.store((entry + LATENT).to(tl.pointer_type(tl.float32)) + block, scale)
        i = tl.arange(0, ROPE)
        rotated = (entry + LATENT + LATENT // 32).to(tl.pointer_type(tl.bfloat16))
        tl.store(rotated + i, tl.load(source + LATENT + i))


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension of x [..., width] (contiguous), in x's dtype."""
    out = torch.empty_like(x) if out is None else out
    width = x.shape[-1]
    if x.numel():
        columns = triton.next_power_of_2(width)
        warps = max(1, min(16, columns // 512))
        _rms_norm[(x.numel() // width,)](x, weight, out, eps, width, columns, num_warps=warps)
    return out


def norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float, interleaved: bool
) -> Tensor:
    """Cache entries from x [rows, latent + rope]: the latent part normalised, the rest rotated; x's dtype.

    weight [latent]; cos and sin fp32 [rows, rope / 2], rope a power of two.
    """
    rows, width = x.shape
    latent, half = weight.shape[0], cos.shape[-1]
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        _norm_rope[(rows,)](
            x, weight, cos, sin, out, eps, x.stride(0), latent, triton.next_power_of_2(latent),
            half, interleaved, num_warps=4,
        )  # fmt: skip
    return out


def cache_write(entries: Tensor, cache: Tensor, slots: Tensor, *, latent: int) -> None:
    """Write entries [rows, latent + rope] to their cache slots; a slot of -1 is skipped.

    cache [pages, page tokens, latent + rope] in the dtype of the entries, or the FP8 form (uint8) of mla_decode, for
    bf16 entries; slots int64 [rows] = page * page tokens + token. Slots must be distinct.
    """
    rows, width = entries.shape
    if rows == 0:
        return
    if cache.dtype is torch.uint8:
        _cache_write_fp8[(rows,)](
            entries, cache, slots, latent, width - latent, SCALE_MIN, num_warps=4
        )
    else:
        _cache_write[(rows,)](
            entries, cache, slots, width, triton.next_power_of_2(width), num_warps=4
        )
