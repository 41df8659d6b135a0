"""What users' scripts do with optimizers, as met in public threads: each as the bare optimizer does
it, or refused before anything has changed."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gmixout_optim import GMixoutOptimizer
from tests.training import assert_equal, loss_of, saved_and_loaded, small_model, train, weights

LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": dict(layout="packed"),
    "dense": dict(layout="dense"),
    "persistent": dict(residual="persistent"),
}
EVERY = pytest.mark.parametrize("settings", LAYOUTS.values(), ids=LAYOUTS)


def wrap(
    model: nn.Module, make: Callable[..., Any] = torch.optim.AdamW, **settings: Any
) -> GMixoutOptimizer:
    base = make(model.named_parameters(), lr=0.02)
    return GMixoutOptimizer(base, **{"mask_prob": 0.5, "resample_every": 3, **settings})


# Compiled functions, inference mode, swapped tensors


@EVERY
@pytest.mark.parametrize("whole_loop", [False, True])
def test_a_step_in_a_compiled_function(whole_loop: bool, settings: dict[str, Any]) -> None:
    """It runs eagerly, as parts of torch's own optimizers do."""
    model, other = small_model(), small_model()
    optimizer, other_optimizer = wrap(model, **settings), wrap(other, **settings)
    torch._dynamo.reset()
    if whole_loop:

        @torch.compile(backend="eager")
        def loop(step: int) -> None:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    else:
        compiled = torch.compile(optimizer.step, backend="eager")

        def loop(step: int) -> None:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            compiled()

    for step in range(5):
        loop(step)
    train(other, other_optimizer, range(5))
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-9, atol=1e-9)
    assert optimizer.episode == 1


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_calls_in_inference_mode(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """As validation runs in: nothing that is kept becomes an inference tensor."""
    model, other = small_model(dtype), small_model(dtype)
    optimizer, other_optimizer = wrap(model, **settings), wrap(other, **settings)

    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    for each, by, mode in (
        (model, optimizer, torch.inference_mode),
        (other, other_optimizer, nothing),
    ):
        train(each, by, range(2))
        with mode(), by.eval_weights():
            by.report()
        for calls in ([by.resample], [by.resync], [by.consolidate], [by.eval, by.train]):
            with mode():
                for call in calls:
                    call()
            train(each, by, range(2))
    assert_equal(weights(model), weights(other))


@EVERY
@pytest.mark.parametrize("grad_layout", ["dense", "packed"])
def test_parameters_may_be_swapped(grad_layout: str, settings: dict[str, Any]) -> None:
    """Torch refuses to swap tensors that somebody has a weak reference to."""
    if grad_layout == "packed":
        if settings != LAYOUTS["packed"]:
            return
        settings = dict(grad_layout="packed")
    model = small_model()
    optimizer = wrap(model, **settings)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(small_model(seed=3).state_dict())
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    train(model, optimizer, range(5))
    assert optimizer.episode == 1


# State that scripts write


@EVERY
def test_moments_set_to_whole_tensors(settings: dict[str, Any]) -> None:
    """As scripts reset Adam: where state is packed, their active part is taken."""
    model, other = small_model(), small_model()
    optimizer, other_optimizer = wrap(model, **settings), wrap(other, **settings)
    for each, by in ((model, optimizer), (other, other_optimizer)):
        train(each, by, range(2))
        for param in each.parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                moments = by.state[param]
                if each is model:
                    moments[key] = torch.full_like(param, 0.25)
                else:
                    moments[key].fill_(0.25)
        by.load_state_dict(saved_and_loaded(by.state_dict()))
        train(each, by, range(2, 8))
    if settings == LAYOUTS["packed"]:
        assert_equal(weights(model), weights(other))
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))


