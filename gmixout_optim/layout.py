"""Where the wrapped optimizer works, and what a mixed tensor keeps while an episode runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim import mixing
from gmixout_optim.bases import Closure
from gmixout_optim.index_sets import ROUNDING, episode_key
from gmixout_optim.mixed_tensor import MixedTensor
from gmixout_optim.rounding import NARROW, Dither

# Where state and groups keep what is the wrapper's: tensors in the state and scalars in the groups, so that tools
# which know torch's format (torch.distributed.checkpoint) keep them.
KEY = "gmixout"


class Draws:
    """What is random in a run, by tensor: pure functions of its seed and its counters.

    Args:
        run: the run's settings and how far it is.
    """

    def __init__(self, run: dict[str, Any]) -> None:
        self.run = run

    def cells(self, tensor: MixedTensor, *kernel: Callable[..., Tensor]) -> Tensor:
        """The active cells in the running episode; ``kernel`` is a compiled form of the sampler."""
        return self._cells(tensor, self.run["episode"], *kernel)

    def previous_cells(self, tensor: MixedTensor) -> Tensor:
        return self._cells(tensor, self.run["episode"] - 1)

    def dither(self, tensor: MixedTensor) -> Dither | None:
        """The random bits of a tensor's rounding in the running episode; None for rounding to nearest."""
        if not self.run["stochastic_rounding"] or tensor.param.dtype not in NARROW:
            return None
        key = episode_key(self.run["seed"], tensor.number, self.run["episode"], ROUNDING)
        return Dither(key, tuple(tensor.param.shape), tensor.param.stride(), tensor.width)

    def _cells(self, tensor: MixedTensor, episode: int, *kernel: Callable[..., Tensor]) -> Tensor:
        return tensor.draw(self.run["seed"], episode, self.run["sampler"], *kernel)


@dataclass(eq=False)
class Slot:
    """What one mixed tensor keeps in the running episode.

    Attributes:
        index: int32 or int64, where the active cells lie in the parameter's view. Never saved: the seed gives it again.
        value: what the wrapped optimizer trains (phi, or U), packed or dense as the layout says.
        anchor: A, packed on the active cells or dense as the layout says.
        placement: device and strides of the parameter that the tensors were made for.
        form: its dtype and shape, which must not change.
    """

    index: Tensor
    value: Tensor
    anchor: Tensor
    placement: tuple[torch.device, tuple[int, ...]]
    form: tuple[torch.dtype, torch.Size]


Row = tuple[MixedTensor, Slot]


