"""The base's step on a few tensors at a time: gather their gradients, step, write the weights.

A whole model's packed gradients do not stay in a processor's cache until they are used, a few tensors' do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple, cast

from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim import mixing
from gmixout_optim.bases import ELEMENTWISE, keeps_state, step_is_its_own
from gmixout_optim.layout import Draws, Row, columns
from gmixout_optim.mixed_tensor import MixedTensor
from gmixout_optim.packed_gradient import PackedGradient
from gmixout_optim.rounding import Dither

# Bytes of packed gradients in a batch on a CPU: between what the caches hold and what a call of the base takes.
_CPU_BATCH = 1 << 21


class Columns(NamedTuple):
    """What :func:`packed_step` takes of some rows; tensors as in :mod:`gmixout_optim.mixing`.

    Attributes:
        grads: gradients with a flag: whether they are packed already.
        scales: s of each.
        dithers: of :func:`gmixout_optim.mixing.narrowed`.
        states: what the base keeps for each value.
    """

    views: list[Tensor]
    indices: list[Tensor]
    values: list[Tensor]
    anchors: list[Tensor]
    grads: list[tuple[Tensor, bool]]
    scales: list[float]
    dithers: list[Dither | None]
    states: list[dict[str, Any]]


class BatchedStep:
    """Steps an element-wise optimizer of torch's batch by batch, past the optimizer object itself.

    Args:
        base: the wrapped optimizer.
        draws: what is random.
    """

    def __init__(self, base: Optimizer, draws: Draws) -> None:
        self.base = base
        self.draws = draws
        # What a base can refuse an option for; numbers may follow a schedule.
        self._settled = SettledOptions(base, partial(form_of_options, numbers=False))

    def split(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        """The rows that can be stepped in batches, and the others, which the base must see all at once.

        These are those of optimizers that are not torch's; of a base with hooks of its own, which may look at the
        packed gradients; and where the base might refuse in the middle: a tensor without state, which it has to
        make, and a group whose options are not those of the step before.
        """
        if type(self.base) not in ELEMENTWISE or not step_is_its_own(self.base):
            return [], rows
        settled = self._settled.groups()
        return split(rows, lambda row: id(row[0].group) in settled and self._has_state(row[0]))

    def step(self, rows: list[Row]) -> None:
        plain = without_optimizer(type(self.base))  # type: ignore[arg-type]
        for own in self.by_group(rows):
            options = self.options(own)
            for batch in _cached_batches(own):
                packed_step(*self.columns(batch), plain=plain, options=options)

    def by_group(self, rows: list[Row]) -> Iterator[list[Row]]:
        """The rows of each of the base's groups that has any."""
        own: dict[int, list[Row]] = {}
        for row in rows:
            own.setdefault(id(row[0].group), []).append(row)
        for group in self.base.param_groups:
            if id(group) in own:
                yield own[id(group)]

    def options(self, rows: list[Row]) -> dict[str, Any]:
        """The base's options for rows of one group, which train at one rate."""
        options = rows[0][0].options
        return {key: options[key] for key in self.base.defaults}

    def columns(self, rows: list[Row]) -> Columns:
        state = self.base.state
        return Columns(
            *columns(rows),
            grads=[_gradient_of(tensor) for tensor, _ in rows],
            scales=[tensor.scale for tensor, _ in rows],
            dithers=[self.draws.dither(tensor) for tensor, _ in rows],
            states=[state[tensor.param] for tensor, _ in rows],
        )

    def _has_state(self, tensor: MixedTensor) -> bool:
        return bool(self.base.state.get(tensor.param)) or not keeps_state(self.base, tensor.group)


class SettledOptions:
    """Which of a base's groups have the options that they had when it was last asked.

    Args:
        base: the wrapped optimizer.
        form: what matters of a group's options.
    """

    def __init__(self, base: Optimizer, form: Callable[[dict[str, Any]], Hashable]) -> None:
        self.base = base
        self.form = form
        self._last: dict[int, Hashable] = {}

    def groups(self) -> set[int]:
        """Their ids."""
        settled = set()
        for number, group in enumerate(self.base.param_groups):
            form = self.form({key: group[key] for key in self.base.defaults})
            if self._last.setdefault(number, form) == form:
                settled.add(id(group))
            self._last[number] = form
        return settled


