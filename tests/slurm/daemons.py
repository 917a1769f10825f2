"""A real Slurm of four nodes on this machine: munged, slurmctld and four slurmd, in a network namespace of their own.

Everything needed is installed here; nothing is left of a run.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.machine import ROOT, install, sh, wait_for

TOOLS = {
    "slurmctld": "slurm-wlm",
    "srun": "slurm-wlm",
    "munged": "munge",
    "ip": "iproute2",
    "nsenter": "util-linux",
}
NODES = ("n1", "n2", "n3", "n4")
KILL_WAIT_S = 60  # between the SIGTERM and the SIGKILL of scancel
NAMESPACE = "atoll-slurm"
ADDRESS = "10.78.0.1"  # of every node
_INSIDE = (
    "nsenter",
    f"--net=/run/netns/{NAMESPACE}",
)  # `ip netns exec` would hide the cgroups, too
_READY_S = 30.0
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort=6817
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={directory}/munge.sock,cred_expire=15
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdTimeout=60
KillWait={kill_wait_s}
SlurmdParameters=config_overrides
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=2 RealMemory=4000 State=UNKNOWN\n"
_PARTITION = "PartitionName=all Nodes=n[1-4] Default=YES MaxTime=60 State=UP\n"


class Slurm:
    """The running daemons and the environment of a user of them; use as a context manager."""

    def __init__(self, directory: Path, temporary: Path) -> None:
        self.directory = directory
        own = {"SLURM_CONF": str(directory / "slurm.conf"), "TMPDIR": str(temporary)}
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.environment = {**inherited, **own}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Slurm":
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def try_sh(self, script: str, where: Path, *, online: bool = False) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of what a user types in a directory; `online` reaches other networks instead."""
        done = subprocess.run(
            [*(() if online else _INSIDE), "bash", "-c", script],
            cwd=where, env=self.environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    def sh(self, script: str, where: Path, *, online: bool = False) -> str:
        """Output of what a user types in a directory, which must succeed."""
        code, out, err = self.try_sh(script, where, online=online)
        assert code == 0, f"{script}: {code}\n{out}{err}"
        return out

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        shown = self.sh(f"scontrol --oneliner show job {job_id}", self.directory)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_for_state(self, job_id: str, *states: str, limit_s: float = 120.0) -> dict[str, str]:
        """Until a job is in one of the states and its nodes are free of it; what Slurm then knows."""
        wait_for(
            f"job {job_id} {' or '.join(states)}",
            lambda: self.job(job_id)["JobState"] in states,
            limit_s,
        )
        return self.job(job_id)

    def _start(self) -> None:
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.directory / name).mkdir()
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        values = {"directory": self.directory, "kill_wait_s": KILL_WAIT_S, "address": ADDRESS}
        text = _CONFIG.format(host=host, **values)
        for i, name in enumerate(NODES):
            text += _NODE.format(name=name, host=host, port=7101 + i, address=ADDRESS)
        (self.directory / "slurm.conf").write_text(text + _PARTITION)
        files = {"key": "munge.key", "socket": "munge.sock", "pid": "munge.pid"}
        munge = [f"--{k}-file={self.directory / v}" for k, v in files.items() if k != "socket"]
        munge += [f"--log-file={self.directory}/munge.log", f"--seed-file={self.directory}/seed"]
        self._run("munged", "--foreground", "--force", f"--socket={self.directory}/munge.sock", *munge)  # fmt: skip
        wait_for("munge", (self.directory / "munge.sock").exists, _READY_S)
        self._run("slurmctld", "-D", "-f", self.directory / "slurm.conf")
        for name in NODES:
            self._run("slurmd", "-D", "-f", self.directory / "slurm.conf", "-N", name)

        def idle() -> bool:
            code, out, _ = self.try_sh("sinfo --noheader --Node --format=%T", self.directory)
            return code == 0 and out.split() == ["idle"] * len(NODES)

        wait_for("four idle nodes", idle, _READY_S)

    def _run(self, *command: str | Path) -> None:
        with (self.directory / "daemons.log").open("ab") as log:
            daemon = subprocess.Popen(
                [*_INSIDE, *map(str, command)],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._daemons.append(daemon)

    def _stop(self) -> None:
        self.try_sh("scancel --full --signal=KILL --user=root; scancel --user=root", self.directory)
        with contextlib.suppress(AssertionError):
            wait_for("the end of the jobs", lambda: not self._jobs(), 20)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(10)

    def _jobs(self) -> str:
        return self.try_sh("squeue --noheader", self.directory)[1].strip()


@contextlib.contextmanager
def four_nodes() -> Iterator[Slurm]:
    """The daemons and a directory of their own; nothing is left of them or of what ran under them."""
    install(TOOLS)
    directory = ROOT / "build" / "slurm" / f"run-{os.getpid()}"
    directory.mkdir(parents=True)
    temporary = Path(
        tempfile.mkdtemp(prefix="atoll-slurm-")
    )  # a short path: Unix sockets lie there
    sh("ip", "netns", "add", NAMESPACE)
    try:
        _set_up_network()
        with Slurm(directory, temporary) as slurm:
            try:
                yield slurm
            except BaseException:
                _show_logs(directory)
                raise
        wait_for("the end of every process", lambda: not processes_of(temporary), 20)
        left = [path for path in temporary.rglob("*") if path.name != ".lock"]
        assert left in ([], [temporary / f"atoll-{os.getuid()}"]), left
    finally:
        for pid in processes_of(temporary):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        sh("ip", "netns", "delete", NAMESPACE)
        shutil.rmtree(directory)
        shutil.rmtree(temporary)


def _set_up_network() -> None:
    """A loopback and, since Slurm resolves no name where there is no other address, a cable from here to here."""
    sh("ip", "-n", NAMESPACE, *["link", "add", "eth0", "type", "veth", "peer", "name", "eth1"])
    sh("ip", "-n", NAMESPACE, "addr", "add", f"{ADDRESS}/24", "dev", "eth0")
    for device in ("lo", "eth0", "eth1"):
        sh("ip", "-n", NAMESPACE, "link", "set", device, "up")


def processes_of(temporary: Path) -> list[int]:
    """Every process of a run: all have its directory for temporary files in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (
                entry.name.isdecimal()
                and f"TMPDIR={temporary}\0".encode() in (entry / "environ").read_bytes()
            ):
                found.append(int(entry.name))
    return found


def _show_logs(directory: Path) -> None:
    for path in [
        *directory.glob("*.log"),
        *directory.glob("*/atoll-*.log"),
        *directory.rglob("logs/*"),
    ]:
        if path.is_file() and ".venv" not in path.parts:
            print(f"== {path}\n{path.read_text(errors='replace')[-3000:]}")
