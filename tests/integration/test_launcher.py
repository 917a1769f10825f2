"""The local launcher with dummy services: start, restart, stop, and what is left behind (nothing)."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MPS = {  # a stand-in for NVIDIA's program, and two cards that do not exist
    "PATH": f"{HERE / 'fakes'}:{os.environ['PATH']}",
    "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b",
}
READY_S = 60.0
STOP_S = 20.0


def wait_for(what, condition, limit_s):
    """Poll until `condition()` is true; its value is returned."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {limit_s} s")


class Launched:
    """`atoll up` with dummies in a process group of its own."""

    def __init__(self, directory, *options, dummy="", **variables):
        self.directory = directory
        self.ready_file = directory / "ready.json"
        model = directory / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text('{"n_routed_experts": 3}')
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{HERE}:{HERE / 'light'}",
            "DUMMY": dummy,
            "TMPDIR": str(directory),
            **variables,
        }
        defaults = [] if "--model" in options else ["--model", str(model)]
        port = [] if "--port" in options else ["--port", "0"]
        program = [sys.executable, HERE / "launch_dummies.py", "--ready-file", self.ready_file]
        self.process = subprocess.Popen(
            [*program, *defaults, *port, *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def ready(self):
        """Its ready file's content, once there."""

        def look():
            assert self.process.poll() is None, self.process.communicate()
            with contextlib.suppress(FileNotFoundError):
                return json.loads(self.ready_file.read_text())

        return wait_for("readiness", look, READY_S)

    def pid_of(self, name):
        """The current pid of a process, None while it has none."""
        for process in self.ready()["processes"]:
            if f"{process['role']}-{process['index']}" == name:
                return process["pid"]
        raise KeyError(name)

    def signal_group(self, number):
        os.killpg(self.process.pid, number)

    def end(self):
        """(exit code, stdout, stderr)"""
        out, err = self.process.communicate(timeout=STOP_S)
        return self.process.returncode, out, err

    def processes(self):
        """Pids of every process that was started for this run: they all have its directory in their environment."""
        mark = f"TMPDIR={self.directory}".encode()
        return [pid for pid, environment in environments() if mark in environment]

    def files(self):
        """Sockets, secrets and addresses that are still there."""
        runs = self.directory.glob("atoll-*/run-*")
        return [*runs, *self.directory.rglob("*.sock"), *self.directory.rglob("secret")]


def environments():
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "environ").read_bytes()


@pytest.fixture
def tmp_path():
    """Short whoever runs the tests: Unix sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="atoll-launch-") as directory:
        yield Path(directory)


@pytest.fixture
def launch(tmp_path):
    started = []

    def start(*options, dummy="", **variables):
        started.append(Launched(tmp_path, *options, dummy=dummy, **variables))
        return started[-1]

    yield start
    for launched in started:
        with launched.process as process:
            process.kill()
    for launched in started:
        wait_for("the end of every process", lambda it=launched: not it.processes(), 10)


def shared_memory():
    return {path.name for path in Path("/dev/shm").glob("ucx*")}


def test_start_and_ctrl_c_to_the_whole_group(launch):
    cluster = launch("--nodes", 2, "--attention", 2)
    ready = cluster.ready()
    names = [(p["role"], p["index"], p["node"]) for p in ready["processes"]]
    assert names == [
        ("router", 0, 0),
        ("router", 1, 1),
        ("expert", 0, 0),
        ("expert", 1, 0),
        ("expert", 2, 1),
        ("attention", 0, 0),
        ("attention", 1, 1),
        ("gateway", 0, 0),
    ]
    assert ready["url"].startswith("http://127.0.0.1:")
    for process in ready["processes"]:
        comm = Path(f"/proc/{process['pid']}/comm").read_text().strip()
        assert comm == f"{process['role']}-{process['index']}"[:15]
    (run_dir,) = cluster.directory.glob("atoll-*/run-*")
    assert (run_dir / "secret").stat().st_mode & 0o777 == 0o600
    assert run_dir.stat().st_mode & 0o777 == 0o700
    cluster.signal_group(signal.SIGINT)
    code, out, err = cluster.end()
    assert (code, err) == (0, "")
    assert "EP3 on 2 nodes, 2 attention workers: ready at http://" in out
    assert "ended by" not in out  # no worker died of the Ctrl-C
    assert not cluster.processes()
    assert not cluster.files()
    assert not cluster.ready_file.exists()


def test_killed_workers_come_back_at_the_same_url(launch):
    cluster = launch()
    url = cluster.ready()["url"]
    for name in ("expert-1", "expert-1", "gateway-0"):
        old = cluster.pid_of(name)
        os.kill(old, signal.SIGKILL)
        wait_for(f"restart of {name}", lambda n=name, o=old: cluster.pid_of(n) not in (o, None), 20)
    assert cluster.ready()["url"] == url
    host, port = url.removeprefix("http://").split(":")
    wait_for("an answer", lambda: connects(host, int(port)), 10)
    cluster.signal_group(signal.SIGTERM)
    code, out, err = cluster.end()
    assert (code, err) == (0, "")
    assert out.count("ended by signal SIGKILL; starting it again") == 3


def connects(host, port):
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False


def test_killed_launcher_takes_everything_with_it(launch):
    before = shared_memory()
    cluster = launch()
    cluster.ready()
    cluster.process.kill()
    wait_for("the end of every process", lambda: not cluster.processes(), 5)
    wait_for("the removal of every file", lambda: not cluster.files(), 5)
    assert shared_memory() <= before


def test_killed_zygote_ends_the_cluster_with_a_sentence(launch):
    cluster = launch()
    worker = cluster.pid_of("expert-0")
    status = Path(f"/proc/{worker}/status").read_text()
    zygote = int(status.split("PPid:")[1].split()[0])
    os.kill(zygote, signal.SIGKILL)
    code, _, err = cluster.end()
    assert (code, err) == (1, "atoll: the warm parent of the workers died, and they with it\n")
    assert not cluster.processes()
    assert not cluster.files()


def test_leftovers_of_a_dead_run_are_removed_by_the_next(launch, tmp_path):
    left = tmp_path / f"atoll-{os.getuid()}" / "run-dead"
    left.parent.mkdir(mode=0o700)
    left.mkdir()
    (left / "router-0.sock").touch()
    cluster = launch()
    cluster.ready()
    assert not left.exists()
    assert len(cluster.files()) > 0


@pytest.mark.parametrize(
    ("options", "dummy", "sentence"),
    [
        ((), "expert-1=bad-input", "atoll expert-1: tensor x is missing\n"),
        ((), "attention-0=die-later", "atoll attention-0: tensor y is missing\n"),
        (("--model", "/nowhere"), "", "atoll: model /nowhere: no such directory\n"),
        (
            ("--ep", 9),
            "",
            "atoll: --ep 9 does not fit: 3 experts at 1 per GPU need 3 expert workers\n",
        ),
        (("--api-key-file", "/nowhere"), "", "atoll: API key file /nowhere: no such file\n"),
        (
            ("--microbatches", "many"),
            "",
            "atoll: argument --microbatches: invalid int value: 'many'",
        ),
    ],
)
def test_bad_input_ends_everything_with_one_sentence(launch, options, dummy, sentence):
    cluster = launch(*options, dummy=dummy)
    code, _, err = cluster.end()
    assert code == 2
    assert err.startswith(sentence)
    assert err.count("\n") == 1
    assert not cluster.processes()
    assert not cluster.files()


def test_port_in_use_is_one_sentence(launch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        cluster = launch("--port", port)
        code, _, err = cluster.end()
    assert (code, err) == (2, f"atoll: cannot listen on port {port} of 127.0.0.1: it is in use\n")
    assert not cluster.processes()


def test_worker_that_never_starts_is_given_up(launch):
    cluster = launch(dummy="expert-2=crash")
    code, out, err = cluster.end()
    assert code == 1
    assert err == "atoll expert-2: ValueError: broken (after 5 starts)\n"
    assert "ValueError: broken" in out  # with its traceback


def test_second_signal_does_not_wait_for_the_drain(launch):
    cluster = launch(dummy="attention-0=hang gateway-0=hang")
    cluster.ready()
    cluster.process.send_signal(signal.SIGTERM)
    wait_for("the stop", lambda: "stopping" in cluster.process.stdout.readline(), 10)
    started = time.monotonic()
    cluster.process.send_signal(signal.SIGTERM)
    code, _, _ = cluster.end()
    assert code == 0
    assert time.monotonic() - started < 5
    assert not cluster.processes()


def test_given_run_directory_keeps_the_logs_only(launch, tmp_path):
    run_dir = tmp_path / "mine"
    cluster = launch("--run-dir", run_dir)
    cluster.ready()
    second = launch("--run-dir", run_dir)
    code, _, err = second.end()
    assert (code, err) == (2, f"atoll: another cluster is running in {run_dir}\n")
    cluster.process.send_signal(signal.SIGTERM)
    assert cluster.end()[0] == 0
    assert sorted(p.name for p in run_dir.iterdir()) == ["cluster.toml", "lock", "logs"]
    assert "ready; UCX environment" in (run_dir / "logs" / "expert-0.log").read_text()


def mps_starts(run_dir):
    """How often MPS was started, and for which cards."""
    lines = (run_dir / "logs" / "control.log").read_text().splitlines()
    return [line.split()[0] for line in lines]


def test_processes_on_a_card_share_it_by_mps(launch, tmp_path):
    run_dir = tmp_path / "mine"
    options = ("--device", "cuda", "--oversubscribe", "--nodes", 1, "--run-dir", run_dir)
    cluster = launch(*options, **MPS)
    cluster.ready()
    expected = {
        "router-0": "a",
        "attention-0": "a",
        "attention-1": "a",
        "expert-0": "b",
        "expert-2": "b",
    }
    for name, card in expected.items():
        log = (run_dir / "logs" / f"{name}.log").read_text()
        assert f"card GPU-{card}, MPS {run_dir}/mps\n" in log
    assert "MPS None" in (run_dir / "logs" / "gateway-0.log").read_text()
    assert mps_starts(run_dir) == ["cards=GPU-a,GPU-b"]
    daemon = int((run_dir / "mps/nvidia-cuda-mps-control.pid").read_text())
    expert = cluster.pid_of("expert-1")
    for pid in (daemon, expert):  # it takes its clients with it
        os.kill(pid, signal.SIGKILL)
    wait_for("a new start", lambda: cluster.pid_of("expert-1") not in (expert, None), 20)
    assert len(mps_starts(run_dir)) == 2
    cluster.process.send_signal(signal.SIGTERM)
    code, _, err = cluster.end()
    assert (code, err) == (0, "")
    assert not (run_dir / "mps").exists()
    assert not cluster.processes()


def test_killed_launcher_takes_mps_with_it(launch, tmp_path):
    cluster = launch("--device", "cuda", "--oversubscribe", **MPS)
    cluster.ready()
    assert list(tmp_path.rglob("mps/control"))
    cluster.process.kill()
    wait_for("the end of every process", lambda: not cluster.processes(), 10)
    wait_for("the removal of every file", lambda: not cluster.files(), 5)


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"PATH": "/nowhere"}, "nvidia-cuda-mps-control is not installed (it comes with NVIDIA's driver)"),
        ({"FAKE_MPS": "broken"}, "nvidia-cuda-mps-control -d: Cannot open /dev/nvidiactl"),
    ],
)  # fmt: skip
def test_without_mps_a_warning_says_what_it_costs(launch, variables, why):
    cluster = launch("--device", "cuda", "--oversubscribe", **{**MPS, **variables})
    cluster.ready()
    cluster.process.send_signal(signal.SIGTERM)
    code, _, err = cluster.end()
    warning = "atoll: warning: processes share a GPU without MPS and take turns on it: "
    assert (code, err) == (0, f"{warning}{why}\n")


@pytest.mark.parametrize(
    ("cards", "sentence"),
    [
        ("GPU-a,GPU-b,GPU-c,GPU-d", "5 attention and expert workers have 4 GPUs; "
         "sharing them needs cluster.oversubscribe = true (atoll up --oversubscribe)"),
        ("", "no GPU was found on this host (cluster.device is cuda)"),
    ],
)  # fmt: skip
def test_too_few_cards_are_one_sentence(launch, cards, sentence):
    cluster = launch("--device", "cuda", **{**MPS, "CUDA_VISIBLE_DEVICES": cards})
    code, _, err = cluster.end()
    assert (code, err) == (2, f"atoll: {sentence}\n")
    assert not cluster.processes()
