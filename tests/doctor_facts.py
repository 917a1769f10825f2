"""A host with nothing wrong, as facts: once without GPUs, once as a node of eight H200 and eight NICs."""

from pathlib import Path

from common.transport.carriers import LinkClass
from deploy.doctor import facts
from deploy.doctor.need import Need
from deploy.doctor.read_host import PACKAGES

CPU_NEED = Need(
    device="cpu",
    gpus=0,
    shares_gpus=False,
    ports=((10000, "router-0"), (8000, "gateway-0")),
    num_links=16,
    leaves_host=True,
    model=Path("/srv/model"),
    secret=Path("/etc/atoll/secret"),
    mps_dir="/run/atoll/mps",
)
GPU_NEED = Need(
    device="cuda",
    gpus=8,
    shares_gpus=True,
    ports=CPU_NEED.ports,
    num_links=80,
    leaves_host=True,
    model=CPU_NEED.model,
    secret=CPU_NEED.secret,
    mps_dir=CPU_NEED.mps_dir,
)


def switch(number):
    """A root port and a switch behind it, four switches on each of two host bridges."""
    return f"/sys/devices/pci0000:{number // 4}0/0000:{number // 4}0:0{number % 4}.0/0000:{number}1:00.0"


def gpu(index):
    return facts.Gpu(
        index=index,
        name="NVIDIA H200",
        capability="9.0",
        total_nbytes=141 << 30,
        used_nbytes=1 << 20,
        pci_path=f"{switch(index)}/0000:{index}2:00.0/0000:{index}3:00.0",
        numa_node=index // 4,
        memory_gb_per_s=4800.0,
        pcie_gb_per_s=63.0,
    )


def nic(index):
    return facts.Nic(
        name=f"eth{index}",
        rdma=f"mlx5_{index}:1",
        is_active=True,
        gb_per_s=50.0,
        pci_path=f"{switch(index)}/0000:{index}2:01.0/0000:{index}4:00.0",
        numa_node=index // 4,
    )


def transfer(link_class, gb_per_s, carrier, place=""):
    return facts.Transfer(link_class, place, gb_per_s, 3.0, (carrier,))


def cpu_host():
    return facts.Host(
        name="a",
        software=facts.Software("3.11.7", dict.fromkeys(PACKAGES, "1.0")),
        ucx=facts.Ucx(
            library="/venv/site-packages/libucx/lib/libucp.so",
            version="1.21.0",
            is_wheel=True,
            resources=("self/memory", "tcp/eth0", "cma/memory", "sysv/memory"),
        ),
        nvidia=facts.Nvidia(problem="Driver Not Loaded"),
        nics=(facts.Nic("eth0", gb_per_s=1.25),),
        limits=facts.Limits(1024, 4096, 8 << 20, "this shell"),
        ephemeral_ports=(32768, 60999),
        ports=tuple(facts.Port(port, name, is_free=True) for port, name in CPU_NEED.ports),
        clock=facts.Clock(is_synchronised=True, max_error_s=0.01),
        secret=facts.Secret("/etc/atoll/secret", 0o600, 64, "5ec4e7"),
        model=facts.Model("/srv/model", 13 << 20, "SHA256SUMS", digest="d1"),
        installed_toml="7031",
        memory_gb_per_s=10.0,
        socket_gb_per_s=2.0,
        transfers=(
            transfer(LinkClass.SELF, 9.0, "self/memory"),
            transfer(LinkClass.SHM, 8.0, "sysv/memory"),
            transfer(LinkClass.TCP, 1.5, "tcp/lo"),
        ),
    )


def gpu_host():
    plain = vars(cpu_host())
    return facts.Host(
        **plain
        | {
            "software": facts.Software("3.12.3", dict.fromkeys(PACKAGES, "1.0"), "13.0", True),
            "ucx": facts.Ucx(
                library="/opt/ucx/lib/libucp.so.0",
                version="1.21.0",
                has_ib_module=True,
                resources=("self/memory", "tcp/eth0", "cuda_ipc/cuda", "rc_mlx5/mlx5_0:1"),
            ),
            "nvidia": facts.Nvidia(
                driver="580.159.04",
                cuda="13.0",
                gpus=tuple(gpu(i) for i in range(8)),
                pairs=tuple(
                    facts.GpuPair(i, j, "ok", 450.0) for i in range(8) for j in range(i + 1, 8)
                ),
                has_peermem=True,
                mps_control="/usr/bin/nvidia-cuda-mps-control",
                mps_is_running=True,
            ),
            "nics": tuple(nic(i) for i in range(8)),
            "limits": facts.Limits(65536, 65536, -1, "atoll's units"),
            "transfers": (
                *plain["transfers"],
                transfer(LinkClass.CUDA_IPC, 340.0, "cuda_ipc/cuda", "GPU 0 to 7"),
                *(transfer(LinkClass.RDMA, 45.0, "rc_mlx5/x", f"mlx5_{i}:1") for i in range(8)),
            ),
        }
    )
