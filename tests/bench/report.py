"""README's figures from the committed results: `python -m tests.bench.report` rewrites them, a test compares.

A section of README.md lies between `<!-- name -->` and `<!-- /name -->`; nothing in it is typed by hand.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.gpu.report import gpu

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
ORACLE = ROOT / "tests" / "oracle" / "results.json"
WHOLE_ORACLE = ROOT / "tests" / "oracle" / "results-whole.json"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def where(facts: dict[str, Any]) -> str:
    """The line under a table: what it was measured on."""
    return (
        f"{facts['cores']} cores of an {facts['cpu']} shared with other work (load {facts['load']}), "
        f"torch {facts['torch']}, "
        f"commit {facts['commit']}, {facts['date']}."
    )


def oracle() -> str:
    """What the oracle saw: the whole cross, and the pairwise cover."""
    cover = read(ORACLE)
    if WHOLE_ORACLE.exists():
        whole = oracle_run(read(WHOLE_ORACLE))
    else:  # an earlier run, which noted no more than this
        old = cover["whole_cross"]
        whole = (
            f"commit {old['commit']}, {old['date']}: {old['clusters_passed']} clusters, all passed"
        )
    return (
        f"`make test-oracle`, every random checkpoint under every layout, {whole}. "
        f"The pairwise cover that `make test` runs, {oracle_run(cover)}. "
        f"Each cluster answers one request alone and eight at once."
    )


def oracle_run(result: dict[str, Any]) -> str:
    """One run of the oracle in a clause."""
    runs = result["runs"]
    identical = sum(run["identical"] for run in runs)
    wrong = result["continuations"] - identical - result["excused"]
    starved = sum(run["least_rows_of_an_expert"] == 0 for run in runs)
    return (
        f"commit {result['commit']}, {result['date']}: {len(runs)} clusters, {result['continuations']} continuations "
        f"of 64 tokens, {identical} identical, {result['excused']} excused as near-ties, {wrong} wrong; "
        f"{starved} clusters with an expert that got no rows"
    )


def cluster() -> str:
    """Start-up and idle."""
    facts = read(RESULTS / "cluster.json")
    lines = ["| experts | processes | ready after, s | idle, % of one core |", "|---|---|---|---|"]
    lines += [
        f"| {r['experts']} | {r['processes']} | {r['ready_s']} | {r['idle_percent_of_a_core']} |"
        for r in facts["rows"]
    ]
    return "\n".join([*lines, "", f"`python -m tests.bench.cluster`: {where(facts)}"])


def ep256() -> str:
    """256 expert processes on one machine."""
    facts = read(RESULTS / "ep256.json")
    costs, idle = facts["routers"], facts["idle_percent_of_a_core"]
    saved = costs["cross_node_rows_unicast"] / costs["cross_node_rows"]
    return (
        f"256 expert processes, 32 routers (every pair linked), {facts['processes']['attention']} attention workers: "
        f"ready after {facts['second_start_s']} s (first start {facts['first_start_s']} s), {facts['total_mb']} MB in "
        f"all (sum of PSS and /dev/shm), idle at {sum(idle.values()):.1f} % of one core; {facts['identical']} of "
        f"{facts['continuations']} concurrent continuations of {facts['tokens_each']} tokens identical to "
        f"`transformers`. {costs['router_operations_per_block']} message operations of routers per block; "
        f"{saved:.2f}x fewer rows crossed nodes than unicast would send.\n\n"
        f"`{facts['command']}`: {where(facts)}"
    )


def serving() -> str:
    """Tokens per second against transformers."""
    lines = [
        "| checkpoint | concurrency | ours, tokens/s | transformers, tokens/s (best of) | ratio | CPU ms per token, "
        "ours / transformers |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for path in sorted(RESULTS.glob("serving-*.json")):
        facts = read(path)
        lines += [
            f"| {facts['model']} | {r['concurrency']} | {r['ours']:.0f} | {r['transformers']:.0f} "
            f"({r['transformers_best']}) | {r['ratio']:.2f} "
            f"| {r['cpu_us'] / 1000:.2f} / {r['transformers_cpu_us'] / 1000:.2f} |"
            for r in facts["rows"]
        ]
        notes.append(f"{facts['model']}: {where(facts)}")
    return "\n".join([*lines, "", "`python -m tests.bench.serving`. " + " ".join(notes)])


def transport() -> str:
    """Messages against asyncio streams and pyzmq; ratios above 1 are in our favour."""
    facts = read(RESULTS / "transport.json")
    ours = facts["results"]["atoll"]
    others = [name for name in facts["results"] if name != "atoll"]
    lines = [
        "| bytes | round trip, us | messages/s | CPU us to send / receive | "
        + " | ".join(f"faster round trip than {n} | more messages than {n}" for n in others) + " |",
        "|---" * (4 + 2 * len(others)) + "|",
    ]  # fmt: skip
    for size, row in ours.items():
        cells = [
            f"{facts['results'][n][size]['p50_us'] / row['p50_us']:.2f} | "
            f"{row['messages_per_s'] / facts['results'][n][size]['messages_per_s']:.2f}"
            for n in others
        ]
        lines.append(
            f"| {size} | {row['p50_us']:.0f} | {row['messages_per_s']:.0f} "
            f"| {row['send_cpu_us']:.0f} / {row['receive_cpu_us']:.0f} | {' | '.join(cells)} |"
        )
    idle = f"{facts['idle_processes']} connected idle processes: {facts['idle_percent']:.2f} % of one core together."
    return "\n".join([*lines, "", f"`python -m tests.bench.transport`: {where(facts)} {idle}"])


def rebalance() -> str:
    """Time between tokens, with a rebalance and without."""
    facts = read(RESULTS / "rebalance.json")
    calm = facts["rows"][0]["p99_ms"]
    lines = [
        "| runs | gaps between tokens | p50, ms | p99, ms | against undisturbed | longest, ms | rebalance took, s |",
        "|---" * 7 + "|",
    ]
    lines += [
        f"| {r['kind']} | {r['gaps']} | {r['p50_ms']} | {r['p99_ms']} | {r['p99_ms'] / calm:.2f} | {r['max_ms']} | "
        f"{', '.join(map(str, r.get('took_s', ['-'])))} |"
        for r in facts["rows"]
    ]
    streams = f"{facts['streams']} streams of {facts['tokens']} tokens"
    note = f"`python -m tests.bench.rebalance --size {facts['size']}`, {streams}"
    return "\n".join([*lines, "", f"{note}: {where(facts)}"])


SECTIONS: dict[str, Callable[[], str]] = {
    "oracle": oracle,
    "cluster": cluster,
    "ep256": ep256,
    "serving": serving,
    "transport": transport,
    "gpu": gpu,
    "rebalance": rebalance,
}


def render(text: str) -> str:
    """README with every section made anew."""
    for name, make in SECTIONS.items():
        before, opening, rest = text.partition(f"<!-- {name} -->\n")
        _, closing, after = rest.partition(f"<!-- /{name} -->")
        assert opening, f"README has no section {name}"
        assert closing, f"README's section {name} does not end"
        text = before + opening + make() + "\n" + closing + after
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
