"""From topology and routing trace to a plan. Pure: seeded, bounded by iterations, the same on machines of one kind.

One layer after the other, in three steps:
    1. starts (`common.placement.layer_nodes`): EPLB's own placement, whole groups on nodes, experts dealt by load; as
       many replicas per expert as level the largest load per replica best;
    2. nodes of all copies, and which experts have how many: searched together (`common.placement.swap`);
    3. GPUs of each node (`common.placement.packing`): even in the layer, the heaviest where other layers load least.

The largest GPU load (rows over the GPU's relative speed) is held at or below EPLB's at the same budget, in all tokens
and in each run of them; where that leaves no better busiest link, EPLB's placement is taken.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.errors import ConfigError
from common.placement.baselines import eplb_layer
from common.placement.layer_nodes import LayerNodes, LayerTask, place_nodes
from common.placement.links import Links, RowBytes, build_links
from common.placement.packing import Slots, pack_layer
from common.placement.plan import Layer, Plan
from common.placement.routing_trace import RoutingTrace
from common.placement.score import worker_loads
from common.placement.swap import Budget, Floats
from common.placement.topology import Topology


@dataclass(frozen=True, slots=True)
class Options:
    """What kind of plan, and how long to search. Raises ConfigError on a value out of range.

    `experts_per_gpu` 1 is the column layout (one expert of a layer per GPU), more the packed one; `strict` gives every
    layer GPUs of its own (one expert of the whole model per GPU). `replicas` per layer come on top of the experts;
    `spares` workers are left empty, and so are the workers in `excluded` (dead ones).
    """

    experts_per_gpu: int = 1
    strict: bool = False
    replicas: int = 0
    spares: int = 0
    excluded: frozenset[int] = frozenset()
    seed: int = 0
    max_tokens: int = 8192  # of the trace, evenly chosen, that the search looks at
    row: RowBytes = field(default_factory=lambda: RowBytes.of(7168, "fp8"))
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        for name in ("experts_per_gpu", "replicas", "spares", "seed", "max_tokens"):
            least = int(name in ("experts_per_gpu", "max_tokens"))
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")


def optimise(
    trace: RoutingTrace,
    topology: Topology,
    options: Options | None = None,
    *,
    previous: Plan | None = None,
    epoch: int = 1,
    run: Callable[
        [Callable[[LayerTask], LayerNodes | None], Iterable[LayerTask]], Iterable[Any]
    ] = map,
) -> Plan:
    """A plan for every layer of the trace. `run` maps a function over layers: a process pool's `map` uses more cores.

    With `previous`, a plan for the same workers, the search starts there and experts stay on their worker where that
    costs nothing: what a rebalance wants. Raises ConfigError when the GPUs cannot hold the experts under the options,
    or `previous` is for other workers.
    """
    options = options or Options()
    nodes = topology.worker_nodes
    if previous is not None and previous.nodes != nodes:
        raise ConfigError(
            f"the previous plan is for {len(previous.nodes)} expert workers, the topology has "
            f"{len(nodes)}" + (", spread otherwise" if len(previous.nodes) == len(nodes) else "")
        )
    slots = layer_slots(topology, trace.num_experts + options.replicas, len(trace.layers), options)
    links = build_links(topology, options.row)
    loads, step = trace.loads, -(-trace.num_tokens // options.max_tokens)
    before = [_held(previous, layer, trace.num_experts) for layer in trace.layers]
    tasks = [
        LayerTask(
            trace.expert_ids[i], trace.num_experts, trace.num_groups, slots[i], links,
            min(options.replicas, trace.num_experts * (len(slots[i].workers) - 1)), step, options.seed + i,
            options.budget,
            None if held is None else tuple(tuple(nodes[w] for w in workers) for workers in held),
        )
        for i, held in enumerate(before)
    ]  # fmt: skip
    total = np.zeros(len(nodes))
    holders: dict[int, Layer] = {}
    for i, placed in enumerate(run(place_nodes, tasks)):
        layer = eplb_layer(loads[i], slots[i], trace.num_groups, options.replicas)
        if placed is not None:
            ours = pack_layer(placed, loads[i], slots[i], links.sources, total, keep=before[i])
            # bounded by EPLB's placement, but of no more replicas than there are GPUs for
            most = [_busy(one, loads[i], slots[i], links).max() for one in (ours, layer)]
            if tasks[i].replicas == options.replicas or most[0] <= most[1]:
                layer = ours
        total += _busy(layer, loads[i], slots[i], links)
        holders[trace.layers[i]] = layer
    return Plan(epoch, holders, nodes)


def _busy(layer: Layer, load: Floats, slots: Slots, links: Links) -> Floats:
    """Rows per token of each worker, over its speed."""
    return worker_loads(layer, slots.nodes, load, links.sources)[1] / slots.speeds


def _held(previous: Plan | None, layer: int, num_experts: int) -> Layer | None:
    held = previous.holders.get(layer) if previous else None
    return held if held is not None and len(held) == num_experts else None


def layer_slots(topology: Topology, needed: int, num_layers: int, options: Options) -> list[Slots]:
    """Which workers each layer may use. Raises ConfigError when they are too few."""
    nodes = topology.worker_nodes
    usable = [w for w in range(len(nodes)) if w not in options.excluded]
    per_layer = -(-needed // options.experts_per_gpu)
    wanted = per_layer * (num_layers if options.strict else 1)
    if len(usable) < wanted + options.spares:
        kind = "of the model" if options.strict else "of a layer"
        empty = f" ({len(options.excluded)} excluded)" if options.excluded else ""
        raise ConfigError(
            f"{needed} experts and replicas at {options.experts_per_gpu} {kind} per GPU and {options.spares} spares "
            f"need {wanted + options.spares} expert workers, the cluster has {len(usable)}{empty}"
        )
    for _ in range(options.spares):  # from the node that has most left, so that a spare is near
        counts = np.bincount([nodes[w] for w in usable])
        usable.remove(max(w for w in usable if nodes[w] == int(np.argmax(counts))))
    speeds = topology.worker_speeds
    spans = [
        usable[i * per_layer : (i + 1) * per_layer] if options.strict else usable
        for i in range(num_layers)
    ]
    return [Slots(tuple(span), nodes, options.experts_per_gpu, speeds) for span in spans]


def moves(old: Plan, new: Plan) -> list[tuple[int, int, int]]:
    """(worker, layer, expert) that workers must load to go from one plan to the other, ascending."""
    return [
        (worker, layer, expert)
        for worker in range(len(new.nodes))
        for layer, expert in sorted(set(new.residents(worker)) - set(old.residents(worker)))
    ]
