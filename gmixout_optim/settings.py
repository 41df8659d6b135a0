"""The settings of a run: what each may be, checked before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Literal, get_args

from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim.bases import (
    ELEMENTWISE,
    NOT_ELEMENTWISE,
    ONE_DEVICE,
    REFUSED,
    follows_lr,
    has_modes,
    inner_optimizers,
    is_guarded,
    is_lr,
    why_one_rate,
)
from gmixout_optim.cells import Granularity
from gmixout_optim.index_sets import SAMPLERS, Sampler
from gmixout_optim.shards import is_dtensor
from gmixout_optim.warn import warn

ResidualName = Literal["episodic", "persistent"]
LayoutName = Literal["auto", "packed", "dense"]
GradLayout = Literal["dense", "packed", "active"]

# Under this name state and groups hold what is the wrapper's: tensors in the state and scalars in
# the groups, so that tools which know torch's format (torch.distributed.checkpoint) keep them.
KEY = "gmixout"

# Version of the state dict's format.
VERSION = 6

# What says how far a run is; its other settings must agree with those of a state dict.
COUNTERS = ("seed", "episode", "steps_in_episode")
PROGRESS = (*COUNTERS, "evaluating")


@dataclass(eq=False)
class Run:
    """The settings of a whole run and how far it is: one object for all groups and tensors.

    Attributes:
        base: name of the base's class.
        episode_warmup: the number of steps, "auto" being resolved.
        layout: "packed" or "dense", "auto" being resolved.
        evaluating: whether the model shows the weights to deploy, after eval().
        draws: counts the index sets that were drawn or loaded; it tells a gradient of another
            episode. Never saved, nor are gradients.
        shown: what groups show of the run, and state dicts save: a plain dict, for tools that copy
            groups or walk through them.
    """

    base: str
    residual: ResidualName
    rescale: bool
    lr_scale: float | Literal["auto"]
    sampler: Sampler
    layout: LayoutName
    resample_every: int | None
    episode_warmup: int
    stochastic_rounding: bool
    seed: int
    episode: int = 0
    steps_in_episode: int = 0
    evaluating: bool = False
    draws: int = 0
    shown: dict[str, Any] = field(default_factory=dict)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "shown":
            value.update(version=VERSION, **{key: getattr(self, key) for key in SAVED})
        elif "shown" in self.__dict__ and name in SAVED:
            self.shown[name] = value

    @property
    def episode_is_over(self) -> bool:
        return self.resample_every is not None and self.steps_in_episode >= self.resample_every

    def begin_episode(self) -> None:
        self.episode += 1
        self.steps_in_episode = 0
        self.draws += 1

    def go_on_from(self, saved: dict[str, Any]) -> None:
        """Take how far a saved run was."""
        for key in PROGRESS:
            setattr(self, key, saved[key])
        self.draws += 1


# What a state dict holds of a run.
SAVED = [each.name for each in fields(Run) if each.name not in ("draws", "shown")]


# Checks. Each names the argument, the value and what may stand there.


def _wrong_type(name: str, expected: str, value: Any) -> TypeError:
    return TypeError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}")


def _check_number(name: str, value: Any, expected: str = "a number") -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise _wrong_type(name, expected, value)
    return float(value)


def _check_int(name: str, value: Any, least: int, otherwise: str = "") -> int:
    """``otherwise``: what the argument may be besides an int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong_type(name, f"an int{otherwise}", value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}{otherwise}, got {value!r}")
    return value


def _check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, "a bool", value)
    return value


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> Any:
    if not isinstance(value, str):
        raise _wrong_type(name, "a string", value)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_mask_prob(value: Any) -> float:
    if not 0 <= _check_number("mask_prob", value) < 1:
        raise ValueError(
            f"mask_prob must be in [0, 1), got {value!r}: it is the probability that a weight sits "
            "at its anchor"
        )
    return float(value)


def check_anchor_decay(value: Any) -> float:
    if not 0 <= _check_number("anchor_decay", value) <= 1:
        raise ValueError(
            f"anchor_decay must be in [0, 1], got {value!r}: it is the weight of the old anchor in "
            "its moving average"
        )
    return float(value)


def check_granularity(value: Any) -> Granularity:
    if isinstance(value, str):
        if value not in ("element", "column", "row"):
            raise ValueError(
                "granularity must be 'element', 'column', 'row' or a number of elements, got "
                f"{value!r}"
            )
        return value  # type: ignore[return-value]
    return _check_int("granularity", value, 1, ", 'element', 'column' or 'row'")


def _check_lr_scale(value: Any) -> float | str:
    if value == "auto":
        return "auto"
    expected = "a positive number or 'auto'"
    if not 0 < _check_number("lr_scale", value, expected) < math.inf:
        raise ValueError(
            f"lr_scale must be {expected}, got {value!r}: active weights train with so many times "
            "their group's learning rate"
        )
    return float(value)


def _check_seed(value: Any) -> int:
    if _check_int("seed", value, 0) >= 2**63:
        raise ValueError(f"seed must be below 2**63, got {value!r}")
    return int(value)


