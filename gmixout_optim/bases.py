"""Facts about the optimizers that are wrapped, and how their steps are entered."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from numbers import Real
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim.shards import is_dtensor

Closure = Callable[[], Any]


def _of_torch(*names: str) -> tuple[type[Optimizer], ...]:
    """Classes of torch.optim by name, without those that this version of torch does not have."""
    kinds = (getattr(torch.optim, name, None) for name in names)
    return tuple(kind for kind in kinds if kind is not None)


# Optimizers whose update is element-wise: they may work on packed vectors. Each entry maps the
# state tensors that do not start at zero to what they start at, as a function of the parameter
# group.
ELEMENTWISE: dict[type[Optimizer], dict[str, Callable[[dict[str, Any]], float]]] = {
    torch.optim.Adadelta: {},
    torch.optim.Adagrad: {"sum": lambda group: group["initial_accumulator_value"]},
    torch.optim.Adam: {},
    torch.optim.AdamW: {},
    torch.optim.Adamax: {},
    torch.optim.ASGD: {},
    torch.optim.NAdam: {"mu_product": lambda group: 1.0},
    torch.optim.RAdam: {},
    torch.optim.RMSprop: {},
    torch.optim.Rprop: {},
    torch.optim.SGD: {},
}

# Optimizers known to need whole tensors, and why.
_REASONS = {
    "Adafactor": "its second moment is factored over the rows and columns of a matrix",
    "LBFGS": "it holds on to the model's parameters and treats them as one vector",
    "Muon": "it orthogonalises whole matrices",
}
NOT_ELEMENTWISE: dict[type[Optimizer], str] = {
    kind: reason for name, reason in _REASONS.items() for kind in _of_torch(name)
}

# Optimizers that cannot train mixed parameters at all, and why.
REFUSED: dict[type[Optimizer], str] = {
    torch.optim.SparseAdam: "it takes sparse gradients only, and a mask of a sparse gradient is "
    "not defined here; use torch.optim.Adam with dense gradients",
}

# Optimizers that do not take DTensors.
ONE_DEVICE = _of_torch("LBFGS", "Adafactor")

# Element-wise optimizers whose state starts at the learning rate of the step that creates it.
_STARTS_AT_LR = (torch.optim.ASGD, torch.optim.Rprop)

# Everything that they keep of a parameter. Entries under other names are somebody else's.
_OWN_KEYS = frozenset(
    {
        *("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
        *("square_avg", "grad_avg", "acc_delta", "sum", "ax", "eta", "mu", "mu_product"),
        *("prev", "step_size"),
    }
)

# State that is not per element, although its shape can be the parameter's (0-d, or one column).
SHARED_KEYS = frozenset({"step", "eta", "mu", "mu_product", "row_var", "col_var"})

# Optimizers that keep the state of all parameters under one of them, and step them at one rate.
_SHARED_STATE = (torch.optim.LBFGS,)


def has_rates(base: Optimizer) -> bool:
    """Whether parameters of one group could be stepped at different learning rates."""
    return not why_one_rate(base)


def why_one_rate(base: Optimizer) -> str:
    """Why the base cannot be shown different learning rates; "" where it can."""
    if type(base) in _SHARED_STATE:
        return "steps all weights at one rate"
    if not all(is_lr(group.get("lr")) for group in base.param_groups):
        return "finds its learning rate itself (a group has no number as lr)"
    return ""


def is_lr(lr: Any) -> bool:
    """Whether a group's learning rate is a number, or a tensor of one."""
    return isinstance(lr, Real | Tensor) and not isinstance(lr, bool)


def lr_is_zero(group: dict[str, Any]) -> bool:
    """Whether a group is not to move. A learning rate on a device is not waited for."""
    lr = group.get("lr")
    on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
    return not on_device and bool(lr == 0)


def follows_lr(base: Optimizer) -> bool:
    """Whether the base steps each parameter at the learning rate that its group has in that step.

    Rprop reads it once, when it creates its state, and ASGD a step ahead.
    """
    return has_rates(base) and not isinstance(base, _STARTS_AT_LR)