@EVERY
def test_state_set_through_setstate(settings: dict[str, Any]) -> None:
    model = small_model()
    optimizer = wrap(model, **settings)
    calls: list[int] = []
    optimizer.register_resample_hook(lambda _: calls.append(1))
    train(model, optimizer, range(2))
    optimizer.__setstate__({"state": type(optimizer.base.state)(dict)})
    assert not optimizer.base.state
    train(model, optimizer, range(2, 4))
    assert calls == [1]


class Shared(torch.optim.Optimizer):
    """Makes its state in its constructor, as optimizers do whose processes share it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, dict(lr=lr))
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param].update(
                    step=0, count=torch.zeros(()), mean=torch.full_like(param, 0.5)
                )

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["step"] += 1
                state["count"] += 1
                state["mean"].lerp_(param.grad, 0.5)
                param.detach().sub_(group["lr"] * state["mean"] / state["step"])


@EVERY
def test_state_made_in_the_constructor_is_made_fresh_from(settings: dict[str, Any]) -> None:
    model = small_model()
    optimizer = wrap(model, Shared, lr_scale=1.0, episode_warmup=0, **settings)
    means = {param: optimizer.base.state[param]["mean"] for param in model.parameters()}
    train(model, optimizer, range(3))
    goes_on = settings == LAYOUTS["persistent"]
    for param in model.parameters():
        state = optimizer.base.state[param]
        assert state["step"] == state["count"] == (3 if goes_on else 0)
        assert bool((state["mean"] == 0.5).all()) != goes_on
        if settings == LAYOUTS["dense"]:
            assert state["mean"] is means[param]  # which others may hold
    train(model, optimizer, range(3, 8))


@pytest.mark.parametrize("layout", ["packed", "dense"])
def test_state_of_a_base_that_has_stepped_starts_fresh_after_a_redraw(layout: str) -> None:
    """A tensor of one element is always filled with one number."""

    class Momentum(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, dict(lr=lr))

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for param in group["params"]:
                    state = self.state[param]
                    mean = state.setdefault("mean", torch.zeros_like(param))
                    mean.lerp_(param.grad, 0.5)
                    param.detach().sub_(group["lr"] * mean)

    for shapes in ([(1,), (4, 4)], [(1,), ()]):
        params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        base = Momentum(params, lr=0.1)
        for factor in range(3):
            for place, param in enumerate(params):
                param.grad = torch.randn_like(param) * (factor + place)
            if factor == 2:
                optimizer = GMixoutOptimizer(base, resample_every=1, mask_prob=0.5, layout=layout)
                optimizer.step()
            else:
                base.step()
        for param in params:
            kept = base.state.get(param, {}).get("mean")
            assert kept is None or not kept.any()


def test_a_state_dict_kept_by_reference_keeps_the_anchors() -> None:
    """For a rollback; redraws of a compiled step write anchors in place."""
    moved = []
    for compiled in (False, True):
        for copies in (False, True):
            model = small_model(torch.float32)
            optimizer = wrap(model, compile=compiled)
            train(model, optimizer, range(5))
            state, held = optimizer.state_dict(), copy.deepcopy(model.state_dict())
            state = copy.deepcopy(state) if copies else state
            train(model, optimizer, range(5, 11))
            model.load_state_dict(held)
            optimizer.load_state_dict(state)
            optimizer.consolidate()
            moved.append(weights(model))
    for other in moved[1:]:
        torch.testing.assert_close(moved[0], other)


# State dicts


def test_state_dict_in_another_order_is_refused() -> None:
    """Renumbered by names, as torch's documentation shows: the active weights would be others."""
    model, other = small_model(), small_model()
    names = dict(model.named_parameters())
    optimizer = wrap(model)
    train(model, optimizer, range(2))
    named = [(name, dict(other.named_parameters())[name]) for name in reversed(names)]
    loader = GMixoutOptimizer(torch.optim.AdamW(named, lr=0.02), mask_prob=0.5, resample_every=3)
    saved = optimizer.state_dict()
    (group,) = saved["param_groups"]
    at = dict(zip(group["param_names"], group["params"], strict=True))
    order = [name for name, _ in named]
    adapted = {
        "state": {place: saved["state"][at[name]] for place, name in enumerate(order)},
        "param_groups": [{**group, "param_names": order}],
    }
    before = copy.deepcopy(loader.state_dict())
    with pytest.raises(ValueError, match=r"head\.bias is parameter 0 here and was parameter 3"):
        loader.load_state_dict(adapted)
    assert_equal(before, loader.state_dict())


