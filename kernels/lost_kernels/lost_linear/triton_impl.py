"""The functions of `torch_impl` between the matrix products, by Triton kernels.

Shapes: M rows, K in_features, R_g low-rank and S_g kept channels of member g, W_g their padded sum.
"""

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lost_kernels.lost_linear.layout import Part
from lost_kernels.lost_linear.triton_kernels import add_kept, inverse_map, z_backward, z_forward


class Tile(NamedTuple):
    """What a program works on, and its threads: 8 values of 2 bytes each at a time, one vector of 16 bytes."""

    rows: int
    columns: int
    num_threads: int = 128

    @property
    def num_warps(self) -> int:
        return self.num_threads // (64 if torch.version.hip else 32)


# Chosen by registers and vector widths of ahead-of-time compiles for sm_80, sm_90, sm_100 and gfx942; no time on a GPU
# has been measured. There is no autotuning: a captured graph must not be the first call.
TILES = {
    "z_forward": Tile(16, 128),
    # With 16 rows it spilled registers on sm_80.
    "z_backward": Tile(8, 128),
    # With 256 columns it took 72 registers in place of 44.
    "add_kept": Tile(8, 128),
    # Rows are input channels here, and columns kept ones.
    "inverse_map": Tile(64, 32),
}


def joined_activations(
    h: Tensor, kept: Tensor, parts: Sequence[Part], gammas: list[Tensor] | list[float], activation: str
) -> Tensor:
    """z = [gamma act(h_g) | (1 - gamma) kept_g | 0] of every member, [M, sum W_g], in the dtype of h."""
    _check_rows(h, kept)
    z = h.new_empty(h.shape[0], parts[-1].start + parts[-1].width)
    scales = _scales(gammas, h.device)
    tile = TILES["z_forward"]
    with torch.cuda.device_of(h):
        for first, count, part in _runs(parts, h.shape[0]):
            z_forward[(triton.cdiv(h.shape[0], tile.rows), count)](
                h[:, part.low :],
                kept[:, part.sparse :],
                None if scales is None else scales[first:],
                z[:, part.start :],
                h.shape[0],
                h.stride(0),
                kept.stride(0),
                z.stride(0),
                RANK=part.rank,
                NUM_KEPT=part.num_kept,
                WIDTH=part.width,
                ACTIVATION=activation,
                HAS_GAMMA=scales is not None,
                BLOCK_ROWS=tile.rows,
                BLOCK_COLUMNS=_block(part.width, tile),
                num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
            )
    return z


def joined_activations_backward(
    dz: Tensor,
    h: Tensor,
    kept: Tensor,
    parts: Sequence[Part],
    gammas: list[Tensor] | list[float],
    activation: str,
    *,
    needs_gamma: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dh, dkept in the dtype of h, and the gradients of the gammas, float32 [G], if they are needed."""
    _check_rows(h, kept, dz)
    dh, dkept = torch.empty_like(h), torch.empty_like(kept)
    tile = TILES["z_backward"]
    num_blocks = triton.cdiv(h.shape[0], tile.rows)
    d_gammas = h.new_empty(num_blocks, len(parts), dtype=torch.float32) if needs_gamma else None  # pyright: ignore[reportArgumentType]
    scales = _scales(gammas, h.device)
    with torch.cuda.device_of(h):
        for first, count, part in _runs(parts, h.shape[0]):
            z_backward[(num_blocks, count)](
                dz[:, part.start :],
                h[:, part.low :],
                kept[:, part.sparse :],
                None if scales is None else scales[first:],
                dh[:, part.low :],
                dkept[:, part.sparse :],
                None if d_gammas is None else d_gammas[:, first:],
                h.shape[0],
                dz.stride(0),
                h.stride(0),
                kept.stride(0),
                len(parts),
                RANK=part.rank,
                NUM_KEPT=part.num_kept,
                WIDTH=part.width,
                ACTIVATION=activation,
                HAS_GAMMA=scales is not None,
                NEEDS_GAMMA=needs_gamma,
                BLOCK_ROWS=tile.rows,
                BLOCK_COLUMNS=_block(part.rank + part.num_kept, tile),
                num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
            )
    return dh, dkept, None if d_gammas is None else d_gammas.sum(0)


def add_kept_gradients(d_x: Tensor, dkept: Tensor, indices: list[Tensor]) -> None:
    """d_x[:, I_g] += dkept_g for every member, in place."""
    _check_rows(d_x, dkept)
    num_rows, in_features = d_x.shape
    if not num_rows:
        return
    tile = TILES["add_kept"]
    grid = (triton.cdiv(num_rows, tile.rows), triton.cdiv(in_features, tile.columns))
    with torch.cuda.device_of(d_x):
        add_kept[grid](
            d_x,
            dkept,
            inverse_maps(indices, in_features),
            num_rows,
            in_features,
            d_x.stride(0),
            dkept.stride(0),
            NUM_MEMBERS=len(indices),
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
        )


def inverse_maps(indices: list[Tensor], in_features: int) -> Tensor:
    """int32 [members, K]: for every channel the column of the joined kept columns that holds it, or -1."""
    joined = indices[0].contiguous() if len(indices) == 1 else torch.cat(indices)
    inverse = torch.empty(len(indices), in_features, dtype=torch.int32, device=joined.device)
    tile = TILES["inverse_map"]
    first = column = 0
    for num_kept, run in groupby(len(index) for index in indices):
        count = len(list(run))
        inverse_map[(triton.cdiv(in_features, tile.rows), count)](
            joined[column:],
            inverse[first:],
            column,
            in_features,
            NUM_KEPT=num_kept,
            BLOCK_CHANNELS=tile.rows,
            BLOCK_KEPT=tile.columns,
            num_warps=tile.num_warps,  # pyright: ignore[reportCallIssue]
        )
        first, column = first + count, column + count * num_kept
    return inverse


def _runs(parts: Sequence[Part], num_rows: int) -> list[tuple[int, int, Part]]:
    """Neighbours of equal R and S, for one launch each: the number of the first, how many, and the first."""
    found, first = [], 0
    for _, run in groupby(parts, lambda part: (part.rank, part.num_kept)):
        members = list(run)
        found.append((first, len(members), members[0]))
        first += len(members)
    return found if num_rows else []


def _block(width: int, tile: Tile) -> int:
    return min(tile.columns, max(16, triton.next_power_of_2(width)))  # pyright: ignore[reportReturnType]


def _scales(gammas: list[Tensor] | list[float], device: torch.device) -> Tensor | None:
    """The gammas as float32 [G] on the device; None: nothing is scaled."""
    if not gammas:
        return None
    tensors = [gamma for gamma in gammas if isinstance(gamma, Tensor)]
    return torch.cat(tensors).float() if tensors else _constants(tuple(gammas), device)


@cache
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept: a copy from the host in every call would wait for the device.
    return torch.tensor(values, dtype=torch.float32, device=device)


def _check_rows(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dim() == 2, tensor.shape
        assert tensor.shape[0] == tensors[0].shape[0], [each.shape for each in tensors]
        assert tensor.stride(1) == 1 or tensor.shape[1] < 2, tensor.stride()
        assert tensor.device == tensors[0].device
