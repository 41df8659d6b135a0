"""Invariants of the method, each as a property of random training runs of any optimizer.

Their numbers are those of the method's list, and the names of their tests begin with them:
``pytest -k invariant_7_``. 1 to 4, 9 and 12 are here, the others with what they are about:

- 5, with p = 0 the bare optimizer: ``test_bare.py``
- 6, packed equals dense: ``test_parity.py``
- 7, the index sets: ``test_index_sets_values.py`` and ``test_index_sets_frequencies.py``
- 8, save, load and go on: ``test_checkpoint.py``
- 10, the same sets on every device and shard: ``test_index_sets_shards.py``; in every world size:
  ``test_distributed.py``
- 11, the mean over masks: ``test_mixout.py``

8 and 9 with compiled steps are in ``test_compile.py``; 1, 4, 8 and 9 in low precision in
``test_rounding.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.testing import InvariantMonitor
from gmixout_optim.testing.trainings import looks
from tests.optimizers import DENSE_GRADIENTS, ELEMENTWISE, Case
from tests.scenarios import Scenario, Trial, bits, copies, same_bits, scenarios

MIXED = (0.5, 0.1, 0.75, 0.9)
EVERY_CASE = st.sampled_from(DENSE_GRADIENTS)
PATHOLOGICAL = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e38, -0.0])


# Each property is of all optimizers at once.
MORE_EXAMPLES = settings(max_examples=3 * settings().max_examples)


@st.composite
def runs(draw: st.DrawFn, poisoned: bool = False, **kinds: Any) -> Scenario:
    """Scenarios of any optimizer; ``poisoned`` puts extreme values into the gradients of a step."""
    scenario = draw(scenarios(draw(EVERY_CASE), **kinds))
    if poisoned:
        poison = draw(st.none() | st.tuples(st.integers(0, scenario.steps - 1), PATHOLOGICAL))
        scenario = replace(scenario, poison=poison)
    return scenario


def where(tensors: list[Tensor], masks: list[Tensor], active: bool) -> list[Tensor]:
    """The values on S, or off it."""
    return [tensor[mask == active] for tensor, mask in zip(tensors, masks, strict=True)]


def mixed_masks(trial: Trial) -> list[Tensor]:
    return [trial.optimizer.active_mask(param) for param in trial.mixed]


# Invariants 1 to 4: what moves, and when


def watched(trial: Trial, invariant: int) -> Iterator[int]:
    """A run under a monitor that checks one invariant after every step."""
    with InvariantMonitor._of_one(trial.optimizer, invariant):
        yield from trial.run()


@MORE_EXAMPLES
@given(runs(poisoned=True))
def test_invariant_1_off_s_the_live_weights_are_the_anchor(scenario: Scenario) -> None:
    """Bit for bit after every step, whatever the gradients; on S too when an episode begins."""
    trial = Trial(scenario)
    for _ in watched(trial, 1):
        if trial.optimizer.steps_in_episode == 0 and scenario.settings["residual"] == "episodic":
            assert same_bits(trial.mixed, trial.anchors())


@MORE_EXAMPLES
@given(runs(poisoned=True))
def test_invariant_2_within_an_episode_neither_anchor_nor_set_changes(scenario: Scenario) -> None:
    for _ in watched(Trial(scenario), 2):
        pass


@MORE_EXAMPLES
@given(runs(poisoned=True))
def test_invariant_3_the_anchor_moves_on_s_at_an_episodes_end(scenario: Scenario) -> None:
    """By the EMA formula, each new value between the old anchor and the live weight."""
    trial = Trial(scenario)
    for step in watched(trial, 3):
        if step % 3 == 0:
            trial.optimizer.resample()


@MORE_EXAMPLES
@given(runs(poisoned=True))
def test_invariant_4_with_decay_1_the_anchor_is_the_pretrained_tensor_forever(
    scenario: Scenario,
) -> None:
    trial = Trial(scenario.without_groups("anchor_decay").with_settings(anchor_decay=1.0))
    pretrained = copies(trial.mixed)
    for _ in trial.run():
        assert same_bits(trial.anchors(), pretrained)
    trial.optimizer.consolidate()
    assert same_bits(trial.anchors(), pretrained)


@MORE_EXAMPLES
@given(runs(residuals=("episodic",)))
def test_invariant_4_with_decay_0_an_episodes_end_moves_no_weight(scenario: Scenario) -> None:
    scenario = scenario.without_groups("anchor_decay").with_settings(
        anchor_decay=0.0, rescale=False, episode_warmup=0
    )
    manual = Trial(scenario.with_settings(resample_every=None))
    for step in manual.run():
        live = manual.live()
        if step % 2 == 0:
            manual.optimizer.resample()
            assert same_bits(manual.live(), live)
    manual.optimizer.consolidate()
    assert same_bits(manual.live(), live)

    period = scenario.steps
    ending = Trial(scenario.with_settings(resample_every=period))
    endless = Trial(scenario.with_settings(resample_every=None))
    for _ in zip(ending.run(), endless.run(), strict=True):
        assert same_bits(ending.live(), endless.live())
    assert (ending.optimizer.episode, endless.optimizer.episode) == (1, 0)


# Tensors of shape (6, 8), (12,), (7,) and () under each granularity: (cells, width).
GRIDS: dict[str | int, list[tuple[int, int]]] = {
    "element": [(48, 1), (12, 1), (7, 1), (1, 1)],
    "row": [(6, 8), (12, 1), (7, 1), (1, 1)],
    "column": [(48, 1), (12, 1), (7, 1), (1, 1)],
    1: [(48, 1), (12, 1), (7, 1), (1, 1)],
    3: [(16, 3), (4, 3), (7, 1), (1, 1)],
    4: [(12, 4), (3, 4), (7, 1), (1, 1)],
    5: [(48, 1), (12, 1), (7, 1), (1, 1)],
}


@pytest.mark.parametrize("granularity", GRIDS)
@pytest.mark.parametrize("p", [0.25, 0.9])
@pytest.mark.parametrize("by_group", [True, False])
def test_masks_are_whole_cells_of_the_granularity_and_density_asked_for(
    by_group: bool, p: float, granularity: Any
) -> None:
    """By the group's own keys where it has them.

    All is active in a group with mask_prob 0, and in one excluded.
    """
    tensors = [nn.Parameter(torch.randn(shape)) for shape in [(6, 8), (12,), (7,), ()]]
    named = [(f"body.{i}", tensor) for i, tensor in enumerate(tensors)]
    unmixed, head = nn.Parameter(torch.randn(30)), nn.Parameter(torch.randn(30))
    asked = dict(mask_prob=p, granularity=granularity)
    other = dict(mask_prob=0.5, granularity="row" if granularity == "element" else "element")
    base = torch.optim.SGD(
        [
            dict(params=named, **(asked if by_group else {})),
            dict(params=[("plain", unmixed)], mask_prob=0.0),
            dict(params=[("head", head)]),
        ],
        lr=0.1,
    )
    optimizer = GMixoutOptimizer(base, exclude="head", **(other if by_group else asked))
    for _ in range(3):
        for tensor, (cells, width) in zip(tensors, GRIDS[granularity], strict=True):
            mask = optimizer.active_mask(tensor).reshape(cells, width)
            assert (mask.all(1) == mask.any(1)).all()
            assert int(mask[:, 0].sum()) == max(1, round((1 - p) * cells))
        assert optimizer.active_mask(unmixed).all()
        assert optimizer.active_mask(head).all()
        optimizer.resample()


# Invariant 9: eval_weights and consolidate


def advance(trial: Trial, steps: int) -> Trial:
    for _ in range(steps):
        trial.step()
    return trial


@MORE_EXAMPLES
@given(st.data())
def test_invariant_9_eval_weights_shows_what_consolidate_would_leave(data: st.DataObject) -> None:
    """And puts the live weights back bit for bit."""
    scenario = data.draw(runs())
    steps = data.draw(st.integers(0, scenario.steps))
    shown, consolidated = (advance(Trial(scenario), steps) for _ in range(2))
    live = shown.live()
    consolidated.optimizer.consolidate()
    with shown.optimizer.eval_weights():
        assert same_bits(shown.params, consolidated.params)
    assert same_bits(shown.params, live)


@MORE_EXAMPLES
@given(st.data())
def test_invariant_9_eval_weights_leaves_no_trace(data: st.DataObject) -> None:
    """A run with validation in every step takes the same steps as one without."""
    scenario = data.draw(runs())
    plain, validated = Trial(scenario), Trial(scenario)
    for _ in zip(plain.run(), validated.run(), strict=True):
        with validated.optimizer.eval_weights():
            pass
        assert same_bits(plain.live(), validated.live())
    assert plain.optimizer.episode == validated.optimizer.episode
    assert plain.optimizer.steps_in_episode == validated.optimizer.steps_in_episode


@MORE_EXAMPLES
@given(st.data())
def test_invariant_9_also_when_the_body_raises_or_nests(data: st.DataObject) -> None:
    scenario = data.draw(runs(mask_probs=MIXED))
    trial = advance(Trial(scenario), scenario.steps)
    optimizer, live = trial.optimizer, trial.live()
    with pytest.raises(KeyError, match="body"), optimizer.eval_weights():
        raise KeyError("body")
    assert same_bits(trial.params, live)

    with optimizer.eval_weights():
        outer = trial.live()
        with optimizer.eval_weights():
            assert same_bits(trial.params, outer)
        assert same_bits(trial.params, outer)
        with pytest.raises(KeyError, match="inner"), optimizer.eval_weights():
            raise KeyError("inner")
        assert same_bits(trial.params, outer)
        with pytest.raises(RuntimeError, match="inside"):
            optimizer.step()  # the outer block is still open
    assert same_bits(trial.params, live)


@MORE_EXAMPLES
@given(st.data())
def test_invariant_9_consolidate_twice_equals_once(data: st.DataObject) -> None:
    scenario = data.draw(runs())
    trial = advance(Trial(scenario), data.draw(st.integers(0, scenario.steps)))
    trial.optimizer.consolidate()
    once, anchors, episode = trial.live(), trial.anchors(), trial.optimizer.episode
    trial.optimizer.consolidate()
    assert trial.optimizer.episode == episode
    assert same_bits(trial.live(), once)
    assert same_bits(trial.anchors(), anchors)
    with trial.optimizer.eval_weights():
        assert same_bits(trial.params, once)
    assert same_bits(trial.params, once)


@pytest.mark.parametrize("name", ["packed", "dense", "persistent"])
def test_live_weights_come_back_where_the_parameter_has_moved(name: str) -> None:
    """The memory format may change while the weights to deploy are shown, for an export say."""
    where = dict(residual="persistent") if name == "persistent" else dict(layout=name)
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 8))
    optimizer = GMixoutOptimizer(torch.optim.SGD([weight], lr=0.1), mask_prob=0.5, **where)
    for _ in range(3):
        weight.grad = torch.randn(6, 8)
        optimizer.step()
    live = weight.detach().clone()
    with optimizer.eval_weights():
        weight.data = weight.detach().t().contiguous().t()
    assert torch.equal(weight, live)


@given(data=st.data())
def test_eval_and_train_are_the_two_ends_of_eval_weights(data: st.DataObject) -> None:
    """Each changes nothing when it is called again, and a block in between changes nothing."""
    scenario = data.draw(runs())
    trial = advance(Trial(scenario), scenario.steps)
    optimizer, live = trial.optimizer, trial.live()
    with optimizer.eval_weights():
        shown = trial.live()
    optimizer.train()
    assert same_bits(trial.params, live)
    for _ in range(2):
        optimizer.eval()
        assert same_bits(trial.params, shown)
    with optimizer.eval_weights():
        assert same_bits(trial.params, shown)
    assert same_bits(trial.params, shown)
    for _ in range(2):
        optimizer.train()
        assert same_bits(trial.params, live)


REFUSED_INSIDE = ["step", "resample", "resync", "consolidate"]


@pytest.mark.parametrize("call", REFUSED_INSIDE)
@given(data=st.data())
def test_what_would_train_on_the_shown_weights_is_refused(call: str, data: st.DataObject) -> None:
    """Inside eval_weights, with weights, counters and the rest of the run intact."""
    scenario = data.draw(runs())
    trial, undisturbed = (advance(Trial(scenario), scenario.steps - 1) for _ in range(2))
    live = trial.live()
    with trial.optimizer.eval_weights():
        shown = trial.live()
        with pytest.raises(RuntimeError, match=r"inside eval_weights\(\)"):
            getattr(trial.optimizer, call)()
        assert same_bits(trial.params, shown)
    assert same_bits(trial.params, live)
    trial.step()
    undisturbed.step()
    assert same_bits(trial.params, undisturbed.params)


# Invariant 12: the model


class Net(nn.Module):
    """All that a model has: filters in another memory format, norms with buffers, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.body.weight
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.stem(images)).relu().mean((2, 3))
        return self.tied(self.body(features).tanh()) * self.scale


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("granularity", ["element", "row", "column", 3])
@pytest.mark.parametrize("layout", ["packed", "dense", "persistent"])
def test_invariant_12_the_model_is_not_touched(
    layout: str, granularity: str | int, rescale: bool
) -> None:
    """The same Parameters, storage, modules and state_dict.

    Nor are gradients touched, or weights that are not in training.
    """
    torch.manual_seed(0)
    model = Net()
    before = looks(model)
    kind = {"residual": "persistent"} if layout == "persistent" else {"layout": layout}
    optimizer = GMixoutOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.01),
        mask_prob=0.5,
        resample_every=2,
        granularity=granularity,
        rescale=rescale,
        **kind,
    )
    frozen = model.frozen.clone()
    for step in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        gradients = [param.grad for param in model.parameters()]
        kept = [None if grad is None else grad.clone() for grad in gradients]
        optimizer.step()
        for param, grad, values in zip(model.parameters(), gradients, kept, strict=True):
            assert param.grad is grad
            assert (grad is None) == (values is None)
            assert grad is None or torch.equal(grad, values)
        with optimizer.eval_weights():
            assert looks(model) == before, f"inside eval_weights after step {step}"
        assert looks(model) == before, f"after step {step}"
    optimizer.resample()
    optimizer.resync()
    optimizer.consolidate()
    assert looks(model) == before
    assert torch.equal(model.frozen, frozen)


