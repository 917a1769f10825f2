"""Give a running cluster a better placement, without stopping it.

The gateway looks at what the gate has chosen lately, searches for a plan of the same kind as the one in force, and has
it carried out: workers load what they lack, routers go over to the new plan block by block. Requests go on. If anything
fails before the plan is in force everywhere, the old one stays, and the last line says why. Ctrl-C does the same.

examples:
  atoll rebalance
  atoll rebalance http://gateway:8000 --dry-run --out plan.json
  atoll rebalance --plan plan.json
"""

import argparse
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from common.errors import ConfigError, Rejected, Retryable
from common.placement.plan import Plan
from common.plan_file import read_plan, write_plan

HELP = "give a running cluster a better placement"
_TIMEOUT_S = 3600.0
_FIGURES = (
    ("link_s", "busiest link, us per token", 1e6),
    ("gpu_load", "busiest worker of a layer, over the mean", 1.0),
    ("total_gpu_load", "busiest worker of all layers, over the mean", 1.0),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "url",
        nargs="?",
        default="http://127.0.0.1:8000",
        help="the gateway (http://127.0.0.1:8000)",
    )
    parser.add_argument("--plan", type=Path, metavar="F", help="carry this plan out, search none")
    parser.add_argument(
        "--replicas", type=int, metavar="N", help="per layer, besides the experts (as many as now)"
    )
    parser.add_argument("--dry-run", action="store_true", help="search, but change nothing")
    parser.add_argument("--out", type=Path, metavar="F", help="write the plan here")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="F", help="its first key is sent to the gateway"
    )


def run(arguments: argparse.Namespace) -> int:
    """0 when the plan is in force (or found, with --dry-run)."""
    if arguments.out is not None and not arguments.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: no such directory")
    body: dict[str, Any] = {"dry_run": arguments.dry_run}
    if arguments.plan is not None:
        body["plan"] = read_plan(arguments.plan).to_json()
    if arguments.replicas is not None:
        body["replicas"] = arguments.replicas
    key = _first_key(arguments.api_key_file)
    answer = _call(arguments.url, "/rebalance", key, body)
    if "before" in answer:
        print(f"{answer['moves']} experts to load; found in {answer['searched_s']:.1f} s")
        for name, words, factor in _FIGURES:
            before, after = (factor * answer[when][name] for when in ("before", "after"))
            print(f"  {words}: {before:.3f} -> {after:.3f}")
    if not arguments.dry_run:
        print(f"epoch {answer['epoch']} is in force after {answer['took_s']:.1f} s")
        if answer["served"] != [answer["epoch"]]:
            print("  a process is missing: weights of the plan before are still held")
    if arguments.out is not None:
        plan = answer["plan"] if arguments.dry_run else _call(arguments.url, "/plan", key)
        write_plan(arguments.out, Plan.from_json(plan))
    return 0


def _first_key(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"--api-key-file {path}: {exc}") from exc
    return next((line.strip() for line in lines if line.strip() and line[0] != "#"), "")


def _call(url: str, path: str, key: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request of the gateway. Raises Rejected or Retryable with its sentence."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url.rstrip("/") + path, data, headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            answer = json.loads(response.read())
    except urllib.error.HTTPError as exc:
        sentence = _sentence(exc)
        raise (Rejected if exc.code < 500 else Retryable)(sentence) from exc
    except (OSError, ValueError) as exc:
        reason = exc.reason if isinstance(exc, urllib.error.URLError) else exc
        raise Retryable(f"{url}: {reason}") from exc
    if not isinstance(answer, dict):
        raise Retryable(f"{url}{path} did not answer as a gateway does")
    return answer


def _sentence(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"{error.url}: HTTP {error.code}"
