"""What only several hosts together show: clocks, versions, secrets, checkpoints, links between hosts. Pure."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from common.transport.carriers import LinkClass
from deploy.doctor.facts import Host, Transfer
from deploy.doctor.finding import Finding, failure, ok, warning
from deploy.doctor.judge_devices import transfer

MAX_SKEW_S = (0.5, 30.0)  # a warning from the first on, a failure from the second
_AGREE = (
    ("versions", "software", "deploy/install.sh --cluster F of the same clone on every host"),
    ("secrets", "secret", "copy the secret file of one host to the others, mode 0600"),
    ("checkpoints", "checkpoint", "copy the checkpoint of one host to the others"),
    ("installed TOML", "toml", "deploy/install.sh --cluster F with the same F on every host"),
)


@dataclass(frozen=True, slots=True)
class Visit:
    """A host that was asked: its facts, or why there are none. `skew_s`: its clock minus ours when its answer came.

    `uncertainty_s`: how long that answer may have been under way.
    """

    name: str
    host: Host | None
    problem: str = ""
    fix: str = ""
    skew_s: float = 0.0
    uncertainty_s: float = 0.0


def judge(visits: list[Visit], between: list[Transfer]) -> list[Finding]:
    """`between`: measured from the first host to each other one."""
    findings = [
        failure("reached", f"{visit.name}: {visit.problem}", visit.fix)
        for visit in visits
        if visit.host is None
    ]
    hosts = [visit.host for visit in visits if visit.host is not None]
    if not findings:
        findings.append(ok("reached", f"all {len(hosts)} hosts"))
    if len(hosts) > 1:
        findings.append(_clocks([visit for visit in visits if visit.host is not None]))
        findings += [_agree(check, what, fix, hosts) for check, what, fix in _AGREE]
    findings += [transfer(measured, _reference(measured, hosts)) for measured in between]
    return findings


def _clocks(visits: list[Visit]) -> Finding:
    """The two that are furthest apart, less what the way of their answers may explain."""
    fast = max(visits, key=lambda visit: visit.skew_s)
    slow = min(visits, key=lambda visit: visit.skew_s)
    apart = fast.skew_s - slow.skew_s
    known = max(0.0, apart - fast.uncertainty_s - slow.uncertainty_s)
    text = f"{fast.name} and {slow.name} are {apart:.2f} s apart"
    fix = "timedatectl set-ntp true on both, then chronyc makestep"
    if known >= MAX_SKEW_S[1]:
        return failure("clock skew", text, fix)
    if known >= MAX_SKEW_S[0]:
        return warning("clock skew", text, fix)
    return ok("clock skew", f"at most {apart:.2f} s between two hosts")


def _agree(check: str, what: str, fix: str, hosts: list[Host]) -> Finding:
    groups: Mapping[str, list[str]] = defaultdict(list)
    for host in hosts:
        groups[_word(what, host)].append(host.name)
    if len(groups) == 1:
        return ok(check, "the same on every host")
    if what == "software":
        parts = [f"{' '.join(names)}: {word}" for word, names in groups.items()]
        return failure(check, "differ: " + "; ".join(parts), fix)
    parts = [" ".join(names) for names in groups.values()]
    return failure(check, "differ between " + " and ".join(parts), fix)


def _word(what: str, host: Host) -> str:
    if what == "software":
        found = host.software
        packages = " ".join(f"{name} {release}" for name, release in found.packages.items())
        return f"python {'.'.join(found.python.split('.')[:2])} {packages} ucx {host.ucx.version}"
    if what == "secret":
        return host.secret.digest if host.secret is not None else ""
    return host.model.digest if what == "checkpoint" else host.installed_toml


def _reference(measured: Transfer, hosts: list[Host]) -> tuple[float, str]:
    """The slowest NIC that could be in use: the fastest of each host."""
    rates = []
    for host in hosts:
        rdma = measured.link_class is LinkClass.RDMA
        own = [nic.gb_per_s for nic in host.nics if bool(nic.rdma) or not rdma]
        rates.append(max(own, default=0.0))
    slowest = min(rates, default=0.0)
    return (slowest, "the NIC") if slowest else (0.0, "")
