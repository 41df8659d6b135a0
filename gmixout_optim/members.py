"""The parameters that are mixed: which, under what names, and what each of them keeps."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import is_
from threading import RLock
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor

from gmixout_optim.cells import Cells, Dither, Grid, Placement, memory_of
from gmixout_optim.index_sets import MAX_CELLS
from gmixout_optim.param_groups import matches
from gmixout_optim.rates import Rates, scaled_lr
from gmixout_optim.settings import KEY, Run, check_anchor_decay, check_group_keys
from gmixout_optim.shards import why_unusable

# The members that each mixed parameter belongs to, by its id: they hold it for as long as they are
# alive. Torch refuses to swap tensors that have weak references.
_holders: dict[int, ref[Members]] = {}
_lock = RLock()


@dataclass(eq=False)
class Slot:
    """What one mixed tensor keeps in the running episode, from its first gradient on.

    Attributes:
        anchor: A, packed on the active cells; dense with the persistent residual.
        value: what the base trains (phi, or U), where the model does not hold it: below float32,
            with rescaling, and dense with the persistent residual. Else None.
        placement, form: device and strides, dtype and shape of the parameter it was made for.
        version: of the parameter when the library last looked at it or wrote it; None where its
            contents are to be compared, after loading or copying.
        foreign: whether somebody else wrote to the parameter since the last step.
        trained_foreign: whether such weights were trained on in this episode.
        live: the live weights on the active cells while the model shows those to deploy, else None.
    """

    anchor: Tensor
    value: Tensor | None
    placement: Placement
    form: tuple[torch.dtype, torch.Size]
    version: int | None = None
    foreign: bool = False
    trained_foreign: bool = False
    live: Tensor | None = None


@dataclass(eq=False)
class Member:
    """One mixed parameter.

    Attributes:
        cells: the parameter, seen as cells.
        group: its parameter group, read for the live ``anchor_decay`` and learning rate.
        name: its name; its number and shape where the base has no names.
        run: of all members.
        rates: of all members.
        slot: what it keeps; None while it was never trained, and sits at its anchor.
        packs_gradients: whether backward packs its gradients.
        gradient_kind: how its last gradient came to be: dense, packed, or computed actively.
        is_repeated: whether it is in its group more than once, and the base steps it as often.
        initial_state: of :func:`gmixout_optim.bases.initial_state`.
    """

    cells: Cells
    group: dict[str, Any]
    name: str
    run: Run
    rates: Rates
    slot: Slot | None = None
    packs_gradients: bool = False
    gradient_kind: Literal["dense", "packed", "active"] = "dense"
    is_repeated: bool = False
    initial_state: dict[str, Any] | None = None
    _index: tuple[int, Grid, Tensor] | None = None

    @property
    def param(self) -> Tensor:
        return self.cells.param

    @property
    def scale(self) -> float:
        """s = N / m with rescaling, else 1."""
        return 1 / self.cells.density if self.run.rescale else 1.0

    @property
    def anchor_decay(self) -> float:
        """lam, live from the parameter group."""
        decay: float = self.group["anchor_decay"]
        return decay

    @property
    def rate(self) -> float:
        """How many times its group's learning rate it trains with in the step that comes."""
        return self.full_rate * self.risen

    @property
    def risen(self) -> float:
        """The share of the full rate in the step that comes."""
        return self.rates.risen(self.run.steps_in_episode)

    @property
    def full_rate(self) -> float:
        """:attr:`rate` after the episode's warm-up."""
        return self.rates.full(self.cells.density, self.cells.are_outputs)

    @property
    def shown_group(self) -> dict[str, Any]:
        """Its group as the base is shown it: with the learning rate that it trains with."""
        if "lr" not in self.group:
            return self.group
        return {**self.group, "lr": scaled_lr(self.group["lr"], self.rate)}

    @property
    def dither(self) -> Dither | None:
        """The random bits of its rounding in the running episode; None for rounding to nearest."""
        if not self.run.stochastic_rounding:
            return None
        return self.cells.dither(self.run.seed, self.run.episode)

    def index(self) -> Tensor:
        """Where its active cells lie in the running episode; drawn once."""
        draws, grid, device = self.run.draws, self.cells.grid, self.cells.placement[0]
        kept = self._index
        if kept is None or kept[0] != draws or kept[1] is not grid or kept[2].device != device:
            index = self.cells.draw(self.run.seed, self.run.episode)
            kept = self._index = draws, grid, index
        return kept[2]

    def take_cells(self, cell: Tensor) -> None:
        """Take the active cells of the running episode, which somebody else drew."""
        grid = self.cells.grid
        self._index = self.run.draws, grid, grid.address(cell)

    def mask(self) -> Tensor:
        """Its active weights, of those that this rank holds: bool."""
        return self.cells.mask(self.index())

    def notice(self) -> None:
        """Note whether somebody else wrote to the parameter since the library last looked."""
        slot = self.slot
        if slot is not None and slot.version not in (None, self.cells.version):
            slot.foreign = True

    def check_gradient(self) -> None:
        """Raise where the gradient cannot be masked, before anything is changed."""
        self.cells.settle_gradient()
        grad = self.cells.gradient
        if grad is not None and grad.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of {self.name} is sparse ({grad.layout}), which cannot be mixed: "
                "build the layer with dense gradients (torch.nn.Embedding(..., sparse=False)) or "
                "exclude the parameter"
            )


