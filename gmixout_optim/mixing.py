"""The arithmetic of the method: pure functions that touch the active cells only.

Throughout, ``views`` and ``indices`` are those of :class:`gmixout_optim.cells.Grid`: tensors of
shape (cells,), (cells, inner) or (outer, cells, inner), and int32 or int64 tensors of shape (m,).
*Packed* tensors are vectors of the active cells' elements, outer * m * inner of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gmixout_optim.cells import Dither
from gmixout_optim.index_sets import CPU_CHUNK, random_bits
from gmixout_optim.rounding import stochastic_round

# Above this number of cells throughput outweighs call overhead.
_MANY_CELLS = 1 << 9


def gather(view: Tensor, index: Tensor) -> Tensor:
    """The active cells of a view, packed, in its dtype."""
    # On a CPU take is the fastest gather of single elements, index_select of rows, each by 2x.
    if view.ndim == 1:
        return view.take(index.long())
    return view.index_select(view.ndim - 2, index).view(-1)


def gather_gradient(view: Tensor, index: Tensor) -> Tensor:
    """:func:`gather` of a gradient. The sign of a zero may be lost."""
    few = index.shape[0] < _MANY_CELLS
    if few or view.ndim != 2 or view.dtype != torch.float32 or not view.is_cpu:
        return gather(view, index)
    # Sums of bags of one cell: the only kernel that prefetches, 1.5x as fast for blocks of 16.
    bags = torch.arange(index.shape[0], dtype=index.dtype, device=index.device)
    return torch.embedding_bag(view, index, bags)[0].view(-1)


def scatter_(view: Tensor, index: Tensor, packed: Tensor) -> None:
    """Write packed values (cast to the view's dtype) to the active cells of a view, in place."""
    cells = packed if packed.dtype == view.dtype else packed.to(view.dtype)
    if view.ndim == 2:
        cells = cells.view(-1, view.shape[1])
        # On a CPU index_copy_ takes time for each item, whatever its size.
        if index.shape[0] >= _MANY_CELLS and view.is_cpu and _in_words(view) and _in_words(cells):
            view, cells = view.view(torch.float64), cells.view(torch.float64)
    elif view.ndim == 3:
        cells = cells.view(view.shape[0], -1, view.shape[2])
    view.index_copy_(max(0, view.ndim - 2), index.long(), cells)


def _in_words(rows: Tensor) -> bool:
    """Whether rows consist of whole, aligned words of 8 bytes."""
    in_word = 8 // rows.element_size()
    return rows.shape[1] % in_word == rows.storage_offset() % in_word == 0


def narrowed(packed: Tensor, dtype: torch.dtype, index: Tensor, dither: Dither | None) -> Tensor:
    """Packed values rounded stochastically to ``dtype``; without a dither as they are."""
    if dither is None:
        return packed
    in_cell = packed.shape[0] // max(1, index.shape[0])
    cells = max(1, CPU_CHUNK // max(1, in_cell))
    whole = torch.compiler.is_compiling() or not packed.is_cpu or dither.grid.outer > 1
    if whole or index.shape[0] <= cells:
        random = random_bits(dither.key, dither.grid.elements_at(index))
        return stochastic_round(packed, dtype, random)
    pieces = zip(torch.split(packed, cells * in_cell), torch.split(index, cells), strict=True)
    return torch.cat([narrowed(some, dtype, at, dither) for some, at in pieces])


def model_values(anchor: Tensor, value: Tensor, scale: float) -> Tensor:
    """theta = A + s * (phi - A): what the model computes with where the base trains phi.

    Without rescaling (s = 1) that is phi itself, bit for bit. Shape and dtype of ``value``.
    """
    return value if scale == 1 else torch.add(anchor, value - anchor, alpha=scale)


def trained_values(anchor: Tensor, theta: Tensor, scale: float) -> Tensor:
    """phi = A + (theta - A) / s, in shape and dtype of ``anchor``: undoes :func:`model_values`."""
    theta = theta.to(anchor.dtype)
    return theta if scale == 1 else torch.add(anchor, theta - anchor, alpha=1 / scale)


def moved_anchor(anchor: Tensor, value: Tensor, decay: float) -> Tensor:
    """The anchor's step at an episode's end, A <- lam * A + (1 - lam) * theta (arXiv 2510.06982).

    Computed as an interpolation: each result lies between its two ends, is the anchor itself where
    nothing was learned or lam = 1, and the trained value itself, bit for bit, for lam = 0. Shape
    and dtype of ``value``.
    """
    # At its two ends lerp would turn inf into nan.
    if decay == 0:
        return value.clone()
    if decay == 1:
        return anchor.clone()
    return torch.lerp(anchor, value, 1 - decay)


def copy_active_(
    views: Sequence[Tensor], indices: Sequence[Tensor], anchors: Sequence[Tensor]
) -> None:
    """Copy the active cells of each view into its packed anchor, in place."""
    for view, index, anchor in zip(views, indices, anchors, strict=True):
        anchor.copy_(gather(view, index))
