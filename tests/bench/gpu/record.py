"""The record that README's GPU tables are made from, all of it on the same cards and one after the other.

    python -m tests.bench.gpu.record [--seconds 400] [--out tests/bench/results/gpu] [--only hop,small] [--rounds 2]

Each part is a benchmark of this folder with the arguments of its table. Those of single blocks are run `--rounds`
times, in turn, since a shared host is fast in one minute and slow in the next: their files have medians, and `range`,
the least and the most. What does not begin within `--seconds` is left out, and its old file stays; a part that fails is
named at the end. `ATOLL_COMMIT` stands for the commit where there is no git.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.gpu.results import RESULTS

_ROUTERS = "--divide blocks --tokens 128 --in-flight 1,3,4"
_SERVING = "serving --routers 3 --divide blocks --microbatches 3"
# file, module and arguments, the most seconds it may take
PARTS = (
    ("hop", "hop", 60),
    ("bare_loop", "bare_loop", 60),
    ("nccl", "nccl", 60),
    ("small", "round_trip --hidden 128 --tokens 128 --in-flight 1,3", 60),
    ("small_routers", f"round_trip --hidden 128 --routers 3 {_ROUTERS}", 60),
    ("round_trip", "round_trip --in-flight 1,3", 90),
    ("routers", "round_trip --routers 4 --divide blocks --in-flight 1,3,4", 90),
    ("serving_m1", "serving --microbatches 1 --concurrency 512 --trace", 120),
    ("serving_m3", f"{_SERVING} --concurrency 512,1024 --trace", 150),
    ("serving_reference", f"{_SERVING} --preset reference-61l-256e --layers 5 --distinct 8 --trace", 240),
    ("serving_demo", f"{_SERVING} --model deploy/demo/model --workers 16 --trace", 240),
    ("serving_skew", f"{_SERVING} --concurrency 512 --skew none,measured", 240),
    ("ep256", "ep256 --nodes 32,1", 400),
    ("kills", "kills", 200),
)  # fmt: skip
IN_TURN = ("hop", "bare_loop", "small", "small_routers", "round_trip", "routers")
_SETTINGS = ("bytes", "tokens", "in_flight")  # of a row


def merged(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One file of several rounds': medians, and beside them the least and the most."""
    rows = []
    for same in zip(*(r["rows"] for r in rounds), strict=True):
        row = {key: same[0][key] for key in _SETTINGS if key in same[0]}
        found = {key: [r[key] for r in same] for key in same[0] if key not in row}
        spread = {key: [min(values), max(values)] for key, values in found.items()}
        rows.append(
            row | {key: round(median(v), 1) for key, v in found.items()} | {"range": spread}
        )
    return rounds[-1] | {"rounds": len(rounds), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="names of files, without .json")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = set(args.only.split(",")) if args.only else {name for name, _, _ in PARTS}
    if unknown := wanted - {name for name, _, _ in PARTS}:
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    deadline, missing = time.monotonic() + args.seconds, []
    found: dict[str, list[dict[str, Any]]] = {}
    for turn in range(args.rounds):
        for name, command, limit in PARTS:
            if name not in wanted or (turn > 0 and name not in IN_TURN):
                continue
            if time.monotonic() > deadline:
                missing.append(f"{name} (no time)")
                continue
            try:
                found.setdefault(name, []).append(measured(command, limit))
            except subprocess.SubprocessError as exc:
                missing.append(f"{name} ({exc})")
                continue
            rounds = found[name]
            whole = merged(rounds) if name in IN_TURN else rounds[0]
            (args.out / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    if missing:
        sys.exit("not recorded: " + "; ".join(missing))


def measured(command: str, limit_s: float) -> dict[str, Any]:
    """What a benchmark of this folder writes. Raises SubprocessError."""
    module, *arguments = command.split()
    full = [sys.executable, "-m", f"tests.bench.gpu.{module}", *arguments]
    print(f"== {' '.join(full[1:])}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        subprocess.run([*full, "--out", str(out)], check=True, timeout=limit_s)
        written: dict[str, Any] = json.loads(out.read_text())
    return written


if __name__ == "__main__":
    main()
