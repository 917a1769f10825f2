"""What was read off a host, before anybody judges it. Pure: plain values that travel as JSON from host to host.

An empty `problem` means that the reading worked; otherwise it says in words why it did not.
"""

from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from common.errors import WireError
from common.transport.carriers import LinkClass


@dataclass(frozen=True)
class Software:
    """`packages`: name -> version, of those that a cluster's hosts must agree on; "" for one that is missing."""

    python: str
    packages: dict[str, str]
    torch_cuda: str = ""  # CUDA version that torch was built for, "" for a CPU build
    torch_sees_gpu: bool = False
    torch_problem: str = ""
    compiles: bool = True  # messages are posted by compiled code


@dataclass(frozen=True)
class Ucx:
    """The UCX that ucxx loads here. `resources`: "transport/device", all of them whatever UCX_TLS says."""

    library: str = ""
    version: str = ""
    is_wheel: bool = False
    has_ib_module: bool = False
    resources: tuple[str, ...] = ()
    problem: str = ""

    @property
    def transports(self) -> list[str]:
        """Names of its transports, sorted."""
        return sorted({resource.partition("/")[0] for resource in self.resources})


@dataclass(frozen=True)
class Gpu:
    """One card. `pci_path`: its place in sysfs, component by component, from the host bridge on."""

    index: int
    name: str
    capability: str  # "9.0"
    total_nbytes: int
    used_nbytes: int
    pci_path: str = ""
    numa_node: int = -1
    is_exclusive: bool = False  # compute mode: one process at a time
    memory_gb_per_s: float = 0.0  # by its memory clock and bus width
    pcie_gb_per_s: float = 0.0  # of its slot, one way


@dataclass(frozen=True)
class GpuPair:
    """Two cards. `nvlink_gb_per_s`: sum of the direct or switched NVLinks of one of them, 0 without."""

    first: int
    second: int
    peer_access: str  # NVML's word: "ok", "chipset not supported" ...
    nvlink_gb_per_s: float = 0.0


@dataclass(frozen=True)
class Nvidia:
    """The driver and its cards. No driver: `driver` is empty and nothing is there."""

    driver: str = ""
    cuda: str = ""  # highest CUDA that the driver runs
    gpus: tuple[Gpu, ...] = ()
    pairs: tuple[GpuPair, ...] = ()
    has_peermem: bool = False
    has_dmabuf: bool = False
    mps_control: str = ""  # path of nvidia-cuda-mps-control
    mps_is_running: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Nic:
    """A network device that is up; `rdma` is the name of its RDMA port ("mlx5_0:1"), "" without one."""

    name: str
    rdma: str = ""
    is_active: bool = True
    gb_per_s: float = 0.0  # bytes, not bits; 0 when the driver does not say
    pci_path: str = ""
    numa_node: int = -1


@dataclass(frozen=True)
class Limits:
    """Soft and hard limits; -1 is unlimited. `source`: whose limits these are."""

    nofile: int
    nofile_hard: int
    memlock_nbytes: int
    source: str


@dataclass(frozen=True)
class Port:
    """A port that the cluster will listen on. `holder`: the command line of the process that has it, if known."""

    port: int
    process: str
    is_free: bool
    holder: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Secret:
    """`digest` tells two secrets apart and nothing else; "" without a file."""

    path: str
    mode: int = 0
    nbytes: int = 0
    digest: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Model:
    """A checkpoint. `reference`: where the hashes that it was held against come from, "" when there are none.

    `wrong` are the files whose hash differs, `unhashed` those too large to hash without being asked to.
    """

    path: str
    nbytes: int = 0
    reference: str = ""
    wrong: tuple[str, ...] = ()
    unhashed: tuple[str, ...] = ()
    digest: str = ""  # of config, index and the headers of all tensors
    problem: str = ""


@dataclass(frozen=True)
class Transfer:
    """One measured class of link. `place`: which cards, NICs or hosts. `gb_per_s`: best round; 0 when it failed.

    `cpu_share`: of a core, the least that one of both ends got, which both want one whole.
    """

    link_class: LinkClass
    place: str = ""
    gb_per_s: float = 0.0
    latency_us: float = 0.0
    carriers: tuple[str, ...] = ()
    cpu_share: float = 1.0
    problem: str = ""


@dataclass(frozen=True)
class Clock:
    """`is_synchronised` None: the kernel does not say. `ephemeral`: first and last port the kernel gives out itself."""

    is_synchronised: bool | None
    max_error_s: float = 0.0


@dataclass(frozen=True)
class Host:
    """Everything about one host."""

    name: str
    software: Software
    ucx: Ucx
    nvidia: Nvidia
    nics: tuple[Nic, ...]
    limits: Limits
    ephemeral_ports: tuple[int, int]
    ports: tuple[Port, ...]
    clock: Clock
    secret: Secret | None
    model: Model
    installed_toml: str = ""  # digest of /etc/atoll/cluster.toml
    memory_gb_per_s: float = 0.0  # numpy copying host memory
    socket_gb_per_s: float = 0.0  # a plain TCP socket on loopback
    transfers: tuple[Transfer, ...] = ()


_HOST: TypeAdapter[Host] = TypeAdapter(Host)


def to_json(host: Host) -> str:
    """One line."""
    return _HOST.dump_json(host).decode()


def from_json(text: str) -> Host:
    """Raises WireError when it is not what another doctor of this version writes."""
    try:
        return _HOST.validate_json(text)
    except ValidationError as exc:
        where = ".".join(map(str, exc.errors()[0]["loc"]))
        raise WireError(f"not the facts of a host: {where} {exc.errors()[0]['msg']}") from exc
