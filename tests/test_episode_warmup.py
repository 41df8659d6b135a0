"""The learning rate of mixed weights rises in each episode; the group's and everybody else's
stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gmixout_optim import GMixoutOptimizer
from tests.test_lr_scale import LAYOUTS
from tests.training import assert_equal, small_model, train


class Watched(torch.optim.AdamW):
    """Keeps the learning rates that it is stepped at: of the body, and of the head."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[tuple[float, ...]] = []
        super().__init__(*args, **kwargs)

    def step(self, closure: Any = None) -> Any:
        self.seen.append(tuple(group["lr"] for group in self.param_groups))
        return super().step(closure)


def rates(steps: int, **settings: Any) -> list[tuple[float, ...]]:
    model = small_model()
    base = Watched(model.named_parameters(), lr=0.01)
    optimizer = GMixoutOptimizer(
        base, exclude=["head.*", "body.bias"], **{"lr_scale": 8.0, **settings}
    )
    for step in range(steps):
        train(model, optimizer, [step])
        assert [group["lr"] for group in base.param_groups] == [0.01]
    return base.seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rises_to_the_full_rate_in_each_episode(layout: str) -> None:
    seen = rates(7, resample_every=5, episode_warmup=4, **LAYOUTS[layout])
    body = [0.02, 0.04, 0.06, 0.08, 0.08, 0.02, 0.04]
    assert [head for _, head in seen] == [0.01] * 7
    assert [rate for rate, _ in seen] == pytest.approx(body)


@pytest.mark.parametrize(
    ("settings", "body"),
    [
        (dict(resample_every=4), [0.02, 0.04, 0.06, 0.08, 0.02]),
        (dict(resample_every=4, layout="dense"), [0.02, 0.04, 0.06, 0.08, 0.02]),
        (dict(resample_every=4, rescale=True), [0.02, 0.04, 0.06, 0.08, 0.02]),
        (
            dict(resample_every=4, rescale=True, lr_scale="auto"),
            [0.004, 0.008, 0.012, 0.016, 0.004],
        ),
        (dict(resample_every=1), [0.08] * 5),
        (dict(resample_every=None), [0.08] * 5),
        (dict(resample_every=4, residual="persistent"), [0.08] * 5),
        (dict(resample_every=4, episode_warmup=0), [0.08] * 5),
        (dict(resample_every=4, episode_warmup=1), [0.08] * 5),
        (dict(resample_every=2, episode_warmup=4), [0.02, 0.04, 0.02, 0.04, 0.02]),
    ],
    ids=str,
)
def test_by_default_over_a_whole_episode_where_the_base_starts_fresh(
    settings: dict[str, Any], body: list[float]
) -> None:
    assert [rate for rate, _ in rates(5, **settings)] == pytest.approx(body)


@pytest.mark.parametrize(("k", "warmup"), [(4, "auto"), (5, 2), (5, 1), (3, 7), (6, 0)])
@pytest.mark.parametrize("mask_prob", [0.9, 0.5])
def test_the_default_rate_is_makes_up_for_the_steps_that_a_weight_sits_out(
    k: int, warmup: int | None, mask_prob: float
) -> None:
    """On the average over an episode, whatever the warm-up."""
    settings = dict(resample_every=k, episode_warmup=warmup, mask_prob=mask_prob)
    seen = [body for body, _ in rates(2 * k, lr_scale="auto", **settings)]
    drawn = max(1, round((1 - mask_prob) * 48))
    assert sum(seen) / len(seen) == pytest.approx(0.01 * 48 / drawn)
    assert seen == seen[:k] * 2


@pytest.mark.parametrize("kind", [torch.optim.Rprop, torch.optim.ASGD, torch.optim.SGD])
@pytest.mark.parametrize("layout", ["packed", "dense"])
def test_all_go_as_far_as_their_rates_say(kind: Any, layout: str) -> None:
    """Rprop and ASGD read the learning rate ahead of the step: they do not warm up."""
    param = torch.nn.Parameter(torch.zeros(10, 10))
    options = dict(etas=(0.5, 1 + 1e-6)) if kind is torch.optim.Rprop else {}
    base = kind([param], lr=0.01, **options)
    optimizer = GMixoutOptimizer(base, resample_every=10, anchor_decay=0.0, layout=layout)
    mask = optimizer.active_mask(param)
    for _ in range(10):
        param.grad = -torch.ones_like(param)
        optimizer.step()
    moved = param.detach()[mask]
    torch.testing.assert_close(moved, torch.full_like(moved, 10 * 0.1), rtol=0.01, atol=0)


def test_one_step_of_warm_up_is_none() -> None:
    """What a state dict says of two optimizers that do the same is the same."""
    dicts = []
    for settings in (dict(episode_warmup=0), dict(episode_warmup=1), dict()):
        base = torch.optim.AdamW(small_model().parameters())
        dicts.append(GMixoutOptimizer(base, resample_every=1, **settings).state_dict())
    assert_equal(dicts[0], dicts[1])
    assert_equal(dicts[0], dicts[2])


def test_an_episode_that_is_ended_by_hand_warms_up_too() -> None:
    model = small_model()
    base = Watched(model.named_parameters(), lr=0.01)
    optimizer = GMixoutOptimizer(base, lr_scale=1.0, resample_every=10)
    train(model, optimizer, [0, 1])
    optimizer.resample()
    train(model, optimizer, [2])
    assert [rate for (rate,) in base.seen] == pytest.approx([0.001, 0.002, 0.001])


def test_lbfgs_has_one_rate_for_all() -> None:
    model = small_model()
    base = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match=r"episode_warmup=2.*LBFGS"):
        GMixoutOptimizer(base, episode_warmup=2)
    GMixoutOptimizer(base)
