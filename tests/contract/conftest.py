"""The networks that every contract test runs over: in memory, and UCX by its compiled port and by UCXX's Python API."""

import pytest

from tests.contract.harness import InprocNet, UcxNet


@pytest.fixture(params=["inproc", "ucx", "ucxx"])
def net(request, tmp_path, monkeypatch):
    if request.param == "inproc":
        return InprocNet(tmp_path)
    if request.param == "ucxx":
        monkeypatch.setattr("common.transport.port._compiled", None)
    return UcxNet(tmp_path)


@pytest.fixture
def ucx(tmp_path):
    return UcxNet(tmp_path)
