"""A parameter belongs to one wrapper at a time, and may be repeated in a group."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from gmixout_optim import GMixoutOptimizer, members, packed_gradient
from tests.training import assert_equal, loss_of, saved_and_loaded, small_model, train, weights

HELD = r"body.weight is mixed by another GMixoutOptimizer.*consolidate\(\)"


def wrap(model: nn.Module, **settings: Any) -> GMixoutOptimizer:
    base = torch.optim.AdamW(model.named_parameters(), lr=0.02)
    return GMixoutOptimizer(base, **{"mask_prob": 0.5, "resample_every": 3, **settings})


@pytest.mark.parametrize("steps", [0, 2])
def test_a_second_wrapper_is_refused_and_its_base_left_alone(steps: int) -> None:
    model = small_model()
    first = wrap(model)
    train(model, first, range(steps))
    base = torch.optim.AdamW(model.named_parameters(), lr=0.02)
    before = [dict(group) for group in base.param_groups]
    with pytest.raises(ValueError, match=HELD):
        GMixoutOptimizer(base)
    assert base.param_groups == before
    other = small_model()
    alone = wrap(other)
    train(other, alone, range(5))
    train(model, first, range(steps, 5))
    assert_equal(weights(model), weights(other))


def test_a_group_that_another_wrapper_mixes_is_refused() -> None:
    model = small_model()
    first = wrap(model, exclude="head.*")
    second = GMixoutOptimizer(torch.optim.AdamW(model.head.parameters()), mask_prob=0.5)
    with pytest.raises(ValueError, match="is mixed by another GMixoutOptimizer"):
        second.add_param_group({"params": list(model.body.parameters())})
    second.add_param_group({"params": list(model.body.parameters()), "mask_prob": 0.0})
    assert len(first.param_groups) == 1


def test_consolidate_ends_the_first() -> None:
    model = small_model()
    first = wrap(model)
    train(model, first, range(2))
    first.consolidate()
    second = wrap(model, seed=1)
    train(model, second, range(2))
    for call in (first.step, first.resample, first.resync):
        with pytest.raises(ValueError, match=HELD):
            call()
    first.consolidate()  # again: it holds nothing, and lets nothing go
    with pytest.raises(ValueError, match=HELD):
        wrap(model)
    second.consolidate()
    train(model, first, range(2, 4))
    with pytest.raises(ValueError, match=HELD):
        second.step()


@pytest.mark.parametrize("is_garbage", [False, True])
def test_a_first_that_is_gone(is_garbage: bool) -> None:
    model = small_model()
    gc.disable()
    try:
        first = wrap(model)
        train(model, first, range(2))
        if is_garbage:  # in a cycle, which only the collector frees
            first.register_resample_hook(lambda _, kept=first: None)
        del first
        train(model, wrap(model), range(2))
    finally:
        gc.enable()


def test_load_state_dict_lets_go_until_the_next_step() -> None:
    """A trial run that is undone, as a learning rate finder's, does not stand in the way."""
    model = small_model()
    first = wrap(model)
    fresh = saved_and_loaded(first.state_dict())
    train(model, first, range(2))
    first.load_state_dict(fresh)
    second = wrap(model)
    train(model, second, range(2))
    with pytest.raises(ValueError, match=HELD):
        first.step()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_hold_their_own(how: Any) -> None:
    pair = small_model(), None
    pair = pair[0], wrap(pair[0])
    model, copied = how(pair)
    with pytest.raises(ValueError, match=HELD):
        wrap(model)
    train(model, copied, range(4))
    train(*pair, range(4))
    assert_equal(weights(model), weights(pair[0]))


def test_what_one_of_two_does_not_mix() -> None:
    model = small_model()
    body = wrap(model, exclude="head.*")
    head = wrap(model, exclude="body.*", seed=1)
    for step in range(4):
        loss_of(model, step).backward()
        body.step()
        head.step()
        model.zero_grad()


def test_a_model_that_was_set_back_is_free() -> None:
    """A sweep over learning rates in a loop: the last optimizer is alive until the name is bound
    again."""
    model = small_model()
    initial = copy.deepcopy(model.state_dict())
    for _ in range(3):
        model.load_state_dict(initial)
        optimizer = wrap(model)
        train(model, optimizer, range(2))
    with pytest.raises(ValueError, match=HELD):
        wrap(model)


