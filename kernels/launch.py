"""Launches without Triton's binder: whoever launches names, by a key, all that the compiler specialises on.

In a loop a launch through the binder takes 20 us, the compiled kernel's own 7.5 (Triton 3.6, Xeon, 2026-11-25).
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

_INTERPRETED = bool(triton.knobs.runtime.interpret)
# absent where torch is built without CUDA
_stream_of: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Launcher:
    """Launches of one kernel, whose parameters are pointers, numbers and constants, in that order."""

    def __init__(self, kernel: Any) -> None:  # noqa: ANN401  -- Triton's, untyped
        self._kernel = kernel
        self._known: dict[Hashable, tuple[Any, Any, Any, tuple[Any, ...]]] = {}

    def __call__(
        self, key: Hashable, grid: tuple[int, int, int], pointers: tuple[Tensor, ...],
        numbers: tuple[int, ...], describe: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]],
    ) -> None:  # fmt: skip
        """`kernel[grid](*pointers, *numbers, *constants, **options)`; `describe` gives constants and options.

        Equal keys must mean equal constants, options and dtypes, and numbers that Triton takes for alike: those that it
        is not told to leave alone are 1, a multiple of 16 or neither, and of 32 bits, for all of a key.
        """
        self.prepared(key, grid, pointers, numbers, describe)()

    def prepared(
        self, key: Hashable, grid: tuple[int, int, int], pointers: tuple[Tensor, ...],
        numbers: tuple[int, ...], describe: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]],
    ) -> Callable[[], object]:  # fmt: skip
        """The same, to be launched later, on what is the current stream now."""
        addresses = [pointer.data_ptr() for pointer in pointers]
        low = 0
        for address in addresses:
            low |= address
        device = pointers[0].get_device()
        known = None if low & 15 else self._known.get((device, key))
        if known is None:
            return partial(self._first, (device, key), low, grid, (*pointers, *numbers), describe)
        run, function, metadata, constants = known
        stream = _stream_of(device)
        return partial(
            run, *grid, stream, function, metadata, None, None, None, *addresses, *numbers, *constants
        )  # fmt: skip

    def _first(
        self, key: tuple[int, Hashable], low: int, grid: tuple[int, int, int], arguments: tuple[Any, ...],
        describe: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]],
    ) -> None:  # fmt: skip
        """By the binder, which compiles; the next one is known, if all pointers are aligned."""
        constants, options = describe()
        compiled = self._kernel[grid](*arguments, *constants, **options)
        if low & 15 == 0 and not _INTERPRETED:
            parts = compiled.run, compiled.function, compiled.packed_metadata, constants
            self._known[key] = parts
