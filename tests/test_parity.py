"""The library computes what the reference does, for all optimizers, layouts and settings."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gmixout_optim import GMixoutOptimizer
from tests.optimizers import CASES, DENSE_GRADIENTS, ELEMENTWISE, Case
from tests.reference import Mix, Reference
from tests.scenarios import (
    MEMORIES,
    Scenario,
    TensorSpec,
    Trial,
    same_bits,
    scenarios,
    written_to,
)

TOLERANCE = {
    torch.float64: dict(rtol=1e-9, atol=1e-10),
    torch.float32: dict(rtol=1e-3, atol=2e-4),
}
BY_NAME = {case.name: case for case in CASES}


def assert_close(
    ours: list[Tensor], theirs: list[Tensor], what: str, inf_is_nan: bool = False
) -> None:
    """Of equal shapes and dtypes, with equal values to within the tolerance; NaN equals NaN."""
    for i, pair in enumerate(zip(ours, theirs, strict=True)):
        a, b = (tensor.detach() for tensor in pair)
        if inf_is_nan:
            a, b = (tensor.where(tensor.isfinite(), float("nan")) for tensor in (a, b))
        torch.testing.assert_close(
            a,
            b,
            equal_nan=True,
            check_stride=False,
            msg=lambda text, i=i: f"{what} of tensor {i}: {text}",
            **TOLERANCE[a.dtype],
        )


def assert_agree(trial: Trial, reference: Reference, when: str, inf_is_nan: bool = False) -> None:
    """Live weights, anchors and weights to deploy of both."""
    live = trial.live()
    assert_close(live, reference.theta, f"{when}: live weights", inf_is_nan)
    anchors = [A for i, A in enumerate(reference.A) if reference.is_mixed(i)]
    assert_close(trial.anchors(), anchors, f"{when}: anchor", inf_is_nan=True)
    with trial.optimizer.eval_weights():
        what = f"{when}: eval_weights"
        assert_close(trial.params, reference.deployed, what, inf_is_nan=True)
    assert same_bits(trial.live(), live)
    assert trial.optimizer.steps_in_episode == reference.steps_in_episode


def check_whole_run(
    scenario: Scenario, actions: dict[int, str] | None = None, inf_is_nan: bool = False
) -> None:
    """``actions``: after which steps "resample" or "resync" are called."""
    trial = Trial(scenario)
    reference = trial.reference()
    assert_agree(trial, reference, "at the start")
    for step in range(1, scenario.steps + 1):
        trial.step(reference)
        assert_agree(trial, reference, f"after step {step}", inf_is_nan)
        action = (actions or {}).get(step)
        if action == "resample":
            trial.optimizer.resample()
            reference.resample()
        if action == "resync":
            with torch.no_grad():
                for param in trial.params:
                    param.mul_(0.5).add_(0.1)
            trial.optimizer.resync()
            reference.resync(trial.live())
        if action:
            assert_agree(trial, reference, f"after step {step} and {action}", inf_is_nan)
    trial.optimizer.consolidate()
    assert_close(trial.params, reference.consolidate(), "consolidate", inf_is_nan=True)


@pytest.mark.parametrize("case", DENSE_GRADIENTS, ids=repr)
@given(data=st.data())
def test_wrapper_equals_reference(case: Case, data: st.DataObject) -> None:
    """In whole runs, with early ends of an episode and other weights in the model at any moment."""
    scenario = data.draw(scenarios(case))
    steps, calls = st.integers(1, scenario.steps), st.sampled_from(["resample", "resync"])
    check_whole_run(scenario, data.draw(st.dictionaries(steps, calls, max_size=2)))


@pytest.mark.filterwarnings("ignore:weights of")
@pytest.mark.parametrize("case", DENSE_GRADIENTS, ids=repr)
@given(data=st.data())
def test_the_next_step_works_on_what_somebody_wrote_into_the_model(
    case: Case, data: st.DataObject
) -> None:
    """On and off the active cells, through ``.data`` too where nothing is kept of the weights."""
    check_whole_run(data.draw(written_to(data.draw(scenarios(case)))))


@pytest.mark.filterwarnings("ignore:weights of")
@pytest.mark.parametrize("case", ELEMENTWISE, ids=repr)
@given(data=st.data())
def test_invariant_6_packed_equals_dense(case: Case, data: st.DataObject) -> None:
    scenario = data.draw(scenarios(case, layouts=("packed",), residuals=("episodic",)))
    if data.draw(st.booleans()):
        scenario = data.draw(written_to(scenario))
    packed, dense = Trial(scenario), Trial(scenario.with_settings(layout="dense"))
    for step, _ in zip(packed.run(), dense.run(), strict=True):
        assert_close(packed.params, dense.params, f"after step {step}: live weights")
        assert_close(packed.anchors(), dense.anchors(), f"after step {step}: anchor")
    packed.optimizer.consolidate()
    dense.optimizer.consolidate()
    assert_close(packed.params, dense.params, "consolidate")


@pytest.mark.parametrize("resample_every", [2, None])
@pytest.mark.parametrize("name", ["SGD", "SGD-momentum", "AdamW", "AdamW-fused", "Adafactor"])
@given(data=st.data())
def test_nan_and_inf_gradients_do_what_the_base_does_with_them_on_the_active_set(
    name: str, resample_every: int | None, data: st.DataObject
) -> None:
    """Exactly so within an episode; an inf that enters a mean may become NaN (inf - inf)."""
    scenario = data.draw(scenarios(BY_NAME[name]))
    values = st.sampled_from([float("nan"), float("inf"), -float("inf")])
    poison = data.draw(st.tuples(st.integers(0, scenario.steps - 1), values))
    scenario = scenario.with_settings(resample_every=resample_every)
    check_whole_run(replace(scenario, poison=poison), inf_is_nan=resample_every is not None)


@given(data=st.data())
def test_a_nan_gradient_off_the_active_set_changes_nothing(data: st.DataObject) -> None:
    scenario = data.draw(scenarios(BY_NAME["AdamW"]))
    scenario = replace(scenario, closure=False)
    clean, poisoned = Trial(scenario), Trial(scenario)
    for trial in (clean, poisoned):
        trial.fill_gradients()
    for param, mask in zip(poisoned.params, poisoned.masks(), strict=True):
        if param.grad is not None:
            param.grad.masked_fill_(~mask, float("nan"))
    clean.optimizer.step()
    poisoned.optimizer.step()
    assert same_bits(clean.live(), poisoned.live())


def drifts_of(trial: Trial) -> list[float]:
    """How far the report says that each mixed tensor has moved."""
    return [tensor.drift or 0.0 for tensor in trial.optimizer.report().tensors if tensor.mixed]


@pytest.mark.parametrize("name", ["SGD-momentum", "AdamW", "Adafactor", "Muon"])
@given(data=st.data())
def test_the_memory_format_may_change_while_training(name: str, data: st.DataObject) -> None:
    scenario = data.draw(scenarios(BY_NAME[name]))
    when = data.draw(st.integers(1, scenario.steps - 1))
    memory = data.draw(st.sampled_from(MEMORIES))
    trial = Trial(scenario)
    reference = trial.reference()
    for step in range(scenario.steps):
        if step == when:
            drifts = drifts_of(trial)
            trial.change_memory(memory)
            assert drifts_of(trial) == pytest.approx(drifts)
            assert_agree(trial, reference, "when it changes")
        trial.step(reference)
        assert_agree(trial, reference, f"after step {step + 1}")


# Each of these went wrong once, or is drawn too rarely above.


def run_on(case: Case, shapes: list[tuple[int, ...]], steps: int = 6, **changes: Any) -> None:
    """The whole run on contiguous tensors, one group, half of the weights masked."""
    own = {f.name for f in fields(Scenario)}
    settings = dict(
        mask_prob=0.5,
        exclude=(),
        resample_every=2,
        anchor_decay=0.5,
        residual="episodic",
        rescale=False,
        granularity="element",
        sampler="stratified",
        lr_scale="auto" if case.closure else 3.0,
        episode_warmup="auto",
    )
    settings.update({key: value for key, value in changes.items() if key not in own})
    head = "head" if settings["exclude"] else "body"
    specs = tuple(
        TensorSpec(shape, "contiguous", f"{'body' if i else head}.{i}")
        for i, shape in enumerate(shapes)
    )
    scenario = Scenario(
        case=case,
        dtype=torch.float64,
        groups=((specs, {}),),
        settings=settings,
        steps=steps,
        seed=0,
        closure=case.closure,
        **{key: value for key, value in changes.items() if key in own},
    )
    check_whole_run(scenario)


@pytest.mark.parametrize("layout", ["packed", "dense"])
@pytest.mark.parametrize("name", ["ASGD", "Rprop"])
def test_state_that_starts_at_the_learning_rate_starts_at_the_scheduled_one(
    name: str, layout: str
) -> None:
    """As in a base that is fresh: at its first step, not when the episode before ended."""
    run_on(BY_NAME[name], [(6, 8)], layout=layout, lr_decay=0.5)


def test_lbfgs_starts_anew_whichever_parameter_comes_first() -> None:
    """Its history is kept under the first parameter, here one that is not mixed."""
    run_on(BY_NAME["LBFGS"], [(3, 4), (6, 8)], exclude="head.*")


@pytest.mark.parametrize("shape", [(5, 1), (1, 6)])
def test_factored_moments_start_anew_where_a_factor_has_the_shape_of_the_tensor(
    shape: tuple[int, int],
) -> None:
    run_on(BY_NAME["Adafactor"], [shape])


LAYOUTS = ["packed", "dense", "persistent"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tied_parameter_is_one_parameter(layout: str) -> None:
    """Embedding and decoder share a weight: both uses are added, the wrapper sees one tensor."""
    torch.manual_seed(0)
    embedding, decoder = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    decoder.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Tanh(), decoder).double()
    (weight,) = model.parameters()
    tokens = torch.randint(11, (7, 9))

    def evaluate(theta: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        leaf = theta[0].detach().requires_grad_()
        with torch.enable_grad():
            logits = torch.tanh(leaf[tokens[:, :-1]]) @ leaf.T
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        return loss.detach(), [torch.autograd.grad(loss, leaf)[0]]

    where = (
        dict(residual="persistent")
        if layout == "persistent"
        else dict(residual="episodic", layout=layout)
    )
    optimizer = GMixoutOptimizer(
        torch.optim.AdamW(model.named_parameters(), lr=0.1),
        mask_prob=0.6,
        resample_every=3,
        anchor_decay=0.5,
        rescale=True,
        lr_scale=1.0,
        **where,
    )
    reference = Reference(
        [weight],
        lambda tensors: torch.optim.AdamW(tensors, lr=0.1),
        [Mix(26 / 66, 0.5)],
        lambda: [optimizer.active_mask(weight)],
        k=3,
        warmup=0 if layout == "persistent" else 3,
        persistent=layout == "persistent",
        rescale=True,
    )
    for _ in range(10):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        reference.step(evaluate)
        assert_close([weight], reference.theta, "live weights")
    assert decoder.weight is embedding.weight is weight
    optimizer.consolidate()
    assert_close([weight], reference.consolidate(), "consolidate")
