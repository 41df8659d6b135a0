"""One training run, the same loop for every method, and what is measured of the models it gives."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from emoji_domains import Images, augment
from models import Classifier
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from study.attempts import attempt
from study.methods import METHODS, Settings, Trainer, schedule
from study.tasks import Task, shots


@dataclass
class Trained:
    """A run's models and costs."""

    model: Classifier
    averages: dict[str, Classifier]
    seconds: float
    optimizer_bytes: int
    losses: list[float]  # of each step's batch


def train(
    task: Task,
    method: str,
    settings: Settings,
    seed: int,
    watch: Callable[[int, Trainer], None] = lambda step, trainer: None,
) -> Trained:
    """Trains `task.pretrained`; `watch` is called after each step."""
    task.pretrained  # noqa: B018  made before the clock runs
    start = time.perf_counter()
    trainer = {**METHODS, "attempt": attempt}[method](task, settings, seed)
    model, optimizer, images = trainer.model, trainer.optimizer, task.train
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    steps = settings.get("steps", task.steps)
    scheduler = schedule(optimizer, steps, settings.get("schedule", "cosine"))
    generator = torch.Generator().manual_seed(seed)
    order: list[Tensor] = []
    losses: list[Tensor] = []
    for step in range(steps):
        if not order:  # a last batch that is not full is left out
            rows = torch.randperm(len(images), generator=generator)
            whole = max(1, len(images) // task.batch_size)
            order = list(rows.split(task.batch_size)[:whole])
        rows = order.pop(0).to(task.device)
        inputs = augmented(task, images.pixels[rows], generator)
        with task.autocast():
            logits = model(inputs)
        loss = F.cross_entropy(logits.float(), images.labels[rows], label_smoothing=0.1)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        trainer.before_step()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        trainer.after_step()
        watch(step, trainer)
    kept = trainer.optimizer_bytes()
    trainer.finish()
    seconds = time.perf_counter() - start
    rounded = [round(loss, 3) for loss in torch.stack(losses).tolist()]
    return Trained(model, trainer.averages, seconds, kept, rounded)


def augmented(task: Task, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The model's input, flipped, turned, zoomed and shifted at random."""
    white = pixels.float() / 127.5 - 1
    return task.to_input((augment(white, generator) + 1) * 127.5)


def logits_of(task: Task, model: Classifier, inputs: Tensor) -> Tensor:
    """float32 [N, classes] of inputs of the model."""
    with torch.no_grad(), task.autocast():
        return torch.cat([model(part) for part in inputs.split(64)]).float()


def correct(task: Task, model: Classifier, images: Images) -> Tensor:
    """bool [N]: which images are classified correctly."""
    return logits_of(task, model, task.to_input(images.pixels)).argmax(1) == images.labels


def validation(task: Task, model: Classifier, views: int = 5) -> dict[str, float]:
    """Accuracy in % and loss on the validation images: as they are, and in augmented views."""
    images = task.data[task.domain, "val"]
    generator = torch.Generator().manual_seed(0)
    inputs = [task.to_input(images.pixels)]
    inputs += [augmented(task, images.pixels, generator) for _ in range(views - 1)]
    logits = logits_of(task, model, torch.cat(inputs))
    labels = images.labels.repeat(views)
    return {
        "val": percent(logits.argmax(1) == labels),
        "val_loss": round(F.cross_entropy(logits, labels).item(), 4),
    }


def measure(task: Task, model: Classifier) -> dict[str, object]:
    """Everything that is asked of a model; accuracies in %.

    Returns:
        "val" and "val_loss"; "id", "ood" (the mean of "domains"), "corruption" (the mean of
        "corruptions"); with a long-tailed training set "many", "medium", "few"; and "by_emoji": how
        often each test emoji is right in distribution, in other styles, under corruptions, a digit
        each, in the order of the in-distribution test images.
    """
    found: dict[str, object] = dict(validation(task, model))
    test = task.data[task.domain, "test"]
    right = correct(task, model, test)
    found["id"] = percent(right)
    if task.long_tailed:
        found |= {name: percent(right[rows]) for name, rows in shots(task).items()}
    by_emoji = {"id": _digits(test, [(test, right)])}

    domains = {name: task.data[name, "test"] for name in task.shifted}
    found |= _all(task, model, test, domains, "ood", "domains", by_emoji)
    found |= _all(task, model, test, task.corrupted, "corruption", "corruptions", by_emoji)
    found["by_emoji"] = by_emoji
    return found


def _all(
    task: Task,
    model: Classifier,
    test: Images,
    sets: dict[str, Images],
    mean: str,
    each: str,
    by_emoji: dict[str, str],
) -> dict[str, object]:
    right = {name: correct(task, model, images) for name, images in sets.items()}
    by_emoji[mean] = _digits(test, [(images, right[name]) for name, images in sets.items()])
    accuracies = {name: percent(values) for name, values in right.items()}
    return {mean: round(sum(accuracies.values()) / len(accuracies), 3), each: accuracies}


def _digits(test: Images, seen: list[tuple[Images, Tensor]]) -> str:
    counts = torch.zeros(int(test.emoji.max()) + 1, dtype=torch.long)
    for images, right in seen:
        counts.index_add_(0, images.emoji.cpu(), right.long().cpu())
    return "".join(map(str, counts[test.emoji.cpu()].tolist()))


def percent(right: Tensor) -> float:
    """The share of a bool tensor that is true."""
    return round(100 * right.double().mean().item(), 3)
