"""The results files hold what is promised, and the table says what they say."""

import json
from dataclasses import replace
from pathlib import Path

import kernel_report as report
import pytest
from kernel_targets import TARGETS, Target

README = Path(__file__).parents[2] / "README.md"
RESULTS = report.load()
EXPERTS = [
    ("expert_ffn", {"rows": rows, "width": 7168, "hidden": hidden})
    for hidden in (2048, 18432)
    for rows in (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
]
WANTED = [
    *EXPERTS,
    *((op, {"rows": rows, "width": 7168}) for op in ("quant", "pack") for rows in (128, 4096)),
    *(("combine", {"rows": rows, "width": 7168, "top_k": 8}) for rows in (128, 4096)),
    ("gate", {"rows": 128, "experts": 256}),
    ("mla_decode", {"rows": 64, "context": 4096, "heads": 128}),
]


def found(result, op, shape):
    return [r for r in result["records"] if r["op"] == op and shape.items() <= r["shape"].items()]


@pytest.mark.parametrize("result", RESULTS, ids=lambda r: r["card"])
def test_every_promised_size_is_measured_and_right(result):
    header = {"commit", "card", "driver", "torch", "triton", "date", "ceilings", "burst_ceilings"}
    assert header <= result.keys()
    for op, shape in WANTED:
        records = found(result, op, shape)
        assert records, f"no {op} {shape}"
        for record in records:
            assert record["us"] > 0
            assert record["burst_us"] > 0
            assert record["peer_burst_us"] > 0
            assert 0 < record["mhz"] <= 1980
            assert record["floor_us"] > 0 or op == "gate"  # a gate's floor is launch latency
            assert record["peer_us"] > 0
            assert record["error"] < 0.04  # false for NaN; an FP8 cache is the coarsest


def test_both_cards_are_there():
    assert [r["card"] for r in RESULTS] == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]


def test_the_table_has_a_row_for_every_record_and_the_files_numbers():
    lines = report.table(RESULTS).splitlines()
    shapes = {(r["op"], json.dumps(r["shape"])) for result in RESULTS for r in result["records"]}
    assert len(lines) == 2 + len(shapes)
    record = found(RESULTS[0], "expert_ffn", {"rows": 16, "hidden": 18432})[0]
    row = next(line for line in lines if line.startswith("| expert_ffn | 16 | hidden 18432 |"))
    steady, bursts = row.split(" | ")[3:5]
    assert steady.startswith(f"{record['us']:.1f} us, ")
    assert f"{record['peer_us'] / record['us']:.2f}x, {record['mhz'] / 1e3:.2f} GHz" in steady
    assert bursts.startswith(f"{record['burst_us']:.1f} us, ")
    assert f"{record['peer_burst_us'] / record['burst_us']:.2f}x" in bursts


def test_a_failure_is_a_gap_and_not_a_number():
    shape = {"rows": 1, "width": 2}
    failed = {"op": "quant", "shape": shape, "us": None, "floor_us": 1.0, "peer_us": 2.0}
    assert report.table([{"card": "X", "records": [failed]}]).endswith("| quant | 1 |  | - | - |")


def test_a_target_that_is_missed_says_so():
    def rows(target):
        record = {"op": "gate", "shape": {"rows": 128}, "us": 8.0, "burst_us": 7.5}
        return target.cell([record, record | {"us": 7.96}, record | {"us": None}])

    (below,) = (target for target in TARGETS if target.what.startswith("gate"))
    assert rows(below) == "8.0 us (missed; 7.5 in bursts), 8.0 us, failed (missed)"
    least = Target("", 8, "", ".1f", lambda r: True, lambda r: r["us"])
    assert rows(least) == "8.0, 8.0 (missed; 7.5 in bursts), failed (missed)"
    assert rows(replace(least, worst=True)) == "8.0 (missed; 7.5 in bursts), failed (missed)"


def test_every_target_is_measured_on_every_card():
    for target in TARGETS:
        for result in RESULTS:
            assert target.cell(result["records"]), f"{target.what}, {result['card']}"


def test_the_readme_says_what_the_files_say():
    text = README.read_text()
    between = text.split("<!-- kernels -->")[1].split("<!-- /kernels -->")[0].strip()
    assert between == report.summary(RESULTS).strip()
