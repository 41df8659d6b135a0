"""``GMixoutOptimizer.mixout`` against Mixout as its papers write it: a function of the weights U
and a mask.

Nothing here sets gradients by hand: the loss is evaluated at theta(U), and autograd gives the
gradient with respect to U, on which a plain optimizer works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, AdamW, Optimizer

from gmixout_optim import GMixoutOptimizer

BASES: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.02),
    "SGD-momentum": lambda params: SGD(params, lr=0.005, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda params: AdamW(params, lr=0.01, weight_decay=0.1),
}
STEPS = 50


def pretrained_mlp() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3))
    model = model.double()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn_like(param) * 0.4)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(16, 3, generator=generator, dtype=torch.float64)


def mixout_weight(U: Tensor, A: Tensor, dropped: Tensor, p: float) -> Tensor:  # noqa: N803
    """Equation 5 of arXiv 1909.11299: the mean over masks is U."""
    return (torch.where(dropped, A, U) - p * A) / (1 - p)


def unscaled_weight(U: Tensor, A: Tensor, dropped: Tensor, p: float) -> Tensor:  # noqa: N803
    return torch.where(dropped, A, U)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("rescale", [True, False])
def test_mixout_equals_its_functional_form(rescale: bool, p: float, k: int, base: str) -> None:
    """Over 50 steps; rescaled and redrawn in every step is what it does unasked."""
    model = pretrained_mlp()
    params = dict(model.named_parameters())
    anchor = {name: param.detach().clone() for name, param in params.items()}
    learned = {name: a.clone().requires_grad_() for name, a in anchor.items()}
    cells = {name: param.numel() for name, param in params.items()}
    drawn = {name: 1 - max(1, round((1 - p) * n)) / n for name, n in cells.items()}
    settings = {
        **({} if rescale else {"rescale": False}),
        **({} if k == 1 else {"resample_every": k}),
    }
    optimizer = GMixoutOptimizer.mixout(BASES[base](model.parameters()), p, seed=3, **settings)
    plain = BASES[base](learned.values())
    formula = mixout_weight if rescale else unscaled_weight

    def theta(masks: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: formula(U, anchor[name], ~masks[name], drawn[name]) for name, U in learned.items()
        }

    seen = set()
    for step in range(STEPS):
        masks = {name: optimizer.active_mask(param) for name, param in params.items()}
        seen.add(tuple(torch.cat([mask.flatten() for mask in masks.values()]).tolist()))
        inputs, targets = batch(step)
        plain.zero_grad()
        functional = functional_call(model, theta(masks), (inputs,))
        (functional - targets).square().mean().backward()

        optimizer.zero_grad()
        outputs = model(inputs)
        torch.testing.assert_close(outputs, functional, rtol=1e-9, atol=1e-9)
        (outputs - targets).square().mean().backward()

        optimizer.step()
        plain.step()
        masks = {name: optimizer.active_mask(param) for name, param in params.items()}
        for name, weight in theta(masks).items():
            torch.testing.assert_close(params[name].detach(), weight.detach(), rtol=1e-8, atol=1e-9)
        assert all(torch.equal(optimizer.anchor(params[name]), a) for name, a in anchor.items())
    assert len(seen) == -(-STEPS // k), "a mask for each episode, and no two alike"

    optimizer.consolidate()
    for name, a in anchor.items():
        share = 1.0 if rescale else 1 - drawn[name]
        mean = a + share * (learned[name].detach() - a)
        torch.testing.assert_close(params[name].detach(), mean, rtol=1e-8, atol=1e-9)


# Invariant 11: the mean over masks is what is deployed

SHAPES = [(20,), (4, 5, 2, 2), (7,), ()]
EPISODES = 400


def learned_tensors(p: float, rescale: bool, sampler: str) -> tuple[list[Tensor], GMixoutOptimizer]:
    """Tensors with U away from A; of those of 7 cells and of one the share that is drawn is not 1 -
    p."""
    torch.manual_seed(1)
    params: list[Tensor] = [nn.Parameter(torch.randn(shape).double()) for shape in SHAPES]
    optimizer = GMixoutOptimizer.mixout(SGD(params, lr=1.0), p, rescale=rescale, sampler=sampler)
    for _ in range(5):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("sampler", ["stratified", "bernoulli"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_invariant_11_the_mean_over_masks_is_deployed(
    p: float, rescale: bool, sampler: str
) -> None:
    """Monte Carlo over redraws that change nothing else, each weight to within 6 standard errors.

    A weight is active in a share d of the episodes, independently; its mean over N episodes has the
    standard error s * |U - A| * sqrt(d * (1 - d) / N). Of 100 weights one falls outside by chance
    in less than one of 10**5 runs, and the seed is fixed. Over the actual masks the mean is exact:
        it is
    linear in the mask.
    """
    params, optimizer = learned_tensors(p, rescale, sampler)
    with optimizer.eval_weights():
        deployed = [param.detach().clone() for param in params]
    anchors = [optimizer.anchor(param) for param in params]
    shown = [torch.zeros_like(param) for param in params]
    active = [torch.zeros_like(param) for param in params]
    with torch.no_grad():
        for _ in range(EPISODES):
            optimizer.resample()
            for param, total, count in zip(params, shown, active, strict=True):
                total += param
                count += optimizer.active_mask(param)
    for total, count, anchor, mean in zip(shown, active, anchors, deployed, strict=True):
        n = mean.numel()
        d = 1 - p if sampler == "bernoulli" else max(1, round((1 - p) * n)) / n
        away = (mean - anchor) / d  # s * (U - A)
        error = away.abs() * (d * (1 - d) / EPISODES) ** 0.5
        assert ((total / EPISODES - mean).abs() <= 6 * error + 1e-12).all()
        torch.testing.assert_close(total / EPISODES, anchor + count / EPISODES * away)
    if rescale:
        with optimizer.eval_weights():
            assert all(map(torch.allclose, params, deployed))


def test_invariant_11_exactly_over_all_masks() -> None:
    """One of two cells active: the mean of the two live tensors, each with its mask, is what is
    deployed."""
    param = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = GMixoutOptimizer.mixout(SGD([param], lr=1.0), 0.5)
    for _ in range(4):
        param.grad = torch.tensor([0.5, -3.0], dtype=torch.float64)
        optimizer.step()
    by_mask = {}
    while len(by_mask) < 2:
        by_mask[tuple(optimizer.active_mask(param).tolist())] = param.detach().clone()
        optimizer.resample()
    mean = (by_mask[True, False] + by_mask[False, True]) / 2
    optimizer.consolidate()
    torch.testing.assert_close(param.detach(), mean)
