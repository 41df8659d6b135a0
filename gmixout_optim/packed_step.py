"""One step on packed values: gather weights and gradients, step the base, write back.

:func:`packed_step` is all of it. It is called with the base itself, or with a plain form of the
base on a few tensors at a time, eagerly or compiled (:func:`step_parts`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim import mixing
from gmixout_optim.cells import Dither, Grid
from gmixout_optim.members import Member
from gmixout_optim.packed_gradient import PackedGradient
from gmixout_optim.residual import slot_of

K = TypeVar("K", bound=Hashable)

# Bytes of packed gradients in a batch on a CPU: more do not stay in its caches until they are used,
# fewer do not outweigh the call of the base.
_BATCH_BYTES = 1 << 22


class Item(NamedTuple):
    """One tensor of a step.

    Attributes:
        grid: its cells.
        weights, written: the parameter, once to be read and once to be written. Compiled code is
            not told that the two are one.
        indices: of its active cells.
        value: what is trained, where the model does not hold it.
        is_packed: whether the gradient is that of the active cells, packed, or of all weights.
        scale: s.
        dither: how what is written is rounded.
    """

    grid: Grid
    weights: Tensor
    written: Tensor
    indices: Tensor
    value: Tensor | None
    anchor: Tensor
    is_packed: bool
    scale: float
    dither: Dither | None

    @classmethod
    def of(cls, member: Member) -> Item:
        slot, weights = slot_of(member), member.cells.local
        return cls(
            member.cells.grid,
            weights,
            weights,
            member.index(),
            slot.value,
            slot.anchor,
            isinstance(member.cells.gradient, PackedGradient),
            member.scale,
            member.dither,
        )


def gradient_of(member: Member) -> Tensor:
    """The gradient of all weights, or that of the active cells where it was packed."""
    grad = member.cells.gradient
    assert grad is not None
    return grad.current_for(member) if type(grad) is PackedGradient else grad


def packed_step(
    items: list[Item], grads: Sequence[Tensor], enter: Callable[..., None], **entered: Any
) -> None:
    """A step on the active cells of some tensors.

    Args:
        grads: of :func:`gradient_of`.
        enter: ``enter(trained, grads, **entered)`` steps the base on packed values, in place.
    """
    items = [item._replace(indices=item.indices.long()) for item in items]
    places = [place_of(item, item.weights) for item in items]
    trained = [
        mixing.gather(*place) if item.value is None else item.value
        for item, place in zip(items, places, strict=True)
    ]
    enter(trained, list(map(_used_gradient, items, grads, trained)), **entered)
    for item, place, value in zip(items, places, trained, strict=True):
        theta = mixing.model_values(item.anchor, value, item.scale)
        write(item, theta, place if item.written is item.weights else place_of(item, item.written))


def write(item: Item, theta: Tensor, place: tuple[Tensor, Tensor]) -> None:
    """Write packed values to a place, rounded to the model's dtype."""
    rounded = mixing.narrowed(theta, item.weights.dtype, item.indices, item.dither)
    mixing.scatter_(*place, rounded)


