"""The model holds the truth: what somebody else writes into it is never mixed silently with what
was there.

That the next step works on it is a property in test_parity.py; here is what the other calls do.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gmixout_optim import GMixoutOptimizer
from tests.training import assert_equal, saved_and_loaded, small_model, train, weights

SETTINGS: dict[str, dict[str, Any]] = {
    "packed": dict(),
    "dense": dict(layout="dense"),
    "rescale": dict(rescale=True),
    "persistent": dict(residual="persistent"),
    "mixout": dict(residual="persistent", rescale=True),
    "packed gradients": dict(grad_layout="packed"),
    "bernoulli": dict(sampler="bernoulli"),
}
EVERY = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def run(
    settings: dict[str, Any], steps: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, GMixoutOptimizer]:
    model = small_model(dtype)
    base = torch.optim.AdamW(model.named_parameters(), lr=0.02)
    optimizer = GMixoutOptimizer(base, mask_prob=0.5, resample_every=20, **settings)
    train(model, optimizer, range(steps))
    return model, optimizer


def best_of(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A checkpoint: other weights everywhere."""
    return small_model(dtype, seed=7).state_dict()


def load(model: nn.Module, state: dict[str, Tensor]) -> list[Tensor]:
    model.load_state_dict(state)
    return weights(model)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_consolidate_keeps_weights_loaded_after_the_last_step(
    dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    model, optimizer = run(settings, dtype=dtype)
    best = load(model, best_of(dtype))
    with pytest.warns(
        UserWarning, match=r"were written since the last step.*consolidate\(\) keeps"
    ):
        optimizer.consolidate()
    assert_equal(best, weights(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.consolidate()
        with optimizer.eval_weights():
            assert_equal(best, weights(model))
        train(model, optimizer, range(3))  # and training goes on
    assert not torch.equal(model.body.weight, best[0])


@EVERY
def test_a_finished_training_that_was_validated_last_consolidates(settings: dict[str, Any]) -> None:
    """As after Trainer's evaluation: eval() without train()."""
    model, optimizer = run(settings)
    optimizer.eval()
    shown = weights(model)
    optimizer.consolidate()
    assert_equal(shown, weights(model))


@EVERY
def test_the_best_checkpoint_loaded_after_eval_stays(settings: dict[str, Any]) -> None:
    model, optimizer = run(settings)
    optimizer.eval()
    best = load(model, best_of())
    with pytest.warns(UserWarning, match=r"train\(\) keeps them"):
        optimizer.consolidate()
    assert_equal(best, weights(model))


@EVERY
def test_train_keeps_weights_loaded_since_eval_as_the_anchor(settings: dict[str, Any]) -> None:
    model, optimizer = run(settings)
    optimizer.eval()
    best = load(model, best_of())
    with pytest.warns(UserWarning, match=r"train\(\) keeps them"):
        optimizer.train()
    assert_equal(best, weights(model))
    for param, weight in zip(model.parameters(), best, strict=True):
        assert_equal(optimizer.anchor(param), weight)
    optimizer.consolidate()
    assert_equal(best, weights(model))


@EVERY
def test_eval_shows_weights_loaded_since_the_last_step(settings: dict[str, Any]) -> None:
    model, optimizer = run(settings)
    best = load(model, best_of())
    with pytest.warns(UserWarning, match=r"eval\(\) keeps them"), optimizer.eval_weights():
        assert_equal(best, weights(model))
    assert_equal(best, weights(model))


@EVERY
def test_resync_makes_them_the_anchor_and_nothing_is_said(settings: dict[str, Any]) -> None:
    model, optimizer = run(settings)
    best = load(model, best_of())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.resync()
        with optimizer.eval_weights():
            assert_equal(best, weights(model))
        optimizer.consolidate()
    assert_equal(best, weights(model))


@EVERY
def test_an_episodes_end_says_once_that_it_averages_what_was_written(
    settings: dict[str, Any],
) -> None:
    model, optimizer = run(settings)
    for _ in range(2):
        load(model, best_of())
        train(model, optimizer, [0])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.resample()
        said = [str(warning.message) for warning in caught]
        assert len(said) == (1 if _ == 0 else 0)
        assert all("call resync()" in message for message in said)


@EVERY
def test_only_the_tensor_that_was_written_is_kept(settings: dict[str, Any]) -> None:
    model, optimizer = run(settings)
    other_model, other = copy.deepcopy((model, optimizer))
    other.consolidate()
    with torch.no_grad():
        model.body.weight.fill_(0.25)
    with pytest.warns(UserWarning, match=r"weights of body\.weight were"):
        optimizer.consolidate()
    assert (model.body.weight == 0.25).all()
    for name, param in other_model.named_parameters():
        if name != "body.weight":
            assert_equal(param.detach(), model.get_parameter(name).detach())


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_made_in_eval_holds_the_live_weights(
    dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    model, optimizer = run(settings, dtype=dtype)
    live = weights(model)
    with optimizer.eval_weights():
        saved = saved_and_loaded((model.state_dict(), optimizer.state_dict()))
    resumed_model, resumed = run(settings, steps=0, dtype=dtype)
    resumed.load_state_dict(saved[1])
    resumed_model.load_state_dict(saved[0])
    resumed.train()
    assert_equal(live, weights(resumed_model))
    train(model, optimizer, range(5, 25))
    train(resumed_model, resumed, range(5, 25))
    assert_equal(weights(model), weights(resumed_model))


@EVERY
def test_copies_moves_and_new_memory_formats_are_no_writes(settings: dict[str, Any]) -> None:
    model, optimizer = run(settings)
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: [setattr(p, "data", p.data.t().contiguous().t()) for p in model.parameters()],
    ]
    shown = []
    for change in changes:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            change()
            with optimizer.eval_weights():
                shown.append(weights(model))
    copied_model, copied = copy.deepcopy((model, optimizer))
    with copied.eval_weights():
        shown.append(weights(copied_model))
    for others in shown[1:]:
        assert_equal(shown[0], others)


@pytest.mark.parametrize("settings", [dict(), dict(layout="dense")], ids=["packed", "dense"])
def test_a_constraint_after_every_step_is_kept_as_under_the_bare_optimizer(
    settings: dict[str, Any],
) -> None:
    model, optimizer = run(settings, steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(45):
            train(model, optimizer, [step])
            with torch.no_grad():
                for param in model.parameters():
                    param.clamp_(-0.2, 0.2)
        with optimizer.eval_weights():
            assert all(weight.abs().max() <= 0.2 for weight in weights(model))
        optimizer.consolidate()
    assert all(weight.abs().max() <= 0.2 for weight in weights(model))


def test_a_base_that_fails_leaves_what_the_model_holds() -> None:
    """With values kept apart from the weights, too."""

    class Failing(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if fails:
                raise RuntimeError("no step")

    for settings in (dict(rescale=True), dict(layout="dense"), dict(residual="persistent")):
        fails: list[int] = []
        model = small_model()
        base = Failing(model.named_parameters(), lr=0.02)
        optimizer = GMixoutOptimizer(base, **{"layout": "packed", "mask_prob": 0.5, **settings})
        train(model, optimizer, range(3))
        before = weights(model)
        with optimizer.eval_weights():
            deployed = weights(model)
        fails.append(1)
        with pytest.raises(RuntimeError, match="no step"):
            train(model, optimizer, [3])
        assert_equal(before, weights(model))
        with optimizer.eval_weights():
            torch.testing.assert_close(weights(model), deployed, rtol=1e-12, atol=1e-12)
        fails.clear()
        train(model, optimizer, range(4, 8))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_new_tensor_names_its_device(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """A default device does not matter, as for the bare optimizer."""

    def trained() -> tuple[nn.Module, GMixoutOptimizer]:
        model = small_model(dtype)
        base = torch.optim.SGD(model.named_parameters(), lr=0.02, momentum=0.9)
        return model, GMixoutOptimizer(base, mask_prob=0.5, resample_every=2, **settings)

    def steps(model: nn.Module, optimizer: GMixoutOptimizer) -> None:
        for _ in range(5):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
            optimizer.clip_grad_norm_(1.0)
            with optimizer.eval_weights():
                optimizer.report()
            optimizer.load_state_dict(optimizer.state_dict())

    model, optimizer = trained()
    other_model, other = trained()
    steps(model, optimizer)
    with torch.device("meta"):
        steps(other_model, other)
    assert_equal(weights(model), weights(other_model))


def test_a_parameter_whose_shape_changes_before_its_first_step_is_counted_anew() -> None:
    """As when a vocabulary grows: the Parameter stays, its data are swapped."""
    for settings in (dict(), dict(granularity="row"), dict(granularity=4), dict(layout="dense")):
        param = nn.Parameter(torch.randn(40, 8))
        base = torch.optim.AdamW([param], lr=0.01, weight_decay=0)
        optimizer = GMixoutOptimizer(base, resample_every=2, **settings)
        param.data = torch.randn(60, 8)
        start = param.detach().clone()
        for _ in range(200):
            param.grad = torch.ones_like(param)
            optimizer.step()
        optimizer.consolidate()
        assert (param != start).any(1).all(), settings


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_swapped_in_and_out_leaves_the_live_weights(
    dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    """While the model shows the weights to deploy: train() puts back what eval() took away."""
    model, optimizer = run(settings, dtype=dtype)
    other, other_optimizer = run(settings, dtype=dtype)
    optimizer.eval()
    deployed = copy.deepcopy(model.state_dict())
    load(model, best_of(dtype))
    load(model, deployed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.train()
    assert_equal(weights(model), weights(other))
    for each, by in ((model, optimizer), (other, other_optimizer)):
        train(each, by, range(5, 9))
        by.consolidate()
    assert_equal(weights(model), weights(other))


@EVERY
def test_the_report_says_which_weights_the_model_holds(settings: dict[str, Any]) -> None:
    model, optimizer = run(settings, steps=0)

    def is_live() -> bool:
        report = optimizer.report()
        assert ("holds live weights" in str(report)) == report.is_live
        return report.is_live

    assert not is_live()
    train(model, optimizer, range(3))
    assert is_live()
    with optimizer.eval_weights():
        assert not is_live()
    assert is_live()
    optimizer.consolidate()
    assert not is_live()
    train(model, optimizer, range(3, 5))
    assert is_live()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", ["consolidate", "eval", "train"])
def test_a_model_written_through_data_is_kept(
    call: str, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    """As averages copy themselves into a model, without a trace in versions."""
    model, optimizer = run(settings, dtype=dtype)
    best = small_model(dtype, seed=7)
    if call == "train":
        optimizer.eval()
    for param, other in zip(model.parameters(), best.parameters(), strict=True):
        param.data.copy_(other.data)
    with pytest.warns(UserWarning, match=rf"{call}\(\)\s+keeps them"):
        getattr(optimizer, call)()
    assert_equal(weights(model), weights(best))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.consolidate()
    assert_equal(weights(model), weights(best))


@EVERY
def test_a_few_weights_clamped_through_data_are_part_of_the_episode(
    settings: dict[str, Any],
) -> None:
    model, optimizer = run(settings)
    bound = float(model.body.weight.abs().max()) - 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.body.weight.data.clamp_(-bound, bound)
        with optimizer.eval_weights():
            deployed = weights(model)
        optimizer.consolidate()
    assert_equal(deployed, weights(model))


@EVERY
@pytest.mark.parametrize("call", ["eval", "train", "consolidate"])
def test_a_warning_that_is_an_error_leaves_nothing_half_done(
    call: str, settings: dict[str, Any]
) -> None:
    model, optimizer = run(settings)
    if call == "train":
        optimizer.eval()
    with torch.no_grad():
        model.body.weight.add_(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="keeps them"):
            getattr(optimizer, call)()
    other, by = run(settings)
    if call == "train":
        by.eval()
    with torch.no_grad():
        other.body.weight.add_(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(by, call)()
        for each in (optimizer, by):
            each.train()
    assert_equal(weights(model), weights(other))
    for each, its in ((model, optimizer), (other, by)):
        train(each, its, range(5, 9))
    assert_equal(weights(model), weights(other))


def test_a_decay_through_data_is_part_of_the_episode() -> None:
    model, optimizer = run({})
    for param in model.parameters():
        param.data.mul_(1 - 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.consolidate()
