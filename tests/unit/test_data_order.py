"""The order of rows is a bijection in every epoch, and mixtures keep their shares."""

import tracemalloc

import numpy as np
import pytest

from lost.data.order import MixtureOrder, RowOrder, quotas


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 16, 17, 63, 64, 65, 100, 1000, 4097])
def test_every_epoch_holds_every_row_once(num_rows):
    order = RowOrder(num_rows, seed=3)
    for epoch in (0, 1, 2, 7):
        rows = order.rows(np.arange(epoch * num_rows, (epoch + 1) * num_rows))
        assert sorted(rows.tolist()) == list(range(num_rows))


def test_epochs_and_seeds_differ_and_repeat():
    order = RowOrder(1000, seed=0)
    first, second = order.rows(np.arange(1000)), order.rows(np.arange(1000, 2000))
    other = RowOrder(1000, seed=1).rows(np.arange(1000))
    # Two random orders of 1000 agree at about one place.
    assert (first == second).sum() < 12
    assert (first == other).sum() < 12
    assert (first == np.arange(1000)).sum() < 12
    assert (RowOrder(1000, seed=0).rows(np.arange(1000)) == first).all()


def test_a_place_alone_equals_the_place_in_an_array():
    order = RowOrder(77, seed=5)
    positions = np.array([0, 76, 77, 500, 12345, 3])
    assert order.rows(positions).tolist() == [order.row(int(p)) for p in positions]


@pytest.mark.parametrize("num_rows", [2, 3, 5, 12])
def test_every_place_gets_every_row_equally_often(num_rows):
    """Chi-square over 1000 seeds, per place; a rotation or an identity would fail by far."""
    counts = np.zeros((num_rows, num_rows))
    for seed in range(1000):
        counts[np.arange(num_rows), RowOrder(num_rows, seed).rows(np.arange(num_rows))] += 1
    expected = 1000 / num_rows
    chi_square = ((counts - expected) ** 2 / expected).sum(axis=1)
    # Mean num_rows - 1, standard deviation sqrt(2 (num_rows - 1)).
    assert chi_square.max() < num_rows - 1 + 6 * np.sqrt(2 * (num_rows - 1))


def test_neighbours_are_unrelated():
    """The correlation of row and next row, and of row and place, is that of independent numbers."""
    rows = RowOrder(20011, seed=9).rows(np.arange(20011)).astype(float)
    limit = 5 / np.sqrt(20011)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < limit
    assert abs(np.corrcoef(rows, np.arange(20011))[0, 1]) < limit
    # The measure does see a relation where there is one.
    assert abs(np.corrcoef(np.sort(rows), np.arange(20011))[0, 1]) > limit


def test_a_billion_rows_need_no_memory():
    order = RowOrder(1_000_000_007, seed=1)
    positions = np.concatenate([np.arange(50_000), 1_000_000_006 - np.arange(50_000)])
    rows = order.rows(positions)
    assert len(set(rows.tolist())) == 100_000
    assert rows.min() >= 0
    assert rows.max() < 1_000_000_007
    assert abs(rows.mean() / 1_000_000_007 - 0.5) < 0.01


def test_quotas_share_out_every_place():
    assert quotas(10, [1, 1, 1]) == [4, 3, 3]
    assert quotas(1000, [0.7, 0.2, 0.1]) == [700, 200, 100]
    assert quotas(7, [3.0]) == [7]
    rng = np.random.default_rng(0)
    for _ in range(50):
        weights = rng.random(4).tolist()
        counts = quotas(997, weights)
        assert sum(counts) == 997
        assert all(abs(c - 997 * w / sum(weights)) < 1 for c, w in zip(counts, weights, strict=True))


def _mixture(sizes, weights, num_epochs, seed=4):
    order = MixtureOrder(sizes, weights, seed)
    ids = order.rows(np.arange(num_epochs * sum(sizes)))
    ends = np.cumsum(sizes)
    which = np.searchsorted(ends, ids, side="right")
    return which, ids - (ends - sizes)[which]


def test_a_mixture_by_size_is_one_order_over_all_rows():
    which, _ = _mixture([30, 70, 11], None, 1)
    assert np.bincount(which).tolist() == [30, 70, 11]
    order = MixtureOrder([30, 70, 11], None, 4)
    assert sorted(order.rows(np.arange(111, 222)).tolist()) == list(range(111))


def test_a_mixture_keeps_its_shares_in_every_epoch():
    which, _ = _mixture([50, 40, 10], [0.2, 0.3, 0.5], 3)
    for epoch in range(3):
        assert np.bincount(which[epoch * 100 : (epoch + 1) * 100]).tolist() == [20, 30, 50]


