"""A cluster as systemd units: the same unit files on every host, and per host what it enables and sets.

    atoll.target, atoll-ROLE.target     the cluster's part on a host, and all processes of one role there
    atoll-gateway.service, atoll-{router,expert,attention}@.service, atoll-mps.service
    cluster.toml, tmpfiles.conf         the file every process reads (absolute paths); the run directory
    HOST/enable                         the units that this host runs
    HOST/env/ROLE-INDEX                 environment of each of its processes

`deploy/install.sh` puts them in place. Between the roles of a host the role targets give the order: a unit comes before
its own target and after the targets of the roles that start earlier, and systemd stops in the opposite order.
"""

import re
from dataclasses import replace
from pathlib import Path
from string import Template

from common.config import ClusterConfig, ModelSection
from common.ids import Role
from deploy.render import gpus
from deploy.render.description import START_ORDER, Description, Host, Process, describe
from deploy.render.error import UnrenderableError

CONFIG_DIR = Path("/etc/atoll")
BIN_DIR = Path("/opt/atoll/current/bin")
CACHE_DIR = Path("/var/cache/atoll")
DEMO_MODEL, INSTALLED_DEMO_MODEL = ("deploy", "demo", "model"), Path("/opt/atoll/demo-model")
# what the units cannot see: ProtectHome, PrivateTmp
HIDDEN = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))
_WORD = re.compile(r"[A-Za-z0-9_/][A-Za-z0-9_.:/-]*")
_UNITS = Path(__file__).parent / "units"
_CPU_DEVICES = "PrivateDevices=yes\nPrivateUsers=yes"
# the driver's and RDMA's devices
_GPU_DEVICES = """\
DevicePolicy=closed
DeviceAllow=char-nvidia* rw
DeviceAllow=char-infiniband* rw
DeviceAllow=/dev/infiniband/rdma_cm rw"""


def render(config: ClusterConfig) -> dict[str, str]:
    """Relative path -> text. Raises UnrenderableError."""
    config = _installed(config)
    _check(config)
    description = describe(config)
    files = {"cluster.toml": _toml(config), "tmpfiles.conf": _tmpfiles(config)}
    files |= _units(config, description)
    for host in description.hosts:
        files[f"{host.name}/enable"] = _enable(host)
        for process in host.processes:
            files[f"{host.name}/env/{_env_name(process)}"] = _environment(process)
    return files


def unit_of(process: Process) -> str:
    """The unit that runs a process."""
    return _unit_name(process.id.role, str(process.id.index))


def enabled_units(host: Host) -> list[str]:
    """What to enable on a host."""
    mps = ["atoll-mps.service"] if host.shares_gpus else []
    return ["atoll.target", *mps, *(unit_of(process) for process in host.processes)]


def _unit_name(role: Role, index: str = "") -> str:
    return "atoll-gateway.service" if role is Role.GATEWAY else f"atoll-{role}@{index}.service"


def _group(role: Role) -> str:
    return "atoll.target" if role is Role.GATEWAY else f"atoll-{role}.target"


def _env_name(process: Process) -> str:
    return f"{process.id.role}-{process.id.index}"


def _installed(config: ClusterConfig) -> ClusterConfig:
    """The cluster with the paths of an installed system: where the TOML leaves them open, and a clone's demo model."""
    cluster, model = config.cluster, config.model
    if cluster.secret_file is None:
        cluster = replace(cluster, secret_file=CONFIG_DIR / "secret")
    if model.cache_dir == ModelSection(model.path).cache_dir:
        model = replace(model, cache_dir=CACHE_DIR)
    if model.path.resolve().parts[-3:] == DEMO_MODEL:
        model = replace(model, path=INSTALLED_DEMO_MODEL)
    return replace(config, cluster=cluster, model=model)


def _check(config: ClusterConfig) -> None:
    files = {
        "model.path": config.model.path,
        "cluster.secret_file": config.cluster.secret_file,
        "gateway.api_key_file": config.gateway.api_key_file,
    }
    for key, path in files.items():
        if path is not None and any(path.is_relative_to(hidden) for hidden in HIDDEN):
            hidden = ", ".join(map(str, HIDDEN))
            raise UnrenderableError(key, f"is {path}, but units see nothing of {hidden}")
    words = {"cluster.name": config.cluster.name, "cluster.run_dir": str(config.cluster.run_dir)}
    words |= {f"nodes[{i}].host": node.host for i, node in enumerate(config.nodes)}
    for key, word in words.items():
        if not _WORD.fullmatch(word):
            raise UnrenderableError(
                key, f"is {word!r}, but a unit file takes letters, digits and _ . : / - only"
            )
    for i, node in enumerate(config.nodes):
        if config.cluster.device == "cuda" and not node.gpus:
            raise UnrenderableError(
                f"nodes[{i}].gpus", 'must say how many cards the node has, since device is "cuda"'
            )
    gpus.check(config)


def _units(config: ClusterConfig, description: Description) -> dict[str, str]:
    groups = [_group(role) for role in START_ORDER if role is not Role.GATEWAY]
    common = {
        "cluster": config.cluster.name,
        "run_dir": str(config.cluster.run_dir),
        "config_dir": str(CONFIG_DIR),
        "bin": str(BIN_DIR),
        "start_s": f"{description.start_deadline_s:g}",
        "stop_s": f"{description.stop_deadline_s:g}",
        "watchdog_s": f"{description.watchdog_s:g}",
        "groups": " ".join(groups),
    }
    devices = _GPU_DEVICES if config.cluster.device == "cuda" else _CPU_DEVICES
    files = {"atoll.target": _fill("atoll.target", common)}
    files["atoll-mps.service"] = _fill("atoll-mps.service", common | {"device_lines": _GPU_DEVICES})
    for position, role in enumerate(START_ORDER):
        values = _role_values(role, START_ORDER[:position]) | common
        values["device_lines"] = _CPU_DEVICES if role is Role.GATEWAY else devices
        files[_unit_name(role)] = _fill("role.service", values)
        if role is not Role.GATEWAY:
            files[_group(role)] = _fill("group.target", values)
    return files


def _role_values(role: Role, earlier: tuple[Role, ...]) -> dict[str, str]:
    index = "0" if role is Role.GATEWAY else "%i"
    command = (
        "atoll",
        "run",
        str(role),
        "--cluster",
        f"{CONFIG_DIR}/cluster.toml",
        "--index",
        index,
    )
    return {
        "role": str(role),
        "index": index,
        "instance_words": "" if role is Role.GATEWAY else " %i",
        "group": _group(role),
        "after": " ".join(_group(other) for other in earlier),
        "command": " ".join(command),
    }


def _fill(template: str, values: dict[str, str]) -> str:
    return Template((_UNITS / template).read_text()).substitute(values)


def _enable(host: Host) -> str:
    header = f"# Written by atoll render systemd: the units of {host.name}."
    return "\n".join([header, *enabled_units(host), ""])


def _environment(process: Process) -> str:
    lines = [f"{name}={value}" for name, value in sorted(process.environment.items())]
    return "\n".join([f"# Written by atoll render systemd for {process.id}.", *lines, ""])


def _toml(config: ClusterConfig) -> str:
    return f"# Written by atoll render systemd: every process of the cluster reads this.\n{config.to_toml()}"


def _tmpfiles(config: ClusterConfig) -> str:
    return f"# Written by atoll render systemd.\nd {config.cluster.run_dir} 0750 atoll atoll -\n"
