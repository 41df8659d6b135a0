"""GMixout in a loop with Accelerate: gradient accumulation, clipping, checkpoints, and the weights
to deploy."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from tiny_task import Classifier, Spirals, accuracy, pretrained
from torch.utils.data import DataLoader

from gmixout_optim import GMixoutOptimizer


class Run:
    """Everything that a run consists of; ``steps()`` trains."""

    def __init__(self) -> None:
        self.accelerator = Accelerator(
            gradient_accumulation_steps=2, cpu=not torch.cuda.is_available()
        )
        model = pretrained()
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.02)
        optimizer = GMixoutOptimizer(optimizer, exclude="head.*", resample_every=8)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=100)
        data = DataLoader(Spirals(512, turns=(0.2, 0.8)), batch_size=32)
        self.model: Classifier
        self.model, self.optimizer, self.data, self.scheduler = self.accelerator.prepare(
            model, optimizer, data, scheduler
        )

    @property
    def gmixout(self) -> GMixoutOptimizer:
        """The wrapper inside Accelerate's own."""
        return self.optimizer.optimizer

    def epoch(self) -> Iterator[float]:
        """Train over the data once; yields losses."""
        for batch in self.data:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch)["loss"]
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            yield float(loss.detach())

    def validate(self) -> float:
        with self.gmixout.eval_weights():
            return accuracy(self.model, Spirals(512, seed=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10, help="epochs (default: 10)")
    parser.add_argument("--folder", type=Path, help="save a checkpoint here (default: none)")
    args = parser.parse_args()
    run = Run()
    for epoch in range(args.epochs):
        losses = list(run.epoch())
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}, accuracy {run.validate():.3f}")
    if args.folder:
        run.accelerator.save_state(str(args.folder))  # load_state() goes on exactly from here
    run.gmixout.consolidate()  # from here on the model is the one to deploy
    print(f"deployed: accuracy {accuracy(run.model, Spirals(512, seed=2)):.3f}")


if __name__ == "__main__":
    main()
