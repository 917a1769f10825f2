"""What the Gluon kernels for Hopper share: names that differ between Triton 3.6 and 3.9, clusters of two programs.

Triton 3.6 has no multicast and does not tell where shared memory lies, so what programs of a pair do to each other is
inline PTX, with addresses in bytes from the start of shared memory. There a kernel's largest allocation lies, which
`check_base` holds Triton to.
"""

import functools
from typing import Any

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

load_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_block = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
_MARK = gl.constexpr(0x5EED)


class _Paired(GluonJITFunction):  # type: ignore[misc]
    def _do_compile(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401  -- Triton's, untyped
        kernel = super()._do_compile(*args, **options)
        num_warps, _, shared = kernel.packed_metadata  # for the launcher
        kernel.packed_metadata = num_warps, 2, shared
        return kernel


def paired(**options: Any) -> Any:  # noqa: ANN401
    """As gluon.jit, for a kernel whose programs 2i and 2i + 1 are one cluster; its grid counts pairs."""
    return functools.partial(_Paired, **options)


@functools.cache
def _layout(block: tuple[int, ...], dtype: gl.dtype) -> object:
    return gl.NVMMASharedLayout.get_default_for(list(block), dtype)


def blocks_of(tensor: Tensor, *block: int, dtype: gl.dtype = gl.bfloat16) -> object:
    """Descriptor of blocks of a contiguous tensor of that dtype; beyond its ends there are zeros."""
    return TensorDescriptor.from_tensor(tensor, list(block), _layout(block, dtype))


def first_descriptor(kernel: str) -> Any:  # noqa: ANN401
    """PTX for `load_to_both` that fetches a block of the first argument of a kernel of this name."""
    return gl.constexpr(f"""{{ .reg .pred p; .reg .b32 t, a, b; .reg .b64 m; .reg .b16 both;
        elect.sync t|p, -1;
        mov.u32 t, global_smem; add.u32 a, t, $3; add.u32 b, t, $4;
        mov.b64 m, {kernel}_param_0; cvta.param.u64 m, m; mov.b16 both, 3;
        @p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
            [a], [m, {{$1, $2}}], [b], both;
        mov.u32 $0, 0; }}""")


@gluon.jit
def view(shared, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory as tiles of another kind."""
    if _RENAMED:
        return shared.reinterpret(dtype, shape, layout)
    else:  # noqa: RET505 (only one branch is compiled)
        return shared._reinterpret(dtype, shape, layout)


@gluon.jit
def part(memory, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Blocks FIRST to FIRST + COUNT of memory, to be viewed as something else."""
    if _RENAMED:
        return memory.slice(FIRST, COUNT, 0)
    else:  # noqa: RET505 (only one branch is compiled)
        return memory.index(FIRST)  # which it may view beyond its end


@gluon.jit
def tell(bar):
    """Arrive once for all warps of the caller, when each has read or written what it had to."""
    barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def clock():
    """Cycles of this SM."""
    return gl.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", "=l", [], dtype=gl.int64, is_pure=False, pack=1
    )


@gluon.jit
def pause(since, cycles):
    """Wait until the clock is `cycles` after what it was."""
    while clock() - since < cycles:
        pass


@gluon.jit
def clear_rows(shared, first):
    """Zero rows of a shared tile from `first` on, for a warpgroup: what nobody has written may hold NaN."""
    ROWS: gl.constexpr = shared.shape[0]
    WIDTH: gl.constexpr = shared.shape[1]
    COLUMNS: gl.constexpr = min(64, WIDTH)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    for c in gl.static_range(0, WIDTH, COLUMNS):
        part = shared.slice(c, COLUMNS, 1)
        value = part.load(layout)
        part.store(gl.where((row < first)[:, None], value, gl.zeros_like(value)))


@gluon.jit
def _ptx(PTX: gl.constexpr, CONSTRAINTS: gl.constexpr, args):
    gl.inline_asm_elementwise(PTX, CONSTRAINTS, args, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def check_base(memory, AT: gl.constexpr):
    """Stop the kernel unless byte AT of `memory`, in blocks of 512 bytes, is byte AT of all shared memory."""
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    words = view(memory.index(AT // 512), gl.int32, [1, 128], WORDS)
    words.index(0).store(gl.full([128], _MARK, gl.int32, LANES))
    barrier()
    _ptx(
        """{ .reg .pred p; .reg .b32 t;
        mov.u32 t, global_smem; add.u32 t, t, $1; ld.shared.u32 t, [t];
        setp.ne.u32 p, t, $2; @p trap; mov.u32 $0, 0; }""", "=r,r,r", [AT, _MARK],
    )  # fmt: skip
    barrier()


@gluon.jit
def meet():
    """Wait for all warps of both programs of a pair: none may be missing, so partitions fill their warpgroups.

    Barriers that a program has initialised before may then be used by the other.
    """
    _ptx(
        "fence.mbarrier_init.release.cluster; barrier.cluster.arrive.relaxed.aligned; "
        "barrier.cluster.wait.aligned; mov.u32 $0, 0;", "=r", [],
    )  # fmt: skip


@gluon.jit
def wait(at, parity):
    """Wait for the barrier at byte `at`, every thread by itself: Triton's own wait also joins the warps."""
    _ptx(
        """{ .reg .pred p; .reg .b32 a;
        mov.u32 a, global_smem; add.u32 a, a, $1;
        again: mbarrier.try_wait.parity.shared::cta.b64 p, [a], $2; @!p bra.uni again;
        mov.u32 $0, 0; }""", "=r,r,r", [at, parity],
    )  # fmt: skip


@gluon.jit
def of_both():
    """For `arrive`: where the shared memory of either program of a pair begins, in two lanes of a warp; 0 in others."""
    return gl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 t, a;
        mov.u32 t, %laneid; setp.lt.u32 p, t, 2; mov.u32 a, global_smem;
        mov.u32 $0, 0; @p mapa.shared::cluster.u32 $0, a, t; }""", "=r", [],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def arrive(both, at):
    """Arrive once a warp at the barrier at byte `at`, in both programs of a pair.

    Relaxed: what the warp has read of shared memory it has waited for, and a fence would wait for its loads as well.
    """
    _ptx(
        """{ .reg .pred p; .reg .b32 a; setp.ne.u32 p, $1, 0; add.u32 a, $1, $2;
        @p mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [a]; mov.u32 $0, 0; }""",
        "=r,r,r", [both, at],
    )  # fmt: skip


@gluon.jit
def load_to_both(row, column, to, ready, PTX: gl.constexpr):
    """From one warp, fetch a block to byte `to` of both programs of a pair, each with its barrier at byte `ready`."""
    _ptx(PTX, "=r,r,r,r,r", [column, row, to, ready])


@gluon.jit
def copy_to_other(at, ready, NBYTES: gl.constexpr):
    """From a warpgroup, copy NBYTES at byte `at` to the other program, with its barrier at byte `ready`."""
    _ptx(
        """{ .reg .pred p; .reg .b32 t, s, a, b; mov.u32 t, %tid.x; and.b32 t, t, 127; setp.eq.u32 p, t, 0;
        mov.u32 s, global_smem; mov.u32 t, %cluster_ctarank; xor.b32 t, t, 1; mapa.shared::cluster.u32 t, s, t;
        add.u32 a, t, $1; add.u32 b, t, $2; add.u32 s, s, $1;
        @p cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [a], [s], $3, [b];
        mov.u32 $0, 0; }""", "=r,r,r,r", [at, ready, NBYTES],
    )  # fmt: skip


@gluon.jit
def load_row(source, to, ready, NBYTES: gl.constexpr):
    """From one warp, fetch NBYTES (a multiple of 16) from a pointer to byte `to`, with the barrier at byte `ready`."""
    _ptx(
        """{ .reg .pred p; .reg .b32 t, a, b; elect.sync t|p, -1;
        mov.u32 t, global_smem; add.u32 a, t, $2; add.u32 b, t, $3;
        @p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [a], [$1], $4, [b];
        mov.u32 $0, 0; }""", "=r,l,r,r,r", [source, to, ready, NBYTES],
    )  # fmt: skip


@gluon.jit
def prefetch(source, NBYTES: gl.constexpr):
    """From 1 or 4 warps that begin at a multiple of that, ask for NBYTES (a multiple of 16) from a pointer into L2."""
    _ptx(
        """{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; and.b32 t, t, $3; setp.eq.u32 p, t, 0;
        @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }""", "=r,l,r,r",
        [source, NBYTES, 32 * gl.num_warps() - 1],
    )  # fmt: skip


@gluon.jit
def at_byte(at):
    """The fp32 number at byte `at` of shared memory, read here and not before a `wait` above."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 a; mov.u32 a, global_smem; add.u32 a, a, $1; ld.shared.f32 $0, [a]; }", "=f,r", [at],
        dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip
