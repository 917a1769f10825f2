"""A row's bits depend on no other row: every reference op at M = 1 to 130 against the same rows in one large batch."""

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch

from kernels.reference import linear as linear_module
from kernels.reference.ffn import ffn, network, sigmoid, silu
from kernels.reference.gate import gate_v2, gate_v3
from kernels.reference.linear import linear, pad_out, resident
from kernels.reference.norm import rms_norm
from kernels.reference.rope import apply_rope, rope_frequencies, rope_tables

SIZES = range(1, 131)
EDGES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 130)
SHAPES = [(1, 64), (5, 777), (16, 31), (18, 5), (64, 256), (130, 97), (333, 129), (40, 1024)]


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads", autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def sizes() -> Iterable[int]:
    """Every M with the one thread that a service has; with more, those around what blocks divide by."""
    return SIZES if torch.get_num_threads() == 1 else EDGES


def rows(width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(160, width, generator=torch.Generator().manual_seed(seed))


def check(op: Callable[[torch.Tensor], object], x: torch.Tensor) -> None:
    def flat(result: object) -> list[torch.Tensor]:
        return list(result) if isinstance(result, tuple) else [result]  # type: ignore[list-item]

    whole = flat(op(x))
    for size in sizes():
        start = size * 7 % 29
        part = flat(op(x[start : start + size].clone()))
        for ours, theirs in zip(part, whole, strict=True):
            assert torch.equal(ours, theirs[start : start + size]), f"{size} rows differ"


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_linear(out: int, width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(out, width, generator=generator), torch.randn(out)
    padded, padded_bias = pad_out(weight), pad_out(bias)
    check(lambda x: linear(x, padded, padded_bias, out=out), rows(width))
    expected = rows(width).double() @ weight.double().T + bias
    torch.testing.assert_close(
        linear(rows(width), weight, bias).double(), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "width"), [(1024, 1024), (300, 2000), (20, 40_000)])
def test_16_bit_weights_give_the_bits_of_wide_ones(
    out: int, width: int, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "_packs", False)
    weight, bias = torch.randn(out, width).to(stored), torch.randn(out)
    narrow, padded_bias = resident(weight, torch.float32), pad_out(bias)
    assert narrow.dtype is stored
    wide = pad_out(weight.float())
    for size in (1, 2, 3, 4, 5, 16, 33, 130):
        x = rows(width)[:size]
        assert torch.equal(
            linear(x, narrow, padded_bias, out=out), linear(x, wide, padded_bias, out=out)
        )
    assert not torch.equal(linear(x, narrow + narrow, out=out), linear(x, wide, out=out))
    check(lambda x: linear(x, narrow, out=out), rows(width))


@pytest.mark.skipif(not linear_module._packs, reason="packed on CPUs with AVX2 alone")
@pytest.mark.parametrize(("out", "width"), [(1024, 1024), (300, 2000), (20, 40_000), (2816, 1001)])
def test_large_weights_are_packed_and_rows_stay_independent(out: int, width: int) -> None:
    weight, bias = torch.randn(out, width).bfloat16(), torch.randn(out)
    packed, padded_bias = resident(weight, torch.float32), pad_out(bias)
    assert packed.is_mkldnn
    check(lambda x: linear(x, packed, padded_bias, out=out), rows(width))
    x = rows(width)
    expected = x.double() @ weight.double().T + bias
    ours = linear(x, packed, padded_bias, out=out).double()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not linear_module._packs, reason="packed on CPUs with AVX2 alone")
def test_a_network_of_packed_weights_is_that_of_plain_ones() -> None:
    gate_up, down = torch.randn(2048, 600) / 25, torch.randn(600, 1024) / 32
    packed = [resident(weight, torch.float32) for weight in (gate_up, down)]
    assert all(weight.is_mkldnn for weight in packed)
    check(lambda x: ffn(x, *packed), rows(600))
    torch.testing.assert_close(ffn(rows(600), *packed), ffn(rows(600), gate_up, down))


