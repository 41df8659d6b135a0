"""The method in its slow, obvious, dense form, against which the library is held.

:class:`Reference` computes in the paper's symbols: live weights theta, anchor A, mask M, trained
weights phi (or U), mask probability p, EMA coefficient lam, resampling period k, scale s. It shares
no code with the library and imports none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

Gradients = list["Tensor | None"]
# The loss and its gradients at the weights theta.
Evaluate = Callable[[list[Tensor]], tuple[Tensor, Gradients]]


@dataclass
class Mix:
    """How one tensor is mixed, and with how many times its learning rate.

    d is the density that is drawn, m / N, None for a tensor that is not mixed.
    """

    d: float | None
    lam: float
    rate: float = 1.0


class Reference:
    """Both residuals on dense tensors.

    Args:
        weights: the pretrained weights.
        make_base: builds the base optimizer on the trained tensors.
        mixes: d and lam of each tensor; lam may be changed while training.
        draw: the masks of the episode that begins, one for each tensor.
        k: resampling period, None for one episode without end.
        warmup: steps of an episode over which the learning rate of mixed tensors rises to its full
            value.
    """

    def __init__(
        self,
        weights: list[Tensor],
        make_base: Callable[[list[Tensor]], Optimizer],
        mixes: list[Mix],
        draw: Callable[[], list[Tensor]],
        *,
        k: int | None,
        warmup: int,
        persistent: bool,
        rescale: bool,
    ) -> None:
        self.make_base, self.mixes, self.draw = make_base, mixes, draw
        self.k, self.warmup = k, warmup
        self.persistent, self.rescale = persistent, rescale
        contiguous = torch.contiguous_format
        self.A = [weight.detach().clone(memory_format=contiguous) for weight in weights]
        self.phi = [nn.Parameter(a.clone()) for a in self.A]
        self.base = make_base(self.phi)
        self.M = draw()
        self.steps_in_episode = 0
        # A tensor that was never trained sits at its anchor, whatever somebody writes into it.
        self.is_trained = [False for _ in weights]

    def is_mixed(self, i: int) -> bool:
        return self.mixes[i].d is not None and self.A[i].numel() > 0

    def s(self, i: int) -> float:
        d = self.mixes[i].d
        return 1 / d if self.rescale and d is not None else 1.0

    @property
    def theta(self) -> list[Tensor]:
        """What the model computes with: A + M * s * (phi - A); phi where nothing is mixed."""
        return [
            torch.where(M, A + self.s(i) * (phi.detach() - A), A)
            if self.is_mixed(i)
            else phi.detach()
            for i, (A, M, phi) in enumerate(zip(self.A, self.M, self.phi, strict=True))
        ]

    @property
    def deployed(self) -> list[Tensor]:
        """Episodic: the anchor that the end of the episode would leave.

        Persistent: the mean over masks.
        """
        if not self.persistent:
            return [
                self.moved_anchor(i) if self.is_mixed(i) else phi.detach()
                for i, phi in enumerate(self.phi)
            ]
        return [
            A + mix.d * self.s(i) * (U.detach() - A) if self.is_mixed(i) else U.detach()
            for i, (A, U, mix) in enumerate(zip(self.A, self.phi, self.mixes, strict=True))
        ]

    def moved_anchor(self, i: int) -> Tensor:
        """lam * A + (1 - lam) * phi; with the episodic residual on S only."""
        lam, A, phi = self.mixes[i].lam, self.A[i], self.phi[i].detach()  # noqa: N806
        # At the ends of lam's range one of the two does not enter, not even as 0 * inf.
        moved = A if lam == 1 else phi if lam == 0 else lam * A + (1 - lam) * phi
        return moved.clone() if self.persistent else torch.where(self.M[i], moved, A)

    def step(self, evaluate: Evaluate) -> None:
        """One step of the base with masked gradients, and the end of the episode after its k-th."""

        def closure() -> Tensor:
            loss, gradients = evaluate(self.theta)
            for i, (phi, gradient) in enumerate(zip(self.phi, gradients, strict=True)):
                phi.grad = gradient
                self.is_trained[i] = self.is_trained[i] or gradient is not None
                if gradient is not None and self.is_mixed(i):
                    zero = torch.zeros_like(gradient)
                    phi.grad = torch.where(self.M[i], self.s(i) * gradient, zero)
            return loss

        rates = [group["lr"] for group in self.base.param_groups]
        for group in self.base.param_groups:
            group["lr"] = self._warmed_lr(group)
        self.base.step(closure)
        for group, rate in zip(self.base.param_groups, rates, strict=True):
            group["lr"] = rate
        if not self.persistent:
            self._put_back([~M for M in self.M])
        self.steps_in_episode += 1
        if self.steps_in_episode == self.k:
            self.resample()

    def _warmed_lr(self, group: dict[str, Any]) -> float:
        """Of a group of one tensor, where there is a warm-up."""
        (i, *_) = [i for i, phi in enumerate(self.phi) if phi is group["params"][0]]
        if not self.is_mixed(i) or self.steps_in_episode >= self.warmup:
            return group["lr"]
        return group["lr"] * ((self.steps_in_episode + 1) / self.warmup)

    def resample(self) -> None:
        for i in filter(self.is_mixed, range(len(self.A))):
            self.A[i] = self.moved_anchor(i)
        self._begin_episode()

    def resync(self, weights: list[Tensor]) -> None:
        """Take other weights as pretrained."""
        with torch.no_grad():
            for i, weight in enumerate(weights):
                self.A[i] = weight.detach().clone()
                self.phi[i].copy_(weight)
        self._begin_episode()

    def write(self, i: int, weight: Tensor) -> None:
        """Somebody writes into the model: where it no longer holds theta, it holds the truth."""
        theta, s, A, M = self.theta[i], self.s(i), self.A[i], self.M[i]  # noqa: N806
        with torch.no_grad():
            if not self.is_mixed(i):
                self.phi[i].copy_(weight)
            elif not self.is_trained[i]:
                self.A[i] = weight.clone()
                self.phi[i].copy_(weight)
            else:
                written = torch.where(weight != theta, A + (weight - A) / s, self.phi[i])
                off_s = self.phi[i] if self.persistent else weight
                self.phi[i].copy_(torch.where(M, written, off_s))
                self.A[i] = torch.where(M, A, weight)

    def consolidate(self) -> list[Tensor]:
        """The weights that are left in the model."""
        if not self.persistent and self.steps_in_episode > 0:
            self.resample()
        return self.deployed

    def _begin_episode(self) -> None:
        self.M = self.draw()
        self.steps_in_episode = 0
        if self.persistent:
            return
        self._put_back([torch.ones_like(M) for M in self.M])
        if any(map(self.is_mixed, range(len(self.A)))):
            self._renew_base()

    def _put_back(self, where: list[Tensor]) -> None:
        with torch.no_grad():
            for i in filter(self.is_mixed, range(len(self.A))):
                self.phi[i].copy_(torch.where(where[i], self.A[i], self.phi[i]))

    def _renew_base(self) -> None:
        """A fresh base with the old one's hyperparameters, and its state of what is not mixed."""
        old, self.base = self.base, self.make_base(self.phi)
        for group, old_group in zip(self.base.param_groups, old.param_groups, strict=True):
            group.update({key: value for key, value in old_group.items() if key != "params"})
        if isinstance(old, LBFGS):
            return  # one history for all weights together
        for i, phi in enumerate(self.phi):
            if old.state.get(phi) and not self.is_mixed(i):
                self.base.state[phi] = old.state[phi]
