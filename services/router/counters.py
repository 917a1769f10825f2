"""What a router counts: messages, rows and bytes, per link to another node and direction, and operations per layer.

Unicast figures say what the same pairs would have cost with one row per (row, expert) pair each way and no sum at the
node: the common way, against which de-duplication and pre-reduction are measured.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from common.wire.blocks import DISPATCH_ROWS, EXPERT_OUT_ROWS, row_segment
from common.wire.header import Header, Kind, Landed


@dataclass(slots=True)
class LinkTraffic:
    """One direction of the link to one node: data messages with payload; bytes of payloads."""

    messages: int = 0
    rows: int = 0
    bytes: int = 0
    unicast_rows: int = 0
    unicast_bytes: int = 0


@dataclass(slots=True)
class Counters:
    """What a router did since it started; counts of messages, rows and bytes of data messages.

    `links[node]` is (out, in). `operations[layer]` counts messages received and posted about blocks of that layer.
    """

    blocks: int = 0
    relays: int = 0
    rows_to_experts: int = 0
    pairs_to_nodes: int = 0  # cross-node rows if every expert got its own copy
    rows_to_nodes: int = 0  # cross-node rows really sent
    messages_out: int = 0
    messages_in: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    rerouted: int = 0  # questions taken from a lost worker or node and put to a replica
    late: int = 0  # answers nobody waited for any more
    failed: int = 0
    split_us: int = 0
    combine_us: int = 0
    operations: dict[int, int] = field(default_factory=dict)
    links: dict[int, tuple[LinkTraffic, LinkTraffic]] = field(default_factory=dict)

    def received(self, header: Header | Landed) -> None:
        """A data message came in."""
        self.messages_in += 1
        self.bytes_in += header.payload_nbytes
        self.operations[header.layer] = self.operations.get(header.layer, 0) + 1

    def posted(self, header: Header) -> None:
        """A data message was handed to a link or kept for it."""
        self.messages_out += 1
        self.bytes_out += header.payload_nbytes
        self.operations[header.layer] = self.operations.get(header.layer, 0) + 1

    def asked(self, layer: int, num_messages: int, nbytes: int) -> None:
        """The same of many about one layer, with payloads of `nbytes` together."""
        self.messages_out += num_messages
        self.bytes_out += nbytes
        self.operations[layer] = self.operations.get(layer, 0) + num_messages

    def crossed(
        self, node: int, kind: Kind, about: Header, num_rows: int, num_pairs: int, nbytes: int, *, inward: bool,
    ) -> None:  # fmt: skip
        """A RELAY or PARTIAL of `num_rows` for `num_pairs` pairs of the block `about` crossed the link to `node`."""
        both = self.links.get(node)
        if both is None:
            both = self.links[node] = (LinkTraffic(), LinkTraffic())
        traffic = both[inward]
        traffic.messages += 1
        traffic.rows += num_rows
        traffic.bytes += nbytes
        traffic.unicast_rows += num_pairs
        row_types = DISPATCH_ROWS if kind is Kind.RELAY else EXPERT_OUT_ROWS
        traffic.unicast_bytes += row_segment(1, about.width, row_types[about.wire]).end * num_pairs
        if kind is Kind.RELAY and not inward:
            self.relays += 1
            self.rows_to_nodes += num_rows
            self.pairs_to_nodes += num_pairs

    def to_json(self) -> dict[str, Any]:
        """For a `status` frame; keys of nested tables are strings."""
        plain = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("operations", "links")
        }
        return plain | {
            "operations": {str(layer): count for layer, count in sorted(self.operations.items())},
            "links": {
                str(node): {"out": asdict(out), "in": asdict(into)}
                for node, (out, into) in sorted(self.links.items())
            },
        }
