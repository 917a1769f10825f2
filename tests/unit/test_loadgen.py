"""The load generator's figures, workloads and command line."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.cli import main
from loadgen.report import complaints, table
from loadgen.stats import Record, State, distribution, not_terminal, percentile, summarize
from loadgen.workload import Lengths, UsageError, Workload, poisson_times


def record(index, sent, arrivals, *, tokens=None, state=State.FINISHED):
    made = Record(index, sent, state=state, arrivals=list(arrivals))
    made.ended_at = made.arrivals[-1] if arrivals else sent
    made.output_tokens = len(made.arrivals) if tokens is None else tokens
    made.prompt_tokens = 3
    return made


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1.0), (50, 2.5), (90, 3.7), (100, 4.0), (25, 1.75)]
)
def test_percentiles_interpolate_between_ranks(percent, value):
    assert percentile([1.0, 2.0, 3.0, 4.0], percent) == pytest.approx(value)


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_quantiles_lie_between_the_extremes_in_order(values):
    figures = distribution(values)
    quantiles = list(figures.quantiles.values())
    assert quantiles == sorted(quantiles)
    assert min(values) <= quantiles[0]
    assert quantiles[-1] <= max(values) == figures.maximum


def test_figures_of_a_run():
    records = [
        record(0, 0.0, [1.0, 1.5, 2.0]),
        record(1, 1.0, [1.5, 2.5], tokens=5),  # several tokens in a chunk
        record(2, 1.0, [], state=State.ERROR),
        record(3, 3.0, [4.0], state=State.TRUNCATED),
    ]
    summary = summarize(records)
    assert summary.duration_s == 4.0
    assert summary.requests_per_s == 0.5
    assert summary.output_tokens == 9
    assert summary.ttft_s.mean == 0.75
    assert summary.tpot_s.quantiles[50] == pytest.approx((0.5 + 0.25) / 2)
    assert (summary.itl_s.count, summary.itl_s.maximum) == (3, 1.0)
    assert summary.counts[State.FINISHED] == 2
    assert [r.index for r in not_terminal(records)] == [3]
    assert "1 of 4 requests reached no end:\n  #3 truncated" in complaints(records)
    assert "2 finished, 1 error, 1 truncated in 4.00 s" in table(summary)


def test_a_run_without_requests_has_no_figures():
    summary = summarize([])
    assert (summary.duration_s, summary.ttft_s) == (0.0, None)
    assert "requests   none" in table(summary)
    assert complaints([]) == ""


@pytest.mark.parametrize(("text", "low", "high"), [("7", 7, 7), ("3-9", 3, 9), ("~50", 1, 10_000)])
def test_lengths(text, low, high):
    lengths = Lengths.parse(text)
    rng = random.Random(1)
    drawn = [lengths.draw(rng) for _ in range(300)]
    assert low <= min(drawn) <= max(drawn) <= high


@pytest.mark.parametrize("text", ["", "0", "9-3", "a", "1-2-3", "~", "~3-4", "-5"])
def test_wrong_lengths(text):
    with pytest.raises(UsageError, match="is no length"):
        Lengths.parse(text)


def test_the_same_seed_makes_the_same_requests():
    load = Workload("m", False, Lengths.parse("4-8"), Lengths.parse("~10"))
    first, again, other = (list(itertools.islice(load.bodies(seed), 20)) for seed in (1, 1, 2))
    assert first == again != other
    assert all(10 <= token <= 99 for body in first for token in body["prompt"])
    assert len({tuple(body["prompt"]) for body in first}) == 20


def test_text_prompts_are_words_of_the_file():
    load = Workload("m", True, Lengths.parse("5"), Lengths.parse("1"), text="a b c")
    (message,) = next(load.bodies(0))["messages"]
    assert message["content"] in {"a b c a b", "b c a b c", "c a b c a"}


def test_poisson_arrivals_have_the_rate():
    times = list(itertools.islice(poisson_times(50.0, 3), 5000))
    assert times == sorted(times)
    assert 5000 / times[-1] == pytest.approx(50.0, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: url"),
        (["localhost:8000"], "the url must begin with http://"),
        (["http://h", "--rate", "0"], "--rate must be above 0, not 0.0"),
        (["http://h", "--rate", "x"], "argument --rate: invalid float value: 'x'"),
        (["http://h", "--rate", "1", "--concurrency", "2"], "exclude each other"),
        (["http://h", "--requests", "-1"], "--requests must not be negative, not -1"),
        (["http://h", "--chat"], "--chat needs --prompt-file"),
        (["http://h", "--max-tokens", "0"], "'0' is no length"),
        (["http://h", "--token-range", "9-3"], "--token-range must be LO-HI"),
        (["http://h", "--api-key-file", "/no/such"], "cannot read /no/such"),
        (["http://127.0.0.1:1"], "cannot reach http://127.0.0.1:1/"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_exit_code_2(capsys, arguments, sentence):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "atoll-load http://127.0.0.1:8000 --concurrency 16" in capsys.readouterr().out
