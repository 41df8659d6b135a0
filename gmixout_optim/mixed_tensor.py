"""A parameter seen as cells: granularity, memory layout and the cells that are active."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gmixout_optim.bases import scaled_lr
from gmixout_optim.index_sets import (
    MAX_CELLS,
    Sampler,
    active_cells,
    elements,
    stratified_cells,
)

Granularity = Literal["element", "row"] | int

# Tensors of so few cells (biases, norms) take no memory to speak of.
_FEW_CELLS = 1 << 14


def cell_grid(shape: torch.Size, granularity: Granularity) -> tuple[int, int]:
    """``(cells, width)``: how many cells a tensor of ``shape`` has, and how many elements each.

    A cell is one element, an output row or filter (a slice of the first dimension), or ``granularity``
    consecutive elements in row-major order. A tensor that blocks do not divide falls back to elements.
    """
    numel = shape.numel()
    if granularity == "row":
        cells = shape[0] if shape else 1
        return cells, numel // cells
    width = 1 if granularity == "element" or numel % granularity else granularity
    return numel // width, width


@dataclass(eq=False)
class MixedTensor:
    """One mixed parameter: its place in the optimizer and the way it is cut into cells.

    Attributes:
        param: the model's own parameter.
        group: its parameter group, read for the live ``anchor_decay``.
        number: its number in the optimizer, which selects its random stream.
        name: its name, or its number in words where the base has no names.
        mask_prob: p.
        granularity: as it was asked for.
        rescale: whether the model sees what is learned s = 1 / (1 - p) times as large.
        lr_scale: how many times the group's learning rate it trains with, once an episode is warm.
        run: the run's settings and how far it is, read for the steps taken in the episode.
        cells, width: number of cells, and elements in each.
    """

    param: Tensor
    group: dict[str, Any]
    number: int
    name: str
    mask_prob: float
    granularity: Granularity
    rescale: bool
    lr_scale: float
    run: dict[str, Any]
    cells: int = field(init=False)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.cells, self.width = cell_grid(self.param.shape, self.granularity)

    @property
    def density(self) -> float:
        """d."""
        return 1 - self.mask_prob

    @property
    def scale(self) -> float:
        """s."""
        return 1 / self.density if self.rescale else 1.0

    @property
    def anchor_decay(self) -> float:
        """lam, live from the parameter group."""
        decay: float = self.group["anchor_decay"]
        return decay

    @property
    def rate(self) -> float:
        """How many times its group's learning rate it trains with in the step that comes."""
        taken: int = self.run["steps_in_episode"]
        warmup: int = self.run["episode_warmup"]
        return self.lr_scale * min(1.0, (taken + 1) / max(1, warmup))

    @property
    def options(self) -> dict[str, Any]:
        """The group as the base is shown it for this tensor: with the learning rate that it trains with."""
        if "lr" not in self.group:
            return self.group
        return {**self.group, "lr": scaled_lr(self.group["lr"], self.rate)}

    @property
    def fell_back_to_elements(self) -> bool:
        return isinstance(self.granularity, int) and self.granularity != self.width

    def draw(
        self,
        seed: int,
        episode: int,
        sampler: Sampler,
        kernel: Callable[..., Tensor] = stratified_cells,
    ) -> Tensor:
        """The active cells in ``episode``: int32, sorted, on the parameter's device."""
        return active_cells(
            self.cells,
            self.density,
            seed=seed,
            tensor=self.number,
            episode=episode,
            sampler=sampler,
            device=self.param.device,
            kernel=kernel,
        )

    def address(self, cell: Tensor) -> Tensor:
        """Where the cells lie in :meth:`view` of the parameter.

        In a contiguous parameter that is the cell index itself. In any other it is one storage offset for each
        element of the cells, still in row-major order of the tensor, so that packed vectors do not depend on
        the memory format.
        """
        if self.param.is_contiguous():
            # torch's kernels want int64. It is kept where that takes no memory to speak of.
            return cell.long() if self.width > 1 or self.cells <= _FEW_CELLS else cell
        element = self.elements(cell)
        offset = torch.zeros_like(element)
        for size, stride in zip(
            reversed(self.param.shape), reversed(self.param.stride()), strict=True
        ):
            offset += element % size * stride
            element = element // size
        return offset if self._extent() > MAX_CELLS else offset.to(torch.int32)

    def elements(self, cell: Tensor) -> Tensor:
        """The row-major indices (int64) of the elements of each cell, cell after cell."""
        return elements(cell, self.width)

    def elements_at(self, index: Tensor) -> int:
        """How many elements an index of :meth:`address` addresses."""
        return index.shape[0] * (self.width if self.param.is_contiguous() else 1)

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as rows that :meth:`address` indexes.

        Shares the tensor's memory where its strides are the parameter's; a gradient with other strides is
        copied.
        """
        if torch.is_grad_enabled():
            tensor = tensor.detach()
        if self.param.is_contiguous():
            return tensor.reshape(-1) if self.width == 1 else tensor.reshape(self.cells, self.width)
        if tensor.stride() != self.param.stride():
            tensor = self.copy_of(tensor)
        return tensor.as_strided((self._extent(),), (1,))

    def _extent(self) -> int:
        """Elements of storage from the parameter's first to its last."""
        sizes = zip(self.param.shape, self.param.stride(), strict=True)
        return 1 + sum((size - 1) * stride for size, stride in sizes)

    def copy_of(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor of the parameter's shape with the parameter's strides, so that views share its memory."""
        return torch.empty_strided(
            self.param.shape, self.param.stride(), dtype=tensor.dtype, device=tensor.device
        ).copy_(tensor.detach())

    def mask(self, cell: Tensor) -> Tensor:
        """The active cells as a bool tensor of the parameter's shape."""
        flat = torch.zeros(self.cells, 1, dtype=torch.bool, device=cell.device)
        flat[cell.long()] = True
        return flat.expand(self.cells, self.width).reshape(self.param.shape)
