"""BatchNorm statistics belong to the weights that made them: after consolidate() they are made
anew."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from gmixout_optim import GMixoutOptimizer


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(512, 20) * 3 + 1
    return inputs, (inputs[:, :4].sum(1) > 4).long()


def loss_of(model: nn.Module) -> float:
    inputs, labels = data()
    model.eval()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(inputs), labels))


def test_update_bn_after_consolidate() -> None:
    """The anchor takes a fifth of what an episode learned; the running statistics are of the
    episode's weights."""
    inputs, labels = data()
    batches = [inputs[start : start + 64] for start in range(0, 512, 64)]
    stale, renewed = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(20, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2)
        )
        base = torch.optim.AdamW(model.named_parameters(), lr=0.2)
        optimizer = GMixoutOptimizer(
            base,
            exclude=("1.*", "3.*"),
            mask_prob=0.5,
            resample_every=20,
            anchor_decay=0.8,
            episode_warmup=0,
        )
        for step in range(58):  # stops in mid-episode
            rows = torch.randperm(512, generator=torch.Generator().manual_seed(step))[:64]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
        optimizer.consolidate()
        stale.append(loss_of(model))
        update_bn(batches, model)
        renewed.append(loss_of(model))
        hidden = model[0](inputs).mean(0).detach()
        torch.testing.assert_close(model[1].running_mean, hidden, rtol=1e-3, atol=1e-3)
    assert sum(renewed) < 0.9 * sum(stale), (stale, renewed)
