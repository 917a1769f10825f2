"""What the doctor reads, from real faults where a test can make them, and from made-up /sys trees and drivers."""

import os
import resource
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.model.small import write_small_model
from deploy.doctor import collect, read_gpus, read_host, read_model
from deploy.doctor.facts import Nic

WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(tmp_path):
    directory = write_small_model(tmp_path / "model", num_experts=4)
    value = read_model.sha256(directory / WEIGHTS)
    (directory / "SHA256SUMS").write_text(f"{value}  {WEIGHTS}\n")
    return directory


def test_a_whole_checkpoint(checkpoint):
    found = read_model.model(checkpoint, full=False)
    assert (found.problem, found.wrong, found.unhashed) == ("", (), ())
    assert (found.reference, found.nbytes) == ("SHA256SUMS", (checkpoint / WEIGHTS).stat().st_size)


def test_one_changed_byte_is_a_wrong_hash(checkpoint):
    with (checkpoint / WEIGHTS).open("r+b") as file:
        file.seek(-7, os.SEEK_END)
        file.write(b"\x55")
    assert read_model.model(checkpoint, full=False).wrong == (WEIGHTS,)


def test_a_truncated_file_is_named(checkpoint):
    os.truncate(checkpoint / WEIGHTS, (checkpoint / WEIGHTS).stat().st_size - 100)
    assert "the file is truncated at" in read_model.model(checkpoint, full=False).problem


def test_a_missing_file_and_directory_are_named(checkpoint, tmp_path):
    (checkpoint / WEIGHTS).unlink()
    assert "there is neither" in read_model.model(checkpoint, full=False).problem
    assert "nowhere" in read_model.model(tmp_path / "nowhere", full=False).problem


def test_a_list_of_hashes_that_is_none(checkpoint):
    (checkpoint / "SHA256SUMS").write_text("123 model.safetensors\n")
    assert (
        "SHA256SUMS:1 is not a line of sha256sum"
        in read_model.model(checkpoint, full=False).problem
    )


def test_a_list_that_lacks_a_file_vouches_for_nothing(checkpoint):
    (checkpoint / "SHA256SUMS").write_text("")
    assert read_model.model(checkpoint, full=False).reference == ""


def test_a_large_checkpoint_is_hashed_on_demand(checkpoint, monkeypatch):
    monkeypatch.setattr(read_model, "BUDGET_NBYTES", 1000)
    (checkpoint / "SHA256SUMS").write_text(f"{'0' * 64}  {WEIGHTS}\n")
    assert read_model.model(checkpoint, full=False).unhashed == (WEIGHTS,)
    found = read_model.model(checkpoint, full=True)
    assert (found.unhashed, found.wrong) == ((), (WEIGHTS,))


@pytest.mark.parametrize("wrong", [False, True])
def test_hashes_of_the_hugging_face_cache(checkpoint, wrong):
    (checkpoint / "SHA256SUMS").unlink()
    value = "0" * 64 if wrong else read_model.sha256(checkpoint / WEIGHTS)
    (checkpoint / "blobs").mkdir()
    (checkpoint / WEIGHTS).rename(checkpoint / "blobs" / value)
    (checkpoint / WEIGHTS).symlink_to(f"blobs/{value}")
    found = read_model.model(checkpoint, full=False)
    assert (found.reference, found.wrong) == ("the hashes of its download", (WEIGHTS,) * wrong)


@pytest.mark.parametrize("wrong", [False, True])
def test_hashes_of_a_hugging_face_download(checkpoint, wrong):
    (checkpoint / "SHA256SUMS").unlink()
    value = "0" * 64 if wrong else read_model.sha256(checkpoint / WEIGHTS)
    metadata = checkpoint / f".cache/huggingface/download/{WEIGHTS}.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"4f2c\n{value}\n1732462460.5\n")
    found = read_model.model(checkpoint, full=False)
    assert (found.reference, found.wrong) == ("the hashes of its download", (WEIGHTS,) * wrong)


