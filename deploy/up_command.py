"""Start a whole cluster on this machine and serve until Ctrl-C.

Without --model a small model is served. With --cluster everything comes from that file; --local takes its shape alone
and runs every node here, with a secret and directories of its own.

examples:
  atoll up --model /models/deepseek --port 8000
  atoll up --ep 64 --nodes 4 --wire fp32 --port 0 --ready-file ready.json
  atoll up --cluster cluster.toml
  atoll up --cluster deploy/clusters/two-hosts.toml --local --model deploy/demo/model
  atoll up --model /models/deepseek --device cuda --oversubscribe
  atoll up --preset deepseek-v3 --layers 8 --ep 8 --device cuda --oversubscribe
"""

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import config as cluster_config
from common.config import (
    EXACT_ON_CPU,
    LOCAL,
    ClusterConfig,
    ClusterSection,
    ModelSection,
    local_cluster,
)
from common.config_toml import Source
from common.errors import ConfigError
from common.model.presets import PRESETS
from deploy.local import cards, models, preflight
from deploy.local.run_dir import RunDir, open_run_dir
from deploy.local.supervisor import Options, Supervisor
from deploy.render.error import UnrenderableError

HELP = "start a whole cluster on this machine"
# None tells "not given": with --cluster these come from the file
_DEFAULTS = {
    "nodes": 2,
    "attention": 2,
    "routers": 1,
    "routers_divide": "destinations",
    "microbatches": 2,
    "wire": "fp8",
    "gate_bias_max": 0.0,
    "host": "127.0.0.1",
    "port": 8000,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--cluster", type=Path, metavar="F", help="cluster TOML, instead of the options below"
    )
    parser.add_argument(
        "--local",
        action="store_true",
        help="with --cluster: run the nodes of every host on this machine",
    )
    _configure_model(parser)
    _configure_shape(parser)
    parser.add_argument("--host", metavar="H", help="address of the HTTP API (127.0.0.1)")
    parser.add_argument(
        "--port", type=int, metavar="P", help="port of the HTTP API, 0 for any free one (8000)"
    )
    parser.add_argument(
        "--api-key-file", type=Path, metavar="F", help="clients must send one of its keys"
    )
    parser.add_argument(
        "--ready-file", type=Path, metavar="F", help="written with URL and processes once ready"
    )
    parser.add_argument("--run-dir", type=Path, metavar="D", help="keep logs and cluster.toml here")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show every log line of the workers"
    )


def _configure_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face directory")
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), help="a well-known shape with random weights, on GPUs"
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="with --preset: the first N layers (all)"
    )
    parser.add_argument(
        "--distinct-experts", type=int, metavar="N",
        help="with --preset: experts of a layer with weights of their own, which play the others (8)",
    )  # fmt: skip


