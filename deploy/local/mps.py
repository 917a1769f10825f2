"""NVIDIA's MPS for the processes of one run that share a card: start, health check, stop.

Without it they take turns of milliseconds. The daemon has pipe and log directories of its own and sees the run's cards
only; nothing of a card is changed, its compute mode in particular. Plain blocking functions, each with a deadline: the
zygote, which cleans up after a killed launcher, calls `stop` as well.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import AtollError

CONTROL = "nvidia-cuda-mps-control"
START_S = 10.0
ANSWER_S = (
    15.0  # far more than it takes: whoever is thought to hang is killed, and its clients with it
)
STOP_S = 5.0
_POLL_S = 0.05
# what ends us must not end it, and with it every client at its work: Slurm signals all that a step has started
_START = ("/bin/sh", "-c", f'trap "" INT TERM HUP; exec {CONTROL} -d')
_COMM = CONTROL[:15]  # as the kernel keeps it
_CONTROL_PIPE, _PID_FILE = "control", f"{CONTROL}.pid"


class MpsError(AtollError):
    """MPS cannot be had; the message says why."""


@dataclass(frozen=True, slots=True)
class Mps:
    """The daemon of one run. `cards` as CUDA_VISIBLE_DEVICES takes them; `pipes` is removed with it, `logs` stays."""

    pipes: Path
    logs: Path
    cards: Sequence[str] = ()

    def ensure(self) -> None:
        """Start it unless it runs and answers. Raises MpsError."""
        if answers(self.pipes):
            return
        if shutil.which(CONTROL) is None:
            raise MpsError(f"{CONTROL} is not installed (it comes with NVIDIA's driver)")
        stop(self.pipes)  # one that hangs
        self.pipes.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        said = self.logs / "mps-start.log"
        environment = {**os.environ, **_pipe(self.pipes), "CUDA_MPS_LOG_DIRECTORY": str(self.logs)}
        # numbers would be counted anew by the server, and so by its clients; names stay
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        if self.cards and not any(card.isdecimal() for card in self.cards):
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.cards)
        with said.open("wb") as output:
            try:
                done = subprocess.run(
                    _START,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment,
                    timeout=START_S,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as exc:
                raise MpsError(f"{CONTROL} -d: {exc}") from exc
        if done.returncode != 0:
            words = said.read_text(errors="replace").strip().splitlines()
            raise MpsError(f"{CONTROL} -d: {' '.join(words[-1:]) or f'exit {done.returncode}'}")
        deadline = time.monotonic() + ANSWER_S
        while not answers(self.pipes):
            if time.monotonic() > deadline:
                stop(self.pipes)
                raise MpsError(f"{CONTROL} started but does not answer, see {self.logs}")
            time.sleep(_POLL_S)


def answers(pipes: Path) -> bool:
    """Whether a daemon with this pipe directory runs and answers."""
    return (pipes / _CONTROL_PIPE).exists() and _ask(pipes, "get_server_list", ANSWER_S)


def stop(pipes: Path, within_s: float | None = None) -> None:
    """Ask the daemon to quit, which waits for its clients; kill what is left and remove the directory. Idempotent."""
    if not pipes.is_dir():
        return
    with contextlib.suppress(OSError, ValueError):
        pid = int((pipes / _PID_FILE).read_text())
        if not _ask(pipes, "quit", STOP_S if within_s is None else within_s) and _is_mps(pid):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(pipes, ignore_errors=True)


def _ask(pipes: Path, command: str, within_s: float) -> bool:
    try:
        done = subprocess.run(
            [CONTROL],
            input=f"{command}\n".encode(),
            capture_output=True,
            env={**os.environ, **_pipe(pipes)},
            timeout=within_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _pipe(pipes: Path) -> dict[str, str]:
    return {"CUDA_MPS_PIPE_DIRECTORY": str(pipes)}


def _is_mps(pid: int) -> bool:
    """Whether the process is such a daemon: its number may be somebody else's by now."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().startswith(_COMM)
    return False
