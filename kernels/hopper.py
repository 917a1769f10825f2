"""What the Gluon kernels for Hopper share: names that differ between Triton 3.6 and 3.9."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

load_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def view(shared, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory as tiles of another kind."""
    if _RENAMED:
        return shared.reinterpret(dtype, shape, layout)
    else:  # noqa: RET505 (only one branch is compiled)
        return shared._reinterpret(dtype, shape, layout)


@gluon.jit
def tell(bar):
    """Arrive once for all warps of the caller, when each has read or written what it had to."""
    barrier()
    mbarrier.arrive(bar, count=1)
