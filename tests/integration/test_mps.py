"""NVIDIA's MPS as the launcher runs it: with a stand-in for NVIDIA's program, real processes and files otherwise."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.local import mps
from deploy.local.mps import Mps, MpsError
from deploy.local.run_dir import open_run_dir

FAKES = Path(__file__).parent / "fakes"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def daemon(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{FAKES}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    made = Mps(tmp_path / "mps", tmp_path / "logs", ("GPU-a", "GPU-b"))
    yield made
    monkeypatch.delenv("FAKE_MPS", raising=False)
    mps.stop(made.pipes)
    wait_until_gone(*pids(made))


def starts(daemon):
    """What each start of the daemon wrote, oldest first."""
    file = daemon.logs / "control.log"
    return file.read_text().splitlines() if file.exists() else []


def pids(daemon):
    return [int(line.split("pid=")[1]) for line in starts(daemon)]


def is_there(pid):
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until_gone(*wanted):
    while any(is_there(pid) for pid in wanted):
        time.sleep(0.01)


def test_starts_once_for_the_cards_of_the_run_and_stops(daemon):
    daemon.ensure()
    daemon.ensure()
    (line,) = starts(daemon)
    assert line.startswith("cards=GPU-a,GPU-b ")
    assert mps.answers(daemon.pipes)
    assert daemon.pipes.stat().st_mode & 0o777 == 0o700
    mps.stop(daemon.pipes)
    assert not mps.answers(daemon.pipes)
    assert not daemon.pipes.exists()
    mps.stop(daemon.pipes)


def test_numbers_of_cards_are_not_given_to_the_server(daemon):
    Mps(daemon.pipes, daemon.logs, ("1",)).ensure()
    assert starts(daemon)[0].startswith("cards=all ")


def test_a_dead_one_is_started_again(daemon):
    daemon.ensure()
    os.kill(pids(daemon)[0], signal.SIGKILL)
    wait_until_gone(*pids(daemon))
    daemon.ensure()
    assert len(starts(daemon)) == 2
    assert mps.answers(daemon.pipes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_to_everything_we_started_leave_it_to_its_clients(daemon, number):
    daemon.ensure()
    os.kill(pids(daemon)[0], number)
    time.sleep(0.1)  # for a default action to be taken
    assert mps.answers(daemon.pipes)


def test_one_that_hangs_is_killed(daemon, monkeypatch):
    daemon.ensure()
    monkeypatch.setenv("FAKE_MPS", "silent")
    mps.stop(daemon.pipes, within_s=0.2)
    wait_until_gone(*pids(daemon))
    assert not daemon.pipes.exists()


def test_somebody_elses_process_is_not_killed(daemon):
    daemon.pipes.mkdir()
    (daemon.pipes / "nvidia-cuda-mps-control.pid").write_text(f"{os.getpid()}\n")
    mps.stop(daemon.pipes, within_s=0.2)  # the number in the file is ours: we live
    assert not daemon.pipes.exists()


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("broken", "nvidia-cuda-mps-control -d: Cannot open /dev/nvidiactl"),
        ("silent", "nvidia-cuda-mps-control started but does not answer"),
    ],
)
def test_why_it_cannot_be_had(daemon, monkeypatch, how, sentence):
    monkeypatch.setenv("FAKE_MPS", how)
    for limit in ("ANSWER_S", "STOP_S"):
        monkeypatch.setattr(mps, limit, 0.3)
    with pytest.raises(MpsError, match=sentence):
        daemon.ensure()


def test_missing_program_is_named(daemon, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MpsError, match="nvidia-cuda-mps-control is not installed"):
        daemon.ensure()


@pytest.mark.parametrize("kept", [True, False])
def test_it_goes_with_its_run_directory(daemon, monkeypatch, tmp_path, kept):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_dir = open_run_dir(tmp_path / "run" if kept else None)
    daemon = Mps(run_dir.path / "mps", tmp_path / "logs")
    daemon.ensure()
    run_dir.close()
    wait_until_gone(*pids(daemon))
    assert not daemon.pipes.exists()


JOB = """\
[cluster]
device = "cuda"
[model]
path = "/srv/model"
[[nodes]]
host = "n1"
attention = 1
experts = 2
gpus = 3
[[nodes]]
host = "n2"
attention = 0
experts = 2
gpus = 3
"""


@pytest.fixture
def job_step(tmp_path):
    """`atoll slurm mps` as a step of a job on its second node."""
    (tmp_path / "job/logs").mkdir(mode=0o700, parents=True)
    (tmp_path / "job/cluster.toml").write_text(JOB)
    started = []

    def start(**variables):
        path = {
            "PATH": f"{FAKES}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(tmp_path),
        }
        cards = {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c", "SLURM_NODEID": "1"}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "deploy.cli", "slurm", "mps", "--job-dir", tmp_path / "job"],
                env={**os.environ, **path, **cards, **variables}, stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        with process:
            process.terminate()  # it takes its daemon with it


def wait_for_file(path):
    while not path.exists():
        time.sleep(0.01)
    return path.read_text().strip()


def test_a_job_has_a_step_that_keeps_it_until_its_clients_are_gone(job_step, tmp_path):
    step = job_step()
    pipes = Path(wait_for_file(tmp_path / "job/mps-1"))
    assert mps.answers(pipes) is False  # this process has not the program in its PATH
    (line,) = (tmp_path / "job/logs/mps-1/control.log").read_text().splitlines()
    assert line.startswith("cards=GPU-a,GPU-b ")  # nobody is on the third
    step.terminate()
    assert step.wait(20) == 0
    wait_until_gone(int(line.split("pid=")[1]))
    assert not list(tmp_path.glob("atoll-*/run-*"))


def test_a_job_without_the_program_says_so_once_and_goes_on(job_step, tmp_path):
    step = job_step(PATH="/nowhere")
    wait_for_file(tmp_path / "job/mps-1")
    step.terminate()
    said, _ = step.communicate(timeout=20)
    assert step.returncode == 0
    assert said == (
        "warning: node 1 shares GPUs without MPS: nvidia-cuda-mps-control is not installed "
        "(it comes with NVIDIA's driver)\n"
    )


@pytest.mark.parametrize("node", ["2", "7"])
def test_a_node_without_shared_cards_has_nothing_to_do(job_step, tmp_path, node):
    (tmp_path / "job/cluster.toml").write_text(
        JOB + '[[nodes]]\nhost = "n3"\nattention = 0\ngpus = 1\n'
    )
    step = job_step(SLURM_NODEID=node)
    assert step.wait(20) == 0
    assert not list((tmp_path / "job").glob("mps-*"))