def place_of(item: Item, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A view of a tensor and an index of it: the active cells, for compiled code their elements.

    Of these the compiler makes one loop with the step of the base.
    """
    view = item.grid.view(tensor)
    if torch.compiler.is_compiling():
        return view.reshape(-1), item.grid.offsets_at(item.indices)
    return mixing.flat(view, item.indices)


def _used_gradient(item: Item, grad: Tensor, value: Tensor) -> Tensor:
    """The gradient of the packed values: s * grad on the active cells, in their dtype."""
    if item.is_packed:
        active = grad
    elif torch.compiler.is_compiling():
        active = mixing.gather(*place_of(item, grad))
    else:
        active = mixing.gather_gradient(item.grid.view(grad), item.indices)
    active = active if active.dtype == value.dtype else active.to(value.dtype)
    return active if item.scale == 1 else active * item.scale


def step_plain(
    trained: list[Tensor],
    grads: list[Tensor],
    *,
    states: list[dict[str, Any]],
    plain: type,
    options: dict[str, Any],
) -> None:
    """Steps :func:`without_optimizer` of the base's class, with a group's options."""
    for value, grad in zip(trained, grads, strict=True):
        value.grad = grad
    base: Any = object.__new__(plain)
    base.param_groups = [{**options, "params": trained}]
    base.state = dict(zip(trained, states, strict=True))
    base.step()
    for value in trained:
        value.grad = None


@cache
def without_optimizer(base: Any) -> type:
    """A plain class with the methods of an optimizer's class, without what torch wraps around them.

    Its instances are cheap and step without hooks. torch.compile treats an Optimizer's gradients as
    graph inputs; on a plain object they can be created in the graph.
    """
    methods: dict[str, Any] = {}
    for parent in reversed(base.__mro__[:-1]):
        for name, item in vars(parent).items():
            if inspect.isfunction(item) and not name.startswith("__"):
                methods[name] = inspect.unwrap(item)
    return type(base.__name__, (), methods)


def step_in_batches(base: Optimizer, members: list[Member]) -> None:
    """Steps so few tensors at a time that their packed gradients stay in a CPU's caches."""
    plain = without_optimizer(type(base))  # type: ignore[arg-type]
    for alike in by_options(members):
        options = options_of(base, alike[0])
        step = base.state[alike[0].param].get("step")
        if isinstance(step, Tensor) and step.device.type != "cpu":  # compiled code took it there
            if "capturable" in options:
                options["capturable"] = True  # else each tensor waits for its step count
            else:
                take_steps_back(base, alike)
        for batch in _cached_batches(alike):
            states = [base.state[member.param] for member in batch]
            items, grads = list(map(Item.of, batch)), list(map(gradient_of, batch))
            packed_step(items, grads, step_plain, states=states, plain=plain, options=options)


def take_steps_back(base: Optimizer, members: list[Member]) -> None:
    """Step counts to the host, where forms of the base read them that are not made for a device."""
    for member in members:
        state, group = base.state.get(member.param, {}), member.group
        step = state.get("step")
        is_read = not group.get("capturable") and not group.get("fused")
        if is_read and isinstance(step, Tensor) and step.device.type != "cpu":
            state["step"] = step.cpu()


class Part(NamedTuple):
    """Tensors of a step that the base steps with the same options.

    Attributes:
        states: of the base.
        plain: of :func:`without_optimizer`.
        options: but for the learning rate.
    """

    items: list[Item]
    states: list[dict[str, Any]]
    plain: type
    options: dict[str, Any]


def step_parts(parts: list[Part], grads: list[Tensor], lrs: list[Tensor]) -> None:
    """:func:`packed_step` on some parts, as one function to compile.

    Args:
        grads: of the items of all parts.
        lrs: of the parts.
    """
    start = 0
    for part, lr in zip(parts, lrs, strict=True):
        stop = start + len(part.items)
        options = {**part.options, "lr": lr}
        packed_step(
            part.items,
            grads[start:stop],
            step_plain,
            states=part.states,
            plain=part.plain,
            options=options,
        )
        start = stop


def by_options(members: list[Member]) -> Iterable[list[Member]]:
    """Members that the base steps with the same options: of one group, at one rate."""
    return grouped(members, lambda member: (id(member.group), member.full_rate)).values()


def options_of(base: Optimizer, member: Member) -> dict[str, Any]:
    return own_options(base, member.shown_group)


def own_options(base: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """What of a group is the base's; an older state dict lacks some."""
    return {key: group[key] for key in base.defaults if key in group}


def grouped(members: list[Member], key: Callable[[Member], K]) -> dict[K, list[Member]]:
    """The members by what ``key`` says of them, in order."""
    groups: dict[K, list[Member]] = {}
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return groups


def partition(
    members: list[Member], condition: Callable[[Member], bool]
) -> tuple[list[Member], list[Member]]:
    """The members for which a condition holds, and the others."""
    yes: list[Member] = []
    no: list[Member] = []
    for member in members:
        (yes if condition(member) else no).append(member)
    return yes, no


def _cached_batches(members: list[Member]) -> Iterator[list[Member]]:
    batch: list[Member] = []
    size = 0
    for member in members:
        anchor = slot_of(member).anchor
        more = anchor.nbytes if anchor.is_cpu else 0
        if batch and size + more > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(member)
        size += more
    if batch:
        yield batch


class SettledGroups:
    """Which of a base's groups have the options that they had when it was last asked.

    Args:
        base: the wrapped optimizer.
        form: what matters of a group's options.
    """

    def __init__(self, base: Optimizer, form: Callable[[dict[str, Any]], Hashable]) -> None:
        self.base = base
        self.form = form
        self._last: dict[int, Hashable] = {}

    def ids(self) -> set[int]:
        settled = set()
        for number, group in enumerate(self.base.param_groups):
            form = self.form(own_options(self.base, group))
            if self._last.setdefault(number, form) == form:
                settled.add(id(group))
            self._last[number] = form
        return settled


def form_of_options(options: Any, numbers: bool) -> Hashable:
    """What a step depends on of options: not the values in tensors; numbers if ``numbers``."""
    if isinstance(options, dict):
        return tuple((key, form_of_options(item, numbers)) for key, item in options.items())
    if isinstance(options, list | tuple):
        return tuple(form_of_options(item, numbers) for item in options)
    if isinstance(options, Tensor):
        return options.shape, options.dtype, options.device
    if type(options) in (int, float, bool, str, type(None)):
        return options if numbers or type(options) not in (int, float) else float
    return repr(options)


def form_without_lr(options: dict[str, Any]) -> Hashable:
    """What compiled code depends on: all numbers but the lr."""
    others = {key: option for key, option in options.items() if key != "lr"}
    return form_of_options(others, numbers=True)
