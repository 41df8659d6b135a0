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
def test_by_default_follows_from_the_drawn_density(layout: str) -> None:
    """N / m of each tensor; with the persistent residual or rescaling 1."""
    shapes = [(8, 6), (3,), (2,), (), (7, 5)]
    drawn = {0.75: [12, 1, 1, 1, 9], 0.9: [5, 1, 1, 1, 3]}
    plain = {"lr_scale": 1.0}
    for p, counts in drawn.items():
        for settings in (LAYOUTS[layout], dict(LAYOUTS[layout], rescale=True)):
            scaled = settings == LAYOUTS[layout] and layout != "persistent"
            runs = []
            for options in ({}, plain):
                params = [nn.Parameter(torch.full(shape, 0.7).double()) for shape in shapes]
                rates = [
                    0.01 / (m / param.numel()) if options and scaled else 0.01
                    for m, param in zip(counts, params, strict=True)
                ]
                groups = [
                    {"params": [param], "lr": lr} for param, lr in zip(params, rates, strict=True)
                ]
                groups.append({"params": [nn.Parameter(torch.ones(4).double())], "mask_prob": 0.0})
                optimizer = GMixoutOptimizer(
                    torch.optim.AdamW(groups, lr=0.01),
                    mask_prob=p,
                    resample_every=2,
                    episode_warmup=0,
                    **settings,
                    **options,
                )
                params.append(groups[-1]["params"][0])
                for step in range(5):
                    for number, param in enumerate(params):
                        param.grad = torch.full_like(param, 1.0 + number - step)
                    optimizer.step()
                runs.append([param.detach() for param in params])
            torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["packed", "dense"])
def test_a_weight_goes_as_far_as_under_the_bare_optimizer_whatever_its_tensors_size(
    layout: str,
) -> None:
    """Over many episodes that keep all they learned, with a gradient that never changes."""
    for shape in ((), (2,), (7,), (300,)):
        bare_param, param = (nn.Parameter(torch.full(shape, 4.6)) for _ in range(2))
        bare = torch.optim.AdamW([bare_param], lr=1e-3, weight_decay=0)
        base = torch.optim.AdamW([param], lr=1e-3, weight_decay=0)
        optimizer = GMixoutOptimizer(base, anchor_decay=0.0, layout=layout)
        for _ in range(800):
            for each, by in ((bare_param, bare), (param, optimizer)):
                each.grad = torch.ones_like(each)
                by.step()
        optimizer.consolidate()
        far, ours = (float((4.6 - each).detach().mean()) for each in (bare_param, param))
        assert ours == pytest.approx(far, rel=0.02), shape


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
        Halving([model.body.weight], lr=0.1), mask_prob=mask_prob, episode_warmup=0
    )
    train(model, wrapped, range(4))
    assert read == [0.1 / (1 - mask_prob) / 2**step for step in range(4)]
    assert wrapped.param_groups[0]["lr"] == 0.1 / 2**4


@pytest.mark.parametrize("layout", ["packed", "dense"])
@pytest.mark.parametrize(("granularity", "power"), [("element", 1), ("column", 1), ("row", 0.5)])
def test_rows_move_less_far_than_elements_and_columns(
    layout: str, granularity: Any, power: float
) -> None:
    """All weights of an output move at once there: 1 / sqrt(d) instead of 1 / d."""
    settings = dict(granularity=granularity, layout=layout, resample_every=None)
    runs = []
    for options in ({}, {"lr_scale": 10.0**power}):
        params = [nn.Parameter(torch.ones(50, 50).double()), nn.Parameter(torch.ones(10).double())]
        base = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.01)
        optimizer = GMixoutOptimizer(base, **settings, **options)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        runs.append(params)
    torch.testing.assert_close(runs[0][0], runs[1][0])
    torch.testing.assert_close(runs[0][1].min(), torch.tensor(0.9).double())  # a vector: elements
