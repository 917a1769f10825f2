"""Placements on routing traces: ours against EPLB's, round-robin and random; fitted on a half, scored on the other.

    python -m tests.bench.placement [--search] [--out FILE]

Nothing is timed but the search. Traces: the demo model's on held-out text, independent experts of Zipf popularity, and
a generator that mimics DeepSeek-V3's gate (`tests.routing_traces`). Fabrics of four nodes:
    equal    one NIC of 400 Gb/s each, an attention worker each
    mixed    two of the NICs have half the speed
    apart    two of the nodes have all attention workers
    leaves   two under each leaf switch, the uplinks four times oversubscribed
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.placement.baselines import eplb_layer
from common.placement.links import build_links
from common.placement.optimise import Options, layer_slots, optimise
from common.placement.plan import Layer, Plan
from common.placement.routing_trace import RoutingTrace
from common.placement.score import score
from common.placement.swap import Budget
from common.placement.topology import Topology, uniform
from common.routing_trace_file import read_trace
from tests.bench.environment import facts
from tests.demo_model import REFERENCE
from tests.routing_traces import group_limited, zipf

V3 = "V3 gate, top-8 of 256"
HINDSIGHT = Budget(kicks=8)
RANDOM_SEEDS = 5


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table. `per_gpu` and `replicas` as in `Options`."""

    trace: str
    fabric: str
    layout: str
    topology: Topology
    options: Options


def traces() -> dict[str, RoutingTrace]:
    """By name; V3's has four layers here (all 58 for the time of the search)."""
    demo = read_trace(REFERENCE / "routing.npz", num_experts=16)
    found = {"demo model, top-4 of 16": replace(demo, num_experts=16, num_groups=4, top_k_groups=2)}
    for top_k, experts in ((2, 16), (4, 64), (8, 64)):
        found[f"Zipf 0.8, top-{top_k} of {experts}"] = zipf(
            layers=range(4), tokens=16384, num_experts=experts, top_k=top_k, exponent=0.8, seed=1
        )
    return found | {V3: group_limited(layers=range(3, 7), tokens=32768)}


