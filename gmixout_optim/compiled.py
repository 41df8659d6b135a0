"""The packed step and the redraw as code fused by torch.compile.

Tensors go through compiled code a few at a time, those that are alike together: a model repeats its
blocks, so few kernels serve all of it, and what was compiled for one optimizer serves the next.
Each batch is gathered, stepped and written in one graph; its packed values and gradients are never
written to memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Hashable, Iterator
from functools import cache, partial
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim import mixing
from gmixout_optim.bases import is_own, lr_is_zero, resets_in_place
from gmixout_optim.fused import Fused, fuse
from gmixout_optim.index_sets import Strata, stratified_cells_of_many
from gmixout_optim.members import Member
from gmixout_optim.packed_gradient import PackedGradient
from gmixout_optim.packed_step import (
    Item,
    Part,
    by_options,
    gradient_of,
    grouped,
    options_of,
    partition,
    place_of,
    step_parts,
    without_optimizer,
    write,
)
from gmixout_optim.rates import scaled_lr
from gmixout_optim.residual import slot_of
from gmixout_optim.warn import warn

# Tensors in a graph. Compiling takes time for each of them; on a GPU so does every launch, and the
# tensors of a graph share theirs.
_CPU_TENSORS = 6
_GPU_TENSORS = 96

# A GPU reads 16 bytes at once, where they are aligned.
_ALIGNED_CELLS = 4


class Call(NamedTuple):
    """A step of compiled code, to be taken again for as long as the tensors stay.

    Attributes:
        tensors: what it takes before gradients and learning rates.
        members: whom it steps.
        are_packed: whether there are packed gradients among theirs.
        rates: a member of each of its parts, and how many times its group's learning rate that
            trains with after the warm-up.
    """

    fused: Fused
    tensors: list[Tensor]
    members: list[Member]
    are_packed: bool
    rates: list[tuple[Member, float]]

    def arguments(self) -> list[Tensor]:
        """Raises RuntimeError where a packed gradient is of an episode that has ended."""
        if self.are_packed:
            grads: list[Any] = list(map(gradient_of, self.members))
        else:
            grads = [member.cells.param.grad for member in self.members]
        return [*self.tensors, *grads, *_lrs(self.rates)]


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
        self._failure: str | None = None

    def split(self, members: list[Member]) -> tuple[list[Member], list[Member]]:
        """The members to run compiled, and the others: not wanted, or recompiled each time."""
        wanted = torch.cuda.is_available() if self.wanted == "auto" else self.wanted
        if not wanted or not self.static_shapes or not resets_in_place(self.base):
            return [], members
        return partition(members, self._wants)

    def split_step(
        self, members: list[Member], settled: set[int]
    ) -> tuple[list[Member], list[Member]]:
        """Of members that can be stepped in batches those to step compiled, and the others.

        Args:
            settled: ids of the groups whose options, but for the lr, are those of the step before.
                Others step eagerly: a momentum that follows a schedule would recompile in every
                step.
        """
        wanted, others = self.split(members)
        if not wanted:
            return [], members
        # Adam's compiled step divides by the learning rate.
        zero = {id(group) for group in self.base.param_groups if lr_is_zero(group)}
        # Compiled, A + s * (phi - A) may round differently than where the library computes it
        # eagerly.
        settled = settled - zero
        ready, unready = partition(
            wanted,
            lambda m: m.scale == 1 and id(m.group) in settled and not gradient_of(m).is_neg(),
        )
        return ready, unready + others

    def prepare(self, members: list[Member]) -> tuple[list[Call], list[Member]]:
        """The calls that step them, and the members that could not be compiled, as they were."""
        calls: list[Call] = []
        failed: list[Member] = []
        _move_to_device(members, self.base.state)
        for some in _batches(members, self._form_of_step):
            parts = list(map(list, by_options(some)))
            stepped = [member for part in parts for member in part]
            described = list(map(self._part, parts))
            grads = list(map(gradient_of, stepped))
            rates = [(part[0], part[0].full_rate) for part in parts]
            lrs = _lrs(rates)
            changing = len(grads) + len(lrs)
            made = self._tried(partial(fuse, step_parts, described, grads, lrs, changing=changing))
            if made is None:
                failed += some
            else:
                fused, tensors = made
                fixed = tensors[: len(tensors) - changing]
                are_packed = any(type(m.param.grad) is PackedGradient for m in stepped)
                calls.append(Call(fused, fixed, stepped, are_packed, rates))
        return calls, failed

    def draw(self, members: list[Member]) -> None:
        """Draw their index sets; one that could not be is drawn eagerly when it is asked for."""
        for device, on_device in grouped(members, lambda member: member.param.device).items():
            alike = grouped(on_device, lambda member: member.cells.grid.address_dtype)
            strata = {m: m.cells.strata(m.run.seed, m.run.episode) for m in on_device}
            rows: list[tuple[int, ...]] = []
            for some in alike.values():
                starts = accumulate((_room(strata[member]) for member in some), initial=0)
                rows += [(next(starts), *strata[member].numbers) for member in some]
            # From pinned memory the numbers reach a GPU without the host waiting for it.
            on_host = torch.tensor(rows, device="cpu", pin_memory=device.type == "cuda")
            numbers = on_host.to(device, non_blocking=True)
            parts = numbers.split(list(map(len, alike.values())))  # type: ignore[no-untyped-call]
            for (dtype, some), part in zip(alike.items(), parts, strict=True):
                rooms = [_room(strata[member]) for member in some]
                drawn = torch.empty(sum(rooms), dtype=dtype, device=device)
                if not self._fuse_and_call(stratified_cells_of_many, part, drawn):
                    continue
                cells = drawn.split(rooms)  # type: ignore[no-untyped-call]
                for member, cell in zip(some, cells, strict=True):
                    member.take_cells(cell[: strata[member].size])

    def end_episode(self, members: list[Member]) -> list[Member]:
        """Move the anchors toward what the model holds. Returns as :meth:`prepare` does."""
        failed: list[Member] = []
        for some in _batches(members, _form_of):
            items, anchors = list(map(_item, some)), [slot_of(member).anchor for member in some]
            trained = list(map(torch.empty_like, anchors))
            if not self._fuse_and_call(gather_trained, items, trained):
                failed += some
                continue
            # What compiled code rounds may differ in the last bit from what eval() computes.
            moved = mixing.moved_anchors(anchors, trained, [m.anchor_decay for m in some])
            del trained
            if not self._fuse_and_call(scatter_moved, items, moved):
                for item, values in zip(items, moved, strict=True):
                    write(item, values, place_of(item, item.weights.detach()))
        return failed

    def begin_episode(self, members: list[Member]) -> list[Member]:
        """Copy the active cells of the model into the anchors. Returns as :meth:`prepare` does."""
        failed: list[Member] = []
        for some in _batches(members, _form_of):
            if not self._fuse_and_call(begin_episodes, list(map(_item, some))):
                failed += some
        return failed

    def step(self, call: Call, arguments: list[Tensor]) -> bool:
        """Gather, step, write. False where that failed in the first call, and all is as it was.

        Kernels are loaded one by one as they are first launched: those before one that fails have
        run. Where code fails that has run before, what it has written is not known: that is raised.
        """
        if call.fused.has_run:
            call.fused(arguments)
            return True
        tensors = [tensor for member in call.members for tensor in self._stepped(member)]
        before = [tensor.clone() for tensor in tensors]
        weights = [mixing.gather(m.cells.view(), m.index()) for m in call.members]

        def run() -> bool:
            call.fused(arguments)
            return True

        if self._tried(run):
            return True
        for tensor, values in zip(tensors, before, strict=True):
            tensor.copy_(values)
        for member, values in zip(call.members, weights, strict=True):
            mixing.scatter_(member.cells.view(), member.index(), values)
        return False

    def _stepped(self, member: Member) -> list[Tensor]:
        """What a step changes, but for the weights."""
        kept = [*self.base.state[member.param].values(), slot_of(member).value]
        return [item for item in kept if isinstance(item, Tensor)]

    def _fuse_and_call(self, function: Callable[..., None], *args: Any) -> bool:
        """False where that failed, perhaps half-way: the function may be done again."""

        def run() -> bool:
            fused, tensors = fuse(function, *args)
            fused(tensors)
            return True

        return bool(self._tried(run))

    def _tried(self, call: Callable[..., Any]) -> Any:
        """What a call returns; None where a compiler failed, as it may with any exception."""
        if self.wanted is False:
            return None
        try:
            return call()
        except Exception as error:
            self._give_up(error)
            return None

    def _wants(self, member: Member) -> bool:
        if member.cells.is_distributed:  # the sizes of its sets differ between episodes
            return False
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
        """By what members with a gradient are put together; the key of their code says more."""
        grad = member.cells.gradient
        assert grad is not None
        return _form_of(member), grad.dtype, grad.stride(), type(grad), id(member.group)

    def _part(self, members: list[Member]) -> Part:
        """Members that are stepped with the same options, as compiled code takes them.

        The options choose a form of the step without branches on values, which can be fused with
        gather and scatter: the plain one, or that for all tensors at once, of which the compiler
        makes few kernels.
        """
        options = options_of(self.base, members[0])
        foreach = is_launched(members[0].param)
        chosen = {"fused": False, "foreach": foreach, "capturable": True}
        options.update({key: value for key, value in chosen.items() if key in options})
        del options["lr"]
        states = [
            {key: item for key, item in self.base.state[m.param].items() if is_own(self.base, key)}
            for m in members
        ]
        plain = without_optimizer(type(self.base))  # type: ignore[arg-type]
        return Part(list(map(_item, members)), states, plain, options)

    def _give_up(self, error: Exception) -> None:
        self.wanted = False
        self._failure = str(error)

    def tell(self) -> None:
        """Warn of a compiler that failed, once all is as it would have been without it."""
        failure, self._failure = self._failure, None
        if failure is not None:
            warn(
                "the step could not be compiled and goes on eagerly; compile=False avoids the "
                f"attempt: {failure}"
            )


@cache
def _compiles_on_cuda() -> bool:
    """Without Triton (on Windows, say) torch.compile has nothing to compile to."""
    return importlib.util.find_spec("triton") is not None


def _form_of(member: Member) -> Hashable:
    """By what members are put together."""
    slot, cells = slot_of(member), member.cells
    return (
        cells.grid.width,
        cells.form,
        cells.placement,
        slot.anchor.shape,
        slot.value is None,
        member.index().dtype,
    )


def _item(member: Member) -> Item:
    """A member as compiled code takes it, which follows the parameter where its memory goes."""
    item = Item.of(member)._replace(weights=member.param, written=member.param)
    if item.dither is not None:
        # As a number it would have code compiled in every episode.
        key = torch.tensor(item.dither.key, device="cpu")
        item = item._replace(dither=item.dither._replace(key=key))
    return item


def _room(strata: Strata) -> int:
    """Room for cells among those of other tensors, so that each begins at an aligned address."""
    return -(-strata.size // _ALIGNED_CELLS) * _ALIGNED_CELLS


def _lrs(rates: list[tuple[Member, float]]) -> list[Tensor]:
    """The learning rates of parts, as tensors: of a number there would be code for each value."""
    risen = rates[0][0].risen
    lrs = [scaled_lr(member.group["lr"], rate * risen) for member, rate in rates]
    numbers = [0.0 if isinstance(lr, Tensor) else lr for lr in lrs]
    made = torch.tensor(numbers, dtype=torch.float64, device="cpu").unbind()
    tensors = [lr if isinstance(lr, Tensor) else each for lr, each in zip(lrs, made, strict=True)]
    # One that is not scaled may be of integers.
    return [lr if lr.is_floating_point() else lr * 1.0 for lr in tensors]


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


def _batches(members: list[Member], form: Callable[[Member], Hashable]) -> Iterator[list[Member]]:
    """Members for one call of compiled code, those that are alike together.

    On a CPU they are all alike, so that code serves many calls. On a GPU calls and launches are
    what costs.
    """
    alike = list(grouped(members, form).values())
    launched = [member for some in alike for member in some if is_launched(member.param)]
    by_device = grouped(launched, lambda member: member.param.device)
    others = [some for some in alike if not is_launched(some[0].param)]
    for size, batches in ((_GPU_TENSORS, by_device.values()), (_CPU_TENSORS, others)):
        for some in batches:
            for start in range(0, len(some), size):
                yield some[start : start + size]


def gather_trained(items: list[Item], trained: list[Tensor]) -> None:
    """Copy what is trained into vectors."""
    values = [_active(item) if item.value is None else item.value for item in items]
    torch._foreach_copy_(trained, values)


def scatter_moved(items: list[Item], moved: list[Tensor]) -> None:
    """Write packed values to the active cells of the model."""
    for item, values in zip(items, torch._foreach_mul(moved, 1), strict=True):  # one kernel for all
        write(item, values, place_of(item, item.written))


def begin_episodes(items: list[Item]) -> None:
    """Copy the active weights into the anchors, and into the values that are kept."""
    active = list(map(_active, items))
    targets, sources = [item.anchor for item in items], list(active)
    for item, weights in zip(items, active, strict=True):
        if item.value is not None:
            targets.append(item.value)
            sources.append(weights)
    torch._foreach_copy_(targets, sources)


def _active(item: Item) -> Tensor:
    return mixing.gather(*place_of(item, item.weights))
