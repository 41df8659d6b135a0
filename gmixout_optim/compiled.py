"""The packed step and the redraw as code fused by torch.compile.

Tensors go through compiled code a few at a time, those that are alike together: a model repeats its blocks, so few
kernels serve all of it, and what was compiled for one optimizer serves the next. Each batch is gathered, stepped and
scattered in one graph; its packed gradients are never written to memory.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache, lru_cache
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.optim import Optimizer

from gmixout_optim import mixing
from gmixout_optim.bases import keeps_state, resets_in_place, step_is_its_own
from gmixout_optim.index_sets import stratified_cells
from gmixout_optim.layout import Row, columns
from gmixout_optim.mixed_tensor import MixedTensor
from gmixout_optim.packed_gradient import PackedGradient
from gmixout_optim.rounding import NARROW

# Compiling takes time for every tensor in a graph, calling it hardly any.
BATCH = 6


class Compiler:
    """Decides which tensors' steps and redraws run compiled, and runs these.

    Args:
        base: the wrapped optimizer.
        wanted: the user's ``compile``.
        static_shapes: whether index sets keep their sizes when they are redrawn.
        dither_key: of a tensor in the running episode, where weights are rounded stochastically.
    """

    def __init__(
        self,
        base: Optimizer,
        wanted: bool | None,
        static_shapes: bool,
        dither_key: Callable[[MixedTensor], int] | None,
    ) -> None:
        self.base = base
        self.wanted = wanted
        self.static_shapes = static_shapes
        self.dither_key = dither_key
        # By the number of the group: its lr as compiled code takes it, and the other options in the last step.
        self._lrs: dict[int, Tensor] = {}
        self._last_options: dict[int, Hashable] = {}

    def split(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        """The rows to run compiled, and the others: where nobody asked, or it would compile again and again."""
        if self.wanted is False or not self.static_shapes or not resets_in_place(self.base):
            return [], rows
        return _split(rows, self._wants)

    def split_step(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        """The rows to step compiled, and the others.

        A base with hooks of its own steps eagerly, because they may look at the packed gradients; so does a
        tensor without state, which the base has to make, and a group whose options are not those of the step
        before: a momentum that follows a schedule would compile in every step.
        """
        wanted, others = self.split(rows)
        if not wanted or not step_is_its_own(self.base):
            return [], rows
        groups = enumerate(self.base.param_groups)
        settled = {id(group) for number, group in groups if self._is_settled(number, group)}
        ready, unready = _split(
            wanted, lambda row: id(row[0].group) in settled and self._is_ready(row)
        )
        return ready, unready + others

    def step(self, rows: list[Row]) -> list[Row]:
        """Gather, step, scatter. Returns the rows that could not be compiled, as they were."""
        plain = _without_optimizer(cast(Hashable, type(self.base)))
        failed: list[Row] = []
        for number, group in enumerate(self.base.param_groups):
            own = [row for row in rows if row[0].group is group]
            if not own:
                continue
            options = self._options(number, group)
            grads = [_gradient_of(tensor) for tensor, _ in own]
            states = [self.base.state[tensor.param] for tensor, _ in own]
            views, indices, values, _ = columns(own)
            dithers = [self._dither(tensor) for tensor, _ in own]
            made_for = (plain, self._last_options[number])
            keys = [
                (
                    made_for,
                    _form_of(row),
                    grad.dtype,
                    grad.stride(),
                    packed,
                    dither is None,
                    tuple(state),
                )
                for row, (grad, packed), dither, state in zip(
                    own, grads, dithers, states, strict=True
                )
            ]
            for key, places in _batches(keys):
                batch = _pick(places, views, indices, values, grads, dithers, states)
                try:
                    _kernel(packed_step, (key, len(places)))(*batch, plain=plain, options=options)
                except TorchDynamoException as error:
                    failed += [own[place] for place in places]
                    self._give_up(error)
        return failed

    def begin_episode(self, rows: list[Row]) -> None:
        views, indices, values, anchors = columns(rows)
        keys = [_form_of(row) for row in rows]
        for key, places in _batches(keys):
            kernel = _kernel(mixing.begin_episode_, (key, len(places)))
            kernel(*_pick(places, views, indices, values, anchors))

    def _dither(self, tensor: MixedTensor) -> Tensor | None:
        """The key of a tensor's rounding as compiled code takes it: a number would compile again in every episode."""
        if self.dither_key is None or tensor.param.dtype not in NARROW:
            return None
        return torch.tensor(self.dither_key(tensor))

    def _wants(self, row: Row) -> bool:
        tensor, _ = row
        if tensor.param.is_cuda:
            return _compiles_on_cuda() if self.wanted is None else bool(self.wanted)
        # On a CPU torch's own kernels move wide cells faster than compiled code does.
        return bool(self.wanted) and tensor.width == 1

    def _is_ready(self, row: Row) -> bool:
        tensor, _ = row
        has_state = bool(self.base.state.get(tensor.param))
        # Compiled, A + s * (phi - A) may round differently than where eval() and train() compute it.
        return tensor.scale == 1 and (has_state or not keeps_state(self.base, tensor.group))

    def _is_settled(self, number: int, group: dict[str, Any]) -> bool:
        options = _forms(self._options(number, group))
        before = self._last_options.get(number, options)
        self._last_options[number] = options
        # What torch compiles for Adam divides by the learning rate.
        lr_is_zero = (
            not (isinstance(group["lr"], Tensor) and group["lr"].is_cuda) and group["lr"] == 0
        )
        return options == before and not lr_is_zero

    def _options(self, number: int, group: dict[str, Any]) -> dict[str, Any]:
        """A group's options as compiled code takes them.

        They choose the plain form of the step (a fused or foreach one cannot be fused with gather and scatter)
        without branches on values. A float lr goes into a tensor: as a number it would compile again with every
        change.
        """
        options = {key: group[key] for key in self.base.defaults}
        chosen = {"fused": False, "foreach": False, "capturable": True}
        options.update({key: value for key, value in chosen.items() if key in options})
        if not isinstance(options["lr"], Tensor):
            lr = self._lrs.setdefault(number, torch.zeros((), dtype=torch.float64))
            options["lr"] = lr.fill_(options["lr"])
        return options

    def _give_up(self, error: Exception) -> None:
        if self.wanted is not False:
            warnings.warn(
                f"the step could not be compiled and goes on eagerly; compile=False avoids the attempt: {error}",
                stacklevel=2,
            )
        self.wanted = False


