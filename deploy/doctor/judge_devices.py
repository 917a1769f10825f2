"""From the facts of one host to findings: driver, cards, NICs, GPUDirect, and what the measured transfers say. Pure."""

from collections.abc import Iterable

from common.transport.carriers import LinkClass, classes_of
from deploy.doctor.facts import Gpu, Host, Nic, Nvidia, Software, Transfer
from deploy.doctor.finding import Finding, failure, ok, warning
from deploy.doctor.need import Need
from deploy.doctor.pci import Distance, distance

# the part of its reference that a transfer must reach. The wrong transport costs a factor of 10 to 500 (between two
# H200: 0.5 GB/s through tcp, 343 by cuda_ipc over NVLink, which is 0.76 of its 450), so that the line need not be fine
SHARE = {
    LinkClass.SELF: 0.1,  # of numpy copying memory
    LinkClass.SHM: 0.1,  # the same
    LinkClass.TCP: 0.25,  # of a plain socket; between hosts of the NIC
    LinkClass.CUDA_IPC: 0.4,  # of NVLink or PCIe one way; on one card of half its memory's rate
    LinkClass.RDMA: 0.6,  # of the port
}
SAME_CARD_SHARE = 0.05  # at 64 MiB much of the time is not copying
BROKEN_SHARE = 0.1  # of what it must reach: not slow but wrong
IDLE_SHARE = 0.8  # of a core: below it, it is not the link that is slow
_BUSY_NBYTES = 1 << 30


def judge(host: Host, need: Need) -> list[Finding]:
    """Cards, NICs, transfers."""
    return [
        *driver(host.nvidia, host.software, need),
        *cards(host.nvidia, need),
        *peers(host.nvidia, need),
        *mps(host.nvidia, need),
        *nics(host.nics, host.nvidia.gpus, need),
        *gpudirect(host, need),
        *(transfer(t, reference(t, host)) for t in host.transfers),
    ]


def driver(found: Nvidia, software: Software, need: Need) -> list[Finding]:
    """The driver, and a torch that fits it."""
    if need.device != "cuda" and not found.gpus:
        return [ok("driver", "no GPU here, and none asked for (device cpu)")]
    if not found.driver:
        text = (
            f"none answers{': ' + found.problem if found.problem else ''}; the cluster wants GPUs"
        )
        return [failure("driver", text, "apt-get install nvidia-driver-cuda, then nvidia-smi")]
    text = f"{found.driver}, for CUDA up to {found.cuda}"
    if need.device != "cuda" and software.torch_cuda:
        return [ok("driver", f"{text}; not used (device cpu)")]
    if not software.torch_cuda:
        fix = "pip install torch --index-url https://download.pytorch.org/whl/cu130"
        make = failure if need.device == "cuda" else warning
        return [make("driver", f"{text}; torch is a build without CUDA", fix)]
    if _version(software.torch_cuda)[0] > _version(found.cuda)[0]:
        text = f"{text}; torch is built for CUDA {software.torch_cuda}"
        return [failure("driver", text, "install a newer driver, or a torch for that CUDA")]
    if not software.torch_sees_gpu:
        fix = 'python -c "import torch; torch.cuda.init()"; echo $CUDA_VISIBLE_DEVICES'
        return [failure("driver", f"{text}; torch sees no GPU", fix)]
    return [ok("driver", text)]


def cards(found: Nvidia, need: Need) -> list[Finding]:
    """Enough of them, and nobody else on them."""
    if not found.driver:
        return []
    findings = []
    names = sorted({f"{gpu.name} (sm {gpu.capability})" for gpu in found.gpus})
    text = f"{len(found.gpus)}: {', '.join(names)}"
    if len(found.gpus) < need.gpus:
        text = f"{text}; the cluster TOML puts processes on {need.gpus} here"
        fix = f"set gpus = {len(found.gpus)} for this node in the cluster TOML"
        findings.append(failure("gpus", text, fix))
    else:
        findings.append(ok("gpus", text))
    if need.device != "cuda":
        return findings
    for gpu in found.gpus[: need.gpus]:
        if gpu.used_nbytes > _BUSY_NBYTES and not found.mps_is_running:
            used = f"GPU {gpu.index}: {gpu.used_nbytes / 2**30:.1f} GiB are in use"
            findings.append(warning("gpus", used, f"nvidia-smi -i {gpu.index}"))
    return findings