@pytest.mark.parametrize(("width", "inner"), [(128, 64), (96, 24), (100, 30), (1024, 600)])
def test_a_prepared_network_has_the_bits_of_ffn(width: int, inner: int) -> None:
    gate_up, down = torch.randn(2 * inner, width) / 9, torch.randn(width, inner) / 9
    gate_up, down = resident(gate_up, torch.float32), resident(down, torch.float32)
    prepared = network(gate_up, down)
    for size in sizes():
        x = rows(width)[:size]
        assert torch.equal(prepared(x), ffn(x, gate_up, down)), f"{size} rows differ"


def test_small_or_wide_weights_are_kept_in_the_compute_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_module, "_packs", False)
    small = torch.randn(64, 64).bfloat16()
    assert resident(small, torch.float32).dtype is torch.float32
    assert resident(torch.randn(1024, 1024), torch.float32).dtype is torch.float32
    assert resident(torch.randn(1024, 1024).bfloat16(), torch.bfloat16).dtype is torch.bfloat16


def placed(x: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that starts `offset` elements after the start of a cache line."""
    memory = torch.empty(x.numel() + 64)
    start = -(memory.data_ptr() // 4) % 16 + offset
    return memory[start : start + x.numel()].view(x.shape).copy_(x)


@pytest.mark.parametrize(("out", "width"), [(64, 256), (144, 97), (48, 777)])
def test_place_in_memory_does_not_matter(out: int, width: int) -> None:
    x, weight = rows(width)[:16], torch.randn(out, width)
    expected, exponents = linear(x, weight), torch.exp(x)
    for offset in range(16):
        assert torch.equal(linear(placed(x, offset), placed(weight, 15 - offset)), expected)
        assert torch.equal(torch.exp(placed(x, offset)), exponents)


@pytest.mark.parametrize(("inner", "width"), [(33, 65), (64, 128), (45, 140)])
def test_ffn(inner: int, width: int) -> None:
    generator = torch.Generator().manual_seed(2)
    gate_up = torch.randn(2 * inner, width, generator=generator) / 8
    down = torch.randn(width, inner, generator=generator) / 8
    check(lambda x: ffn(x, gate_up, down), rows(width))
    x = rows(width).double()
    gate, up = (x @ gate_up.double().T).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up) @ down.double().T
    torch.testing.assert_close(
        ffn(rows(width), gate_up, down).double(), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("width", [3, 37, 128])
def test_elementwise(width: int) -> None:
    weight = torch.randn(width)
    check(silu, rows(width))
    check(sigmoid, rows(width))
    check(lambda x: rms_norm(x, weight, 1e-6), rows(width))
    extreme = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])
    torch.testing.assert_close(silu(extreme), torch.nn.functional.silu(extreme))
    torch.testing.assert_close(sigmoid(extreme), torch.sigmoid(extreme))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope(interleaved: bool) -> None:
    cos, sin = rope_tables(rope_frequencies(10, 10000.0), 160, 1.0)

    def op(x: torch.Tensor) -> torch.Tensor:
        index = x[:, 10].long()  # positions travel in the last column
        return apply_rope(x[:, :10], cos[index], sin[index], interleaved=interleaved)

    x = rows(11)
    x[:, 10] = torch.arange(160)
    check(op, x)


@pytest.mark.parametrize(
    ("experts", "groups", "kept", "top_k"), [(5, 1, 1, 1), (16, 4, 2, 4), (72, 8, 4, 8)]
)
def test_gates(experts: int, groups: int, kept: int, top_k: int) -> None:
    weight, bias = torch.randn(experts, 60), torch.randn(experts) * 0.1
    padded = pad_out(weight)
    check(
        lambda x: gate_v3(
            x,
            padded,
            bias,
            top_k=top_k,
            num_groups=groups,
            top_k_groups=kept,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        ),
        rows(60),
    )
    check(
        lambda x: gate_v2(
            x,
            padded,
            num_experts=experts,
            top_k=top_k,
            num_groups=groups,
            top_k_groups=kept,
            routed_scaling_factor=1.3,
        ),
        rows(60),
    )
