"""The ways of fine-tuning that are compared. All are AdamW; what differs is said once, here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from models import Classifier
from results import optimizer_bytes
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gmixout_optim import GMixoutOptimizer
from study.tasks import Task

Settings = dict[str, Any]
HEAD_LR = 1e-4  # of a head that begins as linear probe
NEW_HEAD_LR = 1e-3
WEIGHT_DECAY = 0.05


@dataclass
class Trainer:
    """What a training loop needs to know of a method."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    before_step: Callable[[], None] = lambda: None  # gradients are there, not yet clipped
    after_step: Callable[[], None] = lambda: None
    finish: Callable[[], None] = lambda: None  # leaves the weights to deploy in the model
    extra_bytes: int = 0  # of copies of weights that the method keeps
    averages: dict[str, Classifier] = field(default_factory=dict)  # further models that come of it

    def optimizer_bytes(self) -> int:
        """What is kept beside the model and its gradients."""
        return self.extra_bytes + optimizer_bytes(self.optimizer)


def groups(model: Classifier, lr: float, head_lr: float = HEAD_LR) -> list[dict[str, Any]]:
    """The backbone at `lr`, the head at its own."""
    return [
        {"params": model.trainable("backbone"), "lr": lr},
        {"params": model.trainable("head"), "lr": head_lr},
    ]


def adamw(parameters: list[dict[str, Any]]) -> AdamW:
    """The optimizer of every method."""
    return AdamW(parameters, weight_decay=WEIGHT_DECAY, fused=True)


def fine_tuning(task: Task, settings: Settings, seed: int) -> Trainer:
    """Full fine-tuning with a new head."""
    model = Classifier(task.pretrained.backbone, task.pretrained.head)
    for parameter in model.head.parameters():
        nn.init.zeros_(parameter)
    return Trainer(model, adamw(groups(model, settings["lr"], NEW_HEAD_LR)))


def lp_ft(task: Task, settings: Settings, seed: int) -> Trainer:
    """Full fine-tuning from the linear probe (arXiv 2202.10054), with averages of its weights."""
    model = Classifier(task.pretrained.backbone, task.pretrained.head)
    trainer = Trainer(model, adamw(groups(model, settings["lr"])))
    averages = {
        f"ema {decay:g}": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        for decay in settings.get("ema", ())
    }

    def after_step() -> None:
        for average in averages.values():
            average.update_parameters(model)

    trainer.averages = {
        name: cast(Classifier, average.module) for name, average in averages.items()
    }
    trainer.after_step = after_step
    return trainer


def l2_sp(task: Task, settings: Settings, seed: int) -> Trainer:
    """LP-FT with a penalty `strength / 2 * |w - w0|^2` on the backbone (arXiv 1802.01483)."""
    trainer = lp_ft(task, settings, seed)
    weights = [parameter for _, parameter in trainer.model.trainable("backbone")]
    start = [weight.detach().clone() for weight in weights]

    def before_step() -> None:
        with torch.no_grad():
            pull = torch._foreach_sub([weight.detach() for weight in weights], start)
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            torch._foreach_add_(gradients, pull, alpha=settings["strength"])

    trainer.before_step = before_step
    trainer.extra_bytes = sum(tensor.nbytes for tensor in start)
    return trainer


def lora(task: Task, settings: Settings, seed: int) -> Trainer:
    """Low-rank updates of all matrices and pointwise filters (arXiv 2106.09685), by `peft`."""
    from peft import LoraConfig, inject_adapter_in_model

    model = Classifier(task.pretrained.backbone, task.pretrained.head)
    targets = [
        name
        for name, module in model.backbone.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]
    rank = settings["rank"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model.backbone
        )
    model.eval()  # as everywhere in the study: no dropout, BatchNorm frozen

    def finish() -> None:
        for name in targets:
            parent, _, child = name.rpartition(".")
            layer = model.backbone.get_submodule(name)
            layer.merge()
            setattr(model.backbone.get_submodule(parent), child, layer.get_base_layer())

    return Trainer(model, adamw(groups(model, settings["lr"])), finish=finish)


