"""The GPU section of README, from tests/bench/results/gpu."""

from collections import Counter
from statistics import median
from typing import Any

from tests.bench.gpu.results import read
from tests.bench.gpu.targets import targets


def where(facts: dict[str, Any]) -> str:
    """On what, and when."""
    cards = facts["cards"]
    return (
        f"{len(cards)} x {cards[0]}, driver {facts['driver']}, torch {facts['torch']}, ucxx {facts['ucxx']}, "
        f"commit {facts['commit'][:7]}, {facts['date']}"
    )


def spread(row: dict[str, Any], key: str) -> str:
    """A median, and the least and the most of several rounds."""
    low, high = row.get("range", {}).get(key, (row[key], row[key]))
    return f"{row[key]}" if low == high else f"{row[key]} ({low} - {high})"


def gpu() -> str:
    """Targets, hop, round trip beside NCCL, EP256's messages, the reference width, uneven gates, and kills."""
    return "\n\n".join(
        [targets(), hop(), round_trip(), ep256(), serving(), skewed_serving(), kills()]
    )


def hop() -> str:
    return hop_table(read("hop"))


def hop_table(facts: dict[str, Any]) -> str:
    """Rows that the receiver copies, and beside them those that the sender writes, where the file has these."""
    rates = ("1 in flight, GB/s", "8 in flight, GB/s", "32 in flight, GB/s")
    heads, keys, said = ["bytes of a block", "one way, us", *rates], [""], ""
    if any("landed_us" in r for r in facts["rows"]):  # older files have none
        heads += ["landed: one way, us", *(f"landed: {rate}" for rate in rates)]
        keys.append("landed_")
        said = (
            " Landed: rows of an answer, which the answering side writes into the asker's memory; one way is from "
            "before that copy is launched until the asker knows, rates are with the questions."
        )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in facts["rows"]:
        cells = [str(r["bytes"])]
        for before in keys:
            us = "landed_us" if before else "one_way_us"
            if us in r:
                cells += [spread(r, us), f"{r[f'{before}gb_per_s_1']}"]
                cells += [spread(r, f"{before}gb_per_s_8"), f"{r[f'{before}gb_per_s_32']}"]
            else:
                cells += ["-"] * 4
        lines.append(f"| {' | '.join(cells)} |")
    source = f"`python -m tests.bench.gpu.hop`: GPU to GPU over NVLink, {where(facts)}."
    return "\n".join([*lines, "", source + said])


def round_trip() -> str:
    """One router, and several that divide blocks, beside NCCL and the bare loop."""
    nccl, bare, *ours = (
        read(name) for name in ("nccl", "bare_loop", "round_trip", "routers", "small", "small_routers")
    )  # fmt: skip
    rounds = ours[0].get("rounds", 1)
    layers = {r["tokens"]: r["layer_us"] for r in nccl["rows"]}
    floor = {(r["tokens"], r["in_flight"]): r for r in bare["rows"]}
    lines = [
        "| experts' hidden width | tokens | blocks in flight | routers | round trip, us | without the expert, us "
        "| us per block | bare loop: round trip, per block, us | NCCL, synchronous: us per layer |",
        "|---" * 9 + "|",
    ]
    rows = [
        ((-facts["hidden"], r["tokens"], r["in_flight"], facts["routers"]), r)
        for facts in ours
        for r in facts["rows"]
    ]
    for (hidden, tokens, in_flight, routers), r in sorted(rows, key=lambda row: row[0]):
        least = floor.get((tokens, in_flight))
        beside = "" if least is None else f"{least['latency_us']}, {least['per_block_us']}"
        ours_us = [spread(r, key) for key in ("latency_us", "without_expert_us", "per_block_us")]
        lines.append(
            f"| {-hidden} | {tokens} | {in_flight} | {routers} | {' | '.join(ours_us)} | {beside} "
            f"| {layers.get(tokens, '')} |"
        )
    return "\n".join(
        [
            *lines, "",
            f"`python -m tests.bench.gpu.round_trip [--routers N --divide blocks] [--hidden {ours[-1]['hidden']}]`, "
            f"{ours[0]['experts']} experts, every token to all of them; experts of hidden width {ours[-1]['hidden']} "
            "do next to nothing, as those of the bare loop; `python -m tests.bench.gpu.bare_loop`: the same way, "
            "experts that only convert their rows, none of our protocol; `python -m tests.bench.gpu.nccl`; all in one "
            f"call, {'once' if rounds == 1 else f'the median of {rounds} rounds in turn (the least and the most)'}. "
            f"{where(ours[0])}.",
        ]
    )  # fmt: skip


