"""Hierarchical dispatch against unicast on a network that is one: four nodes in network namespaces, links rate-limited.

    python -m tests.bench.namespaces [--out FILE] [--rate KBIT] [--seconds S]        (as root)

Every node is a namespace with one interface to a bridge; `tbf` limits both directions of every cable. The services are
those of `atoll run`, started once per way of dispatch; what crossed the cables is read from the kernel's counters, and
tokens from the gateway's, over the same window in the middle of a steady load.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.config import (
    AttentionSection,
    ClusterConfig,
    ClusterSection,
    GatewaySection,
    ModelSection,
    Node,
    PlacementSection,
)
from common.model.small import small_config, write_tokenizer
from common.model.writer import write_random
from tests.bench.environment import facts
from tests.systemd.hosts import sh, wait_for

NODES = {f"atoll-n{i}": f"10.78.0.{i + 1}" for i in range(4)}
SWITCH, DEVICE = "atoll-sw", "eth0"
EXPERTS, PER_GPU = 32, 4
SHAPE = {
    "hidden_size": 512, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
}  # fmt: skip
CONCURRENCY, MICROBATCHES, PORT = 64, 4, 8000
READY_S, WARM_S = 180.0, 15.0
BIN = Path(sys.executable).parent


@contextlib.contextmanager
def network(kbit: int) -> Iterator[None]:
    """Four namespaces and a bridge in a fifth; every cable carries `kbit` kbit/s each way."""
    shape = f"root tbf rate {kbit}kbit burst 16kb latency 300ms".split()
    clear()  # what a run that was killed with -9 left behind
    try:
        for name in (SWITCH, *NODES):
            sh("ip", "netns", "add", name)
            sh("ip", "-n", name, "link", "set", "lo", "up")
        sh("ip", "-n", SWITCH, "link", "add", "br0", "type", "bridge")
        sh("ip", "-n", SWITCH, "link", "set", "br0", "up")
        for i, (name, address) in enumerate(NODES.items()):
            port = f"p{i}"
            cable = f"link add {DEVICE} netns {name} type veth peer name {port} netns {SWITCH}"
            sh("ip", *cable.split())
            sh("ip", "-n", SWITCH, "link", "set", port, "master", "br0", "up")
            sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            sh("ip", "-n", name, "link", "set", DEVICE, "up")
            for namespace, device in ((name, DEVICE), (SWITCH, port)):
                sh("tc", "-n", namespace, "qdisc", "add", "dev", device, *shape)
        yield
    finally:
        clear()


def clear() -> None:
    """Namespaces, with the cables and qdiscs in them and whatever still runs there, go away."""
    for name in (SWITCH, *NODES):
        found = subprocess.run(
            ["ip", "netns", "pids", name], check=False, capture_output=True, text=True
        )
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def stop(*_: object) -> None:
    """A signal ends the run in order, as Ctrl-C does."""
    raise SystemExit("stopped")


def cable_bytes() -> dict[str, int]:
    """What the kernel counted on every cable so far, by node and direction."""
    found = {}
    for name in NODES:
        (link,) = json.loads(sh("ip", "-n", name, "-s", "-j", "link", "show", DEVICE))
        for way, key in (("out", "tx"), ("in", "rx")):
            found[f"{name.removeprefix('atoll-')} {way}"] = int(link["stats64"][key]["bytes"])
    return found


def write_model(directory: Path) -> None:
    """A random model with V3's gate in small: top-8 of 32 experts, in 4 of 8 groups."""
    write_random(directory, small_config(EXPERTS) | SHAPE)
    write_tokenizer(directory)


def cluster_config(model: Path, run_dir: Path, dispatch: str) -> ClusterConfig:
    """Two expert workers of four experts on each node, so that whole groups lie on nodes."""
    run_dir.mkdir()
    (run_dir / "secret").touch(mode=0o600)
    (run_dir / "secret").write_text(os.urandom(32).hex() + "\n")
    workers = EXPERTS // PER_GPU // len(NODES)
    return ClusterConfig(
        model=ModelSection(model, cache_dir=run_dir),
        nodes=tuple(Node(host=a, attention=1, experts=workers) for a in NODES.values()),
        cluster=ClusterSection(run_dir=run_dir),
        placement=PlacementSection(experts_per_gpu=PER_GPU, dispatch=dispatch),
        attention=AttentionSection(microbatches=MICROBATCHES),
        gateway=GatewaySection(host="0.0.0.0", port=PORT),
    )


