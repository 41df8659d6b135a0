"""Invariant 8: save, load and go on, at any step, equals never having stopped, bit for bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gmixout_optim import GMixoutOptimizer
from tests.optimizers import DENSE_GRADIENTS, Case
from tests.training import assert_equal, saved_and_loaded, small_model, train, weights


def run_settings() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        dict(
            mask_prob=st.sampled_from([0.3, 0.9]),
            resample_every=st.sampled_from([1, 3, None]),
            episode_warmup=st.sampled_from(["auto", 2, 0]),
            anchor_decay=st.sampled_from([0.0, 0.7, 1.0]),
            residual=st.sampled_from(["episodic", "persistent"]),
            rescale=st.booleans(),
            granularity=st.sampled_from(["element", "row", "column", 2]),
            sampler=st.sampled_from(["stratified", "bernoulli"]),
            layout=st.sampled_from(["auto", "dense"]),
            seed=st.integers(0, 2**63 - 1),
        )
    )


def fitting(case: Case, settings: dict[str, Any]) -> dict[str, Any]:
    """LBFGS has one rate for all weights, and nothing to warm up."""
    return {**settings, "episode_warmup": "auto"} if case.closure else settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", DENSE_GRADIENTS, ids=repr)
@given(settings=run_settings(), stop=st.integers(0, 7))
def test_invariant_8_resumed_equals_uninterrupted(
    case: Case, dtype: torch.dtype, settings: dict[str, Any], stop: int
) -> None:
    settings = fitting(case, settings)
    model = small_model(dtype, bias=not case.matrices_only)
    resumed_model = copy.deepcopy(model)
    optimizer = GMixoutOptimizer(case(model.named_parameters()), exclude="head.*", **settings)
    train(model, optimizer, range(stop))
    saved = saved_and_loaded(dict(model=model.state_dict(), optimizer=optimizer.state_dict()))
    train(model, optimizer, range(stop, stop + 5))

    # A fresh process with another seed; the optimizer is loaded before the model on purpose.
    other_seed = {**settings, "seed": 1}
    resumed = GMixoutOptimizer(
        case(resumed_model.named_parameters()), exclude="head.*", **other_seed
    )
    resumed.load_state_dict(saved["optimizer"])
    resumed_model.load_state_dict(saved["model"])
    before = copy.deepcopy(saved)
    train(resumed_model, resumed, range(stop, stop + 5))
    assert_equal(weights(model), weights(resumed_model))
    assert_equal(optimizer.state_dict(), resumed.state_dict())
    assert_equal(before, saved)  # going on does not write into what was loaded
    optimizer.consolidate()
    resumed.consolidate()
    assert_equal(weights(model), weights(resumed_model))


def test_state_dict_holds_no_index_sets() -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()))
    train(model, optimizer, range(3))
    tensors = [
        item
        for entry in optimizer.state_dict()["state"].values()
        for item in [*entry.values(), *entry["gmixout"].values()]
        if isinstance(item, torch.Tensor)
    ]
    assert len(tensors) == 4 * 4  # step, two moments and the anchor
    assert all(tensor.is_floating_point() for tensor in tensors)


def test_a_fresh_optimizers_own_state_loads() -> None:
    """Accelerate does this at prepare, through ``type(state)({...})``."""
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()))
    state = optimizer.state_dict()
    optimizer.load_state_dict(type(state)({key: state[key] for key in state}))
    train(model, optimizer, range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_first", [False, True], ids=["optimizer-first", "model-first"])
@pytest.mark.parametrize("case", DENSE_GRADIENTS, ids=repr)
@given(settings=run_settings(), stop=st.integers(0, 5))
def test_invariant_8_saved_in_eval_resumes_exactly(
    case: Case, dtype: torch.dtype, model_first: bool, settings: dict[str, Any], stop: int
) -> None:
    """Model and optimizer, both while the model holds the weights to deploy."""

    def build(seed: int) -> tuple[nn.Module, GMixoutOptimizer]:
        model = small_model(dtype, seed, bias=not case.matrices_only)
        base = case(model.named_parameters())
        return model, GMixoutOptimizer(base, exclude="head.*", **fitting(case, settings))

    model, optimizer = build(seed=0)
    train(model, optimizer, range(stop))
    optimizer.eval()
    saved = saved_and_loaded(dict(model=model.state_dict(), optimizer=optimizer.state_dict()))
    shown = weights(model)
    optimizer.train()

    resumed_model, resumed = build(seed=1)
    for part in ("model", "optimizer") if model_first else ("optimizer", "model"):
        dict(model=resumed_model, optimizer=resumed)[part].load_state_dict(saved[part])
    assert_equal(shown, weights(resumed_model))
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        resumed.step()
    resumed.train()
    assert_equal(weights(model), weights(resumed_model))
    train(model, optimizer, range(stop, stop + 4))
    train(resumed_model, resumed, range(stop, stop + 4))
    assert_equal(weights(model), weights(resumed_model))


def test_hyperparameters_and_schedule_come_from_the_checkpoint() -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters(), lr=1.0))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, range(1))
    scheduler.step()
    resumed = GMixoutOptimizer(torch.optim.AdamW(small_model().parameters(), lr=3.0))
    group = resumed.param_groups[0]
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0] is resumed.base.param_groups[0] is group
    assert group["lr"] == 0.5
    assert group["initial_lr"] == 1.0
    assert (resumed.episode, resumed.steps_in_episode) == (0, 1)


def test_an_anchor_decay_on_a_schedule_comes_from_the_checkpoint() -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()))
    optimizer.param_groups[0]["anchor_decay"] = 0.5
    resumed = GMixoutOptimizer(torch.optim.AdamW(small_model().parameters()))
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["anchor_decay"] == 0.5


def test_loading_ends_eval() -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()), resample_every=3)
    train(model, optimizer, range(2))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, range(2, 5))
    expected = weights(model)
    optimizer.eval()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, range(2, 5))
    assert_equal(expected, weights(model))


def test_low_precision_keeps_anchors_and_values_exactly() -> None:
    model = small_model(torch.bfloat16)
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
    train(model, optimizer, range(3))
    resumed = GMixoutOptimizer(torch.optim.AdamW(small_model(torch.bfloat16).parameters()))
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    entry = resumed.state_dict()["state"][0]
    assert entry["gmixout"]["value"].dtype == entry["exp_avg"].dtype == torch.float32
    assert_equal(entry, optimizer.state_dict()["state"][0])


@pytest.mark.parametrize("channels_last_first", [False, True])
def test_invariant_8_resume_in_another_memory_format(channels_last_first: bool) -> None:
    """Packed vectors are in row-major order whatever the strides."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3).double()
    formats = [torch.contiguous_format, torch.channels_last]
    if channels_last_first:
        formats.reverse()

    def steps(of: nn.Module, optimizer: torch.optim.Optimizer, which: range) -> None:
        for step in which:
            generator = torch.Generator().manual_seed(step)
            of.weight.grad = torch.empty_like(of.weight).copy_(
                torch.randn(of.weight.shape, generator=generator, dtype=torch.float64)
            )
            optimizer.step()

    first = copy.deepcopy(model).to(memory_format=formats[0])
    second = copy.deepcopy(model).to(memory_format=formats[1])
    settings = dict(resample_every=3, mask_prob=0.5)
    optimizer = GMixoutOptimizer(torch.optim.AdamW([first.weight], lr=0.1), **settings)
    resumed = GMixoutOptimizer(torch.optim.AdamW([second.weight], lr=0.1), **settings)
    steps(first, optimizer, range(4))
    resumed.load_state_dict(optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    steps(first, optimizer, range(4, 9))
    steps(second, resumed, range(4, 9))
    assert second.weight.is_contiguous(memory_format=formats[1])
    assert_equal(weights(first)[0].contiguous(), weights(second)[0].contiguous())


def _drop(state: dict, number: int, key: str) -> None:
    del state["state"][number]["gmixout"][key]


DAMAGE = {
    "not a dict": (lambda state: [1], "dict"),
    "no groups": (lambda state: state.pop("param_groups"), "param_groups"),
    "a group too many": (
        lambda state: state["param_groups"].append(state["param_groups"][0]),
        "parameter groups",
    ),
    "a parameter fewer": (lambda state: state["param_groups"][0]["params"].pop(), "parameters"),
    "no run": (lambda state: state["param_groups"][0].pop("gmixout"), "bare optimizer"),
    "version": (lambda state: state["param_groups"][0]["gmixout"].update(version=99), "version"),
    "episode": (lambda state: state["param_groups"][0]["gmixout"].update(episode=-1), "episode"),
    "seed": (lambda state: state["param_groups"][0]["gmixout"].update(seed="0"), "seed"),
    "unknown parameter": (lambda state: state["state"].update({77: {}}), "77"),
    "anchor gone": (lambda state: _drop(state, 0, "anchor"), "anchor"),
    "anchor missing": (lambda state: _drop(state, 1, "anchor"), "anchor"),
    "anchor of another shape": (
        lambda state: state["state"][0]["gmixout"].update(anchor=torch.zeros(3)),
        "body.weight",
    ),
    "anchor of another dtype": (
        lambda state: state["state"][0]["gmixout"].update(
            anchor=state["state"][0]["gmixout"]["anchor"].half()
        ),
        "float16",
    ),
    "state of another shape": (
        lambda state: state["state"][0].update(exp_avg=torch.zeros(2)),
        "exp_avg",
    ),
    "step missing": (lambda state: state["state"][0].pop("step"), "damaged"),
    "step missing everywhere": (
        lambda state: [entry.pop("step") for entry in state["state"].values()],
        "AdamW keeps",
    ),
    "moment missing": (lambda state: state["state"][1].pop("exp_avg"), "exp_avg"),
    "moment of another kind": (lambda state: state["state"][1].update(exp_avg="x"), "exp_avg"),
    "rate of another kind": (lambda state: state["param_groups"][0].update(lr="1"), "lr='1'"),
    "decay out of range": (
        lambda state: state["param_groups"][0].update(anchor_decay=2.0),
        "anchor_decay",
    ),
    "entry of another kind": (lambda state: state["state"][0].update(gmixout=3), "no dict"),
    "more steps than an episode has": (
        lambda state: state["param_groups"][0]["gmixout"].update(steps_in_episode=3),
        "steps_in_episode=3",
    ),
    "seed too large": (
        lambda state: state["param_groups"][0]["gmixout"].update(seed=2**70),
        "seed",
    ),
    "numbers as strings": (
        lambda state: state.update(state={str(k): v for k, v in state["state"].items()}),
        "'0'",
    ),
    "no state": (lambda state: state.update(state={}), "of 0 tensors"),
    "a tensor's state gone": (lambda state: state["state"].pop(1), "of 1 tensors"),
    "other names": (
        lambda state: state["param_groups"][0]["param_names"].reverse(),
        "'head.bias' where this optimizer has 'body.weight'",
    ),
    "unmixed entry": (lambda state: state["state"][0].pop("gmixout"), "not in the run"),
    "mixed entry": (
        lambda state: state["state"][2].update(gmixout=state["state"][0]["gmixout"]),
        "head.weight",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_dict_changes_nothing(name: str) -> None:
    damage, message = DAMAGE[name]
    model = small_model()
    optimizer = GMixoutOptimizer(
        torch.optim.AdamW(model.named_parameters()), exclude="head.*", resample_every=3
    )
    train(model, optimizer, range(4))
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"] = [dict(group) for group in state["param_groups"]]
    changed = damage(state)
    if name == "not a dict":
        state = changed
    before = copy.deepcopy(optimizer.state_dict())
    train_further = copy.deepcopy((model, optimizer))
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_equal(before, optimizer.state_dict())
    train(model, optimizer, range(4, 9))
    train(*train_further, range(4, 9))
    assert_equal(weights(model), weights(train_further[0]))


@pytest.mark.parametrize(
    "other",
    [
        dict(mask_prob=0.5),
        dict(granularity="row"),
        dict(residual="persistent"),
        dict(rescale=True),
        dict(sampler="bernoulli"),
        dict(layout="dense"),
        dict(resample_every=7),
        dict(episode_warmup=7),
    ],
    ids=str,
)
def test_a_state_dict_of_other_settings_is_refused(other: dict[str, Any]) -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()))
    theirs = GMixoutOptimizer(torch.optim.AdamW(small_model().parameters()), **other)
    with pytest.raises(ValueError, match=next(iter(other))):
        optimizer.load_state_dict(theirs.state_dict())


def test_state_dicts_of_other_optimizers_and_models_are_refused() -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="bare optimizer"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    sgd = GMixoutOptimizer(torch.optim.SGD(small_model().parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"base='SGD'.*'AdamW'"):
        optimizer.load_state_dict(sgd.state_dict())
    wide = nn.Linear(60, 80)
    wide_optimizer = GMixoutOptimizer(
        torch.optim.AdamW([*wide.parameters(), *wide.parameters()][:2])
    )
    wide(torch.ones(60)).sum().backward()
    wide_optimizer.step()
    narrow = nn.Linear(6, 8)
    with pytest.raises(ValueError, match="shape"):
        GMixoutOptimizer(torch.optim.AdamW(narrow.parameters())).load_state_dict(
            wide_optimizer.state_dict()
        )


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("case", [c for c in DENSE_GRADIENTS if not c.closure], ids=repr)
def test_copies_of_model_and_optimizer_stay_tied(case: Case, how: str) -> None:
    model = small_model(bias=not case.matrices_only)
    optimizer = GMixoutOptimizer(case(model.named_parameters()), exclude="head.*", resample_every=3)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # patches step on the instance
    train(model, optimizer, range(4))
    if how == "deepcopy":
        copied_model, copied = copy.deepcopy((model, optimizer))
    else:
        copied_model, copied = pickle.loads(pickle.dumps((model, optimizer)))
    assert copied.param_groups[0]["params"][0] is next(copied_model.parameters())
    train(model, optimizer, range(4, 9))
    train(copied_model, copied, range(4, 9))
    assert_equal(weights(model), weights(copied_model))
    assert_equal(optimizer.state_dict(), copied.state_dict())


def test_state_dict_hooks() -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()))
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda opt, state: {key: state[key] for key in ("state", "param_groups")}
    )
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    state = optimizer.state_dict()
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert seen == ["pre", "loaded"]


