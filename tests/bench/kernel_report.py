"""The README's tables of kernels, made from the results files: `python tests/bench/kernel_report.py` prints them.

The README holds them between `<!-- kernels -->` and `<!-- /kernels -->`; a test renders them again and compares.
"""

import json
import sys
from pathlib import Path
from typing import Any

from kernel_targets import targets

RESULTS = Path(__file__).parents[2] / "kernels" / "results"
HEAD = "| kernel | rows | shape | {cards} |\n|---|---|---|{lines}|"


def load() -> list[dict[str, Any]]:
    """Every results file, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def _shape(shape: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in shape.items() if k not in ("rows", "width"))


def _cell(record: dict[str, Any] | None) -> str:
    """Time, share of the floor, and how often faster than the peer."""
    if record is None or record["us"] is None:
        return "-"
    cell = f"{record['us']:.1f} us, {100 * record['floor_us'] / record['us']:.0f} %"
    if record.get("peer_us"):
        cell += f", {record['peer_us'] / record['us']:.2f}x"
    return cell


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one row per operation and shape, one column per card."""
    by_card = [
        {(r["op"], json.dumps(r["shape"])): r for r in result["records"]} for result in results
    ]
    keys = list(dict.fromkeys(key for records in by_card for key in records))
    cards = " | ".join(str(result["card"]) for result in results)
    lines = [HEAD.format(cards=cards, lines="|".join("---" for _ in results))]
    for op, shape in keys:
        cells = " | ".join(_cell(records.get((op, shape))) for records in by_card)
        where = json.loads(shape)
        lines.append(f"| {op} | {where['rows']} | {_shape(where)} | {cells} |")
    return "\n".join(lines)


def summary(results: list[dict[str, Any]]) -> str:
    """What was to be reached, the table and, below it, what was measured where."""
    lines = [targets(results), "", table(results), ""]
    for result in results:
        c = result["ceilings"]
        lines.append(
            f"{result['card']}: commit {result['commit'][:12]}, {result['date']}, driver {result['driver']}, "
            f"torch {result['torch']}, triton {result['triton']}; read {c['read_bytes_per_s'] / 1e12:.2f} TB/s, "
            f"copy {c['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 {c['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s, "
            f"FP8 {c['fp8_flop_per_s'] / 1e12:.0f} TFLOP/s (measured)."
        )
    lines.append(
        "Each cell: device time of a replayed CUDA graph (median), floor / time, and the peer's time / ours. Floors "
        "count every byte once, at the ceilings measured in the same run; where a product beats the measured FP8 "
        "ceiling (cards lower their clocks under load), the share exceeds 100 %. Peers are named in "
        "kernels/results/*.json."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(summary(load()) + "\n")
