"""Parameters that others take the places of, as Accelerate does it: what was never trained is mixed
in their stead, by place, and everything else is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gmixout_optim import GMixoutOptimizer
from tests.ranks import needs_gloo
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
                with pytest.raises(
                    RuntimeError, match=r"lost body.weight by hand.*another tensor.*\(8, 6\)"
                ):
                    call(optimizer)
            way(optimizer, list(model.parameters()))
        train(model, optimizer, range(5))
        runs.append((weights(model), optimizer.state_dict()))
    assert_equal(*runs)


@pytest.mark.parametrize("settings", [{}, dict(mask_prob=0.0)], ids=["mixed", "unmixed"])
@pytest.mark.parametrize("way", WAYS)
def test_parameters_replaced_after_a_step_are_refused(
    way: Callable[..., None], settings: dict[str, Any]
) -> None:
    model = small_model()
    optimizer = wrapped(model, **settings)
    train(model, optimizer, range(1))
    old = list(model.parameters())
    state = optimizer.state_dict()
    new = small_model()
    way(optimizer, list(new.parameters()))
    before = weights(new)
    loss_of(new, 0).backward()
    for call in (optimizer.step, optimizer.state_dict, optimizer.zero_grad):
        with pytest.raises(RuntimeError, match=r"before the first step alone.*build a new base"):
            call()
    assert_equal(before, weights(new))
    way(optimizer, old)
    assert_equal(state, optimizer.state_dict())


def test_parameters_that_changed_places_are_refused() -> None:
    """Patterns and masks go by places, and would be those of others."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    optimizer = wrapped(model, exclude="1.*")
    optimizer.param_groups[0]["params"].reverse()
    with pytest.raises(RuntimeError, match="got or moved parameters by hand"):
        optimizer.step()
    optimizer.param_groups[0]["params"][:] = [nn.Parameter(torch.zeros(4, 4))] * 2
    with pytest.raises(RuntimeError, match=r"lost 0\.weight by hand"):
        optimizer.step()


@needs_gloo
@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_bases_that_cannot_train_dtensors_refuse_them_in_others_places(make: Any) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = small_model()
        optimizer = wrapped(model, make=make)
        model = fully_shard(small_model(), mesh=init_device_mesh("cpu", (1,)))
        replace_list(optimizer, list(model.parameters()))
        for call in (optimizer.zero_grad, optimizer.step):
            with pytest.raises(ValueError, match="cannot train DTensors"):
                call()
    finally:
        dist.destroy_process_group()
