"""The launcher's end of the zygote: start it, ask it for workers, hear of their ends."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.transport.environment import set_ucx_environment
from deploy.local.zygote import MAX_MESSAGE

_ROOT = Path(__file__).parents[2]
# set before the imports: these libraries size their thread pools when loaded, and the zygote must stay single-threaded
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class Forker:
    """One zygote process. Callbacks are plain calls from the event loop."""

    def __init__(
        self,
        *,
        on_spawned: Callable[[str, int], None],
        on_exited: Callable[[int, int], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.warm = asyncio.Event()
        self.warm_s = 0.0
        self._on_spawned = on_spawned
        self._on_exited = on_exited
        self._on_lost = on_lost
        self._sock: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, run_dir: Path, *, temporary: bool, local: bool, device: str) -> None:
        """Start the zygote in a session of its own: what is sent to our process group must not reach the workers.

        `local` (every process is on this host) and `device` (where rows lie) decide UCX's transports.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
        kept = "temporary" if temporary else "kept"
        environ = {**_ENVIRONMENT, **os.environ, "PYTHONPATH": path}
        # importing ucxx would fix some of it
        set_ucx_environment(local=local, device=device, environ=environ)
        command = [sys.executable, "-m", "deploy.local.zygote"]
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(run_dir), kept, device],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=environ,
            )
        self._sock = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._receive)

    def spawn(
        self, name: str, module: str, argv: Sequence[str], env: Mapping[str, str], output_fd: int
    ) -> None:
        """Ask for a worker; `on_spawned` follows. `output_fd` becomes its stdout and stderr."""
        message = {"spawn": name, "module": module, "argv": list(argv), "env": dict(env)}
        self._send(message, [output_fd])

    def kill(self, pid: int, number: signal.Signals) -> None:
        """Signal a worker; nothing happens when it has ended, even if its pid is somebody else's by now."""
        self._send({"kill": pid, "signal": int(number)}, [])

    async def close(self) -> None:
        """End the zygote and with it every worker."""
        if self._sock is not None:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None
        if self._process is not None:
            if not self.warm.is_set():
                self._process.kill()  # it has no workers yet and, importing, would not notice us for seconds
            try:
                await asyncio.to_thread(self._process.wait, 5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _send(self, message: dict[str, Any], fds: list[int]) -> None:
        if self._sock is None:
            return
        try:
            # blocking: the zygote reads promptly, and its buffer holds hundreds of these
            self._sock.setblocking(True)
            socket.send_fds(self._sock, [json.dumps(message).encode()], fds)
        except OSError:
            self._lost()
        finally:
            if self._sock is not None:
                self._sock.setblocking(False)

    def _receive(self) -> None:
        while self._sock is not None:
            data = b""
            try:
                data = self._sock.recv(MAX_MESSAGE)
            except BlockingIOError:
                return
            except OSError:
                pass
            if not data:
                self._lost()
                return
            self._dispatch(json.loads(data))

    def _dispatch(self, message: dict[str, Any]) -> None:
        if "spawned" in message:
            self._on_spawned(message["spawned"], message["pid"])
        elif "exited" in message:
            self._on_exited(message["exited"], message["status"])
        else:
            self.warm_s = message["warm"]
            self.warm.set()

    def _lost(self) -> None:
        if self._sock is not None:
            with contextlib.suppress(ValueError):
                asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None
            self._on_lost()
