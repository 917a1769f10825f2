"""The warm parent: imports everything heavy once, then forks workers on request. A process of its own, one thread.

It must not initialise UCX or CUDA nor run a torch operation: none of them survives a fork. Messages on the Unix socket
(SEQPACKET, one JSON object each) whose file descriptor is argv[1]:

    launcher -> zygote   {"spawn": name, "module": m, "argv": [...], "env": {...}} with the worker's output pipe
                         {"kill": pid, "signal": n}       only reaches a child that is not yet reaped
    zygote -> launcher   {"warm": seconds}   {"spawned": name, "pid": pid}   {"exited": pid, "status": wait status}

When the launcher is gone (end of file) every worker is killed, the run directory (argv[2], removed whole if argv[3] is
"temporary") is cleaned and the zygote ends. When the zygote is killed, the kernel kills the workers.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from deploy.local.run_dir import remove_leftovers

MAX_MESSAGE = 1 << 16
WARM_MODULES = (
    "numpy",
    "torch",
    "ucxx._lib.libucxx",
    "ucxx._lib.arr",
    "uvloop",
    "aiohttp.web",
    "orjson",
    "pydantic.types",
    "safetensors",
    "tokenizers",
    "jinja2.sandbox",
    "prometheus_client",
    # the services themselves, by name: what a hundred workers would each compile and load again
    "services.gateway.links",
    "services.gateway.service",
    "services.attention.worker",
    "services.router.worker",
    "services.expert.worker",
    "common.service",
)
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_COMM_LENGTH = 15  # bytes of a process name that the kernel keeps


class Zygote:
    """The loop around one socket; `children` are the workers not yet reaped."""

    def __init__(self, sock: socket.socket) -> None:
        self.children: set[int] = set()
        self._sock = sock
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> None:
        """Serve until the launcher is gone, then kill and reap what is left."""
        while True:
            readable, _, _ = select.select([self._sock.fileno(), self._wake_read], [], [])
            self._reap()
            if self._sock.fileno() not in readable:
                continue
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE, 1)
            except OSError:
                break
            if not data:
                break
            self._obey(json.loads(data), fds)
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
        while self.children:
            self.children.discard(os.waitpid(-1, 0)[0])

    def _obey(self, message: dict[str, Any], fds: list[int]) -> None:
        if "kill" in message:
            if message["kill"] in self.children:
                os.kill(message["kill"], message["signal"])
            return
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_worker(message, fds[0], parent)
        for fd in fds:
            os.close(fd)
        self.children.add(pid)
        self._send({"spawned": message["spawn"], "pid": pid})

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self.children.discard(pid)
            self._send({"exited": pid, "status": status})

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the launcher is gone: the next receive says so
            self._sock.send(json.dumps(message).encode())

    def _become_worker(self, message: dict[str, Any], output: int, parent: int) -> NoReturn:
        """In the child: shed everything of the zygote, then be the service until it ends."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)
            self._sock.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            _redirect(output)
            os.environ.update(message["env"])
            name = message["spawn"].encode()[:_COMM_LENGTH]
            _prctl(_PR_SET_NAME, ctypes.create_string_buffer(name))
            sys.argv = [message["module"], *message["argv"]]
            gc.enable()
            code = _run_module(message["module"])
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)


def _run_module(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exc:
        if isinstance(exc.code, str):
            print(exc.code, file=sys.stderr)
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    return 0


def _redirect(output: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for fd in {null, output} - {0, 1, 2}:
        os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure")(line_buffering=True)  # noqa: B009  -- TextIO does not declare it


def _prctl(option: int, value: Any) -> None:  # noqa: ANN401  -- an int or a C string
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def warm_up(device: str) -> None:
    """Import what every worker needs; a module that is not installed is left to the worker that wants it.

    Where there is a GPU, loading UCX starts a thread of CUDA's: there each worker does it for itself.
    """
    for name in WARM_MODULES:
        if device != "cpu" and name.startswith("ucxx"):
            continue
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def other_threads() -> list[str]:
    """Names of threads beside this one: every fork would lose them, in whatever state they are."""
    tasks = set(os.listdir("/proc/self/task")) - {str(os.getpid())}
    return sorted(Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in tasks)


def main(argv: list[str]) -> int:
    """`zygote FD RUN_DIR temporary|kept cpu|cuda`"""
    started = time.monotonic()
    sock = socket.socket(fileno=int(argv[0]))
    sock.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by every worker
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # Slurm's reaches us too; the launcher says when to end
    gc.disable()  # no collection may touch, and so copy, the shared pages
    warm_up(argv[3])
    zygote = Zygote(sock)
    others = other_threads()
    if others:
        print(f"importing started threads in the warm parent: {', '.join(others)}", file=sys.stderr)
        return 1
    gc.freeze()
    sock.send(json.dumps({"warm": time.monotonic() - started}).encode())
    zygote.run()
    remove_leftovers(Path(argv[1]), temporary=argv[2] == "temporary")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
