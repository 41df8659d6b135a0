"""What is measured: a model, an optimizer, and the settings of the wrapper around it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bench.bases import BASES, arguments_of, fastest_form, make_base
from gmixout_optim.cells import Granularity
from gmixout_optim.settings import GradLayout


@dataclass(frozen=True)
class Subject:
    """The model and its optimizer, by name."""

    model: str
    base: str
    dtype_name: str
    device_name: str

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_name)

    @property
    def base_form(self) -> str | None:
        return fastest_form(self.base, self.dtype, self.device)

    def base_title(self) -> str:
        """The class and its arguments, as code."""
        given = arguments_of(self.base, self.base_form)
        arguments = ", ".join(f"{key}={value}" for key, value in given.items())
        return f"{BASES[self.base][0].__name__}({arguments})"

    def make_base(self, params: Iterable[Tensor]) -> Optimizer:
        return make_base(self.base, params, self.base_form)

    @contextmanager
    def where_tensors_are_made(self) -> Iterator[None]:
        """In the block new tensors have the subject's dtype and device."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                yield
        finally:
            torch.set_default_dtype(before)


@dataclass(frozen=True)
class Setting:
    """The wrapper's settings that change what it costs. ``density`` is 1 - p."""

    density: float
    granularity: Granularity
    grad_layout: GradLayout
    stochastic_rounding: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        compiled = ", compiled" if self.compiled else ""
        return f"d={self.density:g}, {self.granularity}, {self.grad_layout} gradients{compiled}"

    def wrap(self, base: Optimizer, resample_every: int | None) -> GMixoutOptimizer:
        with warnings.catch_warnings():
            # The models are random.
            warnings.filterwarnings("ignore", ".*freshly initialised", UserWarning)
            return GMixoutOptimizer(
                base,
                mask_prob=1 - self.density,
                granularity=self.granularity,
                grad_layout=self.grad_layout,
                stochastic_rounding=self.stochastic_rounding,
                compile=self.compiled,
                resample_every=resample_every,
            )