def peers(found: Nvidia, need: Need) -> list[Finding]:
    """Whether every card reaches every other."""
    if need.device != "cuda" or not found.pairs:
        return []
    findings = [
        failure(
            "peer access",
            f"GPU {pair.first} and {pair.second}: {pair.peer_access}",
            "nvidia-smi topo -p2p r; in a virtual machine pass the switch through; else turn ACS off in the BIOS",
        )
        for pair in found.pairs
        if pair.peer_access != "ok"
    ]
    if not findings:
        slowest = min(pair.nvlink_gb_per_s for pair in found.pairs)
        way = f"NVLink, {slowest:.0f} GB/s each way" if slowest else "PCIe"
        findings = [ok("peer access", f"all {len(found.pairs)} pairs, by {way}")]
    return findings


def mps(found: Nvidia, need: Need) -> list[Finding]:
    """Processes on one card take turns of milliseconds without it (130 to 150 us for each touch)."""
    if not need.shares_gpus:
        return []
    start = "systemctl start atoll-mps"
    if found.mps_is_running:
        return [ok("mps", "runs, for the processes that share a GPU")]
    if not found.mps_control:
        text = "processes share a GPU and nvidia-cuda-mps-control is not installed"
        return [failure("mps", text, "apt-get install nvidia-cuda-mps")]
    if need.starts_mps:
        return [ok("mps", "is installed; it starts and stops with the cluster")]
    if any(gpu.is_exclusive for gpu in found.gpus):
        text = "processes share a GPU whose compute mode allows one process, and MPS does not run"
        return [failure("mps", text, start)]
    text = "does not run, and processes share a GPU: each touch waits for its time slice"
    return [warning("mps", text, start)]


def nics(found: tuple[Nic, ...], gpus: tuple[Gpu, ...], need: Need) -> list[Finding]:
    """What is up, and how far each RDMA device is from its nearest card."""
    findings = []
    for nic in found:
        if nic.rdma and not nic.is_active:
            text = f"{nic.rdma} is not active"
            findings.append(warning("nic", text, f"ibstat {nic.rdma.partition(':')[0]}"))
            continue
        speed = f", {nic.gb_per_s * 8:.0f} Gbit/s" if nic.gb_per_s else ""
        name = f"{nic.name} ({nic.rdma})" if nic.rdma else nic.name
        findings.append(_near(nic, gpus, f"{name}{speed}", need))
    if not found:
        findings.append(failure("nic", "no network device is up", "ip link"))
    return findings


def _near(nic: Nic, gpus: tuple[Gpu, ...], text: str, need: Need) -> Finding:
    if not nic.rdma or not gpus:
        return ok("nic", text)
    known = [(far, gpu.index) for gpu in gpus if (far := _distance(nic, gpu)) is not None]
    if not known:
        return ok("nic", f"{text}, its distance to the GPUs is not known")
    nearest = min(far for far, _ in known)
    near = ", ".join(str(index) for far, index in known if far == nearest)
    text = f"{text}, {nearest.name} to GPU {near}"
    if nearest > Distance.PXB and need.device == "cuda" and need.leaves_host:
        fix = "nvidia-smi topo -m; choose the NIC behind the switch of the GPU"
        return warning("nic", f"{text}: GPUDirect passes the CPU", fix)
    return ok("nic", text)


def _distance(nic: Nic, gpu: Gpu) -> Distance | None:
    return distance(nic.pci_path, gpu.pci_path, same_numa=nic.numa_node == gpu.numa_node)


