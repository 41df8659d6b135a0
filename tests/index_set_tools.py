"""What the tests of index sets share.

First an independent implementation in unbounded integers, from the documentation; then what
Hypothesis draws; then statistical checks.

The statistical tests have fixed seeds, so they always give the same verdict. ``FALSE_ALARM`` bounds
how likely one check was to condemn an ideal random generator when its seed was chosen; there are
about 300 checks in all, so all of them together had a chance below 1e-6.
"""

from __future__ import annotations

from math import log
from statistics import NormalDist
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from gmixout_optim.index_sets import MAX_CELLS, SAMPLERS

Words = tuple[int, int, int]  # seed, tensor, episode
Request = dict[str, Any]  # arguments of active_cells

# From here to ref_active_cells: the independent implementation.
GOLDEN = 0x9E3779B97F4A7C15
TWO_64 = 1 << 64


def ref_finalise(z: int) -> int:
    """The output function of Vigna's splitmix64.c."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % TWO_64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % TWO_64
    return z ^ (z >> 31)


def ref_bits(key: int, counter: int) -> int:
    return ref_finalise((key + counter * GOLDEN) % TWO_64)


def ref_below(bits: int, bound: int) -> int:
    return (bits >> 32) * bound >> 32


def ref_key(*words: int) -> int:
    key = 0
    for word in words:
        key = ref_finalise((key + (word + 1) * GOLDEN) % TWO_64)
    return key


def ref_size(cells: int, density: float) -> int:
    return max(1, round(density * cells))


def ref_active_cells(
    cells: int,
    density: float,
    *,
    seed: int,
    tensor: int,
    episode: int,
    sampler: str = "stratified",
    start: int = 0,
    stop: int | None = None,
) -> list[int]:
    asked = range(start, cells if stop is None else stop)
    key = ref_key(seed, tensor, episode)
    if sampler == "bernoulli":
        # int64 order: the sign bit is the top bit turned over.
        return [c for c in asked if (ref_bits(key, c + 1) ^ 1 << 63) < int(density * TWO_64)]
    size = ref_size(cells, density)
    rotation = ref_bits(key, 0) * cells >> 64
    shift = 62 - cells.bit_length()
    step = -(-(cells << shift) // size)
    guesses = {(c - rotation) % cells * size // cells for c in asked}
    chosen = []
    for j in {guess + k for guess in guesses for k in (-1, 0, 1)}:
        if 0 <= j < size:
            low, high = j * step >> shift, (j + 1) * step >> shift
            chosen.append((low + ref_below(ref_bits(key, j + 1), high - low) + rotation) % cells)
    return sorted(c for c in chosen if c in asked)


FEW = st.integers(1, 8)
SOME = st.integers(1, 2_000)
MANY = st.integers(1, 1_000_000)
HUGE = st.integers(MAX_CELLS - 1_000, MAX_CELLS)
DENSITIES = st.one_of(
    st.sampled_from([1.0, 0.9, 0.5, 0.1, 1e-12, 1 - 1e-12]),
    st.floats(0, 1, exclude_min=True),
)
SEED, TENSOR, EPISODE = st.integers(0, 2**63 - 1), st.integers(0, 10_000), st.integers(0, 2**40)


def requests(cells: st.SearchStrategy[int]) -> st.SearchStrategy[Request]:
    return st.fixed_dictionaries(
        dict(
            cells=cells,
            density=DENSITIES,
            seed=SEED,
            tensor=TENSOR,
            episode=EPISODE,
            sampler=st.sampled_from(SAMPLERS),
        )
    )


def cut(data: st.DataObject, cells: int, cuts: int) -> list[int]:
    """0, so many sorted places in between (repeats allowed), ``cells``."""
    places = data.draw(st.lists(st.integers(0, cells), min_size=cuts, max_size=cuts), "cuts")
    return [0, *sorted(places), cells]


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.cpu(), right.cpu())


# The chance that one check below condemns an ideal generator. Exact (Chernoff's and Bonferroni's
# bounds) for binomial counts, in the normal approximation, which the sizes make good within a small
# factor, for the rest.
FALSE_ALARM = 1e-9

# How many sets a statistic is of.
EPISODES = 4096


def assert_binomial(counts: Tensor, trials: int | Tensor, probability: float | Tensor) -> None:
    """Every count is plausible as a binomial number; they may depend on each other."""
    p = torch.as_tensor(probability, dtype=torch.float64)
    f = counts.double() / trials
    divergence = (
        torch.xlogy(f, f)
        - torch.xlogy(f, p)
        + torch.xlogy(1 - f, 1 - f)
        - torch.xlogy(1 - f, 1 - p)
    )
    worst = float((trials * divergence).max())
    assert worst < log(2 * counts.numel() / FALSE_ALARM), (
        f"worst of {counts.numel()} counts has a tail below {2.718281828**-worst:.1e}"
    )


def assert_normal(z: Tensor) -> None:
    """Every number is plausible as a standard normal one; they may depend on each other."""
    bound = -NormalDist().inv_cdf(FALSE_ALARM / (2 * z.numel()))
    worst = float(z.abs().max())
    assert worst < bound, f"worst of {z.numel()} z-scores is {worst:.1f}, bound {bound:.1f}"


def assert_chi_square(value: float, freedom: int) -> None:
    """Neither too large nor too small, by the approximation of Wilson and Hilferty."""
    spread = 2 / (9 * freedom)
    assert_normal(torch.tensor(((value / freedom) ** (1 / 3) - 1 + spread) / spread**0.5))


def assert_uniform(number: Tensor, bound: int) -> None:
    """Integers in [0, bound), by their frequencies."""
    assert_binomial(torch.bincount(number, minlength=bound), number.numel(), 1 / bound)


def assert_uniform_in_pairs(left: Tensor, right: Tensor, bound: int) -> None:
    """Independent pairs of integers in [0, bound), by the frequencies of the pairs."""
    assert_uniform((left * bound + right).flatten(), bound**2)
