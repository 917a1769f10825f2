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
        f"{facts['cores']} cores of an {facts['cpu']}, load at the end {facts['load']} with its own, "
        f"torch {facts['torch']}, "
        f"commit {facts['commit']}, {facts['date']}."
    )


def oracle() -> str:
    """What the oracle saw: the whole cross, and the pairwise cover."""
    cover = read(ORACLE)
    whole = oracle_run(read(WHOLE_ORACLE))
    return (
        f"`make test-oracle`, every random checkpoint under every layout, {whole}. "
        f"The pairwise cover that `make test` runs, {oracle_run(cover)}. "
        f"Each cluster answers eight requests at once and the first of them alone, in the cover 24 tokens of it."
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
            f"| {cpu_ms(r)} |"
            for r in facts["rows"]
        ]
        notes.append(f"{facts['model']}: {where(facts)}")
    return "\n".join([*lines, "", "`python -m tests.bench.serving`. " + " ".join(notes), *floor()])


def floor() -> list[str]:
    """Why sixteen small experts on two cores cannot be as fast as one process: CPU per token at 16 requests."""
    small = read(RESULTS / "serving-small.json")
    (row,) = (r for r in small["rows"] if r["concurrency"] == 16)
    if "cpu_us_by_role" not in row:
        return []
    turns = read(RESULTS / "expert-turns.json")
    message = read(RESULTS / "transport.json")["results"]["atoll"]["4096"]
    layers, experts, tokens = 3, 16, 16  # of the small model; a step of 16 tokens asks every expert
    calls = layers * experts / tokens
    messages = 2 * calls  # to experts and back
    call_ms = calls * turns["call_us_16"] / 1000
    message_ms = messages * (message["send_cpu_us"] + message["receive_cpu_us"]) / 1000
    roles = row["cpu_us_by_role"]
    rest_ms = (roles["attention"] + roles["gateway"]) / 1000
    least, theirs = call_ms + message_ms + rest_ms, row["transformers_cpu_us"] / 1000
    by_role = ", ".join(f"{role} {us / 1000:.2f}" for role, us in roles.items())
    return [
        "",
        f"The floor at 16 requests on small-random, in ms of CPU per token: {calls:.0f} calls of experts of "
        f"{turns['call_us_16'] / 1000:.2f} ms, messages apart ({turns['call_us_1'] / 1000:.2f} ms in one process; with "
        f"sixteen taking turns on a core nothing is left in its caches; `python -m tests.bench.expert_turns`), make "
        f"{call_ms:.2f}; their {messages:.0f} messages {message_ms:.2f}; attention and gateway {rest_ms:.2f}. "
        f"Together {least:.2f}, with a router that computes nothing, against {theirs:.2f} of transformers: "
        f"{theirs / least:.2f}x at best. Measured: {by_role}.",
    ]


def cpu_ms(row: dict[str, Any]) -> str:
    """Ours and theirs; results of before 2026-11-25 have neither."""
    if "cpu_us" not in row:
        return "not measured"
    return f"{row['cpu_us'] / 1000:.2f} / {row['transformers_cpu_us'] / 1000:.2f}"


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
    if alone := facts.get("ucx_alone"):
        share = facts["results"]["asyncio streams"]["64"]["p50_us"] / alone["p50_us"]
        idle += (
            f" UCX alone, without our header, credits and buffers: a round trip of {alone['p50_us']:.0f} us, "
            f"{share:.2f} of what asyncio streams reach."
        )
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
    note = f"`python -m tests.bench.rebalance --size {facts['size']} --tokens {facts['tokens']}`, {streams}"
    return "\n".join([*lines, "", f"{note}: {where(facts)}"])


