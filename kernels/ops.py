"""The one place that chooses a kernel: Triton where the tensors are on a GPU, the torch reference elsewhere.

Services import their operations from here or from `kernels.reference`. Signatures and semantics
are those of the references. Triton is imported at the first call on a GPU: CPU users need none.
"""

import functools
import importlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import Tensor

from kernels.reference import combine as _combine
from kernels.reference import expert_ffn as _expert_ffn
from kernels.reference import gate as _gate
from kernels.reference import norm as _norm
from kernels.reference import pack as _pack
from kernels.reference import paged as _paged
from kernels.reference import projection as _projection
from kernels.reference import quant as _quant
from kernels.reference import stage as _stage

P = ParamSpec("P")
R = TypeVar("R")

slot_table = _combine.slot_table
rows_view = _quant.rows_view

# one number of rows for each way in which kernels are chosen or built: whoever warms up takes them all
KINDS_OF_ROWS = (1, 17, 33, 65, 129, 512)
KINDS_OF_EXPERT_ROWS = (*KINDS_OF_ROWS, 1024)

# operation -> Triton module that has it under the same name
TRITON = {
    "quantise": "quant",
    "quantise_rows": "quant",
    "dequantise": "quant",
    "dequantise_rows": "quant",
    "pack": "pack",
    "unpack": "pack",
    "pack_blocks": "pack",
    "gather_pieces": "pack",
    "route": "pack",
    "stage": "stage",
    "tell": "stage",
    "deliver": "stage",
    "add_placed": "stage",
    "publish": "stage",
    "combine": "combine",
    "combine_fp8": "combine",
    "combining": "combine",
    "sum_partials": "combine",
    "expert_ffn": "expert_ffn",
    "expert_ffn_placed": "expert_ffn",
    "expert_ffn_grouped": "expert_ffn",
    "gate_v3": "gate",
    "gate_v2": "gate",
    "rms_norm": "norm_rope",
    "norm_rope": "norm_rope",
    "cache_write": "norm_rope",
    "fp8_linear": "projection",
    "rope_queries": "projection",
    "mla_decode_paged": "mla_decode",
    "mla_prefill_rows": "mla_prefill",
}


@functools.cache
def _triton(name: str) -> Callable[..., object]:
    function: Callable[..., object] = getattr(
        importlib.import_module(f"kernels.{TRITON[name]}"), name
    )
    return function


def _choose(reference: Callable[P, R]) -> Callable[P, R]:
    """The reference, or the Triton kernel of its name when a positional tensor lies on a GPU."""

    @functools.wraps(reference)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        on_gpu = (
            first.is_cuda
            if isinstance(first, Tensor)
            else any(isinstance(a, Tensor) and a.is_cuda for a in args)
        )
        if on_gpu:
            return _triton(reference.__name__)(*args, **kwargs)  # type: ignore[return-value]
        return reference(*args, **kwargs)

    return call


quantise = _choose(_quant.quantise)
quantise_rows = _choose(_quant.quantise_rows)
dequantise = _choose(_quant.dequantise)
dequantise_rows = _choose(_quant.dequantise_rows)
pack = _choose(_pack.pack)
unpack = _choose(_pack.unpack)
pack_blocks = _choose(_pack.pack_blocks)
gather_pieces = _choose(_pack.gather_pieces)
route = _choose(_pack.route)
stage = _choose(_stage.stage)
deliver = _choose(_stage.deliver)
tell = _choose(_stage.tell)
add_placed = _choose(_stage.add_placed)
publish = _choose(_stage.publish)
combine = _choose(_combine.combine)
combining = _choose(_combine.combining)
combine_fp8 = _choose(_combine.combine_fp8)
sum_partials = _choose(_combine.sum_partials)
expert_ffn = _choose(_expert_ffn.expert_ffn)
expert_ffn_placed = _choose(_expert_ffn.expert_ffn_placed)
expert_ffn_grouped = _choose(_expert_ffn.expert_ffn_grouped)
gate_v3 = _choose(_gate.gate_v3)
gate_v2 = _choose(_gate.gate_v2)
rms_norm = _choose(_norm.rms_norm)
norm_rope = _choose(_paged.norm_rope)
cache_write = _choose(_paged.cache_write)
fp8_linear = _choose(_projection.fp8_linear)
rope_queries = _choose(_projection.rope_queries)
mla_decode_paged = _choose(_paged.mla_decode_paged)
mla_prefill_rows = _choose(_paged.mla_prefill_rows)
