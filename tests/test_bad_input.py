"""Bad input gets an error that names the argument, the value and the fix, before anything has
changed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gmixout_optim import GMixoutOptimizer
from tests.training import assert_equal, loss_of, small_model, train, weights

BAD_SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(mask_prob=-0.1), ValueError, "mask_prob.*-0.1"),
    (dict(mask_prob=1), ValueError, "mask_prob.*1"),
    (dict(mask_prob=1.5), ValueError, "mask_prob.*1.5"),
    (dict(mask_prob=float("nan")), ValueError, "mask_prob.*nan"),
    (dict(mask_prob="0.9"), TypeError, "mask_prob.*'0.9'"),
    (dict(mask_prob=None), TypeError, "mask_prob.*None"),
    (dict(mask_prob=True), TypeError, "mask_prob.*True"),
    (dict(mask_prob=torch.tensor(0.9)), TypeError, "mask_prob.*tensor"),
    (dict(anchor_decay=-0.01), ValueError, "anchor_decay.*-0.01"),
    (dict(anchor_decay=1.01), ValueError, "anchor_decay.*1.01"),
    (dict(anchor_decay=float("nan")), ValueError, "anchor_decay.*nan"),
    (dict(anchor_decay=[0.9]), TypeError, "anchor_decay"),
    (dict(resample_every=0), ValueError, "resample_every.*0"),
    (dict(resample_every=-3), ValueError, "resample_every.*-3"),
    (dict(resample_every=1.0), TypeError, "resample_every.*1.0"),
    (dict(resample_every=True), TypeError, "resample_every.*True"),
    (dict(residual="episode"), ValueError, "residual.*'episode'"),
    (dict(residual=None), TypeError, "residual.*None"),
    (dict(sampler="uniform"), ValueError, "sampler.*'uniform'"),
    (dict(layout="sparse"), ValueError, "layout.*'sparse'"),
    (dict(granularity="columns"), ValueError, "granularity.*'columns'"),
    (dict(granularity=0), ValueError, "granularity.*0"),
    (dict(granularity=2.0), TypeError, "granularity.*2.0"),
    (dict(granularity=True), TypeError, "granularity.*True"),
    (dict(rescale="yes"), TypeError, "rescale.*'yes'"),
    (dict(lr_scale=0), ValueError, "lr_scale.*0"),
    (dict(lr_scale=-1.0), ValueError, "lr_scale.*-1.0"),
    (dict(lr_scale=float("inf")), ValueError, "lr_scale.*inf"),
    (dict(lr_scale=float("nan")), ValueError, "lr_scale.*nan"),
    (dict(lr_scale="automatic"), TypeError, "lr_scale.*'automatic'"),
    (dict(lr_scale=None), TypeError, "lr_scale.*'auto', got None"),
    (dict(episode_warmup=-1), ValueError, "episode_warmup.*-1"),
    (dict(episode_warmup=1.5), TypeError, "episode_warmup.*1.5"),
    (dict(episode_warmup=True), TypeError, "episode_warmup.*True"),
    (dict(episode_warmup=None), TypeError, "episode_warmup.*'auto', got None"),
    (dict(compile="yes"), TypeError, "compile.*'yes'"),
    (dict(compile=None), TypeError, "compile.*'auto', got None"),
    (dict(seed=-1), ValueError, "seed.*-1"),
    (dict(seed=2**63), ValueError, "seed"),
    (dict(seed=1.0), TypeError, "seed.*1.0"),
    (dict(exclude=3), TypeError, "exclude.*3"),
    (dict(exclude=["head.*", 3]), TypeError, "exclude.*3"),
    (dict(exclude="haed.*"), ValueError, "haed"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS, ids=lambda x: str(x)[:40])
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    base = torch.optim.AdamW(small_model().named_parameters())
    before = [dict(group) for group in base.param_groups]
    with pytest.raises(error, match=message):
        GMixoutOptimizer(base, **settings)
    assert [dict(group) for group in base.param_groups] == before
    GMixoutOptimizer(base)  # nothing was left behind that would be in the way


@pytest.mark.parametrize("key", ["mask_prob", "anchor_decay", "granularity"])
def test_bad_group_settings(key: str) -> None:
    model = small_model()
    base = torch.optim.AdamW(
        [{"params": model.body.parameters()}, {"params": model.head.parameters(), key: -1}]
    )
    with pytest.raises(ValueError, match=key):
        GMixoutOptimizer(base)
    assert "gmixout" not in base.param_groups[0]


def test_base_must_be_an_unwrapped_optimizer() -> None:
    model = small_model()
    for base in (model, torch.optim.AdamW, list(model.parameters())):
        with pytest.raises(TypeError, match="base"):
            GMixoutOptimizer(base)
    base = torch.optim.AdamW(model.parameters())
    wrapped = GMixoutOptimizer(base)
    with pytest.raises(TypeError, match="already"):
        GMixoutOptimizer(wrapped)
    with pytest.raises(ValueError, match="already"):
        GMixoutOptimizer(base)


def test_arguments_of_the_base_given_to_the_wrapper() -> None:
    """The message shows the right call, whatever else was passed."""
    params = list(small_model().parameters())
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((params,), dict(lr=1e-3)),
        ((torch.optim.AdamW, params), {}),
        ((torch.optim.AdamW,), dict(params=params, lr=1e-3)),
        ((), dict(base=params)),
    ]
    for args, kwargs in calls:
        with pytest.raises(TypeError, match=r"base must be .* GMixoutOptimizer\(torch.optim.AdamW"):
            GMixoutOptimizer(*args, **kwargs)


def test_an_attribute_that_only_the_base_has() -> None:
    class Own(torch.optim.SGD):
        def own(self) -> int:
            return 3

    optimizer = GMixoutOptimizer(Own(small_model().parameters(), lr=0.1))
    with pytest.raises(AttributeError, match=r"no attribute 'own', .*use optimizer\.base\.own"):
        optimizer.own()
    with pytest.raises(AttributeError, match=r"no attribute 'other'$"):
        _ = optimizer.other
    assert optimizer.base.own() == 3


class WithoutRate(torch.optim.Optimizer):
    """Finds its learning rate itself, as Adafactor's relative steps do."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.detach().add_(param.grad, alpha=-0.1)


