"""PyTorch's own table of optimizers: every configuration, every scheduler stack, every error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bases import ELEMENTWISE, REFUSED
from tests.optimizers import Case
from tests.test_parity import run_on
from tests.training import (
    assert_equal,
    freeze_and_thaw,
    saved_and_loaded,
    small_model,
    train,
    weights,
)

common = pytest.importorskip("torch.testing._internal.common_optimizers", reason="needs expecttest")


def case_of(info: Any, given: Any) -> Case:
    kind = info.optim_cls
    return Case(
        f"{info.name}: {given.desc}",
        kind,
        given.kwargs,
        elementwise=kind in ELEMENTWISE,
        matrices_only=kind is torch.optim.Muon,
        closure=info.step_requires_closure,
        sparse=info.only_supports_sparse_grads,
    )


def configurations(info: Any) -> list[Any]:
    """All of them, foreach and fused too. ``differentiable`` is refused, see below."""
    return common._get_optim_inputs_including_global_cliquey_kwargs(
        "cpu", None, info, skip=("differentiable",)
    )


INFOS = [info for info in common.optim_db if info.optim_cls not in REFUSED]
CASES = [case_of(info, given) for info in INFOS for given in configurations(info)]
DTYPES = [torch.float32, torch.float64]


def wrap(case: Case, params: Any, **settings: Any) -> GMixoutOptimizer:
    return GMixoutOptimizer(copy.deepcopy(case)(params), **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_without_masking_each_is_itself(case: Case, dtype: torch.dtype) -> None:
    bare_model = small_model(dtype, bias=not case.matrices_only)
    model = copy.deepcopy(bare_model)
    bare = copy.deepcopy(case)(bare_model.named_parameters())
    wrapped = wrap(case, model.named_parameters(), mask_prob=0.0, resample_every=3)
    losses = train(bare_model, bare, range(8), freeze_and_thaw(bare_model))
    assert_equal(losses, train(model, wrapped, range(8), freeze_and_thaw(model)))
    assert_equal(weights(bare_model), weights(model))
    assert_equal(bare.state_dict()["state"], wrapped.state_dict()["state"])


@pytest.mark.parametrize("layout", ["packed", "dense"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_masked_each_equals_the_reference(case: Case, layout: str) -> None:
    """Which makes packed equal to dense."""
    if layout == "packed" and not case.elementwise:
        with pytest.raises(ValueError, match=f"{case.make.__name__}.*dense"):
            wrap(case, [torch.nn.Parameter(torch.ones(2, 3))], layout=layout)
        return
    shapes = [(6, 8), (5, 7)] if case.matrices_only else [(6, 8), (9,), ()]
    case = copy.deepcopy(case)
    run_on(case, shapes, mask_prob=0.9 if layout == "dense" else 0.6, layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_saved_and_loaded_each_goes_on(case: Case, dtype: torch.dtype) -> None:
    model = small_model(dtype, bias=not case.matrices_only)
    resumed_model = copy.deepcopy(model)
    optimizer = wrap(case, model.parameters(), mask_prob=0.5, resample_every=3)
    train(model, optimizer, range(7), freeze_and_thaw(model))
    of_model, of_optimizer = saved_and_loaded([model.state_dict(), optimizer.state_dict()])
    resumed_model.load_state_dict(of_model)
    resumed = wrap(case, resumed_model.parameters(), mask_prob=0.5, resample_every=3)
    resumed.load_state_dict(of_optimizer)
    for of, by in ((model, optimizer), (resumed_model, resumed)):
        train(of, by, range(7, 12), freeze_and_thaw(of))
    assert_equal(weights(model), weights(resumed_model))
    assert_equal(optimizer.state_dict(), resumed.state_dict())


STACKS = [
    pytest.param(info, stack, id=f"{info.name}-{number}")
    for info in INFOS
    for number, stack in enumerate(info.scheduler_inputs)
]


@pytest.mark.parametrize("mask_prob", [0.0, 0.9])
@pytest.mark.parametrize(("info", "stack"), STACKS)
def test_scheduler_stacks(info: Any, stack: list[Callable], mask_prob: float) -> None:
    case = case_of(info, info.optim_inputs_func(device="cpu")[0])
    bare_model = small_model(bias=not case.matrices_only)
    model = copy.deepcopy(bare_model)
    bare = case(bare_model.parameters())
    wrapped = wrap(case, model.parameters(), mask_prob=mask_prob, resample_every=3)
    runs = [(bare_model, bare), (model, wrapped)]
    stacks = [[make(optimizer) for make in stack] for _, optimizer in runs]
    for step in range(8):
        for (of, optimizer), schedulers in zip(runs, stacks, strict=True):
            train(of, optimizer, [step])
            for scheduler in schedulers:
                on_plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([1.0] if on_plateau else []))
        assert bare.param_groups[0]["lr"] == wrapped.param_groups[0]["lr"]
    if mask_prob == 0:
        assert_equal(weights(bare_model), weights(model))


ERRORS = [
    pytest.param(info, error, id=f"{info.name}-{number}")
    for info in common.optim_db
    for number, error in enumerate(info.optim_error_inputs_func("cpu", torch.float64))
]


@pytest.mark.parametrize(("info", "error"), ERRORS)
def test_what_is_an_error_stays_one(info: Any, error: Any) -> None:
    given = error.optimizer_error_input

    def build() -> GMixoutOptimizer:
        return GMixoutOptimizer(info.optim_cls(given.params, **given.kwargs), mask_prob=0.0)

    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            build()
    elif error.error_on == common.OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(error.error_type, match=error.error_regex):
            build()
    else:
        optimizer = build()
        with pytest.raises(error.error_type, match=error.error_regex):
            optimizer.step()


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_cannot_be_masked_is_refused_by_name(kind: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(ValueError, match=kind.__name__):
        GMixoutOptimizer(kind([torch.nn.Parameter(torch.ones(3))]))
