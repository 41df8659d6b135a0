"""GMixout around an optimizer from timm's factory, with timm's scheduler.

timm's factory makes groups with and without weight decay from a model; ``mask_prob`` may differ
between them.
"""

from __future__ import annotations

import argparse

from tiny_task import Spirals, accuracy, pretrained
from torch import nn
from torch.utils.data import DataLoader
from torchvision_compat import ensure_torchvision

from gmixout_optim import GMixoutOptimizer

ensure_torchvision()  # timm imports it
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402


def make_optimizer(model: nn.Module, name: str = "adamw") -> GMixoutOptimizer:
    base = create_optimizer_v2(model, opt=name, lr=0.02, weight_decay=0.05)
    # The factory takes the model, so its groups know no names: the head's group is found by its
    # parameters.
    head = {id(param) for param in model.head.parameters()}
    for group in list(base.param_groups):
        of_head = [param for param in group["params"] if id(param) in head]
        group["params"] = [param for param in group["params"] if id(param) not in head]
        base.add_param_group({**group, "params": of_head, "mask_prob": 0.0})
    return GMixoutOptimizer(base, resample_every=8)


def train(model: nn.Module, optimizer: GMixoutOptimizer, epochs: int) -> None:
    data = DataLoader(Spirals(512, turns=(0.2, 0.8)), batch_size=32)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=1, warmup_lr_init=1e-4)
    for epoch in range(epochs):
        scheduler.step(epoch)
        for batch in data:
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            optimizer.step()
        with optimizer.eval_weights():
            print(f"epoch {epoch}: accuracy {accuracy(model, Spirals(512, seed=2)):.3f}")
    optimizer.consolidate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="epochs (default: 10)")
    parser.add_argument("--opt", default="adamw", help="timm's name of the base (default: adamw)")
    args = parser.parse_args()
    model = pretrained()
    train(model, make_optimizer(model, args.opt), args.epochs)


if __name__ == "__main__":
    main()
