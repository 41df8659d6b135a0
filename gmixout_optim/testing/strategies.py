"""Hypothesis strategies for models, settings, gradients, schedules and whole runs.

They need ``pip install "gmixout-optim[testing]"``. Everything that is drawn is plain data from
which tensors are made by seed, so failing examples shrink and replay::

    @given(strategies.runs())
    def test_my_base(run):
        for model, optimizer in run.train(lambda params: MyOptimizer(params, lr=0.01)):
            check_invariants(optimizer)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from gmixout_optim import GMixoutOptimizer

# What a gradient is filled with instead of random numbers.
_EXTREMES = (float("nan"), float("inf"), -float("inf"), 1e38, 0.0)


@st.composite
def settings(
    draw: st.DrawFn,
    *,
    layouts: tuple[str, ...] = ("auto", "dense"),
    residuals: tuple[str, ...] = ("episodic", "persistent"),
) -> dict[str, Any]:
    """Keyword arguments of a GMixoutOptimizer.

    Args:
        layouts: with ``"packed"`` for bases that are element-wise but not known to be.
        residuals: both, or one.
    """
    return {
        "mask_prob": draw(st.sampled_from([0.5, 0.9, 0.1, 0.0])),
        "resample_every": draw(st.sampled_from([3, 1, 2, 20, None])),
        "anchor_decay": draw(st.sampled_from([0.5, 0.9, 0.0, 1.0])),
        "residual": draw(st.sampled_from(residuals)),
        "rescale": draw(st.booleans()),
        "lr_scale": draw(st.sampled_from(["auto", 1.0])),
        "episode_warmup": draw(st.sampled_from(["auto", 0, 2])),
        "granularity": draw(st.sampled_from(["element", "row", "column", 4])),
        "sampler": draw(st.sampled_from(["stratified", "bernoulli"])),
        "layout": draw(st.sampled_from(layouts)),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }


@dataclass(frozen=True)
class SmallModel:
    """A model to be built: a body of linear layers with a norm, and a head; weights are random."""

    widths: tuple[int, ...]
    bias: bool
    norm: bool
    dtype: torch.dtype
    seed: int

    def build(self) -> nn.Sequential:
        """The model, the same each time. Its parameters are named ``body.*`` and ``head.*``."""
        model, body = nn.Sequential(), nn.Sequential()
        for inputs, outputs in zip(self.widths[:-1], self.widths[1:], strict=True):
            body.append(nn.Linear(inputs, outputs, self.bias))
            body.append(nn.LayerNorm(outputs) if self.norm else nn.Tanh())
        model.add_module("body", body)
        model.add_module("head", nn.Linear(self.widths[-1], 3, self.bias))
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
        return model.to(self.dtype)


def models(
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
) -> st.SearchStrategy[SmallModel]:
    """Small models; ``.build()`` makes them."""
    widths = st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple)
    return st.builds(
        SmallModel,
        widths=widths,
        bias=st.booleans(),
        norm=st.booleans(),
        dtype=st.sampled_from(dtypes),
        seed=st.integers(0, 2**31),
    )


@dataclass(frozen=True)
class Gradients:
    """Gradients of one step to be made: random, but for those that are missing or extreme.

    Attributes:
        missing: numbers of parameters without one (modulo their count).
        extremes: ``(number of a parameter, what every third element of it is)``.
    """

    seed: int
    missing: frozenset[int]
    extremes: tuple[tuple[int, float], ...]

    def fill(self, params: Sequence[Tensor]) -> None:
        """Set ``grad`` of the parameters; a frozen one gets none."""
        generator = torch.Generator().manual_seed(self.seed)
        count = len(params)
        missing = {number % count for number in self.missing}
        extremes = {number % count: item for number, item in self.extremes}
        for number, param in enumerate(params):
            noise = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
            if number in extremes:
                noise.view(-1)[::3] = extremes[number]
            absent = number in missing or not param.requires_grad
            param.grad = None if absent else noise


def gradients(extreme: bool = True) -> st.SearchStrategy[Gradients]:
    """Gradients of one step; with ``extreme`` also NaN, inf and very large ones."""
    number = st.integers(0, 20)
    extremes = st.lists(st.tuples(number, st.sampled_from(_EXTREMES)), max_size=2).map(tuple)
    return st.builds(
        Gradients,
        seed=st.integers(0, 2**31),
        missing=st.frozensets(number, max_size=3),
        extremes=extremes if extreme else st.just(()),
    )


def schedules(steps: int) -> st.SearchStrategy[tuple[float, ...]]:
    """What a learning rate is multiplied by in each step: constant, warm-up, decay, or any."""
    rising = tuple((step + 1) / steps for step in range(steps))
    some = st.lists(st.floats(0.0, 2.0), min_size=steps, max_size=steps).map(tuple)
    return st.one_of(st.just((1.0,) * steps), st.just(rising), st.just(rising[::-1]), some)


@dataclass(frozen=True)
class RandomRun:
    """A training to be run: model, settings, and what happens in each step.

    Attributes:
        frozen: for each step the numbers of the parameters that are frozen in it.
        excluded: whether the head is.
    """

    model: SmallModel
    settings: dict[str, Any]
    gradients: tuple[Gradients, ...]
    schedule: tuple[float, ...]
    frozen: tuple[frozenset[int], ...]
    excluded: bool

    def start(
        self, make_base: Callable[[Any], Optimizer]
    ) -> tuple[nn.Sequential, GMixoutOptimizer]:
        """The model and its wrapped optimizer. ``make_base`` takes named parameters."""
        model = self.model.build()
        exclude = "head.*" if self.excluded else ()
        base = make_base(list(model.named_parameters()))
        return model, GMixoutOptimizer(base, exclude=exclude, **self.settings)

    def train(
        self, make_base: Callable[[Any], Optimizer]
    ) -> Iterator[tuple[nn.Sequential, GMixoutOptimizer]]:
        """Yields model and optimizer before the first step and after each."""
        model, optimizer = self.start(make_base)
        rates = [group["lr"] for group in optimizer.param_groups]
        params = list(model.parameters())
        yield model, optimizer
        for grads, factor, frozen in zip(self.gradients, self.schedule, self.frozen, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * factor
            for number, param in enumerate(params):
                param.requires_grad_(number not in {each % len(params) for each in frozen})
            grads.fill(params)
            optimizer.step()
            yield model, optimizer


@st.composite
def runs(
    draw: st.DrawFn,
    *,
    max_steps: int = 7,
    extreme: bool = True,
    of: st.SearchStrategy[dict[str, Any]] | None = None,
) -> RandomRun:
    """Whole runs, with layers that are frozen and thawed.

    Args:
        max_steps: of a run.
        extreme: whether gradients may be NaN, inf or very large.
        of: the settings to draw from, by default :func:`settings`.
    """
    steps = draw(st.integers(1, max_steps))
    frozen = st.frozensets(st.integers(0, 9), max_size=2)
    return RandomRun(
        model=draw(models()),
        settings=draw(settings() if of is None else of),
        gradients=tuple(draw(gradients(extreme)) for _ in range(steps)),
        schedule=draw(schedules(steps)),
        frozen=tuple(draw(frozen) for _ in range(steps)),
        excluded=draw(st.booleans()),
    )
