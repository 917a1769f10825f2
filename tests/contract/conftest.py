"""The networks that every contract test runs over: in memory, and UCX by its compiled port and by UCXX's Python API."""

import pytest

from tests.contract.harness import InprocNet, UcxNet


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
