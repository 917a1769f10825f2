"""`atoll plan`: a plan that the cluster of its TOML takes, and what discovery adds to a topology."""

from dataclasses import replace

import numpy as np
import pytest

from common.config import load, local_cluster
from common.model.hf_config import load_config
from common.placement.topology import cluster_topology
from common.plan_file import cluster_plan, read_plan
from common.routing_trace_file import pack_trace, read_trace
from deploy import cli
from deploy.discover import completed
from deploy.doctor.facts import GpuPair
from tests.demo_model import MODEL, REFERENCE
from tests.doctor_facts import gpu_host
from tests.routing_traces import zipf

TRACE = REFERENCE / "routing.npz"


@pytest.fixture
def cluster(tmp_path):
    """A cluster TOML of four nodes with five expert workers each."""

    def write(**placement):
        config = local_cluster(
            MODEL, ep=20, nodes=4, attention=4, experts_per_gpu=1, microbatches=1, wire="fp8", port=0,
            run_dir=tmp_path,
        )  # fmt: skip
        config = replace(config, placement=replace(config.placement, **placement))
        (tmp_path / "cluster.toml").write_text(config.to_toml())
        return tmp_path / "cluster.toml"

    return write


def plan(cluster, out, *more, trace=TRACE):
    return cli.main(
        ["plan", "--cluster", str(cluster), "--trace", str(trace), "--out", str(out), *map(str, more)]
    )  # fmt: skip


def test_the_cluster_takes_the_plan(cluster, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert plan(cluster(), out, "--replicas", 2, "--spares", 2) == 0
    told = capsys.readouterr().out
    assert "this optimiser  busiest link" in told
    assert "EPLB            busiest link" in told
    config = load(cluster(plan=out))
    model = load_config(MODEL)
    found = cluster_plan(config, model)
    assert len(found.spares) == 2
    assert all(sum(map(len, layer)) == 18 for layer in found.holders.values())
    groups_of_node = [
        {e // 4 for layer in [found.holders[1]] for e, w in enumerate(layer) if found.nodes[w[0]] == n}
        for n in range(4)
    ]  # fmt: skip
    assert sum(map(len, groups_of_node)) < 16, "it knows the model's groups, which the file lacks"
    assert plan(cluster(), tmp_path / "again.json", "--replicas", 2, "--spares", 2) == 0
    assert (tmp_path / "again.json").read_bytes() == out.read_bytes()


def test_a_previous_plan_is_kept_where_it_is_good(cluster, tmp_path):
    assert plan(cluster(), tmp_path / "one.json") == 0
    assert plan(cluster(), tmp_path / "two.json", "--previous", tmp_path / "one.json") == 0
    assert read_plan(tmp_path / "two.json").digest == read_plan(tmp_path / "one.json").digest


def test_slices_are_placed_as_experts(cluster, tmp_path):
    out = tmp_path / "plan.json"
    assert plan(cluster(expert_slices=2, experts_per_gpu=2), out) == 0
    found = read_plan(out)
    assert all(len(layer) == 32 for layer in found.holders.values())
    layer = found.holders[1]
    together = sum(
        found.nodes[layer[2 * e][0]] == found.nodes[layer[2 * e + 1][0]] for e in range(16)
    )
    assert together >= 12, "slices of one expert are always wanted together"


def test_a_sliced_trace_chooses_every_slice():
    trace = read_trace(TRACE)
    sliced = trace.sliced(3)
    assert sliced.num_experts == 3 * trace.num_experts
    assert sliced.top_k == 3 * trace.top_k
    chosen = np.sort(sliced.expert_ids[0, 7] // 3)
    assert (chosen == np.sort(trace.expert_ids[0, 7]).repeat(3)).all()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--replicas", 5), "16 experts and replicas at 1 of a layer per GPU and 0 spares need 21"),
        (("--spares", 5), "and 5 spares need 21 expert workers, the cluster has 20"),
        (("--replicas", -1), "replicas must be at least 0, not -1"),
        (("--strict",), "need 80 expert workers, the cluster has 20"),
    ],
)
def test_what_does_not_fit_is_one_sentence(cluster, tmp_path, capsys, more, sentence):
    assert plan(cluster(), tmp_path / "plan.json", *more) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert sentence.removeprefix("16 experts") in told
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("layers", "experts", "sentence"),
    [(range(3), 16, "its layers are not the 5 MoE layers"), (range(1, 6), 32, "it has 32 experts, the model 16")],
)  # fmt: skip
def test_a_trace_of_another_model_is_refused(cluster, tmp_path, capsys, layers, experts, sentence):
    other = tmp_path / "other.npz"
    trace = zipf(layers=layers, tokens=64, num_experts=experts, top_k=2, exponent=1.0, seed=0)
    other.write_bytes(pack_trace(trace))
    assert plan(cluster(), tmp_path / "plan.json", trace=other) == 2
    assert sentence in capsys.readouterr().err


