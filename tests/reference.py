"""The method in its slow, obvious, dense form, and the random trials in which the library is held against it.

:class:`Reference` computes in the paper's symbols: live weights theta, anchor A, mask M, trained weights phi (or
U), mask probability p, EMA coefficient lam, resampling period k, scale s. It shares no code with the library.

A :class:`Scenario` (drawn by :func:`scenarios`) says what a :class:`Trial` does: which optimizer, tensors,
groups and settings, which gradients are missing when. The loss is a noisy quadratic, so gradients depend on the
live weights and a difference in one step feeds back into all later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, Optimizer, Rprop

from gmixout_optim import GMixoutOptimizer
from tests.optimizers import Case

Gradients = list["Tensor | None"]
# The loss and its gradients at the weights theta.
Evaluate = Callable[[list[Tensor]], tuple[Tensor, Gradients]]

# Names under which torch's optimizers keep one number for each weight. What is in neither table (factored
# moments, a curvature history) belongs to a tensor as a whole.
PER_WEIGHT = frozenset(
    [
        "acc_delta",
        "ax",
        "exp_avg",
        "exp_avg_sq",
        "exp_inf",
        "grad_avg",
        "max_exp_avg_sq",
        "momentum_buffer",
        "prev",
        "square_avg",
        "step_size",
        "sum",
        "variance",
    ]
)
COUNTERS = frozenset({"step", "eta", "mu", "mu_product"})

# What a fresh optimizer has there, where that is not zero: its hyperparameter of this name.
FRESH = {"sum": "initial_accumulator_value", "step_size": "lr"}


@dataclass
class Mix:
    """How one tensor is mixed, and with how many times its learning rate. p = 0: not at all."""

    p: float
    lam: float
    rate: float = 1.0


class Reference:
    """Both residuals on dense tensors.

    Args:
        weights: the pretrained weights.
        make_base: builds the base optimizer on the trained tensors.
        mixes: p and lam of each tensor; lam may be changed while training.
        draw: the masks of the episode that begins, one for each tensor.
        k: resampling period, None for one episode without end.
        warmup: steps of an episode over which the learning rate of mixed tensors rises to its full value.
    """

    def __init__(
        self,
        weights: list[Tensor],
        make_base: Callable[[list[Tensor]], Optimizer],
        mixes: list[Mix],
        draw: Callable[[], list[Tensor]],
        *,
        k: int | None,
        warmup: int,
        persistent: bool,
        rescale: bool,
        carry_state: bool,
    ) -> None:
        self.make_base, self.mixes, self.draw = make_base, mixes, draw
        self.k, self.warmup = k, warmup
        self.persistent, self.rescale, self.carry_state = persistent, rescale, carry_state
        contiguous = torch.contiguous_format
        self.A = [weight.detach().clone(memory_format=contiguous) for weight in weights]
        self.phi = [nn.Parameter(a.clone()) for a in self.A]
        self.base = make_base(self.phi)
        self.M = draw()
        self.steps_in_episode = 0

    def is_mixed(self, i: int) -> bool:
        return self.mixes[i].p > 0 and self.A[i].numel() > 0

    def s(self, i: int) -> float:
        return 1 / (1 - self.mixes[i].p) if self.rescale else 1.0

    @property
    def theta(self) -> list[Tensor]:
        """What the model computes with: A + M * s * (phi - A); phi itself where nothing is mixed."""
        return [
            torch.where(M, A + self.s(i) * (phi.detach() - A), A)
            if self.is_mixed(i)
            else phi.detach()
            for i, (A, M, phi) in enumerate(zip(self.A, self.M, self.phi, strict=True))
        ]

    @property
    def deployed(self) -> list[Tensor]:
        """Episodic: the anchor that the end of the episode would leave. Persistent: the mean over masks."""
        if not self.persistent:
            return [
                self.moved_anchor(i) if self.is_mixed(i) else phi.detach()
                for i, phi in enumerate(self.phi)
            ]
        return [
            A + (1 - mix.p) * self.s(i) * (U.detach() - A) if self.is_mixed(i) else U.detach()
            for i, (A, U, mix) in enumerate(zip(self.A, self.phi, self.mixes, strict=True))
        ]

    def moved_anchor(self, i: int) -> Tensor:
        """lam * A + (1 - lam) * phi; with the episodic residual on S only."""
        lam, A, phi = self.mixes[i].lam, self.A[i], self.phi[i].detach()  # noqa: N806
        # At the ends of lam's range one of the two does not enter, not even as 0 * inf.
        moved = A if lam == 1 else phi if lam == 0 else lam * A + (1 - lam) * phi
        return moved.clone() if self.persistent else torch.where(self.M[i], moved, A)

    def step(self, evaluate: Evaluate) -> None:
        """One step of the base with masked gradients, and the end of the episode after its k-th."""

        def closure() -> Tensor:
            loss, gradients = evaluate(self.theta)
            for i, (phi, gradient) in enumerate(zip(self.phi, gradients, strict=True)):
                phi.grad = gradient
                if gradient is not None and self.is_mixed(i):
                    zero = torch.zeros_like(gradient)
                    phi.grad = torch.where(self.M[i], self.s(i) * gradient, zero)
            return loss

        rates = [group["lr"] for group in self.base.param_groups]
        for group in self.base.param_groups:
            group["lr"] = self._warmed_lr(group)
        self.base.step(closure)
        for group, rate in zip(self.base.param_groups, rates, strict=True):
            group["lr"] = rate
        if not self.persistent:
            self._put_back([~M for M in self.M])
        self.steps_in_episode += 1
        if self.steps_in_episode == self.k:
            self.resample()

    def _warmed_lr(self, group: dict[str, Any]) -> float:
        """Of a group of one tensor, where there is a warm-up."""
        (i, *_) = [i for i, phi in enumerate(self.phi) if phi is group["params"][0]]
        if not self.is_mixed(i) or self.steps_in_episode >= self.warmup:
            return group["lr"]
        return group["lr"] * ((self.steps_in_episode + 1) / self.warmup)

    def resample(self) -> None:
        for i in filter(self.is_mixed, range(len(self.A))):
            self.A[i] = self.moved_anchor(i)
        self._begin_episode(self.carry_state)

    def resync(self, weights: list[Tensor]) -> None:
        """Take other weights as pretrained."""
        with torch.no_grad():
            for i, weight in enumerate(weights):
                self.A[i] = weight.detach().clone()
                self.phi[i].copy_(weight)
        self._begin_episode(carry_state=False)

    def consolidate(self) -> list[Tensor]:
        """The weights that are left in the model."""
        if not self.persistent and self.steps_in_episode > 0:
            self.resample()
        return self.deployed

    def _begin_episode(self, carry_state: bool) -> None:
        old, self.M = self.M, self.draw()
        self.steps_in_episode = 0
        if self.persistent:
            return
        self._put_back([torch.ones_like(M) for M in self.M])
        if any(map(self.is_mixed, range(len(self.A)))):
            self._renew_base([was & now for was, now in zip(old, self.M, strict=True)], carry_state)

    def _put_back(self, where: list[Tensor]) -> None:
        with torch.no_grad():
            for i in filter(self.is_mixed, range(len(self.A))):
                self.phi[i].copy_(torch.where(where[i], self.A[i], self.phi[i]))

    def _renew_base(self, stay: list[Tensor], carry_state: bool) -> None:
        """A fresh base with the old one's hyperparameters, and its state of what does not start anew."""
        old, self.base = self.base, self.make_base(self.phi)
        for group, old_group in zip(self.base.param_groups, old.param_groups, strict=True):
            group.update({key: value for key, value in old_group.items() if key != "params"})
        if isinstance(old, LBFGS):
            return  # one history for all weights together
        places = {phi: i for i, phi in enumerate(self.phi)}
        for group in self.base.param_groups:
            for phi in group["params"]:
                state, i = old.state.get(phi), places[phi]
                if state and not self.is_mixed(i):
                    self.base.state[phi] = state
                elif state and carry_state and state.keys() <= PER_WEIGHT | COUNTERS:
                    self.base.state[phi] = {
                        name: _carried(
                            value,
                            stay[i],
                            {**group, "lr": self._warmed_lr(group)}.get(FRESH.get(name), 0.0),
                        )
                        if name in PER_WEIGHT
                        else value
                        for name, value in state.items()
                    }


