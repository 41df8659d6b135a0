"""The packed step and the redraw as code fused by torch.compile.

Tensors go through compiled code a few at a time, those that are alike together: a model repeats its blocks, so few
kernels serve all of it, and what was compiled for one optimizer serves the next. Each batch is gathered, stepped and
written in one graph; its packed gradients are never written to memory.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache, lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from gmixout_optim import mixing
from gmixout_optim.bases import resets_in_place
from gmixout_optim.batched import (
    BatchedStep,
    SettledOptions,
    form_of_options,
    packed_step,
    split,
    without_optimizer,
)
from gmixout_optim.index_sets import stratified_cells
from gmixout_optim.layout import Row, columns

# Tensors in a graph. Compiling takes time for each of them; on a GPU so does every launch, and the tensors of a graph
# share theirs.
_CPU_BATCH = 6
_GPU_BATCH = 32


class Compiler:
    """Decides which tensors' steps and redraws run compiled, and runs these.

    Args:
        batched: the step that is compiled.
        wanted: the user's ``compile``.
        static_shapes: whether index sets keep their sizes when they are redrawn.
    """

    def __init__(self, batched: BatchedStep, wanted: bool | None, static_shapes: bool) -> None:
        self.batched = batched
        self.base = batched.base
        self.wanted = wanted
        self.static_shapes = static_shapes
        self._settled = SettledOptions(self.base, _form_without_lr)

    def split(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        """The rows to run compiled, and the others: where nobody asked, or it would compile again and again."""
        wanted = torch.cuda.is_available() if self.wanted is None else self.wanted
        if not wanted or not self.static_shapes or not resets_in_place(self.base):
            return [], rows
        return split(rows, self._wants)

    def split_step(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        """Of rows that can be stepped in batches those to step compiled, and the others.

        A group whose options are not those of the step before steps eagerly: a momentum that follows a schedule would
        compile in every step.
        """
        wanted, others = self.split(rows)
        if not wanted:
            return [], rows
        settled = self._settled.groups()
        settled -= {id(group) for group in self.base.param_groups if _lr_is_zero(group)}
        # Compiled, A + s * (phi - A) may round differently than where eval() and train() compute it.
        ready, unready = split(
            wanted, lambda row: row[0].scale == 1 and id(row[0].group) in settled
        )
        return ready, unready + others

    def step(self, rows: list[Row]) -> list[Row]:
        """Gather, step, write. Returns the rows that could not be compiled, as they were."""
        failed: list[Row] = []
        _bring_steps(rows, self.base.state)
        plain = without_optimizer(type(self.base))  # type: ignore[arg-type]
        for own in self.batched.by_group(rows):
            given = self.batched.columns(own)
            # A number would compile again in every episode.
            dithers = [
                dither and dither._replace(key=torch.tensor(dither.key)) for dither in given.dithers
            ]
            given = given._replace(dithers=dithers)
            keys = [
                (
                    _form_of(row),
                    grad.dtype,
                    grad.stride(),
                    packed,
                    tuple(state),
                    dither is None,
                )
                for row, (grad, packed), state, dither in zip(
                    own, given.grads, given.states, given.dithers, strict=True
                )
            ]
            for key, places in _batches(own, keys):
                batch = _pick(places, *given)
                options = self._options(own, is_launched(own[places[0]][0].param))
                made_for = (plain, form_of_options(options, numbers=True), key, len(places))
                try:
                    _kernel(packed_step, made_for)(*batch, plain=plain, options=options)
                except TorchDynamoException as error:
                    failed += [own[place] for place in places]
                    self._give_up(error)
        return failed

    def begin_episode(self, rows: list[Row]) -> None:
        views, indices, values, anchors = columns(rows)
        keys = [_form_of(row) for row in rows]
        for key, places in _batches(rows, keys):
            kernel = _kernel(mixing.begin_episode_, (key, len(places)))
            kernel(*_pick(places, views, indices, values, anchors))

    def _wants(self, row: Row) -> bool:
        tensor, _ = row
        if tensor.param.is_cuda:
            return _compiles_on_cuda() if self.wanted is None else bool(self.wanted)
        # On a CPU torch's own kernels move wide cells faster than compiled code does; where these were asked for, single
        # elements are those of biases and the like, too few to be worth a call.
        return bool(self.wanted) and tensor.width == 1 and tensor.granularity != "row"

    def _options(self, rows: list[Row], foreach: bool) -> dict[str, Any]:
        """The options of a group's rows as compiled code takes them.

        They choose a form of the step without branches on values, which can be fused with gather and scatter: the
        plain one, or that for all tensors at once, of which the compiler makes few kernels. A float lr goes into a
        tensor: as a number it would compile again with every change.
        """
        options = self.batched.options(rows)
        chosen = {"fused": False, "foreach": foreach, "capturable": True}
        options.update({key: value for key, value in chosen.items() if key in options})
        if not isinstance(options["lr"], Tensor):
            options["lr"] = torch.tensor(options["lr"], dtype=torch.float64)
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


def _form_without_lr(options: dict[str, Any]) -> Hashable:
    """What compiled code depends on of a group's options: a number is part of the code, but for the lr."""
    others = {key: option for key, option in options.items() if key != "lr"}
    return form_of_options(others, numbers=True)


def _lr_is_zero(group: dict[str, Any]) -> bool:
    """Whether code would divide by zero: what torch compiles for Adam divides by the learning rate."""
    lr = group["lr"]
    return not (isinstance(lr, Tensor) and lr.is_cuda) and bool(lr == 0)


def _form_of(row: Row) -> Hashable:
    """What compiled code depends on of a tensor and its slot."""
    tensor, slot = row
    return tensor.width, slot.form, slot.placement, slot.value.shape, slot.index.dtype


def _bring_steps(rows: list[Row], state: Any) -> None:
    """Step counts to the parameters' devices: compiled code must not wait for the host's."""
    for tensor, _ in rows:
        entry = state[tensor.param]
        step = entry.get("step")
        if isinstance(step, Tensor) and step.device != tensor.param.device:
            entry["step"] = step.to(tensor.param.device, non_blocking=True)


def is_launched(tensor: Tensor) -> bool:
    """Whether kernels on the tensor are launched on a device, each in time of its own."""
    return tensor.device.type != "cpu"


def _batches(rows: Sequence[Row], keys: Sequence[Hashable]) -> Iterator[tuple[Hashable, list[int]]]:
    """The places of rows that are alike, so many at a time that one graph is to serve them."""
    alike: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        alike.setdefault(key, []).append(place)
    for key, places in alike.items():
        size = _GPU_BATCH if is_launched(rows[places[0]][0].param) else _CPU_BATCH
        for start in range(0, len(places), size):
            yield key, places[start : start + size]


def _pick(places: list[int], *columns: list[Any]) -> list[list[Any]]:
    return [[column[place] for place in places] for column in columns]


@lru_cache(maxsize=1024)
def _kernel(function: Any, key: Hashable) -> Callable[..., None]:
    """``function`` compiled for arguments of which ``key`` says all that the code depends on."""
    # torch counts recompilations by code object and gives up after a few: every key has its own.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, dynamic=False, fullgraph=True)