def _configure_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ep", type=int, metavar="N", help="expert workers (experts / experts per GPU)"
    )
    parser.add_argument(
        "--experts-per-gpu", type=int, metavar="N", help="experts of a layer per worker (1)"
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="virtual nodes (2)")
    parser.add_argument(
        "--attention", type=int, metavar="N", help="attention workers over all nodes (2)"
    )
    parser.add_argument("--routers", type=int, metavar="N", help="per node (1)")
    parser.add_argument(
        "--routers-divide",
        choices=("destinations", "blocks"),
        help="what each router of a node has a part of (destinations: they are rails)",
    )
    parser.add_argument("--microbatches", type=int, metavar="N", help="per attention worker (2)")
    _add_device_options(parser)
    parser.add_argument(
        "--wire", choices=("fp8", "bf16", "fp32"), help="what travels between processes (fp8)"
    )
    parser.add_argument(
        "--gate-bias-max", type=float, metavar="B",
        help="lower overloaded experts' gate scores by up to B, which changes outputs (0: never)",
    )  # fmt: skip


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where everything is computed (cpu, or as the file says)",
    )
    parser.add_argument(
        "--oversubscribe",
        action="store_true",
        help="attention and expert workers may outnumber the GPUs and share them",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the cluster until it is told to stop."""
    options = Options(ready_file=arguments.ready_file, verbose=arguments.verbose)
    return launch(arguments, options)


def launch(
    arguments: argparse.Namespace, options: Options,
    on_ready: Callable[[str], Awaitable[int]] | None = None, *,
    adapt: Callable[[ClusterConfig], ClusterConfig] | None = None,
) -> int:  # fmt: skip
    """Check, then run the described cluster. Raises Rejected before anything was started.

    `adapt` may change what was described.
    """
    if arguments.local and arguments.cluster is None:
        raise ConfigError("--local needs --cluster")
    if options.ready_file is not None and not options.ready_file.absolute().parent.is_dir():
        raise ConfigError(f"--ready-file {options.ready_file}: no such directory")
    described = _from_file(arguments) if arguments.cluster is not None else None
    requested = arguments.run_dir
    if described is not None and not arguments.local:
        requested = described.cluster.run_dir
    run_dir = open_run_dir(requested)
    try:
        config = described or _from_options(arguments, run_dir)
        if arguments.local:
            config = on_this_machine(config, run_dir.path)
        config = replace(config, cluster=_on_device(config.cluster, arguments))
        if adapt is not None:
            config = adapt(config)
        if config.cluster.secret_file is None:
            run_dir.write_secret()
        preflight.check(config)
        options = _with_cards(options, config, run_dir, arguments.cluster)
        return asyncio.run(Supervisor(config, run_dir, options).run(on_ready))
    finally:
        run_dir.close()


def _on_device(cluster: ClusterSection, arguments: argparse.Namespace) -> ClusterSection:
    return replace(
        cluster,
        device=arguments.device or cluster.device,
        oversubscribe=arguments.oversubscribe or cluster.oversubscribe,
    )


def _with_cards(
    options: Options, config: ClusterConfig, run_dir: RunDir, file: Path | None
) -> Options:
    """Who runs on which GPU. Raises ConfigError when there are too few."""
    if config.cluster.device != "cuda":
        return options
    if config.cluster.wire == "fp32":  # options may have said so after the file was checked
        raise ConfigError(f"--wire {EXACT_ON_CPU}")
    try:
        environments, mps = cards.deal(config, cards.visible(), run_dir.path)
    except UnrenderableError as exc:
        raise (Source.read(file).error(exc.where, exc.sentence) if file else exc) from exc
    return replace(options, environments=environments, mps=mps)


def on_this_machine(config: ClusterConfig, run_dir: Path) -> ClusterConfig:
    """The same nodes and processes as virtual nodes of this machine, whatever the file says of its hosts."""
    return replace(
        config,
        cluster=replace(config.cluster, run_dir=run_dir, secret_file=None),
        model=ModelSection(config.model.path, config.model.served_name),
        nodes=tuple(replace(node, host=LOCAL, gpus=0) for node in config.nodes),
        gateway=replace(config.gateway, host="127.0.0.1"),
    )


def _from_file(arguments: argparse.Namespace) -> ClusterConfig:
    own = {"model", "port"} if arguments.local else set()
    for name in ("model", "preset", "ep", "experts_per_gpu", "api_key_file", *_DEFAULTS):
        if name not in own and getattr(arguments, name) is not None:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} cannot be combined with --cluster, set it in the file")
    config = cluster_config.load(arguments.cluster)
    if arguments.model is not None:
        model = replace(config.model, path=arguments.model.absolute())
        config = replace(config, model=model)
    if arguments.port is not None:
        config = replace(config, gateway=replace(config.gateway, port=arguments.port))
    if arguments.run_dir is not None:
        cluster = replace(config.cluster, run_dir=arguments.run_dir.absolute())
        config = replace(config, cluster=cluster)
    return config


def _preset(arguments: argparse.Namespace) -> Path | None:
    if arguments.preset is None:
        for name in ("layers", "distinct_experts"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} needs --preset")
        return None
    if arguments.model is not None:
        raise ConfigError("--preset and --model are two models, give one")
    if arguments.device != "cuda":
        raise ConfigError(
            "--preset needs --device cuda: a model of that width is made in a GPU's memory"
        )
    return models.preset(arguments.preset, arguments.layers, arguments.distinct_experts)


def _from_options(arguments: argparse.Namespace, run_dir: RunDir) -> ClusterConfig:
    values: dict[str, Any] = {
        name: default if getattr(arguments, name) is None else getattr(arguments, name)
        for name, default in _DEFAULTS.items()
    }
    model, ep, experts_per_gpu = models.choose(
        _preset(arguments) or arguments.model,
        ep=arguments.ep,
        experts_per_gpu=arguments.experts_per_gpu,
    )
    key_file = arguments.api_key_file
    config = local_cluster(
        model,
        ep=ep,
        experts_per_gpu=experts_per_gpu,
        run_dir=run_dir.path,
        api_key_file=key_file.absolute() if key_file is not None else None,
        **values,
    )
    if model != models.DEMO_MODEL:
        return config
    return replace(config, model=replace(config.model, served_name=models.DEMO_NAME))
