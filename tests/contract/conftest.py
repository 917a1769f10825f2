"""The networks that contract tests run over: in memory, and UCX by its compiled port and by UCXX's Python API."""

import pytest

from common.transport.device import open_context
from tests.contract.harness import DEVICE, DeviceUcxNet, InprocNet, UcxNet


@pytest.fixture(params=["inproc", "ucx", "ucxx"])
def form(request, monkeypatch):
    """Which transport, and which port under it."""
    if request.param == "ucxx":
        monkeypatch.setattr("common.transport.port._compiled", None)
    return request.param


@pytest.fixture
def net(form, tmp_path):
    return (InprocNet if form == "inproc" else UcxNet)(tmp_path)


@pytest.fixture
def ucx(tmp_path):
    return UcxNet(tmp_path)


@pytest.fixture
def shared(tmp_path):
    """Of processes that share a device: the CPU, where rows are copied, unless ATOLL_TEST_DEVICE names another."""
    net = DeviceUcxNet(tmp_path)
    net.device = DEVICE
    open_context(net.device)
    return net
