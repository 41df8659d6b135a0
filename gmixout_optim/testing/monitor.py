"""Invariants watched while a training runs."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gmixout_optim import GMixoutOptimizer, mixing
from gmixout_optim.members import Member
from gmixout_optim.testing.checks import (
    InvariantError,
    Snapshot,
    check_anchors,
    check_eval_weights,
    check_inactive,
    check_looks,
    check_persistent,
    far,
    index_sum,
    require,
    require_same,
    see,
    take_snapshot,
)
from gmixout_optim.warn import warn


class InvariantMonitor:
    """Checks invariants 1 to 4, 9 and 12 while a training runs.

    Off S the live weights are the anchor, so a change there can be seen against a copy only: the
    monitor keeps one of the mixed weights (2 or 4 bytes per weight, in their dtype; a tenth more
    during a redraw). Inactive weights that changed within an episode are reported, whoever wrote
    them. After :meth:`GMixoutOptimizer.resync` and ``load_state_dict()`` it starts anew.

    Args:
        optimizer: the wrapper, whatever loop steps it.
        every: steps between two checks, of which each takes about as long as a step or two of the
            optimizer. The end of each episode is checked in any case.
        on_fail: ``"raise"`` an :class:`InvariantError` out of ``optimizer.step()``, which was
            taken, or ``"warn"`` and go on.

    Attributes:
        failures: the errors that were warned about.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
        RuntimeError: entered while it is watching already.

    Example::

        with InvariantMonitor(optimizer, every=50):
            train(model, optimizer)
    """

    def __init__(
        self,
        optimizer: GMixoutOptimizer,
        every: int = 50,
        on_fail: Literal["raise", "warn"] = "raise",
    ) -> None:
        require(optimizer)
        if not isinstance(every, int) or isinstance(every, bool):
            raise TypeError(f"every must be an int, got {every!r}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every!r}")
        if on_fail not in ("raise", "warn"):
            raise ValueError(f"on_fail must be 'raise' or 'warn', got {on_fail!r}")
        self.optimizer = optimizer
        self.every = every
        self.on_fail = on_fail
        self.failures: list[InvariantError] = []
        self._only: frozenset[int] | None = None
        self._handles: list[RemovableHandle] = []
        self._snapshot: Snapshot | None = None
        self._ending: dict[Member, _Ending] = {}
        self._steps = 0

    @classmethod
    def _of_one(cls, optimizer: GMixoutOptimizer, invariant: int) -> InvariantMonitor:
        """Checks one invariant alone, after every step."""
        monitor = cls(optimizer, every=1)
        monitor._only = frozenset({invariant})
        return monitor

    def start(self) -> None:
        """Begin to watch, as entering the context does; for callbacks."""
        if self._handles:
            raise RuntimeError("this InvariantMonitor is watching already: stop() it first")
        optimizer = self.optimizer
        require(optimizer)
        self._snapshot, self._steps = take_snapshot(optimizer), 0
        self._handles = [
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_resample_pre_hook(self._before_redraw),
            optimizer.register_resample_hook(self._after_redraw),
            optimizer.register_load_state_dict_post_hook(self._forget),
        ]

    def stop(self) -> None:
        """Check once more, and watch no longer. Does nothing where it is not watching."""
        if not self._handles:
            return
        try:
            self.check()
        finally:
            self._remove()

    def __enter__(self) -> InvariantMonitor:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self._remove()

    @torch.no_grad()
    def check(self) -> None:
        """Check now, between two steps."""
        optimizer, snapshot = self.optimizer, self._snapshot
        require(optimizer)
        if snapshot is None or snapshot.draws != optimizer._run.draws:
            self._snapshot = take_snapshot(optimizer)
            return
        try:
            if self._wants(12):
                check_looks(optimizer, snapshot)
            if self._wants(1):
                check_inactive(optimizer, snapshot)
                check_persistent(optimizer)
            if self._wants(2):
                check_anchors(optimizer, snapshot)
            if self._wants(9):
                self._check_round_trip()
        except InvariantError as error:
            self._fail(error)

    def _check_round_trip(self) -> None:
        """9 takes a copy of all weights: in long intervals, or where it was asked for."""
        if self._only is not None or self._steps % (10 * self.every) == 0:
            check_eval_weights(self.optimizer)

    def _wants(self, invariant: int) -> bool:
        return self._only is None or invariant in self._only

    def _fail(self, error: InvariantError) -> None:
        if self.on_fail == "raise":
            raise error
        self.failures.append(error)
        warn(str(error))
        self._snapshot = take_snapshot(self.optimizer)  # once is enough

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._snapshot, self._ending = [], None, {}

    # Hooks

    def _after_step(self, *_: Any) -> None:
        self._steps += 1
        if self._snapshot is None:  # a state dict was loaded: the model's weights have come, too
            self._snapshot = take_snapshot(self.optimizer)
        elif self._steps % self.every == 0:
            self.check()

    def _forget(self, *_: Any) -> None:
        self._snapshot = None

    @torch.no_grad()
    def _before_redraw(self, optimizer: GMixoutOptimizer) -> None:
        snapshot, self._ending = self._snapshot, {}
        if snapshot is None or snapshot.draws != optimizer._run.draws:
            return
        layout = optimizer._layout
        layout.look()
        for member in optimizer._members.trained():
            slot = member.slot
            if slot is None or slot.foreign or member not in snapshot.seen:
                continue  # what somebody loaded may be kept as it is
            if optimizer._run.residual == "persistent":
                assert slot.value is not None
                self._ending[member] = _Ending(member.index(), slot.anchor.clone(), slot.value)
            else:
                value = layout.residual.theta(member) if slot.value is None else slot.value.clone()
                self._ending[member] = _Ending(member.index(), slot.anchor.clone(), value)

    @torch.no_grad()
    def _after_redraw(self, optimizer: GMixoutOptimizer) -> None:
        snapshot, ending = self._snapshot, self._ending
        self._ending = {}
        if snapshot is None or not ending:
            self._snapshot = take_snapshot(optimizer)
            return
        try:
            if self._wants(3) or self._wants(4):
                for member, end in ending.items():
                    _check_moved(optimizer, member, end)
        except InvariantError as error:
            self._fail(error)
            return
        self._snapshot = _followed(optimizer, snapshot, ending)


class _Ending:
    """A tensor just before its episode's end: its set, and A and what was trained on it."""

    def __init__(self, index: Tensor, anchor: Tensor, value: Tensor) -> None:
        self.index = index
        self.anchor = anchor
        self.value = value