def parameters(
    groups: Iterable[dict[str, Any]],
) -> Iterator[tuple[int, dict[str, Any], int, Tensor]]:
    """``(number, group, place in the group, parameter)`` of all parameters.

    A parameter that is repeated in its group has its last number, as in torch's state dicts.
    """
    count = 0
    for group in groups:
        numbers = {param: count + place for place, param in enumerate(group["params"])}
        for place, param in enumerate(group["params"]):
            yield numbers[param], group, place, param
        count += len(group["params"])


def name_of(group: dict[str, Any], place: int, number: int) -> str:
    names = group.get("param_names")
    if names is not None:
        name: str = names[place]
        return name
    shape = "x".join(map(str, group["params"][place].shape)) or "scalar"
    return f"parameter {number} ({shape})"


class Members:
    """The mixed parameters of one optimizer.

    Args:
        run, rates: of all of them.
        exclude: glob patterns of parameters that are not mixed.
        defaults: of the keys that a group may set for itself.
    """

    def __init__(
        self, run: Run, rates: Rates, exclude: Sequence[str], defaults: dict[str, Any]
    ) -> None:
        self.run = run
        self.rates = rates
        self.exclude = exclude
        self.defaults = defaults
        self._of: dict[Tensor, Member] = {}
        self._is_holding = True
        self.was_holding = True  # before it was copied
        # The groups as they were adopted: dict, parameters, names.
        self._groups: list[tuple[dict[str, Any], list[Tensor], list[str]]] = []

    def __iter__(self) -> Iterator[Member]:
        return iter(self._of.values())

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, param: object) -> bool:
        return param in self._of

    @property
    def group_count(self) -> int:
        return len(self._groups)

    @property
    def param_count(self) -> int:
        """Parameters in all groups, whether mixed or not."""
        return sum(len(params) for _, params, _ in self._groups)

    def get(self, param: Tensor) -> Member | None:
        return self._of.get(param)

    def trained(self) -> list[Member]:
        """Those that have a slot."""
        return [member for member in self if member.slot is not None]

    def find(self, groups: Sequence[dict[str, Any]], first_number: int = 0) -> list[Member]:
        """The parameters of groups that are to be mixed, checked; nothing is changed."""
        found: dict[Tensor, Member] = {}
        excluded = {
            param
            for _, group, place, param in parameters(groups)
            if isinstance(param, Tensor) and self._is_excluded(group, place)
        }
        for number, group, place, param in parameters(groups):
            own = {**group, **check_group_keys({**self.defaults, **group})}
            if not isinstance(param, Tensor):
                raise TypeError(
                    f"optimizer can only optimize Tensors, but one of the params is {param!r}"
                )
            if param in found:
                found[param].is_repeated = True
            elif self.reason_unmixed(own, place) is None and param not in excluded:
                name = name_of(group, place, first_number + number)
                _check_parameter(name, param)
                cells = Cells(
                    param,
                    first_number + number,
                    own["granularity"],
                    own["mask_prob"],
                    self.run.sampler,
                )
                _check_size(name, cells)
                if param.requires_grad:
                    self._check_free(name, param)
                found[param] = Member(cells, group, name, self.run, self.rates)
        self.check_apart(groups, found)
        return list(found.values())

    def check_apart(
        self, added: Iterable[dict[str, Any]] = (), mixed: Iterable[Tensor] = ()
    ) -> None:
        """Raise where a mixed parameter shares memory with another parameter.

        Args:
            added, mixed: groups that are to be added, and which of their parameters are mixed.
        """
        named = [
            pair for _, params, names in self._groups for pair in zip(names, params, strict=True)
        ]
        for number, group, place, param in parameters(added):
            named.append((name_of(group, place, self.param_count + number), param))
        mine = {*self._of, *mixed}
        spans = []
        for name, param in named:
            memory = memory_of(param)
            if memory is not None and param.requires_grad:
                spans.append((memory, name, param))
        spans.sort(key=lambda span: span[0])
        reach: dict[int, tuple[int, str, Tensor]] = {}
        for (storage, start, end), name, param in spans:
            before, other_name, other = reach.get(storage, (start, name, param))
            if start < before and param is not other and not mine.isdisjoint({param, other}):
                raise ValueError(
                    f"{other_name} and {name} are two parameters in the same memory, which would "
                    "undo each other's steps: tie weights by assigning the Parameter itself, as in "
                    "head.weight = embedding.weight, before the base is built"
                )
            if end >= before:
                reach[storage] = end, name, param

    def reason_unmixed(self, group: dict[str, Any], place: int) -> str | None:
        """Why the parameter at ``place`` of a group is not mixed; None where it is."""
        if self._is_excluded(group, place):
            return "excluded"
        if group["mask_prob"] == 0:
            return "mask_prob is 0"
        if group["params"][place].numel() == 0:
            return "empty"
        return None

    def _is_excluded(self, group: dict[str, Any], place: int) -> bool:
        names = group.get("param_names")
        return names is not None and matches(names[place], self.exclude)

    def adopt(self, groups: Iterable[dict[str, Any]], found: Iterable[Member]) -> None:
        """Make parameters found in groups members, and the groups the run's."""
        for group in groups:
            group.update(check_group_keys({**self.defaults, **group}))
            group[KEY] = self.run.shown
            first = self.param_count
            names = [name_of(group, place, first + place) for place in range(len(group["params"]))]
            self._groups.append((group, list(group["params"]), names))
        found = list(found)
        with _lock:
            for key in [key for key, holder in _holders.items() if holder() is None]:
                del _holders[key]
        for member in found:
            self._of[member.param] = member
        self.take(found)

    # One at a time: two would undo each other's steps. Frozen parameters are nobody's until they
    # are trained.

    def hold(self) -> None:
        """Keep other optimizers from mixing these parameters, again after :meth:`release`."""
        if not self._is_holding:
            self.take(list(self))
            self._is_holding = True

    def take(self, members: Iterable[Member]) -> None:
        """:meth:`hold` some. ValueError where another optimizer does, and nothing has changed."""
        members = [m for m in members if m.param.requires_grad or m.slot is not None]
        with _lock:
            for member in members:
                self._check_free(member.name, member.param)
            _holders.update({id(member.param): ref(self) for member in members})

    def release(self) -> None:
        """Let another optimizer mix these parameters."""
        self._is_holding = False
        with _lock:
            for member in self:
                if self._holder_of(member.param) is self:
                    del _holders[id(member.param)]

    def is_held_elsewhere(self, param: Tensor) -> bool:
        return self._holder_of(param) not in (None, self)

    def _check_free(self, name: str, param: Tensor) -> None:
        if not self.is_held_elsewhere(param):
            return
        gc.collect()  # it may be garbage already
        other = self._holder_of(param)
        if other is None or other is self:
            return
        if other._is_given_up():
            other.release()
            return
        raise ValueError(
            f"{name} is mixed by another GMixoutOptimizer, and the two would undo each other's "
            "steps: call consolidate() of that one first, which ends it, or delete it and what "
            "holds it (a trainer, a traceback); or exclude the parameter in one of the two"
        )

    def _is_given_up(self) -> bool:
        """Whether somebody wrote to all that was trained: the model was set to begin again."""
        trained = self.trained()
        return bool(trained) and all(
            member.slot is not None and member.slot.version != member.cells.version
            for member in trained
        )

    @staticmethod
    def _holder_of(param: Tensor) -> Members | None:
        holder = _holders.get(id(param))
        return None if holder is None else holder()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_is_holding": False, "was_holding": self._is_holding}

    def replaced(self, groups: Sequence[dict[str, Any]]) -> dict[Tensor, Tensor]:
        """Maps each parameter that was replaced by one of the same shape to the one in its place.

        Accelerate puts them there, after ``fully_shard()`` has replaced the parameters of the
        model. Empty where :meth:`follow` cannot take them, which :meth:`bind` refuses.
        """
        changed: dict[Tensor, Tensor] = {}
        for group, (_, params, _) in zip(groups, self._groups, strict=False):
            shown = group["params"]
            if len(shown) != len(params):
                return {}
            if all(map(is_, shown, params)):
                continue
            for param, other in zip(params, shown, strict=True):
                if changed.setdefault(param, other) is not other:
                    return {}
        changed = {param: other for param, other in changed.items() if param is not other}
        if not changed:
            return {}
        taken = {id(param) for _, params, _ in self._groups for param in params}
        for param, other in changed.items():
            is_new = isinstance(other, Tensor) and id(other) not in taken
            if not is_new or other.shape != param.shape:
                return {}
            taken.add(id(other))
        return {} if self.trained() else changed

    def follow(self, replaced: dict[Tensor, Tensor]) -> None:
        """Mix parameters that took the places of others, which were never trained.

        Raises:
            TypeError, ValueError: one of them cannot be mixed. Nothing has changed.
        """
        followed: dict[Tensor, Member] = {}
        for param, member in self._of.items():
            other = replaced.get(param, param)
            if other is not param:
                _check_parameter(member.name, other)
                if other.requires_grad and self._is_holding:
                    self._check_free(member.name, other)
                old = member.cells
                cells = Cells(other, old.number, old.granularity, old.mask_prob, old.sampler)
                member = replace(member, cells=cells, packs_gradients=False)
            followed[other] = member
        was_holding = self._is_holding
        self.release()
        self._of = followed
        if was_holding:
            self.hold()
        for _, params, _ in self._groups:
            params[:] = [replaced.get(param, param) for param in params]

    def bind(self, groups: Sequence[dict[str, Any]]) -> None:
        """Follow groups that were replaced by others with the same parameters, place by place.

        Raises:
            RuntimeError: groups were added or removed, or ``group["params"]`` edited, by hand.
        """
        advice = (
            "use add_param_group() of the GMixoutOptimizer to add parameters, "
            "requires_grad_(False) to stop training some, and wrap a new base for other changes"
        )
        if len(groups) != len(self._groups):
            raise RuntimeError(
                f"there are {len(groups)} parameter groups and were {len(self._groups)}: group "
                f"{len(self._groups)} was added past the wrapper, or one was removed; {advice}"
            )
        for number, (group, known) in enumerate(zip(groups, self._groups, strict=True)):
            old, params, names = known
            shown = group["params"]
            if len(shown) != len(params) or not all(map(is_, shown, params)):
                what = _what_changed(shown, params, names)
                raise RuntimeError(f"parameter group {number} {what}: {advice}")
            if group is not old:
                own = check_group_keys({**self.defaults, **check_group_keys(old), **group})
                group.update({**own, KEY: self.run.shown})
                self._groups[number] = group, params, names
                for member in self:
                    if member.group is old:
                        member.group = group

    def check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Raise where a group's fixed settings changed, or its ``anchor_decay`` is impossible."""
        for group in groups:
            check_anchor_decay(group["anchor_decay"])
        for member in {id(member.group): member for member in self}.values():
            group, cells = member.group, member.cells
            fixed = (group["mask_prob"], group["granularity"])
            if fixed != (cells.mask_prob, cells.granularity):
                raise ValueError(
                    f"mask_prob={fixed[0]!r} and granularity={fixed[1]!r} in the group of "
                    f"{member.name} differ from the {cells.mask_prob!r} and {cells.granularity!r} "
                    "that it was wrapped with: they are fixed; wrap a new base to change them"
                )