@pytest.mark.parametrize("mask_prob", [0.0, 0.5])
@pytest.mark.parametrize(
    "flags", [dict(fused=True), dict(foreach=True), dict(maximize=True)], ids=str
)
def test_flags_that_were_not_given_when_it_was_saved(
    flags: dict[str, Any], mask_prob: float
) -> None:
    model = small_model()
    optimizer = wrap(model, mask_prob=mask_prob)
    train(model, optimizer, range(2))
    saved = saved_and_loaded(optimizer.state_dict())
    other = small_model()
    loader = wrap(
        other, lambda params, lr: torch.optim.AdamW(params, lr, **flags), mask_prob=mask_prob
    )
    loader.load_state_dict(saved)
    assert_equal(loader.state_dict(), optimizer.state_dict())


class Counting(torch.optim.SGD):
    """Saves a counter of its own beside torch's state, on which its steps depend."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            group["weight_decay"] = 0.1 * self.count
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        self.count = state_dict.pop("count")
        super().load_state_dict(state_dict)


@pytest.mark.parametrize("settings", [*LAYOUTS.values(), dict(mask_prob=0.0)], ids=str)
def test_what_the_base_adds_to_its_state_dict(settings: dict[str, Any]) -> None:
    model, resumed = small_model(), small_model()
    optimizer = wrap(model, Counting, **settings)
    train(model, optimizer, range(4))
    saved = saved_and_loaded([model.state_dict(), optimizer.state_dict()])
    loader = wrap(resumed, Counting, **settings)
    resumed.load_state_dict(saved[0])
    loader.load_state_dict(saved[1])
    assert loader.base.count == 4
    assert_equal(loader.state_dict(), optimizer.state_dict())
    with pytest.raises(RuntimeError, match="that is wrapped: load into"):
        loader.base.load_state_dict(saved[1])
    train(model, optimizer, range(4, 9))
    train(resumed, loader, range(4, 9))
    assert_equal(weights(model), weights(resumed))


@EVERY
def test_state_put_in_past_load_state_dict_is_refused(settings: dict[str, Any]) -> None:
    """As ZeroRedundancyOptimizer does with that of the optimizer inside it."""
    model, other = small_model(), small_model()
    optimizer = wrap(model, **settings)
    train(model, optimizer, range(2))
    inside = wrap(other, **settings)
    for number, param in enumerate(other.parameters()):
        inside.state[param] = copy.deepcopy(optimizer.state_dict()["state"][number])
    loss_of(other, 0).backward()
    start = weights(other)
    with pytest.raises(RuntimeError, match=r"put into the optimizer from outside.*load_state_dict"):
        inside.step()
    assert_equal(start, weights(other))


def test_groups_hold_plain_values() -> None:
    """Lightning's fine-tuning callbacks pickle all that is in them but the parameters."""
    model = small_model()
    optimizer = wrap(model)
    train(model, optimizer, range(4))
    (group,) = optimizer.param_groups
    kept = {key: item for key, item in group.items() if key != "params"}
    assert_equal(saved_and_loaded(kept), kept)
    assert group["gmixout"]["episode"] == 1
    optimizer.eval()
    assert group["gmixout"]["evaluating"]


def test_a_bare_base_that_has_loaded_a_wrapped_state() -> None:
    model = small_model()
    optimizer = wrap(model)
    train(model, optimizer, range(2))
    other = small_model()
    base = torch.optim.AdamW(other.named_parameters(), lr=0.02)
    base.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="has loaded the state of a GMixoutOptimizer"):
        GMixoutOptimizer(base)