# Calls


@pytest.mark.parametrize("case", ELEMENTWISE, ids=repr)
@given(data=st.data())
def test_random_masking_trains_one_fixed_set(case: Case, data: st.DataObject) -> None:
    """Off S the pretrained weights stay forever; on S the base trains as ever.

    That is what is deployed.
    """
    scenario = data.draw(scenarios(case, residuals=("episodic",), mask_probs=MIXED))
    scenario = scenario.without_groups("anchor_decay")
    trial = Trial(scenario)
    same = ("exclude", "granularity", "sampler", "layout", "seed")
    trial.optimizer.consolidate()
    trial.optimizer = GMixoutOptimizer.random_masking(
        trial.make_base(trial.params),
        scenario.settings["mask_prob"],
        **{key: scenario.settings[key] for key in same},
    )
    masks = trial.masks()
    plain = Trial(scenario)
    base = plain.make_base(plain.params)
    for _ in trial.run():
        plain.begin_step(base)
        plain.fill_gradients()
        for param, mask in zip(plain.params, masks, strict=True):
            if param.grad is not None:
                param.grad.mul_(mask)
        base.step()
        plain.time += 1
        with torch.no_grad():
            for param, old, mask in zip(plain.params, plain.pretrained, masks, strict=True):
                param.copy_(torch.where(mask, param, old))
        assert all(map(torch.equal, trial.masks(), masks))
        assert same_bits(where(trial.params, masks, False), where(trial.pretrained, masks, False))
        for ours, theirs in zip(trial.params, plain.params, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, check_stride=False)
    live = trial.live()
    trial.optimizer.consolidate()
    assert same_bits(trial.live(), live)


