"""A parameter belongs to one wrapper at a time, and may be repeated in a group."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from gmixout_optim import GMixoutOptimizer
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
