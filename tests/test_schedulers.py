"""Every learning-rate scheduler of torch, wherever it is built."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

from gmixout_optim import GMixoutOptimizer
from tests.training import assert_equal, small_model, train, weights

S = lr_scheduler
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda opt: S.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda opt: S.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: S.StepLR(opt, 2),
    "MultiStepLR": lambda opt: S.MultiStepLR(opt, [2, 5]),
    "ConstantLR": lambda opt: S.ConstantLR(opt, 0.5, total_iters=3),
    "LinearLR": lambda opt: S.LinearLR(opt, 0.1, total_iters=4),
    "ExponentialLR": lambda opt: S.ExponentialLR(opt, 0.9),
    "SequentialLR": lambda opt: S.SequentialLR(
        opt, [S.LinearLR(opt, 0.1, total_iters=3), S.CosineAnnealingLR(opt, 7)], [3]
    ),
    "CosineAnnealingLR": lambda opt: S.CosineAnnealingLR(opt, 8),
    "ChainedScheduler": lambda opt: S.ChainedScheduler(
        [S.ConstantLR(opt, 0.1, total_iters=2), S.ExponentialLR(opt, 0.9)], opt
    ),
    "ReduceLROnPlateau": lambda opt: S.ReduceLROnPlateau(opt, patience=1),
    "CyclicLR": lambda opt: S.CyclicLR(opt, 0.01, 0.1, step_size_up=3, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda opt: S.CosineAnnealingWarmRestarts(opt, 3),
    "OneCycleLR": lambda opt: S.OneCycleLR(opt, 0.1, total_steps=12),
    "PolynomialLR": lambda opt: S.PolynomialLR(opt, 8),
    "SWALR": lambda opt: SWALR(opt, 0.01, anneal_epochs=3),
}
BASES: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.05),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "AdamW-tensor-lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.05)),
}


def test_the_table_is_whole() -> None:
    assert {*SCHEDULERS, "LRScheduler"} == {*lr_scheduler.__all__, "SWALR"}


def options(optimizer: Optimizer) -> dict[str, Any]:
    group = optimizer.param_groups[0]
    return {key: group[key] for key in ("lr", "betas", "momentum") if key in group}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("base_kind", BASES)
def test_a_scheduler_may_hold_wrapper_or_base(base_kind: str, kind: str) -> None:
    """Built on the wrapper, on the base after wrapping, or on the base before: as on a bare
    optimizer, no warning."""
    bare_model = small_model()
    bare = BASES[base_kind](bare_model.parameters())
    bare_scheduler = SCHEDULERS[kind](bare)
    expected = []
    for step in range(10):
        train(bare_model, bare, [step])
        bare_scheduler.step(*metric(bare_scheduler))
        expected.append({key: float_of(value) for key, value in options(bare).items()})

    results = []
    for place in ("wrapper", "base after", "base before"):
        model = small_model()
        base = BASES[base_kind](model.parameters())
        scheduler = SCHEDULERS[kind](base) if place == "base before" else None
        optimizer = GMixoutOptimizer(base, resample_every=3)
        rate = optimizer.param_groups[0]["lr"]
        if scheduler is None:
            scheduler = SCHEDULERS[kind](base if place == "base after" else optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(10):
                train(model, optimizer, [step])
                scheduler.step(*metric(scheduler))
                for seen in (optimizer, base):
                    now = {key: float_of(value) for key, value in options(seen).items()}
                    assert now == expected[step]
        if isinstance(rate, torch.Tensor):
            assert optimizer.param_groups[0]["lr"] is rate
        results.append(weights(model))
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


def metric(scheduler: object) -> list[float]:
    return [1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []


def float_of(value: Any) -> Any:
    return float(value) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_schedule_resumes(kind: str) -> None:
    """Optimizer and scheduler saved in the middle of an episode and of the schedule."""
    model = small_model()
    optimizer = GMixoutOptimizer(BASES["AdamW"](model.parameters()), resample_every=3)
    scheduler = SCHEDULERS[kind](optimizer)
    for step in range(4):
        train(model, optimizer, [step])
        scheduler.step(*metric(scheduler))

    resumed_model = small_model()
    resumed = GMixoutOptimizer(BASES["AdamW"](resumed_model.parameters()), resample_every=3)
    resumed_scheduler = SCHEDULERS[kind](resumed)
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    for of, by, schedule in (
        (model, optimizer, scheduler),
        (resumed_model, resumed, resumed_scheduler),
    ):
        for step in range(4, 9):
            train(of, by, [step])
            schedule.step(*metric(schedule))
    assert_equal(weights(model), weights(resumed_model))
    assert options(optimizer) == options(resumed)


def test_a_cycled_momentum_is_stepped_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is slow because an option changes would not be seen in any result."""
    from gmixout_optim import packed

    stepped = []
    step = packed.step_in_batches
    monkeypatch.setattr(
        packed,
        "step_in_batches",
        lambda base, members: (stepped.append(len(members)), step(base, members))[1],
    )
    param = torch.nn.Parameter(torch.randn(30))
    optimizer = GMixoutOptimizer(torch.optim.AdamW([param]))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
    for _ in range(10):
        param.grad = torch.randn(30)
        optimizer.step()
        scheduler.step()
    assert sum(stepped) == 9  # the first makes the state