@pytest.mark.parametrize("defaults", [dict(lr=None), dict(), dict(lr="auto")], ids=str)
def test_settings_of_a_learning_rate_that_there_is_not(defaults: dict[str, Any]) -> None:
    def base() -> WithoutRate:
        return WithoutRate(small_model().named_parameters(), **defaults)

    for settings in (dict(lr_scale=2.0), dict(episode_warmup=5)):
        (argument,) = settings
        with pytest.raises(ValueError, match=f"{argument}=.*WithoutRate.*finds its learning rate"):
            GMixoutOptimizer(base(), **settings)
    with pytest.warns(UserWarning, match="go less far"):
        GMixoutOptimizer(base())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings in (dict(lr_scale=1.0), dict(mask_prob=0.0), dict(residual="persistent")):
            GMixoutOptimizer(base(), **settings)
        model = small_model()
        bare = WithoutRate(model.named_parameters(), **defaults)
        optimizer = GMixoutOptimizer(bare, lr_scale=1.0, mask_prob=0.5, resample_every=None)
        loss_of(model, 0).backward()
        start = weights(model)
        optimizer.step()
    mask = optimizer.active_mask(model.body.weight)
    stepped = torch.where(mask, start[0] - 0.1 * model.body.weight.grad, start[0])
    torch.testing.assert_close(model.body.weight.detach(), stepped)


def test_learning_rates_of_numpy_are_numbers() -> None:
    model, other = small_model(), small_model()
    for each, lr in ((model, np.float32(0.125)), (other, 0.125)):
        train(each, GMixoutOptimizer(torch.optim.SGD(each.named_parameters(), lr=lr)), range(3))
    assert_equal(weights(model), weights(other))


