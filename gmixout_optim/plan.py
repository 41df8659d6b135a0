"""How a step is taken, and whether the next one can be taken in the same way.

Working this out takes longer than launching the kernels of a step.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from gmixout_optim.bases import lr_is_zero, step_is_its_own
from gmixout_optim.compiled import Call
from gmixout_optim.fused import ALIGNMENT
from gmixout_optim.members import Member, Members
from gmixout_optim.packed_step import form_of_options, form_without_lr, own_options

_VERSION, _DTYPE, _DEVICE, _LAYOUT = map(attrgetter, ("_version", "dtype", "device", "layout"))

# Where Tensor.is_set_to() is known.
_DEVICES = ("cpu", "cuda", "mps")


class Plan:
    """How a step is taken.

    Args:
        base, members: what is stepped.
        lent: the members that the base itself steps.
        eager: those that are stepped in batches, eagerly.
        calls: step the members that are compiled.
        is_steady: whether the next step is to be taken in the same way if nothing changes.

    Attributes:
        batched: the members that the base itself does not step.
        others: the parameters beside these.
    """

    def __init__(
        self,
        base: Optimizer,
        members: Members,
        lent: list[Member],
        eager: list[Member],
        calls: list[Call],
        is_steady: bool,
    ) -> None:
        self._base = base
        self._members = members
        self.lent = lent
        self.batched = [*eager, *chain.from_iterable(call.members for call in calls)]
        self.eager = eager
        self.calls = calls
        self._is_steady = is_steady
        hidden = {member.param for member in self.batched}
        params = (param for group in base.param_groups for param in group["params"])
        self.others = [param for param in params if param not in hidden]
        self._is_noted = False

    def note(self) -> bool:
        """Note after a step what its way depended on. False where the next one's is not known."""
        if self._is_noted:
            return True
        params = [member.param for member in self._members]
        if not self._is_steady or not all(map(_can_be_watched, params)):
            return False
        self._params = params
        self._learning = [param for param in params if param.grad is not None]
        self._idle = [param for param in params if param.grad is None]
        self._objects = self._objects_now()
        # What compiled code was made for, and takes without a look. Weights are not among it: they
        # may go elsewhere, and their memory is not to be held.
        kept = self._kept_now() if self.calls else []
        self._tensors = [item for item in kept if isinstance(item, Tensor)]
        self._as_they_were = [tensor.detach() for tensor in self._tensors]
        self._values = self._values_now()
        self._gradients = self._gradients_now()
        self._is_noted = True
        return True

    def holds(self) -> bool:
        """Whether nothing but gradients, learning rates and weights has changed since."""
        return (
            len(self._members) == len(self._params)
            and not any(param.grad is not None for param in self._idle)
            and self._gradients == self._gradients_now()
            and self._keeps_objects()
            and all(map(Tensor.is_set_to, self._tensors, self._as_they_were))
            and self._values == self._values_now()
            and self._nobody_wrote()
        )

    def _values_now(self) -> list[Any]:
        """What is compared by value."""
        base, params = self._base, self._params
        return [
            self._members.run.draws,
            step_is_its_own(base),
            [_form_of_group(base, group) for group in base.param_groups],
            list(map(Tensor.numel, params)),
            list(map(Tensor.stride, params)),
            list(map(_DTYPE, params)),
            list(map(_DEVICE, params)),
            [address % ALIGNMENT for address in map(Tensor.data_ptr, params)],
        ]

    def _gradients_now(self) -> list[Any]:
        grads = [param.grad for param in self._learning]
        kinds: list[Any] = list(map(type, grads))
        if type(None) in kinds:
            return kinds
        layouts = list(map(_LAYOUT, grads))
        if layouts.count(torch.strided) < len(layouts):
            return [kinds, layouts]
        present: list[Any] = grads
        return [
            kinds,
            list(map(_DTYPE, present)),
            list(map(Tensor.stride, present)),
            any(map(Tensor.is_neg, present)),
        ]

    def _objects_now(self) -> list[Any]:
        """What is compared by identity."""
        anchors = [member.slot.anchor for member in self._members if member.slot]
        options = chain.from_iterable(map(self._tensors_of, self._base.param_groups))
        return [*self._base.state, *self._kept_now(), *anchors, *options]

    def _kept_now(self) -> list[Any]:
        """The base's state, and what is trained where the model does not hold it."""
        entries = [entry for entry in self._base.state.values() if isinstance(entry, dict)]
        values = [member.slot.value for member in self._members if member.slot]
        return [*chain.from_iterable(map(dict.values, entries)), *values]

    def _tensors_of(self, group: dict[str, Any]) -> Iterator[Tensor]:
        """Of the options, but for the learning rate: betas may be tensors."""
        for key in self._base.defaults:
            option = group.get(key)
            if key != "lr" and type(option) not in (float, int, bool, type(None), str):
                yield from (leaf for leaf in tree_leaves(option) if isinstance(leaf, Tensor))

    def _keeps_objects(self) -> bool:
        objects = self._objects_now()
        return len(objects) == len(self._objects) and all(map(is_, objects, self._objects))

    def _nobody_wrote(self) -> bool:
        """Nor is there anything else to be looked at."""
        trained = self._members.trained()
        versions = [member.slot.version for member in trained if member.slot]
        return versions == list(map(_VERSION, [member.cells.param for member in trained]))


def _can_be_watched(param: Tensor) -> bool:
    """Whether :meth:`Plan.holds` sees what happens to it."""
    is_plain = type(param) in (Tensor, torch.nn.Parameter) and param.device.type in _DEVICES
    return is_plain and not param.is_inference()


def _form_of_group(base: Optimizer, group: dict[str, Any]) -> Hashable:
    lr = form_of_options(group.get("lr"), numbers=False), lr_is_zero(group)
    return form_without_lr(own_options(base, group)), lr