def test_a_prefix_of_all_names_does_not_matter() -> None:
    """Of a LightningModule, say, whose model is a part of it."""
    model, other = small_model(), small_model()
    optimizer = wrap(model)
    train(model, optimizer, range(2))
    named = [(f"model.{name}", param) for name, param in other.named_parameters()]
    loader = GMixoutOptimizer(torch.optim.AdamW(named, lr=0.02), mask_prob=0.5, resample_every=3)
    loader.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(loader.state_dict())
    for names in (("x.body", "y.head"), ("mybody", "myhead")):
        parts = dict(zip(("body", "head"), names, strict=True))
        third = small_model()
        other_names = [
            (parts[name.split(".")[0]] + name[4:], param)
            for name, param in third.named_parameters()
        ]
        loader = GMixoutOptimizer(
            torch.optim.AdamW(other_names, lr=0.02), mask_prob=0.5, resample_every=3
        )
        with pytest.raises(ValueError, match="belongs to another model"):
            loader.load_state_dict(optimizer.state_dict())


def test_a_state_dict_without_what_the_base_adds() -> None:
    optimizer = wrap(small_model(), Counting)
    saved = optimizer.state_dict()
    del saved["count"]
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"\['count'\] of the base's own state_dict\(\)"):
        optimizer.load_state_dict(saved)
    assert_equal(before, optimizer.state_dict())


# Groups and memory


