"""A routing trace: which experts the gate chose for each token, layer by layer. Pure.

`common.routing_trace_file` reads and writes it as npz: `expert_ids` int16 [layers, tokens, top_k], `layer_index` int16
[layers] (model layer indices), and the gate's shape `num_experts`, `num_groups`, `top_k_groups` (0-d integers).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError

Ids = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """`expert_ids[i, t]` are the experts of token t in layer `layers[i]`, without repetition.

    `num_groups` above 1: the gate first chooses `top_k_groups` of that many equal runs of experts.
    """

    expert_ids: Ids
    layers: tuple[int, ...]
    num_experts: int
    num_groups: int = 1
    top_k_groups: int = 1

    def __post_init__(self) -> None:
        """Raises ConfigError when shapes or ids cannot be a gate's."""
        ids = self.expert_ids
        if ids.ndim != 3 or 0 in ids.shape:
            raise ConfigError(f"a trace needs [layers, tokens, top_k] expert ids, not {ids.shape}")
        if ids.shape[0] != len(self.layers) or len(set(self.layers)) < len(self.layers):
            raise ConfigError(
                f"{ids.shape[0]} layers of expert ids, layer_index names {self.layers}"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= self.num_experts:
            raise ConfigError(f"expert ids outside 0..{self.num_experts - 1}")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ConfigError(
                f"{self.num_experts} experts do not divide into {self.num_groups} groups"
            )
        ordered = np.sort(ids, axis=2)
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise ConfigError("a token of the trace has the same expert twice in a layer")

    def __repr__(self) -> str:
        layers, tokens, top_k = self.expert_ids.shape
        groups = f", {self.top_k_groups} of {self.num_groups} groups" if self.num_groups > 1 else ""
        return f"<RoutingTrace [{layers} layers | {tokens} tokens | top-{top_k} of {self.num_experts}{groups}]>"

    @property
    def num_tokens(self) -> int:
        """Tokens recorded."""
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return int(self.expert_ids.shape[2])

    @property
    def loads(self) -> Floats:
        """Rows of each expert per token: [layers, experts]; every layer sums to top_k."""
        counts = [
            np.bincount(layer.ravel(), minlength=self.num_experts) for layer in self.expert_ids
        ]
        return np.stack(counts) / self.num_tokens

    def tokens(self, start: int, stop: int) -> "RoutingTrace":
        """The trace of some consecutive tokens."""
        return RoutingTrace(
            self.expert_ids[:, start:stop], self.layers, self.num_experts, self.num_groups, self.top_k_groups
        )  # fmt: skip

    def sliced(self, slices: int) -> "RoutingTrace":
        """The same choices where expert e is cut into experts e * slices and the next ones."""
        ids = self.expert_ids[..., None] * np.int16(slices) + np.arange(slices, dtype=np.int16)
        shape = (*self.expert_ids.shape[:2], self.top_k * slices)
        return RoutingTrace(
            ids.reshape(shape), self.layers, self.num_experts * slices, self.num_groups, self.top_k_groups
        )  # fmt: skip

    def halves(self) -> tuple["RoutingTrace", "RoutingTrace"]:
        """What plans are fitted on, and what they are scored on."""
        middle = self.num_tokens // 2
        return self.tokens(0, middle), self.tokens(middle, self.num_tokens)
