"""EP256 for real on one small machine: 256 expert processes on 32 nodes, a router each, all in the end-to-end sense.

`make test-ep256` runs it and writes what it saw to tests/bench/results/ep256.json; not part of `make test`.
"""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.local.models import random_model
from tests.bench.cluster import cpu_s, family
from tests.bench.environment import facts
from tests.e2e.harness import Cluster
from tests.oracle.reference import Reference, ReferenceRun, compare

ARGUMENTS = ("--ep", "256", "--nodes", "32", "--attention", "4", "--wire", "fp32")
START_LIMIT_S, MEMORY_LIMIT_MB, IDLE_S = 120.0, 16 * 1024, 10.0
LENGTHS, NUM_TOKENS = (5, 9, 17, 33, 3, 12, 20, 7), 32

pytestmark = pytest.mark.ep256


def pss_mb(pid: int) -> float:
    """Memory of a process with shared pages divided among those who share them, MB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return (
        next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024
    )


def shm_mb() -> float:
    """What lies in /dev/shm, MB."""
    return sum(f.stat().st_blocks for f in Path("/dev/shm").rglob("*") if f.is_file()) * 512 / 2**20


def by_role(cluster: Cluster, measure: Any) -> dict[str, float]:
    """Sums over the processes of each role; the launcher and its warm parent are `launcher`."""
    roles = {p["pid"]: str(p["role"]) for p in cluster.processes}
    sums: Counter[str] = Counter()
    for pid in family(cluster.popen.pid):
        sums[roles.get(pid, "launcher")] += measure(pid)
    return dict(sums)


def idle(cluster: Cluster) -> dict[str, float]:
    """CPU of each role without a request, percent of one core."""
    time.sleep(3.0)  # let start-up settle
    before, started = by_role(cluster, cpu_s), time.monotonic()
    time.sleep(IDLE_S)
    wall = time.monotonic() - started
    return {
        role: round(100 * (used - before[role]) / wall, 1)
        for role, used in by_role(cluster, cpu_s).items()
    }


def references(scratch: Path) -> list[ReferenceRun]:
    """What transformers says."""
    torch.set_num_threads(1)
    reference = Reference(random_model(256), scratch)
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in LENGTHS]
    return [reference.generate(prompt, NUM_TOKENS) for prompt in prompts]


def router_costs(cluster: Cluster, before: dict[str, float]) -> dict[str, Any]:
    """What the requests cost routers: counted operations, and CPU per message and per row handed on."""
    counters = cluster.counters("router")
    sums = Counter[str]()
    for entry in counters:
        sums.update({k: v for k, v in entry.items() if isinstance(v, int)})
    links = [figures["out"] for entry in counters for figures in entry["links"].values()]
    rows, unicast = (sum(link[name] for link in links) for name in ("rows", "unicast_rows"))
    cpu_us = 1e6 * (by_role(cluster, cpu_s)["router"] - before["router"])
    messages = sums["messages_in"] + sums["messages_out"]
    return {
        "blocks": sums["blocks"],
        "router_operations_per_block": round(messages / sums["blocks"], 1),
        "cpu_us_per_message": round(cpu_us / messages, 1),
        "cpu_us_per_row": round(cpu_us / (sums["rows_to_experts"] + rows), 1),
        "cross_node_rows": rows, "cross_node_rows_unicast": unicast,
        "node_pairs_used": len(links),
    }  # fmt: skip


def check_memory(memory: dict[str, float]) -> float:
    total = sum(memory.values()) + shm_mb()
    assert total <= MEMORY_LIMIT_MB, f"{total:.0f} MB: {memory}"
    return total


def test_ep256_on_one_small_machine(tmp_path):
    random_model(256)  # the checkpoint is on disk at the second start
    with Cluster(*ARGUMENTS, start_deadline_s=4 * START_LIMIT_S) as cluster:
        first_s = cluster.ready_after_s
    runs = references(tmp_path / "fp32")
    with Cluster(*ARGUMENTS, start_deadline_s=START_LIMIT_S) as cluster:
        roles = Counter(p["role"] for p in cluster.processes)
        assert (roles["expert"], roles["router"]) == (256, 32)
        memory = by_role(cluster, pss_mb)
        idle_percent = idle(cluster)
        before, started = by_role(cluster, cpu_s), time.monotonic()
        together = cluster.generate([run.prompt for run in runs], NUM_TOKENS)
        wall = time.monotonic() - started
        costs = router_costs(cluster, before)
        after = by_role(cluster, pss_mb)
        total = check_memory(after)
    verdicts = [compare(run, tokens) for run, tokens in zip(runs, together, strict=True)]
    wrong = [v.first_difference for v in verdicts if not v.good]
    summary = facts() | {
        "command": "make test-ep256", "processes": dict(roles),
        "first_start_s": round(first_s, 1), "second_start_s": round(cluster.ready_after_s, 1),
        "memory_mb": {role: round(mb) for role, mb in memory.items()},
        "memory_after_requests_mb": {role: round(mb) for role, mb in after.items()},
        "total_mb": round(total), "idle_percent_of_a_core": idle_percent,
        "continuations": len(verdicts), "tokens_each": NUM_TOKENS,
        "identical": sum(v.first_difference is None for v in verdicts),
        "excused": sum(v.first_difference is not None and v.excused for v in verdicts),
        "tokens_per_s": round(len(verdicts) * NUM_TOKENS / wall, 1), "routers": costs,
    }  # fmt: skip
    print(json.dumps(summary, indent=1))
    if target := os.environ.get("ATOLL_EP256_RESULTS"):
        Path(target).write_text(json.dumps(summary, indent=1) + "\n")
    assert not wrong, f"first differences at tokens {wrong}"
