"""The README's tables of kernels, made from the results files: `python tests/bench/kernel_report.py` prints them.

The README holds them between `<!-- kernels -->` and `<!-- /kernels -->`; a test renders them again and compares.
"""

import json
import sys
from pathlib import Path
from typing import Any

from kernel_targets import Record, in_bursts, targets

RESULTS = Path(__file__).parents[2] / "kernels" / "results"


def load() -> list[dict[str, Any]]:
    """Every results file, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def _shape(shape: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in shape.items() if k not in ("rows", "width"))


def _cell(record: Record | None) -> str:
    """Time, share of the floor, and how often faster than the peer."""
    if record is None or record["us"] is None:
        return "-"
    cell = f"{record['us']:.1f} us, {100 * record['floor_us'] / record['us']:.0f} %"
    if record.get("peer_us"):
        cell += f", {record['peer_us'] / record['us']:.2f}x"
    return cell


def _cells(record: Record | None) -> str:
    """Of the steady state, with the clock of the SMs, and of bursts."""
    if record is None or record["us"] is None:
        return "- | -"
    return f"{_cell(record)}, {record['mhz'] / 1e3:.2f} GHz | {_cell(in_bursts(record))}"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row per operation and shape, two columns per card."""
    by_card = [
        {(r["op"], json.dumps(r["shape"])): r for r in result["records"]} for result in results
    ]
    keys = list(dict.fromkeys(key for records in by_card for key in records))
    heads = ["kernel", "rows", "shape"]
    heads += [head for result in results for head in (str(result["card"]), "in bursts")]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for op, shape in keys:
        cells = " | ".join(_cells(records.get((op, shape))) for records in by_card)
        where = json.loads(shape)
        lines.append(f"| {op} | {where['rows']} | {_shape(where)} | {cells} |")
    return "\n".join(lines)


def _ceilings(ceilings: dict[str, float]) -> str:
    read, copy, bf16, fp8 = (
        ceilings[f"{k}_per_s"] / 1e12 for k in ("read_bytes", "copy_bytes", "bf16_flop", "fp8_flop")
    )
    return f"read {read:.2f} TB/s, copy {copy:.2f} TB/s, bf16 {bf16:.0f} TFLOP/s, FP8 {fp8:.0f} TFLOP/s"


def summary(results: list[dict[str, Any]]) -> str:
    """What was to be reached, the table and, below it, what was measured where."""
    lines = [targets(results), "", table(results), ""]
    lines += [
        f"{result['card']}: commit {result['commit'][:12]}, {result['date']}, driver {result['driver']}, "
        f"torch {result['torch']}, triton {result['triton']}; measured ceilings {_ceilings(result['ceilings'])}, "
        f"in bursts {_ceilings(result['burst_ceilings'])}; power limit {result['power_limit_watts']:.0f} W."
        for result in results
    ]
    lines.append(
        "Each cell: device time of a replayed CUDA graph (median), floor / time, and the peer's time / ours. Steadily, "
        "a graph is replayed for 1.6 s, of which the last 0.6 s count: a card at its power limit lowers the clock of "
        "its SMs, which is given, from 1.98 GHz. In bursts it is replayed for 2 ms or thrice, and rests nine times as "
        "long. Floors count every byte once, at the ceilings measured alike in the same run; where a product beats the "
        "measured FP8 ceiling, the share exceeds 100 %. Peers are named in kernels/results/*.json."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(summary(load()) + "\n")