def test_frozen_parameters_are_nobodys() -> None:
    """A frozen backbone with several heads; who trains it first has it."""
    model, head = small_model(), nn.Linear(8, 3).double()
    model.body.requires_grad_(False)
    body = list(model.body.parameters())
    first = GMixoutOptimizer(torch.optim.SGD([*body, *model.head.parameters()], lr=0.1))
    second = GMixoutOptimizer(torch.optim.SGD([*body, *head.parameters()], lr=0.1))
    model.body.requires_grad_(True)
    train(model, first, range(1))
    for param in body:
        param.grad = torch.ones_like(param)
    before = weights(model)
    with pytest.raises(ValueError, match="is mixed by another GMixoutOptimizer"):
        second.step()
    assert_equal(before, weights(model))


def test_copies_of_what_was_consolidated_hold_nothing() -> None:
    model = small_model()
    optimizer = wrap(model)
    train(model, optimizer, range(2))
    optimizer.consolidate()
    copied, copy_of_optimizer = copy.deepcopy((model, optimizer))
    third = wrap(copied)
    train(copied, third, range(2))
    with pytest.raises(ValueError, match=HELD):
        copy_of_optimizer.step()


def test_a_group_refused_after_consolidate_is_not_added() -> None:
    model, extra = small_model(), nn.Parameter(torch.randn(9))
    first = wrap(model)
    train(model, first, range(2))
    first.consolidate()
    second = wrap(model, seed=1)
    with pytest.raises(ValueError, match=HELD):
        first.add_param_group({"params": [("extra", extra)]})
    assert len(first.param_groups) == 1
    second.consolidate()
    first.add_param_group({"params": [("extra", extra)]})


def test_packed_gradients_of_the_one_survive_the_other() -> None:
    model = small_model()
    body = wrap(model, exclude="head.*", grad_layout="packed")
    train(model, body, range(1))
    wrap(model, exclude="body.*", seed=1)
    loss_of(model, 1).backward()
    assert type(model.body.weight.grad).__name__ == "PackedGradient"
    assert type(model.head.weight.grad) is torch.Tensor


def test_threads_that_wrap_and_consolidate() -> None:
    """As parallel trials do, each with a model of its own."""
    errors: list[BaseException] = []

    def trial() -> None:
        try:
            for _ in range(60):
                wrap(small_model()).consolidate()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=trial) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


def test_nothing_grows_with_the_number_of_optimizers() -> None:
    def registered() -> tuple[int, int, int]:
        gc.collect()
        return len(members._holders), len(packed_gradient._hooks), len(weakref.finalize._registry)

    model = small_model()
    optimizer = wrap(model, grad_layout="packed")
    train(model, optimizer, range(1))
    before = registered()
    for step in range(5):
        optimizer.consolidate()
        train(model, optimizer, [step])
        other = small_model()
        train(other, wrap(other, grad_layout="packed"), range(1))
        del other
    wrap(small_model())
    after = registered()
    assert all(a - b <= 8 for a, b in zip(after, before, strict=True)), (before, after)


# Repeated in a group. Torch warns, and steps it as often.


@pytest.mark.filterwarnings("ignore:optimizer contains")
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("layout", ["packed", "dense"])
def test_a_repeated_parameter_steps_as_often_as_under_the_bare_optimizer(
    layout: str, kind: type[torch.optim.Optimizer]
) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        body, head = model.body, model.head
        return kind([body.weight, body.bias, body.weight, *head.parameters()], lr=0.02)

    model, bare_model = small_model(), small_model()
    bare = make(bare_model)
    settings = dict(lr_scale=1.0, episode_warmup=0, resample_every=None, mask_prob=0.5)
    optimizer = GMixoutOptimizer(make(model), layout=layout, **settings)
    start = weights(model)
    masks = [optimizer.active_mask(param) for param in model.parameters()]
    for _ in range(4):
        for param, other, mask in zip(
            model.parameters(), bare_model.parameters(), masks, strict=True
        ):
            param.grad = torch.full_like(param, 0.5)
            other.grad = mask * param.grad
        optimizer.step()
        bare.step()
    for param, other, mask, first in zip(
        model.parameters(), bare_model.parameters(), masks, start, strict=True
    ):
        expected = torch.where(mask, other.detach(), first)
        torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-12)

    state = optimizer.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [
        group["params"] for group in bare.state_dict()["param_groups"]
    ]
    assert state["state"].keys() <= {1, 2, 3, 4}
    optimizer.load_state_dict(saved_and_loaded(state))
    assert_equal(optimizer.state_dict(), state)
    assert len(optimizer.report().tensors) == 4
    before = model.body.weight.grad.clone()
    norm = optimizer.clip_grad_norm_(0.1)
    used = torch.cat([(mask * 0.5).flatten() for mask in masks])
    torch.testing.assert_close(norm, used.norm().to(norm.dtype))
    torch.testing.assert_close(model.body.weight.grad, before * (0.1 / norm), rtol=1e-4, atol=0)
