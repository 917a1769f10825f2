"""Sampling: greedy, cuts, reproducible in any batch, the right distribution, log-probabilities."""

import math

import torch

from common.request import SamplingParams
from services.attention import sampler
from services.attention.sampler import uniform


def sample(logits, params, positions):
    return sampler.sample(logits, logits.argmax(-1).tolist(), range(len(logits)), params, positions)


LOGITS = torch.randn(20, 50, generator=torch.Generator().manual_seed(1)) * 2


def test_temperature_zero_is_argmax() -> None:
    params = [SamplingParams(temperature=0.0)] * 20
    assert [s.token_id for s in sample(LOGITS, params, range(20))] == LOGITS.argmax(-1).tolist()


def test_a_row_draws_the_same_in_any_batch() -> None:
    params = [SamplingParams(temperature=1.0, top_p=0.9, top_k=20, seed=i // 2) for i in range(20)]
    together = sample(LOGITS, params, range(100, 120))
    for row in range(20):
        alone = sample(LOGITS[row : row + 1], params[row : row + 1], [100 + row])
        assert alone == [together[row]]


def test_cuts() -> None:
    rows = LOGITS[:1].expand(200, -1)
    first = LOGITS[0].argmax().item()
    for cut in ({"top_k": 1}, {"top_p": 1e-9}):
        drawn = sample(rows, [SamplingParams(temperature=1.5, **cut)] * 200, range(200))
        assert {s.token_id for s in drawn} == {first}
    best = set(LOGITS[0].topk(3).indices.tolist())
    drawn = sample(rows, [SamplingParams(temperature=2.0, top_k=3)] * 200, range(200))
    assert {s.token_id for s in drawn} == best
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log().expand(400, -1)
    drawn = sample(logits, [SamplingParams(top_p=0.7)] * 400, range(400))
    assert {s.token_id for s in drawn} == {0, 1}


def test_distribution() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(4000, -1)
    drawn = [s.token_id for s in sample(logits, [SamplingParams(seed=7)] * 4000, range(4000))]
    for token, expected in enumerate((0.5, 0.3, 0.2)):
        assert abs(drawn.count(token) / 4000 - expected) < 0.03


def test_uniform_depends_on_seed_and_position_only() -> None:
    numbers = {uniform(seed, position) for seed in range(40) for position in range(40)}
    assert len(numbers) == 1600
    assert all(0 <= number < 1 for number in numbers)


def test_logprobs() -> None:
    params = [SamplingParams(temperature=0.0, logprobs=4)] * 20
    for row, result in enumerate(sample(LOGITS, params, range(20))):
        assert result.logprob is not None
        assert result.top[0] == (result.token_id, result.logprob)
        assert len(result.top) == 4
        expected = LOGITS[row].double().log_softmax(-1)[result.token_id]
        assert math.isclose(result.logprob, float(expected), abs_tol=1e-5)
    assert sample(LOGITS, [SamplingParams()] * 20, range(20))[0].top == ()
