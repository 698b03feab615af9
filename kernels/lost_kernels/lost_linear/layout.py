"""Where the members of a group lie: side by side in h, in the kept columns and, each padded, in z.

A group are G LOST layers that read the same x. Shapes: M rows, R_g and S_g low-rank and kept channels of member g.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

from torch import Tensor

# The products over R + S = 266 columns took 11.4 and 12.8 ms, over 272 (with zeros) 9.9 and 11.3 ms: 2048 x 1024,
# float32, one core of a Xeon with AVX-512, torch 2.13. On GPUs rows of 16 values keep 16-byte loads aligned.
WIDTH_MULTIPLE = 16


@dataclass(frozen=True)
class Part:
    """Columns of one member: rank and num_kept of them, from `low` on in h, `sparse` in kept and `start` in z."""

    rank: int
    num_kept: int
    low: int
    sparse: int
    start: int

    @cached_property
    def width(self) -> int:
        """Columns of z: [act(h) | kept | 0]."""
        return padded(self.rank + self.num_kept)

    @cached_property
    def sizes(self) -> list[int]:
        """Of the three blocks of z."""
        return [self.rank, self.num_kept, self.width - self.rank - self.num_kept]


def padded(width: int) -> int:
    return width + -width % WIDTH_MULTIPLE


def parts_of(ups: Sequence[Tensor], num_kept: Sequence[int]) -> Sequence[Part]:
    """The members of the group whose up factors, [N_g, R_g], and numbers of kept channels are given."""
    return _parts([up.shape[1] for up in ups], num_kept)


def known_parts_of(ups: Sequence[Tensor], num_kept: Sequence[int]) -> Sequence[Part]:
    """`parts_of`, remembered; not while tracing, where sizes may be symbols."""
    return _known_parts(tuple(up.shape[1] for up in ups), tuple(num_kept))


def columns_of(values: Tensor, start: int, width: int) -> Tensor:
    """values[:, start : start + width], without the cost of a view where that is everything."""
    return values if width == values.shape[1] else values.narrow(1, start, width)


def _parts(ranks: Sequence[int], num_kept: Sequence[int]) -> Sequence[Part]:
    widths = [padded(rank + kept) for rank, kept in zip(ranks, num_kept, strict=True)]
    return [
        Part(*columns)
        for columns in zip(ranks, num_kept, _starts(ranks), _starts(num_kept), _starts(widths), strict=True)
    ]


_known_parts = cache(_parts)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]
