"""The random trials in which the library is held against its own promises and the reference.

A :class:`Scenario` (drawn by :func:`scenarios`) says what a :class:`Trial` does: which optimizer,
tensors, groups and settings, which gradients are missing when. The loss is a noisy quadratic, so
gradients depend on the live weights and a difference in one step feeds back into all later ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, Optimizer, Rprop

from gmixout_optim import GMixoutOptimizer
from tests.optimizers import Case
from tests.reference import Gradients, Mix, Reference

# The first of a list is what a failing example is reduced to, and what is drawn most often.
SHAPES: list[tuple[int, ...]] = [
    (3, 4),
    (6, 8),
    (12,),
    (2, 3, 4),
    (4, 2, 3, 3),
    (7,),
    (5, 1),
    (1, 6),
    (1,),
    (),
    (0,),
    # With columns, in blocks where there are many.
    (3, 34),
    (2, 96),
    (2, 32, 2),
]
MATRICES = [shape for shape in SHAPES if len(shape) == 2]

# "strided": every second element of a larger tensor.
MEMORIES = ["contiguous", "transposed", "channels_last", "strided"]


@dataclass(frozen=True)
class TensorSpec:
    """One parameter; ``name`` begins with "head" where it is excluded."""

    shape: tuple[int, ...]
    memory: str
    name: str

    def make(self, values: Tensor) -> Tensor:
        """A tensor of this shape and memory format that holds ``values``."""
        if self.memory == "transposed" and self.shape:
            empty = values.new_empty(self.shape[::-1]).permute(*range(len(self.shape))[::-1])
        elif self.memory == "channels_last" and len(self.shape) == 4:
            empty = torch.empty_like(values, memory_format=torch.channels_last)
        elif self.memory == "strided":
            wide = values.new_empty([2 * size for size in self.shape])
            empty = wide[tuple(slice(None, None, 2) for _ in self.shape)]
        else:
            empty = torch.empty_like(values)
        return empty.copy_(values)


@dataclass(frozen=True)
class Scenario:
    """A training run in numbers.

    Attributes:
        groups: for each parameter group its tensors and the settings of its own.
        settings: the wrapper's arguments.
        missing: (step, tensor) where a gradient is None.
        frozen: a tensor with the steps from which to which it needs no gradient.
        closure: whether the step gets one.
        other_strides: gradients come contiguous, whatever the parameter.
        lr_decay: factor of the learning rate in every step.
        new_decay: lam of all groups from the third step on, None for no change.
        poison: (step, NaN or inf) put into every third gradient value.
        writes: (step, tensor) where somebody writes into the model before the step.
        through_data: whether they write to ``.data``, which autograd does not see.
    """

    case: Case
    dtype: torch.dtype
    groups: tuple[tuple[tuple[TensorSpec, ...], dict[str, Any]], ...]
    settings: dict[str, Any]
    steps: int
    seed: int
    missing: frozenset[tuple[int, int]] = frozenset()
    frozen: tuple[int, int, int] | None = None
    closure: bool = False
    other_strides: bool = False
    lr_decay: float = 1.0
    new_decay: float | None = None
    poison: tuple[int, float] | None = None
    writes: frozenset[tuple[int, int]] = frozenset()
    through_data: bool = False

    def with_settings(self, **settings: Any) -> Scenario:
        return replace(self, settings={**self.settings, **settings})

    def without_groups(self, *keys: str) -> Scenario:
        """The same with the groups' own settings of these names left out."""
        groups = tuple(
            (specs, {key: value for key, value in own.items() if key not in keys})
            for specs, own in self.groups
        )
        return replace(self, groups=groups, new_decay=None)

    @property
    def specs(self) -> list[TensorSpec]:
        return [spec for specs, _ in self.groups for spec in specs]


