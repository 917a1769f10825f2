"""The record that README's GPU tables are made from, all of it on the same cards and one after the other.

    python -m tests.bench.gpu.record [--seconds 400] [--out tests/bench/results/gpu] [--only hop,small]

Each part is a benchmark of this folder with the arguments of its table. What does not begin within `--seconds` is left
out, and its old file stays; a part that fails is named at the end. `ATOLL_COMMIT` stands for the commit where there is
no git.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="names of files, without .json")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = set(args.only.split(",")) if args.only else {name for name, _, _ in PARTS}
    if unknown := wanted - {name for name, _, _ in PARTS}:
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    began, missing = time.monotonic(), []
    for name, command, limit in PARTS:
        if name not in wanted:
            continue
        left = args.seconds - (time.monotonic() - began)
        module, *arguments = command.split()
        full = [sys.executable, "-m", f"tests.bench.gpu.{module}", *arguments]
        if left <= 0:
            missing.append(f"{name} (no time)")
            continue
        print(f"== {' '.join(full[1:])}", flush=True)
        try:
            subprocess.run(
                [*full, "--out", str(args.out / f"{name}.json")], check=True, timeout=limit
            )
        except subprocess.SubprocessError as exc:
            missing.append(f"{name} ({exc})")
    if missing:
        sys.exit("not recorded: " + "; ".join(missing))


if __name__ == "__main__":
    main()
