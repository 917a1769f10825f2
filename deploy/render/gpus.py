"""Which card each process uses, the same in all renderings: a function of the nodes and the number of cards. Pure.

On a node attention workers have the first cards and experts the next, one each. Where they outnumber the cards
(`cluster.oversubscribe`), the cards are divided between the two roles by their counts and dealt out in turn within
each. Router r is beside the worker of the node's card r: routers always share, and so does whoever needs MPS.

Cards are numbered from 0 on each host. Nodes of one host have cards of their own, unless they outnumber the cards.
"""

from collections import Counter
from collections.abc import Mapping

from common.config import ClusterConfig, Node
from common.errors import ConfigError
from common.ids import ProcessId, Role
from deploy.render.error import UnrenderableError

SHARE_HOW = "sharing them needs cluster.oversubscribe = true (atoll up --oversubscribe)"


def assign(config: ClusterConfig, found: Mapping[str, int] | None = None) -> dict[ProcessId, int]:
    """The card of every process that uses one; nothing on CPU, and nothing for a node of unknown cards.

    `found`: cards of each host, for nodes whose `gpus` is 0.
    """
    cards = node_cards(config, found)
    result: dict[ProcessId, int] = {}
    for role in (Role.ROUTER, Role.EXPERT, Role.ATTENTION):
        position: Counter[int] = Counter()
        for spec in config.of_role(role):
            own = _cards_of_role(role, config.nodes[spec.node], cards[spec.node])
            if own:
                result[spec.id] = own[position[spec.node] % len(own)]
            position[spec.node] += 1
    return result


def node_cards(config: ClusterConfig, found: Mapping[str, int] | None = None) -> list[range]:
    """The cards of each node; an empty range on CPU and where nobody knows.

    Nodes that leave `gpus` open get what they need of the host's other cards, or a share in proportion.
    """
    result = [range(0)] * len(config.nodes)
    if config.cluster.device != "cuda":
        return result
    for host in dict.fromkeys(node.host for node in config.nodes):
        own = [i for i, node in enumerate(config.nodes) if node.host == host]
        open_nodes = [i for i in own if not config.nodes[i].gpus]
        declared = sum(config.nodes[i].gpus for i in own)
        rest = (found or {}).get(host, declared) - declared
        counts = dict(zip(open_nodes, _shares(rest, config, open_nodes), strict=True))
        first = 0
        for i in own:
            count = config.nodes[i].gpus or counts[i]
            result[i] = range(first, first + count)
            first += count
        if 0 < rest < len(open_nodes):
            for position, i in enumerate(open_nodes):
                card = declared + position % rest
                result[i] = range(card, card + 1)
    return result


def num_workers(node: Node) -> int:
    """Processes of a node that want a card of their own."""
    return node.attention + node.experts


def shares_cards(cards: Mapping[ProcessId, int]) -> bool:
    """Whether several of these processes, all of one host, use one card: then MPS is wanted."""
    return len(set(cards.values())) < len(cards)


def check(config: ClusterConfig) -> None:
    """Raises UnrenderableError for a node whose workers outnumber its `gpus` when nobody has allowed that."""
    if config.cluster.device != "cuda" or config.cluster.oversubscribe:
        return
    for i, node in enumerate(config.nodes):
        if node.gpus and num_workers(node) > node.gpus:
            raise UnrenderableError(
                f"nodes[{i}].gpus",
                f"is {node.gpus} for {num_workers(node)} attention and expert workers; {SHARE_HOW}",
            )


def check_found(config: ClusterConfig, num_found: int) -> None:
    """The same for a cluster whose nodes are all on one host of so many cards. Raises ConfigError."""
    check(config)
    if config.cluster.device != "cuda":
        return
    if num_found == 0:
        raise ConfigError("no GPU was found on this host (cluster.device is cuda)")
    declared = sum(node.gpus for node in config.nodes)
    if declared > num_found:
        raise ConfigError(f"the nodes have {declared} GPUs, this host has {num_found}")
    workers = sum(num_workers(node) for node in config.nodes if not node.gpus)
    rest = num_found - declared
    if workers and not rest:
        raise ConfigError(f"nodes with gpus = {declared} leave none of this host's to the others")
    if workers > rest and not config.cluster.oversubscribe:
        raise ConfigError(f"{workers} attention and expert workers have {rest} GPUs; {SHARE_HOW}")


def device_environment(card: str, mps_dir: str | None) -> dict[str, str]:
    """What binds a process to a card, named as CUDA_VISIBLE_DEVICES takes it, and to the MPS with its pipe there."""
    # the numbers of nvidia-smi
    environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": card}
    if mps_dir is not None:
        environment["CUDA_MPS_PIPE_DIRECTORY"] = mps_dir
    return environment


def _cards_of_role(role: Role, node: Node, cards: range) -> range:
    workers = num_workers(node)
    if role is Role.ROUTER:
        return cards[: max(1, workers)]
    split = node.attention
    if workers > len(cards):
        if not (node.attention and node.experts) or len(cards) == 1:
            return cards
        split = min(max(1, len(cards) * node.attention // workers), len(cards) - 1)
    return cards[:split] if role is Role.ATTENTION else cards[split:]


def _shares(rest: int, config: ClusterConfig, nodes: list[int]) -> list[int]:
    """How many of `rest` cards each node gets: one at least, then whoever lacks most; never more than it needs."""
    needs = [max(1, num_workers(config.nodes[i])) for i in nodes]
    if rest < len(nodes):
        return [0] * len(nodes)
    shares = [1] * len(nodes)
    for _ in range(min(rest, sum(needs)) - len(nodes)):
        lacking = max(range(len(nodes)), key=lambda k: (needs[k] / shares[k], -k))
        shares[lacking] += 1
    return shares
