"""Whatever is called in whatever order: copies go on as the original does, packed as dense."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gmixout_optim import GMixoutOptimizer, mixing
from tests.training import assert_equal, saved_and_loaded, small_model, train, weights

pytestmark = pytest.mark.filterwarnings("ignore:weights of")

Pair = tuple[nn.Module, GMixoutOptimizer]
CALLS = ["eval", "train", "consolidate", "resample", "resync"]
CHANGES = ["write", "clamp", "freeze", "memory", "raise"]
actions = st.lists(
    st.tuples(
        st.one_of(st.just("step"), st.sampled_from(CALLS), st.sampled_from(CHANGES)),
        st.integers(0, 3),
    ),
    min_size=3,
    max_size=14,
)
KINDS: dict[str, dict[str, Any]] = {
    "packed": dict(layout="packed"),
    "dense": dict(layout="dense"),
    "rescale": dict(rescale=True),
    "persistent": dict(residual="persistent"),
    "mixout": dict(residual="persistent", rescale=True),
    "bernoulli": dict(sampler="bernoulli"),
}
COPIES: dict[str, Callable[[Pair], Pair]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


def build(dtype: torch.dtype = torch.float32, **settings: Any) -> Pair:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)).to(dtype)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, GMixoutOptimizer(base, mask_prob=0.6, resample_every=3, **settings)


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        noise = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = noise if param.requires_grad else None


def act(pair: Pair, action: str, which: int, seed: int) -> str:
    """Do it; returns what a RuntimeError said."""
    model, optimizer = pair
    params = list(model.parameters())
    try:
        if action == "step":
            fill_gradients(model, seed)
            optimizer.step()
        elif action == "write":
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(params[which].shape, generator=generator)
            params[which].detach().copy_(noise)
        elif action == "clamp":
            for param in params:
                param.detach().clamp_(-0.3, 0.3)
        elif action == "freeze":
            params[which].requires_grad_(not params[which].requires_grad)
        elif action == "memory":
            formats = [torch.contiguous_format, torch.channels_last]
            model.to(memory_format=formats[which % 2])
        elif action == "raise":
            fill_gradients(model, seed)
            handle = optimizer.base.register_step_pre_hook(lambda *_: 1 / 0)
            try:
                optimizer.step()
            finally:
                handle.remove()
        else:
            getattr(optimizer, action)()
    except ZeroDivisionError:
        return ""
    except RuntimeError as error:
        return str(error)[:40]
    return ""


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
@given(sequence=actions, dtype=st.sampled_from([torch.float32, torch.bfloat16]), data=st.data())
def test_a_copy_goes_on_as_the_original(
    kind: str, how: str, sequence: list[Any], dtype: torch.dtype, data: st.DataObject
) -> None:
    """Bit for bit, also where somebody has written and no step has seen it yet."""
    original, copied = build(dtype, **KINDS[kind]), build(dtype, **KINDS[kind])
    for seed, (action, which) in enumerate(sequence):
        said = [act(pair, action, which, seed) for pair in (original, copied)]
        assert said[0] == said[1]
        if data.draw(st.booleans()):
            copied = COPIES[how](copied)
        assert_equal(weights(original[0]), weights(copied[0]))


@pytest.mark.parametrize("rescale", [False, True])
@given(sequence=actions, sampler=st.sampled_from(["stratified", "bernoulli"]))
def test_packed_and_dense_do_the_same(rescale: bool, sequence: list[Any], sampler: str) -> None:
    pairs = [build(layout=name, rescale=rescale, sampler=sampler) for name in ("packed", "dense")]
    for seed, (action, which) in enumerate(sequence):
        said = [act(pair, action, which, seed) for pair in pairs]
        assert said[0] == said[1]
        torch.testing.assert_close(
            weights(pairs[0][0]), weights(pairs[1][0]), rtol=1e-4, atol=1e-5, check_stride=False
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_says_what_was_written(kind: str) -> None:
    """Loaded in eval, saved, and gone on from: the loaded weights are kept as in the first run."""
    pair = build(**KINDS[kind])
    act(pair, "step", 0, 0)
    for in_eval in (True, False):
        model, optimizer = copy.deepcopy(pair)
        if in_eval:
            optimizer.eval()
        with torch.no_grad():
            model[0].weight.fill_(7.0)
        saved = saved_and_loaded((model.state_dict(), optimizer.state_dict()))
        resumed_model, resumed = build(**KINDS[kind])
        resumed.load_state_dict(saved[1])
        resumed_model.load_state_dict(saved[0])
        optimizer.consolidate()
        resumed.consolidate()
        assert (model[0].weight == 7).all()
        assert_equal(weights(model), weights(resumed_model))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_share_a_version_counter(kind: str) -> None:
    """Chunks of one tensor, as of a weight for queries, keys and values, are trained as clones."""
    runs = []
    for clone in (False, True):
        whole = torch.randn(192, generator=torch.Generator().manual_seed(3))
        chunks = [chunk.view(8, 8) for chunk in whole.chunk(3)]
        params = [nn.Parameter(chunk.clone() if clone else chunk) for chunk in chunks]
        base = torch.optim.SGD(params, lr=0.1)
        optimizer = GMixoutOptimizer(base, mask_prob=0.5, resample_every=3, **KINDS[kind])
        shown: list[list[Tensor]] = []
        for step in range(5):
            for number, param in enumerate(params):
                absent = number == step  # whose version moves with the others' all the same
                param.grad = None if absent else torch.full_like(param, 1.0 + number - step)
            optimizer.step()
            with optimizer.eval_weights():
                shown.append([param.detach().clone() for param in params])
        optimizer.consolidate()
        runs.append([*shown, [param.detach().clone() for param in params]])
    assert_equal(*runs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["train", "eval"])
def test_a_failed_write_loses_nothing(
    call: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may run out in the middle; the next call does what the first was to do."""
    model, optimizer = build(**KINDS[kind])
    act((model, optimizer), "step", 0, 0)
    live = weights(model)
    optimizer.eval()
    shown = weights(model)
    if call == "eval":
        optimizer.train()
    scatter, failures = mixing.scatter_, [3]

    def failing(*arguments: Any) -> None:
        failures[0] -= 1
        if failures[0] == 0:
            raise torch.OutOfMemoryError("no memory")
        scatter(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mixing, "scatter_", failing)
        try:
            getattr(optimizer, call)()
        except torch.OutOfMemoryError:
            assert call == "train" or all(map(torch.equal, weights(model), live))
    getattr(optimizer, call)()
    assert_equal(weights(model), live if call == "train" else shown)
    optimizer.train()
    assert_equal(weights(model), live)