def test_a_mixture_is_spread_evenly():
    """In any stretch each set has its share, to within one place a split."""
    which, _ = _mixture([500, 400, 101], [0.2, 0.3, 0.5], 1)
    for k, share in enumerate([0.2, 0.3, 0.5]):
        done = np.cumsum(which == k)
        assert np.abs(done - share * np.arange(1, 1002)).max() < 3


def test_each_set_of_a_mixture_goes_through_all_its_rows_before_any_comes_again():
    sizes = [50, 40, 10]
    which, rows = _mixture(sizes, [0.2, 0.3, 0.5], 6)
    for k, size in enumerate(sizes):
        walked = rows[which == k]
        assert len(walked) > 1.5 * size or k == 0
        for start in range(0, len(walked) - size + 1, size):
            assert sorted(walked[start : start + size].tolist()) == list(range(size))


def _inverse(order, row, epoch):
    """The place of a row in its epoch: the Feistel rounds backwards, in whole numbers."""
    mask = (1 << 64) - 1

    def mix(value):
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
        return value ^ value >> 31

    half_bits = next(bits for bits in range(1, 64) if 4**bits >= order.num_rows)
    key = mix((int(order._seed) + epoch * 0x9E3779B97F4A7C15) & mask)
    while True:
        left, right = row >> half_bits, row & ((1 << half_bits) - 1)
        for turn in reversed(range(6)):
            left, right = right ^ (mix((left + mix((key + turn + 1) & mask)) & mask) & ((1 << half_bits) - 1)), left
        row = left << half_bits | right
        if row < order.num_rows:
            return row


# C4 in rows of 256 tokens is 610 million rows.
@pytest.mark.parametrize("num_rows", [1_000_000_000, 610_000_000])
def test_a_million_places_of_a_billion_rows_need_no_permutation(num_rows):
    """A bijection on samples (no row twice; the inverse finds the place), in less memory than 50 MB."""
    order = RowOrder(num_rows, seed=11)
    epoch = 5
    # Spread over the epoch, its first and its last place among them; beyond int32 as positions.
    indices = np.linspace(0, num_rows - 1, 1_000_000).astype(np.int64)
    assert len(np.unique(indices)) == 1_000_000
    tracemalloc.start()
    try:
        rows = np.empty(1_000_000, dtype=np.int64)
        for start in range(0, 1_000_000, 65_536):
            rows[start : start + 65_536] = order.rows(epoch * num_rows + indices[start : start + 65_536])
        peak = tracemalloc.get_traced_memory()[1]
        # What a permutation would need does show up in this measure.
        np.empty(num_rows // 8, dtype=np.int64)
        assert tracemalloc.get_traced_memory()[1] > 50e6
    finally:
        tracemalloc.stop()
    assert peak < 50e6
    assert rows.min() >= 0
    assert rows.max() < num_rows
    assert len(np.unique(rows)) == 1_000_000
    for k in (0, 1, 77_777, 500_000, 999_999, *range(0, 1_000_000, 7_919)):
        assert _inverse(order, int(rows[k]), epoch) == indices[k]


def test_a_mixture_of_a_billion_rows_stays_exact():
    """Shares, range and no row twice, where products of row counts exceed 2^59; against whole numbers of any size."""
    sizes, weights = [600_000_000, 399_999_999, 1], [0.5, 0.3, 0.2]
    order = MixtureOrder(sizes, weights, seed=2)
    total = sum(sizes)
    assert [abs(quota - total * weight) < 1 for quota, weight in zip(order.quotas, weights, strict=True)] == [True] * 3
    indices = np.linspace(0, total - 1, 20_000).astype(np.int64)
    ids = order.rows(7 * total + indices)
    which = np.searchsorted(np.cumsum(sizes), ids, side="right")
    for k, (index, row) in enumerate(zip(indices.tolist(), ids.tolist(), strict=True)):
        left, left_total = index, total
        for part, quota in enumerate(order.quotas):
            before = left * quota // left_total
            if (left + 1) * quota // left_total > before:
                assert which[k] == part
                if k % 500 == 0:
                    assert row == sum(sizes[:part]) + order._orders[part].row(7 * quota + before)
                break
            left, left_total = left - before, left_total - quota
        else:
            raise AssertionError(f"place {index} belongs to no set")
    of_first = ids[which == 0]
    assert len(np.unique(of_first)) == len(of_first)
