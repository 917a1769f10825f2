"""The one place that chooses a kernel: Triton where the tensors are on a GPU, the torch reference elsewhere.

Services import their operations from here and nowhere else in `kernels`. Signatures and semantics are the references'.
"""

from kernels.reference.combine import combine, combine_fp8, slot_table, sum_partials
from kernels.reference.pack import pack, pack_blocks, route, unpack
from kernels.reference.quant import dequantise, dequantise_rows, quantise, quantise_rows, rows_view

__all__ = [
    "combine",
    "combine_fp8",
    "dequantise",
    "dequantise_rows",
    "pack",
    "pack_blocks",
    "quantise",
    "quantise_rows",
    "route",
    "rows_view",
    "slot_table",
    "sum_partials",
    "unpack",
]
