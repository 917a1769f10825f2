"""Two hosts on one machine: Debian trees booted by systemd-nspawn, each in a network namespace, joined by one cable.

Everything needed is installed here; what can be used again (the Debian tree) stays under build/hosts, all else goes.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.machine import ROOT, install, sh, wait_for
from tests.systemd.readme import wheels_command

HOSTS_DIR = ROOT / "build" / "hosts"
ADDRESSES = {"atoll-a": "10.77.0.1", "atoll-b": "10.77.0.2"}
TOOLS = {
    "systemd-nspawn": "systemd-container",
    "debootstrap": "debootstrap",
    "ip": "iproute2",
    "nsenter": "util-linux",
}
# a machine as its operator gets it: what deploy/README.md asks for, and ssh between the hosts
PACKAGES = (
    "systemd,systemd-sysv,dbus,python3,python3-venv,git,openssh-server,iproute2,procps,hostname,"
    "curl,ca-certificates"
)
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PIP_NO_INDEX": "1",  # the hosts are on no other network
    "PIP_FIND_LINKS": "/wheels",
}  # fmt: skip
BOOT_S = 90.0


def debian_tree() -> Path:
    """A fresh Debian with PACKAGES, made once."""
    tree, made_of = HOSTS_DIR / "debian", HOSTS_DIR / "debian.packages"
    if not made_of.exists() or made_of.read_text() != PACKAGES:
        shutil.rmtree(tree, ignore_errors=True)
        made_of.unlink(missing_ok=True)
        HOSTS_DIR.mkdir(parents=True, exist_ok=True)
        sh("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", tree)
        shutil.rmtree(tree / "var/cache/apt/archives")
        made_of.write_text(PACKAGES)
    return tree


def download_wheels(directory: Path) -> None:
    """What deploy/README.md gives for hosts without internet; into directory/wheels."""
    clone = directory / "clone"
    sh("git", "clone", "-q", f"file://{ROOT}", clone)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    sh("sh", "-c", wheels_command(), cwd=clone, env={**os.environ, "PATH": path})
    (clone / "wheels").rename(directory / "wheels")
    shutil.rmtree(clone)


@contextlib.contextmanager
def network() -> Iterator[None]:
    """A network namespace per host and a cable between them."""
    a, b = ADDRESSES
    try:
        for name in ADDRESSES:
            sh("ip", "netns", "add", name)
        sh("ip", *f"link add eth0 netns {a} type veth peer name eth0 netns {b}".split())
        for name, address in ADDRESSES.items():
            sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                sh("ip", "-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in ADDRESSES:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


class Host:
    """A booted machine; use as a context manager."""

    def __init__(self, name: str, tree: Path, directory: Path) -> None:
        self.name = name
        self.address = ADDRESSES[name]
        self.directory = directory / name
        self.root = self.directory / "root"
        self._tree = tree
        self._wheels = directory / "wheels"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def __enter__(self) -> "Host":
        upper, work = self.directory / "upper", self.directory / "work"
        for path in (upper, work, self.root):
            path.mkdir(parents=True)
        layers = f"lowerdir={self._tree},upperdir={upper},workdir={work}"
        sh("mount", "-t", "overlay", f"atoll-{self.name}", "-o", layers, self.root)
        (self.root / "etc/hostname").write_text(f"{self.name}\n")
        (self.root / "etc/machine-id").write_text("")
        sh("git", "clone", "-q", f"file://{ROOT}", self.root / "root/atoll")
        with (self.directory / "console").open("wb") as console:
            self._nspawn = subprocess.Popen(
                [
                    "systemd-nspawn", "-q", "-D", self.root, f"--machine={self.name}", "--register=no", "--keep-unit",
                    f"--network-namespace-path=/run/netns/{self.name}", f"--bind-ro={self._wheels}:/wheels", "--boot",
                ],
                stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._wait_for_boot()
        return self

    def __exit__(self, *_: object) -> None:
        if self._nspawn is not None:
            self._nspawn.send_signal(signal.SIGTERM)  # halts the machine in order
            try:
                self._nspawn.wait(30)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait(10)
        sh("umount", self.root)
        shutil.rmtree(self.directory)

    def _wait_for_boot(self) -> None:
        assert self._nspawn is not None
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children")

        def booted() -> bool:
            console = (self.directory / "console").read_text(errors="replace")
            assert self._nspawn is not None
            assert self._nspawn.poll() is None, f"{self.name} did not boot:\n{console}"
            self._leader = int((children.read_text().split() or ["0"])[0])
            return bool(self._leader) and self.try_sh("systemctl is-system-running")[1] in (
                "running\n",
                "degraded\n",
            )

        wait_for(f"the boot of {self.name}", booted, BOOT_S)
        state = self.try_sh("systemctl is-system-running")[1].strip()
        assert state == "running", self.sh("systemctl --failed --no-legend")

    def try_sh(self, script: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of a shell command on this host, as root in its clone."""
        done = subprocess.run(
            ["nsenter", "-t", str(self._leader), "-a", "sh", "-c", f"cd /root/atoll && {script}"],
            capture_output=True, text=True, check=False, env=ENVIRONMENT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    def sh(self, script: str) -> str:
        """Output of a shell command on this host that must succeed."""
        code, out, err = self.try_sh(script)
        assert code == 0, f"{self.name}: {script}: {code}\n{out}{err}"
        return out

    def show(self, unit: str, key: str) -> str:
        """A property of a unit."""
        return self.sh(f"systemctl show --value -p {key} '{unit}'").strip()

    def journal(self, unit: str = "*") -> str:
        """What the Atoll units of this host wrote."""
        return self.sh(f"journalctl -q --no-pager -o short-monotonic -u 'atoll-{unit}'")

    def files(self) -> set[str]:
        """Every path on its disk, in /run and in /dev/shm, and every account."""
        found = self.sh(
            "find / /run /dev/shm -xdev -not -path '/root/atoll/*' -not -path '/proc/*' -print;"
            "cut -d: -f1 /etc/passwd /etc/group"
        )
        return set(found.splitlines())

    def processes(self) -> list[str]:
        """Command lines of the service user's processes."""
        return self.try_sh("ps -u atoll -o pid=,args=")[1].splitlines()


@contextlib.contextmanager
def two_hosts() -> Iterator[dict[str, Host]]:
    """Both hosts, booted and able to reach one another by ssh; nothing is left of them afterwards."""
    install(TOOLS)
    tree = debian_tree()
    directory = HOSTS_DIR / f"run-{os.getpid()}"
    directory.mkdir(parents=True)
    before = leftovers()
    try:
        download_wheels(directory)
        with contextlib.ExitStack() as stack:
            stack.enter_context(network())
            hosts = {name: stack.enter_context(Host(name, tree, directory)) for name in ADDRESSES}
            _trust_one_another(list(hosts.values()))
            with _journals_on_failure(list(hosts.values())):
                yield hosts
    finally:
        shutil.rmtree(directory)
    assert leftovers() == before, f"left behind: {leftovers() - before}"


@contextlib.contextmanager
def _journals_on_failure(hosts: list[Host]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for host in hosts:
            print(host.try_sh("systemctl list-units --plain --no-legend 'atoll*'")[1])
            print(host.try_sh("journalctl -q --no-pager -n 60 -u 'atoll*' | cut -c1-300")[1])
        raise


def leftovers() -> set[str]:
    """What a run could leave on this machine: mounts, namespaces, processes of the hosts, interfaces."""
    mounts = {
        line.split()[1]
        for line in Path("/proc/mounts").read_text().splitlines()
        if "hosts/run-" in line
    }
    names = set(sh("ip", "netns", "list").split())
    links = {link["ifname"] for link in json.loads(sh("ip", "-j", "link"))}
    processes = {
        line for line in sh("ps", "-eo", "args").splitlines() if "--machine=atoll-" in line
    }
    return mounts | names | links | processes


def _trust_one_another(hosts: list[Host]) -> None:
    keys = []
    for host in hosts:
        host.sh(
            "mkdir -m 700 -p /root/.ssh && ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519"
        )
        keys.append(host.sh("cat /root/.ssh/id_ed25519.pub"))
    for host in hosts:
        (host.root / "root/.ssh/authorized_keys").write_text("".join(keys))
        host.sh("echo 'StrictHostKeyChecking accept-new' >/root/.ssh/config")
