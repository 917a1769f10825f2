"""The demo's table: what one MoE layer cost, from the counters that every process exports through GET /cluster."""

from collections import Counter
from typing import Any

# attention workers' counters of time, in microseconds summed over blocks
_ROUND_TRIP, _ATTENTION = "attention.moe_round_trip_us", "attention.attention_us"
_QUEUE, _COMPUTE = "attention.moe_queue_us", "attention.moe_compute_us"
_COMBINE, _BLOCKS = "attention.moe_combine_us", "attention.moe_blocks"


def totals(cluster: dict[str, Any]) -> Counter[str]:
    """Counters summed over the processes of each role, as "role.name"; those that are tables are left out."""
    sums: Counter[str] = Counter()
    for process in cluster["processes"]:
        for name, value in process["counters"].items():
            if isinstance(value, int | float):
                sums[f"{process['role']}.{name}"] += int(value)
    return sums


def cost_rows(before: Counter[str], after: Counter[str]) -> list[tuple[str, str]]:
    """Messages, bytes and the latency split of an average layer between two readings of `totals`."""
    used = after.copy()
    used.subtract(before)
    blocks = used[_BLOCKS]
    if blocks < 1:
        return [("MoE layers", "no counters")]
    messages = used["router.messages_out"] / blocks
    sent = used["router.bytes_out"] / blocks
    wire = used[_ROUND_TRIP] - used[_QUEUE] - used[_COMPUTE] - used[_COMBINE]
    parts = [
        ("attention", used[_ATTENTION]),
        ("wire (and everything not named here)", wire),
        ("expert queue", used[_QUEUE]),
        ("expert compute", used[_COMPUTE]),
        ("combine", used[_COMBINE]),
    ]
    rows = [
        ("MoE layers run", f"{blocks}"),
        ("messages sent by routers per layer", f"{messages:.1f}"),
        ("bytes sent by routers per layer", f"{sent:,.0f}"),
    ]
    return rows + [(f"per layer: {name}", f"{us / blocks:,.0f} us") for name, us in parts]


def show(rows: list[tuple[str, str]]) -> None:
    """Print a table."""
    from rich.console import Console  # 70 ms that no other command needs
    from rich.table import Table

    table = Table("figure", "value")
    table.columns[1].justify = "right"
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)
