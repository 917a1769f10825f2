"""The networks that contract tests run over: in memory, and UCX by its compiled port and by UCXX's Python API."""

import ctypes
import shutil
import subprocess

import pytest

from common.transport import port
from common.transport.carriers import loaded_library
from common.transport.device import open_context
from common.transport.neighbour import Neighbour
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


REACH = """
#include <stdint.h>
int ucp_rkey_ptr(void *key, uint64_t address, void **here) { *here = (void *)(uintptr_t)address; return 0; }
"""


@pytest.fixture(scope="module")
def reaching(tmp_path_factory):
    """UCX, but memory of this process is in reach."""
    from ucxx._lib import libucxx  # which loads it

    del libucxx
    real = loaded_library("libucp")
    assert port.is_compiled()
    assert shutil.which("cc") is not None
    assert real is not None
    folder = tmp_path_factory.mktemp("reach")
    source, library = folder / "reach.c", folder / "libreach.so"
    source.write_text(REACH)
    command = ["cc", "-shared", "-fPIC", "-Wl,--no-as-needed", str(source), str(real)]
    subprocess.run([*command, f"-Wl,-rpath,{real.parent}", "-o", str(library)], check=True)
    ctypes.CDLL(str(library))
    yield library
    port._compiled.use_library(str(real))


@pytest.fixture
def in_reach(reaching, tmp_path, monkeypatch):
    """Neighbours without a device: UCX does not let a process reach its own host memory as one, so a library in front
    of it says where that is, which for one process is where its owner has it.
    """
    monkeypatch.setattr(port, "loaded_library", lambda _: reaching)
    real = Neighbour._block

    def block(*args):
        found = real(*args)
        found.on_host = False  # as a device's is
        return found

    monkeypatch.setattr(Neighbour, "_block", block)
    return DeviceUcxNet(tmp_path)
