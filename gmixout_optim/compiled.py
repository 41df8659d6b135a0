"""The packed step and the redraw as code fused by torch.compile.

Tensors go through compiled code a few at a time, those that are alike together: a model repeats its
blocks, so few kernels serve all of it, and what was compiled for one optimizer serves the next.
Each batch is gathered, stepped and written in one graph; its packed values and gradients are never
written to memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Hashable, Iterator
from functools import cache, lru_cache
from types import FunctionType
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim import mixing
from gmixout_optim.bases import resets_in_place
from gmixout_optim.index_sets import stratified_cells
from gmixout_optim.members import Member
from gmixout_optim.packed_step import (
    Item,
    SettledGroups,
    by_options,
    form_of_options,
    grouped,
    options_of,
    packed_step,
    partition,
    step_plain,
    without_optimizer,
)
from gmixout_optim.residual import slot_of
from gmixout_optim.warn import warn

# Tensors in a graph. Compiling takes time for each of them; on a GPU so does every launch, and the
# tensors of a graph share theirs.
_CPU_TENSORS = 6
_GPU_TENSORS = 32


class Compiler:
    """Decides which tensors' steps and redraws run compiled, and runs these.

    Args:
        base: the wrapped optimizer.
        wanted: the user's ``compile``.
        static_shapes: whether index sets keep their sizes when they are redrawn.
    """

    def __init__(
        self, base: Optimizer, wanted: bool | Literal["auto"], static_shapes: bool
    ) -> None:
        self.base = base
        self.wanted = wanted
        self.static_shapes = static_shapes
        self._settled = SettledGroups(base, _form_without_lr)

    def split(self, members: list[Member]) -> tuple[list[Member], list[Member]]:
        """The members to run compiled, and the others: not wanted, or recompiled each time."""
        wanted = torch.cuda.is_available() if self.wanted == "auto" else self.wanted
        if not wanted or not self.static_shapes or not resets_in_place(self.base):
            return [], members
        return partition(members, self._wants)

    def split_step(self, members: list[Member]) -> tuple[list[Member], list[Member]]:
        """Of members that can be stepped in batches those to step compiled, and the others.

        A group whose options are not those of the step before steps eagerly: a momentum that
        follows a schedule would recompile in every step.
        """
        wanted, others = self.split(members)
        if not wanted:
            return [], members
        settled = self._settled.ids()
        settled -= {id(group) for group in self.base.param_groups if _lr_is_zero(group)}
        # Compiled, A + s * (phi - A) may round differently than where the library computes it
        # eagerly.
        ready, unready = partition(wanted, lambda m: m.scale == 1 and id(m.group) in settled)
        return ready, unready + others

    def step(self, members: list[Member]) -> list[Member]:
        """Gather, step, write. Returns the members that could not be compiled, as they were."""
        failed: list[Member] = []
        plain = without_optimizer(type(self.base))  # type: ignore[arg-type]
        _move_to_device(members, self.base.state)
        for alike in by_options(members):
            for key, some in _batches(alike, self._form_of_step):
                items = [_without_number(Item.of(member)) for member in some]
                options = self._options(some[0])
                made_for = (plain, form_of_options(options, numbers=True), key, len(some))
                states = [self.base.state[member.param] for member in some]
                entered = dict(enter=step_plain, states=states, plain=plain, options=options)
                if not self._run(packed_step, made_for, items, **entered):
                    failed += some
        return failed

    def draw(self, members: list[Member]) -> None:
        """Draw their index sets."""
        for member in members:
            if self.wanted is False or not self._tried(member.index, compiled_draw()):
                member.index()

    def begin_episode(self, members: list[Member]) -> list[Member]:
        """Copy the active cells of the model into the anchors. Returns as :meth:`step` does."""
        failed: list[Member] = []
        for key, some in _batches(members, _form_of):
            views = [member.cells.view() for member in some]
            indices = [member.index() for member in some]
            anchors = [slot_of(member).anchor for member in some]
            made_for = key, len(some)
            if not self._run(mixing.copy_active_, made_for, views, indices, anchors):
                failed += some
                continue
            for member in some:
                slot = slot_of(member)
                if slot.value is not None:
                    slot.value.copy_(slot.anchor)
        return failed

    def _run(self, function: Any, key: Hashable, *args: Any, **kwargs: Any) -> bool:
        """Call a function as compiled code; False where it cannot be compiled.

        It is compiled in its first call, before it does anything. Where memory runs out, and where
        code fails that has run before, something may have been written: that is raised.
        """
        if self.wanted is False:
            return False
        kernel = _kernel(function, key)
        if kernel in _proven:
            kernel(*args, **kwargs)
            return True
        if self._tried(kernel, *args, **kwargs):
            _proven.add(kernel)
            return True
        return False

    def _tried(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        try:
            call(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may fail with any
            self._give_up(error)
            return False
        return True

    def _wants(self, member: Member) -> bool:
        if member.cells.local.is_cuda:
            return _compiles_on_cuda() if self.wanted == "auto" else bool(self.wanted)
        # On a CPU torch's own kernels move wide cells faster than compiled code does; where these
        # were asked for, single elements are those of biases and the like, too few to be worth a
        # call.
        cells = member.cells
        return (
            bool(self.wanted)
            and cells.grid.width == 1
            and cells.granularity not in ("row", "column")
        )

    def _form_of_step(self, member: Member) -> Hashable:
        """What compiled code depends on of a member with a gradient."""
        grad = member.cells.gradient
        assert grad is not None
        return (
            _form_of(member),
            grad.dtype,
            grad.stride(),
            type(grad),
            tuple(self.base.state[member.param]),
            member.dither is None,
        )

    def _options(self, member: Member) -> dict[str, Any]:
        """The options of a member's group as compiled code takes them.

        They choose a form of the step without branches on values, which can be fused with gather
        and scatter: the plain one, or that for all tensors at once, of which the compiler makes few
        kernels. A float lr goes into a tensor: as a number it would recompile with every change.
        """
        options = options_of(self.base, member)
        foreach = is_launched(member.param)
        chosen = {"fused": False, "foreach": foreach, "capturable": True}
        options.update({key: value for key, value in chosen.items() if key in options})
        if not isinstance(options["lr"], Tensor):
            options["lr"] = torch.tensor(options["lr"], dtype=torch.float64, device="cpu")
        return options

    def _give_up(self, error: Exception) -> None:
        if self.wanted is not False:
            warn(
                "the step could not be compiled and goes on eagerly; compile=False avoids the "
                f"attempt: {error}"
            )
        self.wanted = False


@cache
def _compiles_on_cuda() -> bool:
    """Without Triton (on Windows, say) torch.compile has nothing to compile to."""
    return importlib.util.find_spec("triton") is not None


@cache
def compiled_draw() -> Callable[..., Tensor]:
    """The compiled form of the stratified sampler, one for all shapes."""
    return torch.compile(stratified_cells, dynamic=True)


def _form_without_lr(options: dict[str, Any]) -> Hashable:
    """The options that are part of compiled code: all numbers but the lr."""
    others = {key: option for key, option in options.items() if key != "lr"}
    return form_of_options(others, numbers=True)


def _lr_is_zero(group: dict[str, Any]) -> bool:
    """Whether compiled code would divide by zero: Adam's divides by the lr."""
    lr = group["lr"]
    return not (isinstance(lr, Tensor) and lr.is_cuda) and bool(lr == 0)