def test_exclude_needs_names() -> None:
    with pytest.raises(ValueError, match="named_parameters"):
        GMixoutOptimizer(torch.optim.AdamW(small_model().parameters()), exclude="head.*")


def test_a_pattern_that_matches_nothing_beside_one_that_does_is_warned_about() -> None:
    base = torch.optim.AdamW(small_model().named_parameters())
    with pytest.warns(UserWarning, match="classifier"):
        GMixoutOptimizer(base, exclude=["head.*", "classifier.*"])


@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.LBFGS(model.parameters()),
        lambda model: torch.optim.Muon([model.body.weight]),
        lambda model: torch.optim.Adafactor(model.parameters()),
    ],
)
def test_packed_layout_is_refused_where_it_is_wrong(make) -> None:
    with pytest.raises(ValueError, match="layout='dense'"):
        GMixoutOptimizer(make(small_model()), layout="packed")


def test_sparse_adam_is_refused() -> None:
    with pytest.raises(ValueError, match="SparseAdam"):
        GMixoutOptimizer(torch.optim.SparseAdam(small_model().parameters()))


def test_complex_parameters_take_the_dense_layout() -> None:
    param = nn.Parameter(torch.randn(6, 4, dtype=torch.complex64))
    with pytest.raises(TypeError, match="layout='dense'"):
        GMixoutOptimizer(torch.optim.AdamW([param]), layout="packed")
    optimizer = GMixoutOptimizer(torch.optim.AdamW([param], lr=0.1), resample_every=2)
    assert optimizer.report().layout == "dense"
    anchor = optimizer.anchor(param)
    mask = optimizer.active_mask(param)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert_equal(param.detach()[~mask], anchor[~mask])
    assert (param[mask] != anchor[mask]).all()


@pytest.mark.parametrize("layout", ["packed", "dense"])
def test_sparse_gradients_are_refused_with_everything_untouched(layout: str) -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4))
    optimizer = GMixoutOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), layout=layout)
    model(torch.tensor([1, 2])).square().sum().backward()
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    for call in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match="sparse"):
            call()
        assert_equal(before, weights(model))
        assert_equal(state, optimizer.state_dict())
    assert model[0].weight.grad.is_sparse


def test_calls_inside_eval_weights() -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1))
    train(model, optimizer, range(3))
    live = weights(model)
    state = copy.deepcopy(optimizer.state_dict())
    with optimizer.eval_weights():
        for call in (
            optimizer.step,
            optimizer.resample,
            optimizer.resync,
            optimizer.consolidate,
        ):
            with pytest.raises(RuntimeError, match=r"eval_weights\(\)"):
                call()
    assert_equal(live, weights(model))
    assert_equal(state, optimizer.state_dict())


def test_strangers() -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.named_parameters()), exclude="head.*")
    for query in (optimizer.active_mask, optimizer.anchor):
        with pytest.raises(ValueError, match="not one of"):
            query(torch.zeros(8, 6))
    with pytest.raises(ValueError, match="not mixed"):
        optimizer.anchor(model.head.weight)


def test_bad_anchor_decay_set_in_mid_training_stops_before_the_redraw() -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()))
    train(model, optimizer, range(2))
    before = weights(model)
    optimizer.param_groups[0]["anchor_decay"] = 2.0
    with pytest.raises(ValueError, match=r"anchor_decay.*2\.0"):
        optimizer.resample()
    assert_equal(before, weights(model))
    assert optimizer.episode == 0


def fresh_head_model() -> nn.Module:
    model = small_model(torch.float32)
    model.add_module("zeros", nn.Linear(16, 16))
    model.add_module("fresh", nn.Linear(64, 32))
    model.add_module("conv", nn.Conv2d(8, 8, 3))
    nn.init.zeros_(model.zeros.weight)
    return model


