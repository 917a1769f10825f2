"""How long a cluster takes to become ready, and what it costs when idle.

    python -m tests.bench.cluster [--out FILE]

Each size is started twice; the second start (checkpoint on disk, bytecode cached) counts. Idle means ten seconds
without a request: CPU time of every process of the cluster, launcher included, over wall time, in percent of one core.
"""

import argparse
import json
import time
from pathlib import Path

from tests.bench.environment import facts
from tests.e2e.harness import Cluster

IDLE_S = 10.0


def cpu_s(pid: int) -> float:
    """User and system time of a process and its reaped children, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        found += [int(child) for child in children]
    return found


def measure(experts: int) -> dict[str, float]:
    """Ready time of the second start, and idle CPU of that cluster."""
    arguments = ["--ep", str(experts), "--nodes", "2", "--attention", "2"]
    with Cluster(*arguments):
        pass
    with Cluster(*arguments) as cluster:
        time.sleep(2.0)  # let start-up settle
        pids = family(cluster.popen.pid)
        before, started = sum(map(cpu_s, pids)), time.monotonic()
        time.sleep(IDLE_S)
        used, wall = sum(map(cpu_s, pids)) - before, time.monotonic() - started
        return {
            "experts": experts, "processes": len(pids), "ready_s": round(cluster.ready_after_s, 2),
            "idle_percent_of_a_core": round(100 * used / wall, 2),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--experts", default="16,64", help="comma-separated sizes (16,64)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [measure(int(experts)) for experts in args.experts.split(",")]
    for row in rows:
        print(row, flush=True)
    if args.out:
        args.out.write_text(json.dumps(facts() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
