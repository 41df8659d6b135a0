"""The settings of the wrapper: what each may be, checked before anything is changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, Literal, get_args

from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim.bases import (
    ELEMENTWISE,
    NOT_ELEMENTWISE,
    REFUSED,
    follows_lr,
    has_modes,
    has_rates,
)
from gmixout_optim.index_sets import MAX_CELLS, SAMPLERS
from gmixout_optim.layout import KEY
from gmixout_optim.mixed_tensor import Granularity, MixedTensor, cell_grid

Residual = Literal["episodic", "persistent"]
LayoutName = Literal["auto", "packed", "dense"]
GradLayout = Literal["dense", "packed"]

# Of the state dict's format.
VERSION = 4


def check_mask_prob(value: Any) -> float:
    _check_number("mask_prob", value)
    if not 0 <= value < 1:
        raise ValueError(
            f"mask_prob must be in [0, 1), got {value!r}: it is the probability that a weight sits at its anchor"
        )
    return float(value)


def check_anchor_decay(value: Any) -> float:
    _check_number("anchor_decay", value)
    if not 0 <= value <= 1:
        raise ValueError(
            f"anchor_decay must be in [0, 1], got {value!r}: it is the weight of the old anchor in its moving average"
        )
    return float(value)


def check_granularity(value: Any) -> Granularity:
    if isinstance(value, str):
        if value not in ("element", "row"):
            raise ValueError(
                f"granularity must be 'element', 'row' or a number of elements, got {value!r}"
            )
        return value  # type: ignore[return-value]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f"granularity must be 'element', 'row' or an int, got {value!r} of type {type(value).__name__}"
        )
    if value < 1:
        raise ValueError(f"granularity must be at least 1 element, got {value!r}")
    return value


def check_resample_every(value: Any) -> int | None:
    return _check_steps("resample_every", value, least=1, hint="None never resamples")


def check_lr_scale(value: Any) -> float | None:
    if value is None:
        return None
    _check_number("lr_scale", value)
    if not 0 < value < math.inf:
        raise ValueError(
            f"lr_scale must be a positive number, got {value!r}: active weights train with so many times their group's "
            "learning rate; None chooses it by mask_prob"
        )
    return float(value)


def lr_scale_of(run: dict[str, Any], base: Optimizer, mask_prob: float) -> float:
    """How many times its group's learning rate a mixed tensor trains with, once an episode is warm.

    The default is 1 / (1 - p) on the average over an episode's steps, or 1.
    """
    if run["lr_scale"] is not None:
        scale: float = run["lr_scale"]
        return scale
    # Rescaling and the persistent residual keep what is learned as large as it is.
    as_large = run["rescale"] or run["residual"] == "persistent" or not has_rates(base)
    average = 1.0 if as_large else 1 / (1 - mask_prob)
    return average / _mean_warmth(run["episode_warmup"], run["resample_every"])


def _mean_warmth(warmup: int, k: int | None) -> float:
    """The share of the full learning rate that an episode of ``k`` steps has on the average."""
    if warmup < 2 or k is None:
        return 1.0
    rising = min(warmup, k)
    return (rising * (rising + 1) / (2 * warmup) + k - rising) / k


def check_episode_warmup(value: Any) -> int | None:
    hint = "0 begins at the full learning rate"
    return _check_steps("episode_warmup", value, least=0, hint=hint)


def resolve_episode_warmup(run: dict[str, Any], base: Optimizer) -> int:
    """Steps that the learning rate rises over in each episode; for None all of them, where an episode begins anew."""
    steps: int | None = run["episode_warmup"]
    if steps is None:
        begins_anew = run["residual"] == "episodic" and follows_lr(base)
        steps = (run["resample_every"] or 0) if begins_anew else 0
    return steps if steps > 1 else 0  # one step is none: a state dict has one name for it


def check_seed(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"seed must be an int, got {value!r} of type {type(value).__name__}")
    if not 0 <= value < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {value!r}")
    return value


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} of type {type(value).__name__}")
    return value


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r} of type {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_base(base: Any, wrapper: type[Optimizer]) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(
            f"base must be a torch.optim.Optimizer instance, got {base!r} of type {type(base).__name__}: build it "
            "with the model's parameters first"
        )
    if isinstance(base, wrapper):
        raise TypeError(f"base is already a {wrapper.__name__}: wrap an optimizer once")
    if any(KEY in group for group in base.param_groups):
        raise ValueError(
            f"base is held by another {wrapper.__name__} already: build a new {type(base).__name__} to wrap"
        )


def check_run(
    *,
    base: str,
    residual: Any,
    rescale: Any,
    lr_scale: Any,
    episode_warmup: Any,
    sampler: Any,
    layout: Any,
    carry_state: Any,
    resample_every: Any,
    stochastic_rounding: Any,
    seed: Any,
) -> dict[str, Any]:
    """The settings of the whole run and how far it is: shared by all groups, and in every state dict."""
    return {
        "version": VERSION,
        "base": base,
        "residual": _check_choice("residual", residual, get_args(Residual)),
        "rescale": check_flag("rescale", rescale),
        "lr_scale": check_lr_scale(lr_scale),
        "sampler": _check_choice("sampler", sampler, SAMPLERS),
        "layout": _check_choice("layout", layout, get_args(LayoutName)),
        "carry_state": check_flag("carry_state", carry_state),
        "resample_every": check_resample_every(resample_every),
        "episode_warmup": check_episode_warmup(episode_warmup),
        "stochastic_rounding": check_flag("stochastic_rounding", stochastic_rounding),
        "seed": check_seed(seed),
        "episode": 0,
        "steps_in_episode": 0,
        "evaluating": False,
    }


def check_exclude(value: Any, groups: list[dict[str, Any]]) -> tuple[str, ...]:
    """The patterns, which must be able to match: against named parameters, and at least one of them."""
    patterns = check_patterns("exclude", value)
    if not patterns:
        return patterns
    if any("param_names" not in group for group in groups):
        raise ValueError(
            f"exclude={value!r} needs parameter names: build the base from model.named_parameters()"
        )
    names = [name for group in groups for name in group["param_names"]]
    unused = unmatched(patterns, names)
    message = (
        f"exclude={value!r}: no parameter matches {unused}; names are like {names[:3]}, and 'head.*' matches all "
        "parameters of the module 'head'"
    )
    if len(unused) == len(patterns):
        raise ValueError(message)
    if unused:
        warnings.warn(message, stacklevel=3)
    return patterns


def unmatched(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The glob patterns that match none of the names."""
    return [pattern for pattern in patterns if not any(fnmatchcase(n, pattern) for n in names)]


