"""Where the wrapped optimizer works: what is common to the packed and the dense layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim import mixing
from gmixout_optim.bases import Closure, renew_state
from gmixout_optim.members import Member, Members, Slot
from gmixout_optim.on_host import numbers_of
from gmixout_optim.packed_gradient import PackedGradient
from gmixout_optim.residual import Residual, slot_of
from gmixout_optim.settings import KEY
from gmixout_optim.shards import reshard

# A write through ``.data`` has no version. So many weights of so many tensors are looked at again,
# which tell whether the whole model was written to.
_WITNESSES, _THEIR_WEIGHTS = 4, 16
# Less than this, relative to a weight, is a decay or a constraint in ``.data``, and no other model.
_SMALL_CHANGE = 1e-5


class Layout(ABC):
    """Steps the base on mixed tensors and runs their episodes.

    Args:
        base: the wrapped optimizer.
        members: the mixed parameters.
        residual: what they keep.
    """

    def __init__(self, base: Optimizer, members: Members, residual: Residual) -> None:
        self.base = base
        self.members = members
        self.residual = residual
        self._shows_slots = False
        self._witnesses: list[tuple[Member, Tensor]] = []
        self._largest: list[Member] = []  # of so many trained ones
        self._sorted = 0
        self._spread: list[Member] = []  # those in pieces

    @abstractmethod
    def step(self, closure: Closure | None) -> Any:
        """One step of the base; then the model computes with theta. Returns the closure's loss."""

    @abstractmethod
    def _begin_episodes(self, members: list[Member]) -> None:
        """Take redrawn index sets into use; where the base starts anew, its state is fresh."""

    @abstractmethod
    def check_state(self, member: Member) -> None:
        """Raise where the base already has a state of a tensor that the layout cannot take over."""

    # Slots

    def slot(self, member: Member) -> Slot:
        """The member's slot, opened at its first use and moved to where its parameter is."""
        slot, cells = member.slot, member.cells
        if slot is None:
            slot = member.slot = self.residual.open(member)
        elif slot.form != cells.form:
            raise RuntimeError(
                f"{member.name} was {slot.form[0]} of shape {tuple(slot.form[1])} and is "
                f"{cells.form[0]} of shape {tuple(cells.form[1])} now: convert the model before "
                "its optimizer is built"
            )
        elif slot.placement != cells.placement:
            self._follow(member, slot)
        return slot

    def open(self, members: list[Member]) -> None:
        """Open the slots of members that have a gradient for the first time."""
        new = [member for member in members if member.slot is None]
        if new:
            self.members.check_apart()  # weights may have been tied since
            self.members.take(new)
        for member in new:
            if KEY in self.base.state.get(member.param, {}):
                raise RuntimeError(
                    f"the state of {member.name} was put into the optimizer from outside, without "
                    "what the wrapper keeps: hand the saved state dict to its load_state_dict() "
                    "(inside ZeroRedundancyOptimizer: optimizer.optim.load_state_dict())"
                )
        for member in new:
            self.slot(member)

    def open_members(self) -> list[Member]:
        """The members that have a slot, which is where the parameter is."""
        members = self.members.trained()
        for member in members:
            self.slot(member)
        return members

    def _follow(self, member: Member, slot: Slot) -> None:
        cells = member.cells
        device = cells.local.device
        for name, item in kept_tensors(slot).items():
            whole = is_whole(self.residual, name)
            setattr(slot, name, cells.grid.copy(item.to(device)) if whole else item.to(device))
        slot.placement = cells.placement
        state = self.base.state.get(member.param, {})
        for key, item in state.items():
            if isinstance(item, Tensor) and item.ndim > 0:
                state[key] = item.to(device)

    def show_slots(self) -> None:
        """Let the base's state show what slots keep, for tools that walk an optimizer's state."""
        self._shows_slots = True
        for member in self.members.trained():
            self.base.state[member.param][KEY] = kept_tensors(slot_of(member))

    @abstractmethod
    def pack_state(self) -> None:
        """Where the base works on packed vectors, pack whole tensors that somebody gave it."""

    def hide_slots(self) -> None:
        """Undo :meth:`show_slots`: an optimizer takes any entry for an initialised state."""
        if not self._shows_slots:
            return
        self._shows_slots = False
        state = self.base.state
        for member in self.members.trained():
            entry = state.get(member.param)
            if entry is not None and KEY in entry:
                del entry[KEY]
                if not entry:
                    del state[member.param]

    # Who wrote. Parameters may share a version counter, as chunks of one tensor do: all are looked
    # at before the library writes to any, and sealed after it has written to all.

    def look(self, but_converted: bool = False) -> None:
        """See what somebody else wrote into the model since :meth:`seal`.

        ``but_converted`` leaves tensors out whose dtype or shape was changed, which are refused.
        """
        always = self.residual.keeps_whole_tensors
        for member in self.members.trained():
            if but_converted and slot_of(member).form != member.cells.form:
                continue
            if self.slot(member).version != member.cells.version or always:
                self.residual.look(member)

    def look_closely(self) -> None:
        """:meth:`look`, and see whether the whole model was written to through ``.data``."""
        changed = [_share_changed(*witness) for witness in self._witnesses]
        shares = numbers_of([share for share in changed if share is not None])
        if sum(share > 0.5 for share in shares) > len(changed) / 2:
            for member in self.members.trained():
                slot = slot_of(member)
                slot.foreign, slot.version = True, None
        self.look()

    def forget(self) -> None:
        """Know nothing of what the model held: it is that of another run from here on."""
        self._witnesses.clear()

    def tell(self) -> None:
        """Emit warnings that were put off until all was done."""
        return

    def seal(self, stepped: bool = False) -> None:
        """What the model holds now is the library's; ``stepped``: and was trained on."""
        trained = self.members.trained()
        if len(trained) != self._sorted:
            self._sorted = len(trained)
            self._spread = [member for member in trained if member.cells.is_distributed]
            held = [member for member in trained if len(member.index())]
            self._largest = sorted(held, key=lambda m: m.cells.grid.cells)[-_WITNESSES:]
        self._witnesses = [
            (member, _first_weights(member)) for member in self._largest if member.slot is not None
        ]
        if self._spread:
            reshard({id(member.param) for member in self._spread})
        for member in trained:
            slot = slot_of(member)
            slot.version = member.cells.version
            if stepped and slot.foreign:
                slot.trained_foreign, slot.foreign = True, False

    # Episodes

    def end_episode(self, keep_foreign: bool = False) -> tuple[list[Member], list[Member]]:
        """Move the anchors toward what the model holds. An episode begins after it.

        Args:
            keep_foreign: leave tensors as they are that somebody else wrote since the last step.

        Returns:
            the members that were left, and those whose anchors moved toward foreign weights.
        """
        if keep_foreign:
            self.look_closely()
        else:
            self.look()
        left, moved, ended = [], [], []
        for member in self.members.trained():
            slot = slot_of(member)
            if keep_foreign and slot.foreign:
                left.append(member)
                continue
            if slot.foreign or slot.trained_foreign:
                moved.append(member)
            ended.append(member)
        self._end_episodes(ended)
        return left, moved

    def _end_episodes(self, members: list[Member]) -> None:
        for member in members:
            self.residual.end_episode(member)

    def begin_episode(self) -> None:
        self.members.run.begin_episode()
        members = self.open_members()
        self._begin_episodes(members)
        for member in members:
            slot = slot_of(member)
            slot.foreign = slot.trained_foreign = False
        self.seal()

    def _renew_state(self, shapes: dict[Member, tuple[torch.Size, torch.Size]]) -> None:
        """Make the base's state of members fresh, whose per-cell tensors are to change shape.

        Tensors are filled together: on a GPU each call would be a launch.
        """
        fills: dict[tuple[Any, torch.dtype, torch.device], list[Tensor]] = {}
        for member, (shape, new_shape) in shapes.items():
            for tensor, number in renew_state(
                self.base,
                member.param,
                member.shown_group,
                shape,
                new_shape,
                member.initial_state,
            ):
                if type(tensor) is not Tensor or (number and not tensor.is_floating_point()):
                    tensor.fill_(number)
                else:
                    fills.setdefault((number, tensor.dtype, tensor.device), []).append(tensor)
        for (number, *_), tensors in fills.items():
            torch._foreach_zero_(tensors)
            if number:
                torch._foreach_add_(tensors, number)

    def reanchor(self) -> None:
        """Take the weights now in the model as the anchor. An episode begins after it."""
        for member in self.open_members():
            self.residual.reanchor(member)

    # What the model shows

    @property
    def shows_deployed(self) -> bool:
        return any(slot_of(member).live is not None for member in self.members.trained())

    def show_deployed(self) -> list[Member]:
        """Put the weights to deploy into the model. After a failure it is as it was.

        Returns:
            the members that were left as they are: somebody else wrote them since the last step.
        """
        self.look_closely()
        members = self.members.trained()
        shown = [member for member in members if not slot_of(member).foreign]
        try:
            for member in shown:
                self.residual.show_deployed(member)
        except BaseException:
            for member in shown:
                if slot_of(member).live is not None:
                    self.residual.show_live(member)
            raise
        finally:
            self.seal()
        return [member for member in members if slot_of(member).foreign]

    def show_live(self) -> list[Member]:
        """Put the live weights back. After a failure those that were not put back are kept.

        Returns:
            the members that were left as they are, their weights now the anchor: somebody else
            wrote them since :meth:`show_deployed`.
        """
        self.look_closely()
        left = []
        try:
            for member in self.members.trained():
                slot = slot_of(member)
                if slot.live is not None and self.residual.still_shows_deployed(member):
                    slot.foreign = False  # an average swapped in and out again, say
                if slot.live is not None and slot.foreign:
                    left.append(member)
                    self.residual.reanchor(member)
                elif slot.live is not None:
                    self.residual.show_live(member)
        finally:
            self.seal()
        return left

    # Gradients

    def active_gradient(self, member: Member) -> Tensor:
        """The gradient with respect to what is trained on the active cells, packed: s * grad."""
        member.check_gradient()
        grad = member.cells.gradient
        assert grad is not None
        if isinstance(grad, PackedGradient):
            active = grad.current_for(member)
        else:
            active = mixing.gather_gradient(member.cells.grid.view(grad), member.index())
        return active if member.scale == 1 else active * member.scale


def _first_weights(member: Member) -> Tensor:
    """Some of the active weights that the model holds."""
    cells = member.cells
    few = -(-_THEIR_WEIGHTS // cells.grid.width)
    return mixing.gather(cells.view(), member.index()[:few])


def _share_changed(member: Member, before: Tensor) -> Tensor | None:
    """How many of these weights are others now; None where they cannot be compared."""
    now = _first_weights(member)
    if (now.shape, now.dtype) != (before.shape, before.dtype):
        return None
    before = before.to(now.device)
    close = torch.isclose(now, before, rtol=_SMALL_CHANGE, atol=0.0, equal_nan=True)
    return 1 - close.float().mean()


def is_whole(residual: Residual, name: str) -> bool:
    """Whether a tensor of :func:`kept_tensors` is of the parameter's shape, or packed."""
    return residual.keeps_whole_tensors and name != "live"


def kept_tensors(slot: Slot) -> dict[str, Tensor]:
    """What a state dict holds of a slot. Index sets follow from the seed."""
    kept = {"anchor": slot.anchor, "value": slot.value, "live": slot.live}
    return {name: tensor for name, tensor in kept.items() if tensor is not None}
