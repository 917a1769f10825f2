"""What the Gluon kernels for Hopper share: names that differ between Triton versions, and clusters of two programs.

Triton 3.6 has no multicast and does not tell where shared memory lies, so what programs of a pair do to each other is
inline PTX, with addresses in bytes from the start of shared memory. There a kernel's largest allocation lies, which
`check_base` holds Triton to.
"""

from typing import Any

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia.hopper import tma

# renamed between Triton 3.6 and 3.9
load_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
_MARK = gl.constexpr(0x5EED)


class _Paired(GluonJITFunction):  # type: ignore[misc]
    """A kernel whose programs 2i and 2i + 1 are one cluster where it has a multicast; the grid then counts pairs."""

    def _do_compile(self, *args: Any, **options: Any) -> Any:
        kernel = super()._do_compile(*args, **options)
        num_warps, _, shared = kernel.packed_metadata  # for the launcher
        kernel.packed_metadata = num_warps, 1 + ("multicast" in kernel.asm["ptx"]), shared
        return kernel


def paired(function: Any) -> Any:
    """As gluon.jit, for a kernel whose programs may run in pairs."""
    return _Paired(function)


def first_descriptor(kernel: str) -> Any:
    """PTX for `load_to_both` that fetches a block of the first argument of a kernel of this name."""
    return gl.constexpr(f"""{{
        .reg .pred p;
        .reg .b32 t, a, b;
        .reg .b64 m;
        .reg .b16 both;
        elect.sync t|p, -1;
        mov.u32 t, global_smem;
        add.u32 a, t, $3;
        add.u32 b, t, $4;
        mov.b64 m, {kernel}_param_0;
        cvta.param.u64 m, m;
        mov.b16 both, 3;
        @p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
            [a], [m, {{$1, $2}}], [b], both;
        mov.u32 $0, 0;
        }}""")


@gluon.jit
def view(shared, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory as tiles of another kind."""
    if _RENAMED:
        return shared.reinterpret(dtype, shape, layout)
    else:  # noqa: RET505 (only one branch is compiled)
        return shared._reinterpret(dtype, shape, layout)


@gluon.jit
def _ptx(PTX: gl.constexpr, CONSTRAINTS: gl.constexpr, args):
    gl.inline_asm_elementwise(PTX, CONSTRAINTS, args, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def check_base(memory, AT: gl.constexpr):
    """Stop the kernel unless byte AT of `memory`, in blocks of 1024 bytes, is byte AT of all shared memory."""
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    words = view(memory.index(AT // 1024), gl.int32, [2, 128], WORDS)
    words.index(0).store(gl.full([128], _MARK, gl.int32, LANES))
    barrier()
    _ptx(
        """{
        .reg .pred p;
        .reg .b32 t;
        mov.u32 t, global_smem;
        add.u32 t, t, $1;
        ld.shared.u32 t, [t];
        setp.ne.u32 p, t, $2;
        @p trap;
        mov.u32 $0, 0;
        }""", "=r,r,r", [AT, _MARK],
    )  # fmt: skip
    barrier()


@gluon.jit
def init_barriers(at, counts):
    """Initialise barriers from byte `at` on, each with its count (int32, one a thread) unless that is 0, for a pair."""
    index = gl.arange(0, counts.shape[0], counts.type.layout)
    _ptx(
        """{
        .reg .pred p;
        .reg .b32 a;
        mov.u32 a, global_smem;
        add.u32 a, a, $1;
        setp.gt.s32 p, $2, 0;
        @p mbarrier.init.shared::cta.b64 [a], $2;
        fence.mbarrier_init.release.cluster;
        mov.u32 $0, 0;
        }""", "=r,r,r", [at + index * 8, counts],
    )  # fmt: skip


@gluon.jit
def here(PAIRED: gl.constexpr):
    """Say to the other program of a pair that its barriers may be used; every warp says so and then waits (`meet`)."""
    if PAIRED:
        _ptx("barrier.cluster.arrive.relaxed.aligned; mov.u32 $0, 0;", "=r", [])


@gluon.jit
def meet(PAIRED: gl.constexpr):
    """Wait until all warps of both programs of a pair are here; none may be missing: partitions fill their warpgroups."""
    if PAIRED:
        _ptx("barrier.cluster.wait.aligned; mov.u32 $0, 0;", "=r", [])


@gluon.jit
def wait(at, parity):
    """Wait for the barrier at byte `at`, every thread by itself: Triton's own wait also joins the warps."""
    _ptx(
        """{
        .reg .pred p;
        .reg .b32 a;
        mov.u32 a, global_smem;
        add.u32 a, a, $1;
        again:
        mbarrier.try_wait.parity.shared::cta.b64 p, [a], $2;
        @!p bra.uni again;
        mov.u32 $0, 0;
        }""", "=r,r,r", [at, parity],
    )  # fmt: skip


@gluon.jit
def arrive(at, BOTH: gl.constexpr):
    """Arrive once a warp at the barrier at byte `at`, in BOTH programs of a pair or in this one.

    Relaxed: what the warp has read of shared memory it has waited for, and a fence would wait for its loads as well.
    """
    if BOTH:
        _ptx(
            """{
            .reg .pred p;
            .reg .b32 t, a;
            mov.u32 t, %laneid;
            setp.lt.u32 p, t, 2;
            mov.u32 a, global_smem;
            add.u32 a, a, $1;
            @p mapa.shared::cluster.u32 a, a, t;
            @p mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [a];
            mov.u32 $0, 0;
            }""", "=r,r", [at],
        )  # fmt: skip
    else:
        _ptx(
            """{
            .reg .pred p;
            .reg .b32 t, a;
            mov.u32 t, %laneid;
            setp.eq.u32 p, t, 0;
            mov.u32 a, global_smem;
            add.u32 a, a, $1;
            @p mbarrier.arrive.shared::cta.b64 _, [a];
            mov.u32 $0, 0;
            }""", "=r,r", [at],
        )  # fmt: skip


@gluon.jit
def load_to_both(row, column, to, ready, PTX: gl.constexpr):
    """From one warp, fetch a block to byte `to` of both programs of a pair, each with its barrier at byte `ready`."""
    _ptx(PTX, "=r,r,r,r,r", [column, row, to, ready])