_RUN_CHECKS: dict[str, Callable[[Any], Any]] = {
    "residual": lambda value: _check_choice("residual", value, get_args(ResidualName)),
    "rescale": lambda value: _check_flag("rescale", value),
    "lr_scale": _check_lr_scale,
    "sampler": lambda value: _check_choice("sampler", value, SAMPLERS),
    "layout": lambda value: _check_choice("layout", value, get_args(LayoutName)),
    "resample_every": lambda value: (
        None if value is None else _check_int("resample_every", value, 1, " or None for never")
    ),
    "episode_warmup": lambda value: (
        value if value == "auto" else _check_int("episode_warmup", value, 0, " or 'auto'")
    ),
    "stochastic_rounding": lambda value: _check_flag("stochastic_rounding", value),
    "seed": _check_seed,
}

_GROUP_CHECKS: dict[str, Callable[[Any], Any]] = {
    "mask_prob": check_mask_prob,
    "anchor_decay": check_anchor_decay,
    "granularity": check_granularity,
}


def check_group_keys(group: dict[str, Any]) -> dict[str, Any]:
    """The settings that a parameter group has for itself, checked."""
    return {key: check(group[key]) for key, check in _GROUP_CHECKS.items()}


def check_compile(value: Any) -> bool | Literal["auto"]:
    if value == "auto":
        return "auto"
    if not isinstance(value, bool):
        raise _wrong_type("compile", "a bool or 'auto'", value)
    return value


