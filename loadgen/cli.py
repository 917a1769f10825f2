"""`atoll-load`: the command line."""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import shtab

from loadgen.report import complaints, table, to_json
from loadgen.runner import Plan, Target, run_load
from loadgen.stats import Record, State, not_terminal, summarize
from loadgen.workload import Lengths, UsageError, Workload

_EXAMPLE = """\
example:
  atoll-load http://127.0.0.1:8000 --concurrency 16 --requests 200 \\
             --prompt-tokens 16-128 --max-tokens 64 --json report.json

lengths are 64, 16-128 (uniform) or ~100 (exponential with that mean)

exit codes: 0 every request reached an end; 1 some did not (they are listed), or failed with
--fail-on-error; 2 an argument is wrong or the server cannot be reached
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the load; returns the exit code."""
    try:
        arguments = _parser().parse_args(argv)
        workload, target, plan = _settings(arguments)
        with asyncio.Runner(loop_factory=_new_loop) as runner:
            records = runner.run(_run(workload, target, plan))
        summary = summarize(records)
        if arguments.json is not None:
            settings = {k: str(v) for k, v in vars(arguments).items() if v is not None}
            _write(arguments.json, to_json(summary, records, settings))
    except UsageError as exc:
        print(f"atoll-load: {exc}", file=sys.stderr)
        return 2
    print(table(summary))
    if text := complaints(records):
        print(text, file=sys.stderr)
    failed = arguments.fail_on_error and summary.counts[State.ERROR] > 0
    return 1 if not_terminal(records) or failed or not records else 0


def _parser() -> _Parser:
    parser = _Parser(
        prog="atoll-load",
        description="Load an OpenAI-style server and measure what its users would see.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shtab.add_argument_to(parser, "--print-completion", "print completion for a shell")
    add = parser.add_argument
    add("url", help="the server, with or without /v1")
    add("--model", help="default: the first the server lists")
    add("--chat", action="store_true", help="chat completions (needs --prompt-file)")
    add("--concurrency", type=int, metavar="N", help="closed loop: N at a time (default 1)")
    add("--rate", type=float, metavar="R", help="Poisson arrivals, R per second, instead")
    add("--requests", type=int, default=0, metavar="N", help="how many (default 100)")
    add("--duration", type=float, default=0.0, metavar="S", help="stop sending after S seconds")
    add("--prompt-tokens", default="32", metavar="LEN", help="prompt length (default 32)")
    add("--token-range", default="10-99", metavar="LO-HI", help="ids of prompts (default 10-99)")
    add("--prompt-file", type=Path, metavar="F", help="text for prompts; lengths are then words")
    add("--max-tokens", default="32", metavar="LEN", help="output length (default 32)")
    add("--temperature", type=float, default=0.0, metavar="T", help="default 0")
    add("--ignore-eos", action="store_true", help="send ignore_eos, where the server knows it")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same requests (default 0)")
    add("--timeout", type=float, default=600.0, metavar="S", help="per request (default 600)")
    add("--api-key-file", type=Path, metavar="F", help="its first line is sent as the API key")
    add("--json", type=Path, metavar="F", help="write a report")
    add("--fail-on-error", action="store_true", help="exit 1 when a request failed, too")
    for action in parser._actions:
        if action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser


def _settings(arguments: argparse.Namespace) -> tuple[Workload, Target, Plan]:
    """Check what argparse cannot. Raises UsageError."""
    _need(arguments.url.startswith(("http://", "https://")), "the url must begin with http://")
    _need(
        arguments.concurrency is None or arguments.rate is None,
        "--concurrency and --rate exclude each other",
    )
    for name in ("concurrency", "rate", "timeout"):
        value = getattr(arguments, name)
        _need(value is None or value > 0, f"--{name} must be above 0, not {value}")
    for name in ("requests", "duration"):
        value = getattr(arguments, name)
        _need(value >= 0, f"--{name} must not be negative, not {value}")
    report = arguments.json
    _need(
        report is None or report.absolute().parent.is_dir(), f"--json {report}: no such directory"
    )
    _need(not arguments.chat or arguments.prompt_file, "--chat needs --prompt-file")
    low, _, high = arguments.token_range.partition("-")
    _need(
        low.isdecimal() and high.isdecimal() and int(low) <= int(high),
        f"--token-range must be LO-HI, not {arguments.token_range!r}",
    )
    workload = Workload(
        model=arguments.model or "",
        chat=arguments.chat,
        prompt_lengths=Lengths.parse(arguments.prompt_tokens),
        output_lengths=Lengths.parse(arguments.max_tokens),
        token_range=(int(low), int(high)),
        text=_read_text(arguments.prompt_file) if arguments.prompt_file else None,
        temperature=arguments.temperature,
        ignore_eos=arguments.ignore_eos,
    )
    headers = {}
    if arguments.api_key_file:
        key = _read_text(arguments.api_key_file).splitlines()[0].strip()
        headers["Authorization"] = f"Bearer {key}"
    target = Target(
        url=arguments.url.rstrip("/").removesuffix("/v1") + "/",
        path="v1/chat/completions" if arguments.chat else "v1/completions",
        headers=headers,
        timeout_s=arguments.timeout,
    )
    requests = arguments.requests or (0 if arguments.duration else 100)
    concurrency = 0 if arguments.rate else arguments.concurrency or 1
    rate = arguments.rate or 0.0
    return workload, target, Plan(requests, arguments.duration, concurrency, rate, arguments.seed)


def _need(condition: object, sentence: str) -> None:
    if not condition:
        raise UsageError(sentence)


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"cannot read {path}: {exc}") from exc
    _need(text.split(), f"{path} is empty")
    return text


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as exc:
        raise UsageError(f"cannot write {path}: {exc.strerror}") from exc


def _new_loop() -> asyncio.AbstractEventLoop:
    """uvloop where it is installed: the generator should not be what is measured."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def _run(workload: Workload, target: Target, plan: Plan) -> list[Record]:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    if not workload.model:
        workload = replace(workload, model=await _first_model(target))
    return await run_load(target, plan, workload.bodies(plan.seed), stop)


async def _first_model(target: Target) -> str:
    """Raises UsageError when the server cannot be reached or lists none."""
    timeout = aiohttp.ClientTimeout(total=10)
    try:
        async with (
            aiohttp.ClientSession(target.url, headers=target.headers, timeout=timeout) as session,
            session.get("v1/models") as response,
        ):
            if response.status != 200:
                raise UsageError(f"{target.url}v1/models answers HTTP {response.status}")
            return str((await response.json())["data"][0]["id"])
    except TimeoutError as exc:
        raise UsageError(f"{target.url} does not answer") from exc
    except aiohttp.ClientError as exc:
        raise UsageError(f"cannot reach {target.url}: {exc}") from exc
    except (LookupError, TypeError, ValueError) as exc:
        raise UsageError(f"{target.url}v1/models lists no model") from exc
