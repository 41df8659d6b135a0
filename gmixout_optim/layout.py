"""Where the wrapped optimizer works: what is common to the packed and the dense layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim import mixing
from gmixout_optim.bases import Closure
from gmixout_optim.members import Member, Members, Slot
from gmixout_optim.packed_gradient import PackedGradient
from gmixout_optim.residual import Residual, slot_of
from gmixout_optim.settings import KEY


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

    @abstractmethod
    def step(self, closure: Closure | None) -> Any:
        """One step of the base; then the model computes with theta. Returns the closure's loss."""

    @abstractmethod
    def _begin_episodes(self, members: list[Member]) -> None:
        """Take redrawn index sets into use; where the base starts anew, its state is fresh."""

    @abstractmethod
    def take_over(self, member: Member) -> None:
        """Bring a state that the base already has of a tensor into the layout's form."""

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
            whole = self.residual.keeps_whole_tensors and name != "live"
            setattr(slot, name, cells.grid.copy(item.to(device)) if whole else item.to(device))
        slot.placement, slot.version = cells.placement, None
        state = self.base.state.get(member.param, {})
        for key, item in state.items():
            if isinstance(item, Tensor) and item.ndim > 0:
                state[key] = item.to(device)

    def show_slots(self) -> None:
        """Let the base's state show what slots keep, for tools that walk an optimizer's state."""
        self._shows_slots = True
        for member in self.members.trained():
            self.base.state[member.param][KEY] = kept_tensors(slot_of(member))

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

    # Episodes

    def end_episode(self, skip_written: bool = False) -> list[Member]:
        """Move the anchors; ``skip_written`` skips tensors written since the last step.

        Returns the members whose anchors moved toward what somebody else wrote in this episode.
        """
        moved_to = []
        for member in self.open_members():
            if not (skip_written and member.was_written()):
                self.residual.catch_up(member)
                self.residual.end_episode(member)
                if slot_of(member).written:
                    moved_to.append(member)
            slot_of(member).written = False
        return moved_to

    def begin_episode(self) -> None:
        self.members.run.begin_episode()
        self._begin_episodes(self.open_members())

    def reanchor(self) -> None:
        """Take the weights now in the model as the anchor. An episode begins after it."""
        for member in self.open_members():
            self.residual.reanchor(member)

    # What the model shows

    @property
    def shows_deployed(self) -> bool:
        return any(slot_of(member).live is not None for member in self.members.trained())

    def show_deployed(self) -> list[Member]:
        """Put the weights to deploy into tensors that were not written since the last step.

        Returns these. After a failure the model is as it was.
        """
        written, shown = [], []
        try:
            for member in self.open_members():
                if member.was_written():
                    written.append(member)
                else:
                    shown.append(member)
                    self.residual.show_deployed(member)
        except BaseException:
            for member in shown:
                if slot_of(member).live is not None:
                    self.residual.show_live(member)
            raise
        return written

    def show_live(self) -> list[Member]:
        """Put the live weights back, but for tensors that were written since :meth:`show_deployed`.

        There what was written becomes the anchor. Returns these.
        """
        written = []
        for member in self.members.trained():
            if slot_of(member).live is None:
                continue
            self.slot(member)
            if member.was_written():
                written.append(member)
                self.residual.reanchor(member)
            else:
                self.residual.show_live(member)
        return written

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


def kept_tensors(slot: Slot) -> dict[str, Tensor]:
    """What a state dict holds of a slot. Index sets follow from the seed."""
    kept = {"anchor": slot.anchor, "value": slot.value, "live": slot.live}
    return {name: tensor for name, tensor in kept.items() if tensor is not None}
