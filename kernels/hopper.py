"""What the Gluon kernels for Hopper share: names that differ between Triton versions, and clusters of two programs.

Triton 3.6 has no multicast and does not tell where shared memory lies, so the programs of a `paired` kernel use inline
PTX for what they do to each other. Their ring is the only large allocation: Triton puts it first, which `check_base`
holds it to.
"""

from typing import Any

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# renamed between Triton 3.6 and 3.9
load_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
_MARK = gl.constexpr(0x5EED)


@gluon.jit
def view(shared, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory as tiles of another kind."""
    if _RENAMED:
        return shared.reinterpret(dtype, shape, layout)
    else:  # noqa: RET505 (only one branch is compiled)
        return shared._reinterpret(dtype, shape, layout)


class _Paired(GluonJITFunction):  # type: ignore[misc]
    """A kernel whose programs 2i and 2i + 1 run as one cluster; the grid counts pairs."""

    def _do_compile(self, *args: Any, **options: Any) -> Any:
        kernel = super()._do_compile(*args, **options)
        num_warps, _, shared = kernel.packed_metadata  # programs of a cluster, to the launcher
        kernel.packed_metadata = num_warps, 2, shared
        return kernel


def paired(function: Any) -> Any:
    """As gluon.jit, for a kernel whose programs run in pairs."""
    return _Paired(function)


@gluon.jit
def check_base(ring, AT: gl.constexpr):
    """Stop the kernel unless byte AT of the ring, in blocks of 1024 bytes, is byte AT of all shared memory."""
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    words = view(ring.index(AT // 1024), gl.int32, [2, 128], WORDS)
    words.index(0).store(gl.full([128], _MARK, gl.int32, LANES))
    barrier()
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 t;
        mov.u32 t, global_smem;
        add.u32 t, t, $1;
        ld.shared.u32 t, [t];
        setp.ne.u32 p, t, $2;
        @p trap;
        mov.u32 $0, 0;
        }""", "=r,r,r", [AT, _MARK], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    barrier()


@gluon.jit
def show_barriers():
    """Make barriers that this program has initialised known to its pair, which `meet` then waits for."""
    gl.inline_asm_elementwise(
        "fence.mbarrier_init.release.cluster; mov.u32 $0, 0;", "=r", [], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def meet():
    """Wait for all warps of both programs of a pair: none may be missing, so partitions fill their warpgroups."""
    gl.inline_asm_elementwise(
        "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned; mov.u32 $0, 0;",
        "=r", [], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def arrive_at_both(at):
    """Arrive once at the barrier `at` bytes into shared memory, in both programs of a pair."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 t, a;
        mov.u32 t, %tid.x;
        and.b32 t, t, 127;
        setp.lt.u32 p, t, 2;
        mov.u32 a, global_smem;
        add.u32 a, a, $1;
        @p mapa.shared::cluster.u32 a, a, t;
        @p mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [a];
        mov.u32 $0, 0;
        }""", "=r,r", [at], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def leading_descriptor(kernel: str, place: int) -> Any:
    """PTX for `load_to_both` that fetches a block of a descriptor, one of the first arguments of a kernel."""
    return gl.constexpr(f"""{{
        .reg .pred p;
        .reg .b32 t, a, b;
        .reg .b64 m;
        .reg .b16 both;
        elect.sync t|p, -1;
        mov.u32 t, global_smem;
        add.u32 a, t, $3;
        add.u32 b, t, $4;
        mov.b64 m, {kernel}_param_{5 * place};
        cvta.param.u64 m, m;
        mov.b16 both, 3;
        @p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
            [a], [m, {{$1, $2}}], [b], both;
        mov.u32 $0, 0;
        }}""")


@gluon.jit
def load_to_both(row, column, to, ready, PTX: gl.constexpr):
    """From one warp, fetch a block to byte `to` of both programs of a pair, each with its barrier at byte `ready`."""
    gl.inline_asm_elementwise(
        PTX, "=r,r,r,r,r", [column, row, to, ready], dtype=gl.int32, is_pure=False, pack=1
    )
