"""What a mixed tensor learns in an episode: kept, shown in the model, and moved into the anchor.

theta are the live weights, A the anchor, S the active cells, phi or U what the base trains. *The
model holds the truth*: what can be read from it is not kept, and where it no longer holds what was
written, the model wins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmixout_optim import mixing
from gmixout_optim.members import Member, Slot


class Loan(NamedTuple):
    """The whole parameter as it was before :meth:`Residual.lend`, and the slot's value."""

    whole: Tensor
    value: Tensor | None


class Residual(ABC):
    """The method on one tensor, which has a slot in all methods but :meth:`open`."""

    # Whether anchor and value have the parameter's shape and strides, or are packed.
    keeps_whole_tensors: bool

    def open(self, member: Member) -> Slot:
        """The slot of a tensor that is about to be trained: A = theta."""
        cells = member.cells
        anchor, value = self._from_model(member)
        return Slot(anchor, value, cells.placement, cells.form, cells.version)

    def reanchor(self, member: Member) -> None:
        """Take the weights now in the model as the anchor."""
        slot = slot_of(member)
        slot.anchor, slot.value = self._from_model(member)
        slot.live, slot.foreign, slot.trained_foreign = None, False, False

    def look(self, member: Member) -> None:
        """Take what somebody else wrote into the model, and note that they did."""
        slot = slot_of(member)
        changed = slot.version != member.cells.version
        member.notice()
        if slot.live is None:
            self._take_written(member, slot, changed)
        slot.version = member.cells.version

    def show_deployed(self, member: Member) -> None:
        """Put the weights to deploy into the model, until :meth:`show_live`."""
        live, deployed = self.theta(member), self.deployed(member)
        slot_of(member).live = live  # before the write: should it fail, they are put back
        self._write_deployed(member, deployed)

    def show_live(self, member: Member) -> None:
        """Put the live weights back into the model."""
        self._write_theta(member, self.theta(member))
        slot_of(member).live = None  # after the write: should it fail, they are still there

    def still_shows_deployed(self, member: Member) -> bool:
        """Whether the model holds what :meth:`show_deployed` wrote, whoever wrote since."""
        cells, deployed = member.cells, self.deployed(member)
        whole = self.keeps_whole_tensors
        held = cells.local if whole else mixing.gather(cells.view(), member.index())
        return torch.equal(held, deployed.to(held.dtype))

    def theta(self, member: Member) -> Tensor:
        """The live weights on S, packed, in the parameter's dtype."""
        live = slot_of(member).live
        return mixing.gather(member.cells.view(), member.index()) if live is None else live

    def lend(self, member: Member) -> Loan:
        """Make the whole parameter hold what the base trains."""
        loan = Loan(member.cells.grid.copy(member.cells.local), slot_of(member).value)
        self._write_value(member)
        return loan

    def give_up(self, member: Member, loan: Loan) -> None:
        """Undo :meth:`lend` after a failure."""
        slot_of(member).value = loan.value
        member.cells.local.copy_(loan.whole)

    def restored(self, member: Member, index: Tensor, saved: dict[str, Any]) -> Slot:
        """A slot from the tensors of a state dict. Raises ValueError where they do not fit."""
        cells, name = member.cells, member.name
        held = mixing.gather(cells.view(), index)
        like = cells.local if self.keeps_whole_tensors else held.to(self.dtype_of(member))
        anchor = fitting(saved, "anchor", like, name)
        value = fitting(saved, "value", like, name) if self.keeps_value(member) else None
        if self.keeps_whole_tensors:
            anchor, value = (
                cells.grid.copy(anchor),
                value if value is None else cells.grid.copy(value),
            )
        live = fitting(saved, "live", held, name) if "live" in saved else None
        foreign = bool(saved.get("written"))
        return Slot(anchor, value, cells.placement, cells.form, foreign=foreign, live=live)

    def dtype_of(self, member: Member) -> torch.dtype:
        """The dtype of anchor and value."""
        return member.cells.local.dtype

    @abstractmethod
    def keeps_value(self, member: Member) -> bool:
        """Whether the model cannot hold what is trained."""

    @abstractmethod
    def _from_model(self, member: Member) -> tuple[Tensor, Tensor | None]:
        """Anchor and value of a tensor whose weights are the anchor."""

    @abstractmethod
    def _take_written(self, member: Member, slot: Slot, changed: bool) -> None:
        """Make what the slot keeps agree with the model, which may have ``changed``."""

    @abstractmethod
    def _write_value(self, member: Member) -> None:
        """Write the value into the parameter, if there is one."""

    @abstractmethod
    def take_back(self, member: Member, loan: Loan) -> None:
        """Keep what the base made of the whole parameter; the model computes with theta again."""

    @abstractmethod
    def deployed(self, member: Member) -> Tensor:
        """The weights to deploy, as :meth:`_write_deployed` takes them."""

    @abstractmethod
    def _write_deployed(self, member: Member, weights: Tensor) -> None: ...

    @abstractmethod
    def _write_theta(self, member: Member, theta: Tensor) -> None:
        """Make the model compute with live weights that are ``theta`` on S."""

    @abstractmethod
    def end_episode(self, member: Member) -> None:
        """Move the anchor toward what was trained."""

    @abstractmethod
    def begin_episode(self, member: Member) -> None:
        """Take the redrawn index set into use."""

    @abstractmethod
    def active_anchor(self, member: Member) -> Tensor:
        """A on S, packed."""

    @abstractmethod
    def dense_anchor(self, member: Member) -> Tensor:
        """A copy of A, of the parameter's shape and dtype; the tensor need not have a slot."""