def _form_of(member: Member) -> Hashable:
    """What compiled code depends on of a member."""
    slot, cells = slot_of(member), member.cells
    return (
        cells.grid.width,
        cells.form,
        cells.placement,
        slot.anchor.shape,
        slot.value is None,
        member.index().dtype,
    )


def _without_number(item: Item) -> Item:
    """With the key of its random bits in a tensor: a number would recompile in every episode."""
    if item.dither is None:
        return item
    key = torch.tensor(item.dither.key, device="cpu")
    return item._replace(dither=item.dither._replace(key=key))


def _move_to_device(members: list[Member], state: Any) -> None:
    """Step counts and the like to the parameters' devices: compiled code must not read the host's.

    Eager steps then take them as ``capturable`` ones, which do not wait for them either.
    """
    for member in members:
        entry, device = state[member.param], member.cells.local.device
        for key, item in entry.items():
            if isinstance(item, Tensor) and item.device != device:
                entry[key] = item.to(device, non_blocking=True)


def is_launched(tensor: Tensor) -> bool:
    """Whether kernels on the tensor are launched on a device, each in time of its own."""
    return tensor.device.type != "cpu"


def _batches(
    members: list[Member], form: Callable[[Member], Hashable]
) -> Iterator[tuple[Hashable, list[Member]]]:
    """Members that are alike, so many at a time that one graph is to serve them."""
    for key, some in grouped(members, form).items():
        size = _GPU_TENSORS if is_launched(some[0].param) else _CPU_TENSORS
        for start in range(0, len(some), size):
            yield key, some[start : start + size]


# Compiled code that has run.
_proven: WeakSet[Callable[..., Any]] = WeakSet()


@lru_cache(maxsize=1024)
def _kernel(function: Any, key: Hashable) -> Callable[..., None]:
    """``function`` compiled for arguments of which ``key`` says all that the code depends on."""
    # torch counts recompilations by code object and gives up after a few: every key has its own.
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, dynamic=False, fullgraph=True)
