"""How a step is taken, and how long the next ones can be taken in the same way.

To find that out takes much longer than to launch the kernels.
"""

from __future__ import annotations

from collections.abc import Hashable
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim.bases import step_is_its_own
from gmixout_optim.compiled import Call, lr_is_zero
from gmixout_optim.members import Member, Members
from gmixout_optim.packed_step import form_of_options, form_without_lr, own_options


class Facts:
    """All that the way of a step depends on, quick to collect and to compare.

    Attributes:
        values: compared by value.
        objects: compared by identity.
    """

    def __init__(self, base: Optimizer, members: Members) -> None:
        params = [member.param for member in members]
        slots = [member.slot for member in members]
        grads = [param.grad for param in params]
        self.values: list[Any] = [
            members.run.draws,
            step_is_its_own(base),
            [(param.data_ptr(), param.stride(), param.shape, param.dtype) for param in params],
            [
                grad is not None and (type(grad), grad.layout is torch.strided and grad.stride())
                for grad in grads
            ],
            [
                slot is None or param.is_inference() or slot.version == param._version
                for slot, param in zip(slots, params, strict=True)
            ],
            [_form_of_group(base, group) for group in base.param_groups],
        ]
        self.objects: list[Any] = list(params)
        for slot in slots:
            if slot is not None:
                self.objects += (slot.anchor, slot.value)
        for entry in base.state.values():
            self.objects += entry.values()

    def hold(self, before: Facts) -> bool:
        """Whether they are what they were."""
        return (
            self.values == before.values
            and len(self.objects) == len(before.objects)
            and all(map(is_, self.objects, before.objects))
        )


class Plan(NamedTuple):
    """How a step is taken.

    Attributes:
        lent: the members that the base itself steps.
        batched: all other members, of which ``eager`` are stepped eagerly and ``calls`` step those
            that are compiled.
        others: the parameters beside the latter, which the base itself steps.
        is_steady: whether the next step is to be taken in the same way if nothing changes.
        facts: after the step.
    """

    lent: list[Member]
    batched: list[Member]
    others: list[Tensor]
    eager: list[Member]
    calls: list[Call]
    is_steady: bool
    facts: Facts | None = None


def _form_of_group(base: Optimizer, group: dict[str, Any]) -> Hashable:
    lr = form_of_options(group.get("lr"), numbers=False), lr_is_zero(group)
    return form_without_lr(own_options(base, group)), lr
