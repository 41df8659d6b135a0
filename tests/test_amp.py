"""Loss scaling, autocast and gradient clipping."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gmixout_optim import GMixoutOptimizer
from tests.training import assert_equal, loss_of, small_model, train, weights

LAYOUTS = {
    "packed": dict(),
    "dense": dict(layout="dense"),
    "persistent": dict(residual="persistent", rescale=True),
}


def wrap(model: nn.Module, fused: bool = False, **settings: object) -> GMixoutOptimizer:
    base = torch.optim.AdamW(model.named_parameters(), lr=0.01, fused=fused)
    return GMixoutOptimizer(base, exclude="head.*", mask_prob=0.6, resample_every=3, **settings)


def progress(model: nn.Module, optimizer: GMixoutOptimizer) -> tuple[list[Tensor], int, int]:
    return weights(model), optimizer.episode, optimizer.steps_in_episode


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    ("unscale", "clip"), [(False, None), (True, None), (True, "torch"), (True, "own")]
)
def test_a_scaled_loop_is_the_plain_loop(
    layout: str, fused: bool, unscale: bool, clip: str | None
) -> None:
    """Powers of two scale without rounding: the same weights, and a step with inf never
    happened."""
    model = small_model(torch.float32)
    plain_model = copy.deepcopy(model)
    optimizer = wrap(model, fused, **LAYOUTS[layout])
    plain = wrap(plain_model, fused, **LAYOUTS[layout])

    def clip_(of: nn.Module, by: GMixoutOptimizer) -> None:
        if clip == "torch":
            nn.utils.clip_grad_norm_(of.parameters(), 0.1)
        if clip == "own":
            by.clip_grad_norm_(0.1)

    train(plain_model, plain, range(5), lambda step: clip_(plain_model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in (0, 1, "inf", 2, 3, 4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, 0 if step == "inf" else step)).backward()
        before = progress(model, optimizer)
        if step == "inf":
            model.body.weight.grad[0, 0] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
            clip_(model, optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == "inf":
            assert_equal(before, progress(model, optimizer))
            assert scaler.get_scale() == 512.0
    assert_equal(weights(plain_model), weights(model))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(layout: str, dtype: torch.dtype) -> None:
    """Weights and what is trained stay float32; the weights seen by the wrapper are those of a
    plain loop."""
    model = small_model(torch.float32)
    start = weights(model)
    optimizer = wrap(model, **LAYOUTS[layout])
    reference = copy.deepcopy(model)
    reference_optimizer = wrap(reference, **LAYOUTS[layout])
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = loss_of(model, step)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    expected = train(reference, reference_optimizer, range(6))
    assert losses == pytest.approx(expected, rel=0.05)
    assert all(param.dtype == torch.float32 for param in model.parameters())
    for param in (model.body.weight, model.body.bias):
        slot = optimizer.state[param]["gmixout"]
        assert {item.dtype for item in slot.values()} == {torch.float32}
    for now, then in zip(weights(model), start, strict=True):
        assert not torch.equal(now, then)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_clip_grad_norm_clips_by_the_gradients_that_are_used(layout: str, norm_type: float) -> None:
    model = small_model()
    optimizer = wrap(model, **LAYOUTS[layout])
    loss_of(model, 0).backward()

    def norm_of_used() -> Tensor:
        used = []
        for param in model.body.parameters():
            mask = optimizer.active_mask(param)
            scale = 1 / float(mask.double().mean()) if "rescale" in LAYOUTS[layout] else 1.0
            used.append(param.grad[mask] * scale)
        used += [param.grad.flatten() for param in model.head.parameters()]
        return torch.linalg.vector_norm(torch.cat(used), norm_type)

    gradients = [param.grad.clone() for param in model.parameters()]
    expected = norm_of_used()
    torch.testing.assert_close(optimizer.clip_grad_norm_(1e-3, norm_type), expected)
    assert float(norm_of_used()) == pytest.approx(1e-3, rel=1e-3)
    for param, before in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(param.grad, before * (1e-3 / expected), rtol=1e-3, atol=0)


def test_clipping_gradients_that_are_small_enough_leaves_them() -> None:
    model = small_model()
    optimizer = wrap(model)
    loss_of(model, 0).backward()
    gradients = [param.grad.clone() for param in model.parameters()]
    optimizer.clip_grad_norm_(1e6)
    assert_equal(gradients, [param.grad for param in model.parameters()])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clipping_before_the_first_step_reads_gradients_alone(layout: str) -> None:
    """What is saved after it loads, and weights that are loaded after it are seen."""
    models = []
    for clips in (True, False):
        model = small_model()
        optimizer = wrap(model, **LAYOUTS[layout])
        loss_of(model, 0).backward()
        if clips:
            optimizer.clip_grad_norm_(1e6)
            optimizer.load_state_dict(optimizer.state_dict())
        model.load_state_dict(small_model(seed=3).state_dict())
        train(model, optimizer, range(4))
        models.append(weights(model))
    assert_equal(*models)