def _carried(value: Tensor | None, stay: Tensor, fresh: float) -> Tensor | None:
    return value if value is None else torch.where(stay, value, torch.full_like(value, fresh))


# Scenarios

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
    carry_state: tuple[bool, ...] = (False, True),
) -> Scenario:
    """Any scenario that ``case`` can run."""
    flags = st.booleans()
    probs = st.sampled_from(mask_probs)
    decays = st.sampled_from([0.3, 0.9, 0.0, 1.0])
    granularities = st.sampled_from(["element", "row", 2, 3, 5, 1])
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
        # Muon works in bfloat16 inside and LBFGS compares curvatures: both turn roundings of float32 into steps.
        dtype=lowest or draw(st.sampled_from(dtypes)),
        groups=tuple(groups),
        settings=dict(
            mask_prob=draw(probs),
            exclude="head.*" if excluding else (),
            resample_every=draw(st.sampled_from([2, 1, 3, None])),
            anchor_decay=draw(decays),
            residual=draw(st.sampled_from(residuals)),
            rescale=draw(flags),
            lr_scale=None if case.closure else draw(st.sampled_from([None, 1.0, 0.5, 3.0])),
            episode_warmup=None if case.closure else draw(st.sampled_from([None, 0, 2, 5])),
            granularity=draw(granularities),
            sampler=draw(st.sampled_from(["stratified", "bernoulli"])),
            layout=layout,
            carry_state=draw(st.sampled_from(carry_state)),
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


# Trials


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
        """p and lam of each tensor, from the scenario alone."""
        settings = self.scenario.settings
        mixes = []
        for specs, own in self.scenario.groups:
            for spec in specs:
                excluded = settings["exclude"] and spec.name.startswith("head")
                p = 0.0 if excluded else own.get("mask_prob", settings["mask_prob"])
                lam = own.get("anchor_decay", settings["anchor_decay"])
                mixes.append(Mix(p, lam, self._rate(p)))
        return mixes

    def _rate(self, p: float) -> float:
        settings = self.scenario.settings
        if p == 0 or self.scenario.case.name == "LBFGS":
            return 1.0
        if settings["lr_scale"] is not None:
            return settings["lr_scale"]
        as_large = settings["rescale"] or settings["residual"] == "persistent"
        average = 1.0 if as_large else 1 / (1 - p)
        k, w = settings["resample_every"], self.warmup
        if k is None or w == 0:
            return average
        warmth = [min(1.0, (step + 1) / w) for step in range(k)]
        return average / (sum(warmth) / k)

    @property
    def warmup(self) -> int:
        """Steps over which an episode's learning rate rises, from the scenario alone."""
        settings = self.scenario.settings
        if settings["episode_warmup"] is not None:
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
        return [i for i, mix in enumerate(self.mixes) if mix.p and self.params[i].numel()]

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
            carry_state=settings["carry_state"],
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
        """What ``model.to(memory_format=...)`` does: the same Parameters with other storage and strides."""
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

    def step(self, reference: Reference | None = None) -> None:
        """One step of the wrapper, and of the reference beside it."""
        optimizer = self.optimizer
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
