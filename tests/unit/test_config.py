"""The cluster TOML: what it means, and the sentence for each way to get it wrong."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import config as cluster_config
from common.config import (
    AttentionSection,
    ClusterConfig,
    ClusterSection,
    GatewaySection,
    LimitsSection,
    ModelSection,
    Node,
    PlacementSection,
    local_cluster,
)
from common.errors import ConfigError
from common.ids import Role
from common.transport.environment import set_ucx_environment

GOOD = """\
# a comment
[model]
path = "checkpoint"

[cluster]
wire = "fp32"

[[nodes]]
experts = 2

[[nodes]]
host = "local"
experts = 1
attention = 0
"""


def write(directory, text):
    path = directory / "cluster.toml"
    path.write_text(text)
    return path


def local(**changes):
    arguments = {
        "ep": 16,
        "nodes": 2,
        "attention": 2,
        "experts_per_gpu": 1,
        "microbatches": 2,
        "wire": "fp8",
        "port": 0,
        "run_dir": Path("/run/atoll"),
    }
    return local_cluster(Path("/model"), **{**arguments, **changes})


def test_processes_are_indexed_over_nodes_in_start_order(tmp_path):
    config = cluster_config.load(write(tmp_path, GOOD))
    assert [(str(p.id), p.node) for p in config.processes()] == [
        ("router-0", 0),
        ("router-1", 1),
        ("expert-0", 0),
        ("expert-1", 0),
        ("expert-2", 1),
        ("attention-0", 0),
        ("gateway-0", 0),
    ]
    assert config.process(Role.ROUTER, 1).address == "unix:/run/atoll/router-1.sock"
    assert config.routers_of(1)[0].id.index == 1
    with pytest.raises(ConfigError, match="no expert-3"):
        config.process(Role.EXPERT, 3)


def test_relative_paths_start_at_the_file(tmp_path):
    assert cluster_config.load(write(tmp_path, GOOD)).model.path == tmp_path / "checkpoint"


def test_routers_that_divide_blocks_are_as_many_on_every_node(tmp_path):
    text = GOOD.replace("[cluster]", '[placement]\nrouters_divide = "blocks"\n\n[cluster]')
    assert cluster_config.load(write(tmp_path, text)).routers_divide_blocks
    with pytest.raises(
        ConfigError, match=r"routers_divide blocks needs as many routers .* 2 and 1"
    ):
        cluster_config.load(
            write(tmp_path, text.replace("experts = 2", "experts = 2\nrouters = 2"))
        )


def test_every_rail_has_its_nic(tmp_path):
    text = GOOD.replace("experts = 2", 'experts = 2\nrouters = 2\nrails = ["mlx5_0:1", "mlx5_1:1"]')
    config = cluster_config.load(write(tmp_path, text))
    assert [(str(r.id), r.node, r.rail, r.net_device) for r in config.of_role(Role.ROUTER)] == [
        ("router-0", 0, 0, "mlx5_0:1"),
        ("router-1", 0, 1, "mlx5_1:1"),
        ("router-2", 1, 0, ""),
    ]
    environment = {"UCX_NET_DEVICES": "lo"}
    set_ucx_environment(local=True, net_device="mlx5_1:1", environ=environment)
    assert environment["UCX_NET_DEVICES"] == "mlx5_1:1"
    set_ucx_environment(local=True, environ=environment)
    assert environment["UCX_NET_DEVICES"] == "mlx5_1:1", "what is set already is left alone"


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("wire", "wier", ":6: cluster.wier is not a known key, did you mean 'wire'?"),
        ('"fp32"', '"fp16"', ":6: cluster.wire must be one of fp8, bf16, fp32, not 'fp16'"),
        ('"fp32"', "8", ":6: cluster.wire must be a string, not 8"),
        (
            '"fp32"',
            '"fp32"\ndevice = "cuda"',
            ":6: cluster.wire fp32, the exact mode, is computed on CPU",
        ),
        (
            "[[nodes]]\nexperts",
            "[attention]\ngate_bias_max = 0.1\n[[nodes]]\nexperts",
            ":9: attention.gate_bias_max changes which experts are chosen, and fp32, the exact mode, promises",
        ),
        ("[cluster]", "[clusters]", ":5: clusters is not a known key, did you mean 'cluster'?"),
        ("attention = 0", "attention = -1", ":14: nodes[1].attention must be 0 to 99, not -1"),
        ("attention = 0", "attention = true", ":14: nodes[1].attention must be a whole number"),
        ("attention = 0", "routers = 9", ":14: nodes[1].routers must be 1 to 8, not 9"),
        ("attention = 0", 'rails = ["a", "b"]', ":14: nodes[1].rails names 2 NICs for 1 routers"),
        ("attention = 0", 'rails = "a"', ":14: nodes[1].rails must be a list of strings, not 'a'"),
        ('path = "checkpoint"', 'path = ""', ":3: model.path must be a path, not ''"),
        ('path = "checkpoint"', "", ":2: model needs a key 'path'"),
        ('[model]\npath = "checkpoint"', "", ": a [model] table is needed"),
        ("[[nodes]]", "[[ nodes", "c"),
        ('"local"', '"two words"', ":12: nodes[1].host 'two words' is not a host name"),
        ('"local"', '"10.0.0.1"', ':12: nodes[1].host a cluster with "local" nodes cannot'),
    ],
)
def test_mistake_names_file_line_and_key(tmp_path, old, new, sentence):
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        cluster_config.load(path)
    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[model]\npath = "m"\n', "a [[nodes]] table is needed"),
        ('[model]\npath = "m"\n[nodes]\nhost = "a"\n', "nodes must be written as [[nodes]] tables"),
        ('nodes = []\n[model]\npath = "m"\n', "at least one [[nodes]] table is needed"),
        ('[model]\npath = "m"\n[[nodes]]\n', "at least one node needs experts"),
        ('[model]\npath = "m"\n[[nodes]]\nexperts = 1\nattention = 0\n', "an attention worker"),
        ('[[nodes]]\nexperts = 1\n[model]\npath = "~nobody-here/m"\n', "must be a path"),
        (
            '[model]\npath = "m"\n' + '[[nodes]]\nhost = "a"\nexperts = 1\nbase_port = 7600\n' * 2,
            "2 processes would listen on tcp://a:7600",
        ),
        (
            '[model]\npath = "m"\n[gateway]\nhost = "a"\nport = 10100\n[[nodes]]\nhost = "a"\nexperts = 1\n',
            "2 processes would listen on tcp://a:10100",
        ),
        (
            f'[model]\npath = "m"\n[cluster]\nrun_dir = "/{"x" * 100}"\n[[nodes]]\nexperts = 1\n',
            ":4: cluster.run_dir too long for a Unix socket",
        ),
    ],
)
def test_cluster_that_cannot_work(tmp_path, text, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        cluster_config.load(write(tmp_path, text))


def test_unreadable_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        cluster_config.load(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"latin\.toml"):
        cluster_config.load(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("changes", "attention", "experts"),
    [
        ({}, [1, 1], [8, 8]),
        ({"ep": 5, "nodes": 3, "attention": 1}, [1, 0, 0], [2, 2, 1]),
        ({"ep": 1, "nodes": 2, "attention": 3}, [2, 1], [1, 0]),
    ],
)
def test_local_cluster_spreads_workers(changes, attention, experts):
    config = local(**changes)
    assert [node.attention for node in config.nodes] == attention
    assert [node.experts for node in config.nodes] == experts


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ep": 0}, "needs experts"),
        ({"attention": 0}, "needs an attention worker"),
        ({"nodes": 0}, "at least 1 node"),
        ({"microbatches": 9}, "attention.microbatches must be 1 to 8"),
        ({"port": 65536}, "gateway.port must be 0 to 65535"),
        ({"wire": "fp4"}, "cluster.wire must be one of"),
        ({"ep": -1}, "must be 0 to 4096"),
        ({"gate_bias_max": -0.1}, "attention.gate_bias_max must be 0.0 to 1.0"),
        ({"gate_bias_max": 0.1, "wire": "fp32"}, "attention.gate_bias_max changes which experts"),
    ],
)
def test_local_cluster_checks_its_values(changes, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        local(**changes)


PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).map(
    lambda text: Path("/") / text.lstrip("/")
)
FREE = {
    str: st.text(st.characters(exclude_categories=["Cs"])),
    Path: PATHS,
    bool: st.booleans(),
}


def sections(kind, **fixed):
    """Any legal instance of a section: the ranges and choices are read from its own fields."""
    values = {}
    for f in fields(kind):
        if f.name in fixed:
            values[f.name] = fixed[f.name]
        elif "choices" in f.metadata:
            values[f.name] = st.sampled_from(f.metadata["choices"])
        elif "range" in f.metadata:
            low, high = f.metadata["range"]
            number = st.floats if isinstance(f.default, float) else st.integers
            values[f.name] = number(low, high)
        else:
            kind_of = bool if f.type is bool else Path if "Path" in str(f.type) else str
            values[f.name] = FREE[kind_of]
    return st.builds(kind, **values)


NICS = st.lists(FREE[str].filter(bool), max_size=8).map(tuple)
SHORT = st.just(Path("/run/atoll"))
CONFIGS = st.builds(
    ClusterConfig,
    model=sections(ModelSection),
    nodes=st.lists(
        sections(
            Node, host=st.just("local"), experts=st.integers(1, 9), attention=st.just(1), rails=NICS
        ).map(lambda node: replace(node, routers=len(node.rails) or node.routers)),
        min_size=1,
        max_size=3,
    ).map(tuple),
    cluster=sections(ClusterSection, run_dir=SHORT, secret_file=st.none() | PATHS),
    placement=sections(PlacementSection),
    attention=sections(AttentionSection),
    gateway=sections(GatewaySection, host=st.just("::1"), api_key_file=st.none() | PATHS),
    limits=sections(LimitsSection),
).filter(
    lambda config: (
        (
            config.cluster.wire != "fp32"
            or (config.cluster.device == "cpu" and not config.attention.gate_bias_max)
        )
        and not (config.routers_divide_blocks and len({n.routers for n in config.nodes}) > 1)
    )
)


@given(config=CONFIGS)
def test_toml_round_trip(config, tmp_path_factory):
    path = write(tmp_path_factory.getbasetemp(), config.to_toml())
    assert cluster_config.load(path) == config
