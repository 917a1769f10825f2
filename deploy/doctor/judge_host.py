"""From the facts of one host to findings: its software, limits, ports, files, clock. Pure."""

import re
import shlex
from pathlib import Path

from deploy.doctor.facts import Clock, Host, Limits, Model, Port, Secret, Software, Ucx
from deploy.doctor.finding import Finding, failure, ok, warning
from deploy.doctor.need import Need

PYTHONS = ((3, 11), (3, 14))  # from, below: pyproject's requires-python, which a test compares
MIN_UCX = (1, 19)  # what ucxx 0.52 accepts
MIN_SECRET_NBYTES = 16
UNLIMITED = -1
_PIP = "pip install --constraint constraints.txt --editable ."
# a command line of the cluster's own: whatever else runs from a directory called atoll is none
_OURS = re.compile(r"(?:^|[ /])atoll (?:run|up|demo)\b| -m (?:services\.|deploy\.(?:cli|local)\b)")
_COMPILER = "apt-get install gcc python3-dev"
_SYSTEM_UCX = 'deploy/README.md, "A UCX with verbs"'
_MAX_CLOCK_ERROR_S = 1.0


def judge(host: Host, need: Need) -> list[Finding]:
    """Everything but GPUs, NICs and measured transfers, in the order in which it is repaired."""
    return [
        *software(host.software),
        *ucx(host.ucx, need, has_rdma=any(nic.rdma for nic in host.nics)),
        *limits(host.limits, need, has_rdma=any(nic.rdma for nic in host.nics)),
        *ports(host.ports, host.ephemeral_ports),
        clock(host.clock),
        secret(host.secret),
        *model(host.model),
    ]


def software(found: Software) -> list[Finding]:
    """Python, the packages, torch."""
    findings = []
    version = tuple(int(part) for part in found.python.split(".")[:2])
    if PYTHONS[0] <= version < PYTHONS[1]:
        findings.append(ok("python", found.python))
    else:
        low, high = (".".join(map(str, bound)) for bound in PYTHONS)
        text = f"{found.python}, needed is {low} or later and below {high}"
        findings.append(failure("python", text, f"python{low} -m venv .venv && .venv/bin/{_PIP}"))
    missing = [name for name, release in found.packages.items() if not release]
    if missing:
        findings.append(failure("packages", f"{', '.join(missing)} not installed", _PIP))
    else:
        named = " ".join(f"{name} {release}" for name, release in found.packages.items())
        findings.append(ok("packages", named))
    if found.torch_problem:
        findings.append(failure("torch", f"cannot be imported: {found.torch_problem}", _PIP))
    else:
        build = f"for CUDA {found.torch_cuda}" if found.torch_cuda else "a CPU build"
        findings.append(ok("torch", f"{found.packages.get('torch', '')}, {build}"))
    if not found.compiles:
        text = "no C compiler or no headers of Python: every message costs more of Python"
        findings.append(warning("compiler", text, _COMPILER))
    return findings


def ucx(found: Ucx, need: Need, *, has_rdma: bool) -> list[Finding]:
    """Which UCX is loaded and what it can use."""
    if found.problem:
        return [failure("ucx", f"cannot be loaded: {found.problem}", _PIP)]
    source = "the pip wheel" if found.is_wheel else "not the pip wheel"
    text = f"{found.version} of {found.library} ({source}): {' '.join(found.transports)}"
    if tuple(int(part) for part in found.version.split(".")[:2]) < MIN_UCX:
        wanted = ".".join(map(str, MIN_UCX))
        return [failure("ucx", f"{text}; {wanted} or later is needed", _SYSTEM_UCX)]
    if "tcp" not in found.transports:
        return [failure("ucx", f"{text}; no tcp, so no network device is up", "ip link set lo up")]
    findings = [ok("ucx", text)]
    if has_rdma and not found.has_ib_module:
        text = "this host has RDMA devices, and this UCX no verbs: links between hosts use tcp"
        make = warning if not need.leaves_host else failure
        findings.append(make("ucx verbs", text, _SYSTEM_UCX))
    elif has_rdma and not any(t.startswith(("rc", "dc", "ud")) for t in found.transports):
        text = "its verbs module finds no device that it can open"
        findings.append(failure("ucx verbs", text, "ls -l /dev/infiniband; ibv_devinfo"))
    elif has_rdma:
        findings.append(ok("ucx verbs", "the RDMA devices can be used"))
    if need.device == "cuda" and "cuda_ipc" not in found.transports:
        text = (
            "it cannot use the GPUs: no cuda_ipc, so bytes between cards would go through the host"
        )
        findings.append(failure("ucx cuda", text, f"nvidia-smi; else {_SYSTEM_UCX}"))
    return findings


