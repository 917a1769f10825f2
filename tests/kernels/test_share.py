"""How weight rows are shared out to workers: each row once, and the busiest not much over the mean."""

import pytest

from kernels.ops import KINDS_OF_EXPERT_ROWS
from kernels.stream import WORKERS, rounds_of, share
from kernels.tile import PAIRS, tiles_pay, whole


def spans(num_rows, halves, parts=1, widest=64):
    """(worker, first row, end) in a half, of every item; small ones once for each part of the rows of x."""
    rows, step = num_rows // halves, 3 - halves
    rounds = rounds_of(rows) if halves == 2 else 0
    for item in range(rounds * WORKERS):
        yield item % WORKERS, item * 128, item * 128 + 128
    begin = rounds * WORKERS * 128
    s = share(rows - begin, halves, parts, widest)
    assert s.n <= widest
    for group in range(s.groups):
        first = begin + group // parts * s.n * step
        yield group % WORKERS, first, first + s.n * step


@pytest.mark.parametrize("widest", [64, 32])
@pytest.mark.parametrize(
    ("num_rows", "halves"),
    [(128, 2), (384, 2), (2816, 2), (4096, 2), (33792, 2), (36864, 2),
     (64, 1), (576, 1), (2064, 1), (7168, 1), (24576, 1), (129280, 1)],
)  # fmt: skip
def test_every_row_has_one_worker(num_rows, halves, widest):
    rows = num_rows // halves
    items = spans(num_rows, halves, widest=widest)
    taken = [row for _, first, end in items for row in range(first, min(end, rows))]
    assert taken == list(range(rows))


@pytest.mark.parametrize("num_rows", [128, 384, 2816, 4096, 36864])
def test_every_row_has_one_worker_for_each_part_of_x(num_rows):
    small = rounds_of(num_rows // 2) * WORKERS * 128  # these have all rows of x
    taken = sorted(
        row
        for _, first, end in spans(num_rows, 2, parts=2)
        for row in range(first, min(end, num_rows // 2))
    )
    assert taken == sorted([*range(num_rows // 2), *range(small, num_rows // 2)])


@pytest.mark.parametrize(
    ("num_rows", "halves", "busiest"), [(4096, 2, 16), (36864, 2, 144), (7168, 1, 64)]
)
def test_the_busiest_worker(num_rows, halves, busiest):
    load = [0] * WORKERS
    for worker, first, end in spans(num_rows, halves):
        load[worker] += end - first
    assert max(load) == busiest


def test_units_are_cut_where_a_last_round_would_be_less_than_half_full():
    for units in range(1, 5 * PAIRS):
        big, last = whole(units), units % PAIRS
        assert big in (units, units - last)
        rounds = -(-big // PAIRS) + (units > big) / 2  # small units take half as long
        assert rounds == min(-(-units // PAIRS), units // PAIRS + (1 if 2 * last > PAIRS else 0.5))
        assert 2 * (units - big) <= PAIRS


@pytest.mark.parametrize("hidden", [2048, 4096, 18432])
def test_who_warms_up_has_launched_all_that_rows_can_ask_for(hidden):
    assert any(tiles_pay(rows, hidden) for rows in KINDS_OF_EXPERT_ROWS)
    assert not any(
        tiles_pay(rows, hidden) for rows in (300, 600)
    )  # half of the pairs' rows would be none
    assert all(tiles_pay(rows, hidden) for rows in (1000, 1024, 2048, 3000, 4097, 8192))


@pytest.mark.parametrize("hidden", [128, 1408])
def test_a_small_expert_is_the_librarys(hidden):
    assert not any(tiles_pay(rows, hidden) for rows in range(129, 8193))
