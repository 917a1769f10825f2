"""Bucketed steps: padding, bucket choice, stale rows; on a GPU the same through captured graphs."""

import pytest
import torch
from markers import on_gpu

from kernels.graphs import BucketedStep


def step(x, slots):
    return x * 2 + slots.unsqueeze(1), slots + 1


def bucketed(device="cpu", buckets=(4, 1, 8)):
    idle = (torch.zeros(1, 3, device=device), torch.full((1,), -1, device=device))
    return BucketedStep(step, buckets, idle)


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 4), (4, 4), (5, 8), (8, 8)])
def test_the_smallest_bucket_that_fits(rows, bucket):
    assert bucketed().bucket(rows) == bucket


def test_results_are_those_of_the_rows_given():
    run = bucketed()
    for rows in (8, 3, 1, 5):
        x, slots = torch.randn(rows, 3), torch.arange(rows)
        y, s = run(x, slots)
        assert torch.equal(y, x * 2 + slots.unsqueeze(1))
        assert torch.equal(s, slots + 1)


def test_rows_left_over_are_idle_whatever_came_before():
    seen = []
    idle = (torch.full((1, 1), -7.0),)
    run = BucketedStep(lambda x: seen.append(x.clone()) or x, [4], idle)
    run(torch.ones(4, 1))
    run(torch.ones(2, 1))
    assert seen[1].flatten().tolist() == [1, 1, -7, -7]


def test_what_does_not_fit_is_refused():
    run = bucketed()
    with pytest.raises(ValueError, match="largest bucket, 8"):
        run(torch.zeros(9, 3), torch.zeros(9))
    with pytest.raises(ValueError, match="same number of rows"):
        run(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="positive"):
        bucketed(buckets=(0,))
    assert repr(run) == "<BucketedStep [1, 4, 8] [0 captured]>"


@on_gpu
def test_graphs_give_what_the_step_gives():
    run = bucketed("cuda")
    run.capture()
    assert repr(run) == "<BucketedStep [1, 4, 8] [3 captured]>"
    for rows in (8, 3, 1, 5, 2):
        x, slots = torch.randn(rows, 3, device="cuda"), torch.arange(rows, device="cuda")
        y, s = run(x, slots)
        assert torch.equal(y, x * 2 + slots.unsqueeze(1))
        assert torch.equal(s, slots + 1)