def test_invariant_8_round_trip_through_distributed_checkpoint_state_dicts() -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    for flatten in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        model, resumed_model = small_model(), small_model()
        optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()), resample_every=3)
        train(model, optimizer, range(4))
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        resumed = GMixoutOptimizer(torch.optim.AdamW(resumed_model.parameters()), resample_every=3)
        resumed_model.load_state_dict(model.state_dict())
        set_optimizer_state_dict(resumed_model, resumed, saved, options=options)
        train(model, optimizer, range(4, 9))
        train(resumed_model, resumed, range(4, 9))
        assert_equal(weights(model), weights(resumed_model))


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module.", ""]
)
def test_what_wrappers_of_a_module_add_to_names_does_not_matter(prefix: str) -> None:
    """In patterns and in state dicts: trained as a compiled model, resumed as a plain one."""

    def wrapped(model: nn.Module, prefix: str) -> GMixoutOptimizer:
        named = [(prefix + name, param) for name, param in model.named_parameters()]
        base = torch.optim.AdamW(named, lr=0.01)
        return GMixoutOptimizer(base, exclude="head.*", resample_every=4)

    model, resumed_model = small_model(), small_model()
    optimizer, resumed = wrapped(model, prefix), wrapped(resumed_model, "")
    assert [row.mixed for row in optimizer.report().tensors] == [True, True, False, False]
    train(model, optimizer, range(6))
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(model, optimizer, range(6, 12))
    train(resumed_model, resumed, range(6, 12))
    assert_equal(weights(model), weights(resumed_model))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
def test_state_of_a_narrow_tensor_that_is_active_as_a_whole_is_widened(kind) -> None:
    """A base that has stepped keeps it in the parameter's dtype; packed, it is float32."""
    params = [nn.Parameter(torch.ones(1, dtype=torch.bfloat16)) for _ in range(2)]
    base = kind(params, lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    base.step()
    optimizer = GMixoutOptimizer(base, mask_prob=0.2)
    optimizer.step()
    for param in params:
        moments = [item for item in base.state[param].values() if item.ndim > 0]
        assert moments
        assert all(item.dtype == torch.float32 for item in moments)
