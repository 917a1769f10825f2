"""A run's figures as a table for people and as JSON for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from loadgen.stats import QUANTILES, Distribution, Record, Summary, not_terminal

_MAX_LISTED = 20


def table(summary: Summary) -> str:
    """A fixed-width table; times in milliseconds."""
    counts = ", ".join(f"{count} {state}" for state, count in summary.counts.items() if count)
    lines = [
        f"requests   {counts or 'none'} in {summary.duration_s:.2f} s",
        f"throughput {summary.output_tokens_per_s:.1f} tokens/s, {summary.requests_per_s:.2f} requests/s"
        f" ({summary.prompt_tokens} prompt and {summary.output_tokens} output tokens)",
    ]
    if summary.max_lag_s > 0.01:
        lines.append(f"sent late  by up to {summary.max_lag_s * 1e3:.0f} ms: this machine is busy")
    head = "".join(f"{name:>10}" for name in ("mean", *(f"p{q}" for q in QUANTILES), "max"))
    lines += ["", f"{'ms':<11}{head}"]
    lines += [
        _row("TTFT", summary.ttft_s),
        _row("TPOT", summary.tpot_s),
        _row("ITL", summary.itl_s),
        _row("latency", summary.latency_s),
    ]
    return "\n".join(lines)


def _row(name: str, values: Distribution | None) -> str:
    if values is None:
        return f"{name:<11}{'-':>10}"
    figures = (values.mean, *values.quantiles.values(), values.maximum)
    return f"{name:<11}" + "".join(f"{value * 1e3:>10.2f}" for value in figures)


def complaints(records: Sequence[Record]) -> str:
    """The requests without an end, and the kinds of errors, or "" when there are none."""
    lines = []
    lost = not_terminal(records)
    if lost:
        lines.append(f"{len(lost)} of {len(records)} requests reached no end:")
        lines += [f"  #{r.index} {r.state}: {r.detail}" for r in lost[:_MAX_LISTED]]
        if len(lost) > _MAX_LISTED:
            lines.append(f"  and {len(lost) - _MAX_LISTED} more")
    kinds: dict[str, int] = {}
    for record in records:
        if record.state == "error":
            kinds[record.detail] = kinds.get(record.detail, 0) + 1
    lines += [f"{count} x error: {detail}" for detail, count in list(kinds.items())[:_MAX_LISTED]]
    return "\n".join(lines)


def to_json(
    summary: Summary, records: Sequence[Record], settings: dict[str, Any]
) -> dict[str, Any]:
    """The report file: settings, figures in seconds, and every request without an end."""
    return {
        "settings": settings,
        "summary": asdict(summary),
        "not_terminal": [
            {"index": r.index, "state": r.state, "detail": r.detail} for r in not_terminal(records)
        ],
    }
