"""What loops, schedulers, scalers and hooks expect of a torch optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gmixout_optim import GMixoutOptimizer, mixout_param_groups
from tests.optimizers import DENSE_GRADIENTS, ELEMENTWISE, Case
from tests.training import assert_equal, loss_of, small_model, train, weights


def test_global_and_own_hooks_fire_once() -> None:
    model = small_model()
    base = torch.optim.AdamW(model.parameters())
    optimizer = GMixoutOptimizer(base, resample_every=2)
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda opt, *_: calls.append(f"pre {type(opt).__name__}")),
        register_optimizer_step_post_hook(
            lambda opt, *_: calls.append(f"post {type(opt).__name__}")
        ),
        optimizer.register_step_pre_hook(lambda opt, *_: calls.append("own pre")),
        optimizer.register_step_post_hook(lambda opt, *_: calls.append("own post")),
        base.register_step_pre_hook(lambda opt, *_: calls.append(f"base pre {opt is base}")),
        base.register_step_post_hook(lambda opt, *_: calls.append(f"base post {opt is base}")),
        optimizer.register_resample_hook(
            lambda opt: calls.append(f"resampled {opt.episode} {opt.steps_in_episode}")
        ),
    ]
    try:
        train(model, optimizer, range(2))
    finally:
        for handle in handles:
            handle.remove()
    once = ["pre GMixoutOptimizer", "own pre", "base pre True", "base post True"]
    after = ["own post", "post GMixoutOptimizer"]
    assert calls == [*once, *after, *once, "resampled 1 0", *after]
    calls.clear()
    train(model, optimizer, range(2))
    assert calls == []


@pytest.mark.parametrize("case", ELEMENTWISE, ids=repr)
def test_a_closure_gives_what_a_backward_before_the_step_gives(case: Case) -> None:
    model = small_model()
    closure_model = copy.deepcopy(model)
    optimizer = GMixoutOptimizer(case(model.parameters()), resample_every=2)
    with_closure = GMixoutOptimizer(case(closure_model.parameters()), resample_every=2)
    losses = train(model, optimizer, range(5))
    for step in range(5):

        def closure(step: int = step) -> torch.Tensor:
            with_closure.zero_grad()
            assert torch.is_grad_enabled()
            loss = loss_of(closure_model, step)
            loss.backward()
            return loss

        assert float(with_closure.step(closure).detach()) == losses[step]
    assert_equal(weights(model), weights(closure_model))


@pytest.mark.parametrize("layout", ["auto", "dense"])
@pytest.mark.parametrize("residual", ["episodic", "persistent"])
@pytest.mark.parametrize("case", DENSE_GRADIENTS, ids=repr)
def test_a_closure_that_raises_leaves_everything_as_it_was(
    case: Case, residual: str, layout: str
) -> None:
    model = small_model(bias=not case.matrices_only)
    optimizer = GMixoutOptimizer(
        case(model.named_parameters()), exclude="head.*", residual=residual, layout=layout
    )
    train(model, optimizer, range(3))
    before = weights(model)
    state = copy.deepcopy(optimizer.state_dict())
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        raise OSError("no more data")

    with pytest.raises(OSError, match="no more data"):
        optimizer.step(closure)
    assert calls == 1
    assert_equal(before, weights(model))
    assert_equal(state, optimizer.state_dict())


def test_a_closure_that_raises_between_evaluations_restores_the_weights() -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(
        torch.optim.LBFGS(model.named_parameters(), max_iter=5), exclude="head.*"
    )
    train(model, optimizer, range(2))
    before = weights(model)
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError("no more data")
        optimizer.zero_grad()
        loss = loss_of(model, 9)
        loss.backward()
        return loss

    with pytest.raises(OSError, match="no more data"):
        optimizer.step(closure)
    assert calls == 3
    assert_equal(before, weights(model))


@pytest.mark.parametrize("layout", ["packed", "dense"])
def test_a_base_that_raises_leaves_model_and_groups_as_they_were(layout: str) -> None:
    class Failing(torch.optim.SGD):
        fail = False

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["params"][0].add_(1.0)
            if self.fail:
                raise OSError("half done")
            return super().step(closure)

    model = small_model()
    base = Failing(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = GMixoutOptimizer(base, layout=layout)
    train(model, optimizer, range(2))
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    grads = [param.grad for param in model.parameters()]
    base.fail = True
    with pytest.raises(OSError, match="half done"):
        optimizer.step()
    assert_equal(before, weights(model))
    assert_equal(state, optimizer.state_dict())
    assert all(param.grad is grad for param, grad in zip(model.parameters(), grads, strict=True))
    assert all(
        a is b for a, b in zip(base.param_groups[0]["params"], model.parameters(), strict=True)
    )


@pytest.mark.parametrize("layout", ["packed", "dense"])
def test_gradients_are_left_as_they_are(layout: str) -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), layout=layout, rescale=True
    )
    loss_of(model, 0).backward()
    grads = [(param.grad, param.grad.clone()) for param in model.parameters()]
    optimizer.step()
    for param, (grad, copied) in zip(model.parameters(), grads, strict=True):
        assert param.grad is grad
        assert_equal(grad, copied)
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


def test_add_param_group_in_mid_training() -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(
        torch.optim.AdamW(model.body.named_parameters(prefix="body"), lr=0.1),
        exclude="*.bias",
        resample_every=3,
    )
    train(model, optimizer, range(2))
    optimizer.add_param_group(
        {
            "params": list(model.head.named_parameters(prefix="head")),
            "lr": 0.01,
            "mask_prob": 0.5,
            "granularity": "row",
        }
    )
    assert len(optimizer.base.param_groups) == 2
    assert optimizer.param_groups[1]["anchor_decay"] == 0.5
    assert optimizer.active_mask(model.head.bias).all()
    rows = optimizer.active_mask(model.head.weight)
    assert int(rows.all(1).sum()) == 2
    assert int(rows.any(1).sum()) == 2
    before = model.head.weight.detach().clone()
    train(model, optimizer, range(2, 3))
    assert optimizer.episode == 1
    assert_equal((model.head.weight != before), rows)


@pytest.mark.parametrize(
    ("group", "error"),
    [
        (dict(mask_prob=1.5), ValueError),
        (dict(granularity=0), ValueError),
        (dict(anchor_decay="0.9"), TypeError),
        ([], TypeError),
    ],
    ids=str,
)
def test_a_bad_param_group_is_refused_whole(group: object, error: type[Exception]) -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.body.parameters()))
    if isinstance(group, dict):
        group = {"params": list(model.head.parameters()), **group}
    with pytest.raises(error):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.report().tensors) == 2


def test_a_base_that_has_stepped_is_taken_over() -> None:
    """Wrapping with one endless episode goes on from the moments of the active weights."""
    for case in ELEMENTWISE:
        model = small_model()
        reference_model = copy.deepcopy(model)
        base, reference = case(model.parameters()), case(reference_model.parameters())
        train(model, base, range(3))
        train(reference_model, reference, range(3))
        optimizer = GMixoutOptimizer(base, resample_every=None, mask_prob=0.5, lr_scale=1.0)
        grads = [torch.ones_like(param) for param in model.parameters()]
        for of, opt in ((model, optimizer), (reference_model, reference)):
            for param, grad in zip(of.parameters(), grads, strict=True):
                param.grad = grad.clone()
            opt.step()
        for ours, theirs in zip(model.parameters(), reference_model.parameters(), strict=True):
            mask = optimizer.active_mask(ours)
            torch.testing.assert_close(ours[mask], theirs[mask])
        for param in model.parameters():
            for key, value in optimizer.state[param].items():
                if isinstance(value, torch.Tensor) and value.ndim:
                    assert value.shape == optimizer.state[param]["gmixout"]["anchor"].shape, key


def test_model_moved_or_loaded_after_wrapping_is_seen() -> None:
    """Nothing is read from the model before the first step."""
    model, other = small_model(), small_model(seed=1)
    expected = copy.deepcopy(other)
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()), resample_every=3)
    model.load_state_dict(other.state_dict())
    fresh = GMixoutOptimizer(torch.optim.AdamW(expected.parameters()), resample_every=3)
    train(model, optimizer, range(5))
    train(expected, fresh, range(5))
    assert_equal(weights(model), weights(expected))


def test_memory_format_may_change_in_mid_training() -> None:
    torch.manual_seed(0)
    runs = []
    for change in (False, True):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).double()
        optimizer = GMixoutOptimizer(
            torch.optim.AdamW(model.parameters(), lr=0.1), resample_every=4
        )
        for step in range(9):
            if change and step == 2:
                model.to(memory_format=torch.channels_last)
            for param in model.parameters():
                param.grad = (
                    torch.arange(param.numel(), dtype=torch.float64).view(param.shape) - step
                )
            optimizer.step()
        runs.append([weight.contiguous() for weight in weights(model)])
    assert_equal(*runs)


def test_the_wrapper_does_not_pass_on_the_bases_attributes() -> None:
    """A scaler that saw the fused base's flag would hand it scaled gradients."""
    optimizer = GMixoutOptimizer(torch.optim.AdamW(small_model().parameters(), fused=True))
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    assert isinstance(optimizer, Optimizer)
    assert "mask_prob: 0.9" in repr(optimizer)