def serving() -> str:
    """Tokens per second of whole models."""
    lines = [
        "| model | micro-batches | routers | concurrency | tokens/s | tokens/s while decoding "
        "| time per output token, ms | exposed communication, % of the step | on a free wire, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for file in ("serving_m1", "serving_m3", "serving_reference", "serving_demo"):
        facts = read(file)
        name, experts = "demo model", ""
        if file != "serving_demo":
            name = f"{facts['model']}, {facts['layers']} layers"
            experts = f" with 32 experts of each layer, {facts['distinct']} of them distinct"
        batches = facts["rows"][0]["microbatches"]
        notes.append(
            f"{name}, micro-batches {batches}: {facts['workers']} expert workers{experts}; {where(facts)}"
        )
        for r in facts["rows"]:
            seen = r.get("trace", {}).get("overlap", [{}])[0]
            stalled = r["tpot_ms"] <= 0  # a short run took longer than a long one
            decoding = "-" if stalled else round(r["decode_tokens_per_s"])
            lines.append(
                f"| {name} | {r['microbatches']} | {facts['routers']} | {r['concurrency']} "
                f"| {r['tokens_per_s']:.0f} | {decoding} | {'-' if stalled else r['tpot_ms']} "
                f"| {seen.get('exposed_percent', '')} | {seen.get('free_wire_exposed_percent', '')} |"
            )
    return "\n".join(
        [
            *lines, "",
            f"`python -m tests.bench.gpu.serving`, full width. {'. '.join(dict.fromkeys(notes))}.",
        ]
    )  # fmt: skip


def ep256() -> str:
    """Messages and bytes of an expert per worker on many nodes, and what they cost."""
    facts = read("ep256")
    lines = [
        "| nodes | tokens | blocks in flight | round trip, us | us per block | experts asked "
        "| rows between nodes: counted, planner's, unicast's "
        "| MB between nodes: out, back, planner's busiest link (us) "
        "| messages of a block: node 0's router, another's, experts | node 0's router at work, us (per message) "
        "| another router, us (per message) |",
        "|---" * 11 + "|",
    ]
    for layout in facts["layouts"]:
        for r in layout["rows"]:
            crossing, said, experts = r["between_nodes"], r["planner"], r["experts"]
            cells = [
                layout["nodes"], r["tokens"], r["in_flight"], r["latency_us"], r["per_block_us"], experts["asked"],
                f"{crossing['rows']}, {said['rows_between_nodes']}, {said['unicast_rows_between_nodes']}",
                ", ".join(f"{crossing[key] / 1e6:.2f}" for key in ("bytes_out", "bytes_in"))
                + f", {said['busiest_link_bytes'] / 1e6:.2f} ({said['busiest_link_us']:.0f})",
                f"{messages(r['source_router'])}, {messages(r['other_routers'])}, {experts['messages']}",
                work(r["source_router"]), work(r["other_routers"]),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(
        [
            *lines, "",
            f"`python -m tests.bench.gpu.ep256`: {facts['experts']} expert workers with an expert each (hidden "
            f"{facts['hidden']}, weights of its own), one attention worker, V3's gate as uneven as the demo model's "
            f"({facts['skew']}), FP8 out and BF16 back. Real services; {facts['expert_hosts']} processes host all "
            f"experts on one card, {facts['router_hosts']} the routers of all nodes but node 0 on the other, so that "
            "latencies are of two cards that play all; counts are the services' own. At work: polls of the transport "
            "that found something, and all that is called from there. The planner's link is a NIC of 400 Gb/s. A "
            f"few rows against weights of the same device: off by {max(x['error'] for x in facts['layouts']):.3f} "
            f"(root mean square). {where(facts)}.",
        ]
    )  # fmt: skip


def messages(router: dict[str, float]) -> float | str:
    """In and out."""
    if "messages_in" not in router:
        return "-"
    return round(router["messages_in"] + router["messages_out"], 1)


def work(router: dict[str, float]) -> str:
    """Microseconds for a block, and for each of its messages."""
    count = messages(router)
    if isinstance(count, str) or "busy_us" not in router:
        return "-"
    return f"{router['busy_us']:.0f} ({router['busy_us'] / count:.1f})"


def skewed_serving() -> str:
    """The same model with gates of several unevennesses."""
    facts = read("serving_skew")
    lines = [
        "| gates | busiest expert, worker over the mean | concurrency | tokens/s | tokens/s while decoding "
        "| time per output token, ms | attention: Python per layer, us |",
        "|---" * 7 + "|",
    ]
    lines += [
        f"| {r['skew']} | {r['routed']['busiest_expert']}, {r['routed']['busiest_worker']} | {r['concurrency']} "
        f"| {r['tokens_per_s']:.0f} | {r['decode_tokens_per_s']:.0f} | {r['tpot_ms']} | {r['python_us_per_layer']} |"
        for r in facts["rows"]
    ]
    return "\n".join(
        [
            *lines, "",
            f"`python -m tests.bench.gpu.serving --skew ...`: {facts['model']}, {facts['layers']} layers, "
            f"{facts['workers']} expert workers, {facts['routers']} routers that divide {facts['divide']}, "
            f"{facts['rows'][0]['microbatches']} micro-batches. none: random gates as they are; measured: as uneven as "
            "the demo model's on its held-out text; imitated: as a synthetic V3 gate off its training mix (busiest "
            "expert 3.5 times the mean). Biases are fitted on white noise, which rows of a random model are not: "
            f"what its gates chose is in the table, as the routers counted it. {where(facts)}.",
        ]
    )  # fmt: skip


def kills() -> str:
    """How long a cluster takes to be whole again."""
    facts = read("kills")
    lines = [
        "| killed at once | times | whole again after, s: median, most | requests that failed |",
        "|---|---|---|---|",
    ]
    seconds: dict[str, list[float]] = {}
    failed: Counter[str] = Counter()
    for row in facts["rows"]:
        kinds = [name.partition("-")[0] for name in row["killed"]]
        counts = {kind: kinds.count(kind) for kind in kinds}
        group = ", ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in counts.items())
        seconds.setdefault(group, []).append(row["ready_again_s"])
        failed[group] += row["failed"]
    lines += [
        f"| {group} | {len(times)} | {median(times):.1f}, {max(times):.1f} | {failed[group]} |"
        for group, times in seconds.items()
    ]
    return "\n".join(
        [
            *lines, "",
            f"`python -m tests.bench.gpu.kills`: `atoll up` with two attention workers, {facts['experts']} expert "
            f"workers and {facts['routers']} routers that divide blocks, the demo model, {facts['streams']} streams, "
            f"experts killed while they owe a block. Of {facts['requests']} answers of {facts['tokens']} tokens "
            f"{facts['changed']} have other tokens than before, and nobody fell who was not killed. {where(facts)}.",
        ]
    )  # fmt: skip
