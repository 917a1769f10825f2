"""What really carries a link: told by every transport, warned of when it is the wrong thing."""

import logging

import pytest

from common.transport.carriers import (
    LinkClass,
    classes_of,
    complaint,
    expected_class,
    has_rdma_devices,
    loaded_library,
)
from common.transport.ucx import UcxTransport
from tests.contract.harness import LIMITS, ROUTER, SECRET, Peer, hello, run


def test_open_data_links_say_what_carries_them(net):
    async def main():
        listener, dialler = net.transport(), net.transport()
        there, here = Peer(), Peer()
        address = await listener.listen(net.address(), ROUTER, there)
        link = await dialler.connect(address, hello(index=4), here, timeout_s=5)
        await dialler.connect(address, hello(index=5, data=False), here, timeout_s=5)
        await there.until(lambda: len(there.links) == 2)
        assert list(dialler.carriers()) == ["router-0"]
        assert list(listener.carriers()) == ["expert-4"]  # the control-only link has none
        (carrier,) = listener.carriers()["expert-4"]
        assert carrier in ("tcp/lo", "inproc")
        link.close("done")
        assert dialler.carriers() == {}

    run(net, main)


@pytest.mark.parametrize("expected", [LinkClass.TCP, LinkClass.RDMA])
def test_a_link_on_the_wrong_transport_is_a_warning(ucx, caplog, expected):
    caplog.set_level(logging.INFO)

    async def main():
        listener = UcxTransport(SECRET, link_limits=LIMITS, expected_class=lambda *_: expected)
        dialler = ucx.transport()
        there = Peer()
        address = await listener.listen(ucx.address(), ROUTER, there)
        await dialler.connect(address, hello(index=4), Peer(), timeout_s=5)
        await there.until(lambda: bool(there.links))
        await listener.close()

    run(ucx, main)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any("is carried by tcp/lo" in r.getMessage() for r in caplog.records)
    wrong = [text for text in warnings if "it uses tcp/lo, expected is rdma" in text]
    assert len(wrong) == (expected is LinkClass.RDMA)


def test_classes_by_transport():
    assert classes_of(["rc_mlx5/mlx5_0:1", "cuda_copy/cuda"]) == {LinkClass.RDMA}
    assert classes_of(["sysv/memory", "cma/memory", "tcp/lo"]) == {LinkClass.SHM, LinkClass.TCP}
    assert classes_of(["cuda_ipc/cuda", "self/memory"]) == {LinkClass.CUDA_IPC, LinkClass.SELF}


@pytest.mark.parametrize(
    ("same_host", "device", "has_rdma", "expected"),
    [
        (True, "cpu", True, LinkClass.TCP),
        (True, "cuda", False, LinkClass.CUDA_IPC),
        (False, "cuda", True, LinkClass.RDMA),
        (False, "cpu", False, LinkClass.TCP),
    ],
)
def test_what_a_link_should_use(same_host, device, has_rdma, expected):
    assert expected_class(same_host=same_host, device=device, has_rdma=has_rdma) is expected


def test_complaints():
    assert "expected is rdma" in complaint(["tcp/eth0"], LinkClass.RDMA)
    assert "expected is cuda_ipc" in complaint(["tcp/lo", "cuda_copy/cuda"], LinkClass.CUDA_IPC)
    assert complaint(["sysv/memory"], LinkClass.TCP) == ""  # faster than asked for
    assert complaint(["self/memory"], LinkClass.TCP) != ""
    assert complaint([], LinkClass.RDMA) == ""  # an old UCX that does not tell


def test_rdma_devices_are_those_with_an_active_port(tmp_path):
    state = tmp_path / "mlx5_0/ports/1/state"
    state.parent.mkdir(parents=True)
    state.write_text("1: DOWN\n")
    assert not has_rdma_devices(tmp_path)
    state.write_text("4: ACTIVE\n")
    assert has_rdma_devices(tmp_path)


def test_loaded_library_is_found_by_name(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 0 0:1 1 \n7f02-7f03 r-xp 0 0:1 2   /opt/my ucx/lib/libucp.so.0.0.0\n"
    )
    assert str(loaded_library("libucp", maps)) == "/opt/my ucx/lib/libucp.so.0.0.0"
    assert loaded_library("libuct", maps) is None
