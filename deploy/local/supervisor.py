"""Runs one cluster on this host: forks every process, restarts the dead, reports readiness, stops in order.

Decides when to start, restart, give up and stop; the zygote forks, `Worker` keeps each process's story.
"""

import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.config import LOCAL, ClusterConfig
from common.ids import ProcessId, Role
from common.service import STOP_SIGNALS
from common.waiting import poll_until
from deploy.local.forker import Forker
from deploy.local.mps import Mps, MpsError
from deploy.local.output import Display, LinePipe
from deploy.local.part import STOP_SIGNAL, Part, until_silent
from deploy.local.readiness import NotifySocket, wait_until_ready, write_ready_file
from deploy.local.run_dir import RunDir, write_atomically
from deploy.local.worker import MAX_FAILED_STARTS, Worker, WorkerState

# Seconds until SIGKILL; with its grace 19 s in all. Clients first, so that what is in flight can finish.
STOP_ORDER = {Role.GATEWAY: 9.0, Role.ATTENTION: 3.0, Role.EXPERT: 3.0, Role.ROUTER: 2.0}
_KILL_GRACE_S = 0.5
_EXIT_BAD_INPUT = 2


@dataclass(frozen=True, slots=True)
class Options:
    """How to run, apart from what the cluster is. `package` holds one module per role.

    With `part`, other supervisors run the rest of the cluster. `environments` are what single processes get on top,
    `mps` is what must run before they do.
    """

    ready_file: Path | None = None
    package: str = "services"
    verbose: bool = False
    quiet: bool = False
    part: Part | None = None
    environments: Mapping[ProcessId, Mapping[str, str]] = field(default_factory=dict)
    mps: Mps | None = None


