"""What an expert worker computes next: everything that waits for the same layer, together. Pure.

The oldest layer goes first; within it, calls in the order of their arrival, up to `max_rows` (one call always fits,
however large). Results do not depend on this choice: every op is batch-invariant.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Waiting(Generic[T]):
    """One EXPERT_IN that waits: its number of rows, when it came, and whatever the caller needs to answer it."""

    num_rows: int
    since_ns: int
    item: T


class Batcher(Generic[T]):
    """Calls waiting, by layer, layers in the order in which their oldest call came."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._layers: OrderedDict[int, list[Waiting[T]]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Batcher [{len(self)} waiting | {len(self._layers)} layers]>"

    def __len__(self) -> int:
        return sum(map(len, self._layers.values()))

    def __bool__(self) -> bool:
        return bool(self._layers)

    def add(self, layer: int, call: Waiting[T]) -> None:
        """A call arrived."""
        self._layers.setdefault(layer, []).append(call)

    def next_batch(self) -> tuple[int, list[Waiting[T]]]:
        """The layer and calls to compute now. Raises IndexError when nothing waits."""
        if not self._layers:
            raise IndexError("nothing waits")
        layer, calls = self._layers.popitem(last=False)
        if len(calls) == 1:
            return layer, calls
        count, rows = 1, calls[0].num_rows
        while count < len(calls) and rows + calls[count].num_rows <= self.max_rows:
            rows += calls[count].num_rows
            count += 1
        batch, rest = calls[:count], calls[count:]
        if rest:
            self._layers[layer] = rest  # behind the other layers: nobody starves
        return layer, batch
