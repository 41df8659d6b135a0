"""Parameter groups for the base optimizer that say what is mixed."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from gmixout_optim.settings import check_mask_prob, check_patterns, unmatched

# Their weights are scales and shifts, whatever their shape.
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter's name matches one of the glob patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


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
        weight_decay: for all tensors of two or more dimensions; the others (biases, norms) get none.
        exclude: glob patterns of further parameters not to mix.

    Returns:
        up to three groups of ``(name, parameter)`` pairs, with ``mask_prob`` and ``weight_decay`` set: mixed
        tensors, unmixed tensors of two or more dimensions, unmixed tensors of fewer and those of norms. Empty
        groups are left out.

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
    for pattern in unmatched(patterns, all_names):
        raise ValueError(
            f"head/exclude pattern {pattern!r} matches no parameter of the model; its names look like "
            f"{', '.join(map(repr, all_names[:3]))}"
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