def test_fresh_layers_are_warned_about_once_with_their_names() -> None:
    model = fresh_head_model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = GMixoutOptimizer(torch.optim.AdamW(model.named_parameters()))
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
    (warning,) = caught
    message = str(warning.message)
    for name in ("zeros.weight", "fresh.weight", "conv.weight", "exclude"):
        assert name in message
    assert "body.weight" not in message
    assert warning.filename == __file__


def test_excluded_and_trained_layers_are_not_warned_about() -> None:
    model = fresh_head_model()
    with torch.no_grad():
        for name in ("fresh", "conv"):
            weight = getattr(model, name).weight
            weight += 0.02 * torch.randn_like(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GMixoutOptimizer(torch.optim.AdamW(model.named_parameters()), exclude="zeros.*")


def test_a_tensor_with_too_many_cells() -> None:
    param = nn.Parameter(torch.empty(2**16, 2**16, device="meta"))
    with pytest.raises(ValueError, match="coarser granularity"):
        GMixoutOptimizer(torch.optim.SGD([param], lr=0.1))
    GMixoutOptimizer(torch.optim.SGD([param], lr=0.1), granularity="row")


def test_calls_from_within_a_step() -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()), resample_every=2)
    state = copy.deepcopy(optimizer.state_dict())
    calls = [
        optimizer.step,
        optimizer.resample,
        optimizer.resync,
        optimizer.consolidate,
        optimizer.eval,
        optimizer.state_dict,
        lambda: optimizer.load_state_dict(state),
    ]
    seen = []

    def closure() -> torch.Tensor:
        for call in calls:
            with pytest.raises(RuntimeError, match=r"inside step\(\)"):
                call()
        return loss_of(model, 0)

    optimizer.step(closure)
    assert optimizer.steps_in_episode == 1
    optimizer.base.register_step_post_hook(lambda *_: seen.append(len(calls)) or closure())
    train(model, optimizer, range(1))
    assert seen == [7]
    optimizer.register_resample_hook(lambda opt: seen.append(opt.state_dict()))
    optimizer.resample()
    assert len(seen) == 2


def test_an_episode_whose_end_is_refused_ends_later() -> None:
    """Before the base steps, so that nothing has changed."""
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()), resample_every=3)
    train(model, optimizer, range(2))
    before = weights(model)
    optimizer.param_groups[0]["anchor_decay"] = 1.1
    with pytest.raises(ValueError, match=r"anchor_decay must be in \[0, 1\], got 1.1"):
        train(model, optimizer, [2])
    assert_equal(before, weights(model))
    optimizer.param_groups[0]["anchor_decay"] = 1.0
    train(model, optimizer, range(2, 8))
    assert (optimizer.episode, optimizer.steps_in_episode) == (2, 2)


@pytest.mark.parametrize("key", ["mask_prob", "granularity"])
def test_what_is_fixed_in_a_group(key: str) -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()))
    train(model, optimizer, range(2))
    before = weights(model)
    optimizer.param_groups[0][key] = {"mask_prob": 0.2, "granularity": "row"}[key]
    with pytest.raises(ValueError, match=key):
        train(model, optimizer, [2])
    assert_equal(before, weights(model))


@pytest.mark.parametrize("layout", ["packed", "dense"])
def test_going_past_the_wrapper(layout: str) -> None:
    model = small_model()
    base = torch.optim.AdamW(model.parameters())
    bare_state = copy.deepcopy(base.state_dict())
    optimizer = GMixoutOptimizer(base, layout=layout)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="AdamW that is wrapped: call step"):
            base.step()
        with pytest.raises(RuntimeError, match="AdamW that is wrapped: load into"):
            base.load_state_dict(bare_state)
        train(model, optimizer, range(2))
        model, optimizer = copy.deepcopy((model, optimizer))
        base = optimizer.base
    base.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    with pytest.raises(
        RuntimeError, match=r"group 1 was added past the wrapper.*add_param_group\(\)"
    ):
        optimizer.step()