def _check_moved(optimizer: GMixoutOptimizer, member: Member, end: _Ending) -> None:
    """3 and 4: the new anchor is lam * A + (1 - lam) * theta, between the two."""
    lam = member.anchor_decay
    if optimizer._run.residual == "persistent":
        assert member.slot is not None
        moved = member.slot.anchor
    else:
        moved = mixing.gather(member.cells.view(), end.index)
    expected = lam * end.anchor + (1 - lam) * end.value
    wrong = far(moved, expected, end.anchor.abs() + end.value.abs())
    if end.anchor.dtype == end.value.dtype == moved.dtype:
        least, most = torch.minimum(end.anchor, end.value), torch.maximum(end.anchor, end.value)
        wrong |= (moved < least) | (moved > most)
    count = int(wrong.sum())
    if count:
        raise InvariantError(
            3,
            f"at the end of episode {optimizer.episode - 1} {count} of {moved.numel()} anchors "
            f"did not move to {lam} * A + {1 - lam:g} * theta",
            member.name,
            count,
        )
    kept = end.anchor if lam == 1 else end.value if lam == 0 else None
    if kept is not None and kept.dtype == moved.dtype:
        what = f"{{count}} anchors are not exactly what anchor_decay={lam:g} leaves"
        require_same(4, member.name, moved, kept, what)


def _followed(
    optimizer: GMixoutOptimizer, snapshot: Snapshot, ending: dict[Member, _Ending]
) -> Snapshot:
    """The snapshot with the anchors that moved, written on S alone where they are packed."""
    run, seen = optimizer._run, {}
    for member in optimizer._members:
        before, end = snapshot.seen.get(member), ending.get(member)
        if before is None or (
            member.slot is not None and (end is None or run.residual != "episodic")
        ):
            seen[member] = see(optimizer, member)
            continue
        if end is not None:
            moved = mixing.gather(member.cells.view(), end.index)
            mixing.scatter_(member.cells.grid.view(before.anchor), end.index, moved)
        seen[member] = replace(before, index_sum=index_sum(member))
    return Snapshot(run.seed, run.episode, run.draws, seen)
