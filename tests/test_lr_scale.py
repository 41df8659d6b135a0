"""The learning rate of mixed weights: a multiple of their group's, which everything else keeps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gmixout_optim import GMixoutOptimizer
from tests.optimizers import CASES, Case
from tests.training import assert_equal, small_model, train, weights

LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": dict(layout="packed"),
    "dense": dict(layout="dense"),
    "persistent": dict(residual="persistent"),
}
SCALED = [case for case in CASES if not (case.closure or case.sparse)]


def fits(case: Case, layout: str) -> bool:
    return case.elementwise or layout != "packed"


def wrapped(case: Case, groups: Any, **settings: Any) -> GMixoutOptimizer:
    return GMixoutOptimizer(case(groups), mask_prob=0.6, resample_every=3, **settings)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SCALED, ids=repr)
def test_is_a_larger_learning_rate(case: Case, layout: str) -> None:
    """That of a base built with it, bit for bit; parameters that are not mixed keep their own."""
    if not fits(case, layout):
        return
    scaled_model = small_model(bias=not case.matrices_only)
    larger_model = copy.deepcopy(scaled_model)
    scaled = wrapped(
        case,
        scaled_model.named_parameters(),
        exclude="head.*",
        lr_scale=4.0,
        **LAYOUTS[layout],
    )
    lr = scaled.param_groups[0]["lr"]
    body = {"params": list(larger_model.body.named_parameters("body")), "lr": lr * 4}
    head = {"params": list(larger_model.head.named_parameters("head")), "lr": lr}
    larger = wrapped(case, [body, head], exclude="head.*", lr_scale=1.0, **LAYOUTS[layout])
    losses = train(scaled_model, scaled, range(8))
    assert_equal(losses, train(larger_model, larger, range(8)))
    assert_equal(weights(scaled_model), weights(larger_model))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_by_default_follows_from_mask_prob(layout: str) -> None:
    """1 / (1 - p) in each group; with the persistent residual or rescaling 1."""
    cases = [(0.75, 4.0), (0.9, 1 / (1 - 0.9)), (0.0, 1.0)]
    for settings in (LAYOUTS[layout], dict(LAYOUTS[layout], rescale=True)):
        models = []
        for given in (False, True):
            model = nn.Sequential(*[small_model(seed=seed) for seed in range(len(cases))])
            groups = [
                {"params": list(part.parameters()), "mask_prob": p}
                for part, (p, _) in zip(model, cases, strict=True)
            ]
            if given and settings == LAYOUTS[layout] and layout != "persistent":
                for group, (_, scale) in zip(groups, cases, strict=True):
                    group["lr"] = 0.01 * scale
            base = torch.optim.AdamW(groups, lr=0.01)
            options = dict(settings, lr_scale=1.0) if given else settings
            optimizer = GMixoutOptimizer(base, resample_every=2, episode_warmup=0, **options)
            for step in range(5):
                for part, seed in zip(model, range(len(cases)), strict=True):
                    generator = torch.Generator().manual_seed(10 * step + seed)
                    for param in part.parameters():
                        param.grad = torch.randn(
                            param.shape, generator=generator, dtype=param.dtype
                        )
                optimizer.step()
            models.append(weights(model))
        assert_equal(*models)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_are_as_before_after_a_step_and_after_a_failure(layout: str) -> None:
    """Whoever reads or schedules the learning rate meets the user's."""

    class Failing(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            seen.append([(len(group["params"]), group["lr"]) for group in self.param_groups])
            if len(seen) == 2:
                raise RuntimeError("no step")
            return super().step(closure)

    seen: list[Any] = []
    model = small_model()
    base = Failing(model.named_parameters(), lr=0.01)
    optimizer = GMixoutOptimizer(
        base, exclude="head.*", lr_scale=3.0, episode_warmup=0, **LAYOUTS[layout]
    )
    groups, params = base.param_groups, list(base.param_groups[0]["params"])
    train(model, optimizer, [0])
    with pytest.raises(RuntimeError, match="no step"):
        train(model, optimizer, [1])
    assert seen[0] == seen[1] == [(2, 0.03), (2, 0.01)]
    assert base.param_groups is groups
    assert len(groups) == 1
    assert groups[0]["lr"] == 0.01
    assert all(a is b for a, b in zip(groups[0]["params"], params, strict=True))


def test_a_learning_rate_in_a_tensor_is_scaled_and_kept() -> None:
    models = []
    for lr, scale in ((0.01, 3.0), (0.03, 1.0)):
        model = small_model(torch.float32)
        rate = torch.tensor(lr)
        base = torch.optim.AdamW(model.parameters(), lr=rate, foreach=False)
        optimizer = GMixoutOptimizer(base, lr_scale=scale)
        train(model, optimizer, range(4))
        assert optimizer.param_groups[0]["lr"] is rate
        assert rate == torch.tensor(lr)
        models.append(weights(model))
    torch.testing.assert_close(*models)


def test_lbfgs_has_one_rate_for_all() -> None:
    model = small_model()
    base = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match=r"lr_scale=2\.0.*LBFGS"):
        GMixoutOptimizer(base, lr_scale=2.0)
    GMixoutOptimizer(base)


@pytest.mark.parametrize("mask_prob", [0.0, 0.75])
def test_a_base_that_changes_its_rate_in_a_step_goes_on_from_it(mask_prob: float) -> None:
    """The rate that it wrote is the one that it reads next, also where it is shown a scaled one."""

    class Halving(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for group in self.param_groups:
                read.append(group["lr"])
                group["lr"] /= 2
            return loss

    read: list[float] = []
    model = small_model()
    wrapped = GMixoutOptimizer(
        Halving(model.parameters(), lr=0.1), mask_prob=mask_prob, episode_warmup=0
    )
    train(model, wrapped, range(4))
    assert read == [0.1 / (1 - mask_prob) / 2**step for step in range(4)]
    assert wrapped.param_groups[0]["lr"] == 0.1 / 2**4