def test_a_taken_port_and_who_has_it():
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        (found,) = read_host.ports(((port, "router-0"),))
    assert not found.is_free
    own = Path("/proc/self/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    assert found.holder == own
    assert read_host.ports(((port, "router-0"),))[0].is_free


def test_secret_files(tmp_path):
    path = tmp_path / "secret"
    assert read_host.secret(path, "salt").problem == "No such file or directory"
    path.write_text("abc\n")
    path.chmod(0o644)
    found = read_host.secret(path, "salt")
    assert (found.mode, found.nbytes) == (0o644, 3)
    assert found.digest == read_host.secret(path, "salt").digest
    assert found.digest != read_host.secret(path, "other").digest
    path.write_text("abd\n")
    assert found.digest != read_host.secret(path, "salt").digest
    assert read_host.secret(None, "salt") is None


def test_limits_of_this_process(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        found = read_host.limits(tmp_path / "no unit")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (found.nofile, found.nofile_hard, found.source) == (200, hard, "this shell")


def test_limits_of_installed_units(tmp_path, monkeypatch):
    (tmp_path / "unit").write_text("")
    (tmp_path / "systemctl").write_text(
        "#!/bin/sh\necho LimitNOFILE=65536\necho LimitMEMLOCK=infinity\n"
    )
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = read_host.limits(tmp_path / "unit")
    assert (found.nofile, found.memlock_nbytes, found.source) == (65536, -1, "atoll's units")


def test_the_clock_of_this_kernel():
    assert read_host.clock().is_synchronised in (True, False)


def test_software_with_a_torch_that_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(read_host, "PACKAGES", ("torch", "no-such-package"))
    found = read_host.software()
    assert "libcudart.so.13: cannot open" in found.torch_problem
    assert (found.packages["no-such-package"], found.python) == ("", sys.version.split()[0])


def fake_sys(root):
    """eth0 with an RDMA port behind a switch, a veth, a device that is down, an RDMA port of no network device."""
    pci = root / "devices/pci0000:00/0000:00:01.0/0000:01:00.0"
    for path, text in {
        pci / "numa_node": "1",
        pci / "infiniband/mlx5_0/ports/1/state": "4: ACTIVE",
        pci / "infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)",
        pci / "net/eth0/operstate": "up",
        pci / "net/eth0/speed": "400000",
        root / "devices/virtual/net/veth0/operstate": "up",
        root / "devices/virtual/net/veth0/speed": "10000",
        root / "devices/virtual/net/eth9/operstate": "down",
        root / "devices/virtual/net/lo/operstate": "unknown",
        root / "devices/pci0000:40/0000:40:01.0/infiniband/ib7/ports/1/state": "1: DOWN",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (pci / "net/eth0/device").symlink_to(pci)
    (pci / "infiniband/mlx5_0/device").symlink_to(pci)
    other = root / "devices/pci0000:40/0000:40:01.0"
    (other / "infiniband/ib7/device").symlink_to(other)
    for kind, paths in (
        ("net", [pci / "net/eth0", *(root / "devices/virtual/net").glob("*")]),
        ("infiniband", [pci / "infiniband/mlx5_0", other / "infiniband/ib7"]),
    ):
        (root / "class" / kind).mkdir(parents=True)
        for path in paths:
            (root / "class" / kind / path.name).symlink_to(path)
    return pci, other


def test_network_devices_and_their_rdma_ports(tmp_path):
    pci, other = fake_sys(tmp_path)
    assert read_host.nics(tmp_path) == (
        Nic("eth0", "mlx5_0:1", True, 50.0, str(pci), 1),
        Nic("veth0", "", True, 1.25, "", -1),
        Nic("ib7", "ib7:1", False, 0.0, str(other), -1),
    )


class Nvml:
    """As much of pynvml as is asked: two H200 joined by NVLink, one of them half used."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_MEM, NVML_NVLINK_MAX_LINKS = 2, 18
    NVML_COMPUTEMODE_EXCLUSIVE_PROCESS, NVML_P2P_CAPS_INDEX_READ, NVML_P2P_CAPS_INDEX_NVLINK = (
        3,
        0,
        2,
    )
    peer_status = 0

    def __getattr__(self, name):
        answers = {
            "nvmlDeviceGetCount": 2,
            "nvmlSystemGetDriverVersion": "580.159.04",
            "nvmlSystemGetCudaDriverVersion": 13000,
            "nvmlDeviceGetName": "NVIDIA H200",
            "nvmlDeviceGetCudaComputeCapability": (9, 0),
            "nvmlDeviceGetMaxClockInfo": 3201,
            "nvmlDeviceGetMemoryBusWidth": 6144,
            "nvmlDeviceGetMaxPcieLinkGeneration": 5,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetNvLinkState": 1,
            "nvmlDeviceGetNvLinkVersion": 4,
            "nvmlDeviceGetP2PStatus": self.peer_status,
            "nvmlDeviceGetPciInfo": SimpleNamespace(domain=0, bus=0xFE, device=0),
            "nvmlInit": None, "nvmlShutdown": None,
        }  # fmt: skip
        if name == "nvmlDeviceGetHandleByIndex":
            return lambda index: index
        if name == "nvmlDeviceGetMemoryInfo":
            return lambda index: SimpleNamespace(total=141 << 30, used=(70 << 30) * index)
        if name not in answers:

            def unknown(*_):
                raise self.NVMLError("Not Supported")

            return unknown
        return lambda *_: answers[name]


def test_cards_and_their_peers(tmp_path):
    found = read_gpus.nvidia(tmp_path, Nvml())
    assert (found.driver, found.cuda, len(found.gpus)) == ("580.159.04", "13.0", 2)
    assert found.gpus[1].used_nbytes == 70 << 30
    assert not found.gpus[0].is_exclusive  # a card that does not tell
    assert round(found.gpus[0].memory_gb_per_s) == 4917
    assert round(found.gpus[0].pcie_gb_per_s) == 63
    (pair,) = found.pairs
    assert (pair.peer_access, pair.nvlink_gb_per_s) == ("ok", 450.0)


def test_cards_that_cannot_reach_each_other(tmp_path):
    nvml = Nvml()
    nvml.peer_status = 3
    (pair,) = read_gpus.nvidia(tmp_path, nvml).pairs
    assert (pair.peer_access, pair.nvlink_gb_per_s) == ("the topology does not support it", 0.0)


def test_no_driver(tmp_path):
    nvml = Nvml()
    nvml.nvmlInit = lambda: (_ for _ in ()).throw(Nvml.NVMLError("Driver Not Loaded"))
    assert read_gpus.nvidia(tmp_path, nvml).problem == "Driver Not Loaded"


def test_mps_runs_only_with_daemon_and_pipe(tmp_path):
    (tmp_path / "mps").mkdir()
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/comm").write_text("nvidia-cuda-mps-control\n"[:15] + "\n")
    ask = (tmp_path / "mps", tmp_path / "proc")
    assert not read_gpus._mps_is_running(*ask)
    (tmp_path / "mps/control").touch()
    assert read_gpus._mps_is_running(*ask)
    (tmp_path / "proc/7/comm").write_text("python\n")
    assert not read_gpus._mps_is_running(*ask)


def test_what_the_medium_gives_is_measured_quickly():
    started = time.monotonic()
    assert read_host.memory_gb_per_s() > 0.1
    assert collect.plain_socket_gb_per_s() > 0.01
    assert time.monotonic() - started < 30