@st.composite
def scenarios(
    draw: st.DrawFn,
    case: Case,
    *,
    layouts: tuple[str, ...] = ("auto", "packed", "dense"),
    residuals: tuple[str, ...] = ("episodic", "persistent"),
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32),
    mask_probs: tuple[float, ...] = (0.5, 0.1, 0.75, 0.9, 0.97, 0.0),
) -> Scenario:
    """Any scenario that ``case`` can run."""
    flags = st.booleans()
    probs = st.sampled_from(mask_probs)
    decays = st.sampled_from([0.3, 0.9, 0.0, 1.0])
    granularities = st.sampled_from(["element", "row", "column", 2, 3, 5, 1])
    layout = draw(st.sampled_from(layouts if case.elementwise else ("auto", "dense")))
    # A fused step walks parameter and gradient through memory side by side, whatever their strides.
    fused = bool(case.kwargs.get("fused"))
    memories = st.sampled_from(MEMORIES[:3] if fused else MEMORIES)
    shapes = st.sampled_from(MATRICES if case.matrices_only else SHAPES)
    if not case.elementwise:
        # Adafactor divides by the number of elements, LBFGS takes a maximum.
        shapes = shapes.filter(lambda shape: 0 not in shape)
    if case.name == "LBFGS":
        memories = st.just("contiguous")  # it takes views of gradients
    # LBFGS trains one vector of all weights; a missing gradient is a zero in it.
    absences = not case.closure
    excluding = draw(flags)

    groups = []
    count = 0
    for _ in range(1 if case.closure else draw(st.integers(1, 3))):
        specs = []
        for _ in range(draw(st.integers(1, 3))):
            place = "head" if excluding and (count == 0 or draw(flags)) else "body"
            specs.append(TensorSpec(draw(shapes), draw(memories), f"{place}.{count}"))
            count += 1
        own = st.fixed_dictionaries(
            {},
            optional=dict(mask_prob=probs, anchor_decay=decays, granularity=granularities),
        )
        groups.append((tuple(specs), draw(own)))

    steps = draw(st.integers(2, 7))
    some_step, some_tensor = st.integers(0, steps - 1), st.integers(0, count - 1)
    lowest = torch.float64 if case.name in ("Muon", "LBFGS") else None
    return Scenario(
        case=case,
        # Muon works in bfloat16 inside and LBFGS compares curvatures: both turn roundings of
        # float32 into steps.
        dtype=lowest or draw(st.sampled_from(dtypes)),
        groups=tuple(groups),
        settings=dict(
            mask_prob=draw(probs),
            exclude="head.*" if excluding else (),
            resample_every=draw(st.sampled_from([2, 1, 3, None])),
            anchor_decay=draw(decays),
            residual=draw(st.sampled_from(residuals)),
            rescale=draw(flags),
            lr_scale="auto" if case.closure else draw(st.sampled_from(["auto", 1.0, 0.5, 3.0])),
            episode_warmup="auto" if case.closure else draw(st.sampled_from(["auto", 0, 2, 5])),
            granularity=draw(granularities),
            sampler=draw(st.sampled_from(["stratified", "bernoulli"])),
            layout=layout,
            seed=draw(st.integers(0, 2**63 - 1)),
        ),
        steps=steps,
        seed=draw(st.integers(0, 2**31)),
        missing=draw(st.frozensets(st.tuples(some_step, some_tensor), max_size=4 * absences)),
        frozen=draw(st.none() | st.tuples(some_tensor, some_step, some_step)) if absences else None,
        closure=case.closure or draw(flags),
        other_strides=not fused and draw(flags),
        lr_decay=draw(st.sampled_from([1.0, 0.8])),
        new_decay=draw(st.none() | decays),
    )


@st.composite
def written_to(draw: st.DrawFn, scenario: Scenario) -> Scenario:
    """The scenario with somebody who writes into the model between steps, in a way that can be
    seen."""
    steps, tensors = st.integers(0, scenario.steps - 1), st.integers(0, len(scenario.specs) - 1)
    writes = draw(st.frozensets(st.tuples(steps, tensors), min_size=1, max_size=5))
    through_data = not scenario.settings["rescale"] and draw(st.booleans())
    return replace(scenario, writes=writes, through_data=through_data)


# Trials


def drawn_density(
    shape: tuple[int, ...], granularity: str | int, sampler: str, p: float
) -> float | None:
    """m / N of a tensor, 1 - p where the number of active cells varies; None where p = 0."""
    numel = torch.Size(shape).numel()
    if p == 0 or numel == 0:
        return None
    if granularity == "row":
        cells = shape[0] if shape else 1
    elif granularity == "column":
        has_columns = len(shape) > 1 and shape[0] > 1 and shape[1] >= 32
        blocks = [b for b in (2, 4, 8, 16) if has_columns and shape[1] % b == 0]
        block = max([b for b in blocks if shape[1] / b >= 48], default=1)
        cells = shape[1] // block if has_columns else numel
    else:
        width = 1 if granularity == "element" or numel % granularity else granularity
        cells = numel // width
    return 1 - p if sampler == "bernoulli" else max(1, round((1 - p) * cells)) / cells