def test_an_unreachable_host_is_named(cluster, tmp_path, capsys):
    path = cluster()
    path.write_text(path.read_text().replace('host = "local"', 'host = "node.invalid"'))
    assert plan(path, tmp_path / "plan.json", "--discover") == 1
    assert "--discover: node.invalid: " in capsys.readouterr().err


def discovered(host, **section):
    config = local_cluster(
        MODEL, ep=16, nodes=2, attention=2, experts_per_gpu=1, microbatches=1, wire="fp8", port=0,
        run_dir=MODEL, routers=2,
    )  # fmt: skip
    config = replace(
        config, cluster=replace(config.cluster, device="cuda"),
        nodes=tuple(replace(node, host="a", **section) for node in config.nodes),
    )  # fmt: skip
    return cluster_topology(completed(config, {"a": host}))


def test_discovery_fills_in_what_the_toml_leaves_open():
    topology = discovered(gpu_host())
    assert {node.gpu.name for node in topology.nodes} == {"H200"}
    assert {node.nic for node in topology.nodes} == {50e9}
    assert len({node.domain for node in topology.nodes}) == 1, "one host, NVLink among its cards"


def test_discovery_changes_nothing_that_the_toml_says():
    topology = discovered(gpu_host(), gpu="L40S", nic_gbit_s=100.0, nvlink_domain=3)
    assert {node.gpu.name for node in topology.nodes} == {"L40S"}
    assert {node.nic for node in topology.nodes} == {12.5e9}
    assert {node.domain for node in topology.nodes} == {-4}


def test_what_a_host_does_not_show_stays_open():
    host = gpu_host()
    nics = tuple(replace(nic, gb_per_s=0.0) for nic in host.nics)
    apart = tuple(GpuPair(p.first, p.second, "ok") for p in host.nvidia.pairs)
    cards = tuple(replace(card, name="NVIDIA T4") for card in host.nvidia.gpus)
    nvidia = replace(host.nvidia, gpus=cards, pairs=apart)
    topology = discovered(replace(host, nics=nics, nvidia=nvidia))
    assert {node.gpu.name for node in topology.nodes} == {"H100"}, "the default"
    assert {node.nic for node in topology.nodes} == {50e9}, "the default"
    assert len({node.domain for node in topology.nodes}) == 2


def test_a_bound_rail_has_the_speed_of_its_own_nic():
    host = gpu_host()
    nics = tuple(replace(n, gb_per_s=25.0) if n.rdma == "mlx5_1:1" else n for n in host.nics)
    host = replace(host, nics=nics)
    fast = discovered(host, rails=("mlx5_2:1", "mlx5_3:1"))
    slow = discovered(host, rails=("mlx5_0:1", "mlx5_1:1"))
    assert {node.nic for node in fast.nodes} == {50e9}
    assert {node.nic for node in slow.nodes} == {25e9}
