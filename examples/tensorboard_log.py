"""Log what GMixout does to TensorBoard at each episode's end: drift from the anchor, coverage,
bytes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tiny_task import Spirals, pretrained
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from gmixout_optim import GMixoutOptimizer


def log_drift(optimizer: GMixoutOptimizer, writer: SummaryWriter, step: int) -> None:
    """How far each mixed tensor has moved in the running episode: one that stays at 0 does not
    learn."""
    report = optimizer.report().to_dict()
    for tensor in report["tensors"]:
        if tensor["drift"] is not None:
            writer.add_scalar(f"drift/{tensor['name']}", tensor["drift"], step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5, help="epochs (default: 5)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs"), help="of the logs (default: runs)"
    )
    args = parser.parse_args()
    model = pretrained()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.02)
    optimizer = GMixoutOptimizer(optimizer, exclude="head.*", resample_every=8)
    with SummaryWriter(str(args.folder)) as writer:
        optimizer.register_resample_hook(
            lambda opt: writer.add_scalar("loss/at an episode's end", loss, opt.episode)
        )
        step = 0
        for _ in range(args.epochs):
            for batch in DataLoader(Spirals(512, turns=(0.2, 0.8)), batch_size=32):
                optimizer.zero_grad()
                loss = model(**batch)["loss"]
                loss.backward()
                if optimizer.steps_in_episode == 7:  # before the step that ends the episode
                    log_drift(optimizer, writer, step)
                optimizer.step()
                step += 1
        writer.add_text("report", f"```\n{optimizer.report()}\n```")
    print(f"tensorboard --logdir {args.folder}")


if __name__ == "__main__":
    main()
