"""Packed layout: the wrapped optimizer works on the active values only, one vector per tensor."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim import mixing
from gmixout_optim.bases import (
    Closure,
    enter_step,
    fill_,
    per_cell_state,
    renew_state,
    resets_in_place,
    traceable_step,
    with_own_hooks,
)
from gmixout_optim.index_sets import stratified_cells
from gmixout_optim.layout import KEY, Draw, Layout, Slot, check_gradient, fitting, placement_of
from gmixout_optim.mixed_tensor import MixedTensor


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Active values are trained in at least float32, whatever the parameter's dtype."""
    return torch.promote_types(dtype, torch.float32)


class PackedLayout(Layout):
    """Trained values, anchors and the base's state live on the active cells.

    ``value`` and ``anchor`` are vectors of the active cells' elements in row-major order, in at least float32. Off
    the active cells the model's own weights are the anchor.
    """

    def __init__(
        self, base: Optimizer, draw: Draw, compile: bool | None, static_shapes: bool
    ) -> None:
        super().__init__(base, draw)
        self.compile = compile
        self.static_shapes = static_shapes
        self._compiled: Kernels | None = None
        self._lrs: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None, "workspace": {}}

    def open(self, tensor: MixedTensor) -> Slot:
        index = tensor.address(self.draw(tensor))
        anchor = _gather(tensor, tensor.param, index)
        slot = Slot(index, anchor.clone(), anchor, placement_of(tensor.param))
        self._pack_state(tensor, slot)
        return slot

    def step(self, mixed: Iterable[MixedTensor], closure: Closure | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = {tensor: tensor.param.grad for tensor in mixed if tensor.param.grad is not None}
        for tensor in grads:
            check_gradient(tensor)
        trained = [(tensor, self.slot(tensor)) for tensor in grads]
        columns = _columns(trained)
        gradients = [tensor.view(grad) for tensor, grad in grads.items()]
        scales = [tensor.scale for tensor in grads]
        with self._lend(trained):
            kernels = self._kernels()
            if kernels is None:
                packed_step(enter_step, self.base, *columns, gradients, scales)
            else:
                step = partial(kernels.step, traceable_step(self.base), self.base)
                with self._traceable():
                    with_own_hooks(self.base, partial(step, *columns, gradients, scales))
        return loss

    def end_episode(self) -> None:
        open_slots = list(self.open_slots())
        kernels = self._kernels()
        (mixing.end_episode_ if kernels is None else kernels.end_episode_)(
            *_columns(open_slots), [tensor.anchor_decay for tensor, _ in open_slots]
        )

    def begin_episode(self, previous: Draw, carry_state: bool) -> None:
        open_slots = list(self.open_slots())
        kernels = self._kernels()
        for tensor, slot in open_slots:
            cell = self.draw(tensor) if kernels is None else self.draw(tensor, kernels.draw)
            index = tensor.address(cell)
            shape = torch.Size([cell.shape[0] * tensor.width])
            rebuild = (
                _carrying(tensor, previous(tensor), cell, shape)
                if carry_state
                else lambda state, start, shape=shape: fill_(state.new_empty(shape), start)
            )
            renew_state(
                self.base, tensor.param, tensor.group, slot.value.shape, rebuild, carry_state
            )
            if shape == slot.value.shape:
                slot.index.copy_(index)  # in place: compiled code keeps its buffers
            else:
                slot.index = index
                slot.value, slot.anchor = slot.value.new_empty(shape), slot.anchor.new_empty(shape)
        (mixing.begin_episode_ if kernels is None else kernels.begin_episode_)(
            *_columns(open_slots)
        )

    def reanchor(self) -> None:
        """Nothing to do: an episode begins from the weights in the model."""

    def deployed(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        (moved,) = mixing.moved_anchors([slot.anchor], [slot.value], [tensor.anchor_decay])
        return moved

    def live(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        (weights,) = mixing.gather([tensor.view(tensor.param)], [slot.index])
        return weights

    def show(self, tensor: MixedTensor, slot: Slot, weights: Tensor) -> None:
        mixing.scatter_([tensor.view(tensor.param)], [slot.index], [weights])

    def dense_anchor(self, tensor: MixedTensor) -> Tensor:
        dense = tensor.copy_of(tensor.param)
        slot = self.trained_slot(tensor)
        if slot is not None:
            mixing.scatter_([tensor.view(dense)], [slot.index], [slot.anchor])
        return dense

    def displacement(self, tensor: MixedTensor, slot: Slot) -> tuple[Tensor, Tensor]:
        (theta,) = mixing.model_values([slot.anchor], [slot.value], [tensor.scale])
        return theta - slot.anchor, slot.anchor

    def restored(self, tensor: MixedTensor, index: Tensor, saved: dict[str, Tensor]) -> Slot:
        like = _gather(tensor, tensor.param, index)
        return Slot(
            index,
            fitting(saved, "value", like, tensor.name),
            fitting(saved, "anchor", like, tensor.name),
            placement_of(tensor.param),
        )

    def take_over(self, tensor: MixedTensor) -> None:
        if self.base.state.get(tensor.param):
            self.slot(tensor)

    def _pack_state(self, tensor: MixedTensor, slot: Slot) -> None:
        """Take over what a base that has already stepped knows of the active cells."""
        state = self.base.state.get(tensor.param, {})
        for key in per_cell_state(state, tensor.param.shape):
            state[key] = _gather(tensor, state[key], slot.index)

    def _kernels(self) -> Kernels | None:
        """The compiled forms, where compiling is asked for and nothing forces it to happen again and again."""
        wanted = self.compile
        if wanted is None:
            # Without Triton (on Windows, say) torch.compile has nothing to compile to on CUDA.
            on_cuda = any(tensor.param.is_cuda for tensor in self.slots)
            wanted = on_cuda and importlib.util.find_spec("triton") is not None
        if not wanted or not self.static_shapes or not resets_in_place(self.base):
            return None
        if self._compiled is None:
            self._compiled = Kernels()
        return self._compiled

    @contextmanager
    def _lend(self, trained: list[tuple[MixedTensor, Slot]]) -> Iterator[None]:
        """The base sees packed vectors in its groups and as keys of its state, in place of the parameters.

        Outside this block both are the user's: groups hold the model's parameters and state is keyed by them.
        """
        base = self.base
        lent = {tensor.param: slot.value for tensor, slot in trained}
        owner = {value: param for param, value in lent.items()}
        groups = [(group, group["params"]) for group in base.param_groups]
        state = base.state
        try:
            for tensor, slot in trained:
                slot.value.grad = self._gradient_buffer(tensor, slot)
            for group, params in groups:
                group["params"] = [lent.get(param, param) for param in params]
            base.state = defaultdict(
                dict, {lent.get(key, key): value for key, value in state.items()}
            )
            yield
        except BaseException:
            # The model has not been written to. What it holds is what was trained, where nothing was lost to
            # rescaling or to a narrower dtype.
            for tensor, slot in trained:
                if tensor.scale == 1 and tensor.param.dtype == slot.value.dtype:
                    slot.value.copy_(self.live(tensor, slot))
            raise
        finally:
            returned = {owner.get(key, key): value for key, value in base.state.items()}
            base.state = state
            state.clear()
            state.update(returned)
            for group, params in groups:
                group["params"] = params
            for value in owner:
                value.grad = None

    def _gradient_buffer(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        """Room for a packed gradient. On a CPU it is kept: memory fresh from the system costs more than the gather."""
        buffer = self.workspace.get(tensor)
        if buffer is None or buffer.shape != slot.value.shape or buffer.device != slot.value.device:
            buffer = torch.empty_like(slot.value)
            if buffer.device.type == "cpu":
                self.workspace[tensor] = buffer
        return buffer

    @contextmanager
    def _traceable(self) -> Iterator[None]:
        """Make a lent base one that is compiled once: lr a tensor, the plain form of the step.

        A float lr and the wrapper's counters would compile again when they change, and a fused or foreach step cannot
        be fused with gather and scatter.
        """
        hidden = (KEY, "mask_prob", "anchor_decay", "granularity")
        options = ("lr", "fused", "foreach", *hidden)
        own: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (group, {key: group[key] for key in options if key in group})
            for group in self.base.param_groups
        ]
        try:
            for number, (group, saved) in enumerate(own):
                for key in hidden:
                    del group[key]
                group.update({key: False for key in ("fused", "foreach") if key in saved})
                if not isinstance(group["lr"], Tensor):
                    lr = self._lrs.setdefault(number, torch.zeros((), dtype=torch.float64))
                    group["lr"] = lr.fill_(group["lr"])
            yield
        finally:
            for group, saved in own:
                group.update(saved)


class Kernels:
    """The packed step and the redraw, compiled: static shapes, one compilation each."""

    def __init__(self) -> None:
        # Shapes never change within an optimizer; a second one must not make them look dynamic.
        self.step = torch.compile(packed_step, dynamic=False)
        self.end_episode_ = torch.compile(mixing.end_episode_, dynamic=False)
        self.begin_episode_ = torch.compile(mixing.begin_episode_, dynamic=False)
        self.draw = torch.compile(stratified_cells, dynamic=True)


def packed_step(
    base_step: Callable[[Optimizer], Any],
    base: Optimizer,
    views: list[Tensor],
    indices: list[Tensor],
    values: list[Tensor],
    anchors: list[Tensor],
    grads: list[Tensor],
    scales: list[float],
) -> None:
    """Gather the active gradients, step the base on the packed values, scatter what the model computes with.

    Tensors as in :mod:`gmixout_optim.mixing`. ``values`` come with buffers for their gradients, which are filled;
    ``base_step`` updates ``values`` from these.
    """
    packed = [value.grad for value in values if value.grad is not None]
    mixing.gather_(grads, indices, packed)
    for grad, scale in zip(packed, scales, strict=True):
        if scale != 1:
            grad.mul_(scale)
    base_step(base)
    mixing.scatter_(views, indices, mixing.model_values(anchors, values, scales))


def _columns(
    slots: list[tuple[MixedTensor, Slot]],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Views, indices, values and anchors, as :mod:`gmixout_optim.mixing` takes them."""
    return (
        [tensor.view(tensor.param) for tensor, _ in slots],
        [slot.index for _, slot in slots],
        [slot.value for _, slot in slots],
        [slot.anchor for _, slot in slots],
    )


def _gather(tensor: MixedTensor, dense: Tensor, index: Tensor) -> Tensor:
    """The active cells of a tensor of the parameter's shape, in the dtype they are trained in."""
    (packed,) = mixing.gather([tensor.view(dense)], [index])
    return packed.to(master_dtype(dense.dtype))


def _carrying(
    tensor: MixedTensor, before: Tensor, after: Tensor, shape: torch.Size
) -> Callable[[Tensor, float | Tensor], Tensor]:
    """Rebuild packed state for a new index set: cells in both sets keep their values."""
    before, after = tensor.elements(before), tensor.elements(after)
    place = torch.searchsorted(before, after).clamp_(max=max(0, before.shape[0] - 1))
    kept = (before[place] == after).nonzero().squeeze(1) if before.shape[0] else place[:0]

    def rebuild(state: Tensor, start: float | Tensor) -> Tensor:
        renewed = fill_(state.new_empty(shape), start)
        return renewed.index_copy_(0, kept, state.index_select(0, place[kept]))

    return rebuild
