"""Seconds on each link as a linear function of rows between nodes. Pure.

A row of a token from node s that is needed on node d != s crosses the network twice: dispatched s -> d, and its
node's pre-reduced partial d -> s. Each way loads the sender's rail (out), the receiver's rail (in) and, between leaf
switches, both leaves' uplinks; inside an NVLink domain of several nodes it loads NVLink instead. Links inside a node
carry what its GPUs compute, which the placement's bound on GPU load already limits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.placement.topology import Topology

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RowBytes:
    """Bytes of one row on the wire: out to the experts' node, and back as the node's partial."""

    dispatch: int
    combine: int

    @classmethod
    def of(cls, width: int, wire: str) -> "RowBytes":
        """Rows of `width` elements on a wire: e4m3 with 1x128 fp32 scales, bf16, or fp32 with float64 partials."""
        if wire == "fp8":
            return cls(width + 4 * -(-width // 128), 2 * width)
        return cls(2 * width, 2 * width) if wire == "bf16" else cls(4 * width, 8 * width)


@dataclass(frozen=True, slots=True)
class Links:
    """`seconds[link, s, d]`: what one row from s needed on d costs on a link; `names[link]` says which it is."""

    names: tuple[str, ...]
    seconds: Floats
    sources: Floats  # [nodes]: share of the tokens that start on each

    def loads(self, rows: Floats) -> Floats:
        """Seconds on each link when `rows[s, d]` rows go from s to d."""
        return np.asarray(np.einsum("lsd,sd->l", self.seconds, rows))

    @property
    def per_touch(self) -> Floats:
        """[links, nodes]: seconds per token that is needed on a node, wherever it started."""
        return np.asarray(np.einsum("lsd,s->ld", self.seconds, self.sources))


def rail_between(node: int, peer: int, rails: int) -> int:
    """The rail that carries two nodes' traffic, the same number at both ends: each has a fixed subset of peers."""
    return (node + peer) % rails


def build_links(
    topology: Topology, row: RowBytes, rail: Callable[[int, int, int], int] = rail_between
) -> Links:
    """Every link that can carry a row, by (kind, place, direction)."""
    nodes = topology.nodes
    entries: dict[str, dict[tuple[int, int], float]] = {}

    def add(name: str, pair: tuple[int, int], seconds: float) -> None:
        link = entries.setdefault(name, {})
        link[pair] = link.get(pair, 0.0) + seconds

    for s in range(len(nodes)):
        for d in range(len(nodes)):
            if s == d:
                continue
            for sender, receiver, nbytes in ((s, d, row.dispatch), (d, s, row.combine)):
                for node, peer, way in ((sender, receiver, "out"), (receiver, sender, "in")):
                    spec = nodes[node]
                    if spec.domain == nodes[peer].domain:
                        add(
                            f"node {node} NVLink {way}",
                            (s, d),
                            nbytes / (spec.gpu.nvlink * spec.rails),
                        )
                        continue
                    index = rail(node, peer, spec.rails)
                    add(f"node {node} rail {index} {way}", (s, d), nbytes / spec.nic)
                    if topology.uplink and spec.leaf != nodes[peer].leaf:
                        add(f"leaf {spec.leaf} uplink {way}", (s, d), nbytes / topology.uplink)
    seconds = np.zeros((len(entries), len(nodes), len(nodes)))
    for i, link in enumerate(entries.values()):
        for (s, d), value in link.items():
            seconds[i, s, d] = value
    return Links(tuple(entries), seconds, np.asarray(topology.sources))
