"""The learning rate of mixed weights, and how the base is shown it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim.bases import is_lr
from gmixout_optim.shards import mesh_of


@dataclass(frozen=True)
class Rates:
    """How many times its group's learning rate a mixed tensor trains with.

    Attributes:
        lr_scale: of the constructor: the full rate, or "auto".
        warmup: steps of an episode over which the rate rises to the full one; 0 for none.
        resample_every: k.
        keeps_size: whether what is learned keeps its size (rescaling, the persistent residual, a
            base with one rate for all), so that "auto" is 1 on the average. Else it is 1 / d, with
            which an output moves as far as in dense training; where all weights of an output are
            active at once, it is 1 / sqrt(d).
    """

    lr_scale: float | Literal["auto"]
    warmup: int
    resample_every: int | None
    keeps_size: bool

    def full(self, density: float, of_outputs: bool) -> float:
        """The rate after the warm-up.

        Args:
            density: d, as drawn.
            of_outputs: whether all weights of an output are active at once.
        """
        if self.lr_scale != "auto":
            return self.lr_scale
        average = 1.0 if self.keeps_size else density ** (-0.5 if of_outputs else -1.0)
        return average / self._mean_risen

    def risen(self, steps_in_episode: int) -> float:
        """The share of the full rate in the step that comes after so many in the episode."""
        return min(1.0, (steps_in_episode + 1) / max(1, self.warmup))

    @cached_property
    def _mean_risen(self) -> float:
        """The share of the full rate that the steps of an episode have on the average."""
        w, k = self.warmup, self.resample_every
        if w < 2 or k is None:
            return 1.0
        rising = min(w, k)
        return (rising * (rising + 1) / (2 * w) + k - rising) / k


def scaled_lr(lr: Any, rate: float) -> Any:
    """A group's learning rate, a number or a tensor, times ``rate``; anything else as it is."""
    if not is_lr(lr) or rate == 1:
        return lr
    return rate * (lr if isinstance(lr, Tensor) else float(lr))


@contextmanager
def shown_groups(
    base: Optimizer,
    rates: Mapping[Tensor, float],
    lent: Mapping[Tensor, Tensor | None] | None = None,
) -> Iterator[None]:
    """Inside the block the base's groups hold what it is to step, at the rates for it.

    A group whose parameters train at several rates is shown as several groups, and so is one with
    plain tensors and DTensors, or with those of several meshes: torch's optimizers do not step
    these together. If the base changes its lr, the change persists.

    Args:
        rates: how many times its group's learning rate a parameter trains with, 1 where it is
            missing.
        lent: what is shown in place of a parameter; None hides it.
    """
    lent = lent or {}
    groups = base.param_groups
    kept = [(group, _lists(base, group), group.get("lr")) for group in groups]
    shown: list[dict[str, Any]] = []
    # What each group's own dict shows as its learning rate, times what, and the tensor's version.
    first: list[tuple[Any, float, int]] = []
    for group, lists, lr in kept:
        parts: dict[tuple[float, Any], list[int]] = {}
        for place, param in enumerate(lists["params"]):
            given = lent.get(param, param)
            if given is not None:
                kind = rates.get(param, 1.0), mesh_of(given)
                parts.setdefault(kind, []).append(place)
        for number, ((rate, _), places) in enumerate(parts.items() or [((1.0, None), [])]):
            part = {**group} if number else group
            part.update({key: [items[place] for place in places] for key, items in lists.items()})
            part["params"] = [lent.get(param, param) for param in part["params"]]
            if lr is not None:
                part["lr"] = scaled_lr(lr, rate)
            if not number:
                first.append((group.get("lr"), rate, _version(group.get("lr"))))
            shown.append(part)
    groups[:] = shown
    try:
        yield
    finally:
        base.param_groups = groups
        groups[:] = [group for group, _, _ in kept]
        for (group, lists, lr), (scaled, rate, version) in zip(kept, first, strict=True):
            group.update(lists)
            if lr is not None and group.get("lr") is not scaled:
                group["lr"] = scaled_lr(group["lr"], 1 / rate)
            elif lr is not None:
                if scaled is not lr and _version(scaled) != version:  # changed in place
                    lr.copy_(scaled / rate)
                group["lr"] = lr


def _lists(base: Optimizer, group: dict[str, Any]) -> dict[str, list[Any]]:
    """What a group has for each of its parameters: these, names, and lists of the same length.

    Lists of numbers may be hyperparameters, unless there are other lists beside them.
    """
    count = len(group["params"])
    lists = {
        key: item
        for key, item in group.items()
        if isinstance(item, list) and len(item) == count and key not in base.defaults
    }
    numbers = {key for key, item in lists.items() if all(isinstance(each, Real) for each in item)}
    if lists.keys() - numbers <= {"params", "param_names"}:
        lists = {key: item for key, item in lists.items() if key not in numbers}
    return lists


def _version(lr: Any) -> int:
    return lr._version if isinstance(lr, Tensor) else 0
