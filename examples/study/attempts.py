"""What might make GMixout better, tried on its defaults. All of it a user can do, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from models import Classifier
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gmixout_optim import GMixoutOptimizer
from study.methods import Settings, Trainer, adamw, groups, wrapper_options
from study.tasks import Task

Groups = list[dict[str, Any]]


def attempt(task: Task, settings: Settings, seed: int) -> Trainer:
    """GMixout with one `change`, a key of `CHANGES`; other settings are those of methods.gmixout.

    Its averages are other ways to end: "live" takes what the last episode has trained in full,
    "whole episodes" leaves that episode out, "ema 0.98" averages the live weights of all steps.
    """
    change = settings["change"]
    model = Classifier(task.pretrained.backbone, task.pretrained.head)
    parameters = CHANGES[change](groups(model, settings["lr"]))
    optimizer = GMixoutOptimizer(adamw(parameters), **wrapper_options(settings, seed))
    trainer = Trainer(model, optimizer)

    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    trainer.averages["ema 0.98"] = cast(Classifier, average.module)

    def after_step() -> None:
        average.update_parameters(model)
        if change in _DECAYS:
            backbone = optimizer.param_groups[0]
            left = backbone["lr"] / backbone["initial_lr"]  # of the learning rate, from 1 to 0
            backbone["anchor_decay"] = _DECAYS[change](left)

    def finish() -> None:
        trainer.averages["live"] = _copy(model)
        trainer.averages["whole episodes"] = _copy(model)
        with torch.no_grad():
            for name, parameter in model.trainable("backbone"):
                anchor = optimizer.anchor(parameter)
                trainer.averages["whole episodes"].get_parameter(name).copy_(anchor)
        optimizer.consolidate()

    trainer.after_step, trainer.finish = after_step, finish
    return trainer


def _by_depth(*mask_probs: float) -> Callable[[Groups], Groups]:
    """The backbone in as many groups of tensors as there are probabilities, from the input on."""

    def change(parameters: Groups) -> Groups:
        backbone, *others = parameters
        named = backbone["params"]
        bounds = [len(named) * part // len(mask_probs) for part in range(len(mask_probs) + 1)]
        parts = [
            {**backbone, "params": named[first:last], "mask_prob": mask_prob}
            for mask_prob, first, last in zip(mask_probs, bounds, bounds[1:], strict=False)
        ]
        return [*parts, *others]

    return change


def _head_stays(parameters: Groups) -> Groups:
    backbone, head = parameters
    return [backbone, {**head, "lr": 0.0}]


def _same(parameters: Groups) -> Groups:
    return parameters


CHANGES: dict[str, Callable[[Groups], Groups]] = {
    "none": _same,
    "late layers denser": _by_depth(0.97, 0.9, 0.8),
    "early layers denser": _by_depth(0.8, 0.9, 0.97),
    "anchor decay falls with the learning rate": _same,
    "anchor decay rises as the learning rate falls": _same,
    "the head stays the probe": _head_stays,
}
_DECAYS: dict[str, Callable[[float], float]] = {
    "anchor decay falls with the learning rate": lambda left: 0.8 * left,
    "anchor decay rises as the learning rate falls": lambda left: 1 - 0.2 * left,
}


def _copy(model: Classifier) -> Classifier:
    return Classifier(model.backbone, model.head)