def test_a_copy_made_inside_eval_weights_trains_on() -> None:
    model, optimizer = build()
    act((model, optimizer), "step", 0, 0)
    with optimizer.eval_weights():
        other = copy.deepcopy((model, optimizer))
    other[1].train()
    for pair in ((model, optimizer), other):
        assert act(pair, "step", 0, 1) == ""
    assert_equal(weights(model), weights(other[0]))


def test_a_base_without_a_learning_rate() -> None:
    class Constant(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for param in group["params"]:
                    param.detach().sub_(param.grad, alpha=0.1)

    model = small_model()
    optimizer = GMixoutOptimizer(Constant(model.parameters(), {}), mask_prob=0.5)
    train(model, optimizer, range(3))
    assert optimizer.steps_in_episode == 3


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_first_step_at_rate_zero_counts_where_it_has_gradients(with_closure: bool) -> None:
    """As a warm-up begins; only a step that creates state alone does not."""
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters(), lr=0.0))

    def closure() -> Tensor:
        loss = model(torch.ones(1, 6).double()).sum()
        loss.backward()
        return loss

    if with_closure:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    assert optimizer.steps_in_episode == 1


def test_a_tensor_rate_that_the_base_changes_in_place_goes_on() -> None:
    class Halving(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for group in self.param_groups:
                group["lr"].mul_(0.5)
            return loss

    model, rate = small_model(), torch.tensor(0.1)
    base = Halving([model.body.weight], lr=rate)
    optimizer = GMixoutOptimizer(base, mask_prob=0.5)
    train(model, optimizer, range(2))
    assert optimizer.param_groups[0]["lr"] is rate
    torch.testing.assert_close(rate, torch.tensor(0.025))


def test_weights_set_after_wrapping_a_base_that_has_stepped_are_its_anchor() -> None:
    """Nothing is read from the model before a tensor is trained, nor kept of it."""
    model = small_model()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, base, range(2))
    optimizer = GMixoutOptimizer(base, mask_prob=0.5)
    with torch.no_grad():
        model.body.weight.fill_(7.0)
    assert (optimizer.anchor(model.body.weight) == 7).all()
    resumed_model = small_model()
    resumed_base = torch.optim.AdamW(resumed_model.parameters(), lr=0.01)
    resumed = GMixoutOptimizer(resumed_base, mask_prob=0.5)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    resumed_model.load_state_dict(model.state_dict())
    train(model, optimizer, range(2, 4))
    train(resumed_model, resumed, range(2, 4))
    optimizer.consolidate()
    resumed.consolidate()
    assert_equal(weights(model), weights(resumed_model))