def check_patterns(argument: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, str | Sequence) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{argument} must be a glob pattern or a sequence of them, got {value!r}")
    return (value,) if isinstance(value, str) else tuple(value)


_GROUP_CHECKS = {
    "mask_prob": check_mask_prob,
    "anchor_decay": check_anchor_decay,
    "granularity": check_granularity,
}


def check_group_keys(group: dict[str, Any]) -> dict[str, Any]:
    """The settings that a group has for itself, checked."""
    return {key: check(group[key]) for key, check in _GROUP_CHECKS.items()}


def check_groups_still_fit(
    groups: Sequence[dict[str, Any]], run: dict[str, Any], mixed: Iterable[MixedTensor]
) -> None:
    """Raise where a group was changed in what is fixed, or to an impossible ``anchor_decay``."""
    for number, group in enumerate(groups):
        if group.get(KEY) is not run:
            raise RuntimeError(
                f"parameter group {number} was added or replaced past the wrapper: use add_param_group() and "
                "load_state_dict() of the GMixoutOptimizer"
            )
        check_anchor_decay(group["anchor_decay"])
    for tensor in mixed:
        group = tensor.group
        if group["mask_prob"] != tensor.mask_prob or group["granularity"] != tensor.granularity:
            raise ValueError(
                f"mask_prob={group['mask_prob']!r} and granularity={group['granularity']!r} in the group of "
                f"{tensor.name} differ from the {tensor.mask_prob!r} and {tensor.granularity!r} that it was wrapped "
                "with: they are fixed; wrap a new base to change them"
            )


