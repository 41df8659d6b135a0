"""Dense layout: the wrapped optimizer works on the model's own parameters, whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim import mixing
from gmixout_optim.bases import Closure, enter_step
from gmixout_optim.layout import Layout
from gmixout_optim.members import Member, Members
from gmixout_optim.rates import shown_groups
from gmixout_optim.residual import EpisodicResidual, Loan, PersistentResidual


class DenseLayout(Layout):
    """The base sees whole parameters, with gradients that are zero off the active cells.

    What it does off the active cells is put back after its step (with the persistent residual, it
    stays in U). Anchors have the parameters' own dtype.
    """

    def __init__(self, base: Optimizer, members: Members) -> None:
        persistent = members.run.residual == "persistent"
        super().__init__(
            base, members, PersistentResidual() if persistent else EpisodicResidual(wide=False)
        )

    def step(self, closure: Closure | None) -> Any:
        loan = _LentParameters(self)
        kept = []
        if closure is not None:
            kept = [
                (param, param.detach().clone())
                for group in self.base.param_groups
                for param in group["params"]
                if param not in self.members
            ]

        def evaluate() -> Any:
            # Of theta: a base that evaluates several times (LBFGS) optimizes the loss of theta.
            loan.take_back()
            with torch.enable_grad():
                loss = closure() if closure is not None else None
            loan.lend()
            return loss

        try:
            loan.lend()
            with shown_groups(self.base, {member.param: member.rate for member in self.members}):
                loss = enter_step(self.base, None if closure is None else evaluate)
            loan.take_back()
            self.seal(stepped=True)
        except BaseException:
            loan.give_up()
            for param, weights in kept:
                param.detach().copy_(weights)
            raise
        return loss

    def check_state(self, member: Member) -> None:
        """Nothing to check: the base keeps its state whole."""

    def pack_state(self) -> None:
        """Nothing to do: the base works on whole tensors."""

    def _begin_episodes(self, members: list[Member]) -> None:
        for member in members:
            self.residual.begin_episode(member)
        if self.members.run.residual == "episodic":
            shape_of = {member: member.cells.form[1] for member in members}
            self._renew_state({member: (shape, shape) for member, shape in shape_of.items()})


class _LentParameters:
    """The parameters in one step, lent to the base and taken back around each evaluation."""

    def __init__(self, layout: DenseLayout) -> None:
        self.layout = layout
        self.residual = layout.residual
        self.first: dict[Member, Loan] = {}
        self.loans: dict[Member, Loan] = {}
        self.gradients: dict[Member, Tensor | None] = {}

    def lend(self) -> None:
        """Hand over all parameters that have a gradient or a slot, gradients masked."""
        members = list(self.layout.members)
        for member in members:
            member.check_gradient()
        self.layout.look()
        self.layout.open([member for member in members if member.cells.gradient is not None])
        for member in self.layout.members.trained():
            grad = self.gradients[member] = member.cells.gradient
            if grad is not None:
                member.cells.gradient = self._masked(member, grad)
            loan = self.loans[member] = self.residual.lend(member)
            self.first.setdefault(member, loan)

    def take_back(self) -> None:
        for member, loan in self.loans.items():
            self.residual.take_back(member, loan)
        self.loans.clear()
        self.layout.seal()
        self._return_gradients()

    def give_up(self) -> None:
        """Put everything back to where the step began."""
        for member, loan in self.first.items():
            self.residual.give_up(member, loan)
        self.layout.seal()
        self._return_gradients()

    def _return_gradients(self) -> None:
        for member, grad in self.gradients.items():
            member.cells.gradient = grad
        self.gradients.clear()

    def _masked(self, member: Member, grad: Tensor) -> Tensor:
        """The gradient of what is trained: s * grad on the active cells, zero elsewhere."""
        grid = member.cells.grid
        masked = grid.copy(torch.zeros_like(grad))
        active = self.layout.active_gradient(member)
        mixing.scatter_(grid.view(masked), member.index(), active)
        return masked