@pytest.mark.parametrize("layout", ["packed", "dense", "persistent"])
@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_a_parameter_that_changes_its_form(layout: str, change: str) -> None:
    model = small_model(torch.float32)
    where = dict(residual="persistent") if layout == "persistent" else dict(layout=layout)
    base = torch.optim.AdamW(model.named_parameters())
    optimizer = GMixoutOptimizer(base, exclude="head.*", **where)
    train(model, optimizer, range(2))
    if change == "dtype":
        model.double()
    else:
        model.body.weight.data = torch.zeros(8, 5)
    model.body.weight.grad = torch.ones_like(model.body.weight)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"body\.weight was torch\.float32 of shape"):
        optimizer.step()
    assert_equal(before, weights(model))


def test_differentiable_steps() -> None:
    params = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match="differentiable=True"):
        GMixoutOptimizer(torch.optim.AdamW(params, differentiable=True))


def test_what_is_no_tensor_or_hook() -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()))
    for query in (optimizer.active_mask, optimizer.anchor):
        with pytest.raises(TypeError, match=r"'body\.weight'"):
            query("body.weight")
    with pytest.raises(TypeError, match="hook must be callable"):
        optimizer.register_resample_hook("x")
    for params in (["x"], {torch.ones(2)}):
        with pytest.raises(TypeError, match=r"Tensors|sets"):
            optimizer.add_param_group({"params": params})
    assert len(optimizer.param_groups) == 1


def test_a_group_refused_can_be_added_again() -> None:
    optimizer = GMixoutOptimizer(torch.optim.AdamW(small_model().parameters()))
    group = {"params": iter([torch.nn.Parameter(torch.ones(3))]), "mask_prob": 2}
    with pytest.raises(ValueError, match="mask_prob"):
        optimizer.add_param_group(group)
    group["mask_prob"] = 0.5
    optimizer.add_param_group(group)
    assert len(optimizer.param_groups[1]["params"]) == 1


def test_a_warning_that_is_an_error_leaves_the_base_free() -> None:
    base = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4, 4))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="freshly initialised"):
            GMixoutOptimizer(base)
    GMixoutOptimizer(base)


@pytest.mark.parametrize("layout", ["packed", "dense"])
@pytest.mark.parametrize("change", ["remove", "replace", "append", "reorder"])
def test_parameters_edited_by_hand_are_refused_by_name(change: str, layout: str) -> None:
    """At the next step, and before a state dict is written that could not be loaded."""
    model = small_model()
    base = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    optimizer = GMixoutOptimizer(base, layout=layout)
    train(model, optimizer, range(3))
    before = weights(model)
    params = optimizer.param_groups[0]["params"]
    if change == "remove":
        del params[2]
    elif change == "replace":
        params[2] = nn.Parameter(torch.zeros_like(params[2]))
    elif change == "append":
        params.append(nn.Parameter(torch.zeros(3)))
    else:
        params.reverse()
    message = "lost head.weight" if change in ("remove", "replace") else "got or moved parameters"
    for call in (optimizer.step, optimizer.resample, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=rf"group 0 {message} by hand.*add_param_group"):
            call()
    assert_equal(before, weights(model))


@pytest.mark.parametrize("layout", ["packed", "dense"])
@pytest.mark.parametrize("change", [dict(lr=0.001), dict(anchor_decay=1.0)], ids=str)
def test_groups_replaced_by_equal_ones_are_bound_again(change: dict, layout: str) -> None:
    """As Lightning's fine-tuning callbacks and Accelerate do; later changes are obeyed."""
    runs = []
    for replaces in (False, True):
        model = small_model()
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        optimizer = GMixoutOptimizer(base, layout=layout, resample_every=4)
        state = optimizer.state_dict()
        for load in (False, True):
            train(model, optimizer, range(6))
            if replaces:
                optimizer.param_groups = [
                    {key: value for key, value in group.items() if key != "gmixout"}
                    for group in optimizer.param_groups
                ]
            if load:
                optimizer.load_state_dict(state)
        optimizer.param_groups[0].update(change)
        train(model, optimizer, range(9))
        optimizer.consolidate()
        runs.append(weights(model))
    assert_equal(*runs)