def gmixout(task: Task, settings: Settings, seed: int) -> Trainer:
    """LP-FT wrapped; all settings but lr are the wrapper's. Without any it has its defaults."""
    options = wrapper_options(settings, seed)
    return wrapped(task, settings, lambda base: GMixoutOptimizer(base, **options))


def random_masking(task: Task, settings: Settings, seed: int) -> Trainer:
    """One fixed random part of the weights is trained."""
    options = wrapper_options({"mask_prob": settings["mask_prob"]}, seed)
    return wrapped(task, settings, lambda base: GMixoutOptimizer.random_masking(base, **options))


def mixout(task: Task, settings: Settings, seed: int) -> Trainer:
    """Mixout (arXiv 1909.11299), High-rate Mixout (arXiv 2510.06955) from 0.8 on."""
    options = wrapper_options({"mask_prob": settings["mask_prob"]}, seed)
    return wrapped(task, settings, lambda base: GMixoutOptimizer.mixout(base, **options))


def wrapped(task: Task, settings: Settings, wrap: Callable[[AdamW], GMixoutOptimizer]) -> Trainer:
    """LP-FT with its optimizer wrapped.

    With "mixed": "matrices" in the settings the 1-D weights of the backbone (biases, norms) are
    trained as ever, with the head's learning rate.
    """
    model = Classifier(task.pretrained.backbone, task.pretrained.head)
    parameters = groups(model, settings["lr"])
    if settings.get("mixed") == "matrices":
        named = parameters[0]["params"]
        parameters[0]["params"] = [entry for entry in named if _is_matrix(entry[1])]
        vectors = [entry for entry in named if not _is_matrix(entry[1])]
        parameters.append({"params": vectors, "lr": HEAD_LR, "mask_prob": 0.0})
    optimizer = wrap(adamw(parameters))
    return Trainer(model, optimizer, finish=optimizer.consolidate)


def _is_matrix(parameter: Tensor) -> bool:
    return sum(size > 1 for size in parameter.shape) > 1 and parameter.shape[0] > 1


# Settings of a run that are not the wrapper's.
_OF_RUNS = ("lr", "steps", "mixed", "schedule", "change")


def wrapper_options(settings: Settings, seed: int) -> Settings:
    """What the wrapper is given."""
    own = {name: value for name, value in settings.items() if name not in _OF_RUNS}
    return {"exclude": "head.*", "seed": seed, **own}


METHODS: dict[str, Callable[[Task, Settings, int], Trainer]] = {
    method.__name__: method
    for method in (fine_tuning, lp_ft, l2_sp, lora, random_masking, mixout, gmixout)
}


def schedule(optimizer: torch.optim.Optimizer, steps: int, shape: str = "cosine") -> LambdaLR:
    """A tenth of the steps to warm up, then a cosine to zero.

    Args:
        shape: "cosine" or "constant", and with " without warm-up" behind it just that.
    """
    warm = 1 if shape.endswith(" without warm-up") else max(1, steps // 10)
    falls = shape.startswith("cosine")

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warm)
        return rise * 0.5 * (1 + math.cos(math.pi * step / steps)) if falls else rise

    return LambdaLR(optimizer, factor)


def interpolated(start: Classifier, end: Classifier, share: float) -> Classifier:
    """WiSE-FT (arXiv 2109.01903): `(1 - share) * start + share * end`, all weights."""
    return averaged([(start, 1 - share), (end, share)])


def averaged(models: list[tuple[Classifier, float]]) -> Classifier:
    """The weighted mean of models, weight by weight."""
    mean = Classifier(models[0][0].backbone, models[0][0].head)
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            parameter.copy_(
                sum(share * model.get_parameter(name) for model, share in models)  # type: ignore[arg-type]
            )
    return mean
