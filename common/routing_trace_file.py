"""Routing traces on disk and over HTTP: npz with `expert_ids`, `layer_index` and the gate's shape."""

import io
import zipfile
from pathlib import Path

import numpy as np

from common.errors import ConfigError
from common.placement.routing_trace import RoutingTrace


def read_trace(path: Path, *, num_experts: int | None = None) -> RoutingTrace:
    """Raises ConfigError naming the file. `num_experts` is for files that do not say it (else: the largest id + 1)."""
    try:
        return parse_trace(path.read_bytes(), num_experts=num_experts)
    except OSError as exc:
        raise ConfigError(f"routing trace {path}: {exc.strerror}") from exc
    except ConfigError as exc:
        raise ConfigError(f"routing trace {path}: {exc}") from exc


def parse_trace(data: bytes, *, num_experts: int | None = None) -> RoutingTrace:
    """The bytes of an npz file. Raises ConfigError when they are none, or what is in it is no trace."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            ids, layers = arrays["expert_ids"], arrays["layer_index"]
            shape = {
                key: int(arrays[key])
                for key in ("num_experts", "num_groups", "top_k_groups")
                if key in arrays
            }
    except KeyError as exc:
        raise ConfigError(f"it has no {exc.args[0]}") from exc
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as exc:
        raise ConfigError(f"not an npz file: {exc}") from exc
    if not np.issubdtype(ids.dtype, np.integer):
        raise ConfigError(f"expert_ids must be integers, not {ids.dtype}")
    shape.setdefault("num_experts", num_experts or int(ids.max(initial=0)) + 1)
    return RoutingTrace(ids.astype(np.int16), tuple(int(layer) for layer in layers), **shape)


def pack_trace(trace: RoutingTrace) -> bytes:
    """What `parse_trace` reads back as an equal trace."""
    out = io.BytesIO()
    np.savez_compressed(
        out, expert_ids=trace.expert_ids, layer_index=np.array(trace.layers, np.int16),
        num_experts=trace.num_experts, num_groups=trace.num_groups, top_k_groups=trace.top_k_groups,
    )  # fmt: skip
    return out.getvalue()
