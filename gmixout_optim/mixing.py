"""The arithmetic of the method: pure functions on lists of tensors that touch the active cells only.

Throughout, ``views`` are tensors of shape (cells,) or (cells, width), ``indices`` int32 or int64 tensors of
shape (m,), and packed tensors hold the active cells of a view, one after the other, as vectors of m * width elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gmixout_optim.index_sets import CPU_CHUNK, random_bits
from gmixout_optim.rounding import Dither, stochastic_round

# From here on a kernel's speed counts for more than its call's.
_MANY_CELLS = 1 << 9


def gather(views: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """The active cells of each view, packed, in the view's dtype."""
    return [gather_one(view, index) for view, index in zip(views, indices, strict=True)]


def gather_one(view: Tensor, index: Tensor) -> Tensor:
    # take is the fastest gather of single elements on a CPU, index_select of rows; both differ by 2x.
    return view.take(index.long()) if view.ndim == 1 else view.index_select(0, index).view(-1)


def gather_gradient(view: Tensor, index: Tensor) -> Tensor:
    """:func:`gather` of one gradient. The sign of a zero may be lost."""
    few = index.shape[0] < _MANY_CELLS
    if few or view.ndim == 1 or view.dtype != torch.float32 or not view.is_cpu:
        return gather_one(view, index)
    # Sums of bags of one cell: of torch's kernels the one that fetches ahead, 1.5 times as fast for blocks of 16.
    bags = torch.arange(index.shape[0], dtype=index.dtype)
    return torch.embedding_bag(view, index, bags)[0].view(-1)


def scatter_(views: Sequence[Tensor], indices: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
    """Write packed values (cast to the view's dtype) to the active cells of each view, in place."""
    for view, index, values in zip(views, indices, packed, strict=True):
        cells = values if values.dtype == view.dtype else values.to(view.dtype)
        if view.ndim == 2:
            width = view.shape[1]
            cells = cells.view(-1, width)
            # On a CPU the copy takes time for each item, whatever its size: rows of whole words go as words.
            if (
                index.shape[0] >= _MANY_CELLS
                and view.is_cpu
                and _in_words(view)
                and _in_words(cells)
            ):
                view, cells = view.view(torch.float64), cells.view(torch.float64)
        view.index_copy_(0, index if index.dtype == torch.int64 else index.long(), cells)


def _in_words(rows: Tensor) -> bool:
    """Whether rows consist of whole, aligned words of 8 bytes."""
    in_word = 8 // rows.element_size()
    return rows.shape[1] % in_word == rows.storage_offset() % in_word == 0


def narrowed(
    views: Sequence[Tensor],
    indices: Sequence[Tensor],
    packed: Sequence[Tensor],
    dithers: Sequence[Dither | None],
) -> list[Tensor]:
    """Packed values rounded stochastically to the dtype of each view, where there is a dither."""
    return [
        values if dither is None else _rounded(values, view.dtype, index, dither)
        for view, index, values, dither in zip(views, indices, packed, dithers, strict=True)
    ]


def _rounded(values: Tensor, dtype: torch.dtype, index: Tensor, dither: Dither) -> Tensor:
    in_cell = values.shape[0] // max(1, index.shape[0])
    cells = max(1, CPU_CHUNK // max(1, in_cell))
    if torch.compiler.is_compiling() or not values.is_cpu or index.shape[0] <= cells:
        return stochastic_round(values, dtype, random_bits(dither.key, dither.places(index)))
    pieces = zip(torch.split(values, cells * in_cell), torch.split(index, cells), strict=True)
    return torch.cat([_rounded(some, dtype, at, dither) for some, at in pieces])


def model_values(
    anchors: Sequence[Tensor], values: Sequence[Tensor], scales: Sequence[float]
) -> list[Tensor]:
    """theta = A + s * (phi - A): what the model computes with where the wrapped optimizer trains phi.

    Without rescaling (s = 1) that is phi itself, bit for bit. Shapes and dtypes of ``values``.
    """
    return [
        value if scale == 1 else torch.add(anchor, value - anchor, alpha=scale)
        for anchor, value, scale in zip(anchors, values, scales, strict=True)
    ]


def moved_anchors(
    anchors: Sequence[Tensor], values: Sequence[Tensor], decays: Sequence[float]
) -> list[Tensor]:
    """The anchor's step at an episode's end, A <- lam * A + (1 - lam) * theta (arXiv 2510.06982).

    Computed as an interpolation: each result lies between its two ends, is the anchor itself where nothing
    was learned or lam = 1, and the trained value itself, bit for bit, for lam = 0. Shapes and dtypes of
    ``values``.
    """
    return [_moved(*ends) for ends in zip(anchors, values, decays, strict=True)]


def _moved(anchor: Tensor, value: Tensor, decay: float) -> Tensor:
    # At its two ends lerp would turn inf into nan.
    if decay == 0:
        return value.clone()
    if decay == 1:
        return anchor.clone()
    return torch.lerp(anchor, value, 1 - decay)


def begin_episode_(
    views: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    anchors: Sequence[Tensor],
) -> None:
    """Take the active cells of the views as packed anchors and as the values to train, in place."""
    for active, value, anchor in zip(gather(views, indices), values, anchors, strict=True):
        anchor.copy_(active)
        value.copy_(active)
