"""Name patterns, and parameter groups for the base optimizer that say what is mixed."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from gmixout_optim.settings import check_mask_prob
from gmixout_optim.warn import warn

# Their weights are scales and shifts, whatever their shape.
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)

# Segments that wrappers of modules put into names: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(name: str) -> str:
    """A parameter's name without what wrappers of its module add to it."""
    segments = [segment for segment in name.split(".") if segment not in _WRAPPERS]
    # DataParallel, DistributedDataParallel and AveragedModel keep the model as "module".
    while len(segments) > 1 and segments[0] == "module":
        del segments[0]
    return ".".join(segments)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name, with or without what wrappers add to it, matches one of the glob patterns."""
    names = {name, unwrapped(name)}
    return any(fnmatchcase(each, pattern) for each in names for pattern in patterns)


def check_patterns(argument: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, str | Sequence) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{argument} must be a glob pattern or a sequence of them, got {value!r}")
    return (value,) if isinstance(value, str) else tuple(value)


def check_exclude(value: Any, groups: list[dict[str, Any]]) -> tuple[str, ...]:
    """The patterns, at least one of which must match a named parameter."""
    patterns = check_patterns("exclude", value)
    if not patterns:
        return patterns
    if any("param_names" not in group for group in groups):
        raise ValueError(
            f"exclude={value!r} needs parameter names: build the base from model.named_parameters()"
        )
    names = [name for group in groups for name in group["param_names"]]
    unused = _unmatched(patterns, names)
    message = (
        f"exclude={value!r}: no parameter matches {unused}; names are like {names[:3]}, and "
        "'head.*' matches all parameters of the module 'head'"
    )
    if len(unused) == len(patterns):
        raise ValueError(message)
    if unused:
        warn(message)
    return patterns


def _unmatched(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The patterns that match none of the names."""
    return [pattern for pattern in patterns if not any(matches(name, [pattern]) for name in names)]


def mixout_param_groups(
    model: nn.Module,
    *,
    mask_prob: float = 0.9,
    head: str | Sequence[str] = (),
    weight_decay: float = 0.0,
    exclude: str | Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Groups for the base optimizer: matrices and filters mixed, everything else trained as ever.

    Args:
        model: the model; each of its parameters that require a gradient lands in exactly one group.
        mask_prob: p of the mixed group, in [0, 1).
        head: glob patterns of freshly initialised layers, such as ``"head.*"``: not mixed.
        weight_decay: of all tensors of two or more dimensions; the others (biases, norms) get none.
        exclude: glob patterns of further parameters not to mix.

    Returns:
        up to three groups of ``(name, parameter)`` pairs, with ``mask_prob`` and ``weight_decay``
        set: mixed tensors, unmixed tensors of two or more dimensions, unmixed tensors of fewer and
        those of norms. Empty groups are left out.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``mask_prob`` out of range, or a pattern that matches no parameter.

    Example::

        groups = mixout_param_groups(model, head="head.*", weight_decay=0.05)
        optimizer = GMixoutOptimizer(torch.optim.AdamW(groups, lr=1e-4))
    """
    mask_prob = check_mask_prob(mask_prob)
    patterns = (*check_patterns("head", head), *check_patterns("exclude", exclude))
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    all_names = [name for name, _ in model.named_parameters()]
    for pattern in _unmatched(patterns, all_names):
        raise ValueError(
            f"head/exclude pattern {pattern!r} matches no parameter of the model; its names look "
            f"like {', '.join(map(repr, all_names[:3]))}"
        )
    of_norms = {
        param
        for module in model.modules()
        if isinstance(module, _NORMS)
        for param in module.parameters(recurse=False)
    }
    thin = [(n, p) for n, p in named if p.ndim < 2 or p in of_norms]
    others = [(n, p) for n, p in named if p.ndim >= 2 and p not in of_norms]
    mixed = [(n, p) for n, p in others if not matches(n, patterns)]
    wide = [(n, p) for n, p in others if matches(n, patterns)]
    groups: list[dict[str, Any]] = [
        {"params": mixed, "mask_prob": mask_prob, "weight_decay": weight_decay},
        {"params": wide, "mask_prob": 0.0, "weight_decay": weight_decay},
        {"params": thin, "mask_prob": 0.0, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
