"""What a cluster asks of one of its hosts: computed from its description, judged against what the host has. Pure."""

from dataclasses import dataclass
from pathlib import Path

from common.config import LOCAL, ClusterConfig
from common.ids import Role
from deploy.render.description import describe

# descriptors of a process: 20 of its own (UCX's worker, epoll, log, sockets) and per link the control socket and up to
# two of UCX; counted with 64 experts on one router (147) and doubled
FDS_OF_PROCESS, FDS_PER_LINK = 64, 4


@dataclass(frozen=True, slots=True)
class Need:
    """`ports`: what each process of this host listens on. `gpus`: cards wanted, 0 on CPU.

    `num_links`: the most data links one of its processes holds. `secret` None: made at each start.
    `leaves_host`: data links to other hosts exist. `starts_mps`: whoever starts the cluster starts MPS, too.
    """

    device: str
    gpus: int
    shares_gpus: bool
    ports: tuple[tuple[int, str], ...]
    num_links: int
    leaves_host: bool
    model: Path
    secret: Path | None
    mps_dir: str
    starts_mps: bool = False

    @property
    def num_fds(self) -> int:
        """Open descriptors of the process with the most."""
        return FDS_OF_PROCESS + FDS_PER_LINK * self.num_links


def need_of(config: ClusterConfig, host_name: str, *, in_job: bool) -> Need:
    """`in_job`: inside a Slurm job, whose start chooses ports and makes the secret.

    Raises ConfigError when the cluster has no such host.
    """
    description = describe(config)
    host = description.host(host_name)
    own = {process.id for process in host.processes}
    ports = []
    for spec in config.processes():
        if spec.id not in own:
            continue
        if spec.address.startswith("tcp://"):
            ports.append((int(spec.address.rpartition(":")[2]), str(spec.id)))
        elif spec.id.role is Role.GATEWAY and config.gateway.port:
            ports.append((config.gateway.port, str(spec.id)))
    cards = {process.gpu for process in host.processes if process.gpu is not None}
    nodes = [node for node in config.nodes if node.host == host_name]
    wanted = max((card + 1 for card in cards), default=0)
    if config.cluster.device == "cuda" and not wanted:
        wanted = 1  # the TOML leaves open how many
    fullest = max(node.experts + node.attention for node in nodes)
    made_at_start = in_job or all(node.host == LOCAL for node in config.nodes)
    return Need(
        device=config.cluster.device,
        gpus=wanted,
        shares_gpus=wanted > 0,  # a router always shares
        ports=() if in_job else tuple(ports),
        num_links=fullest + sum(node.routers for node in config.nodes),
        leaves_host=len(description.hosts) > 1,
        model=config.model.path,
        secret=None if made_at_start and config.cluster.secret_file is None else config.secret_path,
        mps_dir=f"{config.cluster.run_dir}/mps",
        starts_mps=made_at_start,
    )