def resolve_layout(base: Optimizer, run: dict[str, Any], mixed: Sequence[Tensor]) -> str:
    """``"packed"`` or ``"dense"`` for ``"auto"``; an error for what cannot work."""
    layout: str = run["layout"]
    kind, name, lr_scale = type(base), type(base).__name__, run["lr_scale"]
    if mixed and any(group.get("differentiable") for group in base.param_groups):
        raise ValueError(
            f"base={name} has differentiable=True: a step on mixed parameters cannot be differentiated through"
        )
    if mixed and has_modes(base):
        raise ValueError(
            f"base={name} has train() and eval(): it keeps weights of its own to evaluate, and which of the two would be "
            "deployed is not defined; use it alone, or wrap an optimizer without them"
        )
    if mixed and lr_scale not in (None, 1) and not has_rates(base):
        raise ValueError(
            f"lr_scale={lr_scale!r} does not fit base={name}, which steps all weights at one rate: leave it out, and set "
            "the base's lr"
        )
    if mixed and run["episode_warmup"] and not has_rates(base):
        raise ValueError(
            f"episode_warmup={run['episode_warmup']!r} does not fit base={name}, which steps all weights at one rate: "
            "leave it out, and use a scheduler"
        )
    if mixed and kind in REFUSED:
        raise ValueError(f"base={name} cannot train mixed parameters: {REFUSED[kind]}")
    if layout == "packed" and kind in NOT_ELEMENTWISE:
        raise ValueError(
            f"layout='packed' does not fit base={name}: {NOT_ELEMENTWISE[kind]}; use layout='dense'"
        )
    has_complex = any(param.is_complex() for param in mixed)
    if layout == "packed" and has_complex:
        raise TypeError(
            "layout='packed' does not take complex parameters: use layout='dense', or exclude them"
        )
    if run["residual"] == "persistent":
        # Its coordinates are all of U, whatever the optimizer: there is nothing to pack.
        return "dense"
    if layout == "auto":
        return "packed" if kind in ELEMENTWISE and not has_complex else "dense"
    return layout


def check_needs_packed(base: Optimizer, run: dict[str, Any], grad_layout: Any) -> bool:
    """Whether gradients are packed; raise where what was asked for is not to be had in a dense layout."""
    packed = _check_choice("grad_layout", grad_layout, get_args(GradLayout)) == "packed"
    if run["layout"] == "packed":
        return packed
    reason = (
        "residual='persistent' works on whole tensors"
        if run["residual"] == "persistent"
        else f"base={type(base).__name__} works on whole tensors here (layout='dense')"
    )
    if packed:
        raise ValueError(
            f"grad_layout='packed' needs layout='packed': {reason}, and so it needs whole gradients; use "
            "grad_layout='dense'"
        )
    if run["stochastic_rounding"]:
        raise ValueError(
            f"stochastic_rounding=True needs layout='packed': {reason}, in the parameters' own dtype, and there is "
            "nothing to round; use stochastic_rounding=False"
        )
    return packed


def check_parameter(name: str, param: Tensor, granularity: Granularity) -> None:
    """Raise for a parameter that cannot be mixed."""
    if type(param).__name__ == "DTensor" or hasattr(param, "device_mesh"):
        raise TypeError(
            f"{name} is a DTensor: sharded parameters (FSDP2, tensor parallel) cannot be mixed yet; give its group "
            "mask_prob=0, or use DistributedDataParallel"
        )
    if param.layout is not None and str(param.layout) != "torch.strided":
        raise TypeError(f"{name} has layout {param.layout}: only strided parameters can be mixed")
    cells, _ = cell_grid(param.shape, granularity)
    if cells > MAX_CELLS:
        raise ValueError(
            f"{name} has {cells} cells at granularity={granularity!r}, more than {MAX_CELLS}: use a coarser granularity"
        )


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")


def _check_steps(name: str, value: Any, *, least: int, hint: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f"{name} must be an int or None, got {value!r} of type {type(value).__name__}"
        )
    if value < least:
        unit = "step" if least == 1 else "steps"
        raise ValueError(f"{name} must be at least {least} {unit}, got {value!r}; {hint}")
    return value
