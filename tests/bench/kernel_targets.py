"""What kernels were to reach, beside what each card has: the first table of README's section on kernels.

A value that misses is followed by what the same kernel has in bursts, where the card's power does not limit it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
_FP8_TARGET = 1.187  # PFLOP/s: 60 % of the datasheet's peak
_FEW, _MANY = (1, 16, 64, 128), (2048, 4096, 8192)


def in_bursts(record: Record) -> Record:
    """The record with the times that bursts took for those of the steady state."""
    times = {k: record.get(f"burst_{k}") for k in ("us", "floor_us")}
    return record | times | {"peer_us": record.get("peer_burst_us")}


def _share(r: Record) -> float:
    """Percent of the floor's rate; of few rows that is read bandwidth, of copies copy bandwidth."""
    return float(100 * r["floor_us"] / r["us"])


def _faster(r: Record) -> float:
    return float(r["peer_us"] / r["us"])


def _pflops(r: Record) -> float:
    s = r["shape"]
    return float(6 * s["rows"] * s["width"] * s["hidden"] / r["us"] / 1e9)


def _us(r: Record) -> float:
    return float(r["us"])


@dataclass(frozen=True)
class Target:
    """A figure of one or more records, and what is wanted of it: at least that, or less."""

    what: str
    wanted: float
    unit: str
    form: str  # how a value is written
    chosen: Callable[[Record], bool]
    value: Callable[[Record], float]
    less: bool = False
    worst: bool = False  # of all values the least alone

    @property
    def limit(self) -> str:
        return f"{'below' if self.less else 'at least'} {self.wanted:g}{self.unit}"

    def cell(self, records: list[Record]) -> str:
        """What a card has, and which of it misses; what failed does."""
        chosen = [r for r in records if self.chosen(r)]
        ran = [r for r in chosen if r["us"] is not None]
        pairs = [(self.value(r), self.value(in_bursts(r))) for r in ran]
        if self.worst and pairs:
            pairs = [(min(steady for steady, _ in pairs), min(burst for _, burst in pairs))]
        told = [self._told(*pair) for pair in pairs]
        return ", ".join(told + ["failed (missed)"] * (len(chosen) - len(ran)))

    def _told(self, steady: float, burst: float) -> str:
        missed = steady >= self.wanted if self.less else steady < self.wanted
        text = f"{steady:{self.form}}{self.unit}"
        return f"{text} (missed; {burst:{self.form}} in bursts)" if missed else text


def _expert(hidden: int, rows: tuple[int, ...]) -> Callable[[Record], bool]:
    return lambda r: (
        r["op"] == "expert_ffn" and r["shape"]["hidden"] == hidden and r["shape"]["rows"] in rows
    )


def _op(*ops: str, **shape: Any) -> Callable[[Record], bool]:
    return lambda r: r["op"] in ops and shape.items() <= r["shape"].items()


TARGETS = (
    Target("an expert of 18432, 1, 16, 64, 128 rows, of read bandwidth", 80, " %", ".1f", _expert(18432, _FEW), _share),
    Target("an expert of 2048, the same", 60, " %", ".1f", _expert(2048, _FEW), _share),
    Target("of 18432, 128 rows, against the chain", 1.3, "x", ".2f", _expert(18432, (128,)), _faster),
    Target("of 2048, 128 rows, against the chain", 1.8, "x", ".2f", _expert(2048, (128,)), _faster),
    Target("of 18432, 2,048, 4,096, 8,192 rows, PFLOP/s", _FP8_TARGET, "", ".3f", _expert(18432, _MANY), _pflops),
    Target("of any number of rows, the least gain on the chain", 1, "x", ".2f", _op("expert_ffn"), _faster, worst=True),
    Target("quant, pack, combine, 4,096 rows, of copy bandwidth", 85, " %", ".0f",
           _op("quant", "pack", "combine", rows=4096), _share),
    Target("the same, 128 rows, and combine of rows in L2", 6, " us", ".1f",
           _op("quant", "pack", "combine", rows=128), _us, less=True),
    Target("MLA decode, bf16 cache, rope 64 and 16, of its floor", 80, " %", ".0f",
           _op("mla_decode", cache="bf16"), _share),
    Target("the same, FP8 cache", 80, " %", ".0f", _op("mla_decode", cache="fp8"), _share),
    Target("gate of 128 rows, 256 experts", 8, " us", ".1f", _op("gate", rows=128), _us, less=True),
)  # fmt: skip


def targets(results: list[dict[str, Any]]) -> str:
    """Markdown: a row per target, a column per card; a value that misses it says so."""
    heads = ["", "target", *(str(result["card"]) for result in results)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for target in TARGETS:
        cells = [target.cell(result["records"]) for result in results]
        lines.append(f"| {' | '.join([target.what, target.limit, *cells])} |")
    return "\n".join(lines)
