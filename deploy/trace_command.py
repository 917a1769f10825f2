"""Run a cluster for some steps and show where the time of a layer goes.

Writes a Chrome trace (opens in Perfetto and chrome://tracing) with one row per process, and prints per layer the
medians of every part of a block's way, the exposed communication in percent of the step, and the same steps replayed
on a wire that costs nothing. With --read nothing is started: trace files that the processes of a cluster wrote
(`trace_events` in the cluster TOML, <run_dir>/trace of each host) are joined.

examples:
  atoll trace --steps 20
  atoll trace --steps 40 --model /models/deepseek --nodes 4 --microbatches 3 --requests 12 --out trace.json
  atoll trace --read host-a/trace host-b/trace
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common.config import ClusterConfig
from common.errors import ConfigError, Fatal
from common.obs.trace import DIRECTORY
from deploy import up_command
from deploy.local.supervisor import Options
from deploy.trace.blocks import blocks
from deploy.trace.chrome import chrome_trace
from deploy.trace.report import Report, make_report
from deploy.trace.spans import Process, align, read

HELP = "run a cluster for some steps and show where the time of a layer goes"
_WARM_STEPS = 4  # not looked at
_PROMPT_TOKENS = 16
_TIMEOUT_S = 600.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    up_command.configure(parser)
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="decode steps looked at (20)"
    )
    parser.add_argument(
        "--requests", type=int, metavar="N", help="sequences at once (4 per attention worker)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("trace.json"), metavar="F", help="the trace (trace.json)"
    )
    parser.add_argument("--report", type=Path, metavar="F", help="write the figures as JSON")
    parser.add_argument(
        "--events", type=int, default=1 << 17, metavar="N", help="spans each process keeps (131072)"
    )
    parser.add_argument(
        "--read", type=Path, nargs="+", metavar="DIR", help="join trace files, start nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    """Trace, then report; 0 when every request came whole."""
    for name in ("steps", "events"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, not {getattr(arguments, name)}")
    for option in ("out", "report"):
        path = getattr(arguments, option)
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"--{option} {path}: no such directory")
    if arguments.read:
        found = align([p for directory in arguments.read for p in read(directory)])
        _show(found, arguments)
        return 0
    if arguments.port is None and arguments.cluster is None:
        arguments.port = 0
    traced = _Traced(arguments.events)
    options = Options(ready_file=arguments.ready_file, verbose=arguments.verbose)
    with tempfile.TemporaryDirectory(prefix="atoll-trace-") as directory:
        # a run directory of the launcher's own would be gone when the processes have written
        arguments.run_dir = arguments.run_dir or Path(directory)
        drive = partial(_drive, traced=traced, arguments=arguments)
        code = up_command.launch(arguments, options, drive, adapt=traced.adapt)
        if code == 0:
            _show(read(arguments.run_dir / DIRECTORY), arguments)
    return code


@dataclass(slots=True)
class _Traced:
    """The cluster that is traced."""

    events: int
    config: ClusterConfig | None = None

    def adapt(self, config: ClusterConfig) -> ClusterConfig:
        """Let every process record."""
        cluster = replace(config.cluster, trace_events=self.events)
        self.config = replace(config, cluster=cluster)
        return self.config


def _show(processes: Sequence[Process], arguments: argparse.Namespace) -> Report:
    try:
        report = make_report(processes, steps=arguments.steps)
    except ValueError as exc:
        raise Fatal(f"{exc}: more --events or more --steps are needed") from exc
    arguments.out.write_text(json.dumps(chrome_trace(processes, blocks(processes))))
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    print(report.text())
    print(f"trace: {arguments.out}")
    return report


async def _drive(url: str, *, traced: _Traced, arguments: argparse.Namespace) -> int:
    """Decode long enough that every lane makes the steps asked for."""
    import aiohttp  # 200 ms that no other command needs

    config = traced.config
    assert config is not None
    workers = sum(node.attention for node in config.nodes)
    count = arguments.requests or 4 * workers
    lanes = min(config.attention.microbatches, -(-count // workers))
    each = -(-arguments.steps // lanes) + _WARM_STEPS
    try:
        async with asyncio.timeout(_TIMEOUT_S), aiohttp.ClientSession(url) as session:
            async with session.get("/v1/models") as response:
                model = (await response.json())["data"][0]["id"]
            await asyncio.gather(*(_request(session, model, i, each) for i in range(count)))
    except (OSError, TimeoutError, ValueError, KeyError, Fatal) as exc:
        print(f"the trace failed: {type(exc).__name__}: {exc}")
        return 1
    return 0


async def _request(session: Any, model: str, number: int, max_tokens: int) -> None:  # noqa: ANN401
    """One greedy continuation. Raises Fatal when the server refuses it."""
    prompt = [1 + (7 * number + i) % 97 for i in range(_PROMPT_TOKENS)]
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
    async with session.post("/v1/completions", json=body | {"temperature": 0}) as response:
        if response.status != 200:
            raise Fatal(f"HTTP {response.status}: {await response.text()}")
        await response.read()
