"""How a step is taken, and whether the next one can be taken in the same way.

To find out how takes longer than to launch the kernels of the step.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim.bases import lr_is_zero, step_is_its_own
from gmixout_optim.compiled import Call
from gmixout_optim.members import Member, Members
from gmixout_optim.packed_step import form_of_options, form_without_lr, own_options

_version_of = attrgetter("_version")
_layout_of = attrgetter("layout")
_dtype_of = attrgetter("dtype")


class Plan:
    """How a step is taken.

    Attributes:
        lent: the members that the base itself steps.
        batched: all other members, of which ``eager`` are stepped eagerly and ``calls`` step those
            that are compiled.
        others: the parameters beside the latter, which the base itself steps.
    """

    # ``is_steady``: whether the next step is to be taken in the same way if nothing changes.
    def __init__(
        self,
        base: Optimizer,
        members: Members,
        lent: list[Member],
        batched: list[Member],
        eager: list[Member],
        calls: list[Call],
        is_steady: bool,
    ) -> None:
        self._base = base
        self._members = members
        self.lent = lent
        self.batched = batched
        self.eager = eager
        self.calls = calls
        self._is_steady = is_steady
        hidden = {member.param for member in batched}
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
        self._weights = [param.detach() for param in params]
        self._learning = [param for param in params if param.grad is not None]
        self._idle = [param for param in params if param.grad is None]
        self._values = self._values_now()
        self._gradients = self._gradients_now()
        self._objects = self._objects_now()
        self._is_noted = True
        return True

    def holds(self) -> bool:
        """Whether nothing but gradients, learning rates and weights has changed since."""
        trained = self._members.trained()
        return (
            len(self._members) == len(self._params)
            and not any(param.grad is not None for param in self._idle)
            and all(map(Tensor.is_set_to, self._params, self._weights))
            and self._values == self._values_now()
            and self._gradients == self._gradients_now()
            # Nobody else has written, and nothing is to be looked at.
            and [member.slot.version for member in trained if member.slot]
            == list(map(_version_of, [member.cells.param for member in trained]))
            and self._keeps_objects()
        )

    def _values_now(self) -> list[Any]:
        base = self._base
        options = [_form_of_group(base, group) for group in base.param_groups]
        dtypes = list(map(_dtype_of, self._params))
        return [self._members.run.draws, step_is_its_own(base), options, dtypes]

    def _gradients_now(self) -> list[Any]:
        grads = [param.grad for param in self._learning]
        kinds = list(map(type, grads))
        if type(None) in kinds:
            return kinds
        layouts = list(map(_layout_of, grads))
        if layouts.count(torch.strided) < len(layouts):
            return [kinds, layouts]
        return [kinds, [grad.stride() for grad in grads if grad is not None]]

    def _objects_now(self) -> list[Any]:
        slots = [member.slot for member in self._members]
        kept = [slot.anchor for slot in slots if slot]
        kept_values = [slot.value for slot in slots if slot]
        state = chain.from_iterable(map(dict.values, self._base.state.values()))
        return [*kept, *kept_values, *state]

    def _keeps_objects(self) -> bool:
        objects = self._objects_now()
        return len(objects) == len(self._objects) and all(map(is_, objects, self._objects))


def _can_be_watched(param: Tensor) -> bool:
    """Whether :meth:`Plan.holds` sees what happens to it: not without memory, or a version."""
    is_plain = type(param) in (Tensor, torch.nn.Parameter) and not param.is_meta
    return is_plain and not param.is_inference()


def _form_of_group(base: Optimizer, group: dict[str, Any]) -> Hashable:
    lr = form_of_options(group.get("lr"), numbers=False), lr_is_zero(group)
    return form_without_lr(own_options(base, group)), lr
