"""Which row a training sample reads: pure arithmetic on (seed, epoch, position), no permutation in memory.

A Feistel network is a bijection on [0, 4^h) whatever its round function; walking its cycles until the value falls
below `num_rows` makes it a bijection on [0, num_rows). So the data position of a run is one number, at any size.
"""

import numpy as np

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of uint64 in which every input bit moves about half the output bits.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014), with Stafford's mix 13.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive_seed(seed: int, stream: int) -> int:
    """A seed for sub-stream `stream` of `seed`."""
    state = np.array([(seed * _GOLDEN + stream + 1) & _MASK_64], dtype=np.uint64)
    return int(mix(mix(state) + np.uint64(_GOLDEN))[0])


class RowOrder:
    """The endless order of the rows of one set: epoch after epoch, each epoch another bijection of all rows.

    Args:
        num_rows: rows of the set, at least 1.
        seed: any int; another seed is another order.
    """

    def __init__(self, num_rows: int, seed: int):
        assert num_rows >= 1, num_rows
        self.num_rows = num_rows
        self._seed = np.uint64(derive_seed(seed, 0))
        half_bits = max(1, ((num_rows - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._half_mask = np.uint64((1 << half_bits) - 1)

    def row(self, position: int) -> int:
        """The row at a position of the endless order."""
        return int(self.rows(np.array([position]))[0])

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The rows at int64 positions of the endless order, int64, same shape."""
        epoch, index = np.divmod(positions.astype(np.int64), np.int64(self.num_rows))
        epoch_key = mix(self._seed + epoch.astype(np.uint64) * np.uint64(_GOLDEN))
        rows = self._permute(index.astype(np.uint64), epoch_key)
        # Each walk ends: the cycle through a value below num_rows comes back below num_rows.
        outside = np.flatnonzero(rows >= self.num_rows)
        while outside.size:
            rows[outside] = self._permute(rows[outside], epoch_key[outside])
            outside = outside[rows[outside] >= self.num_rows]
        return rows.astype(np.int64)

    def _permute(self, values: np.ndarray, key: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._half_mask
        for round_index in range(_ROUNDS):
            round_key = mix(key + np.uint64(round_index + 1))
            left, right = right, left ^ (mix(right + round_key) & self._half_mask)
        return (left << self._half_bits) | right


class MixtureOrder:
    """The endless order of several sets mixed by weight; row ids count through the sets one after the other.

    An epoch has as many rows as all sets together; set k has round(weight_k x epoch) of them, spread evenly, and
    walks its own RowOrder on through its own epochs: a set with a small share goes on where it stopped, a set with a
    large share starts over, and no row of a set comes again before all of its rows have come.

    Args:
        sizes: rows of each set, at least 1 each; at most 3e9 together (int64 products).
        weights: share of each set, above 0; None: by size, which is one RowOrder over all of them.
    """

    def __init__(self, sizes: list[int], weights: list[float] | None, seed: int):
        self.num_rows = sum(sizes)
        assert self.num_rows < 3_000_000_000, self.num_rows
        self._first_ids = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.quotas = [self.num_rows] if weights is None else quotas(self.num_rows, weights)
        orders = [self.num_rows] if weights is None else sizes
        self._orders = [RowOrder(size, derive_seed(seed, k)) for k, size in enumerate(orders)]

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The row ids at int64 positions of the endless order, int64, same shape."""
        epoch, left = np.divmod(positions.astype(np.int64), np.int64(self.num_rows))
        result = np.empty_like(left)
        pending = np.arange(left.size)
        left_total = self.num_rows
        # Two-way splits in turn: of `left_total` places, evenly spread ones belong to set k, the others to later sets.
        for k, quota in enumerate(self.quotas):
            before = left[pending] * quota // left_total
            is_mine = (left[pending] + 1) * quota // left_total > before
            mine = pending[is_mine]
            result[mine] = self._first_ids[k] + self._orders[k].rows(epoch[mine] * quota + before[is_mine])
            pending = pending[~is_mine]
            left[pending] -= before[~is_mine]
            left_total -= quota
            if not left_total:
                break
        return result


def quotas(total: int, weights: list[float]) -> list[int]:
    """`total` places shared out by weight: each share rounded down, what is left to the largest remainders."""
    shares = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(weights)), key=lambda k: (counts[k] - shares[k], k))
    for k in by_remainder[: total - sum(counts)]:
        counts[k] += 1
    return counts