def test_swapping_wrapped_state_objects_keeps_one_truth() -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()))
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    train(model, optimizer, range(1))
    for param, state in list(optimizer.state.items()):  # as Lightning does when it moves devices
        optimizer.state[param] = {key: copy.deepcopy(value) for key, value in state.items()}
    unchanged = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(1, 4))
    train(*unchanged, range(1, 4))
    assert_equal(weights(model), weights(unchanged[0]))


def test_mixout_param_groups() -> None:
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, 4, 3))
    model.add_module("norm", nn.BatchNorm2d(4))
    model.add_module("head", nn.Linear(4, 2))
    model.conv.bias.requires_grad_(False)
    groups = mixout_param_groups(model, head="head.*", weight_decay=0.1, mask_prob=0.8)
    table = {
        name: (group["mask_prob"], group["weight_decay"])
        for group in groups
        for name, _ in group["params"]
    }
    assert table == {
        "conv.weight": (0.8, 0.1),
        "norm.weight": (0.0, 0.0),
        "norm.bias": (0.0, 0.0),
        "head.weight": (0.0, 0.1),
        "head.bias": (0.0, 0.0),
    }
    optimizer = GMixoutOptimizer(torch.optim.AdamW(groups), exclude=())
    assert [row.name for row in optimizer.report().tensors if row.mixed] == ["conv.weight"]
    with pytest.raises(ValueError, match=r"fc\.\*"):
        mixout_param_groups(model, head="fc.*")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in DENSE_GRADIENTS if not c.matrices_only], ids=repr)
def test_cpu_and_cuda_train_alike(case: Case) -> None:
    runs = []
    for device in ("cpu", "cuda"):
        model = small_model().to(device)
        optimizer = GMixoutOptimizer(case(model.parameters()), resample_every=3, compile=False)
        for step in range(7):
            for number, param in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(step * 10 + number)
                noise = torch.randn(param.shape, generator=generator, dtype=param.dtype)
                param.grad = param.detach() + noise.to(device)

            def closure(model: nn.Module = model) -> torch.Tensor:
                return sum(param.square().sum() for param in model.parameters())

            optimizer.step(closure if case.closure else None)
        runs.append([weight.cpu() for weight in weights(model)])
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
def test_state_follows_a_model_that_moves() -> None:
    runs = []
    for moves in (False, True):
        model = small_model()
        optimizer = GMixoutOptimizer(
            torch.optim.AdamW(model.parameters()), resample_every=3, compile=False
        )
        for step in range(6):
            if moves and step == 2:
                model.cuda()
            for param in model.parameters():
                param.grad = param.detach() * 2 + step
            optimizer.step()
        runs.append([weight.cpu() for weight in weights(model)])
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs)
