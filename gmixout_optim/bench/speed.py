"""The optimizer's part of training, without forward and backward: times, bytes, traffic.

Parameters have the model's shapes, gradients are constant. The wrapped and the plain optimizer take
turns.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bases import per_cell_state
from gmixout_optim.bench.bases import make_base
from gmixout_optim.bench.bytes import Bytes, ResumeFile, bytes_of, resume_file
from gmixout_optim.bench.models import count_weights, shapes_of
from gmixout_optim.bench.subject import Setting, Subject
from gmixout_optim.bench.timing import Cost, Spread, Turn, copy_bandwidth, count_kernels, take_turns
from gmixout_optim.bench.traffic import step_traffic


@dataclass(frozen=True)
class Footprint:
    """What can be counted of one optimizer.

    Attributes:
        traffic: bytes that a step moves.
        kernels: how many kernels a step launches, None on a CPU.
    """

    bytes: Bytes
    resume_file: ResumeFile
    traffic: int
    kernels: int | None


@dataclass(frozen=True)
class Times:
    """What the wrapper takes.

    Attributes:
        plain_ms: the plain optimizer's steps, in the rounds of ``step``.
        redraw: one call of ``resample()``.
        packing: what packing gradients adds to a backward pass that throws them away; None for
            dense gradients.
        backward: what it adds to one that keeps dense gradients. It is less, and may be below 0,
            where memory for these takes time.
        all_per_step: medians of step and packing and a step's share of a redraw, in plain steps.
    """

    plain_ms: Spread
    step: Cost
    redraw: Cost
    packing: Cost | None
    backward: Cost | None
    all_per_step: float


@dataclass(frozen=True)
class Compared:
    """One setting against the plain optimizer; a ratio is None where the plain one keeps
    nothing."""

    setting: Setting
    times: Times
    footprint: Footprint
    optimizer_ratio: float | None
    beyond_weights_ratio: float | None
    resume_file_ratio: float | None
    copy_share: float


@dataclass(frozen=True)
class Speed:
    """The result.

    Attributes:
        copy_bytes_per_second: read and written when the device only copies.
        plain, plain_ms, plain_copy_share: the plain optimizer, its steps those of all rounds.
        settings: each of the others. A ``copy_share`` is the traffic of a step over its median
            time, as a share of the copy bandwidth.
    """

    copy_bytes_per_second: Spread
    plain: Footprint
    plain_ms: Spread
    plain_copy_share: float
    settings: list[Compared]


class Side:
    """One of the two optimizers with parameters of its own, and gradients as backward leaves them.

    Args:
        gradients: what backward computes, the same each time. It is copied.
    """

    optimizer: Optimizer

    def __init__(self, subject: Subject, gradients: Sequence[Tensor]) -> None:
        self.device = subject.device
        self.params = [nn.Parameter(torch.empty_like(g).normal_(std=0.02)) for g in gradients]
        self.gradients = gradients
        self.optimizer = subject.make_base(self.params)

    def step(self) -> None:
        self.optimizer.step()

    def drop_gradients(self) -> None:
        for param in self.params:
            param.grad = None

    def backward(self) -> None:
        """The end of a backward pass: parameters are given their gradients, and hooks on them
        fire."""
        torch.autograd.backward(self.params, self.gradients)

    def discard_gradients(self) -> None:
        """Now, and from now on as soon as backward has made them."""
        self.drop_gradients()
        self.discarding = [
            param.register_post_accumulate_grad_hook(_discard)  # type: ignore[no-untyped-call]
            for param in self.params
        ]

    def keep_gradients(self) -> None:
        """From now on, as ever."""
        for hook in self.discarding:
            hook.remove()

    def renew_gradients(self) -> None:
        self.drop_gradients()
        self.backward()

    def warm_up(self) -> None:
        """Make gradients and state."""
        self.renew_gradients()
        for _ in range(3):
            self.step()

    def footprint(self) -> Footprint:
        return Footprint(
            bytes_of(self.optimizer),
            resume_file(self.optimizer),
            step_traffic(self.optimizer),
            count_kernels(self.step, self.device),
        )


def _discard(param: Tensor) -> None:
    param.grad = None


class Wrapped(Side):
    """The wrapper's side. Its episodes end when they are asked to."""

    optimizer: GMixoutOptimizer

    def __init__(self, subject: Subject, gradients: Sequence[Tensor], setting: Setting) -> None:
        super().__init__(subject, gradients)
        self.optimizer = setting.wrap(self.optimizer, resample_every=None)

    def redraw(self) -> None:
        self.optimizer.resample()

    def warm_up(self) -> None:
        """Compile, too, and begin an episode that is not the first."""
        super().warm_up()
        self.redraw()
        self.renew_gradients()
        self.step()


