"""Parameters that others take the places of, as Accelerate does it: what was never trained is mixed
in their stead, by place, and everything else is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gmixout_optim import GMixoutOptimizer
from tests.training import assert_equal, loss_of, small_model, train, weights

SETTINGS: dict[str, Any] = dict(exclude="head.*", resample_every=3, mask_prob=0.5)


def wrapped(model: nn.Module, **options: Any) -> GMixoutOptimizer:
    make = options.pop("make", torch.optim.AdamW)
    return GMixoutOptimizer(make(model.named_parameters(), lr=0.01), **{**SETTINGS, **options})


def replace_in_list(optimizer: GMixoutOptimizer, params: list[Tensor]) -> None:
    for place, param in enumerate(params):
        optimizer.param_groups[0]["params"][place] = param


def replace_list(optimizer: GMixoutOptimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["params"] = params


def replace_group(optimizer: GMixoutOptimizer, params: list[Tensor]) -> None:
    kept = {key: value for key, value in optimizer.param_groups[0].items() if key != "gmixout"}
    optimizer.param_groups[0] = {**kept, "params": params}


def replace_groups(optimizer: GMixoutOptimizer, params: list[Tensor]) -> None:
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": params}]


def replace_groups_of_base(optimizer: GMixoutOptimizer, params: list[Tensor]) -> None:
    optimizer.base.param_groups = [{**optimizer.param_groups[0], "params": params}]


WAYS = [replace_in_list, replace_list, replace_group, replace_groups, replace_groups_of_base]


@pytest.mark.parametrize(
    "settings", [{}, dict(layout="dense"), dict(grad_layout="packed")], ids=str
)
@pytest.mark.parametrize("way", WAYS)
def test_parameters_replaced_before_the_first_step_are_mixed(
    way: Callable[..., None], settings: dict[str, Any]
) -> None:
    runs = []
    for replaces in (False, True):
        model = small_model()
        optimizer = wrapped(model, **settings)
        if replaces:
            model = small_model()
            way(optimizer, list(model.parameters()))
        train(model, optimizer, range(7))
        masks = [optimizer.active_mask(param) for param in model.parameters()]
        runs.append((weights(model), masks, optimizer.state_dict()))
    assert_equal(*runs)


CALLS: dict[str, Callable[[GMixoutOptimizer, Tensor], Any]] = {
    "active_mask": lambda optimizer, param: optimizer.active_mask(param),
    "anchor": lambda optimizer, param: optimizer.anchor(param),
    "report": lambda optimizer, _: [tensor.mixed for tensor in optimizer.report().tensors],
    "clip": lambda optimizer, _: optimizer.clip_grad_norm_(0.1),
    "eval": lambda optimizer, _: optimizer.eval(),
    "state_dict": lambda optimizer, _: optimizer.state_dict(),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_knows_replaced_parameters(call: str) -> None:
    """The first after they were replaced, whichever it is."""
    answers = []
    for replaces in (False, True):
        model = small_model()
        optimizer = wrapped(model)
        if replaces:
            model = small_model()
            replace_list(optimizer, list(model.parameters()))
        loss_of(model, 0).backward()
        answers.append((CALLS[call](optimizer, model.body.weight), optimizer.param_groups[0]["lr"]))
    assert_equal(*answers)


@pytest.mark.parametrize("kind", ["packed", "active"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_replaced_parameters_are_packed_and_those_of_the_old_are_left(
    way: Callable[..., None], kind: Any
) -> None:
    old, new = small_model(), small_model()
    optimizer = wrapped(old, grad_layout=kind, granularity="row")
    way(optimizer, list(new.parameters()))
    optimizer.zero_grad()
    for model in (old, new):
        loss_of(model, 0).backward()
    assert type(old.body.weight.grad) is Tensor
    assert type(new.body.weight.grad).__name__ == "PackedGradient"
    assert type(new.head.weight.grad) is Tensor


def test_replaced_parameters_are_let_go_of() -> None:
    model = small_model()
    optimizer = wrapped(model)
    old = weakref.ref(model.body.weight)
    new = small_model()
    replace_list(optimizer, list(new.parameters()))
    del model
    optimizer.zero_grad()
    gc.collect()
    assert old() is None


STAND_IN_CALLS: dict[str, Callable[[GMixoutOptimizer], Any]] = {
    "step": lambda optimizer: optimizer.step(),
    "zero_grad": lambda optimizer: optimizer.zero_grad(),
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict({}),
    "resample": lambda optimizer: optimizer.resample(),
    "resync": lambda optimizer: optimizer.resync(),
    "consolidate": lambda optimizer: optimizer.consolidate(),
    "eval": lambda optimizer: optimizer.eval(),
    "report": lambda optimizer: optimizer.report(),
    "clip_grad_norm_": lambda optimizer: optimizer.clip_grad_norm_(1.0),
    "add_param_group": lambda optimizer: optimizer.add_param_group(dict(params=[])),
}


@pytest.mark.parametrize("way", WAYS)
def test_calls_between_are_refused_and_nothing_is_lost(way: Callable[..., None]) -> None:
    """While tensors of one element hold the places, as in Accelerate's ``prepare()``."""
    runs = []
    for replaces in (False, True):
        model = small_model()
        optimizer = wrapped(model)
        if replaces:
            model = small_model()
            way(optimizer, [torch.empty(1) for _ in model.parameters()])
            for call in STAND_IN_CALLS.values():
                with pytest.raises(RuntimeError, match=r"lost body.weight by hand"):
                    call(optimizer)
            way(optimizer, list(model.parameters()))
        train(model, optimizer, range(5))
        runs.append((weights(model), optimizer.state_dict()))
    assert_equal(*runs)
