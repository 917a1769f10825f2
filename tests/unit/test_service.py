"""The life of a service: what signals, deadlines and failures do to start, drain and stop."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.service import Lifecycle, State, notify

ROOT = Path(__file__).parents[2]
CLUSTER = '[model]\npath = "model"\n[[nodes]]\nexperts = 1\n'


class Recorder:
    """A service that writes down what it was asked to do; each phase can be told to wait or to fail."""

    def __init__(self, **phases):
        self.story = []
        self.phases = phases
        self.task_ended = None

    async def _phase(self, name):
        self.story.append(name)
        outcome = self.phases.get(name)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome == "hang":
            await asyncio.Event().wait()

    async def start(self, tasks):
        await self._phase("start")
        tasks.create_task(self._background())

    async def _background(self):
        try:
            outcome = self.phases.get("task")
            if isinstance(outcome, Exception):
                raise outcome
            await asyncio.Event().wait()
        finally:
            self.task_ended = True

    async def drain(self):
        await self._phase("drain")

    async def stop(self):
        await self._phase("stop")


def live(service, *, stops=1, drain_deadline_s=30.0, ready=True):
    """Run the service; ask it to stop `stops` times, the first time once it is ready (or at once)."""

    async def main():
        lifecycle = Lifecycle(service, drain_deadline_s=drain_deadline_s)
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(lifecycle.run())
            while ready and lifecycle.state is State.STARTING and not running.done():  # noqa: ASYNC110
                await asyncio.sleep(0)
            for _ in range(stops):
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                lifecycle.request_stop()
        return lifecycle

    return asyncio.run(main())


def test_stops_in_order_and_cancels_its_tasks():
    service = Recorder()
    lifecycle = live(service)
    assert service.story == ["start", "drain", "stop"]
    assert service.task_ended
    assert repr(lifecycle) == "<Lifecycle [stopped | stop requests 1]>"


def test_second_request_cuts_the_drain_short():
    service = Recorder(drain="hang")
    live(service, stops=2)
    assert service.story == ["start", "drain", "stop"]


def test_drain_deadline_cuts_the_drain_short():
    service = Recorder(drain="hang")
    live(service, drain_deadline_s=0.01)
    assert service.story == ["start", "drain", "stop"]


def test_request_while_starting_stops_at_once():
    service = Recorder(start="hang")
    live(service, ready=False)
    assert service.story[0] == "start"
    assert service.story[-1] == "stop"


@pytest.mark.parametrize("phase", ["start", "task", "drain", "stop"])
def test_failure_in_any_phase_still_stops_and_is_raised(phase):
    service = Recorder(**{phase: ConfigError(f"{phase} is wrong")})
    with pytest.RaisesGroup(ConfigError, flatten_subgroups=True):
        live(service)
    assert service.story[-1] == "stop"


def test_timeout_error_of_a_service_is_not_taken_for_the_deadline():
    with pytest.RaisesGroup(TimeoutError, flatten_subgroups=True):
        live(Recorder(start=TimeoutError("mine")))


def test_notify_reaches_systemd(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(5)
        receiver.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1")
        assert receiver.recv(100) == b"READY=1"
    (tmp_path / "notify").unlink()
    notify("STOPPING=1")  # nobody listens: not our failure


PROGRAM = """
import asyncio, sys
from common.errors import ModelError
from common.ids import Role
from common.service import run_service

class Dummy:
    async def start(self, tasks):
        {start}
        print("ready", flush=True)
    async def drain(self): print("drained", flush=True)
    async def stop(self): print("stopped", flush=True)

raise SystemExit(run_service(lambda config, index: Dummy(), Role.EXPERT, sys.argv[1:]))
"""


def process(tmp_path, *options, start="pass", cluster=CLUSTER, index="0"):
    (tmp_path / "c.toml").write_text(cluster)
    (tmp_path / "dummy.py").write_text(textwrap.dedent(PROGRAM.format(start=start)))
    command = [sys.executable, tmp_path / "dummy.py", "--cluster", tmp_path / "c.toml"]
    return subprocess.Popen(
        [*command, "--index", index, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_sigint_is_ignored_and_sigterm_drains(tmp_path):
    with process(tmp_path) as service:
        assert service.stdout.readline() == "ready\n"
        service.send_signal(signal.SIGINT)
        service.send_signal(signal.SIGTERM)
        out, err = service.communicate(timeout=20)
    assert (out, service.returncode) == ("drained\nstopped\n", 0)
    assert "UCX environment" in err
    assert "experts = 1" in err  # the effective configuration


def test_with_another_stop_signal_sigterm_is_ignored(tmp_path):
    with process(tmp_path, "--stop-signal", "USR1") as service:
        assert service.stdout.readline() == "ready\n"
        service.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            service.wait(0.3)
        service.send_signal(signal.SIGUSR1)
        out, _ = service.communicate(timeout=20)
    assert (out, service.returncode) == ("drained\nstopped\n", 0)


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        ({"start": "raise ModelError('no tensor x')"}, 2, "atoll expert-0: no tensor x"),
        ({"start": "raise KeyError('x')"}, 1, "atoll expert-0: KeyError: 'x'"),
        ({"index": "1"}, 2, "atoll expert-1: the cluster has no expert-1"),
        ({"cluster": "[modle]"}, 2, "c.toml:1: modle is not a known key, did you mean 'model'?"),
    ],
)
def test_exit_code_and_sentence(tmp_path, options, code, sentence):
    with process(tmp_path, **options) as service:
        _, err = service.communicate(timeout=20)
    assert service.returncode == code
    assert sentence in err.splitlines()[-1]