def test_groups_are_checked_wherever_they_are_read() -> None:
    model = small_model()
    optimizer = GMixoutOptimizer(torch.optim.AdamW(model.parameters()), anchor_decay=1.0)
    train(model, optimizer, range(2))
    before = weights(model)
    optimizer.param_groups[0]["anchor_decay"] = 5.0
    for call in (optimizer.eval, optimizer.consolidate, optimizer.resync, optimizer.resample):
        with pytest.raises(ValueError, match=r"anchor_decay must be in \[0, 1\], got 5"):
            call()
    assert_equal(before, weights(model))
    added = {"params": [nn.Parameter(torch.zeros(3))]}
    refused = []

    def add(*_: Any) -> None:
        with pytest.raises(RuntimeError, match=r"add_param_group\(\) inside step\(\)"):
            optimizer.add_param_group(added)
        refused.append(True)

    optimizer.param_groups[0]["anchor_decay"] = 1.0
    optimizer.base.register_step_pre_hook(add)
    train(model, optimizer, range(2))
    assert refused == [True] * 2
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", ["", "eval"])
@pytest.mark.parametrize("after", ["memory", "raise"])
def test_what_was_loaded_is_known_past_moves_and_failed_steps(
    after: str, before: str, kind: str
) -> None:
    """In channels_last the parameter has other strides; a failed step leaves what it met."""
    pair = model, optimizer = build(**KINDS[kind])
    act(pair, "step", 0, 0)
    if after == "raise":
        act(pair, "raise", 0, 1)
    if before:
        act(pair, before, 0, 0)
    with torch.no_grad():
        model[0].weight.fill_(7.0)
    if after == "memory":
        act(pair, "memory", 1, 0)
    optimizer.consolidate()
    assert (model[0].weight == 7).all()


def test_a_redraw_makes_a_state_fresh_that_was_not_packed_yet() -> None:
    """Of a base that had stepped before it was wrapped, on tensors without a gradient since."""
    runs = []
    for had_stepped in (True, False):
        model = small_model()
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        if had_stepped:
            train(model, base, range(2))
            model.load_state_dict(small_model().state_dict())
        optimizer = GMixoutOptimizer(base, mask_prob=0.5)
        optimizer.resample()
        train(model, optimizer, range(3))
        runs.append(weights(model))
    assert_equal(*runs)
