"""A small task and a model pretrained for it, so that the examples of training loops run in
seconds.

Points on a spiral belong to one of three arms. The model was pretrained on all angles; fine-tuning
sees a part of them.
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

CLASSES = 3


class Spirals(Dataset[dict[str, Tensor]]):
    """Points (float32, 2 coordinates) and the arm of the spiral that each belongs to."""

    def __init__(self, points: int, turns: tuple[float, float] = (0.0, 1.0), seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(CLASSES, (points,), generator=generator)
        turn = torch.empty(points).uniform_(*turns, generator=generator)
        angle = 2 * pi * (turn + self.labels / CLASSES)
        noise = 0.02 * torch.randn(points, 2, generator=generator)
        self.inputs = torch.stack([angle.cos(), angle.sin()], 1) * (0.2 + turn)[:, None] + noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[place], "labels": self.labels[place]}


class Classifier(nn.Module):
    """Returns a dict with ``logits``, and with the ``loss`` where labels are given, as
    transformers' models do."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.body(inputs))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def pretrained(seed: int = 0) -> Classifier:
    """A model trained for a second on the whole spiral, with a new head as for another task."""
    torch.manual_seed(seed)
    model = Classifier()
    data = Spirals(1024, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        model(data.inputs, data.labels)["loss"].backward()
        optimizer.step()
    optimizer.zero_grad()
    model.head.reset_parameters()
    return model


def accuracy(model: nn.Module, data: Spirals) -> float:
    """Share of points that the model assigns to their arm."""
    model.eval()
    with torch.no_grad():
        found = model(data.inputs)["logits"].argmax(1)
    model.train()
    return float((found == data.labels).float().mean())
