"""A parameter seen as cells: which of them are active in an episode, where they lie, and back.

The only module that knows shapes, strides and storage offsets.
"""

from __future__ import annotations

from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gmixout_optim.index_sets import (
    MAX_CELLS,
    ROUNDING,
    Number,
    Sampler,
    Strata,
    active_cells,
    active_count,
    episode_key,
    strata,
)
from gmixout_optim.rounding import NARROW

Granularity = Literal["element", "column", "row"] | int

# Device and strides of a parameter.
Placement = tuple[torch.device, tuple[int, ...]]

# Index sets of tensors with so few cells (biases, norms) are kept as int64: it takes little memory,
# and torch's kernels want int64.
_FEW_CELLS = 1 << 14

# Columns are taken in blocks, so that memory is contiguous, of which so many remain: fewer and
# larger ones learn less well (docs/method.md has the figures). With fewer columns than the least a
# drawn set would be far from a share d of them.
_WIDEST_BLOCK, _COLUMN_BLOCKS, _LEAST_COLUMNS = 16, 48, 32


class Grid(NamedTuple):
    """The cells of a tensor, which is seen as (outer, cells, inner) and selected along the middle.

    Elements have outer = inner = 1, blocks of b and rows outer = 1. Columns are those of all rows:
    outer is the number of rows, inner the size of the kernel times that of the block. Cells are
    numbered in row-major order, and so are elements. *Packed* tensors hold the elements of some
    cells in the order (outer, cell, inner), whatever the memory format.

    Attributes:
        shape, strides: the tensor's.
        contiguous: whether the strides are those of row-major order.
        outer, cells, inner: the view.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    contiguous: bool
    outer: int
    cells: int
    inner: int

    @classmethod
    def of(cls, tensor: Tensor, granularity: Granularity) -> Grid:
        """The grid of a tensor; one that cells do not fit falls back to elements."""
        shape, numel = tensor.shape, tensor.numel()
        outer, inner = 1, 1
        if granularity == "row":
            inner = numel // max(1, shape[0] if shape else 1)
        elif granularity == "column":
            if len(shape) > 1 and shape[0] > 1 and shape[1] >= _LEAST_COLUMNS:
                outer, inner = shape[0], column_block(shape[1]) * prod(shape[2:])
        elif granularity != "element" and numel % granularity == 0:
            inner = granularity
        cells = numel // max(1, outer * inner)
        return cls(tuple(shape), tensor.stride(), tensor.is_contiguous(), outer, cells, inner)

    @property
    def width(self) -> int:
        """Elements in a cell."""
        return self.outer * self.inner

    def address(self, cell: Tensor) -> Tensor:
        """Where cells lie in :meth:`view`: an index along its cells.

        A contiguous tensor is indexed by cell. Any other is indexed by the storage offset of each
        element.
        """
        if self.contiguous:
            return cell.to(self.address_dtype)
        number = self._elements(cell)
        offset = torch.zeros_like(number)
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            offset += number % size * stride
            number = number // size
        return offset.to(self.address_dtype)

    @property
    def address_dtype(self) -> torch.dtype:
        """Of :meth:`address`: int32 where there are many indices and they fit."""
        if self.contiguous:
            is_long = self.width > 1 or self.cells <= _FEW_CELLS
        else:
            is_long = self._extent() > MAX_CELLS
        return torch.int64 if is_long else torch.int32

    def offsets_at(self, index: Tensor) -> Tensor:
        """Where the elements of an index of :meth:`address` lie in :meth:`view`, flattened."""
        return self._elements(index) if self.contiguous else index.long()

    def elements_at(self, index: Tensor) -> Tensor:
        """The inverse of :meth:`address`: the numbers (int64) of the elements, packed."""
        if self.contiguous:
            return self._elements(index)
        offset = index.long()
        number = torch.zeros_like(offset)
        dims = [dim for dim, size in enumerate(self.shape) if size > 1]
        for dim in sorted(dims, key=lambda dim: -self.strides[dim]):
            number = number + offset // self.strides[dim] * prod(self.shape[dim + 1 :])
            offset = offset % self.strides[dim]
        return number

    def cells_at(self, index: Tensor) -> Tensor:
        """The numbers (int64) of the cells that an index of :meth:`address` addresses."""
        if self.contiguous:
            return index.long()
        numbers = self.elements_at(index).view(self.outer, -1, self.inner)
        return numbers[0, :, 0] // self.inner

    def size_at(self, index: Tensor) -> int:
        """How many elements an index of :meth:`address` addresses."""
        return index.shape[0] * (self.width if self.contiguous else 1)

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor of the grid's shape as the view that :meth:`address` indexes.

        Of shape (cells,), (cells, inner) or (outer, cells, inner). Shares the tensor's memory where
        the strides are the grid's; a gradient with other strides is copied.
        """
        if not self.contiguous:
            if tensor.stride() != self.strides:
                tensor = self.copy(tensor)
            return tensor.as_strided((self._extent(),), (1,))
        if self.outer > 1:
            return tensor.reshape(self.outer, self.cells, self.inner)
        return tensor.reshape(-1) if self.inner == 1 else tensor.reshape(self.cells, self.inner)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor of the grid's shape with the grid's strides."""
        like = torch.empty_strided(
            self.shape, self.strides, dtype=tensor.dtype, device=tensor.device
        )
        return like.copy_(tensor.detach())

    def _elements(self, cell: Tensor) -> Tensor:
        number = cell.long()
        if self.inner > 1:
            inside = torch.arange(self.inner, device=cell.device)
            number = (number[:, None] * self.inner + inside).flatten()
        if self.outer > 1:
            start = torch.arange(self.outer, device=cell.device) * (self.cells * self.inner)
            number = (start[:, None] + number).flatten()
        return number

    def _extent(self) -> int:
        """Elements of storage from the tensor's first to its last."""
        sizes = zip(self.shape, self.strides, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in sizes)


