"""Place experts on GPUs, by the cluster's topology and a routing trace.

Writes a plan for `[placement] plan`: which workers hold which expert of each layer, by what the busiest link carries,
with no GPU busier than under EPLB. First it says what such a plan is worth: fitted on the first half of the trace and
scored on the second, against EPLB. With --discover what the TOML leaves open (gpu, nic_gbit_s, nvlink_domain) is read
off the hosts, over ssh or inside a Slurm job by srun.

examples:
  atoll plan --cluster cluster.toml --trace routing.npz --out plan.json
  atoll plan --cluster cluster.toml --trace routing.npz --out plan.json --replicas 32 --discover
  atoll plan --cluster cluster.toml --trace routing.npz --out new.json --previous plan.json
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import config as cluster_config
from common.config import ClusterConfig
from common.errors import ConfigError, Fatal
from common.model.hf_config import ModelConfig, load_config
from common.placement.baselines import eplb_layer
from common.placement.links import RowBytes, build_links
from common.placement.optimise import Options, layer_slots, optimise
from common.placement.plan import Plan
from common.placement.routing_trace import RoutingTrace
from common.placement.score import Score, score
from common.placement.topology import Topology, cluster_topology
from common.plan_file import check_cluster_plan, read_plan, write_plan
from common.routing_trace_file import read_trace
from deploy.discover import completed
from deploy.doctor.hosts import Way, in_allocation, in_job, visit

HELP = "place experts on GPUs by topology and routing trace"
_SMALL = 2048  # experts over all layers that are sooner placed here than in other processes


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--cluster", type=Path, required=True, metavar="F", help="cluster TOML")
    add("--trace", type=Path, required=True, metavar="F", help="routing trace (npz)")
    add("--out", type=Path, required=True, metavar="F", help="the plan")
    add("--replicas", type=int, default=0, metavar="N", help="of experts, in each layer (0)")
    add("--spares", type=int, default=0, metavar="N", help="expert workers left empty (0)")
    add("--strict", action="store_true", help="one expert of the whole model per GPU")
    add(
        "--previous", type=Path, metavar="F", help="plan to start from: experts stay where they can"
    )
    add("--seed", type=int, default=0, metavar="N", help="same seed, same plan (0)")
    add("--discover", action="store_true", help="ask the hosts what the TOML does not say")
    add("--via", choices=("ssh", "srun"), help="how hosts are reached (ssh; in a Slurm job srun)")
    add("--program", default="atoll", metavar="P", help="atoll on the hosts, for ssh (atoll)")


def run(arguments: argparse.Namespace) -> int:
    """Write the plan, or raise Rejected."""
    if not arguments.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: no such directory")
    config = cluster_config.load(arguments.cluster)
    model = load_config(config.model.path)
    trace = model_trace(read_trace(arguments.trace), model, config, str(arguments.trace))
    previous = read_plan(arguments.previous) if arguments.previous else None
    if arguments.discover:
        config = asyncio.run(_discovered(config, arguments))
    topology = cluster_topology(config)
    print(topology)
    options = Options(
        experts_per_gpu=config.placement.experts_per_gpu, strict=arguments.strict,
        replicas=arguments.replicas, spares=arguments.spares, seed=arguments.seed,
        row=RowBytes.of(model.hidden_size, config.cluster.wire),
    )  # fmt: skip
    with _processes(trace) as run_layers:
        if trace.num_tokens > 1:
            print(worth(trace, topology, options, run_layers))
        plan = optimise(
            trace, topology, options, previous=previous, epoch=config.cluster.epoch, run=run_layers
        )
    check_cluster_plan(plan, config, model)
    write_plan(arguments.out, plan)
    print(f"{plan}: {arguments.out}")
    return 0


@contextlib.contextmanager
def _processes(trace: RoutingTrace) -> Iterator[Callable[..., Iterable[Any]]]:
    """What maps a function over layers: one process per core, none for a small model."""
    if trace.num_experts * len(trace.layers) < _SMALL:
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        yield pool.imap


def model_trace(
    trace: RoutingTrace, model: ModelConfig, config: ClusterConfig, name: str
) -> RoutingTrace:
    """The trace as the cluster will route it: the model's groups, slices as experts. Raises ConfigError."""
    if trace.layers != tuple(model.moe_layers):
        raise ConfigError(
            f"routing trace {name}: its layers are not the {len(model.moe_layers)} MoE layers of the model"
        )
    if trace.num_experts > model.num_experts:
        raise ConfigError(
            f"routing trace {name}: it has {trace.num_experts} experts, the model {model.num_experts}"
        )
    known = replace(
        trace, num_experts=model.num_experts, num_groups=model.num_groups, top_k_groups=model.top_k_groups
    )  # fmt: skip
    return known.sliced(config.placement.expert_slices)


def worth(
    trace: RoutingTrace, topology: Topology, options: Options, run_layers: Callable[..., Any]
) -> str:
    """Two sentences: what a plan fitted on half of the trace does on the other half."""
    fit, held_out = trace.halves()
    slots = layer_slots(topology, trace.num_experts + options.replicas, len(trace.layers), options)
    layers = {
        layer: eplb_layer(load, slot, trace.num_groups, options.replicas)
        for layer, load, slot in zip(fit.layers, fit.loads, slots, strict=True)
    }
    links = build_links(topology, options.row)
    theirs = score(Plan(0, layers, topology.worker_nodes), held_out, links)
    ours = score(optimise(fit, topology, options, run=run_layers), held_out, links)
    return (
        f"Fitted on half of the trace, on the other half, per token and layer:\n"
        f"  this optimiser  {_words(ours)}\n  EPLB            {_words(theirs)}"
    )


def _words(found: Score) -> str:
    return (
        f"busiest link {1e6 * found.link_s:.4g} us, {found.rows:.3g} rows between nodes (unicast "
        f"{found.unicast_rows:.3g}), busiest GPU {found.gpu_load:.3g} times the mean"
    )


async def _discovered(config: ClusterConfig, arguments: argparse.Namespace) -> ClusterConfig:
    kind = arguments.via or ("srun" if in_job() else "ssh")
    if kind == "srun":
        config = in_allocation(config)
    way, salt = Way(kind, arguments.program), secrets.token_hex(8)
    names = list(dict.fromkeys(node.host for node in config.nodes))
    visits = await asyncio.gather(
        *(visit(name, way, config, salt=salt, full=False) for name in names)
    )
    for one in visits:
        if one.host is None:
            raise Fatal(f"--discover: {one.name}: {one.problem}")
    return completed(config, {one.name: one.host for one in visits if one.host is not None})
