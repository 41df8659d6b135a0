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
    per_cell_state,
    renew_state,
)
from gmixout_optim.compiled import Compiler, draw
from gmixout_optim.layout import (
    Draw,
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
        draw: gives the active cells.
        compile: the user's ``compile``.
        static_shapes: whether index sets keep their sizes when they are redrawn.
        dither_key: of a tensor in the running episode, where parameters below float32 are rounded stochastically.
            A weight keeps its random bits within the episode: rounding is monotone then, so that what is rounded of
            the anchor's step lies between the old anchor and the live weight as the step itself does.
    """

    def __init__(
        self,
        base: Optimizer,
        draw: Draw,
        compile: bool | None,
        static_shapes: bool,
        dither_key: Callable[[MixedTensor], int] | None,
    ) -> None:
        super().__init__(base, draw)
        self.compiler = Compiler(base, compile, static_shapes, dither_key)
        self.dither_key = dither_key
        # Counts episodes here, to know a packed gradient of another. Never saved: nor are gradients.
        self.episode_number = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "workspace": {}}

    def open(self, tensor: MixedTensor) -> Slot:
        index = tensor.address(self.draw(tensor))
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
                tensor.param.grad.used_by(self)
        trained = [(tensor, self.slot(tensor)) for tensor in learning]
        compiled, eager = self.compiler.split_step(trained)
        self._eager_step(eager, hidden={tensor.param for tensor, _ in compiled})
        for tensor, _ in compiled:
            self.workspace.pop(tensor, None)
        failed = self.compiler.step(compiled)
        if failed:
            unfinished = {tensor.param for tensor, _ in failed}
            groups = self.base.param_groups
            all_params = {param for group in groups for param in group["params"]}
            self._eager_step(failed, hidden=all_params - unfinished)
        return loss

    def end_episode(self) -> None:
        # Not compiled, also where the step is: eval_weights() shows these anchors to the last bit.
        for tensor, slot in self.open_slots():
            self.show(tensor, slot, self.deployed(tensor, slot))

    def begin_episode(self, previous: Draw, carry_state: bool) -> None:
        self.episode_number += 1
        compiled, eager = self.compiler.split(list(self.open_slots()))
        for tensor, slot in compiled:
            self._redraw(tensor, slot, self.draw(tensor, draw()), previous, carry_state)
        for tensor, slot in eager:
            self._redraw(tensor, slot, self.draw(tensor), previous, carry_state)
        mixing.begin_episode_(*columns(eager))
        self.compiler.begin_episode(compiled)

    def _redraw(
        self, tensor: MixedTensor, slot: Slot, cell: Tensor, previous: Draw, carry_state: bool
    ) -> None:
        """Put new cells into use: the index set and room for the values in the slot, the base's state."""
        index = tensor.address(cell)
        shape = torch.Size([cell.shape[0] * tensor.width])
        if carry_state:
            rebuild = _carrying(tensor, previous(tensor), cell, shape)
        else:
            rebuild = partial(_restarting, shape)
        renew_state(self.base, tensor.param, tensor.group, slot.value.shape, rebuild, carry_state)
        if shape == slot.value.shape:
            slot.index.copy_(index)  # in place: compiled code keeps its buffers
        else:
            slot.index = index
            slot.value, slot.anchor = slot.value.new_empty(shape), slot.anchor.new_empty(shape)

    def reanchor(self) -> None:
        """Nothing to do: an episode begins from the weights in the model."""

    def deployed(self, tensor: MixedTensor, slot: Slot) -> Tensor:
        moved = mixing.moved_anchors([slot.anchor], [slot.value], [tensor.anchor_decay])
        (rounded,) = self._rounded([(tensor, slot)], moved)
        return rounded

    def write_theta(self, tensor: MixedTensor, slot: Slot, into: Tensor | None = None) -> None:
        into = tensor.param if into is None else into
        theta = mixing.model_values([slot.anchor], [slot.value], [tensor.scale])
        mixing.scatter_([tensor.view(into)], [slot.index], self._rounded([(tensor, slot)], theta))

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
        self.episode_number += 1

    def packed_from(self, tensor: MixedTensor, grad: Tensor) -> Tensor:
        """The active part of a dense gradient, in its dtype, in the running episode."""
        with torch.no_grad():
            if tensor not in self.slots:
                with self.apart():
                    self.slot(tensor)
            (values,) = mixing.gather([tensor.view(grad)], [self.slot(tensor).index])
        return values

    def used_gradient(self, tensor: MixedTensor) -> Tensor:
        grad = tensor.param.grad
        if isinstance(grad, PackedGradient):
            return grad.used_by(self) * tensor.scale
        return super().used_gradient(tensor)

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

    def _eager_step(self, rows: list[Row], hidden: set[Tensor]) -> None:
        """Gather, step, scatter, the base working on the packed values with their gradients in buffers."""
        views, indices, values, anchors = columns(rows)
        scales = [tensor.scale for tensor, _ in rows]
        grads = self._gradients_of_values(rows)
        with self._lend(rows, grads, hidden):
            enter_step(self.base)
            theta = mixing.model_values(anchors, values, scales)
            mixing.scatter_(views, indices, self._rounded(rows, theta))

    def _gradients_of_values(self, rows: list[Row]) -> list[Tensor]:
        """Packed, in the dtype of the values: in buffers, or those that backward has packed, themselves."""
        packed = []
        for tensor, slot in rows:
            grad = tensor.param.grad
            assert grad is not None
            if isinstance(grad, PackedGradient):
                own = grad.used_by(self).to(slot.value.dtype)
                packed.append(own if tensor.scale == 1 else own * tensor.scale)
            else:
                buffer = self._gradient_buffer(tensor, slot)
                mixing.gather_([tensor.view(grad)], [slot.index], [buffer])
                packed.append(buffer if tensor.scale == 1 else buffer.mul_(tensor.scale))
        return packed

    def _rounded(self, rows: list[Row], packed: list[Tensor]) -> list[Tensor]:
        """Packed values as they are to be written, where the nearest numbers are not what is wanted."""
        if self.dither_key is None:
            return packed
        views, indices, _, _ = columns(rows)
        return mixing.narrowed(
            views, indices, packed, [self.dither_key(tensor) for tensor, _ in rows]
        )

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
