"""The two networks that every contract test runs over."""

import pytest

from tests.contract.harness import InprocNet, UcxNet


@pytest.fixture(params=[InprocNet, UcxNet], ids=["inproc", "ucx"])
def net(request, tmp_path):
    return request.param(tmp_path)


@pytest.fixture
def ucx(tmp_path):
    return UcxNet(tmp_path)
