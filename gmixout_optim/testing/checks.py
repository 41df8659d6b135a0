"""What can be checked of an optimizer at one moment, and against a moment before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from gmixout_optim import GMixoutOptimizer, mixing
from gmixout_optim.bases import per_cell_state
from gmixout_optim.index_sets import active_count
from gmixout_optim.members import Member
from gmixout_optim.shards import local_of

INVARIANTS = {
    1: "off S the live weights are the anchor",
    2: "within an episode neither the anchor nor S changes",
    3: "the anchor moves on S only, at an episode's end, by the EMA formula",
    4: "with anchor_decay=1 the anchor never moves, with 0 an episode's end moves no weight",
    5: "with mask_prob=0 it is the bare optimizer, bit for bit",
    6: "the packed and the dense layout agree",
    7: "index sets are sorted, unique, in range, of the promised size, and follow from the seed",
    8: "saved, loaded and gone on equals never stopped, bit for bit",
    9: "eval_weights() shows what consolidate() would leave and puts the live weights back",
    10: "index sets are the same on every device, in every process and shard",
    11: "what is deployed of a persistent residual is the mean over masks",
    12: "the model is not touched: the same Parameters, storages, keys, shapes and dtypes",
}


class InvariantError(AssertionError):
    """An invariant does not hold.

    Attributes:
        invariant: its number, see docs/invariants.md.
        tensor: name of the parameter; None where all are concerned.
        count: how many weights break it, where they can be counted.
    """

    def __init__(
        self, invariant: int, what: str, tensor: str | None = None, count: int | None = None
    ) -> None:
        self.invariant = invariant
        self.tensor = tensor
        self.count = count
        where = "" if tensor is None else f"{tensor}: "
        super().__init__(f"invariant {invariant} ({INVARIANTS[invariant]}) broken: {where}{what}")


@dataclass(frozen=True, eq=False)
class Seen:
    """What a :class:`Snapshot` holds of one mixed parameter.

    Attributes:
        anchor: a copy of A, in the parameter's shape, dtype and memory format.
        index_sum: sum of the index set.
        look: what must stay of the Parameter: its identity, memory, shape, strides and dtype.
    """

    anchor: Tensor
    index_sum: int
    look: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The anchors of an optimizer at one moment, see :func:`check_invariants`."""

    seed: int
    episode: int
    draws: int
    seen: dict[Member, Seen]

    @property
    def bytes(self) -> int:
        """What it holds: the mixed weights once, in their dtype."""
        return sum(seen.anchor.nbytes for seen in self.seen.values())


@torch.no_grad()
def check_invariants(optimizer: GMixoutOptimizer, *, snapshot: Snapshot | None = None) -> Snapshot:
    """Check all that can be seen of the invariants at this moment, between two steps.

    Sizes, order and uniqueness of the index sets, and that they follow from seed and counters; the
    sizes of what is kept for them; that ``eval_weights()`` shows the weights to deploy and puts the
    live ones back bit for bit; that the persistent residual shows the anchor off S; that all ranks
    are at the same step with the same sets (call it on all of them). The optimizer is left as it
    was. Weights that are loaded or constrained by somebody else are no fault of it.

    Args:
        optimizer: anywhere but inside its ``step()``.
        snapshot: what an earlier call returned. Then also what has changed since: in the same
            episode weights off S, the anchor and S stay; after redraws what was in none of the sets
            since; the Parameters are the same objects in the same memory.

    Returns:
        a snapshot of this moment, for the next call. It holds a copy of the mixed weights.

    Raises:
        InvariantError: names the invariant, the parameter and how many weights break it.
        TypeError: ``optimizer`` is no GMixoutOptimizer.
        RuntimeError: inside ``step()``.
    """
    require(optimizer)
    for check in _NOW:
        check(optimizer)
    if snapshot is not None:
        for against in _BETWEEN:
            against(optimizer, snapshot)
    return take_snapshot(optimizer)


def require(optimizer: Any) -> None:
    if not isinstance(optimizer, GMixoutOptimizer):
        raise TypeError(
            f"optimizer must be a GMixoutOptimizer, got {type(optimizer).__name__}: pass the "
            "wrapper itself (Accelerate and Lightning hold it as .optimizer)"
        )
    optimizer._refuse_in_step("check_invariants()")


