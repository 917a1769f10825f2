"""FP8 rows: against float64 arithmetic, odd shapes, outliers, bad numbers, poisoned buffers."""

import pytest
import torch

from kernels.reference.quant import dequantise_rows, quantise, quantise_rows, rows_view

ROWS = (1, 3, 127, 129, 1000)
WIDTHS = (128, 56, 200, 448)


def layout(n, width):
    """Offsets as common.wire.blocks lays them out, behind 32 bytes that must stay untouched."""
    rows, blocks = 32, -(-width // 128)
    scales = -(-(rows + n * width) // 16) * 16
    return rows, scales, scales + n * blocks * 4 + 32


def values(n, width, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g) * torch.rand(n, 1, generator=g).exp2().pow(8)
    x[torch.rand(n, width, generator=g) < 0.002] *= 1e3  # outliers as activations have them
    x[n // 2] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", ROWS)
def test_rows_come_back_within_half_an_e4m3_step(n, width, dtype):
    x = values(n, width, dtype, seed=n * width)
    rows, scales, end = layout(n, width)
    payload = torch.full((end,), 0xFF, dtype=torch.uint8)  # 0xff is NaN in e4m3
    quantise_rows(x, payload, rows_offset=rows, scales_offset=scales)
    back = dequantise_rows(
        payload,
        num_rows=n,
        width=width,
        rows_offset=rows,
        scales_offset=scales,
        dtype=torch.float64,
    )
    exact = x.double()
    amax = torch.stack([b.abs().amax(1) for b in exact.split(128, dim=1)], 1)
    step = amax.repeat_interleave(128, 1)[:, :width] / 448 * 2**-9  # subnormal spacing 2^-9
    bound = torch.maximum(exact.abs() * 2**-4, step / 2) * (1 + 1e-6)
    assert torch.all((back - exact).abs() <= bound)
    assert torch.all(payload[:32] == 0xFF)
    assert torch.all(payload[-32:] == 0xFF)


def test_the_largest_number_of_a_block_is_kept_exactly_to_fp32():
    x = values(50, 256, torch.float32, seed=1)
    rows, scales = quantise(x)
    peak = x.view(50, 2, 128).abs().amax(-1)
    assert torch.all(rows.float().view(50, 2, 128).abs().amax(-1)[peak > 0] == 448)
    assert torch.allclose(scales[peak > 0], peak[peak > 0] / 448, rtol=1e-7, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_number_spoils_its_block_and_no_other(bad):
    x = torch.randn(3, 300)
    x[1, 200] = bad
    rows, scales = quantise(x)
    back = rows.float() * scales.repeat_interleave(128, 1)[:, :300]
    assert back[1, 128:256].isnan().all()
    assert back[[0, 2]].isfinite().all()
    assert back[1, :128].isfinite().all()


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38, 3e-37])
def test_tiny_rows_stay_finite(tiny):
    rows, scales = quantise(torch.full((2, 128), tiny))
    assert (rows.float() * scales).isfinite().all()
    assert (scales > 0).all()


def test_a_row_depends_on_no_other_row():
    x = values(1000, 200, torch.bfloat16, seed=3)
    whole = quantise(x)
    for n in (1, 3, 127):
        part = quantise(x[:n])
        assert torch.equal(part[0].view(torch.uint8), whole[0][:n].view(torch.uint8))
        assert torch.equal(part[1], whole[1][:n])


def test_no_rows_and_too_small_a_payload():
    payload = torch.zeros(64, dtype=torch.uint8)
    quantise_rows(torch.empty(0, 128), payload, rows_offset=0, scales_offset=0)
    with pytest.raises(RuntimeError):
        quantise_rows(torch.ones(1, 128), payload, rows_offset=0, scales_offset=128)
    with pytest.raises(RuntimeError):
        rows_view(payload, 2, 1, 4, torch.float32)


def test_mutation_a_wrong_block_is_seen():
    """The bound above must fail for scales shifted by one block."""
    x = values(10, 256, torch.float32, seed=5)
    rows, scales = quantise(x)
    back = rows.double() * scales.flip(1).double().repeat_interleave(128, 1)
    assert not torch.all((back - x.double()).abs() <= x.double().abs() * 2**-3)
