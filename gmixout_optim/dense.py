"""Dense layouts: the wrapped optimizer works on the model's own parameters, whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gmixout_optim import mixing
from gmixout_optim.bases import Closure, enter_step, fill_, renew_state, scaled_rates
from gmixout_optim.layout import Layout, Slot, check_gradient, fitting, form_of, placement_of
from gmixout_optim.mixed_tensor import MixedTensor


class _WholeParameters(Layout):
    """A base that sees the model's own parameters: they hold the trained values while it works.

    Around each evaluation of a closure the model computes with theta again, so that a base which evaluates
    several times in a step (LBFGS) optimizes the loss of theta.
    """

    def step(self, tensors: Iterable[MixedTensor], closure: Closure | None) -> Any:
        tensors = list(tensors)
        values = {tensor: slot.value for tensor, slot in self.open_slots()}
        mixed = {tensor.param for tensor in tensors}
        others = [
            (param, param.detach().clone())
            for group in self.base.param_groups
            for param in group["params"]
            if closure is not None and param not in mixed
        ]
        grads: dict[MixedTensor, Tensor | None] = {}

        def lend() -> None:
            for tensor in tensors:
                check_gradient(tensor)
            for tensor in tensors:
                if tensor.param.grad is None and tensor not in self.slots:
                    continue
                slot = self.slot(tensor)
                values.setdefault(tensor, slot.value)
                grads[tensor] = tensor.param.grad
                if tensor.param.grad is not None:
                    tensor.param.grad = _masked(tensor, slot, tensor.param.grad)
                self._write_trained(tensor, slot)

        def take_back() -> None:
            for tensor in grads:
                slot = self.slots[tensor]
                slot.value = self._read_trained(tensor, slot)
                self.write_theta(tensor, slot)
            return_grads()

        def return_grads() -> None:
            for tensor, grad in grads.items():
                tensor.param.grad = grad
            grads.clear()

        def evaluate() -> Any:
            take_back()
            with torch.enable_grad():
                loss = closure() if closure is not None else None
            lend()
            return loss

        try:
            lend()
            with scaled_rates(self.base, {tensor.param: tensor.rate for tensor in tensors}):
                loss = enter_step(self.base, None if closure is None else evaluate)
            take_back()
        except BaseException:
            for tensor, value in values.items():
                self.slots[tensor].value = value
                self.write_theta(tensor, self.slots[tensor])
            for param, weights in others:
                param.detach().copy_(weights)
            return_grads()
            raise
        return loss

    def take_over(self, tensor: MixedTensor) -> None:
        """Nothing to do: the base keeps its state whole."""

    def dense_anchor(self, tensor: MixedTensor) -> Tensor:
        slot = self.trained_slot(tensor)
        return (tensor.param.detach() if slot is None else slot.anchor).clone()

    def _write_trained(self, tensor: MixedTensor, slot: Slot) -> None:
        """Make the parameter hold what the base trains."""
        raise NotImplementedError

    def _read_trained(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        """What the base made of it, a new tensor."""
        raise NotImplementedError


class DenseLayout(_WholeParameters):
    """Episodic residual for optimizers that need whole tensors: what the base did off the active cells is put back.

    ``value`` is packed, ``anchor`` dense, both in the parameter's dtype.
    """

    def open(self, tensor: MixedTensor) -> Slot:
        index = tensor.address(self.draws.cells(tensor))
        (value,) = mixing.gather([tensor.view(tensor.param)], [index])
        return Slot(
            index,
            value,
            tensor.copy_of(tensor.param),
            placement_of(tensor.param),
            form_of(tensor.param),
        )

    def end_episode(self) -> None:
        for tensor, slot in self.open_slots():
            moved = self.deployed(tensor, slot)
            mixing.scatter_([tensor.view(slot.anchor)], [slot.index], [moved])
            self.show(tensor, slot, moved)

    def begin_episode(self, carry_state: bool) -> None:
        for tensor, slot in self.open_slots():
            cell = self.draws.cells(tensor)
            slot.index = tensor.address(cell)
            slot.value = self.live(tensor, slot)
            keep = (
                tensor.mask(cell) & tensor.mask(self.draws.previous_cells(tensor))
                if carry_state
                else torch.zeros((), dtype=torch.bool, device=tensor.param.device)
            )

            def rebuild(state: Tensor, start: float | Tensor, keep: Tensor = keep) -> Tensor:
                return torch.where(keep, state, fill_(torch.empty_like(state), start))

            renew_state(
                self.base, tensor.param, tensor.options, tensor.param.shape, rebuild, carry_state
            )

    def reanchor(self) -> None:
        for tensor, slot in self.open_slots():
            slot.anchor.copy_(tensor.param.detach())

    def deployed(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        (moved,) = mixing.moved_anchors(
            [self._active_anchor(tensor, slot)], [slot.value], [tensor.anchor_decay]
        )
        return moved

    def displacement(self, tensor: MixedTensor, slot: Slot) -> tuple[Tensor, Tensor]:
        anchor = self._active_anchor(tensor, slot)
        return self._theta(tensor, slot) - anchor, anchor

    def restored(self, tensor: MixedTensor, index: Tensor, saved: dict[str, Tensor]) -> Slot:
        (like,) = mixing.gather([tensor.view(tensor.param)], [index])
        return Slot(
            index,
            fitting(saved, "value", like, tensor.name),
            tensor.copy_of(fitting(saved, "anchor", tensor.param, tensor.name)),
            placement_of(tensor.param),
            form_of(tensor.param),
        )

    def _active_anchor(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        (anchor,) = mixing.gather([tensor.view(slot.anchor)], [slot.index])
        return anchor

    def _theta(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        anchor = self._active_anchor(tensor, slot)
        (theta,) = mixing.model_values([anchor], [slot.value], [tensor.scale])
        return theta

    def _write_trained(self, tensor: MixedTensor, slot: Slot) -> None:
        if tensor.scale != 1:
            self.show(tensor, slot, slot.value)

    def _read_trained(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        return self.live(tensor, slot)

    def write_theta(self, tensor: MixedTensor, slot: Slot, into: Tensor | None = None) -> None:
        into = tensor.param.detach() if into is None else into
        into.copy_(slot.anchor)
        mixing.scatter_([tensor.view(into)], [slot.index], [self._theta(tensor, slot)])


class PersistentLayout(_WholeParameters):
    """Persistent residual: U is trained whole and kept across redraws; the mask only says where the model sees it.

    ``value`` (U) and ``anchor`` are dense, in the parameter's dtype.
    """

    def open(self, tensor: MixedTensor) -> Slot:
        anchor = tensor.param.detach().clone()
        index = tensor.address(self.draws.cells(tensor))
        return Slot(
            index, anchor.clone(), anchor, placement_of(tensor.param), form_of(tensor.param)
        )

    def end_episode(self) -> None:
        for tensor, slot in self.open_slots():
            (slot.anchor,) = mixing.moved_anchors(
                [slot.anchor], [slot.value], [tensor.anchor_decay]
            )

    def begin_episode(self, carry_state: bool) -> None:
        for tensor, slot in self.open_slots():
            slot.index = tensor.address(self.draws.cells(tensor))
            self.write_theta(tensor, slot)

    def reanchor(self) -> None:
        for tensor, slot in self.open_slots():
            slot.anchor = tensor.param.detach().clone()
            slot.value = slot.anchor.clone()

    def deployed(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        """The mean over masks of theta, A + d * s * (U - A): U itself with rescaling."""
        if tensor.scale != 1:
            return slot.value.clone()
        return torch.lerp(slot.anchor, slot.value, tensor.density)

    def live(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        return tensor.param.detach().clone()

    def show(self, tensor: MixedTensor, slot: Slot, weights: Tensor) -> None:
        tensor.param.detach().copy_(weights)

    def displacement(self, tensor: MixedTensor, slot: Slot) -> tuple[Tensor, Tensor]:
        anchor, value = mixing.gather(
            [tensor.view(slot.anchor), tensor.view(slot.value)], [slot.index] * 2
        )
        (theta,) = mixing.model_values([anchor], [value], [tensor.scale])
        return theta - anchor, anchor

    def restored(self, tensor: MixedTensor, index: Tensor, saved: dict[str, Tensor]) -> Slot:
        return Slot(
            index,
            fitting(saved, "value", tensor.param, tensor.name),
            fitting(saved, "anchor", tensor.param, tensor.name),
            placement_of(tensor.param),
            form_of(tensor.param),
        )

    def _write_trained(self, tensor: MixedTensor, slot: Slot) -> None:
        tensor.param.detach().copy_(slot.value)

    def _read_trained(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        return tensor.param.detach().clone()

    def write_theta(self, tensor: MixedTensor, slot: Slot, into: Tensor | None = None) -> None:
        into = tensor.param.detach() if into is None else into
        learned, anchor = mixing.gather(
            [tensor.view(slot.value), tensor.view(slot.anchor)], [slot.index] * 2
        )
        into.copy_(slot.anchor)
        theta = mixing.model_values([anchor], [learned], [tensor.scale])
        mixing.scatter_([tensor.view(into)], [slot.index], theta)


def _masked(tensor: MixedTensor, slot: Slot, grad: Tensor) -> Tensor:
    """The gradient with respect to the trained values: s * grad on the active cells, zero elsewhere."""
    masked = tensor.copy_of(torch.zeros_like(grad))
    (active,) = mixing.gather([tensor.view(grad)], [slot.index])
    mixing.scatter_([tensor.view(masked)], [slot.index], [active * tensor.scale])
    return masked
