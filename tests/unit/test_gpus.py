"""Which card each process uses, in every rendering."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import ClusterConfig, ClusterSection, ModelSection, Node
from common.errors import ConfigError
from deploy.cli import main
from deploy.render import gpus

HERE = "local"


def cluster(*nodes, device="cuda", oversubscribe=True):
    section = ClusterSection(device=device, oversubscribe=oversubscribe)
    return ClusterConfig(ModelSection(Path("/srv/model")), nodes, section)


def cards(config, found=None):
    """Name -> card."""
    return {str(id_): card for id_, card in gpus.assign(config, found).items()}


def of(role, dealt):
    """Cards of one role by index."""
    return [card for name, card in dealt.items() if name.startswith(role)]


def test_a_card_for_each_worker_and_routers_beside_them():
    dealt = cards(cluster(Node(attention=2, experts=6, routers=3, gpus=8)))
    assert of("attention", dealt) == [0, 1]
    assert of("expert", dealt) == [2, 3, 4, 5, 6, 7]
    assert of("router", dealt) == [0, 1, 2]
    assert "gateway-0" not in dealt


def test_spare_cards_stay_free():
    dealt = cards(cluster(Node(attention=1, experts=1, routers=3, gpus=8)))
    assert (of("attention", dealt), of("expert", dealt)) == ([0], [1])
    assert of("router", dealt) == [0, 1, 0]


@pytest.mark.parametrize(
    ("attention", "experts", "num_cards", "attention_cards", "expert_cards"),
    [
        (1, 8, 2, [0], [1] * 8),
        (2, 16, 2, [0, 0], [1] * 16),
        (2, 6, 4, [0, 0], [1, 2, 3, 1, 2, 3]),
        (4, 4, 4, [0, 1, 0, 1], [2, 3, 2, 3]),
        (9, 1, 2, [0] * 9, [1]),
        (2, 3, 1, [0, 0], [0, 0, 0]),
        (0, 3, 2, [], [0, 1, 0]),
        (3, 0, 2, [0, 1, 0], []),
    ],
)
def test_too_few_cards_are_divided_between_the_roles(
    attention, experts, num_cards, attention_cards, expert_cards
):
    dealt = cards(cluster(Node(attention=attention, experts=experts, gpus=num_cards)))
    assert of("attention", dealt) == attention_cards
    assert of("expert", dealt) == expert_cards


@pytest.mark.parametrize(
    ("nodes", "found", "ranges"),
    [
        # what they need
        ([(1, 8), (1, 1)], 16, [range(9), range(9, 11)]),
        # a share of what there is, one at least
        ([(2, 0), (0, 6)], 4, [range(1), range(1, 4)]),
        ([(1, 8), (1, 8)], 2, [range(1), range(1, 2)]),
        # more nodes than cards
        ([(1, 2), (1, 2), (1, 2)], 2, [range(1), range(1, 2), range(1)]),
        ([(1, 2), (1, 2)], 0, [range(0), range(0)]),
    ],
)
def test_nodes_of_one_host_divide_the_cards_found(nodes, found, ranges):
    config = cluster(*(Node(attention=a, experts=e) for a, e in nodes))
    assert [list(r) for r in gpus.node_cards(config, {HERE: found})] == [list(r) for r in ranges]


def test_declared_cards_come_before_found_ones():
    config = cluster(Node(experts=1, gpus=2), Node(experts=1), Node(experts=1))
    assert gpus.node_cards(config, {HERE: 3}) == [range(2), range(2, 3), range(2, 3)]
    assert gpus.node_cards(config, {HERE: 4}) == [range(2), range(2, 3), range(3, 4)]


def test_hosts_count_from_zero():
    config = cluster(Node("a", experts=1, gpus=2), Node("b", experts=1, gpus=2))
    assert gpus.node_cards(config) == [range(2), range(2)]


def test_nothing_is_dealt_out_on_cpu_or_where_nobody_knows():
    assert cards(cluster(Node(experts=2, gpus=4), device="cpu")) == {}
    assert cards(cluster(Node(experts=2))) == {}


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 20), st.integers(1, 8), st.integers(0, 8)),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 64),
)
def test_every_process_has_a_card_that_exists(shapes, found):
    nodes = [Node(attention=a, experts=e, routers=r, gpus=g) for a, e, r, g in shapes]
    config = cluster(*nodes)
    declared = sum(node.gpus for node in nodes)
    found += declared
    dealt = gpus.assign(config, {HERE: found})
    users = [spec.id for spec in config.processes() if spec.id.role != "gateway"]
    assert set(dealt) == set(users)
    assert all(0 <= card < found for card in dealt.values())
    workers = {id_: card for id_, card in dealt.items() if id_.role != "router"}
    if all(node.gpus >= gpus.num_workers(node) for node in nodes):
        assert not gpus.shares_cards(workers)


@pytest.mark.parametrize(
    ("nodes", "found", "sentence"),
    [
        ([Node(experts=3, gpus=2)], 8, r"^nodes\[0\].gpus is 2 for 4 attention and expert workers; "
         r"sharing them needs cluster.oversubscribe = true \(atoll up --oversubscribe\)$"),
        ([Node(experts=3)], 3, "^4 attention and expert workers have 3 GPUs; sharing them needs"),
        ([Node(experts=3)], 0, "^no GPU was found on this host"),
        ([Node(experts=3, gpus=4)], 2, "^the nodes have 4 GPUs, this host has 2$"),
        ([Node(experts=1, gpus=2), Node(experts=1)], 2, "^nodes with gpus = 2 leave none"),
    ],
)  # fmt: skip
def test_too_few_cards_are_one_sentence(nodes, found, sentence):
    with pytest.raises(ConfigError, match=sentence):
        gpus.check_found(cluster(*nodes, oversubscribe=False), found)


def test_enough_cards_or_a_word_that_they_may_be_shared():
    gpus.check_found(cluster(Node(experts=3), oversubscribe=False), 4)
    gpus.check_found(cluster(Node(experts=3)), 1)
    gpus.check_found(cluster(Node(experts=3), device="cpu", oversubscribe=False), 0)
    gpus.check(cluster(Node(experts=3, gpus=1)))


@pytest.mark.parametrize("target", ["systemd", "slurm", "up"])
def test_every_rendering_names_file_line_and_key(target, tmp_path, capsys):
    path = tmp_path / "gpu.toml"
    (tmp_path / "model").mkdir()
    path.write_text(
        f'[cluster]\ndevice = "cuda"\nrun_dir = "{tmp_path}/run"\n[model]\npath = "{tmp_path}/model"\n'
        '[[nodes]]\nhost = "127.0.0.1"\nexperts = 3\ngpus = 2\n'
    )
    if target == "up":
        arguments = ["up"]
    else:
        arguments = ["render", target, "--out", str(tmp_path / "out")]
        path.write_text(path.read_text().replace(f"{tmp_path}/", "/srv/"))
    assert main([*arguments, "--cluster", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"atoll: {path}:9: nodes[0].gpus is 2 for 4 attention and expert")
    assert error.count("\n") == 1
