"""The library computes what the reference computes, for every optimizer, layout, residual and setting."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gmixout_optim import GMixoutOptimizer
from tests.optimizers import CASES, DENSE_GRADIENTS, ELEMENTWISE, Case
from tests.reference import Mix, Reference, Scenario, Trial, bits, copies, same_bits, scenarios

TOLERANCE = {
    torch.float64: dict(rtol=1e-9, atol=1e-10),
    torch.float32: dict(rtol=1e-3, atol=2e-4),
}
BY_NAME = {case.name: case for case in CASES}


def assert_close(ours: list[Tensor], theirs: list[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(
            a.detach(),
            b.detach(),
            equal_nan=True,
            check_stride=False,
            msg=lambda text, i=i: f"{what} of tensor {i}: {text}",
            **TOLERANCE[a.dtype],
        )


def assert_agree(trial: Trial, reference: Reference, when: str) -> None:
    """Live weights, anchors and weights to deploy of both."""
    live = trial.live()
    assert_close(live, reference.theta, f"{when}: live weights")
    anchors = [A for i, A in enumerate(reference.A) if reference.is_mixed(i)]
    assert_close(trial.anchors(), anchors, f"{when}: anchor")
    with trial.optimizer.eval_weights():
        assert_close(trial.params, reference.deployed, f"{when}: eval_weights")
    assert same_bits(trial.live(), live)
    assert trial.optimizer.steps_in_episode == reference.steps_in_episode


def check_whole_run(scenario: Scenario) -> None:
    trial = Trial(scenario)
    reference = trial.reference()
    assert_agree(trial, reference, "at the start")
    for step in range(1, scenario.steps + 1):
        trial.step(reference)
        assert_agree(trial, reference, f"after step {step}")
    trial.optimizer.consolidate()
    assert_close(trial.params, reference.consolidate(), "consolidate")


@pytest.mark.parametrize("case", DENSE_GRADIENTS, ids=repr)
@given(data=st.data())
def test_wrapper_equals_reference(case: Case, data: st.DataObject) -> None:
    check_whole_run(data.draw(scenarios(case)))


@pytest.mark.parametrize("case", ELEMENTWISE, ids=repr)
@given(data=st.data())
def test_invariant_6_packed_equals_dense(case: Case, data: st.DataObject) -> None:
    scenario = data.draw(scenarios(case, layouts=("packed",), residuals=("episodic",)))
    packed, dense = Trial(scenario), Trial(scenario.with_settings(layout="dense"))
    for step, _ in zip(packed.run(), dense.run(), strict=True):
        assert_close(packed.params, dense.params, f"after step {step}: live weights")
        assert_close(packed.anchors(), dense.anchors(), f"after step {step}: anchor")
    packed.optimizer.consolidate()
    dense.optimizer.consolidate()
    assert_close(packed.params, dense.params, "consolidate")


@pytest.mark.parametrize(
    "name", ["SGD", "SGD-momentum", "AdamW", "AdamW-fused", "Rprop", "Adafactor"]
)
@given(data=st.data())
def test_nan_and_inf_gradients_do_what_the_base_does_with_them_on_the_active_set(
    name: str, data: st.DataObject
) -> None:
    scenario = data.draw(scenarios(BY_NAME[name]))
    values = st.sampled_from([float("nan"), float("inf"), -float("inf")])
    poison = data.draw(st.tuples(st.integers(0, scenario.steps - 1), values))
    check_whole_run(replace(scenario, poison=poison))


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


@pytest.mark.parametrize("case", DENSE_GRADIENTS, ids=repr)
@given(data=st.data())
def test_resample_and_resync_equal_reference(case: Case, data: st.DataObject) -> None:
    """At arbitrary moments: an early end of the episode, and other weights put into the model."""
    scenario = data.draw(scenarios(case))
    trial = Trial(scenario)
    reference = trial.reference()
    for step in range(1, scenario.steps + 1):
        trial.step(reference)
        action = data.draw(st.sampled_from(["go on", "resample", "resync"]))
        if action == "resample":
            trial.optimizer.resample()
            reference.resample()
        if action == "resync":
            with torch.no_grad():
                for param in trial.params:
                    param.mul_(0.5).add_(0.1)
            trial.optimizer.resync()
            reference.resync(trial.live())
        assert_agree(trial, reference, f"after step {step} and {action}")


LAYOUTS = ["packed", "dense", "persistent"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tied_parameter_is_one_parameter(layout: str) -> None:
    """Embedding and decoder share a weight: autograd adds both uses, and the wrapper sees one tensor."""
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
        **where,
    )
    reference = Reference(
        [weight],
        lambda tensors: torch.optim.AdamW(tensors, lr=0.1),
        [Mix(0.6, 0.5)],
        lambda: [optimizer.active_mask(weight)],
        k=3,
        persistent=layout == "persistent",
        rescale=True,
        carry_state=False,
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


@given(scenario=scenarios(BY_NAME["AdamW"]))
def test_a_deep_copy_goes_on_alike(scenario: Scenario) -> None:
    """Parameters and optimizer copied together in mid-run take the same steps, bit for bit."""
    trial = Trial(scenario)
    for _ in trial.run():
        if trial.time == scenario.steps // 2:
            break
    twin = copy.deepcopy(trial)
    for _ in range(scenario.steps - trial.time):
        trial.step()
        twin.step()
    assert same_bits(trial.live(), twin.live())
    assert not {bits(param).data_ptr() for param in trial.mixed} & {
        param.data_ptr() for param in twin.mixed
    }
    assert copies(trial.params) is not trial.params
