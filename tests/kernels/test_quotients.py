"""The division inside quantisation on the GPU, its own steps on the CPU with every operation rounded once."""

import math
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
import torch

from kernels.quant import quotients
from kernels.reference.quant import SCALE_MIN


def fused(a, b, c):
    """a * b + c: the product is whole in 64 bits of mantissa, the sum is rounded to them and then to fp32."""
    return (np.longdouble(a) * b + c).astype(np.float32)


def steps(x, scale, ulps):
    """`quotients` with a reciprocal that is wrong by so many steps of fp32."""

    def reciprocal(_text, _constraints, inputs, **_options):
        inverse = np.float32(1) / inputs[0]
        return np.nextafter(inverse, np.float32(math.inf * ulps)) if ulps else inverse

    def where(condition, a, b):
        return np.where(condition, np.float32(a), np.float32(b))

    language = SimpleNamespace(
        where=where, fma=fused, inline_asm_elementwise=reciprocal, float32=np.float32
    )
    function = FunctionType(quotients.fn.__code__, {"tl": language, "float": float})
    with np.errstate(all="ignore"):
        return function(x, scale)


def codes(x):
    return torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8)


def half_way():
    """Numbers half-way between neighbours in e4m3, and half of the least."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    return (numbers[1:] + numbers[:-1]) / 2


@pytest.mark.parametrize("ulps", [-1, 0, 1])
@pytest.mark.parametrize("exponent", [-126, -125, -100, -65, -64, -63, 0, 60, 112])
def test_a_quotient_half_way_is_rounded_as_the_exact_one(exponent, ulps):
    scale = (np.arange(1, 128, 2) * 2.0**exponent).astype(np.float32)
    x = (half_way()[None] * scale[:, None]).astype(np.float32)
    for near in (x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(math.inf))):
        for signed in (near, -near):
            with np.errstate(all="ignore"):
                expected = signed / scale[:, None]
            assert torch.equal(codes(steps(signed, scale, ulps)), codes(expected))


@pytest.mark.parametrize("ulps", [-1, 0, 1])
def test_a_quotient_has_the_bits_of_a_division(ulps):
    generator = np.random.default_rng(0)
    scale = np.ldexp(generator.uniform(1, 2, 4000), generator.integers(-126, 119, 4000))
    scale = np.maximum(scale.astype(np.float32), np.float32(SCALE_MIN))
    scale[:2] = math.inf, math.nan
    with np.errstate(all="ignore"):
        x = (generator.uniform(-448, 448, (4000, 16)) * scale[:, None]).astype(np.float32)
        x[:, :4] = 0.0, -0.0, 1e-40, -1e-40
        x[0, 4:] = 3.0
        x[0, 5] = math.inf
        expected = x / scale[:, None]
    got = steps(x, scale, ulps)
    assert torch.equal(codes(got[1:]), codes(expected[1:]))
    assert np.array_equal(got[0], expected[0], equal_nan=True)  # zeros of either sign, and NaN
    kept = (np.abs(expected) > 2.0**-10) & np.isfinite(expected)  # others become zero
    assert np.array_equal(got[kept], expected[kept])
