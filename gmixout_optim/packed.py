"""Packed layout: the wrapped optimizer works on the active values only, one vector per tensor."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim import mixing
from gmixout_optim.bases import (
    ELEMENTWISE,
    Closure,
    enter_step,
    keeps_state,
    mark_stepped,
    per_cell_state,
    step_is_its_own,
)
from gmixout_optim.compiled import Compiler, is_launched
from gmixout_optim.layout import Layout
from gmixout_optim.members import Member, Members
from gmixout_optim.packed_step import (
    Item,
    SettledGroups,
    form_of_options,
    form_without_lr,
    gradient_of,
    packed_step,
    partition,
    step_in_batches,
    take_steps_back,
)
from gmixout_optim.plan import Plan
from gmixout_optim.rates import shown_groups
from gmixout_optim.residual import EpisodicResidual, slot_of
from gmixout_optim.shards import is_dtensor, local_of


class PackedLayout(Layout):
    """Anchors and the base's state live on the active cells, in at least float32.

    Args:
        base: the wrapped optimizer.
        members: the mixed parameters.
        compile: the user's ``compile``.
    """

    def __init__(self, base: Optimizer, members: Members, compile: bool | Literal["auto"]) -> None:
        self.residual: EpisodicResidual
        super().__init__(base, members, EpisodicResidual(wide=True))
        static_shapes = members.run.sampler == "stratified"
        self.compiler = Compiler(base, compile, static_shapes)
        # What a base can refuse an option for; numbers may follow a schedule.
        self._settled = SettledGroups(base, partial(form_of_options, numbers=False))
        # What compiled code depends on.
        self._settled_numbers = SettledGroups(base, form_without_lr)
        self._plan: Plan | None = None

    def step(self, closure: Closure | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan, self._plan = self._plan, None
        if plan is None or not plan.holds():
            plan = self._make_plan()
        for member in plan.eager:
            gradient_of(member)  # may raise
        arguments = [call.arguments() for call in plan.calls]
        try:
            went_as_planned = self._run(plan, arguments)
        except BaseException:
            for member in self.members.trained():
                # Whether its values were stepped is not known: the model says.
                slot_of(member).version = None
            self.look()
            raise
        self.seal(stepped=True)
        if went_as_planned and plan.note():
            self._plan = plan
        return loss

    def _make_plan(self) -> Plan:
        """How to take the step that comes. Raises where it cannot be taken."""
        learning = [member for member in self.members if member.cells.gradient is not None]
        for member in learning:
            member.check_gradient()
            gradient_of(member)  # may raise
        self.look()
        self.open(learning)
        self.pack_state()
        batched, lent = self._split(learning)
        settled = self._settled_numbers.ids()
        compiled, eager = self.compiler.split_step(batched, settled)
        calls, failed = self.compiler.prepare(compiled)
        is_steady = not lent and len(settled) == len(self.base.param_groups)
        return Plan(self.base, self.members, lent, eager + failed, calls, is_steady)

    def _run(self, plan: Plan, arguments: list[list[Tensor]]) -> bool:
        """Returns whether it was taken as planned. ``arguments`` are those of its calls."""
        has_others = any(param.grad is not None for param in plan.others)
        if plan.lent or not plan.batched or has_others:
            self._step_base(plan.lent, hidden=plan.batched)
        mark_stepped(self.base)
        step_in_batches(self.base, plan.eager)
        given = zip(plan.calls, arguments, strict=True)
        failed = [call for call, each in given if not self.compiler.step(call, each)]
        for call in failed:
            step_in_batches(self.base, call.members)
        return not failed

    def _split(self, members: list[Member]) -> tuple[list[Member], list[Member]]:
        """The members to step in batches, past the base, and those that the base itself steps.

        The latter are those of optimizers that are not torch's; of a base with hooks of its own,
        which may look at the packed gradients; tensors that are repeated in their group; and where
        the base might refuse midway: a tensor without state, which it has to create, and a group
        whose options are not those of the step before.
        """
        if type(self.base) not in ELEMENTWISE or not step_is_its_own(self.base):
            return [], members
        base, settled = self.base, self._settled.ids()

        def is_ready(member: Member) -> bool:
            has_state = bool(base.state.get(member.param)) or not keeps_state(base, member.group)
            return has_state and id(member.group) in settled and not member.is_repeated

        return partition(members, is_ready)

    def _step_base(self, members: list[Member], hidden: list[Member]) -> None:
        """The base itself steps packed values in place of parameters, and what is not mixed.

        Outside of its step groups hold the model's parameters, and state is keyed by them.
        """
        base = self.base
        take_steps_back(base, members)
        lent: dict[Tensor, Tensor | None] = {member.param: None for member in hidden}
        rates = {member.param: member.rate for member in members}

        def enter(trained: list[Tensor], grads: list[Tensor]) -> None:
            stand_ins = dict(zip((m.param for m in members), trained, strict=True))
            owners = {value: param for param, value in stand_ins.items()}
            state = base.state
            for value, grad in zip(trained, grads, strict=True):
                value.grad = grad
            if stand_ins:
                base.state = defaultdict(
                    dict, {stand_ins.get(key, key): entry for key, entry in state.items()}
                )
            try:
                with shown_groups(base, rates, {**lent, **stand_ins}):
                    enter_step(base)
            finally:
                if stand_ins:
                    returned = {owners.get(key, key): item for key, item in base.state.items()}
                    base.state = state
                    state.clear()
                    state.update(returned)
                for value in trained:
                    value.grad = None

        packed_step(list(map(Item.of, members)), list(map(gradient_of, members)), enter)

    def tell(self) -> None:
        self.compiler.tell()

    def forget(self) -> None:
        super().forget()
        self._plan = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}  # compiled code stays behind

    def _begin_episodes(self, members: list[Member]) -> None:
        self._plan = None
        compiled, eager = self.compiler.split(members)
        self.compiler.draw([member for member in compiled if is_launched(member.param)])
        shapes = {}
        for member in self.members:
            shape = new_shape = member.cells.form[1]
            if member.slot is not None:
                size = member.cells.grid.size_at(member.index())
                shape, new_shape = member.slot.anchor.shape, torch.Size([size])
            shapes[member] = shape, new_shape
        self._renew_state(shapes)
        for member in eager + self.compiler.begin_episode(compiled):
            self.residual.begin_episode(member)

    def _end_episodes(self, members: list[Member]) -> None:
        compiled, eager = self.compiler.split(list(filter(self.residual.moves, members)))
        super()._end_episodes(eager + self.compiler.end_episode(compiled))

    def pack_state(self) -> None:
        for member in self.members.trained():
            self._pack_state(member)

    def check_state(self, member: Member) -> None:
        for key, item in self.base.state.get(member.param, {}).items():
            is_subclass = isinstance(item, Tensor) and type(local_of(item)) is not Tensor
            if is_subclass and item.numel() > 1:
                raise TypeError(
                    f"base has stepped and keeps {key!r} of {member.name} as "
                    f"{type(item).__name__}, which cannot be packed: wrap it before its first step"
                )

    def _pack_state(self, member: Member) -> None:
        """Take of whole tensors in the base's state what is on the active cells."""
        state, cells = self.base.state.get(member.param), member.cells
        shape, anchor = cells.form[1], slot_of(member).anchor
        if not state:
            return
        if not any(isinstance(item, Tensor) and item.shape == shape for item in state.values()):
            return  # as ever
        for key in per_cell_state(self.base, state, shape):
            item = state[key]
            is_packed = shape == anchor.shape and item.dtype == anchor.dtype
            if is_dtensor(item) or not (cells.is_distributed or is_packed):
                packed = mixing.gather(cells.grid.view(local_of(item)), member.index())
                state[key] = packed.to(anchor.dtype)