def gpudirect(host: Host, need: Need) -> list[Finding]:
    """Whether a NIC may read GPU memory."""
    found = host.nvidia
    has_rdma = any(nic.rdma and nic.is_active for nic in host.nics)
    if need.device != "cuda" or not need.leaves_host:
        return []
    if not has_rdma:
        fix = "no command: give the host an RDMA device; everything works over tcp, slower"
        return [warning("gpudirect", "no active RDMA device: rows pass host memory and tcp", fix)]
    ways = ["nvidia-peermem"] * found.has_peermem + ["dmabuf"] * found.has_dmabuf
    if ways:
        return [ok("gpudirect", f"by {' or '.join(ways)}")]
    text = "neither nvidia-peermem nor dmabuf: rows pass host memory on their way to the NIC"
    return [failure("gpudirect", text, "modprobe nvidia-peermem")]


def reference(measured: Transfer, host: Host) -> tuple[float, str]:
    """GB/s that the medium gives and what it is, (0, "") when nobody knows."""
    if measured.link_class in (LinkClass.SELF, LinkClass.SHM):
        return host.memory_gb_per_s, "copying memory"
    if measured.link_class is LinkClass.TCP:
        return host.socket_gb_per_s, "a plain socket"
    if measured.link_class is LinkClass.RDMA:
        rates = [nic.gb_per_s for nic in host.nics if nic.rdma == measured.place]
        return (rates[0], "the port") if rates else (0.0, "")
    gpus = host.nvidia.gpus
    if not gpus:
        return 0.0, ""
    if measured.place == "one card":
        return gpus[0].memory_gb_per_s / 2, "its memory, read and written"
    if host.nvidia.pairs and host.nvidia.pairs[0].nvlink_gb_per_s:
        return host.nvidia.pairs[0].nvlink_gb_per_s, "NVLink"
    return gpus[0].pcie_gb_per_s, "PCIe"


def transfer(measured: Transfer, against: tuple[float, str]) -> Finding:
    """A measured class, held against what the medium gives."""
    name = f"transfer {measured.link_class}"
    place = f" {measured.place}" if measured.place else ""
    fix = _fix_of(measured.link_class)
    if measured.problem:
        return failure(name, f"{measured.problem}{place and ' (' + place.strip() + ')'}", fix)
    text = f"{measured.gb_per_s:.3g} GB/s, {measured.latency_us:.0f} us one way,{place} by {_list(measured.carriers)}"
    if measured.carriers and measured.link_class not in classes_of(measured.carriers):
        return failure(name, f"{text}: not what was asked for", fix)
    medium, what = against
    if not medium:
        return ok(name, f"{text}; nothing to hold it against")
    share = SHARE[measured.link_class] if measured.place != "one card" else SAME_CARD_SHARE
    wanted = share * medium
    text = f"{text}; at least {wanted:.3g} of the {medium:.3g} of {what} is expected"
    if measured.gb_per_s >= wanted:
        return ok(name, text)
    if measured.cpu_share < IDLE_SHARE:
        text = f"{text}; but its processes got {measured.cpu_share:.0%} of a core"
        return warning(name, text, "atoll doctor again when the host is idle")
    return (failure if measured.gb_per_s < BROKEN_SHARE * wanted else warning)(name, text, fix)


def _fix_of(link_class: LinkClass) -> str:
    return {
        LinkClass.SELF: "atoll doctor again on an idle host; UCX_LOG_LEVEL=info shows why",
        LinkClass.SHM: "sysctl kernel.yama.ptrace_scope=1; df /dev/shm; UCX_LOG_LEVEL=info shows why",
        LinkClass.TCP: "ip -s link; UCX_LOG_LEVEL=info shows why",
        LinkClass.CUDA_IPC: "nvidia-smi topo -p2p r; UCX_LOG_LEVEL=info shows why",
        LinkClass.RDMA: "ib_write_bw, ibstat; UCX_LOG_LEVEL=info shows why",
    }[link_class]


def _list(words: Iterable[str]) -> str:
    return ", ".join(words) or "a UCX that does not tell"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
