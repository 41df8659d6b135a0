"""Trains the parameters themselves in bfloat16, with and without the wrapper, beside the same run
in float32.

A bfloat16 number has 8 significant bits: a step below 1/256 of a weight is rounded away, and
AdamW's steps soon are. The wrapper keeps float32 masters of the active weights and writes them back
stochastically rounded.

    python examples/low_precision.py

Saves the loss curves, `results/low_precision.png` and `results/low_precision.json`.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from emoji_domains import Images, augment, load, normalise
from linear_probe import linear_probe
from models import Classifier, predict, pretrained_backbone
from results import write_atomically
from torch import nn
from tqdm import tqdm

from gmixout_optim import GMixoutOptimizer

matplotlib.use("Agg")  # draws into files, also where there is no display
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Training:
    """One curve: how the model is trained, and how its line is drawn."""

    name: str
    dtype: torch.dtype
    wrapped: bool = False
    stochastic_rounding: bool = False
    line: str = "-"


ALONE = [
    Training("float32", torch.float32),
    Training("bfloat16", torch.bfloat16, line=":"),
]
WRAPPED = [
    Training("float32", torch.float32, wrapped=True),
    Training("bfloat16, nearest", torch.bfloat16, wrapped=True, line=":"),
    Training("bfloat16, stochastic", torch.bfloat16, True, stochastic_rounding=True, line="--"),
]
PANELS = {"AdamW": ALONE, "AdamW + GMixout": WRAPPED}
COLOURS = ("#cf5f36", "#1f77b4")


def make_optimizer(
    model: Classifier, training: Training, settings: argparse.Namespace, seed: int
) -> torch.optim.Optimizer:
    params = [*model.trainable("backbone"), *model.trainable("head")]
    if not training.wrapped:
        return torch.optim.AdamW(params, lr=settings.lr)
    # The head comes from a linear probe: it has values worth returning to, and is mixed like the
    # rest.
    return GMixoutOptimizer(
        torch.optim.AdamW(params, lr=settings.lr),
        resample_every=settings.resample_every,
        anchor_decay=settings.anchor_decay,
        lr_scale=1.0,  # the smallest steps: what low precision loses is seen best
        episode_warmup=0,
        grad_layout="packed",
        stochastic_rounding=training.stochastic_rounding,
        seed=seed,
    )


def loss_on(model: nn.Module, images: Images) -> float:
    """Cross-entropy on the training images as they are, of the weights that would be deployed."""
    logits = predict(model, images)
    return float(F.cross_entropy(logits, images.labels))


class InPrecision(nn.Module):
    """A model that takes float32 images and computes in its parameters' dtype."""

    def __init__(self, model: Classifier, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(images.to(self.dtype))
        return logits.float()


def train(
    start: Classifier, training: Training, images: Images, settings: argparse.Namespace, seed: int
) -> list[float]:
    """The loss on all training images, before the first and after every episode."""
    model = InPrecision(Classifier(start.backbone, start.head), training.dtype)
    optimizer = make_optimizer(model.model, training, settings, seed)
    generator = torch.Generator().manual_seed(seed)
    losses = [loss_on(model, images)]
    for step in tqdm(
        range(1, settings.steps + 1), desc=f"{training.name}, seed {seed}", disable=None
    ):
        rows = torch.randint(len(images), (settings.batch_size,), generator=generator)
        inputs = augment(normalise(images.pixels[rows]), generator)
        loss = F.cross_entropy(model(inputs), images.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % settings.resample_every == 0:
            wrapped = isinstance(optimizer, GMixoutOptimizer)
            with optimizer.eval_weights() if wrapped else nullcontext():
                losses.append(loss_on(model, images))
    return losses


def draw(
    path: Path, curves: dict[str, dict[str, list[list[float]]]], settings: argparse.Namespace
) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axes, (title, trainings), colour in zip(panels, PANELS.items(), COLOURS, strict=True):
        axes.grid(color="#e8e8e8", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        for training in trainings:
            runs = torch.tensor(curves[title][training.name])
            steps = [settings.resample_every * i for i in range(runs.shape[1])]
            axes.plot(steps, runs.mean(0), training.line, color=colour, label=training.name)
            axes.fill_between(steps, runs.amin(0), runs.amax(0), color=colour, alpha=0.15, lw=0)
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        axes.legend(frameon=False)
    panels[0].set_ylabel("loss on the training images")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=160))
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lr", type=float, default=3e-5, help="learning rate of all runs")
    parser.add_argument("--anchor-decay", type=float, default=0.5)
    parser.add_argument("--resample-every", type=int, default=10, help="steps in an episode")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a smoke test on few images")
    parser.add_argument("--output", type=Path, default=Path("results"))
    settings = parser.parse_args()
    settings.output.mkdir(parents=True, exist_ok=True)
    data = load().thinned(keep_every=10) if settings.quick else load()
    images, val = data["fluent_mono", "train"], data["fluent_mono", "val"]
    backbone = pretrained_backbone().eval()
    head, _ = linear_probe(
        (predict(backbone, images), images.labels),
        (predict(backbone, val), val.labels),
        len(data.class_names),
    )
    start = Classifier(backbone, head)
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for title, trainings in PANELS.items():
        for training in trainings:
            runs = [
                train(start, training, images, settings, seed) for seed in range(settings.seeds)
            ]
            curves.setdefault(title, {})[training.name] = runs
            first, last = (sum(run[i] for run in runs) / len(runs) for i in (0, -1))
            print(f"{title:<16} {training.name:<22} loss {first:.3f} to {last:.3f}")
    draw(settings.output / "low_precision.png", curves, settings)
    numbers = {"settings": {**vars(settings), "output": None}, "losses": curves}
    text = json.dumps(numbers, indent=1).encode()
    write_atomically(settings.output / "low_precision.json", lambda file: file.write(text))


if __name__ == "__main__":
    main()