def inner_optimizers(base: Optimizer) -> dict[str, Optimizer]:
    """Optimizers of the same parameters that the base holds, by the name of its attribute."""
    inner: dict[str, Optimizer] = {}
    own = {id(param) for group in base.param_groups for param in group["params"]}
    for name, value in vars(base).items():
        if isinstance(value, dict):
            value = list(value.values())
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, Optimizer) and item is not base:
                params = [param for group in item.param_groups for param in group["params"]]
                if not own.isdisjoint(map(id, params)):
                    inner.setdefault(name, item)
    return inner


def has_modes(base: Optimizer) -> bool:
    """Whether the base itself swaps weights for evaluation, as schedule-free optimizers do."""
    return callable(getattr(base, "train", None)) and callable(getattr(base, "eval", None))


# Entering a step


def enter_step(base: Optimizer, closure: Closure | None = None) -> Any:
    """Runs the base's step with the base's own hooks; torch's global hooks fire for the wrapper."""
    args: tuple[Any, ...] = () if closure is None else (closure,)
    kwargs: dict[str, Any] = {}
    for pre_hook in base._optimizer_step_pre_hooks.values():
        if pre_hook is _refuse_step:
            continue
        changed = pre_hook(base, args, kwargs)
        if changed is not None:
            args, kwargs = changed
    _entered.add(id(base))
    try:
        loss = _step_without_hooks(base)(*args, **kwargs)
    finally:
        _entered.discard(id(base))
    for post_hook in base._optimizer_step_post_hooks.values():
        post_hook(base, args, kwargs)
    mark_stepped(base)
    return loss


def mark_stepped(base: Optimizer) -> None:
    """Tell a scheduler that was built on the base that a step came before its own."""
    base._opt_called = True  # type: ignore[attr-defined]


def step_is_its_own(base: Optimizer) -> bool:
    """Whether the base's step is that of its class, without hooks on this base and not patched."""
    hooks = [*base._optimizer_step_pre_hooks.values(), *base._optimizer_step_post_hooks.values()]
    return hooks == [_refuse_step] and _patched_step(base) is None


def is_guarded(base: Optimizer) -> bool:
    return _refuse_step in base._optimizer_step_pre_hooks.values()


def guard(base: Optimizer) -> None:
    """Refuse calls of a wrapped base that would bypass the wrapper."""
    if not is_guarded(base):
        base.register_step_pre_hook(_refuse_step)
        base.register_load_state_dict_pre_hook(_refuse_load)


# Bases that the library has entered: a step that calls its parent class's fires the hooks again.
_entered: set[int] = set()


def _refuse_step(base: Optimizer, *_: Any) -> None:
    if id(base) not in _entered:
        raise RuntimeError(
            f"step() of a {type(base).__name__} that is wrapped: call step() of the "
            "GMixoutOptimizer around it, which takes the base's step on the active weights"
        )


def _refuse_load(base: Optimizer, *_: Any) -> None:
    if id(base) in _entered:
        return
    raise RuntimeError(
        f"load_state_dict() of a {type(base).__name__} that is wrapped: load into the "
        "GMixoutOptimizer around it, or into the base before wrapping it"
    )


def _step_without_hooks(base: Optimizer) -> Callable[..., Any]:
    patched = _patched_step(base)
    if patched is not None:
        return patched
    step: Any = type(base).step
    return MethodType(step.__wrapped__ if getattr(step, "hooked", False) else step, base)


def _patched_step(base: Optimizer) -> Callable[..., Any] | None:
    """A step that somebody, but not a scheduler, set on this instance."""
    patched: Callable[..., Any] | None = base.__dict__.get("step")
    return None if hasattr(patched, "_wrapped_by_lr_sched") else patched


# What a base keeps in a state dict beside state and groups


def own_entries(base: Optimizer) -> dict[str, Any]:
    """What the base's own ``state_dict()`` adds to that of torch."""
    if type(base).state_dict is Optimizer.state_dict:
        return {}
    saved = base.state_dict()
    return {key: item for key, item in saved.items() if key not in ("state", "param_groups")}