def _what_changed(shown: Sequence[Any], params: Sequence[Tensor], names: Sequence[str]) -> str:
    """How a group's parameters differ from those that it had."""
    kept = set(map(id, shown))
    lost = [place for place, param in enumerate(params) if id(param) not in kept]
    if not lost:
        return "got or moved parameters by hand"
    name, shape = names[lost[0]], tuple(params[lost[0]].shape)
    if len(shown) != len(params):
        return f"lost {name} by hand"
    return (
        f"lost {name} by hand, in whose place is another tensor. Parameters can take the places of "
        f"others (here of shape {shape}) before the first step alone, all of them, and of the same "
        "shapes, as accelerator.prepare() leaves them; at other times build a new base and "
        "GMixoutOptimizer from them, and load the state_dict() of this one. Otherwise"
    )


def _check_parameter(name: str, param: Tensor) -> None:
    """Raise for a parameter that cannot be mixed."""
    if getattr(param, "_fsdp_flattened", False):  # with and without use_orig_params
        raise TypeError(
            f"{name} is a parameter of FullyShardedDataParallel (FSDP1), whose checkpoints "
            "cannot hold what the wrapper keeps: use fully_shard() (FSDP2) or "
            "DistributedDataParallel, or give its group mask_prob=0"
        )
    reason = why_unusable(param)
    if reason:
        raise TypeError(
            f"{name} is a DTensor that cannot be mixed: {reason}. Distribute it by Shard and "
            "Replicate alone, as fully_shard() and parallelize_module() do, or give its group "
            "mask_prob=0"
        )
    if param.layout != torch.strided:
        raise TypeError(f"{name} has layout {param.layout}: only strided parameters can be mixed")


def _check_size(name: str, cells: Cells) -> None:
    if cells.count > MAX_CELLS:
        raise ValueError(
            f"{name} has {cells.count} cells at granularity={cells.granularity!r}, more than "
            f"{MAX_CELLS}: use a coarser granularity"
        )
