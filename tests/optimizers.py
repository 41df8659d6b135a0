"""The table of optimizers that the tests run through: adding one is one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer


@dataclass(frozen=True)
class Case:
    """One optimizer in one configuration.

    ``elementwise``: each weight's update depends on that weight alone. ``matrices_only``: takes 2-D
    parameters only. ``closure``: its step needs one. ``sparse``: takes sparse gradients only.
    """

    name: str
    make: Callable[..., Optimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)
    elementwise: bool = True
    matrices_only: bool = False
    closure: bool = False
    sparse: bool = False

    def __call__(self, params: Any) -> Optimizer:
        return self.make(params, **self.kwargs)

    def __repr__(self) -> str:
        return self.name


_o = torch.optim

CASES = [
    Case("Adadelta", _o.Adadelta, dict(lr=0.5, weight_decay=0.01)),
    Case("Adagrad", _o.Adagrad, dict(lr=0.05, initial_accumulator_value=0.1)),
    Case("Adam", _o.Adam, dict(lr=0.01)),
    Case("Adam-amsgrad", _o.Adam, dict(lr=0.01, amsgrad=True, weight_decay=0.1)),
    Case("Adam-fused", _o.Adam, dict(lr=0.01, fused=True)),
    Case("AdamW", _o.AdamW, dict(lr=0.01, weight_decay=0.1)),
    Case("AdamW-foreach", _o.AdamW, dict(lr=0.01, weight_decay=0.1, foreach=True)),
    Case("AdamW-fused", _o.AdamW, dict(lr=0.01, weight_decay=0.1, fused=True)),
    Case("AdamW-maximize", _o.AdamW, dict(lr=0.01, maximize=True)),
    Case("Adamax", _o.Adamax, dict(lr=0.01, weight_decay=0.1)),
    Case("ASGD", _o.ASGD, dict(lr=0.01, t0=2, lambd=0.01)),
    Case("NAdam", _o.NAdam, dict(lr=0.01, decoupled_weight_decay=True, weight_decay=0.1)),
    Case("RAdam", _o.RAdam, dict(lr=0.01, weight_decay=0.1)),
    Case("RMSprop", _o.RMSprop, dict(lr=0.01, momentum=0.9, centered=True)),
    Case("Rprop", _o.Rprop, dict(lr=0.01)),
    Case("SGD", _o.SGD, dict(lr=0.05)),
    Case("SGD-momentum", _o.SGD, dict(lr=0.05, momentum=0.9, weight_decay=0.1)),
    Case("SGD-dampening", _o.SGD, dict(lr=0.05, momentum=0.9, dampening=0.5)),
    Case("SGD-nesterov", _o.SGD, dict(lr=0.05, momentum=0.9, nesterov=True)),
    Case("Adafactor", _o.Adafactor, dict(lr=0.05), elementwise=False),
    Case("Muon", _o.Muon, dict(lr=0.05), elementwise=False, matrices_only=True),
    Case("LBFGS", _o.LBFGS, dict(lr=0.5, max_iter=3), elementwise=False, closure=True),
    Case("SparseAdam", _o.SparseAdam, dict(lr=0.01), elementwise=False, sparse=True),
]

ELEMENTWISE = [case for case in CASES if case.elementwise]
DENSE_GRADIENTS = [case for case in CASES if not case.sparse]