@torch.no_grad()
def take_snapshot(optimizer: GMixoutOptimizer) -> Snapshot:
    run = optimizer._run
    seen = {member: see(optimizer, member) for member in optimizer._members}
    return Snapshot(run.seed, run.episode, run.draws, seen)


def see(optimizer: GMixoutOptimizer, member: Member) -> Seen:
    anchor = optimizer._layout.residual.dense_anchor(member)
    return Seen(anchor, index_sum(member), look_of(member))


def index_sum(member: Member) -> int:
    return int(member.index().sum(dtype=torch.int64))


def look_of(member: Member) -> tuple[Any, ...]:
    param, held = member.param, member.cells.local
    return id(param), held.data_ptr(), tuple(param.shape), param.stride(), param.dtype


# At one moment


def check_index_sets(optimizer: GMixoutOptimizer) -> None:
    """7: the sets in use, against sets drawn again from seed and counters."""
    run = optimizer._run
    for member in optimizer._members:
        cells, index = member.cells, member.index()
        check_set(member, index)
        again = cells.draw(run.seed, run.episode)
        if again.shape != index.shape or not torch.equal(again, index):
            wrong = "another size" if again.shape != index.shape else None
            count = None if wrong else int((again != index).sum())
            raise InvariantError(
                7,
                f"seed {run.seed} and episode {run.episode} give another set than is in use "
                f"({wrong or f'{count} of {index.numel()} cells differ'})",
                member.name,
                count,
            )


def check_set(member: Member, index: Tensor) -> None:
    cells, grid = member.cells, member.cells.grid
    if member.run.sampler == "stratified" and grid.piece is None:
        promised = active_count(grid.cells, 1 - cells.mask_prob)
        promised *= 1 if grid.contiguous else grid.width
        if index.numel() != promised:
            raise InvariantError(
                7, f"{index.numel()} cells are active, {promised} were promised", member.name
            )
    numbers = index if grid.contiguous else grid.elements_at(index)
    limit = grid.cells if grid.contiguous else cells.local.numel()
    # Rows and blocks of a tensor in another memory format are told by their elements.
    ordered = numbers if grid.contiguous or grid.width == 1 else numbers.sort().values
    if not _all(ordered[1:] > ordered[:-1]):
        count = int((ordered[1:] <= ordered[:-1]).sum())
        raise InvariantError(
            7, f"{count} indices are not greater than the one before", member.name, count
        )
    if len(ordered) and not 0 <= int(ordered[0]) <= int(ordered[-1]) < limit:
        count = int(((ordered < 0) | (ordered >= limit)).sum())
        raise InvariantError(7, f"{count} indices are out of range", member.name, count)


def check_sizes(optimizer: GMixoutOptimizer) -> None:
    """12: what is kept fits the parameter and its index set."""
    base, whole = optimizer.base, optimizer._layout.residual.keeps_whole_tensors
    packed = optimizer._run.layout == "packed"
    for member in optimizer._members.trained():
        slot, shape = member.slot, member.cells.local.shape
        assert slot is not None
        size = torch.Size([member.cells.grid.size_at(member.index())])
        for name, item in {"anchor": slot.anchor, "value": slot.value}.items():
            if item is not None and item.shape != (shape if whole else size):
                raise InvariantError(
                    12, f"the {name} has shape {tuple(item.shape)}, {size} are active", member.name
                )
        state = base.state.get(member.param, {})
        wrong = per_cell_state(base, state, shape) if packed and shape != size else set()
        if wrong:
            raise InvariantError(
                12, f"the base keeps {sorted(wrong)} of all weights, not of S", member.name
            )


def check_persistent(optimizer: GMixoutOptimizer) -> None:
    """1, where the anchor is kept whole: what the model shows off S."""
    layout = optimizer._layout
    if optimizer._run.residual != "persistent" or layout.shows_deployed:
        return
    for member in optimizer._members.trained():
        slot = member.slot
        assert slot is not None
        if slot.version != member.cells.version:
            continue  # somebody wrote: the next step takes it
        report_off_s(member, slot.anchor, 1, "are not the anchor's")