class EpisodicResidual(Residual):
    """GMixout: theta is trained on S, with a packed anchor; off S the weights are the anchor.

    Args:
        wide: whether values and anchors are kept in at least float32, whatever the parameter's
            dtype.
    """

    keeps_whole_tensors = False

    def __init__(self, wide: bool) -> None:
        self.wide = wide

    def dtype_of(self, member: Member) -> torch.dtype:
        dtype = member.cells.local.dtype
        return torch.promote_types(dtype, torch.float32) if self.wide else dtype

    def keeps_value(self, member: Member) -> bool:
        return member.scale != 1 or self.dtype_of(member) != member.cells.local.dtype

    def _from_model(self, member: Member) -> tuple[Tensor, Tensor | None]:
        active = mixing.gather(member.cells.view(), member.index())
        anchor = active.to(self.dtype_of(member))
        return anchor, anchor.clone() if self.keeps_value(member) else None

    def _take_written(self, member: Member, slot: Slot, changed: bool) -> None:
        if slot.value is None or not changed:
            return
        held = self.theta(member)
        written = mixing.model_values(slot.anchor, slot.value, member.scale)
        differs = held != self._narrowed(member, written).to(held.dtype)
        taken = mixing.trained_values(slot.anchor, held, member.scale)
        slot.value.copy_(torch.where(differs, taken, slot.value))

    def _write_value(self, member: Member) -> None:
        value = slot_of(member).value
        if value is not None:
            mixing.scatter_(member.cells.view(), member.index(), value)

    def take_back(self, member: Member, loan: Loan) -> None:
        slot = slot_of(member)
        trained = self.theta(member)
        if slot.value is not None:
            slot.value = trained
        member.cells.local.copy_(loan.whole)
        self._write_theta(member, mixing.model_values(slot.anchor, trained, member.scale))

    def deployed(self, member: Member) -> Tensor:
        slot = slot_of(member)
        trained = self.theta(member) if slot.value is None else slot.value
        moved = mixing.moved_anchor(slot.anchor, trained, member.anchor_decay)
        return self._narrowed(member, moved)

    def _narrowed(self, member: Member, packed: Tensor) -> Tensor:
        return mixing.narrowed(packed, member.cells.local.dtype, member.index(), member.dither)

    def _write_deployed(self, member: Member, weights: Tensor) -> None:
        self._write_theta(member, weights)

    def _write_theta(self, member: Member, theta: Tensor) -> None:
        mixing.scatter_(member.cells.view(), member.index(), theta)

    def moves(self, member: Member) -> bool:
        """Whether an episode's end writes anything that the model does not hold yet."""
        return member.anchor_decay != 0 or slot_of(member).value is not None

    def end_episode(self, member: Member) -> None:
        if self.moves(member):
            self._write_theta(member, self.deployed(member))

    def begin_episode(self, member: Member) -> None:
        self.reanchor(member)

    def active_anchor(self, member: Member) -> Tensor:
        return slot_of(member).anchor

    def dense_anchor(self, member: Member) -> Tensor:
        grid = member.cells.grid
        anchor = grid.copy(member.cells.local)
        if member.slot is not None:
            mixing.scatter_(grid.view(anchor), member.index(), member.slot.anchor)
        return anchor


