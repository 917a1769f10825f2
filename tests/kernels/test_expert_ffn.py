"""The expert on FP8 rows and weights: the torch reference against float64, row by row independent."""

import pytest
import torch
from ffn_cases import error, exact, expert, rows

from kernels.reference.expert_ffn import expert_ffn, expert_ffn_grouped

# bf16 out (2^-9) and a requantised hidden row, whose rounding flips where h differs in the last bits of fp32
TOLERANCE = 6e-3


@pytest.mark.parametrize("n", [1, 3, 127, 129])
@pytest.mark.parametrize(("width", "hidden"), [(256, 128), (200, 64), (128, 192)])
def test_against_float64(n, width, hidden):
    weights, (q, scales) = expert(width, hidden), rows(n, width)
    assert error(expert_ffn(q, scales, *weights), exact(q, scales, weights)) < TOLERANCE


def test_a_row_depends_on_no_other_row():
    weights, (q, scales) = expert(256, 128), rows(130, 256)
    whole = expert_ffn(q, scales, *weights)
    for n in (1, 2, 3, 65):
        assert torch.equal(expert_ffn(q[:n], scales[:n], *weights), whole[:n])


def test_grouped_is_each_expert_on_its_rows():
    experts = [expert(256, 128, seed=s) for s in range(3)]
    q, scales = rows(20, 256)
    groups = torch.tensor([[0, 0, 7], [1, 7, 7], [2, 7, 20]], dtype=torch.int32)
    stacked = [torch.stack(parts) for parts in zip(*experts, strict=True)]
    got = expert_ffn_grouped(q, scales, groups, *stacked, max_rows=13)
    assert torch.equal(got[:7], expert_ffn(q[:7], scales[:7], *experts[0]))
    assert torch.equal(got[7:], expert_ffn(q[7:], scales[7:], *experts[2]))
    with pytest.raises(ValueError, match="expert 2 has 13 rows"):
        expert_ffn_grouped(q, scales, groups, *stacked, max_rows=12)


def test_nan_in_a_row_stays_in_that_row():
    weights, (q, scales) = expert(256, 128), rows(5, 256)
    scales[2, 1] = float("nan")
    got = expert_ffn(q, scales, *weights)
    assert got[2].isnan().all()
    assert got[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("which", [1, 3])
def test_mutation_scales_of_another_block_are_seen(which):
    weights, (q, scales) = list(expert(256, 256)), rows(9, 256)
    expected = exact(q, scales, weights)
    weights[which] = weights[which].roll(1, 0)
    assert not error(expert_ffn(q, scales, *weights), expected) < TOLERANCE
