"""Invariant 5: with mask_prob 0 the wrapper is the wrapped optimizer, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from gmixout_optim import GMixoutOptimizer
from tests.optimizers import CASES, DENSE_GRADIENTS, Case
from tests.training import assert_equal, freeze_and_thaw, small_model, train, weights


def base_state(optimizer: torch.optim.Optimizer) -> dict:
    return optimizer.state_dict()["state"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", DENSE_GRADIENTS, ids=repr)
@pytest.mark.parametrize(
    "settings",
    [
        dict(resample_every=3),
        dict(resample_every=1, anchor_decay=1.0, residual="persistent", rescale=True),
        dict(resample_every=2, layout="dense", granularity="row", sampler="bernoulli"),
    ],
    ids=["episodic", "persistent", "dense"],
)
def test_invariant_5_mask_prob_zero_is_the_bare_optimizer(
    case: Case, dtype: torch.dtype, settings: dict
) -> None:
    bare_model = small_model(dtype, bias=not case.matrices_only)
    model = copy.deepcopy(bare_model)
    bare = case(bare_model.named_parameters())
    wrapped = GMixoutOptimizer(case(model.named_parameters()), mask_prob=0.0, **settings)

    losses = train(bare_model, bare, range(8), freeze_and_thaw(bare_model))
    assert_equal(losses, train(model, wrapped, range(8), freeze_and_thaw(model)))
    assert_equal(weights(bare_model), weights(model))
    assert_equal(base_state(bare), base_state(wrapped))


def test_invariant_5_mask_prob_zero_with_sparse_gradients() -> None:
    torch.manual_seed(0)
    bare_model = nn.Embedding(10, 4, sparse=True)
    model = copy.deepcopy(bare_model)
    (case,) = [case for case in CASES if case.sparse]
    bare = case(bare_model.parameters())
    wrapped = GMixoutOptimizer(case(model.parameters()), mask_prob=0)
    for step in range(4):
        rows = torch.tensor([step, 3])
        for of, optimizer in ((bare_model, bare), (model, wrapped)):
            optimizer.zero_grad()
            of(rows).square().sum().backward()
            optimizer.step()
    assert_equal(weights(bare_model), weights(model))
    assert_equal(base_state(bare), base_state(wrapped))


@pytest.mark.parametrize("case", [c for c in DENSE_GRADIENTS if not c.closure], ids=repr)
def test_an_unmixed_group_trains_as_in_the_bare_optimizer(case: Case) -> None:
    """Next to a mixed group that never gets a gradient, so that nothing else differs."""
    bare_model = small_model(bias=not case.matrices_only)
    model = copy.deepcopy(bare_model)
    for of in (bare_model, model):
        of.body.requires_grad_(False)
    bare = case(bare_model.named_parameters())
    wrapped = GMixoutOptimizer(case(model.named_parameters()), exclude="head.*", resample_every=2)
    assert_equal(train(bare_model, bare, range(6)), train(model, wrapped, range(6)))
    assert_equal(weights(bare_model), weights(model))


def test_table_holds_every_optimizer_of_torch() -> None:
    ours = {case.make for case in CASES}
    torchs = {
        item
        for item in vars(torch.optim).values()
        if isinstance(item, type) and issubclass(item, Optimizer) and item is not Optimizer
    }
    assert ours == torchs
