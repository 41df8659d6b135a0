"""The report: what is mixed, how far it has moved from the anchor, and what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gmixout_optim.checkpoint import name_of, parameters
from gmixout_optim.layout import KEY

if TYPE_CHECKING:
    from gmixout_optim.optimizer import GMixoutOptimizer


@dataclass(frozen=True)
class TensorReport:
    """One parameter.

    Attributes:
        name: its name, or its number.
        shape: its shape.
        group: number of its parameter group.
        mixed: whether it is mixed.
        note: why it is not, or what is particular.
        density: share of its cells that are active, 1.0 for an unmixed one.
        width: elements in a cell.
        drift: root mean square of theta - A over the active weights, relative to that of A; None where it is not
            mixed or was not trained in this episode.
        inactive_differing: how many inactive weights differ from the anchor, None where that is not known
            (packed: the weights themselves are the anchor there).
        active_differing: how many active weights differ from what the optimizer wrote, None where nothing was
            trained yet or the model holds the weights to deploy. Anything but 0 in either says that the weights
            were changed from outside: call ``resync()``, or the next step undoes it.
        state_bytes: bytes of the base's state.
        value_bytes, anchor_bytes, index_bytes: bytes of the trained values, the anchor and the index set.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    mixed: bool
    note: str
    density: float
    width: int
    drift: float | None
    inactive_differing: int | None
    active_differing: int | None
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
    """What :meth:`GMixoutOptimizer.report` returns; ``print`` shows a table, :meth:`to_dict` is for loggers."""

    base: str
    residual: str
    layout: str
    sampler: str
    episode: int
    steps_in_episode: int
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
        covered = sum(torch.Size(tensor.shape).numel() for tensor in mixed)
        rows: list[tuple[str, ...]] = [
            ("parameter", "group", "shape", "mixed", "density", "width", "drift", "bytes", "note")
        ]
        rows += [_row(tensor) for tensor in self.tensors]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            f"GMixout around {self.base}: {self.residual} residual, {self.layout} layout, {self.sampler} sampler; "
            f"episode {self.episode}, step {self.steps_in_episode}",
            f"{len(mixed)} of {len(self.tensors)} tensors mixed, "
            f"{covered / max(1, weights):.1%} of {weights:,} weights",
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
            + f"; {self.total('bytes') / max(1, weights):.2f} per weight",
        ]
        return "\n".join(lines)


def make_report(optimizer: GMixoutOptimizer) -> Report:
    run = optimizer.run
    places = {id(group): place for place, group in enumerate(optimizer.param_groups)}
    return Report(
        base=run["base"],
        residual=run["residual"],
        layout=run["layout"],
        sampler=run["sampler"],
        episode=run["episode"],
        steps_in_episode=run["steps_in_episode"],
        tensors=[
            _tensor_report(optimizer, number, group, place, param, places[id(group)])
            for number, group, place, param in parameters(optimizer)
        ],
    )


def _tensor_report(
    optimizer: GMixoutOptimizer,
    number: int,
    group: dict[str, Any],
    place: int,
    param: Tensor,
    group_number: int,
) -> TensorReport:
    tensor = optimizer.mixed.get(param)
    slot = optimizer.slot_of(param)
    note = ""
    density, width, drift = 1.0, 1, None
    inactive_differing = active_differing = None
    if tensor is None:
        note = optimizer.reason_unmixed(group, place) or "added to the group from outside"
    else:
        active = optimizer.active_mask(param)
        density = float(active.float().mean())
        width = tensor.width
        if tensor.fell_back_to_elements:
            note = f"{param.numel()} elements are not a multiple of {group['granularity']}: element-wise"
        elif not param.requires_grad:
            note = "frozen"
        elif tensor.cells == 1:
            note = "one cell: always active"
        if slot is not None:
            moved, anchor = optimizer.layout.displacement(tensor, slot)
            if moved.numel():
                drift = float(_norm(moved) / _norm(anchor).clamp(min=1e-30))
            changed = param != optimizer.layout.theta(tensor, slot)
            if not (changed.any() and optimizer.shows_deployed(tensor, slot)):
                active_differing = int((changed & active).sum())
                if slot.anchor.shape == param.shape:
                    inactive_differing = int((changed & ~active).sum())
    return TensorReport(
        name=name_of(group, place, number),
        shape=tuple(param.shape),
        group=group_number,
        mixed=tensor is not None,
        note=note,
        density=density,
        width=width,
        drift=drift,
        inactive_differing=inactive_differing,
        active_differing=active_differing,
        state_bytes=_bytes_of(
            {key: item for key, item in optimizer.state.get(param, {}).items() if key != KEY}
        ),
        value_bytes=_bytes_of(slot and slot.value),
        anchor_bytes=_bytes_of(slot and slot.anchor),
        index_bytes=_bytes_of(slot and slot.index),
    )


def _row(tensor: TensorReport) -> tuple[str, ...]:
    note = tensor.note
    changed = (tensor.inactive_differing or 0) + (tensor.active_differing or 0)
    if changed:
        note = f"{changed} weights were changed from outside: call resync()"
    return (
        tensor.name,
        str(tensor.group),
        "x".join(map(str, tensor.shape)) or "scalar",
        "yes" if tensor.mixed else "no",
        f"{tensor.density:.3f}",
        str(tensor.width),
        "" if tensor.drift is None else f"{tensor.drift:.1e}",
        f"{tensor.bytes:,}",
        note,
    )


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor.abs().double())
    return norm


def _bytes_of(item: Any) -> int:
    if hasattr(item, "__tensor_flatten__"):  # a quantised state, say: what it is made of
        return sum(_bytes_of(getattr(item, name)) for name in item.__tensor_flatten__()[0])
    if isinstance(item, Tensor):
        return item.numel() * item.element_size()
    if isinstance(item, dict):
        return sum(map(_bytes_of, item.values()))
    if isinstance(item, list | tuple):
        return sum(map(_bytes_of, item))
    return 0