def take_own_entries(base: Optimizer, entries: dict[str, Any]) -> None:
    """Have the base's own ``load_state_dict()`` take these; its state and groups stay."""
    groups, state = base.param_groups, base.state
    mappings: list[Any] = [*groups, state]
    contents = [dict(mapping) for mapping in mappings]
    _entered.add(id(base))
    try:
        base.load_state_dict({**Optimizer.state_dict(base), **entries})
    finally:
        _entered.discard(id(base))
        base.param_groups, base.state = groups, state
        for mapping, items in zip(mappings, contents, strict=True):
            mapping.clear()
            mapping.update(items)


# State


def is_own(base: Optimizer, key: str) -> bool:
    """Whether an entry of a parameter's state is the base's, as far as that is known."""
    return type(base) not in ELEMENTWISE or key in _OWN_KEYS


def per_cell_state(base: Optimizer, state: dict[str, Any], shape: torch.Size) -> set[str]:
    """The names of state tensors with one value for each element of a parameter of ``shape``.

    Quantised ones (tensor subclasses) are not among them: they hold a scale for many elements.
    """
    return {
        key
        for key, value in state.items()
        if (type(value) is Tensor or is_dtensor(value))
        and value.shape == shape
        and key not in SHARED_KEYS
        and is_own(base, key)
    }


def initial_state(base: Optimizer) -> dict[str, Any] | None:
    """The state that the base made of each parameter before its first step, to be made fresh from.

    Tensors are described by the number that they are filled with. None where there is no state, one
    that is known, or one that differs between parameters: the base has stepped, and makes it anew
    by itself.
    """
    entries = [base.state[param] for param in base.state if isinstance(param, Tensor)]
    if type(base) in ELEMENTWISE or not entries:
        return None
    initial = [{key: _filled_with(item) for key, item in entry.items()} for entry in entries]
    if any(each != initial[0] or None in each.values() or each.get("step") for each in initial):
        return None
    return initial[0] or None


def _filled_with(item: Any) -> Any:
    """The number that a tensor is filled with, None for several; anything else as it is."""
    if not isinstance(item, Tensor):
        return deepcopy(item)
    if type(item) is not Tensor or not item.numel() or bool((item != item.max()).any()):
        return None
    return item.max().item()


def renew_state(
    base: Optimizer,
    param: Tensor,
    group: dict[str, Any],
    shape: torch.Size,
    new_shape: torch.Size,
    initial: dict[str, Any] | None,
) -> list[tuple[Tensor, Any]]:
    """Make the base's state of one parameter fresh, after a redraw, but for filling its tensors.

    Tensors are the same ones where the shape of the per-cell tensors stays. A state whose fresh
    values are not known is dropped, and the base creates it anew.

    Args:
        initial: of :func:`initial_state`.

    Returns:
        the tensors still to be filled, each with a number, which callers do for many at once.
    """
    if type(base) in _SHARED_STATE:
        base.state.clear()
    state = base.state.get(param)
    if not state:
        return []
    fresh = initial
    if resets_in_place(base):
        starts = ELEMENTWISE[type(base)]
        fresh = {key: starts[key](group) if key in starts else 0.0 for key in state}
    if fresh is None:
        del base.state[param]
        return []
    fills: list[tuple[Tensor, Any]] = []
    per_cell = per_cell_state(base, state, shape)
    for key, value in list(state.items()):
        if not is_own(base, key):
            continue
        if key not in fresh:
            del state[key]
        elif isinstance(value, Tensor):
            if key in per_cell and shape != new_shape:
                state[key] = value = value.new_empty(new_shape)
            fills.append((value, fresh[key]))
        elif initial is not None:
            state[key] = deepcopy(fresh[key])
    return fills


def resets_in_place(base: Optimizer) -> bool:
    """Whether the base's state can be made fresh by writing known values into it."""
    # SGD's first momentum is the gradient undamped: only a missing buffer says so.
    damped = any(group.get("dampening") for group in base.param_groups)
    return type(base) in ELEMENTWISE and not isinstance(base, _STARTS_AT_LR) and not damped


def keeps_state(base: Optimizer, group: dict[str, Any]) -> bool:
    """Whether an element-wise base that has stepped has any state for a group's parameters."""
    return not isinstance(base, torch.optim.SGD) or group["momentum"] != 0
