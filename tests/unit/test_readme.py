"""README's figures are the committed results', word for word."""

from tests.bench.gpu.record import merged
from tests.bench.gpu.report import spread
from tests.bench.report import ROOT, render


def test_the_figures_in_readme_are_those_of_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert render(text) == text, "run: python -m tests.bench.report"


def test_rounds_of_a_record_are_merged_into_medians_with_their_range():
    rounds = [
        {"commit": name, "rows": [{"tokens": 128, "in_flight": 1, "latency_us": us}]}
        for name, us in (("a", 5.0), ("b", 9.0), ("c", 6.0))
    ]
    whole = merged(rounds)
    assert (whole["commit"], whole["rounds"]) == ("c", 3)
    assert whole["rows"] == [
        {"tokens": 128, "in_flight": 1, "latency_us": 6.0, "range": {"latency_us": [5.0, 9.0]}}
    ]
    assert spread(whole["rows"][0], "latency_us") == "6.0 (5.0 - 9.0)"
    assert spread(rounds[0]["rows"][0], "latency_us") == "5.0"
