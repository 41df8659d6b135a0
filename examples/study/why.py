"""What the papers argue with: where the weights go, how errors of snapshots are related."""

from __future__ import annotations

import copy
from typing import Any

import torch
from emoji_domains import Images
from models import Classifier
from torch import Tensor

from gmixout_optim import GMixoutOptimizer
from study.methods import Settings, Trainer, averaged, interpolated
from study.tasks import Task
from study.training import correct, logits_of, percent, train

SNAPSHOTS = 6
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def distance(where: Task, model: Classifier) -> float:
    """How far a backbone is from the pretrained one: |w - w0| / |w0|."""
    return round(_apart(where, model, where.pretrained), 6)


def snapshots(where: Task, method: str, settings: Settings, seed: int) -> list[Classifier]:
    """The weights to deploy at `SNAPSHOTS` times in the second half of a run."""
    steps = settings.get("steps", where.steps)
    times = {steps - 1 - number * steps // (2 * SNAPSHOTS) for number in range(SNAPSHOTS)}
    taken: list[Classifier] = []

    def watch(step: int, trainer: Trainer) -> None:
        if step in times:
            taken.append(_deployed(trainer))

    train(where, method, settings, seed, watch)
    return taken


def decomposed(
    where: Task, method: str, settings: Settings, seeds: range
) -> dict[str, dict[str, float]]:
    """The error of averages of snapshots, as bias, variance, covariance and locality.

    Source: Rame et al., Diverse Weight Averaging (arXiv 2205.09739), equation 3: the expected
    squared error of the average of M models is bias^2 + variance / M + (M - 1) / M * covariance, up
    to the square of the locality. The learning procedure that the expectation is over is the seed;
    the error is that of the probabilities, summed over classes.

    Returns:
        for "id" and "ood" bias, variance, covariance, what they sum up to, and the error that the
        average of the snapshots really has; under "weights" the locality: the largest distance of a
        snapshot from their average, relative to the pretrained weights' norm.
    """
    sets = {
        "id": [where.data[where.domain, "test"]],
        "ood": [where.data[domain, "test"] for domain in where.shifted],
    }
    probabilities: dict[str, list[Tensor]] = {name: [] for name in sets}
    errors: dict[str, list[float]] = {name: [] for name in sets}
    localities = []
    for seed in seeds:
        models = snapshots(where, method, settings, seed)
        mean = averaged([(model, 1 / len(models)) for model in models])
        localities.append(max(_apart(where, model, mean) for model in models))
        for name, images in sets.items():
            probabilities[name].append(
                torch.stack([_probabilities(where, model, images) for model in models])
            )
            error = _probabilities(where, mean, images) - _targets(where, images)
            errors[name].append(error.square().sum(-1).mean().item())
    found: dict[str, dict[str, float]] = {}
    for name, images in sets.items():
        seen = torch.stack(probabilities[name])  # seeds, snapshots, images, classes
        found[name] = {
            **bias_variance_covariance(seen, _targets(where, images)),
            "error": sum(errors[name]) / len(errors[name]),
        }
    found["weights"] = {"locality": sum(localities) / len(localities)}
    return {
        name: {key: round(value, 6) for key, value in values.items()}
        for name, values in found.items()
    }


def bias_variance_covariance(predicted: Tensor, targets: Tensor) -> dict[str, float]:
    """Of the mean of M models; the expectation is over runs.

    Args:
        predicted: [runs, M, N, classes], each snapshot's probabilities in each run.
        targets: [N, classes].

    Returns:
        "bias" (squared), "variance", "covariance", and "sum", the expected squared error of the
        mean prediction of M models, all summed over classes and averaged over images. Variance and
        covariance are unbiased estimates; the bias is less the share of variance that its estimate
        from few runs has.
    """
    runs, models = predicted.shape[:2]
    expected = predicted.mean(0)
    apart = predicted - expected
    variances = apart.square().sum(0) / (runs - 1)  # M, N, classes
    together = apart.sum(1).square().sum(0) / (runs - 1)  # of the sum over models: N, classes
    variance = variances.mean(0).sum(-1).mean()
    pairs = models * (models - 1)
    covariance = ((together - variances.sum(0)) / pairs).sum(-1).mean() if pairs else variance * 0
    of_mean = variance / models + (models - 1) / models * covariance
    bias = (expected.mean(0) - targets).square().sum(-1).mean() - of_mean / runs
    terms = {"bias": bias, "variance": variance, "covariance": covariance, "sum": bias + of_mean}
    return {name: term.item() for name, term in terms.items()}


def path(where: Task, method: str, settings: Settings, seed: int) -> dict[str, Any]:
    """Accuracies on straight lines from the pretrained weights, at about two thirds of a run.

    The time is one step before an episode of ten or twenty ends: live weights are then as far from
    the anchor as they come.

    Returns:
        "shares"; "deployed" and "live": accuracies in and out of distribution at each share of the
        way to the weights to deploy, and to those that the model trains with at the time;
        "between": on the way from the former to the latter.
    """
    steps = settings.get("steps", where.steps)
    time = max(0, 2 * steps // 3 // 20 * 20 - 2)  # steps count from 0
    ends: dict[str, Classifier] = {}

    def watch(step: int, trainer: Trainer) -> None:
        if step == time:
            ends["live"] = Classifier(trainer.model.backbone, trainer.model.head)
            ends["deployed"] = _deployed(trainer)

    train(where, method, settings, seed, watch)
    lines = {name: (where.pretrained, end) for name, end in ends.items()}
    lines["between"] = ends["deployed"], ends["live"]
    curves = {
        name: [_accuracies(where, interpolated(start, end, share)) for share in SHARES]
        for name, (start, end) in lines.items()
    }
    return {"shares": list(SHARES), **curves}


def _accuracies(where: Task, model: Classifier) -> dict[str, float]:
    right = {
        name: percent(correct(where, model, where.data[name, "test"]))
        for name in where.data.domains
    }
    shifted = [right[name] for name in where.shifted]
    return {"id": right[where.domain], "ood": round(sum(shifted) / len(shifted), 3)}


def _deployed(trainer: Trainer) -> Classifier:
    if isinstance(trainer.optimizer, GMixoutOptimizer):
        with trainer.optimizer.eval_weights():
            return copy.deepcopy(trainer.model)
    return copy.deepcopy(trainer.model)


def _apart(where: Task, model: Classifier, other: Classifier) -> float:
    """The distance of two backbones, relative to the norm of the pretrained one."""
    apart, norm = torch.zeros(2, dtype=torch.double)
    for name, before in where.pretrained.trainable("backbone"):
        between = model.get_parameter(name) - other.get_parameter(name)
        apart += between.detach().double().square().sum()
        norm += before.detach().double().square().sum()
    return (apart / norm).sqrt().item()


def _probabilities(where: Task, model: Classifier, sets: list[Images]) -> Tensor:
    inputs = (where.to_input(images.pixels) for images in sets)
    return torch.cat([logits_of(where, model, each) for each in inputs]).softmax(-1)


def _targets(where: Task, sets: list[Images]) -> Tensor:
    labels = torch.cat([images.labels for images in sets])
    return torch.nn.functional.one_hot(labels, len(where.data.class_names)).float()