def form_of_options(options: Any, numbers: bool) -> Hashable:
    """What a step depends on of options: all but the values in tensors, and without ``numbers`` other numbers' too."""
    if isinstance(options, dict):
        return tuple((key, form_of_options(item, numbers)) for key, item in options.items())
    if isinstance(options, list | tuple):
        return tuple(form_of_options(item, numbers) for item in options)
    if isinstance(options, Tensor):
        return options.shape, options.dtype, options.device
    return repr(options) if numbers or type(options) not in (int, float) else float


def packed_step(
    views: list[Tensor],
    indices: list[Tensor],
    values: list[Tensor],
    anchors: list[Tensor],
    grads: list[tuple[Tensor, bool]],
    scales: list[float],
    dithers: list[Dither | None],
    states: list[dict[str, Any]],
    *,
    plain: type,
    options: dict[str, Any],
) -> None:
    """Gather the active gradients, step the base on the packed values, write the weights.

    Takes :class:`Columns`, :func:`without_optimizer` of the base's class and the options of the parameter group.
    """
    for value, grad in zip(values, used_gradients(indices, values, grads, scales), strict=True):
        value.grad = grad
    base: Any = object.__new__(plain)
    base.param_groups = [{**options, "params": values}]
    base.state = dict(zip(values, states, strict=True))
    base.step()
    write(views, indices, values, anchors, scales, dithers)
    for value in values:
        value.grad = None


def used_gradients(
    indices: list[Tensor],
    values: list[Tensor],
    grads: list[tuple[Tensor, bool]],
    scales: list[float],
) -> list[Tensor]:
    """The gradients with respect to the packed values, s * grad on the active cells, in the values' dtype."""
    used = []
    for index, value, (grad, packed), scale in zip(indices, values, grads, scales, strict=True):
        active = grad if packed else mixing.gather_gradient(grad, index)
        active = active if active.dtype == value.dtype else active.to(value.dtype)
        used.append(active if scale == 1 else active * scale)
    return used


def write(
    views: list[Tensor],
    indices: list[Tensor],
    values: list[Tensor],
    anchors: list[Tensor],
    scales: list[float],
    dithers: list[Dither | None],
) -> None:
    """Make the model compute with what was trained."""
    theta = mixing.model_values(anchors, values, scales)
    mixing.scatter_(views, indices, mixing.narrowed(views, indices, theta, dithers))


@cache
def without_optimizer(base: Any) -> type:
    """A plain class with the methods of an optimizer's class.

    Its instances are cheap and step without hooks; and where code is compiled, gradients may come into being inside
    it, while of an optimizer the compiler takes gradients and state as given. Methods come without what torch wraps
    around them.
    """
    methods: dict[str, Any] = {}
    for parent in reversed(base.__mro__[:-1]):
        for name, item in vars(parent).items():
            if inspect.isfunction(item) and not name.startswith("__"):
                methods[name] = inspect.unwrap(item)
    return type(base.__name__, (), methods)


def split(rows: list[Row], condition: Callable[[Row], bool]) -> tuple[list[Row], list[Row]]:
    yes: list[Row] = []
    no: list[Row] = []
    for row in rows:
        (yes if condition(row) else no).append(row)
    return yes, no


def _gradient_of(tensor: MixedTensor) -> tuple[Tensor, bool]:
    grad = cast(Tensor, tensor.param.grad)
    if isinstance(grad, PackedGradient):
        return grad.current(), True
    return tensor.view(grad), False


def _cached_batches(rows: list[Row]) -> Iterator[list[Row]]:
    """The rows in order, on a CPU so few at a time that their gradients stay in its caches."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        value = row[1].value
        more = value.numel() * value.element_size() if value.is_cpu else 0
        if batch and size + more > _CPU_BATCH:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += more
    if batch:
        yield batch