def bytes_needed(subject: Subject, settings: Sequence[Setting]) -> int:
    """What :func:`measure_speed` holds at the most, without temporary tensors."""
    param = nn.Parameter(torch.zeros(8))
    param.grad = torch.zeros(8)
    base = make_base(subject.base, [param], form=None)
    base.step()
    states = len(per_cell_state(base, base.state[param], param.shape))
    size = subject.dtype.itemsize
    plain = size * (2 + states)
    # A packed weight has an index, a value and an anchor besides its state.
    ours = max(
        2 * size
        + setting.density
        * (12 + torch.promote_types(subject.dtype, torch.float32).itemsize * states)
        for setting in settings
    )
    return int(count_weights(subject.model) * (size + plain + ours))


def measure_speed(
    subject: Subject,
    settings: Sequence[Setting],
    rounds: int,
    resample_every: int,
    begin: Callable[[str], None],
) -> Speed:
    """Compare each setting with the plain optimizer; ``begin`` is called with a title as each part
    begins."""
    begin("plain")
    torch.manual_seed(0)
    with subject.where_tensors_are_made():
        gradients = [torch.randn(shape) for shape in shapes_of(subject.model)]
    bandwidth = copy_bandwidth(subject.device)
    plain = Side(subject, gradients)
    plain.warm_up()
    footprint = plain.footprint()

    def copy_share(of: Footprint, step_ms: float) -> float:
        return of.traffic / (1e-3 * step_ms) / bandwidth.median

    compared, plain_ms = [], []
    for setting in settings:
        begin(str(setting))
        ours = Wrapped(subject, gradients, setting)
        ours.warm_up()
        step_ms = take_turns(rounds, [Turn(plain.step), Turn(ours.step)], subject.device)
        plain_ms += step_ms[0]
        our_footprint = ours.footprint()
        kept, ours_kept = footprint.bytes, our_footprint.bytes
        compared.append(
            Compared(
                setting,
                _times(plain, ours, step_ms, max(3, rounds // 2), resample_every, setting),
                our_footprint,
                optimizer_ratio=_ratio(ours_kept.optimizer, kept.optimizer),
                beyond_weights_ratio=_ratio(ours_kept.beyond_weights, kept.beyond_weights),
                resume_file_ratio=_ratio(
                    our_footprint.resume_file.bytes, footprint.resume_file.bytes
                ),
                copy_share=copy_share(our_footprint, median(step_ms[1])),
            )
        )
        del ours
        gc.collect()
    return Speed(
        bandwidth, footprint, Spread.of(plain_ms), copy_share(footprint, median(plain_ms)), compared
    )


def _times(
    plain: Side,
    ours: Wrapped,
    step_ms: list[list[float]],
    few: int,
    resample_every: int,
    setting: Setting,
) -> Times:
    """All times, those of steps being there; ``few`` rounds for what happens less often."""
    packing, backward = None, None
    if setting.grad_layout == "packed":
        packing, backward = _packing(plain, ours, few)
    turns = [Turn(plain.step), Turn(ours.redraw, prepare=ours.renew_gradients)]
    reference, redraws = take_turns(few, turns, plain.device)
    step, redraw = Cost.of(step_ms[1], step_ms[0]), Cost.of(redraws, reference)
    return Times(
        Spread.of(step_ms[0]),
        step,
        redraw,
        packing,
        backward,
        all_per_step=step.plain_steps.median
        + redraw.plain_steps.median / resample_every
        + (0.0 if packing is None else packing.plain_steps.median),
    )


def _packing(plain: Side, ours: Wrapped, rounds: int) -> tuple[Cost, Cost]:
    """``packing`` and ``backward`` of :class:`Times`."""
    turns = [
        Turn(plain.backward, prepare=plain.discard_gradients),
        Turn(ours.backward, prepare=ours.drop_gradients),
        Turn(plain.backward, prepare=plain.keep_gradients),
        Turn(plain.step),
    ]
    discarded, packed, kept, step = take_turns(rounds, turns, plain.device)
    return (
        Cost.of([a - b for a, b in zip(packed, discarded, strict=True)], step),
        Cost.of([a - b for a, b in zip(packed, kept, strict=True)], step),
    )


def _ratio(ours: int, plain: int) -> float | None:
    return ours / plain if plain else None