@contextlib.contextmanager
def services(config: ClusterConfig, directory: Path) -> Iterator[None]:
    """Every service in its node's namespace; on leaving all are stopped."""
    path = directory / "cluster.toml"
    path.write_text(config.to_toml())
    environment = os.environ | {"UCX_NET_DEVICES": DEVICE, "OMP_NUM_THREADS": "1"}
    names, running = list(NODES), []
    try:
        for spec in config.processes():
            command = ["ip", "netns", "exec", names[spec.node], BIN / "atoll", "run", spec.id.role]
            with (directory / f"{spec.id}.log").open("wb") as log:
                running.append(
                    subprocess.Popen(
                        [*command, "--cluster", path, "--index", str(spec.id.index)],
                        stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment,
                    )
                )  # fmt: skip
        wait_for("readiness", lambda: fetch("/ready", check=False), READY_S)
        yield
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def fetch(path: str, *, check: bool = True) -> str:
    """GET from the gateway, inside its node; empty when it does not answer and need not."""
    code = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{PORT}{path}', timeout=20).read().decode())"
    command = ["ip", "netns", "exec", next(iter(NODES)), sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, done.stderr
    return done.stdout


def generated() -> float:
    """Tokens that the gateway received from attention workers so far."""
    found = re.search(r"^atoll_generated_tokens_total (\S+)$", fetch("/metrics"), re.MULTILINE)
    assert found
    return float(found[1])


def routed() -> tuple[int, int]:
    """Rows between nodes as routers sent them, and as unicast would have."""
    entries = [p for p in json.loads(fetch("/cluster"))["processes"] if p["role"] == "router"]
    links = [both["out"] for entry in entries for both in entry["counters"]["links"].values()]
    return sum(one["rows"] for one in links), sum(one["unicast_rows"] for one in links)


def measure(kbit: int, seconds: float) -> dict[str, Any]:
    """Tokens per second and the use of every cable, over a window of a steady load."""
    load = [
        BIN / "atoll-load", f"http://127.0.0.1:{PORT}", "--concurrency", CONCURRENCY, "--ignore-eos",
        "--prompt-tokens", "8", "--max-tokens", "1500", "--requests", CONCURRENCY,
    ]  # fmt: skip
    command = ["ip", "netns", "exec", next(iter(NODES)), *map(str, load)]
    client = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(WARM_S)
        started, tokens, before = time.monotonic(), generated(), cable_bytes()
        time.sleep(seconds)
        ended, after, total = time.monotonic(), cable_bytes(), generated()
        assert client.poll() is None, "the load ended before the window did"
        failed = re.findall(r'outcome="(?:failed|rejected)"\} (\S+)', fetch("/metrics"))
        assert not any(map(float, failed)), "requests failed"
    finally:
        client.kill()
        client.wait()
    wall = ended - started
    use = {way: (after[way] - before[way]) * 8 / wall / (1000 * kbit) for way in before}
    rows, unicast_rows = routed()
    return {
        "tokens_per_s": round((total - tokens) / wall, 1),
        "use_percent": {way: round(100 * share, 1) for way, share in use.items()},
        "rows": rows, "unicast_rows": unicast_rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="F", help="write the result as JSON")
    parser.add_argument(
        "--rate", type=int, default=4000, metavar="KBIT", help="of a cable, each way (4000)"
    )
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="measured (30)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    directory = Path(tempfile.mkdtemp(prefix="atoll-namespaces-"))
    result: dict[str, Any] = {"kbit_s": arguments.rate, "concurrency": CONCURRENCY, "ways": {}}
    try:
        write_model(directory / "model")
        for way in ("unicast", "hierarchical"):
            config = cluster_config(directory / "model", directory / way, way)
            with network(arguments.rate), services(config, directory / way):
                result["ways"][way] = measure(arguments.rate, arguments.seconds)
            print(way, json.dumps(result["ways"][way]), flush=True)
        shutil.rmtree(directory)
    except (KeyboardInterrupt, SystemExit):
        shutil.rmtree(directory)
        raise
    finally:
        if directory.exists():
            print(f"logs: {directory}")
    ways = result["ways"]
    ratio = ways["hierarchical"]["tokens_per_s"] / ways["unicast"]["tokens_per_s"]
    command = (
        f"python -m tests.bench.namespaces --rate {arguments.rate} --seconds {arguments.seconds:g}"
    )
    result |= facts() | {"command": command, "ratio": round(ratio, 2)}
    print(f"hierarchical / unicast: {ratio:.2f}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
