"""Launches without Triton's binder: what it would compute is looked up by what the compiler specialises on.

In a loop a launch through the binder takes 20 us, the compiled kernel's own 7.5 (Triton 3.6, Xeon, 2026-11-25).
"""

from typing import Any

import triton
from torch import Tensor
from triton.runtime import driver

_INTERPRETED = bool(triton.knobs.runtime.interpret)
_compiled: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}


def launch(
    kernel: Any,  # noqa: ANN401  -- Triton's, untyped
    grid: tuple[int, int, int],
    pointers: tuple[Tensor, ...],
    numbers: tuple[int, ...],
    constants: tuple[Any, ...],
    **options: Any,  # noqa: ANN401
) -> None:
    """`kernel[grid](*pointers, *numbers, *constants, **options)`, the kernel's parameters being in that order.

    Triton compiles a kernel anew when a pointer's dtype or its alignment to 16 bytes changes, when a number is 1, a
    multiple of 16 or wider than 32 bits, and for other constants or options (named in the same order at every launch).
    """
    if _INTERPRETED:
        kernel[grid](*pointers, *numbers, *constants, **options)
        return
    addresses = [pointer.data_ptr() for pointer in pointers]
    device = pointers[0].get_device()
    key = (
        id(kernel), device, constants, *options.values(),
        *[(pointer.dtype, address & 15 == 0) for pointer, address in zip(pointers, addresses, strict=True)],
        *[n if n == 1 else (n & 15 == 0, -(1 << 31) <= n < 1 << 31) for n in numbers],
    )  # fmt: skip
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[grid](*pointers, *numbers, *constants, **options)
        _compiled[key] = compiled.run, compiled.function, compiled.packed_metadata
        return
    run, function, metadata = known
    stream = driver.active.get_current_stream(device)
    run(*grid, stream, function, metadata, None, None, None, *addresses, *numbers, *constants)
