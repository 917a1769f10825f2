"""Pooled buffers: reference counts, reuse, sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.transport.buffers import BufferPool
from common.wire.header import HEADER_NBYTES

settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")


def test_the_last_release_gives_back_and_then_tells():
    pool, told = BufferPool(), []
    buffer = pool.acquire(10)
    buffer.on_free = lambda: told.append(pool.outstanding)
    buffer.retain()
    buffer.release()
    assert (pool.outstanding, told) == (1, [])
    buffer.release()
    assert (pool.outstanding, told) == (0, [0])
    with pytest.raises(AssertionError):
        buffer.release()
    with pytest.raises(AssertionError):
        buffer.retain()


def test_a_reused_buffer_does_not_call_its_former_owner():
    pool, told = BufferPool(), []
    buffer = pool.acquire(10)
    buffer.on_free = lambda: told.append(1)
    buffer.release()
    again = pool.acquire(500)
    assert again is buffer
    assert again.nbytes == 500
    again.release()
    assert told == [1]


@given(st.integers(0, 5 << 20))
def test_capacity(nbytes):
    pool = BufferPool()
    buffer = pool.acquire(nbytes)
    assert buffer.array.nbytes == nbytes
    assert buffer.message.nbytes == HEADER_NBYTES + nbytes
    capacity = buffer.storage.nbytes - HEADER_NBYTES
    assert nbytes <= capacity < max(2 * nbytes, 1025)
    assert buffer.array.ctypes.data % 16 == 0, "sections are viewed with their own dtype"
    buffer.array[:] = 3
    assert np.all(buffer.message[HEADER_NBYTES:] == 3)
    buffer.release()
    assert pool.outstanding == 0


def test_what_is_kept_is_bounded():
    pool = BufferPool(max_kept_nbytes=8192)
    held = [pool.acquire(4096) for _ in range(5)]
    assert repr(pool) == "<BufferPool [5 outstanding | 0 bytes kept]>"
    for buffer in held:
        buffer.release()
    assert repr(pool) == "<BufferPool [0 outstanding | 8192 bytes kept]>"