def fabrics(gpus: int) -> Iterator[tuple[str, Topology]]:
    """Four nodes with `gpus` expert GPUs each."""
    equal = uniform(4, gpus)
    nodes = equal.nodes
    yield "equal", equal
    yield (
        "mixed",
        Topology(tuple(replace(n, nic=n.nic / (1 + i // 2)) for i, n in enumerate(nodes))),
    )
    yield "apart", Topology(tuple(replace(n, attention=1 - i // 2) for i, n in enumerate(nodes)))
    leaves = tuple(replace(n, leaf=i // 2) for i, n in enumerate(nodes))
    yield "leaves", Topology(leaves, uplink=2 * nodes[0].nic / 4)


def cases(name: str, num_experts: int) -> Iterator[Case]:
    """Every layout on every fabric, and for V3's gate the deployments that DeepSeek published."""
    some, half = max(4, num_experts // 8), num_experts // 2
    for layout, options in (
        ("one per GPU", Options()),
        (f"one per GPU, {some} replicas", Options(replicas=some)),
        (f"one per GPU, {half} replicas", Options(replicas=half)),
        ("four per GPU", Options(experts_per_gpu=4)),
    ):
        gpus = (num_experts + options.replicas) // options.experts_per_gpu // 4
        for fabric, topology in fabrics(gpus):
            yield Case(name, fabric, layout, topology, options)
    if name == V3:
        packed = {9: uniform(4, 8), 2: uniform(18, 8)}
        for per_gpu, kind in ((9, "EP32, 4 nodes"), (2, "EP144, 18 nodes")):
            options = Options(replicas=32, experts_per_gpu=per_gpu)
            yield Case(name, "equal", f"{kind}, 32 replicas", packed[per_gpu], options)
        yield Case(name, "equal", "EP256, 32 nodes", uniform(32, 8), Options())


def even(num_experts: int, num_workers: int) -> list[int]:
    """How many experts each worker takes."""
    marks = np.arange(num_workers + 1) * num_experts // num_workers
    return list(map(int, np.diff(marks)))


def in_order(order: list[int], capacities: list[int]) -> Layer:
    """Experts in some order, filling worker after worker."""
    slots = iter([w for w, room in enumerate(capacities) for _ in range(room)])
    workers = dict(zip(order, slots, strict=False))
    return tuple((workers[e],) for e in range(len(order)))


def round_robin(num_experts: int, nodes: tuple[int, ...]) -> Layer:
    """Expert e beside the experts that differ by the number of nodes: dealt out node by node. Equal nodes."""
    count = len(set(nodes))
    order = [e for first in range(count) for e in range(first, num_experts, count)]
    return in_order(order, even(num_experts, len(nodes)))


def random(num_experts: int, num_workers: int, rng: np.random.Generator) -> Layer:
    """Any permutation."""
    return in_order(rng.permutation(num_experts).tolist(), even(num_experts, num_workers))


def baseline(
    kind: Callable[..., Any], trace: RoutingTrace, topology: Topology, *arguments: Any
) -> Plan:
    """A placement that looks at no trace, the same in every layer."""
    layer = kind(trace.num_experts, *arguments)
    return Plan(1, dict.fromkeys(trace.layers, layer), topology.worker_nodes)


def eplb(trace: RoutingTrace, topology: Topology, options: Options) -> Plan:
    slots = layer_slots(topology, trace.num_experts + options.replicas, len(trace.layers), options)
    layers = {
        layer: eplb_layer(load, slot, trace.num_groups, options.replicas)
        for layer, load, slot in zip(trace.layers, trace.loads, slots, strict=True)
    }
    return Plan(1, layers, topology.worker_nodes)


def measure(case: Case, trace: RoutingTrace, run: Callable[..., Any]) -> dict[str, Any]:
    """Scores on the second half, links and rows relative to EPLB's."""
    fit, held_out = trace.halves()
    topology, options = case.topology, case.options
    links = build_links(topology, options.row)
    theirs = score(eplb(fit, topology, options), held_out, links)
    ours = score(optimise(fit, topology, options, run=run), held_out, links)
    row = {
        "trace": case.trace, "fabric": case.fabric, "layout": case.layout,
        "link_ratio": ours.link_s / theirs.link_s, "rows": ours.rows, "unicast_rows": ours.unicast_rows,
        "eplb_rows": theirs.rows, "gpu_load": ours.gpu_load, "eplb_gpu_load": theirs.gpu_load,
    }  # fmt: skip
    if not options.replicas:
        nodes = topology.worker_nodes
        dealt = score(baseline(round_robin, trace, topology, nodes), held_out, links)
        by_chance = [
            score(
                baseline(random, trace, topology, len(nodes), np.random.default_rng(seed)),
                held_out, links,
            ).link_s
            for seed in range(RANDOM_SEEDS)
        ]  # fmt: skip
        row |= {"round_robin_link_ratio": ours.link_s / dealt.link_s}
        row |= {"random_link_ratio": ours.link_s / float(np.mean(by_chance))}
    if case.fabric == "equal" and not options.replicas:
        # what de-duplication can give: a longer search on the very tokens that are scored, or EPLB's if that is less
        longer = replace(options, budget=HINDSIGHT, max_tokens=held_out.num_tokens)
        known = optimise(held_out, topology, longer, run=run)
        best = min(score(known, held_out, links).rows, theirs.rows, ours.rows)
        row["saved_of_possible"] = (ours.unicast_rows - ours.rows) / (ours.unicast_rows - best)
    return {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}


def cpu_s() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def search_time() -> dict[str, dict[str, float]]:
    """Seconds to place 58 layers of 256 experts with two processes, and their CPU seconds; by replicas."""
    fit, _ = group_limited(layers=range(3, 61), tokens=16384).halves()
    found = {}
    for replicas in (0, 32):
        started, cpu = time.monotonic(), cpu_s()
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            topology = uniform(4, (256 + replicas) // 4)
            optimise(fit, topology, Options(replicas=replicas), run=pool.imap)
            wall = time.monotonic() - started
            pool.close()
            pool.join()
        found[str(replicas)] = {"wall_s": round(wall, 1), "cpu_s": round(cpu_s() - cpu, 1)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="F", help="write the result as JSON")
    parser.add_argument("--search", action="store_true", help="only the time of the search, into F")
    arguments = parser.parse_args()
    if arguments.search:
        searched = {"search": search_time() | facts()}
        print(searched)
        if arguments.out is not None:
            result = json.loads(arguments.out.read_text()) | searched
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        return
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        run = pool.imap
        rows = []
        for name, trace in traces().items():
            for case in cases(name, trace.num_experts):
                rows.append(measure(case, trace, run))
                print(json.dumps(rows[-1]), flush=True)
    result: dict[str, Any] = {"rows": rows, "search": search_time() | facts()}
    print(result["search"])
    if arguments.out is not None:
        result |= facts() | {"command": "python -m tests.bench.placement"}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