@cache
def _compiles_on_cuda() -> bool:
    """Without Triton (on Windows, say) torch.compile has nothing to compile to."""
    return importlib.util.find_spec("triton") is not None


@cache
def draw() -> Callable[..., Tensor]:
    """The compiled form of the stratified sampler, one for all shapes."""
    return torch.compile(stratified_cells, dynamic=True)


def packed_step(
    views: list[Tensor],
    indices: list[Tensor],
    values: list[Tensor],
    grads: list[tuple[Tensor, bool]],
    dithers: list[Tensor | None],
    states: list[dict[str, Any]],
    *,
    plain: type,
    options: dict[str, Any],
) -> None:
    """Gather the active gradients, step the base on the packed values, scatter these.

    Tensors as in :mod:`gmixout_optim.mixing`, gradients with a flag: whether they are packed already; ``dithers``
    are the keys of :func:`gmixout_optim.mixing.narrowed`, ``plain`` is :func:`_without_optimizer` of the base's
    class, ``options`` are those of the parameter group and ``states`` what the base keeps for each value.
    """
    for value, index, (grad, packed) in zip(values, indices, grads, strict=True):
        active = grad if packed else mixing.gather([grad], [index])[0]
        value.grad = active.to(value.dtype)
    base: Any = object.__new__(plain)
    base.param_groups = [{**options, "params": values}]
    base.state = dict(zip(values, states, strict=True))
    base.step()
    keys = [dither for dither in dithers if dither is not None]
    mixing.scatter_(
        views, indices, mixing.narrowed(views, indices, values, keys) if keys else values
    )
    for value in values:
        value.grad = None


@cache
def _without_optimizer(base: Any) -> type:
    """A plain class with the methods of an optimizer's class.

    Of an optimizer the compiler takes gradients and state as given before the graph; here gradients come into being
    inside it. Methods come without what torch wraps around them, which would break the graph.
    """
    methods: dict[str, Any] = {}
    for parent in reversed(base.__mro__[:-1]):
        for name, item in vars(parent).items():
            if inspect.isfunction(item) and not name.startswith("__"):
                methods[name] = inspect.unwrap(item)
    return type(base.__name__, (), methods)


def _gradient_of(tensor: MixedTensor) -> tuple[Tensor, bool]:
    """The gradient as :mod:`gmixout_optim.mixing` takes it, and whether it is packed."""
    grad = tensor.param.grad
    assert grad is not None
    if isinstance(grad, PackedGradient):
        return grad.active, True
    return tensor.view(grad), False


def _form_of(row: Row) -> Hashable:
    """What compiled code depends on of a tensor and its slot."""
    tensor, slot = row
    return tensor.width, slot.form, slot.placement, slot.value.shape, slot.index.dtype


def _forms(items: dict[str, Any]) -> Hashable:
    """What compiled code depends on of a base's options: a number among them is part of the code."""
    return tuple(
        (key, (item.shape, item.dtype, item.device) if isinstance(item, Tensor) else repr(item))
        for key, item in items.items()
    )


def _batches(keys: Sequence[Hashable]) -> Iterator[tuple[Hashable, list[int]]]:
    alike: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        alike.setdefault(key, []).append(place)
    for key, places in alike.items():
        for start in range(0, len(places), BATCH):
            yield key, places[start : start + BATCH]


def _pick(places: list[int], *columns: list[Any]) -> list[list[Any]]:
    return [[column[place] for place in places] for column in columns]


@lru_cache(maxsize=1024)
def _kernel(function: Any, key: Hashable) -> Callable[..., None]:
    """``function`` compiled for arguments of which ``key`` says all that the code depends on."""
    # torch counts recompilations by code object and gives up after a few: every key has its own.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, dynamic=False, fullgraph=True)


def _split(rows: list[Row], condition: Callable[[Row], bool]) -> tuple[list[Row], list[Row]]:
    yes: list[Row] = []
    no: list[Row] = []
    for row in rows:
        (yes if condition(row) else no).append(row)
    return yes, no
