"""Packed layout: the wrapped optimizer works on the active values only, one vector per tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gmixout_optim import mixing
from gmixout_optim.bases import Closure, enter_step, fill_, per_cell_state, renew_state
from gmixout_optim.layout import Draw, Layout, Slot, check_gradient, fitting, placement_of
from gmixout_optim.mixed_tensor import MixedTensor


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """Active values are trained in at least float32, whatever the parameter's dtype."""
    return torch.promote_types(dtype, torch.float32)


class PackedLayout(Layout):
    """Trained values, anchors and the base's state live on the active cells.

    ``value`` and ``anchor`` have shape (m,) or (m, width) and at least float32. Off the active cells the
    model's own weights are the anchor.
    """

    def open(self, tensor: MixedTensor) -> Slot:
        index = tensor.address(self.draw(tensor))
        anchor = _gather(tensor, tensor.param, index)
        slot = Slot(index, anchor.clone(), anchor, placement_of(tensor.param))
        self._pack_state(tensor, slot)
        return slot

    def step(self, tensors: Iterable[MixedTensor], closure: Closure | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = [tensor for tensor in tensors if tensor.param.grad is not None]
        for tensor in trained:
            check_gradient(tensor)
        slots = [self.slot(tensor) for tensor in trained]
        with self._lend(trained, slots):
            packed_step(
                lambda: enter_step(self.base),
                [tensor.view(tensor.param) for tensor in trained],
                [tensor.view(tensor.param.grad) for tensor in trained],
                [slot.index for slot in slots],
                [slot.value for slot in slots],
                [slot.anchor for slot in slots],
                [tensor.scale for tensor in trained],
            )
        return loss

    def end_episode(self) -> None:
        for tensor, slot in self.open_slots():
            self.show(tensor, slot, self.deployed(tensor, slot))

    def begin_episode(self, previous: Draw, carry_state: bool) -> None:
        for tensor, slot in self.open_slots():
            cell = self.draw(tensor)
            index = tensor.address(cell)
            anchor = _gather(tensor, tensor.param, index)
            rebuild = (
                _carrying(tensor, previous(tensor), cell, anchor)
                if carry_state
                else lambda state, start, shape=anchor.shape: fill_(state.new_empty(shape), start)
            )
            renew_state(
                self.base, tensor.param, tensor.group, slot.value.shape, rebuild, carry_state
            )
            if anchor.shape == slot.anchor.shape:
                # In place: compiled code keeps its buffers.
                slot.index.copy_(index)
                slot.anchor.copy_(anchor)
                slot.value.copy_(anchor)
            else:
                slot.index, slot.anchor, slot.value = index, anchor, anchor.clone()

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
        slot = self.slots.get(tensor)
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

    @contextmanager
    def _lend(self, tensors: list[MixedTensor], slots: list[Slot]) -> Iterator[None]:
        """The base sees packed vectors in its groups and as keys of its state, in place of the parameters.

        Outside this block both are the user's: groups hold the model's parameters and state is keyed by them.
        """
        base = self.base
        lent = {tensor.param: slot.value for tensor, slot in zip(tensors, slots, strict=True)}
        owner = {value: param for param, value in lent.items()}
        params = [group["params"] for group in base.param_groups]
        state = base.state
        try:
            for group in base.param_groups:
                group["params"] = [lent.get(param, param) for param in group["params"]]
            base.state = defaultdict(
                dict, {lent.get(key, key): value for key, value in state.items()}
            )
            yield
        except BaseException:
            # The model has not been written to. What it holds is what was trained, where nothing was lost to
            # rescaling or to a narrower dtype.
            for tensor, slot in zip(tensors, slots, strict=True):
                if tensor.scale == 1 and tensor.param.dtype == slot.value.dtype:
                    slot.value.copy_(self.live(tensor, slot))
            raise
        finally:
            lent_state = dict(base.state)
            base.state = state
            state.clear()
            state.update({owner.get(key, key): value for key, value in lent_state.items()})
            for group, own in zip(base.param_groups, params, strict=True):
                group["params"] = own
            for value in owner:
                value.grad = None


def packed_step(
    base_step: Callable[[], Any],
    views: list[Tensor],
    grads: list[Tensor],
    indices: list[Tensor],
    values: list[Tensor],
    anchors: list[Tensor],
    scales: list[float],
) -> None:
    """Gather the active gradients, step the base on the packed values, scatter what the model computes with.

    Tensors as in :mod:`gmixout_optim.mixing`. ``base_step`` updates ``values`` from their ``grad``.
    """
    for value, grad, scale in zip(values, mixing.gather(grads, indices), scales, strict=True):
        grad = grad.to(value.dtype)
        value.grad = grad if scale == 1 else grad * scale
    base_step()
    mixing.scatter_(views, indices, mixing.model_values(anchors, values, scales))


def _gather(tensor: MixedTensor, dense: Tensor, index: Tensor) -> Tensor:
    """The active cells of a tensor of the parameter's shape, in the dtype they are trained in."""
    (packed,) = mixing.gather([tensor.view(dense)], [index])
    return packed.to(master_dtype(dense.dtype))


def _carrying(
    tensor: MixedTensor, before: Tensor, after: Tensor, like: Tensor
) -> Callable[[Tensor, float | Tensor], Tensor]:
    """Rebuild packed state for a new index set: cells in both sets keep their values."""
    if like.shape[0] != after.shape[0]:  # addressed element by element
        before, after = tensor.elements(before), tensor.elements(after)
    place = torch.searchsorted(before, after).clamp_(max=max(0, before.shape[0] - 1))
    kept = (before[place] == after).nonzero().squeeze(1) if before.shape[0] else place[:0]

    def rebuild(state: Tensor, start: float | Tensor) -> Tensor:
        renewed = fill_(state.new_empty(like.shape), start)
        return renewed.index_copy_(0, kept, state.index_select(0, place[kept]))

    return rebuild