def check_eval_weights(optimizer: GMixoutOptimizer) -> None:
    """9, and 11: shown are the anchor to come or the mean over masks; then the live ones again."""
    layout = optimizer._layout
    if layout.shows_deployed or optimizer._run.evaluating:
        return
    layout.look_closely()
    trained = [m for m in optimizer._members.trained() if m.slot and not m.slot.foreign]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    live = [local_of(param.detach()).clone(memory_format=torch.preserve_format) for param in params]
    before = dict(zip(params, live, strict=True))
    expected = {member: _to_deploy(optimizer, member) for member in trained}
    with optimizer.eval_weights():
        for member in trained:
            want, scale = expected[member]
            if member.slot is not None and optimizer._run.residual == "persistent":
                shown = member.cells.local.reshape(-1)
            else:
                shown = mixing.gather(member.cells.view(), member.index())
                report_off_s(member, before[member.param], 9, "changed inside eval_weights()")
            wrong = far(shown, want, scale)
            if _any(wrong):
                count = int(wrong.sum())
                number = 11 if optimizer._run.residual == "persistent" else 9
                raise InvariantError(
                    number,
                    f"eval_weights() shows {count} of {want.numel()} weights that are not those to "
                    "deploy",
                    member.name,
                    count,
                )
    names = {member.param: member.name for member in optimizer._members}
    for param, weights in before.items():
        name = names.get(param, f"a parameter of shape {tuple(param.shape)}")
        require_same(
            9, name, local_of(param), weights, "{count} of {total} live weights were not put back"
        )


def _to_deploy(optimizer: GMixoutOptimizer, member: Member) -> tuple[Tensor, Tensor]:
    """The weights to deploy, by the formulas, and the size of what they are computed from."""
    slot, d, s = member.slot, member.cells.density, member.scale
    assert slot is not None
    if optimizer._run.residual == "persistent":
        assert slot.value is not None
        anchor, value = slot.anchor.reshape(-1), slot.value.reshape(-1)
        return anchor + d * s * (value - anchor), anchor.abs() + d * s * (
            value.abs() + anchor.abs()
        )
    value = optimizer._layout.residual.theta(member) if slot.value is None else slot.value
    lam, anchor = member.anchor_decay, slot.anchor
    return (lam * anchor).add_(value, alpha=1 - lam), anchor.abs().add_(value.abs())


def check_ranks(optimizer: GMixoutOptimizer) -> None:
    """10: seed, counters and sets, where there are ranks."""
    if not distributed.is_available() or not distributed.is_initialized():
        return
    run, members = optimizer._run, list(optimizer._members)
    whole = [member for member in members if not member.cells.is_distributed]
    own = [run.seed, run.episode, run.steps_in_episode, *map(index_sum, whole)]
    group = distributed.distributed_c10d._get_default_group()
    device = torch.device("cuda") if distributed.get_backend(group) == "nccl" else "cpu"
    lowest = torch.tensor(own, dtype=torch.int64, device=device)
    highest = lowest.clone()
    distributed.all_reduce(lowest, distributed.ReduceOp.MIN)
    distributed.all_reduce(highest, distributed.ReduceOp.MAX)
    names = ["the seed", "the episode", "steps_in_episode", *(member.name for member in whole)]
    for name, low, high in zip(names, lowest.tolist(), highest.tolist(), strict=True):
        if low != high:
            raise InvariantError(10, f"ranks differ in {name}")


# Against a moment before


def check_looks(optimizer: GMixoutOptimizer, snapshot: Snapshot) -> None:
    """12: the same Parameters in the same memory."""
    what = ("object", "storage", "shape", "strides", "dtype")
    for member, seen in snapshot.seen.items():
        now = look_of(member)
        changed = [name for name, a, b in zip(what, now, seen.look, strict=True) if a != b]
        if changed:
            raise InvariantError(12, f"its {', '.join(changed)} changed", member.name)


def check_inactive(optimizer: GMixoutOptimizer, snapshot: Snapshot) -> None:
    """1: within an episode nothing changes off S, whoever writes."""
    if not _same_episode(optimizer, snapshot):
        return
    if optimizer._run.residual == "persistent":
        check_persistent(optimizer)
        return
    for member, seen in snapshot.seen.items():
        report_off_s(member, seen.anchor, 1, "changed within the episode")


