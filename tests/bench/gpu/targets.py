"""What GPUs were to reach, beside what the record has: the first table of README's GPU section."""

from collections.abc import Iterable
from typing import Any

from common.model.presets import preset_config
from tests.bench.gpu.results import read

HOP = 3801088  # bytes: 512 tokens in FP8
_TOKENS = (128, 512, 1024)
Rows = dict[tuple[int, int], dict[str, Any]]  # by tokens and blocks in flight


def targets() -> str:
    """Each with its baseline where it has one; a figure that misses says so."""
    return "\n".join(["| | target | measured |", "|---|---|---|", *_hop(), *_trips(), *_serving()])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _below(limit: float, value: float, form: str = ".0f") -> str:
    return f"{value:{form}}{'' if value < limit else ' (missed)'}"


def _above(limit: float, value: float) -> str:
    return f"{value:.0f}{'' if value >= limit else ' (missed)'}"


def _hop() -> list[str]:
    found = next(r for r in read("hop")["rows"] if r["bytes"] == HOP)
    return [
        _row(
            "one hop of 3.8 MB", "below 40 us",
            f"{_below(40, found['landed_us'], '.1f')} us as rows of answers land, "
            f"{_below(40, found['one_way_us'], '.1f')} as rows are offered and copied",
        ),
        _row(
            "the same, 8 in flight", "150 GB/s",
            f"{_above(150, found['landed_gb_per_s_8'])} and {_above(150, found['gb_per_s_8'])} GB/s",
        ),
    ]  # fmt: skip


def _trips() -> list[str]:
    one, several, idle, idle_several, bare = (
        _by_load(name) for name in ("round_trip", "routers", "small", "small_routers", "bare_loop")
    )
    nccl = {r["tokens"]: r for r in read("nccl")["rows"]}
    few, many = (128, 1), (128, 3)
    exchanges = [f"{nccl[n]['exchange_us']:.0f}" for n in _TOKENS]
    layers = _and(f"{nccl[n]['layer_us']:.0f}" for n in _TOKENS)
    limits = 200.0, nccl[512]["exchange_us"], nccl[1024]["exchange_us"]
    apart = [
        _below(limit, one[n, 1]["without_expert_us"])
        for n, limit in zip(_TOKENS, limits, strict=True)
    ]
    alone, flying = bare[few]["latency_us"], bare[many]["per_block_us"]
    count = read("routers")["routers"]
    return [
        _row(
            "128 tokens to 8 experts and back, without the experts' own time",
            f"273, then 200 us; NCCL's two exchanges alone: {exchanges[0]} us", f"{apart[0]} us",
        ),
        _row("512 and 1,024 tokens", f"NCCL's exchanges: {_and(exchanges[1:])} us", f"{_and(apart[1:])} us"),
        _row(
            "128 tokens, three blocks in flight, per block", "200 us",
            f"{_below(200, several[many]['per_block_us'])} us with {count} routers, "
            f"{_below(200, one[many]['per_block_us'])} with one; idle experts, {read('small_routers')['routers']} "
            f"routers: {idle_several[many]['per_block_us']:.0f}",
        ),
        _row(
            f"128 tokens, against a bare loop in Python over the same transports ({alone:.0f} us; three in flight "
            f"{flying:.0f} per block)", "1.3 times",
            f"{_below(1.3, one[few]['latency_us'] / alone, '.2f')} times (without the experts "
            f"{one[few]['without_expert_us'] / alone:.2f}, with idle ones {idle[few]['latency_us'] / alone:.2f}); "
            f"three in flight {_below(1.3, one[many]['per_block_us'] / flying, '.2f')}, {count} routers "
            f"{_below(1.3, several[many]['per_block_us'] / flying, '.2f')}",
        ),
        _row(
            f"a layer against NCCL's synchronous one ({layers} us at 128, 512 and 1,024 tokens)", "as fast",
            f"{_faster(nccl, one, (1,), 'latency_us')} times as fast alone; three in flight "
            f"{_faster(nccl, one, (3,), 'per_block_us')}; {count} routers, three or four in flight "
            f"{_faster(nccl, several, (3, 4), 'per_block_us')}",
        ),
    ]  # fmt: skip


def _serving() -> list[str]:
    alone, three, reference, demo = (
        read(f"serving_{name}") for name in ("m1", "m3", "reference", "demo")
    )
    python = {"one micro-batch": alone, "three": three, "demo model": demo, "reference model": reference}  # fmt: skip
    shape = preset_config(reference["model"], layers=reference["layers"])
    layers, dense = shape["num_hidden_layers"], shape["first_k_dense_replace"]
    of_each = _python(reference, (layers - dense) / layers)
    said = [
        f"{name} {_python(facts)} at {_and(str(r['concurrency']) for r in facts['rows'])} streams"
        for name, facts in python.items()
    ]
    return [
        _row(
            "exposed communication, three micro-batches", "5 % of a step",
            f"`{three['model']}` {_below(5, _exposed(three), '.1f')} %, reference model "
            f"{_below(5, _exposed(reference), '.1f')} %, demo model, whose steps are nearly all messages, "
            f"{_below(5, _exposed(demo), '.1f')} %; one micro-batch {_exposed(alone):.1f} %",
        ),
        _row(
            "attention workers' Python, a MoE layer", "below 100 us",
            f"`{three['model']}`, {'; '.join(said)}, where the graph of one of its {layers - dense} is that of "
            f"{dense} dense layers, too: {of_each} for each of {layers} layers",
        ),
    ]  # fmt: skip


def _by_load(name: str) -> Rows:
    return {(r["tokens"], r["in_flight"]): r for r in read(name)["rows"]}


def _python(facts: dict[str, Any], share: float = 1) -> str:
    """Microseconds of each row, times `share`."""
    return _and(_below(100, r["python_us_per_layer"] * share) for r in facts["rows"])


def _exposed(facts: dict[str, Any]) -> float:
    (traced,) = (r for r in facts["rows"] if "trace" in r)
    return float(traced["trace"]["overlap"][0]["exposed_percent"])


def _faster(
    nccl: dict[int, dict[str, Any]], ours: Rows, in_flight: tuple[int, ...], key: str
) -> str:
    return _and(
        f"{nccl[n]['layer_us'] / min(ours[n, flight][key] for flight in in_flight):.1f}"
        for n in _TOKENS
    )


def _and(values: Iterable[str]) -> str:
    *most, last = values
    return f"{', '.join(most)} and {last}" if most else last
