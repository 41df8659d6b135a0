"""The arithmetic of the method: pure functions on lists of tensors that touch the active cells only.

Throughout, ``views`` are tensors of shape (cells,) or (cells, width), ``indices`` int32 or int64 tensors of
shape (m,), and packed tensors hold the active cells of a view, one after the other, as vectors of m * width elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather(views: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """The active cells of each view, packed, in the view's dtype."""
    return [
        # take is the fastest gather of single elements on a CPU, index_select of rows; both differ by 2x.
        view.take(index.long()) if view.ndim == 1 else view.index_select(0, index).flatten()
        for view, index in zip(views, indices, strict=True)
    ]


def gather_(views: Sequence[Tensor], indices: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
    """:func:`gather` into given vectors, in their dtype."""
    for view, index, into in zip(views, indices, packed, strict=True):
        if view.dtype != into.dtype:
            into.copy_(gather([view], [index])[0])
        elif view.ndim == 1:
            torch.take(view, index.long(), out=into)
        else:
            torch.index_select(view, 0, index, out=into.view(-1, view.shape[1]))


def scatter_(views: Sequence[Tensor], indices: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
    """Write packed values (cast to the view's dtype) to the active cells of each view, in place."""
    for view, index, values in zip(views, indices, packed, strict=True):
        cells = values.to(view.dtype)
        if view.ndim == 2:
            cells = cells.view(-1, view.shape[1])
            if view.is_cpu and _in_words(view) and _in_words(cells):
                # On a CPU the copy takes time for each item, whatever its size.
                view, cells = view.view(torch.float64), cells.view(torch.float64)
        view.index_copy_(0, index.long(), cells)


def _in_words(rows: Tensor) -> bool:
    """Whether rows consist of whole, aligned words of 8 bytes."""
    size = rows.element_size()
    return rows.shape[1] * size % 8 == 0 and rows.storage_offset() * size % 8 == 0


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


def end_episode_(
    views: Sequence[Tensor],
    indices: Sequence[Tensor],
    values: Sequence[Tensor],
    anchors: Sequence[Tensor],
    decays: Sequence[float],
) -> None:
    """Move the packed anchors and write them to the active cells of the views: theta = A everywhere."""
    for view, index, value, anchor, decay in zip(
        views, indices, values, anchors, decays, strict=True
    ):
        scatter_([view], [index], [_moved(anchor, value, decay)])


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