def column_block(columns: int) -> int:
    """How many columns make a cell: a power of two, the larger the wider the tensor."""
    block = 1
    while 2 * block <= _WIDEST_BLOCK and columns % (2 * block) == 0:
        if columns // (2 * block) < _COLUMN_BLOCKS:
            break
        block *= 2
    return block


def memory_of(tensor: Tensor) -> tuple[int, int, int] | None:
    """Which storage a tensor lies in, and from where to where; None for none, or one with gaps."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_meta or not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return None
    storage = tensor.untyped_storage().data_ptr()  # 0 where the memory was freed
    start, count = int(tensor.storage_offset()), tensor.numel()
    return (storage, start, start + count) if storage and count else None


class Dither(NamedTuple):
    """The random bits that round a tensor's elements in an episode.

    They are a function of the key and of an element's number, whatever the memory format.

    Attributes:
        key: of :func:`gmixout_optim.index_sets.random_bits`.
        grid: the tensor's.
    """

    key: Number
    grid: Grid


class Cells:
    """The cells of one parameter.

    Args:
        param: the model's own parameter. What is read and written is fetched from it at each call,
            so it may move and, before it is trained, change its shape.
        number: its number in the optimizer, which selects its random stream.
        granularity: ``"element"``, ``"column"``, ``"row"`` or a number of consecutive elements.
        mask_prob: p.
        sampler: how active cells are drawn.
    """

    def __init__(
        self,
        param: Tensor,
        number: int,
        granularity: Granularity,
        mask_prob: float,
        sampler: Sampler,
    ) -> None:
        self.param = param
        self.number = number
        self.granularity = granularity
        self.mask_prob = mask_prob
        self.sampler = sampler
        self._grid: Grid | None = None
        self._density = 1.0

    @property
    def grid(self) -> Grid:
        """One object for as long as shape and strides stay."""
        grid, param = self._grid, self.param
        if grid is None or grid.strides != param.stride() or grid.shape != param.shape:
            grid = self._grid = Grid.of(param, self.granularity)
            self._density = 1 - self.mask_prob
            if self.sampler == "stratified":
                self._density = active_count(grid.cells, self._density) / max(1, grid.cells)
        return grid

    @property
    def density(self) -> float:
        """d: the share of cells that is drawn, m / N, which differs from 1 - p in small tensors."""
        grid = self.grid  # which it belongs to
        return self._density if grid.cells else 1.0

    @property
    def are_outputs(self) -> bool:
        """Whether a cell holds all weights of an output: it moves by what they all do."""
        return self.granularity == "row" and self.grid.inner > 1

    @property
    def fell_back_to_elements(self) -> bool:
        return self.granularity not in ("element", "row", 1) and self.grid.width == 1

    @property
    def local(self) -> Tensor:
        """The weights, sharing the parameter's memory and version."""
        return self.param.detach()

    @property
    def gradient(self) -> Tensor | None:
        return self.param.grad

    @property
    def version(self) -> int:
        """Grows with every in-place change of the parameter, but for those in ``.data``."""
        return 0 if self.param.is_inference() else self.param._version

    @property
    def placement(self) -> Placement:
        return self.param.device, self.param.stride()

    @property
    def form(self) -> tuple[torch.dtype, torch.Size]:
        return self.param.dtype, self.param.shape

    def view(self) -> Tensor:
        """The weights as :meth:`Grid.view`, sharing their memory."""
        return self.grid.view(self.local)

    def draw(self, seed: int, episode: int) -> Tensor:
        """Where the cells that are active in ``episode`` lie, see :meth:`Grid.address`."""
        grid = self.grid
        cell = active_cells(
            grid.cells,
            1 - self.mask_prob,
            seed=seed,
            tensor=self.number,
            episode=episode,
            sampler=self.sampler,
            device=self.param.device,
        )
        return grid.address(cell)

    def strata(self, seed: int, episode: int) -> Strata:
        """What :meth:`draw` draws with the stratified sampler, for somebody else to draw."""
        cells = self.grid.cells
        return strata(cells, 1 - self.mask_prob, seed, self.number, episode, 0, cells)

    def dither(self, seed: int, episode: int) -> Dither | None:
        """The random bits of rounding to the parameter's dtype; None where nothing is rounded."""
        if self.param.dtype not in NARROW:
            return None
        return Dither(episode_key(seed, self.number, episode, ROUNDING), self.grid)

    def mask(self, index: Tensor) -> Tensor:
        """What ``index`` addresses: bool, of the parameter's shape."""
        grid = self.grid
        mask = torch.zeros(prod(grid.shape), dtype=torch.bool, device=index.device)
        mask[grid.elements_at(index)] = True
        return mask.view(grid.shape)
