"""A parameter seen as cells: which of them are active in an episode, where they lie, and back.

The only module that knows shapes, strides and storage offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gmixout_optim import shards
from gmixout_optim.index_sets import (
    MAX_CELLS,
    ROUNDING,
    Number,
    Sampler,
    Strata,
    active_cells,
    active_cells_in_block,
    active_cells_in_runs,
    active_count,
    capacity,
    episode_key,
    runs_of_block,
    strata,
    stratified_ordinals,
)
from gmixout_optim.rounding import NARROW
from gmixout_optim.shards import Piece, is_dtensor, local_of

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

    The grid of a piece of a tensor has cells of its own, which are the tensor's or, where its edges
    cut these, parts of them.

    Attributes:
        shape, strides: the tensor's.
        contiguous: whether the strides are those of row-major order.
        outer, cells, inner: the view.
        piece: which part of a whole tensor the tensor is; None for all.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    contiguous: bool
    outer: int
    cells: int
    inner: int
    piece: Piece | None = None

    @classmethod
    def of(cls, tensor: Tensor, granularity: Granularity, piece: Piece | None = None) -> Grid:
        """The grid of a tensor; one that cells do not fit falls back to elements."""
        shape = tuple(tensor.shape)
        if piece is None:
            view = _view_of(shape, granularity)
        else:
            view = _PieceCells.of(piece, granularity).view
        return cls(shape, tensor.stride(), tensor.is_contiguous(), *view, piece)

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

    def numbers_at(self, index: Tensor) -> Tensor:
        """:meth:`elements_at`, in the numbers that the elements have in the whole tensor."""
        number = self.elements_at(index)
        if self.piece is None:
            return number
        shape, offsets, sizes = self.piece
        whole, stride = torch.zeros_like(number), 1
        for dim in reversed(range(len(shape))):
            size = max(1, sizes[dim])
            whole += (number % size + offsets[dim]) * stride
            number = number // size
            stride *= shape[dim]
        return whole

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


View = tuple[int, int, int]


def _view_of(shape: Sequence[int], granularity: Granularity) -> View:
    """A tensor as (outer, cells, inner)."""
    numel = prod(shape)
    outer, inner = 1, 1
    if granularity == "row":
        inner = numel // max(1, shape[0] if shape else 1)
    elif granularity == "column":
        if len(shape) > 1 and shape[0] > 1 and shape[1] >= _LEAST_COLUMNS:
            outer, inner = shape[0], column_block(shape[1]) * prod(shape[2:])
    elif granularity != "element" and numel % granularity == 0:
        inner = granularity
    return outer, numel // max(1, outer * inner), inner


class _PieceCells(NamedTuple):
    """Where the cells of a piece of a tensor come from.

    Attributes:
        shape, offsets, sizes: the piece's cells, as a block of a grid.
        parts: how many consecutive cells of the grid make one cell of the tensor: 1 unless the
            edges of the piece cut cells.
        view: the piece as (outer, cells, inner).
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    parts: int
    view: View

    @classmethod
    def of(cls, piece: Piece, granularity: Granularity) -> _PieceCells:
        shape, offsets, sizes = piece
        outer, cells, inner = _view_of(shape, granularity)
        count = prod(sizes)
        if count == 0:
            return cls((0,), (0,), (0,), 1, (1, 0, 1))
        if granularity == "row":
            return cls(shape[:1], offsets[:1], sizes[:1], 1, (1, sizes[0], count // sizes[0]))
        unit = inner
        if outer > 1:
            unit = shape[1] // cells
            shape, offsets, sizes = shape[1:2], offsets[1:2], sizes[1:2]
            outer = piece.sizes[0]
        else:
            last = max(dim for dim, size in enumerate(sizes) if size < shape[dim] or dim == 0)
            run = prod(shape[last + 1 :])
            shape, offsets, sizes = (
                (*some[:last], some[last] * run) for some in (shape, offsets, sizes)
            )
        ends = shape[-1], offsets[-1], sizes[-1]
        parts = unit if any(end % unit for end in ends) else 1
        shape, offsets, sizes = (
            (*some[:-1], some[-1] * parts // unit) for some in (shape, offsets, sizes)
        )
        own = prod(sizes)
        return cls(shape, offsets, sizes, parts, (outer, own, count // (outer * own)))

    def draw(self, density: float, device: torch.device, **words: Any) -> Tensor:
        """The active cells of the piece, in its own numbers: int32.

        Args:
            words: seed, tensor, episode and sampler of :func:`active_cells`.
        """
        if self.parts == 1:
            return active_cells_in_block(
                self.shape,
                density,
                offsets=self.offsets,
                sizes=self.sizes,
                device=device,
                **words,
            )
        starts, length = runs_of_block(self.shape, self.offsets, self.sizes)
        run, place = active_cells_in_runs(
            prod(self.shape) // self.parts,
            density,
            starts=starts // self.parts,
            length=(length - 1) // self.parts + 2,
            device=device,
            **words,
        )
        before = (starts % self.parts).to(device)[run]
        inside = torch.arange(self.parts, device=device)
        place = (place * self.parts - before)[:, None] + inside
        cell = run[:, None] * length + place
        return cell[(place >= 0) & (place < length)].sort().values.to(torch.int32)


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


class Packing(NamedTuple):
    """How packed values of a rank lie in the vector that a state dict has.

    The vector holds the active values of the whole parameter in the order of its cells. Its size is
    the same in every episode. It is a DTensor where the parameter is one.

    Attributes:
        param: the parameter.
        places: where the rank's values lie, int64; None where it has all of them.
        size: how many values there are.
        room: the size of the vector.
    """

    param: Tensor
    places: Tensor | None
    size: int
    room: int

    def join(self, packed: Tensor) -> Tensor:
        """The vector. Collective where the parameter is a DTensor."""
        if self.places is not None:
            return shards.joined(self.param, packed, self.places, self.room)
        spare = self.room - self.size
        return torch.nn.functional.pad(packed, (0, spare)) if spare else packed

    def fits(self, vector: Tensor) -> bool:
        """Whether it is such a vector; older state dicts have no spare room in them."""
        return vector.shape[0] in (self.size, self.room)

    def part(self, vector: Tensor) -> Tensor:
        """What the rank has of a vector that fits. Collective where that is a DTensor."""
        whole = shards.whole_of(vector)
        if self.places is None:
            return whole[: self.size]
        return whole.to(self.places.device)[self.places]


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
        self.is_distributed = is_dtensor(param)
        self._grid: Grid | None = None
        self._whole: View = (1, 0, 1)
        self._density = 1.0

    @property
    def _held(self) -> Tensor:
        # FSDP2 may replace it.
        return local_of(self.param) if self.is_distributed else self.param

    @property
    def grid(self) -> Grid:
        """Of what this rank holds. One object for as long as shape and strides stay."""
        grid, held = self._grid, self._held
        if grid is None or grid.strides != held.stride() or grid.shape != held.shape:
            grid = self._grid = Grid.of(held, self.granularity, shards.piece_of(self.param))
            self._whole = _view_of(self.param.shape, self.granularity)
            self._density = 1 - self.mask_prob
            if self.sampler == "stratified":
                count = self._whole[1]
                self._density = active_count(count, self._density) / max(1, count)
        return grid

    @property
    def whole(self) -> View:
        """The whole parameter as (outer, cells, inner)."""
        _ = self.grid  # which it belongs to
        return self._whole

    @property
    def count(self) -> int:
        """How many cells the whole parameter has."""
        return self.whole[1]

    @property
    def width(self) -> int:
        """Elements in a cell of the whole parameter."""
        outer, _, inner = self.whole
        return outer * inner

    @property
    def density(self) -> float:
        """d: the share of cells that is drawn, m / N, which differs from 1 - p in small tensors."""
        count = self.count  # which it belongs to
        return self._density if count else 1.0

    @property
    def are_outputs(self) -> bool:
        """Whether a cell holds all weights of an output: it moves by what they all do."""
        return self.granularity == "row" and self.width > 1

    @property
    def fell_back_to_elements(self) -> bool:
        return self.granularity not in ("element", "row", 1) and self.width == 1

    @property
    def local(self) -> Tensor:
        """The weights that this rank holds, sharing the parameter's memory and version."""
        return self._held.detach()

    @property
    def gradient(self) -> Tensor | None:
        """Of these weights."""
        grad = self.param.grad
        return local_of(grad) if self.is_distributed and grad is not None else grad

    @gradient.setter
    def gradient(self, gradient: Tensor | None) -> None:
        grad = self.param.grad
        if is_dtensor(grad) and gradient is not None:
            grad._local_tensor = gradient  # from_local() does not take a tensor subclass
        else:
            self.param.grad = gradient if gradient is None else shards.like(self.param, gradient)

    @property
    def has_own_pieces_as_gradient(self) -> bool:
        """Whether the gradient is in the pieces of the parameter; they may be summands."""
        return not self.is_distributed or shards.are_alike(self.param.grad, self.param)

    def settle_gradient(self) -> None:
        """Bring the gradient into the pieces of the parameter. Collective where it is not."""
        if self.is_distributed:
            self.param.grad = shards.settled(self.param.grad, self.param)

    @property
    def version(self) -> int:
        """Grows with every in-place change of the parameter, but for those in ``.data``."""
        if self.is_distributed:  # writes to the one do not count for the other
            return self.param._version + self._held._version
        return 0 if self.param.is_inference() else self.param._version

    @property
    def placement(self) -> Placement:
        return self._held.device, self._held.stride()

    @property
    def form(self) -> tuple[torch.dtype, torch.Size]:
        return self.param.dtype, self.param.shape

    def view(self) -> Tensor:
        """The weights as :meth:`Grid.view`, sharing their memory."""
        return self.grid.view(self.local)

    def draw(self, seed: int, episode: int) -> Tensor:
        """Where the cells that are active in ``episode`` lie, see :meth:`Grid.address`."""
        grid = self.grid
        if grid.piece is None:
            return grid.address(self._draw_whole(seed, episode))
        block = _PieceCells.of(grid.piece, self.granularity)
        words = dict(seed=seed, tensor=self.number, episode=episode, sampler=self.sampler)
        return grid.address(block.draw(1 - self.mask_prob, self._held.device, **words))

    def _draw_whole(self, seed: int, episode: int) -> Tensor:
        """The active cells of the whole parameter."""
        return active_cells(
            self.count,
            1 - self.mask_prob,
            seed=seed,
            tensor=self.number,
            episode=episode,
            sampler=self.sampler,
            device=self._held.device,
        )

    def strata(self, seed: int, episode: int) -> Strata:
        """What :meth:`draw` draws with the stratified sampler, for somebody else to draw."""
        cells = self.grid.cells
        return strata(cells, 1 - self.mask_prob, seed, self.number, episode, 0, cells)

    def dither(self, seed: int, episode: int) -> Dither | None:
        """The random bits of rounding to the parameter's dtype; None where nothing is rounded."""
        if self.param.dtype not in NARROW:
            return None
        return Dither(episode_key(seed, self.number, episode, ROUNDING), self.grid)

    def packing(self, index: Tensor, seed: int, episode: int) -> Packing:
        """How state dicts have the values of the cells that are active in an episode."""
        room = self.width * capacity(self.count, 1 - self.mask_prob, self.sampler)
        places, size = None, self.grid.size_at(index)
        if self.is_distributed:
            places, size = self._places(index, seed, episode)
        return Packing(self.param, places, size, max(size, room))

    def _places(self, index: Tensor, seed: int, episode: int) -> tuple[Tensor, int]:
        """Where the elements of an index lie in the packed vector of the whole parameter, int64,
        and the size of that."""
        number = self.grid.numbers_at(index)
        outer, cells, inner = self.whole
        cell, density = number // inner % cells, 1 - self.mask_prob
        if self.sampler == "stratified":
            count = active_count(cells, density)
            ordinal = stratified_ordinals(cell, cells, density, seed, self.number, episode)
        else:
            whole = self._draw_whole(seed, episode)
            count, ordinal = whole.shape[0], torch.searchsorted(whole, cell.to(torch.int32))
        row = number // (cells * inner) * count + ordinal
        return row * inner + number % inner, count * outer * inner

    def mask(self, index: Tensor) -> Tensor:
        """What ``index`` addresses of what this rank holds: bool."""
        grid = self.grid
        mask = torch.zeros(prod(grid.shape), dtype=torch.bool, device=index.device)
        mask[grid.elements_at(index)] = True
        return mask.view(grid.shape)
