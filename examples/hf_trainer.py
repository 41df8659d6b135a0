"""GMixout in Hugging Face's Trainer: the one line, and a callback for what is saved.

Trainer calls ``optimizer.eval()`` before it evaluates and ``optimizer.train()`` before each
training step. So it evaluates the weights to deploy, and a checkpoint written after an evaluation
holds them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from tiny_task import Spirals, pretrained
from torchvision_compat import ensure_torchvision

from gmixout_optim import GMixoutOptimizer

ensure_torchvision()  # transformers imports it
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402


class DeployWeights(TrainerCallback):
    """Every checkpoint's model file, and the model after training, hold the weights to deploy."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            kwargs["optimizer"].eval()  # until the next training step

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"].optimizer  # inside Accelerate's
        optimizer.train()
        optimizer.consolidate()


def make_trainer(folder: Path, steps: int = 60, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    model = pretrained()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.02)
    optimizer = GMixoutOptimizer(optimizer, exclude="head.*", resample_every=8)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": 32,
        "eval_strategy": "steps",
        "eval_steps": 20,
        "save_steps": 20,
        "logging_steps": 20,
        "report_to": [],
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**settings, **arguments}),
        train_dataset=Spirals(512, turns=(0.2, 0.8)),
        eval_dataset=Spirals(512, seed=2),
        optimizers=(optimizer, scheduler),
        callbacks=[DeployWeights()],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: 60)")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), steps)
        trainer.train()
        print(trainer.evaluate())


if __name__ == "__main__":
    main()