def check_anchors(optimizer: GMixoutOptimizer, snapshot: Snapshot) -> None:
    """2: within an episode the anchor and the set are what they were."""
    if not _same_episode(optimizer, snapshot):
        return
    layout = optimizer._layout
    for member, seen in snapshot.seen.items():
        if index_sum(member) != seen.index_sum:
            raise InvariantError(2, "S is another set than it was", member.name)
        if member.slot is None:
            continue
        before = mixing.gather(member.cells.grid.view(seen.anchor), member.index())
        now = layout.residual.active_anchor(member)
        what = "the anchor of {count} active weights changed within the episode"
        require_same(2, member.name, now.to(before.dtype), before, what)


def check_between_episodes(optimizer: GMixoutOptimizer, snapshot: Snapshot) -> None:
    """3 and 4: what was in none of the sets since is where it was; all of it where lam = 1."""
    run = optimizer._run
    if _same_episode(optimizer, snapshot) or run.seed != snapshot.seed:
        return
    passed = range(snapshot.episode, run.episode)
    if run.residual == "persistent" or not 0 < len(passed) <= 20:
        return  # nearly all weights were active since
    for member, seen in snapshot.seen.items():
        if seen.look != look_of(member) or (member.slot and member.slot.foreign):
            continue
        now = optimizer._layout.residual.dense_anchor(member)
        differs = bits(now) != bits(seen.anchor)
        if member.anchor_decay != 1:
            for episode in passed:
                differs &= ~member.cells.mask(member.cells.draw(run.seed, episode))
        count = int(differs.sum())
        if count:
            number = 4 if member.anchor_decay == 1 else 3
            raise InvariantError(
                number,
                f"{count} anchors moved that no episode since had active",
                member.name,
                count,
            )


def _same_episode(optimizer: GMixoutOptimizer, snapshot: Snapshot) -> bool:
    run = optimizer._run
    return (run.seed, run.episode, run.draws) == (snapshot.seed, snapshot.episode, snapshot.draws)


_NOW: tuple[Callable[..., None], ...] = (
    check_index_sets,
    check_sizes,
    check_persistent,
    check_eval_weights,
    check_ranks,
)
_BETWEEN: tuple[Callable[..., None], ...] = (
    check_looks,
    check_inactive,
    check_anchors,
    check_between_episodes,
)


# Helpers


def bits(tensor: Tensor) -> Tensor:
    """Bit patterns: they tell 0.0 from -0.0, and NaN is equal to itself."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    size = tensor.element_size()
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])


def require_same(invariant: int, name: str, now: Tensor, before: Tensor, what: str) -> None:
    """Raise where bits differ; ``what`` may say ``{count}`` of ``{total}``."""
    if not torch.equal(bits(now), bits(before)):  # counting takes longer
        count = int((bits(now) != bits(before)).sum())
        raise InvariantError(invariant, what.format(count=count, total=now.numel()), name, count)


def off_s(member: Member, differs: Tensor) -> int:
    """How many of the cells' weights off S are marked; ``differs`` may be written to."""
    grid: Any = member.cells.grid
    if not grid.contiguous or not differs.is_contiguous() or differs.shape != grid.shape:
        mask = member.mask()
        return int((differs.reshape(*mask.shape, -1).any(-1) & ~mask).sum())
    view = grid.view(differs)
    view.index_fill_(max(0, view.ndim - 2), member.index().long(), False)
    return int(differs.sum()) if _any(differs) else 0  # counting takes longer than all the rest


def _all(flags: Tensor) -> bool:
    return not _any(~flags)


def _any(flags: Tensor) -> bool:
    """``flags.any()``, eight at a time."""
    flat = flags.reshape(-1)
    words = flat.numel() // 8 * 8
    return bool(flat[:words].view(torch.int64).any()) or bool(flat[words:].any())


def report_off_s(member: Member, before: Tensor, invariant: int, what: str) -> None:
    held = member.cells.local
    if before.shape != held.shape:
        return
    count = off_s(member, bits(held) != bits(before))
    if count:
        raise InvariantError(
            invariant,
            f"{count} of {held.numel()} weights {what}, although they are not active",
            member.name,
            count,
        )


def far(values: Tensor, expected: Tensor, scale: Tensor) -> Tensor:
    """Where finite values are not what a formula gives, up to rounding in their dtype."""
    wide = torch.promote_types(expected.dtype, values.dtype)
    rounding = 4 * torch.finfo(values.dtype).eps
    distance = torch.sub(values.to(wide), expected.to(wide)).abs_()
    allowed = rounding * scale.to(wide)
    return (distance > allowed).logical_and_(allowed.isfinite())