class Trial:
    """A wrapped optimizer and its parameters, driven through a scenario step by step."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.specs = scenario.specs
        self.generator = torch.Generator().manual_seed(scenario.seed)
        self.params = [nn.Parameter(spec.make(self._normal(spec))) for spec in self.specs]
        self.pretrained = [param.detach().clone() for param in self.params]
        self.curvature = [self._normal(spec).square() * 0.3 for spec in self.specs]
        self.noise = [[self._normal(spec) for spec in self.specs] for _ in range(scenario.steps)]
        self.optimizer = GMixoutOptimizer(self.make_base(self.params), **scenario.settings)
        self.time = 0

    def _normal(self, spec: TensorSpec) -> Tensor:
        return torch.randn(spec.shape, generator=self.generator, dtype=self.scenario.dtype)

    def make_base(self, tensors: list[Tensor]) -> Optimizer:
        """The scenario's optimizer on ``tensors``, in its groups."""
        rest = iter(tensors)
        named = bool(self.scenario.settings["exclude"])
        groups = [
            dict(params=[(spec.name, next(rest)) if named else next(rest) for spec in specs], **own)
            for specs, own in self.scenario.groups
        ]
        return self.scenario.case(groups)

    def make_reference_base(self, tensors: list[Tensor]) -> Optimizer:
        """The same with a group for each tensor, at the learning rate that it trains with."""
        together = self.make_base(tensors)
        if self.scenario.case.closure:
            return together
        rates = dict(zip(tensors, [mix.rate for mix in self.mixes], strict=True))
        return self.scenario.case(
            [
                {**group, "params": [param], "lr": group["lr"] * rates[param]}
                for group in together.param_groups
                for param in group["params"]
            ]
        )

    @property
    def mixes(self) -> list[Mix]:
        """d and lam of each tensor, from the scenario alone."""
        settings = self.scenario.settings
        mixes = []
        for specs, own in self.scenario.groups:
            for spec in specs:
                excluded = settings["exclude"] and spec.name.startswith("head")
                p = 0.0 if excluded else own.get("mask_prob", settings["mask_prob"])
                lam = own.get("anchor_decay", settings["anchor_decay"])
                granularity = own.get("granularity", settings["granularity"])
                d = drawn_density(spec.shape, granularity, settings["sampler"], p)
                in_rows = granularity == "row" and math.prod(spec.shape[1:]) > 1
                mixes.append(Mix(d, lam, self._rate(d, in_rows)))
        return mixes

    def _rate(self, d: float | None, in_rows: bool) -> float:
        settings = self.scenario.settings
        if d is None or self.scenario.case.name == "LBFGS":
            return 1.0
        if settings["lr_scale"] != "auto":
            return settings["lr_scale"]
        as_large = settings["rescale"] or settings["residual"] == "persistent"
        average = 1.0 if as_large else 1 / math.sqrt(d) if in_rows else 1 / d
        k, w = settings["resample_every"], self.warmup
        if k is None or w == 0:
            return average
        warmth = [min(1.0, (step + 1) / w) for step in range(k)]
        return average / (sum(warmth) / k)

    @property
    def warmup(self) -> int:
        """Steps over which an episode's learning rate rises, from the scenario alone."""
        settings = self.scenario.settings
        if settings["episode_warmup"] != "auto":
            return settings["episode_warmup"]
        kind = self.scenario.case.make
        stays = settings["residual"] == "persistent" or kind in (LBFGS, Rprop, ASGD)
        return 0 if stays else settings["resample_every"] or 0

    @property
    def mixed(self) -> list[Tensor]:
        return [self.params[i] for i in self._mixed_places()]

    @property
    def mixed_mixes(self) -> list[Mix]:
        return [self.mixes[i] for i in self._mixed_places()]

    def _mixed_places(self) -> list[int]:
        return [
            i for i, mix in enumerate(self.mixes) if mix.d is not None and self.params[i].numel()
        ]

    def masks(self) -> list[Tensor]:
        return [self.optimizer.active_mask(param) for param in self.params]

    def reference(self) -> Reference:
        """The reference at the start of this trial."""
        settings = self.scenario.settings
        return Reference(
            self.pretrained,
            self.make_reference_base,
            self.mixes,
            self.masks,
            k=settings["resample_every"],
            warmup=self.warmup,
            persistent=settings["residual"] == "persistent",
            rescale=settings["rescale"],
        )

    def live(self) -> list[Tensor]:
        """A copy of the weights in the model."""
        return copies(self.params)

    def anchors(self) -> list[Tensor]:
        return [self.optimizer.anchor(param) for param in self.mixed]

    def is_frozen(self, i: int) -> bool:
        if self.scenario.frozen is None:
            return False
        which, start, stop = self.scenario.frozen
        return i == which and start <= self.time < stop

    def evaluate(self, theta: list[Tensor]) -> tuple[Tensor, Gradients]:
        """Loss and gradients in the current step: sum of c / 2 * theta**2 + noise * theta."""
        scenario, noise = self.scenario, self.noise[self.time]
        loss = torch.zeros((), dtype=scenario.dtype)
        gradients: Gradients = []
        for i, (weight, c, n) in enumerate(zip(theta, self.curvature, noise, strict=True)):
            weight = weight.detach()
            loss = loss + (c / 2 * weight**2 + n * weight).sum()
            gradient = c * weight.contiguous() + n
            if scenario.poison is not None and scenario.poison[0] == self.time:
                gradient.view(-1)[::3] = scenario.poison[1]
            absent = self.is_frozen(i) or (self.time, i) in scenario.missing
            gradients.append(None if absent else gradient)
        return loss, gradients

    def begin_step(self, optimizer: Optimizer) -> None:
        """What a training loop changes in the groups before a step."""
        for group in optimizer.param_groups:
            group["lr"] *= self.scenario.lr_decay

    def change_memory(self, memory: str) -> None:
        """What ``model.to(memory_format=...)`` does.

        The same Parameters have other storage and strides.
        """
        self.specs = [replace(spec, memory=memory) for spec in self.specs]
        for spec, param in zip(self.specs, self.params, strict=True):
            param.data = spec.make(param.data)

    def lam_now(self, lam: float) -> float:
        new = self.scenario.new_decay
        return lam if new is None or self.time < 2 else new

    def fill_gradients(self) -> Tensor:
        """A closure: sets the gradients at the live weights and returns the loss."""
        loss, gradients = self.evaluate(list(self.params))
        for spec, param, gradient in zip(self.specs, self.params, gradients, strict=True):
            if gradient is not None and not self.scenario.other_strides:
                gradient = spec.make(gradient)
            param.grad = gradient
        return loss

    def written(self, i: int, weight: Tensor) -> Tensor:
        """What somebody makes of a weight in this step: half of its elements are others."""
        generator = torch.Generator().manual_seed(1000 * self.time + i)
        changes = torch.rand(weight.shape, generator=generator) < 0.5
        return torch.where(changes, 0.5 * weight.detach() + 0.1, weight.detach())

    def write(self, reference: Reference | None) -> None:
        for time, i in sorted(self.scenario.writes):
            if time == self.time:
                param = self.params[i]
                into = param.data if self.scenario.through_data else param.detach()
                into.copy_(self.written(i, param))
                if reference is not None:
                    reference.write(i, self.written(i, reference.theta[i]))

    def step(self, reference: Reference | None = None) -> None:
        """One step of the wrapper, and of the reference beside it."""
        optimizer = self.optimizer
        self.write(reference)
        self.begin_step(optimizer)
        own = [group["anchor_decay"] for group in optimizer.param_groups]
        for group, lam in zip(optimizer.param_groups, own, strict=True):
            group["anchor_decay"] = self.lam_now(lam)
        for i, param in enumerate(self.params):
            param.requires_grad_(not self.is_frozen(i))
        if self.scenario.closure:
            optimizer.step(self.fill_gradients)
        else:
            self.fill_gradients()
            optimizer.step()
        if reference is not None:
            self.begin_step(reference.base)
            for mix in reference.mixes:
                mix.lam = self.lam_now(mix.lam)
            reference.step(self.evaluate)
        self.time += 1

    def run(self) -> Iterator[int]:
        """Yields after every step."""
        for _ in range(self.scenario.steps):
            self.step()
            yield self.time


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def bits(tensor: Tensor) -> Tensor:
    """A floating-point tensor's bit patterns: tells 0.0 from -0.0 and finds NaN equal to itself."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def same_bits(ours: list[Tensor], others: list[Tensor]) -> bool:
    return len(ours) == len(others) and all(
        a.dtype == b.dtype and torch.equal(bits(a), bits(b))
        for a, b in zip(ours, others, strict=True)
    )