@MORE_EXAMPLES
@given(runs(mask_probs=MIXED))
def test_resample_is_what_the_last_step_of_an_episode_does(scenario: Scenario) -> None:
    period = 2
    scenario = scenario.with_settings(episode_warmup=0)
    automatic = Trial(scenario.with_settings(resample_every=period))
    manual = Trial(scenario.with_settings(resample_every=None))
    calls: list[tuple[int, int]] = []
    handle = automatic.optimizer.register_resample_hook(
        lambda optimizer: calls.append((optimizer.episode, optimizer.steps_in_episode))
    )
    for step, _ in zip(automatic.run(), manual.run(), strict=True):
        if step % period == 0:
            manual.optimizer.resample()
        assert same_bits(automatic.live(), manual.live())
        assert same_bits(automatic.anchors(), manual.anchors())
        for trial in (automatic, manual):
            assert divmod(step, period) == (
                trial.optimizer.episode,
                trial.optimizer.steps_in_episode,
            )
    assert calls == [(episode, 0) for episode in range(1, scenario.steps // period + 1)]
    handle.remove()
    automatic.optimizer.resample()
    assert len(calls) == scenario.steps // period


@MORE_EXAMPLES
@given(st.data())
def test_resync_takes_the_weights_in_the_model_as_anchor(data: st.DataObject) -> None:
    """Changing none of them; a new episode begins.

    Nor does it change what the base knows of parameters that are not mixed.
    """
    scenario = data.draw(runs())
    trial = advance(Trial(scenario), data.draw(st.integers(0, scenario.steps)))
    episode = trial.optimizer.episode
    with torch.no_grad():
        for param in trial.params:
            param.copy_(torch.randn_like(param))
    loaded = trial.live()
    trial.optimizer.resync()
    assert same_bits(trial.params, loaded)
    assert same_bits(trial.anchors(), copies(trial.mixed))
    assert (trial.optimizer.episode, trial.optimizer.steps_in_episode) == (episode + 1, 0)
    trial.optimizer.consolidate()
    assert same_bits(trial.params, loaded)
    with trial.optimizer.eval_weights():
        assert same_bits(trial.params, loaded)


def test_bits_tell_zeros_apart_and_find_nan_equal() -> None:
    """The helper that all of the above leans on."""
    assert not same_bits([torch.tensor(0.0)], [torch.tensor(-0.0)])
    assert same_bits([torch.tensor(float("nan"))], [torch.tensor(float("nan"))])
    assert not same_bits([torch.zeros(2)], [torch.zeros(2, dtype=torch.float64)])
    assert bits(torch.tensor(1.0)).dtype == torch.int32