def _named(value: Any) -> str:
    """A value that may be long by its type."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_base(base: Any, wrapper: type[Optimizer]) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(
            f"base must be a torch.optim.Optimizer instance, got {_named(base)}: build it with the "
            "model's parameters first, as in "
            "GMixoutOptimizer(torch.optim.AdamW(model.named_parameters(), lr=1e-4))"
        )
    if isinstance(base, wrapper):
        raise TypeError("base is already a GMixoutOptimizer: wrap an optimizer once")
    kind = type(base).__name__
    for attribute, inner in inner_optimizers(base).items():
        what = type(inner).__name__
        if isinstance(inner, wrapper):
            raise TypeError(f"base={kind} is built around a GMixoutOptimizer already: use it alone")
        if base.state is inner.state:
            raise TypeError(
                f"base={kind} passes its steps on to {attribute}={what}, as optimizers do that a "
                f"framework has prepared: wrap {what} first, then call accelerator.prepare(), "
                "fabric.setup() and the like with the wrapper"
            )
        raise TypeError(
            f"base={kind} steps an optimizer of its own, {attribute}={what}, past the wrapper: "
            f"wrap that one, and build {kind} around the wrapper (docs/faq.md shows how)"
        )
    if not hasattr(base, "_optimizer_load_state_dict_pre_hooks"):
        raise TypeError(
            f"base={kind} has no hooks, which torch.optim.Optimizer.__init__() makes: call it in "
            f"the __init__() of {kind}"
        )
    if is_guarded(base):
        raise ValueError(
            f"base is held by another GMixoutOptimizer already: build a new {kind} to wrap"
        )
    if any(KEY in entry for entry in base.state.values() if isinstance(entry, dict)):
        raise ValueError(
            f"base={kind} has loaded the state of a GMixoutOptimizer, which does not fit it: load "
            f"that into the wrapper around a new {kind}"
        )
    if any(KEY in group for group in base.param_groups):
        raise ValueError(
            f"base={kind} was built from group dicts that another GMixoutOptimizer had, and wrote "
            "its settings into: build the groups anew, as mixout_param_groups() does"
        )


def make_run(base: Optimizer, **given: Any) -> Run:
    """The run of a wrapped base, its settings checked."""
    run = Run(base=type(base).__name__, **{key: _RUN_CHECKS[key](given[key]) for key in given})
    if run.episode_warmup == "auto":  # type: ignore[comparison-overlap]
        starts_fresh = run.residual == "episodic" and follows_lr(base)
        run.episode_warmup = (run.resample_every or 0) if starts_fresh else 0
    if run.episode_warmup == 1:  # one step is none: a state dict has one name for it
        run.episode_warmup = 0
    return run


def resolve_layout(base: Optimizer, run: Run, mixed: Sequence[Tensor]) -> LayoutName:
    """``"packed"`` or ``"dense"`` for ``"auto"``; an error for what cannot work."""
    kind, name = type(base), type(base).__name__
    if mixed:
        _check_base_can_mix(base, run)
    if kind in ONE_DEVICE and any(map(is_dtensor, mixed)):
        raise ValueError(
            f"base={name} cannot train DTensors, neither wrapped nor alone: "
            f"{NOT_ELEMENTWISE[kind]}; use another optimizer, or DistributedDataParallel"
        )
    if run.layout == "packed" and kind in NOT_ELEMENTWISE:
        raise ValueError(
            f"layout='packed' does not fit base={name}: {NOT_ELEMENTWISE[kind]}; use layout='dense'"
        )
    has_complex = any(param.is_complex() for param in mixed)
    if run.layout == "packed" and has_complex:
        raise TypeError(
            "layout='packed' does not take complex parameters: use layout='dense', or exclude them"
        )
    if run.residual == "persistent":  # all of U is trained: there is nothing to pack
        return "dense"
    if run.layout == "auto":
        return "packed" if kind in ELEMENTWISE and not has_complex else "dense"
    return run.layout


def _check_base_can_mix(base: Optimizer, run: Run) -> None:
    kind, name = type(base), type(base).__name__
    if any(group.get("differentiable") for group in base.param_groups):
        raise ValueError(
            f"base={name} has differentiable=True: a step on mixed parameters cannot be "
            "differentiated through"
        )
    if has_modes(base):
        raise ValueError(
            f"base={name} has train() and eval(): it keeps weights of its own to evaluate, and "
            "which of the two would be deployed is not defined; use it alone, or wrap an optimizer "
            "without them"
        )
    given = {"lr_scale": run.lr_scale not in ("auto", 1), "episode_warmup": run.episode_warmup > 0}
    one_rate = why_one_rate(base)
    for argument in [key for key, is_given in given.items() if is_given and one_rate]:
        raise ValueError(
            f"{argument}={getattr(run, argument)!r} does not fit base={name}, which {one_rate}: "
            "leave it out, and set or schedule the base's lr"
        )
    loses = run.lr_scale == "auto" and run.residual == "episodic" and not run.rescale
    if loses and not all(is_lr(group.get("lr")) for group in base.param_groups):
        warn(
            f"base={name} {one_rate}: mixed weights train at that rate in a share of the steps, "
            "and go less far than with the base alone. Give it a number as lr, or say "
            "lr_scale=1.0 if this is meant"
        )
    if kind in REFUSED:
        raise ValueError(f"base={name} cannot train mixed parameters: {REFUSED[kind]}")


def check_grad_layout(run: Run, value: Any) -> GradLayout:
    """Raise where an argument does not fit the layout."""
    grad_layout: GradLayout = _check_choice("grad_layout", value, get_args(GradLayout))
    if run.layout == "packed":
        return grad_layout
    reason = (
        "residual='persistent' works on whole tensors"
        if run.residual == "persistent"
        else f"base={run.base} works on whole tensors here (layout='dense')"
    )
    if grad_layout != "dense":
        raise ValueError(
            f"grad_layout={grad_layout!r} needs layout='packed': {reason}, and so it needs whole "
            "gradients; use grad_layout='dense'"
        )
    if run.stochastic_rounding:
        raise ValueError(
            f"stochastic_rounding=True needs layout='packed': {reason}, in the parameters' own "
            "dtype, and there is nothing to round; use stochastic_rounding=False"
        )
    return grad_layout


def check_saved_run(saved: dict[str, Any], run: Run, where: str) -> None:
    """Raise where a saved run is damaged, or has other settings than this one."""
    if saved.get("version") != VERSION:
        raise ValueError(
            f"state_dict has format version {saved.get('version')!r}, this library reads versions "
            f"up to {VERSION}"
        )
    for key in PROGRESS:
        value = saved.get(key)
        fits = type(value) is int and value >= 0 if key in COUNTERS else type(value) is bool
        if not fits:
            raise ValueError(f"state_dict has {key}={value!r} in {where}: it is damaged")
    k = run.resample_every
    if saved["seed"] >= 2**63 or (k is not None and saved["steps_in_episode"] >= k):
        raise ValueError(
            f"state_dict has seed={saved['seed']} and steps_in_episode={saved['steps_in_episode']} "
            f"in {where}, of resample_every={k}: it is damaged"
        )
    for key in SAVED:
        own = getattr(run, key)
        if key not in PROGRESS and saved.get(key) != own:
            raise ValueError(
                f"state_dict has {key}={saved.get(key)!r}, this optimizer {key}={own!r}: build it "
                "with the settings of the run that was saved"
            )


# What each version of the format added, with the value that runs saved before it had. Version 5
# changed what the dense layout keeps, 6 gave vectors of Bernoulli sets one size in all episodes.
_ADDED: dict[int, dict[str, Any]] = {
    2: {"stochastic_rounding": False},
    3: {"lr_scale": 1.0},
    4: {"episode_warmup": 0},
}


def up_to_date(run: dict[str, Any]) -> dict[str, Any]:
    """What a state dict says of its run, in the present format."""
    version: Any = run.get("version")
    if version not in range(1, VERSION):
        return run
    for newer in range(version + 1, VERSION + 1):
        run = {**run, **_ADDED.get(newer, {})}
    if run.get("carry_state"):
        raise ValueError(
            "state_dict was saved with carry_state=True, which is no longer there: it gained "
            "nothing, and with some optimizers it started weights at wrong states. Finish that run "
            "with the version of the library that began it, or start a new one from its weights"
        )
    lr_scale = run.get("lr_scale")
    return {**run, "version": VERSION, "lr_scale": "auto" if lr_scale is None else lr_scale}
