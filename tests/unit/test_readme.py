"""README's figures are the committed results', word for word."""

import json

from tests.bench.gpu import results, targets
from tests.bench.gpu.record import merged
from tests.bench.gpu.report import hop_table, spread
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


def test_rows_that_land_have_columns_of_the_hop_where_they_were_measured():
    rates = {"gb_per_s_1": 2.0, "gb_per_s_8": 3.0, "gb_per_s_32": 4.0}
    old = {"bytes": 64, "one_way_us": 1.0} | rates
    new = old | {"landed_us": 5.0} | {f"landed_{key}": 2 * rate for key, rate in rates.items()}
    new |= {"bytes": 128, "range": {"landed_us": [4.0, 6.0], "landed_gb_per_s_8": [5.0, 7.0]}}
    facts = {"cards": ["H"], "driver": "", "torch": "", "ucxx": "", "commit": "", "date": ""}

    def table(*rows):
        return [line for line in hop_table(facts | {"rows": rows}).split("\n") if line[:1] == "|"]

    heads, rule, row = table(old)
    assert (heads.count("|"), rule, row) == (
        6,
        "|---|---|---|---|---|",
        "| 64 | 1.0 | 2.0 | 3.0 | 4.0 |",
    )
    heads, rule, *rows = table(old, new)
    assert (heads.count("|"), rule.count("|"), heads.count("landed: ")) == (10, 10, 4)
    assert rows == [
        "| 64 | 1.0 | 2.0 | 3.0 | 4.0 | - | - | - | - |",
        "| 128 | 1.0 | 2.0 | 3.0 | 4.0 | 5.0 (4.0 - 6.0) | 4.0 | 6.0 (5.0 - 7.0) | 8.0 |",
    ]


def test_a_figure_that_misses_its_target_on_gpus_says_so(tmp_path, monkeypatch):
    for path in results.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    hop = results.read("hop")
    row = next(r for r in hop["rows"] if r["bytes"] == targets.HOP)
    row |= {"landed_us": 39.9, "one_way_us": 40.0, "landed_gb_per_s_8": 150, "gb_per_s_8": 149}
    (tmp_path / "hop.json").write_text(json.dumps(hop))
    one, eight = targets.targets().split("\n")[2:4]
    assert "39.9 us as" in one
    assert "40.0 (missed) as" in one
    assert "150 and 149 (missed) GB/s" in eight
