"""What fetches for few-row FP8 products on Hopper, in Gluon: a warp that does nothing else keeps a ring of stages full.

Reading the weights is all the work, so their requests must never wait for arithmetic, and the first are made before the
predecessor has ended. Every worker has its own weight rows over the whole of K: nothing is split and added up through
memory, at the price of reading x once per worker and item.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.hopper import clock, load_block, pause

WORKERS = gl.constexpr(132)  # SMs of an H100 or H200
# cycles from one early stage to the next, a block of columns: all at once they delay what the predecessor still reads
PACE = gl.constexpr(425)


@gluon.jit
def next_stage(b, phase, STAGES: gl.constexpr):
    """The stage after stage b of the ring, and its phase."""
    last = b == STAGES - 1
    return gl.where(last, 0, b + 1), gl.where(last, 1 - phase, phase)


@gluon.jit
def fetch_w(w_rows, ready, ws, b, row, k, AT: gl.constexpr, N: gl.constexpr, KU: gl.constexpr):
    """Ask for N weight rows of a stage, to row AT of a block; what are neighbours in memory, together."""
    ROWS: gl.constexpr = w_rows.block_shape[0]
    for first in gl.static_range(0, N, ROWS):
        for j in gl.static_range(KU):
            place = ws.index(b * KU + j).slice(AT + first, ROWS, 0)
            load_block(w_rows, [row + first, (k + j) * 128], ready, place)


@gluon.jit
def fetch_x(x_rows, ready, xs, b, k, x_row, ROWS: gl.constexpr, KU: gl.constexpr):
    """Ask for a stage's rows of x, a few at a time: rows that there are not, in a block with others, take time."""
    XR: gl.constexpr = x_rows.block_shape[0]
    for j in gl.static_range(KU):
        for first in gl.static_range(0, ROWS, XR):
            place = xs.index(b * KU + j).slice(first, XR, 0)
            load_block(x_rows, [x_row + first, (k + j) * 128], ready, place)


@gluon.jit
def fetch_early(
    w_rows, kb, second, ws, full, worker, step: gl.constexpr, BYTES: gl.constexpr, N: gl.constexpr,
    KU: gl.constexpr, MOST: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Ask for weights of the first stages of a worker's first item, at most MOST, and say of how many."""
    begin = clock()
    early = gl.minimum(gl.cdiv(kb, KU), MOST)
    row = worker // PARTS * N * step
    for i in range(early):
        pause(begin, i * KU * PACE)
        mbarrier.expect(full.index(i), BYTES)
        for t in gl.static_range(2):
            fetch_w(w_rows, full.index(i), ws, i, row + t * second, i * KU, t * N, N, KU)
    return early


@gluon.jit
def fetch_items(
    x_rows, w_rows, kb, groups, second, xs, ws, full, empty, worker, early, step: gl.constexpr,
    BYTES: gl.constexpr, N: gl.constexpr, KU: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Fetch a worker's items, pairs of tiles of N rows: its part of the rows of x, and weights but early ones."""
    X: gl.constexpr = xs.shape[1]
    i, b, phase = worker * 0, worker * 0, worker * 0
    for group in range(worker, groups, WORKERS):
        row = group // PARTS * N * step
        for k in range(0, kb, KU):
            ready = full.index(b)
            mbarrier.wait(empty.index(b), 1 - phase)  # at once in the first round
            if i >= early:
                mbarrier.expect(ready, BYTES)
                for t in gl.static_range(2):
                    fetch_w(w_rows, ready, ws, b, row + t * second, k, t * N, N, KU)
            fetch_x(x_rows, ready, xs, b, k, group % PARTS * X, X, KU)
            i += 1
            b, phase = next_stage(b, phase, STAGES)
