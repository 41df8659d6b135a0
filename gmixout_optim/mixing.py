"""The arithmetic of the method: pure functions that touch the active cells only.

Throughout, ``views`` and ``indices`` are those of :class:`gmixout_optim.cells.Grid`: tensors of
shape (cells,), (cells, inner) or (outer, cells, inner), and int32 or int64 tensors of shape (m,).
*Packed* tensors are vectors of the active cells' elements, outer * m * inner of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gmixout_optim.cells import Dither
from gmixout_optim.index_sets import chunk_on, random_bits
from gmixout_optim.rounding import stochastic_round

# Above this number of cells throughput outweighs call overhead.
_MANY_CELLS = 1 << 9


def gather(view: Tensor, index: Tensor) -> Tensor:
    """The active cells of a view, packed, in its dtype."""
    # On a CPU take is the fastest gather of single elements, index_select of rows, each by 2x. On a
    # GPU an int32 index spares a launch.
    if view.ndim == 1 and view.is_cpu:
        return view.take(index.long())
    if view.ndim == 1:
        return view.index_select(0, index)
    view, index = flat(view, index)
    return view.index_select(0, index).view(-1)


def gather_gradient(view: Tensor, index: Tensor) -> Tensor:
    """:func:`gather` of a gradient. The sign of a zero may be lost."""
    if view.ndim == 1 or view.dtype != torch.float32 or not view.is_cpu:
        return gather(view, index)
    view, index = flat(view, index)
    if index.shape[0] < _MANY_CELLS:
        return gather(view, index)
    # Sums of bags of one cell: the only kernel that prefetches, 1.5x as fast for blocks of 16.
    bags = torch.arange(index.shape[0], dtype=index.dtype, device=index.device)
    return torch.embedding_bag(view, index, bags)[0].view(-1)


def scatter_(view: Tensor, index: Tensor, packed: Tensor) -> None:
    """Write packed values (cast to the view's dtype) to the active cells of a view, in place."""
    cells = packed if packed.dtype == view.dtype else packed.to(view.dtype)
    if view.ndim > 1:
        view, index = flat(view, index)
        cells = cells.view(-1, view.shape[1])
        # On a CPU index_copy_ takes time for each item, whatever its size.
        if index.shape[0] >= _MANY_CELLS and view.is_cpu and _in_words(view) and _in_words(cells):
            view, cells = view.view(torch.float64), cells.view(torch.float64)
    if view.is_cpu or not torch.are_deterministic_algorithms_enabled():
        view.index_copy_(0, index.long(), cells)
        return
    with without_sorting():
        view.index_copy_(0, index.long(), cells)


@contextmanager
def without_sorting() -> Iterator[None]:
    """Inside the block deterministic algorithms are off.

    With them torch sorts what a scatter on a GPU writes. Unique indices have no order to keep.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def flat(view: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """A view of (outer, cells, inner), and an index of it, as (outer * cells, inner).

    Others stay as they are. On a CPU torch moves the rows of a matrix twice as fast as slices along
    its middle.
    """
    if view.ndim < 3:
        return view, index
    outer, cells, inner = view.shape
    start = torch.arange(0, outer * cells, cells, device=index.device)
    return view.view(-1, inner), (start[:, None] + index).view(-1)


def _in_words(rows: Tensor) -> bool:
    """Whether rows consist of whole, aligned words of 8 bytes."""
    in_word = 8 // rows.element_size()
    return rows.shape[1] % in_word == rows.storage_offset() % in_word == 0


def narrowed(packed: Tensor, dtype: torch.dtype, index: Tensor, dither: Dither | None) -> Tensor:
    """Packed values rounded stochastically to ``dtype``; without a dither as they are."""
    if dither is None:
        return packed
    number = dither.grid.numbers_at(index)
    size = max(1, packed.shape[0])
    if not torch.compiler.is_compiling():
        size = chunk_on(packed.device)
    pieces = [
        stochastic_round(some, dtype, random_bits(dither.key, at))
        for some, at in zip(torch.split(packed, size), torch.split(number, size), strict=True)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


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


def moved_anchors(
    anchors: Sequence[Tensor], values: Sequence[Tensor], decays: Sequence[float]
) -> list[Tensor]:
    """:func:`moved_anchor` of many tensors, to the last bit, in few launches."""
    moved = [
        moved_anchor(anchor, value, decay) if decay in (0, 1) else value
        for anchor, value, decay in zip(anchors, values, decays, strict=True)
    ]
    for decay in set(decays) - {0, 1}:
        places = [place for place, each in enumerate(decays) if each == decay]
        starts, ends = [anchors[place] for place in places], [values[place] for place in places]
        for place, anchor in zip(places, torch._foreach_lerp(starts, ends, 1 - decay), strict=True):
            moved[place] = anchor
    return moved
