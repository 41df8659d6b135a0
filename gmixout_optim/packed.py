"""Packed layout: the wrapped optimizer works on the active values only, one vector per tensor."""

from __future__ import annotations

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
    mark_stepped,
    per_cell_state,
    renew_state,
    scaled_rates,
)
from gmixout_optim.batched import BatchedStep, used_gradients, write
from gmixout_optim.compiled import Compiler, draw
from gmixout_optim.layout import (
    Draws,
    Layout,
    Row,
    Slot,
    check_gradient,
    columns,
    fitting,
    form_of,
    placement_of,
)
from gmixout_optim.mixed_tensor import MixedTensor
from gmixout_optim.packed_gradient import PackedGradient


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Active values are trained in at least float32, whatever the parameter's dtype."""
    return torch.promote_types(dtype, torch.float32)


class PackedLayout(Layout):
    """Trained values, anchors and the base's state live on the active cells.

    ``value`` and ``anchor`` are vectors of the active cells' elements in row-major order, in at least float32. Off
    the active cells the model's own weights are the anchor.

    Args:
        base: the wrapped optimizer.
        draws: what is random.
        compile: the user's ``compile``.
        static_shapes: whether index sets keep their sizes when they are redrawn.
    """

    def __init__(
        self,
        base: Optimizer,
        draws: Draws,
        compile: bool | None,
        static_shapes: bool,
    ) -> None:
        super().__init__(base, draws)
        self.batched = BatchedStep(base, draws)
        self.compiler = Compiler(self.batched, compile, static_shapes)
        # Counts episodes here, to know a packed gradient of another. Never saved: nor are gradients.
        self.episode_number = 0
        # Where cells lie of tensors that have packed gradients and no slot yet, for the running episode.
        self._indices: dict[MixedTensor, Tensor] = {}

    def open(self, tensor: MixedTensor) -> Slot:
        index = self.index_of(tensor)
        self._indices.pop(tensor, None)
        anchor = _gather(tensor, tensor.param, index)
        slot = Slot(
            index, anchor.clone(), anchor, placement_of(tensor.param), form_of(tensor.param)
        )
        self._pack_state(tensor, slot)
        return slot

    def step(self, mixed: Iterable[MixedTensor], closure: Closure | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        learning = [tensor for tensor in mixed if tensor.param.grad is not None]
        for tensor in learning:
            check_gradient(tensor)
            if isinstance(tensor.param.grad, PackedGradient):
                tensor.param.grad.check_owner(self)
        trained = [(tensor, self.slot(tensor)) for tensor in learning]
        ready, lent = self.batched.split(trained)
        compiled, eager = self.compiler.split_step(ready)
        hidden = {tensor.param for tensor, _ in ready}
        try:
            if lent or not ready or self._has_unmixed_gradients(hidden):
                self._step_lent(lent, hidden)
            mark_stepped(self.base)
            self.batched.step(eager)
            self.batched.step(self.compiler.step(compiled))
        except BaseException:
            # What the model holds is what was trained, where nothing was lost to rescaling or to a narrower dtype.
            for tensor, slot in trained:
                slot.value.grad = None
                if tensor.scale == 1 and tensor.param.dtype == slot.value.dtype:
                    slot.value.copy_(self.live(tensor, slot))
            raise
        return loss

    def end_episode(self) -> None:
        # Not compiled, also where the step is: eval_weights() shows these anchors to the last bit.
        for tensor, slot in self.open_slots():
            self.show(tensor, slot, self.deployed(tensor, slot))

    def begin_episode(self, carry_state: bool) -> None:
        self._forget_gradients()
        compiled, eager = self.compiler.split(list(self.open_slots()))
        for tensor, slot in compiled:
            self._redraw(tensor, slot, self.draws.cells(tensor, draw()), carry_state)
        for tensor, slot in eager:
            self._redraw(tensor, slot, self.draws.cells(tensor), carry_state)
        mixing.begin_episode_(*columns(eager))
        self.compiler.begin_episode(compiled)

    def _redraw(self, tensor: MixedTensor, slot: Slot, cell: Tensor, carry_state: bool) -> None:
        """Put new cells into use: the index set and room for the values in the slot, the base's state."""
        index = tensor.address(cell)
        shape = torch.Size([cell.shape[0] * tensor.width])
        if carry_state:
            rebuild = _carrying(tensor, self.draws.previous_cells(tensor), cell, shape)
        else:
            rebuild = partial(_restarting, shape)
        renew_state(self.base, tensor.param, tensor.options, slot.value.shape, rebuild, carry_state)
        if shape == slot.value.shape:
            slot.index.copy_(index)  # in place: compiled code keeps its buffers
        else:
            slot.index = index
            slot.value, slot.anchor = slot.value.new_empty(shape), slot.anchor.new_empty(shape)

    def reanchor(self) -> None:
        """Nothing to do: an episode begins from the weights in the model."""

    def deployed(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        (moved,) = mixing.moved_anchors([slot.anchor], [slot.value], [tensor.anchor_decay])
        dither = self.draws.dither(tensor)
        (rounded,) = mixing.narrowed([tensor.view(tensor.param)], [slot.index], [moved], [dither])
        return rounded

    def write_theta(self, tensor: MixedTensor, slot: Slot, into: Tensor | None = None) -> None:
        view = tensor.view(tensor.param if into is None else into)
        dither = self.draws.dither(tensor)
        write([view], [slot.index], [slot.value], [slot.anchor], [tensor.scale], [dither])

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
            form_of(tensor.param),
        )

    def restore(self, slots: dict[MixedTensor, Slot]) -> None:
        super().restore(slots)
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        """What was packed so far is of another episode."""
        self.episode_number += 1
        self._indices.clear()

    def index_of(self, tensor: MixedTensor) -> Tensor:
        index = self._indices.get(tensor)
        if tensor in self.slots or index is None or index.device != tensor.param.device:
            index = super().index_of(tensor)
        if tensor not in self.slots:
            self._indices[tensor] = index
        return index

    def packed_from(self, tensor: MixedTensor, grad: Tensor) -> Tensor:
        """The active part of a dense gradient, in its dtype, in the running episode."""
        with torch.no_grad():
            return mixing.gather_gradient(tensor.view(grad), self.index_of(tensor))

    def active_gradient(self, tensor: MixedTensor, grad: Tensor) -> Tensor:
        if isinstance(grad, PackedGradient):
            grad.check_owner(self)
            return grad.current()
        return super().active_gradient(tensor, grad)

    def take_over(self, tensor: MixedTensor) -> None:
        if self.base.state.get(tensor.param):
            self.slot(tensor)

    def _pack_state(self, tensor: MixedTensor, slot: Slot) -> None:
        """Take over what a base that has already stepped knows of the active cells."""
        state = self.base.state.get(tensor.param, {})
        for key, item in state.items():
            if isinstance(item, Tensor) and type(item) is not Tensor and item.numel() > 1:
                raise TypeError(
                    f"base has stepped and keeps {key!r} of {tensor.name} as {type(item).__name__}, which cannot be "
                    "packed: wrap it before its first step"
                )
        for key in per_cell_state(state, tensor.param.shape):
            state[key] = _gather(tensor, state[key], slot.index)

    def _has_unmixed_gradients(self, mixed: set[Tensor]) -> bool:
        return any(
            param.grad is not None and param not in mixed
            for group in self.base.param_groups
            for param in group["params"]
        )

    def _step_lent(self, rows: list[Row], hidden: set[Tensor]) -> None:
        """The base steps on packed values in place of the parameters, and on what is not mixed."""
        views, indices, values, anchors, grads, scales, dithers, _ = self.batched.columns(rows)
        with self._lend(rows, used_gradients(indices, values, grads, scales), hidden):
            enter_step(self.base)
        write(views, indices, values, anchors, scales, dithers)

    @contextmanager
    def _lend(self, trained: list[Row], grads: list[Tensor], hidden: set[Tensor]) -> Iterator[None]:
        """The base sees packed vectors in its groups and as keys of its state, in place of the parameters.

        ``hidden`` parameters it does not see. Outside this block both are the user's: groups hold the model's parameters and state is keyed by them.
        """
        base = self.base
        lent = {tensor.param: slot.value for tensor, slot in trained}
        owner = {value: param for param, value in lent.items()}
        groups = [(group, group["params"]) for group in base.param_groups]
        state = base.state
        try:
            for (_, slot), grad in zip(trained, grads, strict=True):
                slot.value.grad = grad
            for group, params in groups:
                group["params"] = [
                    lent.get(param, param) for param in params if param not in hidden
                ]
            if lent:
                base.state = defaultdict(
                    dict, {lent.get(key, key): value for key, value in state.items()}
                )
            with scaled_rates(base, {slot.value: tensor.rate for tensor, slot in trained}):
                yield
        finally:
            if lent:
                returned = {owner.get(key, key): value for key, value in base.state.items()}
                base.state = state
                state.clear()
                state.update(returned)
            for group, params in groups:
                group["params"] = params
            for value in owner:
                value.grad = None


def _gather(tensor: MixedTensor, dense: Tensor, index: Tensor) -> Tensor:
    """The active cells of a tensor of the parameter's shape, in the dtype they are trained in."""
    (packed,) = mixing.gather([tensor.view(dense)], [index])
    return packed.to(master_dtype(dense.dtype))


def _restarting(shape: torch.Size, state: Tensor, start: float | Tensor) -> Tensor:
    """Packed state for a new index set, fresh on all cells."""
    return fill_(state.new_empty(shape), start)


def _carrying(
    tensor: MixedTensor, before: Tensor, after: Tensor, shape: torch.Size
) -> Callable[[Tensor, float | Tensor], Tensor]:
    """Rebuild packed state for a new index set: cells in both sets keep their values."""
    before, after = tensor.elements(before), tensor.elements(after)
    place = torch.searchsorted(before, after).clamp_(max=max(0, before.shape[0] - 1))
    kept = (before[place] == after).nonzero().squeeze(1) if before.shape[0] else place[:0]

    def rebuild(state: Tensor, start: float | Tensor) -> Tensor:
        renewed = _restarting(shape, state, start)
        return renewed.index_copy_(0, kept, state.index_select(0, place[kept]))

    return rebuild
