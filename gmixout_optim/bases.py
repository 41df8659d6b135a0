"""What the library knows about the optimizers it wraps, and how it enters their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Closure = Callable[[], Any]
Fresh = Callable[[dict[str, Any]], float | Tensor]


# Optimizers whose update is element-wise: they may work on packed vectors. Each entry maps the state tensors
# that do not start at zero to what they start at, as a function of the parameter group.
ELEMENTWISE: dict[type[Optimizer], dict[str, Fresh]] = {
    torch.optim.Adadelta: {},
    torch.optim.Adagrad: {"sum": lambda group: group["initial_accumulator_value"]},
    torch.optim.Adam: {},
    torch.optim.AdamW: {},
    torch.optim.Adamax: {},
    torch.optim.ASGD: {"eta": lambda group: group["lr"], "mu": lambda group: 1.0},
    torch.optim.NAdam: {"mu_product": lambda group: 1.0},
    torch.optim.RAdam: {},
    torch.optim.RMSprop: {},
    torch.optim.Rprop: {"step_size": lambda group: group["lr"]},
    torch.optim.SGD: {},
}

# Optimizers known to need whole tensors, and why.
NOT_ELEMENTWISE: dict[type[Optimizer], str] = {
    torch.optim.Adafactor: "its second moment is factored over the rows and columns of a matrix",
    torch.optim.LBFGS: "it holds on to the model's parameters and treats them as one vector",
    torch.optim.Muon: "it orthogonalises whole matrices",
}

# Optimizers that cannot train mixed parameters at all, and why.
REFUSED: dict[type[Optimizer], str] = {
    torch.optim.SparseAdam: "it takes sparse gradients only, and a mask of a sparse gradient is not defined here; "
    "use torch.optim.Adam with dense gradients",
}

# Element-wise optimizers whose state begins at the learning rate of the step that makes it.
_BEGINS_AT_LR: tuple[type[Optimizer], ...] = (torch.optim.ASGD, torch.optim.Rprop)

# State that is not per element, although its shape can be the parameter's (without dimensions, or with one column).
_SHARED_KEYS = frozenset({"step", "eta", "mu", "mu_product", "row_var", "col_var"})

# Optimizers that keep the state of all parameters under one of them.
_SHARED_STATE: tuple[type[Optimizer], ...] = (torch.optim.LBFGS,)


def enter_step(base: Optimizer, closure: Closure | None = None) -> Any:
    """The base's ``step`` with the base's own hooks, beneath torch's global ones.

    Global step hooks belong to the step that the user called, the wrapper's: entered from above they would
    fire twice.
    """
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
        loss = _step_beneath_hooks(base)(*args, **kwargs)
    finally:
        _entered.discard(id(base))
    for post_hook in base._optimizer_step_post_hooks.values():
        post_hook(base, args, kwargs)
    mark_stepped(base)
    return loss


def has_rates(base: Optimizer) -> bool:
    """Whether parameters of one group could be stepped at different learning rates."""
    return type(base) not in _SHARED_STATE


def follows_lr(base: Optimizer) -> bool:
    """Whether the base steps at the learning rate of the step, for each parameter at its own.

    Rprop reads it once, when it makes its state, and ASGD a step ahead.
    """
    return has_rates(base) and not isinstance(base, _BEGINS_AT_LR)


def scaled_lr(lr: Any, scale: float) -> Any:
    """A group's learning rate, a number or a tensor, times ``scale``; anything else as it is."""
    is_rate = isinstance(lr, int | float | Tensor) and not isinstance(lr, bool)
    return lr * scale if is_rate and scale != 1 else lr


@contextmanager
def scaled_rates(base: Optimizer, scales: dict[Tensor, float]) -> Iterator[None]:
    """Inside the block these parameters train with so many times their group's learning rate.

    A group that holds parameters of several scales is shown to the base as so many groups. What the base
    itself makes of a learning rate, it reads in its next step.
    """
    groups = base.param_groups
    kept = [(group, group["params"], group.get("lr")) for group in groups]
    shown: list[dict[str, Any]] = []
    lent: list[tuple[Any, float]] = []
    for group, params, lr in kept:
        by_scale: dict[float, list[Tensor]] = {}
        for param in params:
            by_scale.setdefault(scales.get(param, 1.0), []).append(param)
        parts = list(by_scale.items()) or [(1.0, params)]
        for number, (scale, own) in enumerate(parts):
            part = {**group} if number else group
            part["params"] = own
            if lr is not None:
                part["lr"] = scaled_lr(lr, scale)
            shown.append(part)
        lent.append((group.get("lr"), parts[0][0]))
    base.param_groups = shown
    try:
        yield
    finally:
        base.param_groups = groups
        for (group, params, lr), (scaled, scale) in zip(kept, lent, strict=True):
            group["params"] = params
            if lr is not None:
                changed = group.get("lr")
                group["lr"] = lr if changed is scaled else scaled_lr(changed, 1 / scale)


def mark_stepped(base: Optimizer) -> None:
    """A scheduler that was built on the base looks here for a step before its own."""
    base._opt_called = True  # type: ignore[attr-defined]


