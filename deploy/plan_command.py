"""Make a plan, which worker holds which expert, for a cluster TOML from a recorded routing trace.

The trace is an npz file; `curl URL/routing > trace.npz` records one at a running cluster. The plan is fitted on its
first half and compared with the layout without a plan on the second. [placement] plan = "plan.json" makes a cluster
start with it; `atoll rebalance --plan plan.json` puts it in force in a running one.

examples:
  atoll plan --cluster cluster.toml --trace trace.npz --out plan.json
  atoll plan --cluster cluster.toml --trace trace.npz --out plan.json --replicas 16
"""

import argparse
from pathlib import Path

from common import config as cluster_config
from common.errors import ConfigError
from common.model.hf_config import load_config
from common.placement.links import RowBytes
from common.placement.optimise import Options
from common.placement.topology import cluster_topology
from common.plan_file import cluster_plan, write_plan
from common.plan_search import Search, search
from common.routing_trace_file import read_trace

HELP = "make a placement plan from a routing trace"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--cluster", type=Path, metavar="F", required=True, help="cluster TOML")
    parser.add_argument("--trace", type=Path, metavar="F", required=True, help="routing trace, npz")
    parser.add_argument("--out", type=Path, metavar="F", required=True, help="the plan, JSON")
    parser.add_argument(
        "--strict", action="store_true", help="one expert of the whole model per GPU"
    )
    parser.add_argument(
        "--replicas", type=int, default=0, metavar="N", help="per layer, besides the experts (0)"
    )
    parser.add_argument(
        "--spares", type=int, default=0, metavar="N", help="workers that stay empty (0)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Search, compare, write."""
    config = cluster_config.load(arguments.cluster)
    if not arguments.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: no such directory")
    model = load_config(config.model.path)
    trace = read_trace(arguments.trace, num_experts=model.num_experts)
    if list(trace.layers) != list(model.moe_layers) or trace.num_experts != model.num_experts:
        raise ConfigError(f"--trace {arguments.trace} is of another model than {config.model.path}")
    options = Options(
        experts_per_gpu=config.placement.experts_per_gpu, strict=arguments.strict,
        replicas=arguments.replicas, spares=arguments.spares,
        row=RowBytes.of(model.hidden_size, config.cluster.wire),
    )  # fmt: skip
    previous = cluster_plan(config, model)
    found = search(Search(trace, cluster_topology(config), options, previous, config.cluster.epoch))
    write_plan(arguments.out, found.plan)
    print(f"{found.plan!r}")
    print(
        f"rows between nodes per token and layer: {found.before.rows:.3f} -> {found.after.rows:.3f}"
    )
    print(
        f"busiest worker of a layer, over the mean: {found.before.gpu_load:.3f} -> {found.after.gpu_load:.3f}"
    )
    return 0
