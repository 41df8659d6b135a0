"""The report: what is mixed, how far it has moved from the anchor, and what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gmixout_optim.layout import Layout
from gmixout_optim.members import Member, name_of, parameters
from gmixout_optim.on_host import numbers_of
from gmixout_optim.settings import KEY
from gmixout_optim.shards import local_of


@dataclass(frozen=True)
class TensorReport:
    """One parameter.

    Attributes:
        name: its name, or its number.
        shape: its shape.
        held: how many of its weights this rank holds; all of them where it is in no pieces.
        group: number of its parameter group.
        mixed: whether it is mixed.
        note: why it is not, or what is particular.
        density: share of its cells that are active, 1.0 for an unmixed one.
        width: elements in a cell.
        drift: root mean square of theta - A over the active weights, relative to that of A; None
            where it is not mixed or was not trained in this episode, and where A is zero.
        gradient: how its last gradient was made: "dense", "packed" after backward had made it
            dense, or "active": computed for the active rows or columns alone.
        state_bytes: bytes of the base's state.
        value_bytes: bytes of what is trained, where the model does not hold it.
        anchor_bytes, index_bytes: bytes of the anchor and the index set.
    """

    name: str
    shape: tuple[int, ...]
    held: int
    group: int
    mixed: bool
    note: str
    density: float
    width: int
    drift: float | None
    gradient: str
    state_bytes: int
    value_bytes: int
    anchor_bytes: int
    index_bytes: int

    @property
    def bytes(self) -> int:
        """All that is kept between steps beside the weights and their gradients."""
        return self.state_bytes + self.value_bytes + self.anchor_bytes + self.index_bytes


@dataclass(frozen=True)
class Report:
    """What :meth:`GMixoutOptimizer.report` returns; ``print`` shows a table.

    Where parameters are in pieces on several ranks, bytes and drifts are those of this rank.

    Attributes:
        is_live: whether the model holds live weights of an unfinished episode, which are not those
            to deploy.
    """

    base: str
    residual: str
    layout: str
    sampler: str
    episode: int
    steps_in_episode: int
    is_live: bool
    tensors: list[TensorReport]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return asdict(self)

    def total(self, part: str) -> int:
        """Sum over tensors of one of the ``*_bytes``, or of ``"bytes"``, all of them."""
        return sum(getattr(tensor, part) for tensor in self.tensors)

    def __str__(self) -> str:
        mixed = [tensor for tensor in self.tensors if tensor.mixed]
        weights = sum(torch.Size(tensor.shape).numel() for tensor in self.tensors)
        held = sum(tensor.held for tensor in self.tensors)
        covered = sum(torch.Size(tensor.shape).numel() for tensor in mixed)
        columns = ["parameter", "group", "shape", "mixed", "density", "width", "drift", "gradient"]
        rows: list[tuple[str, ...]] = [(*columns, "bytes", "note")]
        rows += [_row(tensor) for tensor in self.tensors]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            f"GMixout around {self.base}: {self.residual} residual, {self.layout} layout, "
            f"{self.sampler} sampler; episode {self.episode}, step {self.steps_in_episode}",
            f"{len(mixed)} of {len(self.tensors)} tensors mixed, "
            f"{covered / max(1, weights):.1%} of {weights:,} weights",
            "the model holds live weights: save those to deploy inside eval_weights(), or after "
            "consolidate()"
            if self.is_live
            else "the model holds the weights to deploy",
            *(
                "  ".join(
                    cell.ljust(width) for cell, width in zip(row, widths, strict=True)
                ).rstrip()
                for row in rows
            ),
            "bytes: "
            + ", ".join(
                f"{part} {self.total(part + '_bytes'):,}"
                for part in ("state", "value", "anchor", "index")
            )
            + f"; {self.total('bytes') / max(1, held):.2f} per weight"
            + ("" if held == weights else f" of the {held:,} on this rank"),
        ]
        return "\n".join(lines)


def make_report(layout: Layout) -> Report:
    run, groups = layout.members.run, layout.base.param_groups
    distinct: dict[int, tuple[dict[str, Any], int]] = {}
    for number, group, place, _ in parameters(groups):
        distinct.setdefault(number, (group, place))
    numbers = {id(group): number for number, group in enumerate(groups)}
    norms = _norms(layout)
    return Report(
        base=run.base,
        residual=run.residual,
        layout=run.layout,
        sampler=run.sampler,
        episode=run.episode,
        steps_in_episode=run.steps_in_episode,
        is_live=bool(layout.members.trained())
        and not layout.shows_deployed
        and (run.residual == "persistent" or run.steps_in_episode > 0),
        tensors=[
            _report_on(
                layout, name_of(group, place, number), group, numbers[id(group)], place, norms
            )
            for number, (group, place) in distinct.items()
        ],
    )


def _report_on(
    layout: Layout,
    name: str,
    group: dict[str, Any],
    group_number: int,
    place: int,
    norms: dict[Member, tuple[float, float]],
) -> TensorReport:
    param = group["params"][place]
    member = layout.members.get(param)
    slot = None if member is None else member.slot
    return TensorReport(
        name=name,
        shape=tuple(param.shape),
        held=local_of(param).numel(),
        group=group_number,
        mixed=member is not None,
        note=_note(layout, group, place, member),
        density=1.0 if member is None else _density(member),
        width=1 if member is None else member.cells.width,
        drift=None if member is None else _drift(*norms.get(member, (0.0, 0.0))),
        gradient="dense" if member is None else member.gradient_kind,
        state_bytes=nbytes_of(
            {key: item for key, item in layout.base.state.get(param, {}).items() if key != KEY}
        ),
        value_bytes=nbytes_of(slot and [slot.value, slot.live]),
        anchor_bytes=nbytes_of(slot and slot.anchor),
        index_bytes=nbytes_of(slot and member and member.index()),
    )


def _note(layout: Layout, group: dict[str, Any], place: int, member: Member | None) -> str:
    if member is None:
        return layout.members.reason_unmixed(group, place) or "added to the group from outside"
    if member.cells.fell_back_to_elements:
        return f"{_why_not(member)}: element-wise"
    if not member.param.requires_grad:
        return "frozen"
    return "one cell: always active" if member.cells.count == 1 else ""


def _why_not(member: Member) -> str:
    """Why the cells that were asked for do not fit."""
    shape, granularity = member.param.shape, member.cells.granularity
    if granularity != "column":
        return f"{shape.numel()} elements are not a multiple of {granularity}"
    if len(shape) < 2 or shape[0] == 1:
        return "has no columns"
    return "has 1 column" if shape[1] == 1 else f"{shape[1]} columns are too few"


def _density(member: Member) -> float:
    return member.cells.grid.size_at(member.index()) / max(1, member.cells.local.numel())


def _norms(layout: Layout) -> dict[Member, tuple[float, float]]:
    """How far the active weights of trained members have moved, and the size of the anchor."""
    members = layout.open_members()
    norms: list[Tensor] = []
    for member in members:
        anchor = layout.residual.active_anchor(member)
        moved = layout.residual.theta(member).to(anchor.dtype) - anchor
        norms += _norm(moved), _norm(anchor)
    numbers = numbers_of(norms)
    return dict(zip(members, zip(numbers[::2], numbers[1::2], strict=True), strict=True))


def _drift(moved: float, size: float) -> float | None:
    """Relative to the anchor, which says nothing where the anchor is zero."""
    return moved / size if size > 0 else None


def _row(tensor: TensorReport) -> tuple[str, ...]:
    return (
        tensor.name,
        str(tensor.group),
        "x".join(map(str, tensor.shape)) or "scalar",
        "yes" if tensor.mixed else "no",
        f"{tensor.density:.3f}",
        str(tensor.width),
        "" if tensor.drift is None else f"{tensor.drift:.1e}",
        tensor.gradient,
        f"{tensor.bytes:,}",
        tensor.note,
    )


def _norm(tensor: Tensor) -> Tensor:
    size = tensor.abs()
    norm: Tensor = torch.linalg.vector_norm(
        size, dtype=torch.promote_types(size.dtype, torch.float32)
    )
    return norm


def nbytes_of(item: Any) -> int:
    """Of all tensors in nested dicts and lists."""
    if hasattr(item, "__tensor_flatten__"):  # a quantised state, say: what it is made of
        return sum(nbytes_of(getattr(item, name)) for name in item.__tensor_flatten__()[0])
    if isinstance(item, Tensor):
        return item.numel() * item.element_size()
    if isinstance(item, dict):
        return sum(map(nbytes_of, item.values()))
    if isinstance(item, list | tuple):
        return sum(map(nbytes_of, item))
    return 0