def guard(base: Optimizer) -> None:
    """Refuse calls of a wrapped base that would go past the wrapper."""
    if _refuse_step not in base._optimizer_step_pre_hooks.values():
        base.register_step_pre_hook(_refuse_step)
        base.register_load_state_dict_pre_hook(_refuse_load)


# The bases in whose step the wrapper is. A step that calls its parent class's fires the hooks again.
_entered: set[int] = set()


def _refuse_step(base: Optimizer, *_: Any) -> None:
    if id(base) in _entered:
        return
    raise RuntimeError(
        f"step() of a {type(base).__name__} that is wrapped: call step() of the GMixoutOptimizer around it, which takes "
        "the base's step on the active weights"
    )


def _refuse_load(base: Optimizer, *_: Any) -> None:
    raise RuntimeError(
        f"load_state_dict() of a {type(base).__name__} that is wrapped: load into the GMixoutOptimizer around it, or "
        "into the base before wrapping it"
    )


def _step_beneath_hooks(base: Optimizer) -> Callable[..., Any]:
    patched = _patched_step(base)
    if patched is not None:
        return patched  # somebody's own: theirs to keep
    step: Any = type(base).step
    return MethodType(step.__wrapped__ if getattr(step, "hooked", False) else step, base)


def _patched_step(base: Optimizer) -> Callable[..., Any] | None:
    patched: Callable[..., Any] | None = base.__dict__.get("step")
    return None if hasattr(patched, "_wrapped_by_lr_sched") else patched


def step_is_its_own(base: Optimizer) -> bool:
    """Whether the base's step is that of its class, without hooks on this base and not patched."""
    hooks = [*base._optimizer_step_pre_hooks.values(), *base._optimizer_step_post_hooks.values()]
    return hooks == [_refuse_step] and _patched_step(base) is None


def per_cell_state(state: dict[str, Any], shape: torch.Size) -> set[str]:
    """The names of the state tensors that hold one value for each element of a parameter of ``shape``.

    Quantised ones (tensor subclasses) are not among them: they hold a scale for many elements.
    """
    return {
        key
        for key, value in state.items()
        if type(value) is Tensor and value.shape == shape and key not in _SHARED_KEYS
    }


def renew_state(
    base: Optimizer,
    param: Tensor,
    group: dict[str, Any],
    shape: torch.Size,
    rebuild: Callable[[Tensor, float | Tensor], Tensor],
    carry: bool,
) -> None:
    """The base's state of one parameter after a redraw: fresh, or with ``carry`` fresh where a cell is new.

    In place where shapes allow it, so that a compiled step finds the tensors it was compiled for. A state
    whose fresh values are not known is dropped and made anew by the base; so is, also with ``carry``, a state
    that is not kept per element (factored moments, a curvature history).

    Args:
        shape: shape of the per-cell state tensors.
        rebuild: makes the new tensor from the old one and the value that new cells start at.
    """
    if type(base) in _SHARED_STATE:
        base.state.clear()
    state = base.state.get(param)
    if not state:
        return
    per_cell = per_cell_state(state, shape)
    if carry:
        droppable = any(
            not isinstance(value, int | float | None)
            and key not in per_cell
            and not _is_scalar(value)
            for key, value in state.items()
        )
    else:
        droppable = not resets_in_place(base)
    if droppable:
        del base.state[param]
        return
    for key, value in state.items():
        start = fresh_value(base, group, key)
        if key in per_cell:
            renewed = rebuild(value, start)
            state[key] = value.copy_(renewed) if value.shape == renewed.shape else renewed
        elif isinstance(value, Tensor) and not carry:
            fill_(value, start)


def resets_in_place(base: Optimizer) -> bool:
    """Whether the base's state can be made fresh by writing known values into it."""
    # SGD's first momentum is the gradient undamped: only a missing buffer says so.
    damped = any(group.get("dampening") for group in base.param_groups)
    return type(base) in ELEMENTWISE and type(base) not in _BEGINS_AT_LR and not damped


def has_modes(base: Optimizer) -> bool:
    """Whether the base itself swaps weights for evaluation, as schedule-free optimizers do."""
    return callable(getattr(base, "train", None)) and callable(getattr(base, "eval", None))


def keeps_state(base: Optimizer, group: dict[str, Any]) -> bool:
    """Whether an element-wise base has any state for the parameters of a group once it has stepped."""
    return not isinstance(base, torch.optim.SGD) or group["momentum"] != 0


def fresh_value(base: Optimizer, group: dict[str, Any], key: str) -> float | Tensor:
    """What the base's state tensor ``key`` holds before a first step."""
    fresh = ELEMENTWISE.get(type(base), {}).get(key)
    return 0.0 if fresh is None else fresh(group)


def fill_(tensor: Tensor, value: float | Tensor) -> Tensor:
    """Fill in place with a number or a one-element tensor."""
    return tensor.copy_(value.reshape(())) if isinstance(value, Tensor) else tensor.fill_(value)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1