class Scaled(torch.optim.SGD):
    """With a list in its groups that has an item for each parameter."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for name, factor, param in zip(
                group["names"], group["factors"], group["params"], strict=True
            ):
                assert name == f"factor {factor}"
                param.detach().sub_(group["lr"] * factor * param.grad)


@EVERY
def test_lists_with_an_item_for_each_parameter_go_with_it(settings: dict[str, Any]) -> None:
    def run(masked: bool) -> list[Tensor]:
        params = [nn.Parameter(torch.ones(size, 3)) for size in (1, 7, 30, 2)]
        base = Scaled(params, lr=0.125)
        factors = [1.0, 2.0, 4.0, 8.0]
        names = [f"factor {factor}" for factor in factors]
        base.param_groups[0].update(names=names, factors=factors)
        optimizer: Any = base
        masks = [torch.ones_like(param) for param in params]
        if masked:
            optimizer = GMixoutOptimizer(
                base, mask_prob=0.5, resample_every=None, lr_scale="auto", **settings
            )
            masks = [optimizer.active_mask(param) for param in params]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert base.param_groups[0]["names"] is names
        return [
            (1 - param.detach())[mask.bool()].unique()
            for param, mask in zip(params, masks, strict=True)
        ]

    for place, (moved, bare) in enumerate(zip(run(True), run(False), strict=True)):
        assert_equal(bare, torch.tensor([0.125 * 2**place]))
        assert len(moved) == 1
        if settings == LAYOUTS["persistent"]:
            assert_equal(moved, bare)
        else:  # at 1 / d, which is not the same for all
            assert 1.4 <= float(moved / bare) <= 2.2


def test_lists_that_are_hyperparameters_stay_whole() -> None:
    class Momenta(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                first, second = group["momenta"]
                assert (first, second) == (0.9, 0.99)
                for param in group["params"]:
                    param.detach().sub_(group["lr"] * param.grad)

    params = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(30))]
    for named in (False, True):
        given = [(f"p{place}", param) for place, param in enumerate(params)] if named else params
        base = Momenta([{"params": given, "momenta": [0.9, 0.99]}], lr=0.1)
        optimizer = GMixoutOptimizer(base)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.consolidate()


def test_group_dicts_of_another_wrapper() -> None:
    """They hold its settings, which would silently be those of the next."""
    model = small_model()
    groups = [{"params": list(model.parameters())}]
    GMixoutOptimizer(torch.optim.AdamW(groups), mask_prob=0.5).consolidate()
    with pytest.raises(ValueError, match="group dicts that another GMixoutOptimizer had"):
        GMixoutOptimizer(torch.optim.AdamW(groups), mask_prob=0.9)


def test_a_parameter_with_two_names_is_excluded_by_either() -> None:
    param = nn.Parameter(torch.randn(8, 6))
    for pattern in ("embedding.*", "head.*"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = torch.optim.AdamW([("embedding.weight", param), ("head.weight", param)])
        optimizer = GMixoutOptimizer(base, exclude=pattern)
        assert not any(tensor.mixed for tensor in optimizer.report().tensors)


def test_a_subclass_with_arguments_of_its_own() -> None:
    class Mine(GMixoutOptimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(torch.optim.AdamW(params, lr=lr), mask_prob=0.5)

    optimizer = Mine(small_model().parameters(), lr=1e-3)
    assert optimizer.param_groups[0]["lr"] == 1e-3


@EVERY
def test_two_parameters_in_the_same_memory_are_refused(settings: dict[str, Any]) -> None:
    class Tied(nn.Module):
        def __init__(self, late: bool) -> None:
            super().__init__()
            self.embedding = nn.Parameter(torch.randn(8, 6))
            self.head = nn.Parameter(torch.randn(8, 6))
            if not late:
                self.tie()

        def tie(self) -> None:
            self.head.data = self.embedding.data

    message = r"embedding and head are two parameters in the same memory.*head.weight ="
    for exclude in ((), "head", "embedding"):
        base = torch.optim.AdamW(Tied(False).named_parameters())
        with pytest.raises(ValueError, match=message):
            GMixoutOptimizer(base, exclude=exclude, **settings)
        assert "mask_prob" not in base.param_groups[0]
    late = Tied(True)
    optimizer = wrap(late, **settings)
    late.tie()
    for param in late.parameters():
        param.grad = torch.ones_like(param)
    start = weights(late)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_equal(start, weights(late))
    late = Tied(True)
    head = GMixoutOptimizer(torch.optim.AdamW([late.head]), **settings)
    late.tie()
    with pytest.raises(ValueError, match="same memory"):
        head.add_param_group({"params": [late.embedding]})
    GMixoutOptimizer(torch.optim.AdamW(Tied(False).parameters()), mask_prob=0.0)
    frozen = Tied(False)
    frozen.head.requires_grad_(False)
    GMixoutOptimizer(torch.optim.AdamW(frozen.parameters()), **settings)


@EVERY
def test_parts_of_one_memory_are_fine(settings: dict[str, Any]) -> None:
    whole = torch.randn(4, 12)
    parts = {
        "rows": [nn.Parameter(part) for part in whole.chunk(2)],
        "columns": [nn.Parameter(part) for part in whole.chunk(2, 1)],
    }
    for name, params in parts.items():
        base = torch.optim.SGD(params, lr=0.1)
        optimizer = GMixoutOptimizer(base, mask_prob=0.5, **settings)
        for param in params:
            param.grad = torch.ones_like(param)
        before = whole.clone()
        optimizer.step()
        moved = sum(int(optimizer.active_mask(param).sum()) for param in params)
        assert int((whole != before).sum()) <= moved, name


# Warnings


def test_warnings_point_at_the_script() -> None:
    model = small_model()
    optimizer = wrap(model)
    train(model, optimizer, range(2))
    model.load_state_dict(small_model(seed=3).state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = sys._getframe().f_lineno + 1
        optimizer.consolidate()
        nn.init.zeros_(model.body.weight)
        with warnings.catch_warnings():
            GMixoutOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    kept, fresh = caught
    assert (kept.filename, kept.lineno) == (__file__, line)
    assert (fresh.filename, fresh.lineno) == (__file__, line + 3)
