"""Ranks agree without communicating: index sets depend on the seed alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.testing import InvariantError, check_invariants
from tests.ranks import needs_gloo, on_ranks
from tests.training import assert_equal, batch, loss_of, small_model, weights

STEPS = 7


def _rank(rank: int) -> list[torch.Tensor]:
    torch.manual_seed(rank)  # each rank has a generator of its own, as ranks do
    model = DistributedDataParallel(small_model())
    torch.manual_seed(100 + rank)
    optimizer = GMixoutOptimizer(
        torch.optim.AdamW(model.named_parameters(), lr=0.05),
        exclude="module.head.*",
        resample_every=3,
        mask_prob=0.5,
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, targets = batch(step)
        part = slice(rank, None, 2)
        (model(inputs[part]) - targets[part]).square().mean().backward()
        optimizer.step()
        if step == 4:
            check_invariants(optimizer)
    found = weights(model.module)
    optimizer._run.steps_in_episode += rank  # as a rank that has missed a step
    with pytest.raises(InvariantError, match="ranks differ in steps_in_episode"):
        check_invariants(optimizer)
    return found


@needs_gloo
def test_invariant_10_ddp_trains_as_one_process_does() -> None:
    first, second = on_ranks(2, _rank)
    model = small_model()
    optimizer = GMixoutOptimizer(
        torch.optim.AdamW(model.named_parameters(), lr=0.05),
        exclude="head.*",
        resample_every=3,
        mask_prob=0.5,
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    assert_equal(first, second)
    for ours, theirs in zip(weights(model), first, strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_gloo
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused_before_anything_changes(use_orig_params: bool) -> None:
    """Its own checkpoint call fails on the wrapper's state; found at construction, not then."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        device = torch.device("cpu")
        model = FullyShardedDataParallel(
            small_model(), use_orig_params=use_orig_params, device_id=device
        )
        base = torch.optim.AdamW(model.named_parameters(), lr=0.05)
        with pytest.raises(TypeError, match=r"FullyShardedDataParallel \(FSDP1\).*mask_prob=0"):
            GMixoutOptimizer(base)
        assert "gmixout" not in base.param_groups[0]
        GMixoutOptimizer(base, mask_prob=0.0)
    finally:
        dist.destroy_process_group()