def placement() -> str:
    """Placements against EPLB's: means over traces by fabric and layout, and every trace on equal nodes."""
    facts = read(RESULTS / "placement.json")
    rows = facts["rows"]
    lines = [
        "| trace, 4 equal nodes | layout | rows between nodes: unicast / ours / EPLB | busiest link against EPLB's, "
        "round-robin's, random's | busiest GPU over mean, ours / EPLB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row["fabric"] != "equal":
            continue
        blind = [row.get(f"{name}_link_ratio") for name in ("round_robin", "random")]
        ratios = [f"{r:.2f}" for r in (row["link_ratio"], *blind) if r is not None]
        lines.append(
            f"| {row['trace']} | {row['layout']} | {row['unicast_rows']:.2f} / {row['rows']:.2f} / "
            f"{row['eplb_rows']:.2f} | {', '.join(ratios)} | {row['gpu_load']:.2f} / {row['eplb_gpu_load']:.2f} |"
        )
    fabrics = list(dict.fromkeys(row["fabric"] for row in rows))
    means = [(f, [row["link_ratio"] for row in rows if row["fabric"] == f]) for f in fabrics]
    every = [row["link_ratio"] for row in rows]
    worse = [row for row in rows if row["gpu_load"] > row["eplb_gpu_load"] * 1.0001]
    most = max((row["gpu_load"] / row["eplb_gpu_load"] - 1 for row in worse), default=0.0)
    saved = [row["saved_of_possible"] for row in rows if "saved_of_possible" in row]
    search = facts.get("search")
    took = "" if search is None else (
        f" Placing 58 layers of 256 experts by two processes: {search['0']['wall_s']} s ({search['0']['cpu_s']} s of "
        f"CPU, load {search['load']}), with 32 replicas {search['32']['wall_s']} s ({search['32']['cpu_s']} s)."
    )  # fmt: skip
    return "\n".join([
        *lines, "",
        "Busiest link against EPLB's, mean over traces and layouts: "
        + ", ".join(f"{fabric} {sum(r) / len(r):.3f} ({len(r)})" for fabric, r in means)
        + f"; all {sum(every) / len(every):.3f} ({len(every)}), from {min(every):.2f} to {max(every):.2f}. "
        f"The busiest GPU is worse than EPLB's in {len(worse)} of {len(every)} (by at most {100 * most:.1f} %). "
        f"Of the rows that the best placement known in hindsight saves, ours save "
        f"{100 * min(saved):.0f} to {100 * max(saved):.0f} %.{took}",
        "", f"`{facts['command']}`: {where(facts)}",
    ])  # fmt: skip


def namespaces() -> str:
    """Hierarchical dispatch against unicast on limited links."""
    if not (RESULTS / "namespaces.json").exists():
        return "Not measured yet: `make bench-namespaces`."
    facts = read(RESULTS / "namespaces.json")
    lines = [
        "| dispatch | tokens/s | use of the cables, mean, least to most | rows between nodes against unicast's |",
        "|---|---|---|---|",
    ]
    for way, r in facts["ways"].items():
        use = r["use_percent"].values()
        mean = sum(use) / len(use)
        lines.append(
            f"| {way} | {r['tokens_per_s']} | {mean:.1f} %, {min(use):.1f} to {max(use):.1f} % | "
            f"{r['rows'] / r['unicast_rows']:.2f} |"
        )
    return "\n".join([
        *lines, "",
        f"{facts['ratio']:.2f}x the tokens. {facts['kbit_s'] / 1000:g} Mbit/s each way, {facts['concurrency']} "
        f"streams, V3's gate in small (top-8 of 32 experts in 4 of 8 groups). `{facts['command']}`: {where(facts)}",
    ])  # fmt: skip


def router_cost() -> str:
    """CPU of routers by cluster size, operations by rails."""
    if not (RESULTS / "router_cost.json").exists():
        return "Not measured yet: `python -m tests.bench.router_cost`."
    facts = read(RESULTS / "router_cost.json")
    lines = [
        "| experts | routers | CPU us per message | CPU us per row handed on | router operations per block |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['experts']} | {r['nodes']} | {r['cpu_us_per_message']} | {r['cpu_us_per_row']} "
        f"| {r['operations_per_block']} |"
        for r in facts["rows"]
    ]
    rails = ", ".join(
        f"{r['rails']}: {r['per_router_and_layer']} (busiest {r['busiest']})"
        for r in facts["rails"]
    )
    return "\n".join([
        *lines, "", "![the same as a graph](tests/bench/results/router_cost.svg)", "",
        f"EP256 on 32 nodes, a block of 128 rows from every node: messages that one router receives and posts for a "
        f"layer, by rails per node: {rails}.", "", f"`{facts['command']}`: {where(facts)}",
    ])  # fmt: skip


SECTIONS: dict[str, Callable[[], str]] = {
    "oracle": oracle,
    "cluster": cluster,
    "ep256": ep256,
    "serving": serving,
    "transport": transport,
    "gpu": gpu,
    "rebalance": rebalance,
    "placement": placement,
    "namespaces": namespaces,
    "router_cost": router_cost,
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