class PersistentResidual(Residual):
    """Mixout: U is trained whole and kept across redraws; the mask says where it is shown.

    ``value`` (U) and ``anchor`` are dense, in the parameter's dtype and with its strides.
    """

    keeps_whole_tensors = True

    def keeps_value(self, member: Member) -> bool:
        return True

    def _from_model(self, member: Member) -> tuple[Tensor, Tensor | None]:
        cells = member.cells
        return cells.grid.copy(cells.local), cells.grid.copy(cells.local)

    def _take_written(self, member: Member, slot: Slot, changed: bool) -> None:
        cells, grid, index = member.cells, member.cells.grid, member.index()
        if member.scale != 1 and not changed:
            return
        anchor, value = self._active(member)
        held = self.theta(member)
        taken = mixing.trained_values(anchor, held, member.scale)
        differs = held != mixing.model_values(anchor, value, member.scale)
        mixing.scatter_(grid.view(_value(slot)), index, torch.where(differs, taken, value))
        slot.anchor.copy_(cells.local)
        mixing.scatter_(grid.view(slot.anchor), index, anchor)

    def _write_value(self, member: Member) -> None:
        member.cells.local.copy_(_value(slot_of(member)))

    def take_back(self, member: Member, loan: Loan) -> None:
        cells = member.cells
        slot_of(member).value = cells.grid.copy(cells.local)
        self.begin_episode(member)

    def deployed(self, member: Member) -> Tensor:
        """The mean over masks of theta, A + d * s * (U - A): U itself with rescaling."""
        slot = slot_of(member)
        if member.scale != 1:
            return _value(slot).clone()
        return torch.lerp(slot.anchor, _value(slot), member.cells.density)

    def _write_deployed(self, member: Member, weights: Tensor) -> None:
        member.cells.local.copy_(weights)

    def _write_theta(self, member: Member, theta: Tensor) -> None:
        slot, cells = slot_of(member), member.cells
        cells.local.copy_(slot.anchor)
        mixing.scatter_(cells.view(), member.index(), theta)

    def end_episode(self, member: Member) -> None:
        slot = slot_of(member)
        slot.anchor.copy_(mixing.moved_anchor(slot.anchor, _value(slot), member.anchor_decay))

    def begin_episode(self, member: Member) -> None:
        self._write_theta(member, mixing.model_values(*self._active(member), member.scale))

    def _active(self, member: Member) -> tuple[Tensor, Tensor]:
        """A and U on S, packed."""
        slot, grid, index = slot_of(member), member.cells.grid, member.index()
        value = mixing.gather(grid.view(_value(slot)), index)
        return mixing.gather(grid.view(slot.anchor), index), value

    def active_anchor(self, member: Member) -> Tensor:
        return self._active(member)[0]

    def dense_anchor(self, member: Member) -> Tensor:
        return (member.cells.local if member.slot is None else member.slot.anchor).clone()


def slot_of(member: Member) -> Slot:
    assert member.slot is not None
    return member.slot


def _value(slot: Slot) -> Tensor:
    assert slot.value is not None
    return slot.value


def fitting(saved: dict[str, Any], key: str, like: Tensor, name: str) -> Tensor:
    """A copy of a saved tensor where ``like`` is; ValueError where shape or dtype differ."""
    tensor = saved.get(key)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"state_dict holds no tensor {key!r} for {name}: it is damaged")
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(
            f"state_dict holds {key!r} of {name} with shape {tuple(tensor.shape)} and "
            f"{tensor.dtype}, but this optimizer needs {tuple(like.shape)} and {like.dtype}: it "
            "belongs to another model or other settings"
        )
    return tensor.detach().to(like.device, copy=True)
