"""A cluster as systemd units: the same unit files on every host, and per host what it enables and sets.

    atoll.target, atoll-ROLE.target     the cluster's part on a host, and all processes of one role there
    atoll-gateway.service, atoll-{router,expert,attention}@.service, atoll-mps.service
    cluster.toml, tmpfiles.conf         the file every process reads (absolute paths); the run directory
    HOST/enable                         the units that this host runs
    HOST/env/ROLE-INDEX                 environment of each of its processes

`deploy/install.sh` puts them in place. Between the roles of a host the role targets give the order: a unit comes before
its own target and after the targets of the roles that start earlier, and systemd stops in the opposite order.
"""

from dataclasses import replace
from pathlib import Path
from string import Template

from common.config import ClusterConfig, ModelSection
from common.errors import ConfigError
from common.ids import Role
from deploy.render.description import START_ORDER, Description, Host, Process, describe

CONFIG_DIR = Path("/etc/atoll")
BIN_DIR = Path("/opt/atoll/current/bin")
CACHE_DIR = Path("/var/cache/atoll")
# what the units cannot see: ProtectHome, PrivateTmp
HIDDEN = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))
_UNITS = Path(__file__).parent / "units"
_CPU_DEVICES = "PrivateDevices=yes\nPrivateUsers=yes\nProcSubset=pid"
# the driver's and RDMA's devices; NVIDIA's user-space tools look at more of /proc than processes
_GPU_DEVICES = """\
DevicePolicy=closed
DeviceAllow=char-nvidia* rw
DeviceAllow=char-infiniband* rw
DeviceAllow=/dev/infiniband/rdma_cm rw"""


def render(config: ClusterConfig) -> dict[str, str]:
    """Relative path -> text. Raises ConfigError when processes could not see a file that they need."""
    config = _installed(config)
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
    """The cluster with the paths of an installed system where the TOML leaves them open."""
    cluster, model = config.cluster, config.model
    if cluster.secret_file is None:
        cluster = replace(cluster, secret_file=CONFIG_DIR / "secret")
    if model.cache_dir == ModelSection(model.path).cache_dir:
        model = replace(model, cache_dir=CACHE_DIR)
    for key, path in (
        ("model.path", model.path),
        ("cluster.secret_file", cluster.secret_file),
        ("gateway.api_key_file", config.gateway.api_key_file),
    ):
        if path is not None and any(path.is_relative_to(hidden) for hidden in HIDDEN):
            raise ConfigError(
                f"{key} is {path}, which a unit cannot see: nothing in {', '.join(map(str, HIDDEN))} can be used"
            )
    return replace(config, cluster=cluster, model=model)


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
        "device_lines": _GPU_DEVICES if config.cluster.device == "cuda" else _CPU_DEVICES,
        "groups": " ".join(groups),
    }
    files = {name: _fill(name, common) for name in ("atoll.target", "atoll-mps.service")}
    for position, role in enumerate(START_ORDER):
        values = _role_values(role, START_ORDER[:position]) | common
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