def columns(
    rows: list[Row],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Views, indices, values and anchors, as :mod:`gmixout_optim.mixing` takes them."""
    return (
        [tensor.view(tensor.param) for tensor, _ in rows],
        [slot.index for _, slot in rows],
        [slot.value for _, slot in rows],
        [slot.anchor for _, slot in rows],
    )


class Layout(ABC):
    """The steps of the method for one way to hold the trained values.

    A tensor has a slot from its first gradient on. Without one it was never trained: it sits at its anchor,
    and there is nothing to keep.
    """

    def __init__(self, base: Optimizer, draws: Draws) -> None:
        self.base = base
        self.draws = draws
        self.slots: dict[MixedTensor, Slot] = {}
        self._is_apart = False

    @abstractmethod
    def open(self, tensor: MixedTensor) -> Slot:
        """The slot of a tensor whose theta = A, in the running episode."""

    @abstractmethod
    def step(self, tensors: Iterable[MixedTensor], closure: Closure | None) -> Any:
        """One step of the base; afterwards the model computes with theta. Returns the closure's loss."""

    @abstractmethod
    def end_episode(self) -> None:
        """Move the anchors toward the trained values."""

    @abstractmethod
    def begin_episode(self, carry_state: bool) -> None:
        """Take the redrawn index sets into use."""

    @abstractmethod
    def reanchor(self) -> None:
        """Take the weights now in the model as the anchor. An episode begins after it."""

    @abstractmethod
    def deployed(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        """The weights to deploy, where they can differ from the live ones: as :meth:`live` holds them."""

    def live(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        """A copy of the part of the live weights that :meth:`show` writes: the active ones, packed."""
        (weights,) = mixing.gather([tensor.view(tensor.param)], [slot.index])
        return weights

    def show(self, tensor: MixedTensor, slot: Slot, weights: Tensor) -> None:
        """Write what :meth:`live` or :meth:`deployed` gave into the model."""
        mixing.scatter_([tensor.view(tensor.param)], [slot.index], [weights])

    @abstractmethod
    def write_theta(self, tensor: MixedTensor, slot: Slot, into: Tensor | None = None) -> None:
        """Make the parameter, or a tensor like it, hold the live weights again, from what is kept of them."""

    def theta(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        """A copy of the parameter with the live weights as they were written to it."""
        copy = tensor.copy_of(tensor.param)
        self.write_theta(tensor, slot, copy)
        return copy

    @abstractmethod
    def dense_anchor(self, tensor: MixedTensor) -> Tensor:
        """A copy of the anchor with the parameter's shape and dtype."""

    @abstractmethod
    def displacement(self, tensor: MixedTensor, slot: Slot) -> tuple[Tensor, Tensor]:
        """What has been learned on the active cells and the anchor there: (theta - A, A), packed."""

    @abstractmethod
    def restored(self, tensor: MixedTensor, index: Tensor, saved: dict[str, Tensor]) -> Slot:
        """A slot from the tensors of a checkpoint. Raises ValueError where they do not fit."""

    @abstractmethod
    def take_over(self, tensor: MixedTensor) -> None:
        """Bring a state that the base already has of a tensor into the layout's form."""

    def used_gradient(self, tensor: MixedTensor) -> Tensor:
        """The gradient with respect to the trained values on the active cells, packed."""
        check_gradient(tensor)
        assert tensor.param.grad is not None
        active = self.active_gradient(tensor, tensor.param.grad)
        return active if tensor.scale == 1 else active * tensor.scale

    def active_gradient(self, tensor: MixedTensor, grad: Tensor) -> Tensor:
        """The part of a gradient on the active cells, packed."""
        (active,) = mixing.gather([tensor.view(grad)], [self.index_of(tensor)])
        return active

    def index_of(self, tensor: MixedTensor) -> Tensor:
        """Where the active cells lie. Of a tensor without slot nothing else is read, and it stays without."""
        if tensor in self.slots:
            return self.slot(tensor).index
        return tensor.address(self.draws.cells(tensor))

    def restore(self, slots: dict[MixedTensor, Slot]) -> None:
        """Take the slots of a checkpoint."""
        self.slots = slots

    @contextmanager
    def apart(self) -> Iterator[None]:
        """The base's state without the wrapper's entries, while the base or its state is worked on.

        Outside, ``state[param]["gmixout"]`` shows the slot: tools that walk an optimizer's state find all of it.
        """
        if self._is_apart:
            yield
            return
        state = self.base.state
        self._is_apart = True
        for tensor in self.slots:
            entry = state.get(tensor.param)
            if entry is not None:
                entry.pop(KEY, None)
                if not entry:
                    del state[tensor.param]
        try:
            yield
        finally:
            self._is_apart = False
            for tensor, slot in self.slots.items():
                state[tensor.param][KEY] = {"value": slot.value, "anchor": slot.anchor}

    def open_slots(self) -> Iterator[tuple[MixedTensor, Slot]]:
        for tensor in list(self.slots):
            yield tensor, self.slot(tensor)

    def trained_slot(self, tensor: MixedTensor) -> Slot | None:
        """The tensor's slot where it has one."""
        return self.slot(tensor) if tensor in self.slots else None

    def slot(self, tensor: MixedTensor) -> Slot:
        """The tensor's slot, opened at its first use and moved to wherever its parameter has gone."""
        slot = self.slots.get(tensor)
        placement = placement_of(tensor.param)
        if slot is None:
            slot = self.slots[tensor] = self.open(tensor)
        elif slot.form != form_of(tensor.param):
            raise RuntimeError(
                f"{tensor.name} was {slot.form[0]} of shape {tuple(slot.form[1])} and is {tensor.param.dtype} of shape "
                f"{tuple(tensor.param.shape)} now: convert the model before its optimizer is built"
            )
        elif slot.placement != placement:
            slot = self.slots[tensor] = replace(
                slot,
                index=tensor.address(self.draws.cells(tensor)),
                value=_placed(tensor, slot.value),
                anchor=_placed(tensor, slot.anchor),
                placement=placement,
            )
            state = self.base.state.get(tensor.param, {})
            for key, item in state.items():
                if isinstance(item, Tensor) and item.ndim > 0:
                    state[key] = item.to(placement[0])
        return slot


def placement_of(param: Tensor) -> tuple[torch.device, tuple[int, ...]]:
    return param.device, param.stride()


def form_of(param: Tensor) -> tuple[torch.dtype, torch.Size]:
    return param.dtype, param.shape


def _placed(tensor: MixedTensor, item: Tensor) -> Tensor:
    """A packed or dense tensor on the parameter's device, a dense one with the parameter's strides."""
    item = item.to(tensor.param.device)
    return tensor.copy_of(item) if item.shape == tensor.param.shape else item


def check_gradient(tensor: MixedTensor) -> None:
    """Raise where a gradient cannot be masked, before anything is changed."""
    grad = tensor.param.grad
    if grad is not None and grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {tensor.name} is sparse ({grad.layout}), which cannot be mixed: build the layer with "
            "dense gradients (torch.nn.Embedding(..., sparse=False)) or exclude the parameter"
        )


def fitting(saved: dict[str, Tensor], key: str, like: Tensor, name: str) -> Tensor:
    """A copy of a saved tensor where ``like`` is; ValueError where shape or dtype differ."""
    tensor = saved.get(key)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"state_dict holds no tensor {key!r} for {name}: it is damaged")
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(
            f"state_dict holds {key!r} of {name} with shape {tuple(tensor.shape)} and {tensor.dtype}, but this "
            f"optimizer needs {tuple(like.shape)} and {like.dtype}: it belongs to another model or other settings"
        )
    return tensor.detach().to(like.device, copy=True)
