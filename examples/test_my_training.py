"""Copy this file into your test suite, and put your model, optimizer and batches into ``make``.

Run it with ``pytest test_my_training.py``; ``-k invariant_8`` selects a check. The checks are
explained in docs/invariants.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from torch import nn

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.testing import (
    InvariantMonitor,
    check_invariants,
    parametrize_with_checks,
    strategies,
)

SETTINGS: dict[str, Any] = {"exclude": "head.*", "resample_every": 4}


def make() -> tuple[nn.Module, torch.optim.Optimizer, list[Any]]:
    """The same each time: load your pretrained model here."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.body = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 32))
    model.head = nn.Linear(32, 4)
    with torch.no_grad():
        for param in model.body.parameters():
            param.mul_(1.3)  # stands for pretraining
    base = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    batches = [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(5)]
    return model, base, batches


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model.head(model.body(inputs)), labels)


# Every invariant that applies, one test each.
@parametrize_with_checks([make], steps=12, loss=loss, **SETTINGS)
def test_my_training(check: Callable[[], None]) -> None:
    check()


# A training of your own, watched.
def test_my_loop() -> None:
    model, base, batches = make()
    optimizer = GMixoutOptimizer(base, **SETTINGS)
    with InvariantMonitor(optimizer, every=2):
        for batch in batches * 3:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    check_invariants(optimizer)
    optimizer.consolidate()


# Random models, settings, gradients and schedules around your optimizer.
@given(run=strategies.runs())
def test_my_optimizer(run: strategies.RandomRun) -> None:
    snapshot = None
    for _, optimizer in run.train(lambda params: torch.optim.AdamW(params, lr=1e-3)):
        snapshot = check_invariants(optimizer, snapshot=snapshot)
