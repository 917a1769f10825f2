"""What a process's transport is made of, as far as the configuration decides it."""

from pathlib import Path

import pytest

from common.config import ClusterConfig, ModelSection, Node
from common.transport.factory import device_spin_us


@pytest.mark.parametrize(("cores", "patient"), [(13, True), (12, False), (2, False)])
def test_processes_poll_long_only_where_each_has_a_core(cores, patient):
    nodes = (Node(host="a", attention=2, experts=8), Node(host="b", attention=0, experts=3))
    config = ClusterConfig(model=ModelSection(path=Path("/m")), nodes=nodes)
    assert sum(config.nodes[p.node].host == "a" for p in config.processes()) == 12
    assert (device_spin_us(config, cores) > 1000) is patient