class Supervisor:
    """One cluster from start to stop; `run` is called once."""

    def __init__(self, config: ClusterConfig, run_dir: RunDir, options: Options) -> None:
        self._config = config
        self._run_dir = run_dir
        self._options = options
        part = options.part
        own = [s for s in config.processes() if part is None or s.id in part.environments]
        self._workers = {str(spec.id): Worker(spec) for spec in own}
        self._by_pid: dict[int, Worker] = {}
        self._early_ready: set[int] = set()  # notified before we heard of the fork
        self._stop_wanted = asyncio.Event()
        self._changed = asyncio.Event()
        self._stopping = False
        self._zygote_lost = False
        self._exit_code = 0
        self._failure: str | None = None
        self._url: str | None = None  # once the cluster was ready
        self._was_ready = False
        self._display = Display(verbose=options.verbose, quiet=options.quiet)
        self._forker = Forker(
            on_spawned=self._on_spawned, on_exited=self._on_exited, on_lost=self._on_zygote_lost
        )
        self._notify: NotifySocket | None = None
        self._mps_lock = asyncio.Lock()
        self._tasks: asyncio.TaskGroup | None = None

    def __repr__(self) -> str:
        states = Counter(str(worker.state) for worker in self._workers.values())
        counts = " | ".join(f"{state} {count}" for state, count in sorted(states.items()))
        return f"<Supervisor [{counts}]>"

    async def run(self, on_ready: Callable[[str], Awaitable[int]] | None = None) -> int:
        """Serve until told to stop, or until `on_ready(url)`, awaited once the cluster is ready, gives an exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        _allow_many_files()
        if self._options.ready_file is not None:
            self._options.ready_file.unlink(missing_ok=True)
        try:
            self._forker.start(
                self._run_dir.path,
                temporary=self._run_dir.temporary,
                local=all(node.host == LOCAL for node in self._config.nodes),
                device=self._config.cluster.device,
            )
            self._notify = NotifySocket(self._run_dir.path / "notify.sock", self._on_ready)
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                serving = tasks.create_task(self._serve(tasks, on_ready))
                await self._stop_wanted.wait()
                serving.cancel()
                await self._stop()
                raise _Stopped
        except* _Stopped:
            pass
        finally:
            self._display.settled()
            await self._forker.close()
            if self._notify is not None:
                self._notify.close()
            for worker in self._workers.values():
                if worker.pipe is not None:
                    worker.pipe.close()
            if self._options.ready_file is not None:
                self._options.ready_file.unlink(missing_ok=True)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.remove_signal_handler(number)
        if self._failure is not None:
            print(self._failure, file=sys.stderr, flush=True)
        return self._exit_code

    async def _serve(
        self, tasks: asyncio.TaskGroup, on_ready: Callable[[str], Awaitable[int]] | None
    ) -> None:
        started = asyncio.get_running_loop().time()
        self._write_cluster(self._config)
        self._progress()
        await self._ensure_mps()
        await self._forker.warm.wait()
        for worker in self._workers.values():
            self._spawn(worker)
            await asyncio.sleep(0)  # read the answers meanwhile: the socket to the zygote is finite
        await self._until(lambda worker: worker.state is WorkerState.READY)
        if all(worker.role is not Role.GATEWAY for worker in self._workers.values()):
            self._was_ready = True  # whether the cluster is, the part with the gateway knows
            return
        url = await wait_until_ready(self._run_dir.path)
        part = self._options.part
        self._url, self._was_ready = url if part is None else part.url(self._config), True
        # a restarted gateway must come back where clients know it
        port = int(url.rsplit(":", 1)[1].rstrip("/"))
        self._write_cluster(replace(self._config, gateway=replace(self._config.gateway, port=port)))
        self._display.settled()
        elapsed = asyncio.get_running_loop().time() - started
        self._display.note(f"{self._summary()}: ready at {self._url} after {elapsed:.1f} s")
        self._write_ready_file()
        if on_ready is not None:
            self._exit_code = await on_ready(url)
            self._stop_wanted.set()

    def _summary(self) -> str:
        config = self._config
        attention = len(config.of_role(Role.ATTENTION))
        return (
            f"{config.served_name}: EP{config.num_expert_workers} on {len(config.nodes)} nodes, "
            f"{attention} attention workers"
        )

    def _spawn(self, worker: Worker) -> None:
        if self._stopping:
            return

        def on_line(line: str) -> None:
            worker.tail.append(line)
            if not line.startswith(
                f"atoll {worker.name}: "
            ):  # its last words: told when it has ended
                self._display.worker_line(worker.name, line, stopping=self._stopping)

        part = self._options.part
        log_file = self._run_dir.log_file(worker.name)
        pipe = LinePipe(part.log_dir / log_file.name if part is not None else log_file, on_line)
        index = str(worker.spec.id.index)
        argv = ["--cluster", str(self._run_dir.cluster_file), "--index", index]
        env = {"NOTIFY_SOCKET": str(self._run_dir.path / "notify.sock")}
        if part is not None:
            argv += ["--stop-signal", STOP_SIGNAL]
            env.update(part.environments[worker.spec.id])
        env.update(self._options.environments.get(worker.spec.id, {}))
        module = f"{self._options.package}.{worker.role}"
        worker.state = WorkerState.STARTING
        worker.pipe = pipe
        self._forker.spawn(worker.name, module, argv, env, pipe.write_fd)
        pipe.handed_over()

    def _on_spawned(self, name: str, pid: int) -> None:
        worker = self._workers[name]
        worker.spawned(pid)
        self._by_pid[pid] = worker
        if self._stopping:
            self._forker.kill(pid, signal.SIGTERM)
        if pid in self._early_ready:
            self._on_ready(pid)

    def _on_ready(self, pid: int) -> None:
        worker = self._by_pid.get(pid)
        if worker is None:
            self._early_ready.add(pid)
            return
        self._early_ready.discard(pid)
        if worker.state is WorkerState.STARTING:
            worker.ready(asyncio.get_running_loop().time())
            self._changed.set()
            self._progress()
            self._write_ready_file()

    def _on_exited(self, pid: int, status: int) -> None:
        worker = self._by_pid.pop(pid)
        if worker.pipe is not None:
            worker.pipe.pump()  # its last words may still be in the pipe
        delay_s = worker.ended(asyncio.get_running_loop().time())
        self._changed.set()
        if self._stopping:
            worker.state = WorkerState.ENDED
            return
        code = os.waitstatus_to_exitcode(status)
        if code == _EXIT_BAD_INPUT:
            self._give_up(worker.last_words, _EXIT_BAD_INPUT)
        elif not self._was_ready and worker.num_quick_deaths >= MAX_FAILED_STARTS:
            self._give_up(f"{worker.last_words} (after {worker.num_starts} starts)", 1)
        elif self._tasks is not None:
            how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
            words = f": {worker.last_words}" if code > 0 else ""
            self._display.note(
                f"{worker.name} (pid {pid}) ended by {how}{words}; starting it again"
            )
            self._tasks.create_task(self._restart(worker, delay_s))

    async def _restart(self, worker: Worker, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        if worker.spec.id in self._options.environments:
            await self._ensure_mps()  # it may have died with it
        self._spawn(worker)

    async def _ensure_mps(self) -> None:
        """Processes that share a card work without it, slowly: worth a warning, no reason to end."""
        if self._options.mps is None:
            return
        try:
            async with self._mps_lock:
                await asyncio.to_thread(self._options.mps.ensure)
        except MpsError as exc:
            self._display.warn(f"processes share a GPU without MPS and take turns on it: {exc}")

    def _on_zygote_lost(self) -> None:
        self._zygote_lost = True
        for worker in self._workers.values():
            worker.state, worker.pid = WorkerState.ENDED, None
        self._by_pid.clear()
        self._changed.set()
        self._give_up("atoll: the warm parent of the workers died, and they with it", 1)

    def _give_up(self, sentence: str, code: int) -> None:
        """Stop everything for a reason that a restart cannot change; the first reason counts."""
        if not self._stopping and self._failure is None:
            self._failure, self._exit_code = sentence, code
        self._stop_wanted.set()

    def _on_signal(self) -> None:
        if self._stop_wanted.is_set() and self._options.part is not None:
            return  # Slurm repeats itself; it kills what takes too long
        if self._stop_wanted.is_set():
            for pid in self._by_pid:
                self._forker.kill(pid, signal.SIGKILL)
        else:
            self._display.settled()
            if self._options.part is None:
                self._display.note("stopping; once more to stop at once")
        self._stop_wanted.set()

    async def _until_silent(self) -> None:
        """Until nobody writes any more who had the zygote for a parent: the kernel kills them with it, in its time."""
        pipes = [worker.pipe for worker in self._workers.values() if worker.pipe is not None]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KILL_GRACE_S):
                await poll_until(lambda: not any(pipe.is_open for pipe in pipes))

    async def _stop(self) -> None:
        self._stopping = True
        if self._zygote_lost:
            await self._until_silent()
        part = self._options.part
        if part is None:
            await self._stop_in_order(STOP_ORDER, signal.SIGTERM)
            return
        if self._was_ready:
            await until_silent(part.upstream(self._config), within_s=part.stop_deadline_s)
        limits = dict.fromkeys(STOP_ORDER, part.stop_deadline_s)
        await self._stop_in_order(limits, STOP_SIGNALS[STOP_SIGNAL])

    async def _stop_in_order(self, limits: Mapping[Role, float], stop: signal.Signals) -> None:
        for role, limit_s in limits.items():
            for number, wait_s in ((stop, limit_s), (signal.SIGKILL, _KILL_GRACE_S)):
                if self._signal_role(role, number):
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(wait_s):
                            await self._until_gone(role)

    async def _until_gone(self, role: Role) -> None:
        await self._until(lambda worker: worker.role is not role or worker.pid is None)

    def _signal_role(self, role: Role, number: signal.Signals) -> int:
        pids = [pid for pid, worker in self._by_pid.items() if worker.role is role]
        for pid in pids:
            self._forker.kill(pid, number)
        return len(pids)

    async def _until(self, condition: Callable[[Worker], bool]) -> None:
        while not all(condition(worker) for worker in self._workers.values()):
            self._changed.clear()
            await self._changed.wait()

    def _progress(self) -> None:
        ready = Counter(w.role for w in self._workers.values() if w.state is WorkerState.READY)
        total = Counter(worker.role for worker in self._workers.values())
        self._display.progress("  ".join(f"{role} {ready[role]}/{total[role]}" for role in Role))

    def _write_cluster(self, config: ClusterConfig) -> None:
        write_atomically(self._run_dir.cluster_file, config.to_toml())

    def _write_ready_file(self) -> None:
        if self._options.ready_file is not None and self._url is not None:
            write_ready_file(self._options.ready_file, self._url, self._workers.values())


class _Stopped(Exception):  # noqa: N818
    """Ends the task group without being an error."""


def _allow_many_files() -> None:
    """Each worker costs the launcher a pipe and a router some sockets; children inherit the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
