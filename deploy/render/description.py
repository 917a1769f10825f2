"""What every rendering of a cluster has in common: which process runs where, as what command, in which environment, in
which order it starts and stops, and for how long it is waited. Pure: the renderings only write it down.

Start order is that of `Role`; a host stops in the opposite order, so that what is in flight can finish. Processes on
other hosts need no order: whoever dials does so until there is an answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from common.config import LOCAL, ClusterConfig, ProcessSpec
from common.errors import ConfigError
from common.ids import ProcessId, Role
from common.service import STOP_DEADLINE_S
from common.transport.environment import set_ucx_environment
from deploy.render.gpus import assign, device_environment, shares_cards

START_ORDER = tuple(Role)
STOP_MARGIN_S = 2.0  # between the last thing a process does by itself and SIGKILL


@dataclass(frozen=True, slots=True)
class Process:
    """One process. `gpu` is the card's number on its host, None on CPU and for the gateway."""

    id: ProcessId
    node: int
    gpu: int | None
    environment: Mapping[str, str]

    def command(self, cluster_file: str) -> tuple[str, ...]:
        """What a supervisor executes; `atoll` is found as it likes."""
        index = str(self.id.index)
        return ("atoll", "run", str(self.id.role), "--cluster", cluster_file, "--index", index)


@dataclass(frozen=True, slots=True)
class Host:
    """One machine and its processes in start order. `shares_gpus`: several processes use one card, MPS is wanted."""

    name: str
    processes: tuple[Process, ...]
    shares_gpus: bool


@dataclass(frozen=True, slots=True)
class Description:
    """A cluster as its supervisors see it; hosts in order of their first node. Times in seconds.

    `start_deadline_s` until READY=1, `stop_deadline_s` from SIGTERM to SIGKILL, `watchdog_s` between signs of life.
    """

    hosts: tuple[Host, ...]
    start_deadline_s: float
    stop_deadline_s: float
    watchdog_s: float

    def host(self, name: str) -> Host:
        """One host. Raises ConfigError when the cluster has no such host."""
        for host in self.hosts:
            if host.name == name:
                return host
        names = ", ".join(host.name for host in self.hosts)
        raise ConfigError(f"the cluster has no host {name!r}, its hosts are {names}")


def describe(config: ClusterConfig) -> Description:
    """The whole cluster."""
    limits = config.limits
    return Description(
        hosts=tuple(_host(config, name) for name in dict.fromkeys(n.host for n in config.nodes)),
        start_deadline_s=limits.start_deadline_s,
        stop_deadline_s=limits.drain_deadline_s + STOP_DEADLINE_S + STOP_MARGIN_S,
        watchdog_s=limits.watchdog_s,
    )


def _host(config: ClusterConfig, name: str) -> Host:
    specs = [spec for spec in config.processes() if config.nodes[spec.node].host == name]
    assigned = assign(config)
    cards = {spec.id: assigned[spec.id] for spec in specs if spec.id in assigned}
    shares = shares_cards(cards)
    mps_dir = f"{config.cluster.run_dir}/mps" if shares else None
    processes = []
    for spec in specs:
        card = cards.get(spec.id)
        environment = environment_of(config, spec, None if card is None else str(card), mps_dir)
        processes.append(Process(spec.id, spec.node, card, environment))
    return Host(name, tuple(processes), shares)


def environment_of(
    config: ClusterConfig, spec: ProcessSpec, card: str | None, mps_dir: str | None
) -> dict[str, str]:
    """What a supervisor sets for a process, which leaves what is set as it is.

    `card` as CUDA_VISIBLE_DEVICES takes it, None for a process without one; `mps_dir` None without MPS.
    """
    local = all(node.host == LOCAL for node in config.nodes)
    environment = {"OMP_NUM_THREADS": "1"}
    if spec.id.role is not Role.GATEWAY:  # it has control links only
        set_ucx_environment(
            local=local,
            device=config.cluster.device,
            net_device=spec.net_device,
            environ=environment,
        )
    return environment if card is None else environment | device_environment(card, mps_dir)