def limits(found: Limits, need: Need, *, has_rdma: bool) -> list[Finding]:
    """Open files and locked memory."""
    wanted = need.num_fds
    text = f"{_number(found.nofile)} open files ({found.source}), {wanted} are needed"
    if found.nofile == UNLIMITED or found.nofile >= wanted:
        findings = [ok("fd limit", text)]
    elif found.nofile_hard == UNLIMITED or found.nofile_hard >= wanted:
        findings = [failure("fd limit", text, f"ulimit -n {wanted}")]
    else:
        fix = f"echo '* hard nofile {wanted}' >> /etc/security/limits.conf, then log in again"
        findings = [failure("fd limit", text, fix)]
    locked = f"{_size(found.memlock_nbytes)} may be locked ({found.source})"
    if found.memlock_nbytes == UNLIMITED or not has_rdma:
        note = "" if has_rdma else "; only RDMA needs more"
        findings.append(ok("memlock", locked + ("" if found.memlock_nbytes == UNLIMITED else note)))
    else:
        fix = "echo '* - memlock unlimited' >> /etc/security/limits.conf, then log in again"
        text = f"{locked}: memory for RDMA cannot be registered beyond that"
        findings.append(failure("memlock", text, fix))
    return findings


def ports(found: tuple[Port, ...], ephemeral: tuple[int, int]) -> list[Finding]:
    """What the cluster listens on: free, or in use by the cluster itself."""
    findings = []
    running = [port for port in found if not port.is_free and _OURS.search(port.holder)]
    for port in found:
        if port.is_free or port in running:
            continue
        name = f"port {port.port} of {port.process}"
        if port.problem:
            findings.append(failure("ports", f"{name}: {port.problem}", "ip address show"))
            continue
        holder = f" by {port.holder}" if port.holder else ""
        fix = f"ss -ltnp 'sport = :{port.port}', then stop it or change the cluster TOML"
        findings.append(failure("ports", f"{name} is in use{holder}", fix))
    low, high = ephemeral
    inside = [p for p in found if low <= p.port <= high]
    if inside:
        text = (
            f"{', '.join(str(p.port) for p in inside)} lie in {low} to {high}, from which the kernel gives "
            "ports to outgoing connections"
        )
        reserved = ",".join(str(p.port) for p in inside)
        fix = f"sysctl -w net.ipv4.ip_local_reserved_ports={reserved}"
        findings.append(warning("ports", text, fix))
    if not findings:
        words = f"free: {' '.join(str(p.port) for p in found)}" if found else "none is fixed"
        if running:
            words = f"{len(running)} of {len(found)} are this cluster's own, which runs"
        findings.append(ok("ports", words))
    return findings


def clock(found: Clock) -> Finding:
    """Whether something keeps it right; how far apart two hosts are is judged elsewhere."""
    if found.is_synchronised is None:
        return ok("clock", "the kernel does not tell whether it is synchronised")
    if not found.is_synchronised:
        text = "not synchronised: times in logs and traces of hosts will not fit"
        return warning("clock", text, "timedatectl set-ntp true")
    if found.max_error_s > _MAX_CLOCK_ERROR_S:
        text = f"synchronised to {found.max_error_s:.1f} s only"
        return warning("clock", text, "chronyc makestep")
    return ok("clock", f"synchronised, within {found.max_error_s * 1e3:.0f} ms")


def secret(found: Secret | None) -> Finding:
    """There, long enough and nobody else's."""
    if found is None:
        return ok("secret", "made at each start")
    quoted = shlex.quote(found.path)
    make = f"(umask 077; openssl rand -hex 32 > {quoted}), the same on every host"
    if found.problem:
        fix = f"sudo atoll doctor, or chown to who runs it: {quoted}"
        if "denied" not in found.problem:
            fix = make
        return failure("secret", f"{found.path}: {found.problem}", fix)
    if found.mode & 0o077:
        text = f"{found.path} has mode {found.mode:04o}: others on this host can read or change it"
        return failure("secret", text, f"chmod 600 {quoted}")
    if found.nbytes < MIN_SECRET_NBYTES:
        text = f"{found.path} has {found.nbytes} bytes, at least {MIN_SECRET_NBYTES} are needed"
        return failure("secret", text, make)
    return ok("secret", f"{found.path}, mode {found.mode:04o}, {found.nbytes} bytes")


def model(found: Model) -> list[Finding]:
    """The checkpoint: complete, and with the bytes that it should have."""
    if found.problem:
        fix = f"copy the checkpoint to {shlex.quote(found.path)} again"
        return [failure("checkpoint", found.problem, fix)]
    if found.wrong:
        text = f"{', '.join(found.wrong)} of {found.path} differ from {found.reference}"
        return [failure("checkpoint", text, f"copy {found.wrong[0]} again")]
    size = f"{found.path}: {_size(found.nbytes)}"
    if not found.reference:
        directory = shlex.quote(found.path)
        fix = f"(cd {directory} && sha256sum *.safetensors > SHA256SUMS), where it is known to be right"
        return [warning("checkpoint", f"{size}, complete, and no hashes to hold it against", fix)]
    if found.unhashed:
        text = f"{size}, complete; {len(found.unhashed)} files were not hashed, which takes longer"
        return [warning("checkpoint", text, "atoll doctor --full")]
    return [ok("checkpoint", f"{size}, every hash as in {Path(found.reference).name}")]


def _number(value: int) -> str:
    return "unlimited" if value == UNLIMITED else str(value)


def _size(nbytes: int) -> str:
    if nbytes == UNLIMITED:
        return "unlimited memory"
    for unit, scale in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << scale:
            return f"{nbytes / (1 << scale):.4g} {unit}"
    return f"{nbytes} bytes"
