"""A step is taken as the one before only where it may be: what changes in between is seen."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from gmixout_optim import GMixoutOptimizer, compiled, fused, packed
from tests.training import assert_equal

Between = Callable[[GMixoutOptimizer, list[nn.Parameter], int], Any]


def train(
    between: Between,
    replans: bool = False,
    compile: bool = False,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    lr: Any = 0.01,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> list[torch.Tensor]:
    """The weights after eight steps with ``between`` called before each."""
    torch.manual_seed(0)
    params = [nn.Parameter((torch.randn(40, 40) * 0.1).to(dtype)) for _ in range(2)]
    optimizer = GMixoutOptimizer(make(params, lr=lr, **options), compile=compile, resample_every=50)
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = None
            if hasattr(param, "grad_dtype"):
                param.grad_dtype = None
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        between(optimizer, params, step)
        if replans:
            optimizer._layout._plan = None
        optimizer.step()
    return [param.detach() for param in params]


def replaced_group(optimizer: GMixoutOptimizer, params: list[nn.Parameter], step: int) -> None:
    if step == 4:
        optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    if step >= 4:
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)


def wide_gradients(optimizer: GMixoutOptimizer, params: list[nn.Parameter], step: int) -> None:
    if step >= 5:
        for param in params:
            param.grad.data = param.grad.data.double()


def other_betas(optimizer: GMixoutOptimizer, params: list[nn.Parameter], step: int) -> None:
    if step == 5:
        optimizer.param_groups[0]["betas"] = (torch.tensor(0.5), torch.tensor(0.6))


def strided_state(optimizer: GMixoutOptimizer, params: list[nn.Parameter], step: int) -> None:
    if step == 5:
        for param in params:
            moment = optimizer.base.state[param]["exp_avg"]
            moment.data = torch.stack([moment, moment], 1)[:, 0]


def exchanged_state(optimizer: GMixoutOptimizer, params: list[nn.Parameter], step: int) -> None:
    if step == 4:
        state = optimizer.base.state
        first, second = state[params[0]], state[params[1]]
        state.clear()
        state.update({params[1]: first, params[0]: second})


def new_state(optimizer: GMixoutOptimizer, params: list[nn.Parameter], step: int) -> None:
    if step == 5:
        entry = optimizer.base.state[params[1]]
        entry["exp_avg"] = torch.full_like(entry["exp_avg"], 0.1)


def negated_gradients(optimizer: GMixoutOptimizer, params: list[nn.Parameter], step: int) -> None:
    for param in params:
        param.grad = torch._neg_view(param.grad)


def weights_elsewhere(optimizer: GMixoutOptimizer, params: list[nn.Parameter], step: int) -> None:
    if step == 5:
        params[0].data = params[0].data.clone()


def misaligned_weights(optimizer: GMixoutOptimizer, params: list[nn.Parameter], step: int) -> None:
    if step == 5:
        params[0].data = torch.cat([torch.zeros(1), params[0].data.flatten()])[1:].view(40, 40)


def transposed_weights(optimizer: GMixoutOptimizer, params: list[nn.Parameter], step: int) -> None:
    if step == 4:
        optimizer.consolidate()
        optimizer.resync()
        params[0].data = params[0].data.t()
    if step >= 4:
        params[0].grad = params[0].grad.t().contiguous().t()


def written_weights(optimizer: GMixoutOptimizer, params: list[nn.Parameter], step: int) -> None:
    if step == 4:
        with torch.no_grad():
            params[0].mul_(0.9)


def fewer_gradients(optimizer: GMixoutOptimizer, params: list[nn.Parameter], step: int) -> None:
    if step in (4, 6):
        params[step == 6].grad = None


def options(optimizer: GMixoutOptimizer, params: list[nn.Parameter], step: int) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.1 * (step > 4)
    optimizer.param_groups[0]["lr"] = 0.0 if step == 3 else 0.01


def hooked(optimizer: GMixoutOptimizer, params: list[nn.Parameter], step: int) -> None:
    if step == 5:
        optimizer.base.register_step_pre_hook(lambda base, args, kwargs: None)


CHANGES: list[tuple[Between, dict[str, Any]]] = [
    (replaced_group, {}),
    (wide_gradients, {}),
    (wide_gradients, dict(dtype=torch.bfloat16)),
    (other_betas, dict(betas=(torch.tensor(0.9), torch.tensor(0.999)))),
    (strided_state, {}),
    (exchanged_state, {}),
    (new_state, {}),
    (negated_gradients, {}),
    (weights_elsewhere, {}),
    (transposed_weights, {}),
    (misaligned_weights, {}),
    (written_weights, {}),
    (written_weights, dict(dtype=torch.bfloat16)),
    (fewer_gradients, {}),
    (options, {}),
    (hooked, {}),
    (lambda *_: None, dict(make=torch.optim.SGD, lr=torch.tensor(1))),
    (lambda *_: None, dict(lr=torch.tensor(0.01))),
]


@pytest.mark.parametrize(("between", "settings"), CHANGES)
def test_a_change_between_steps_is_seen(between: Between, settings: dict[str, Any]) -> None:
    planned, anew = train(between, **settings), train(between, replans=True, **settings)
    assert_equal(planned, anew)


@pytest.mark.compile
@pytest.mark.parametrize(("between", "settings"), CHANGES)
def test_a_change_between_compiled_steps_is_seen(
    between: Between, settings: dict[str, Any]
) -> None:
    planned = train(between, compile=True, **settings)
    assert_equal(planned, train(between, compile=True, replans=True, **settings))
    close = dict(rtol=1e-5, atol=1e-6)
    if settings.get("dtype") is torch.bfloat16:
        close = dict(rtol=0.02, atol=0.001)
    torch.testing.assert_close(planned, train(between, **settings), **close)


def test_a_steady_loop_has_one_plan() -> None:
    """Without it, all of the above would prove nothing."""
    plans = []

    def note(optimizer: GMixoutOptimizer, params: list[nn.Parameter], step: int) -> None:
        plans.append(optimizer._layout._plan)

    train(note)
    assert plans[2] is not None
    assert all(plan is plans[2] for plan in plans[2:])


def take_step(optimizer: GMixoutOptimizer, params: list[nn.Parameter]) -> None:
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()


def optimized(compile: bool = False) -> tuple[list[nn.Parameter], GMixoutOptimizer]:
    params = [nn.Parameter(torch.randn(40, 40)) for _ in range(2)]
    optimizer = GMixoutOptimizer(torch.optim.AdamW(params), compile=compile)
    for _ in range(4):
        take_step(optimizer, params)
    return params, optimizer


def test_entries_of_the_state_that_are_no_dicts() -> None:
    """Somebody counts steps in it."""
    params, optimizer = optimized()
    for count in range(3):
        optimizer.state["global_step"] = count
        take_step(optimizer, params)
    assert optimizer.steps_in_episode == 7


def test_weights_on_meta() -> None:
    """Where torch has no kernel to compare memory."""
    params = list(nn.Linear(40, 40).to("meta").parameters())
    optimizer = GMixoutOptimizer(torch.optim.AdamW(params), compile=False)
    for _ in range(4):
        take_step(optimizer, params)
    assert optimizer.steps_in_episode == 4


@pytest.mark.compile
@pytest.mark.parametrize("compile", [False, True])
def test_a_plan_does_not_hold_the_memory_of_weights(compile: bool) -> None:
    """A model that is moved off its device between two phases leaves nothing there."""
    params, optimizer = optimized(compile)
    assert optimizer._layout._plan is not None
    memory = StorageWeakRef(params[0].untyped_storage())
    for param in params:
        param.data = torch.empty(0)
    gc.collect()
    assert memory.expired()


@pytest.mark.compile
def test_warnings_that_are_errors_come_after_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two calls cannot be compiled: both tensors are stepped, once, and then it is told."""
    fused.forget()
    params = [nn.Parameter(torch.randn(40, 30)), nn.Parameter(torch.randn(20, 25))]
    others = [nn.Parameter(param.detach().clone()) for param in params]
    optimizer = GMixoutOptimizer(torch.optim.AdamW(params), compile=True)
    eager = GMixoutOptimizer(torch.optim.AdamW(others), compile=False)
    call, calls = fused.Fused.__call__, []

    def fails(self: fused.Fused, tensors: Any) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("the kernel does not load")
        call(self, tensors)

    monkeypatch.setattr(fused.Fused, "__call__", fails)

    take_step(optimizer, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="the kernel does not load"):
            take_step(optimizer, params)
        take_step(optimizer, params)
    for _ in range(3):
        take_step(eager, others)
    assert len(calls) == 2
    assert optimizer.steps_in_episode == 3
    torch.testing.assert_close(params, others, rtol=1e-5, atol=1e-6)


def test_few_calls_of_python_in_a_planned_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host has to keep ahead of the device: what it does is counted, not timed."""
    for module in (compiled, packed):
        monkeypatch.setattr(module, "is_launched", lambda tensor: True)
    monkeypatch.setattr(
        fused, "_compiled", lambda function, args, leaves: fused.Fused(lambda *tensors: None, [])
    )
    fused.forget()
    params = [nn.Parameter(torch.randn(20, 20)) for _ in range(100)]
    optimizer = GMixoutOptimizer(torch.optim.AdamW(params), compile=True)
    for param in params:
        param.grad = torch.ones(20, 20)
    for _ in range(4):
        optimizer.step()
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    fused.forget()
    assert 100 < calls < 20 * len(params)
