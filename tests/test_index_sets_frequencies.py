"""How often cells are active, alone and together, in one set and in sets of related words."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gmixout_optim.index_sets import SAMPLERS, active_cells
from tests.index_set_tools import (
    EPISODES,
    Words,
    assert_binomial,
    assert_chi_square,
    assert_normal,
    ref_size,
)


def probability(sampler: str, cells: int, density: float) -> float:
    return ref_size(cells, density) / cells if sampler == "stratified" else density


@lru_cache
def joint_probability(sampler: str, cells: int, density: float) -> Tensor:
    """The chance that cells a and a + lag (around the end) are both active, for each lag.

    It is the same for every a. Stratified: by enumeration of the rotations, which is to say of the
    places that cell a may have in the strata.
    """
    if sampler == "bernoulli":
        joint = torch.full((cells,), density**2, dtype=torch.float64)
        joint[0] = density
        return joint
    size = ref_size(cells, density)
    starts = torch.tensor([j * cells // size for j in range(size + 1)])
    stratum = torch.arange(size).repeat_interleave(starts.diff())
    chance = 1 / starts.diff()[stratum].double()
    joint = torch.stack(
        [
            (chance * chance.roll(-lag) * (stratum != stratum.roll(-lag))).mean()
            for lag in range(cells)
        ]
    )
    joint[0] = size / cells
    return joint


def mask(words: Words, sampler: Any, cells: int, density: float) -> Tensor:
    seed, tensor, episode = words
    active = torch.zeros(cells, dtype=torch.bool)
    cell = active_cells(cells, density, seed=seed, tensor=tensor, episode=episode, sampler=sampler)
    active[cell.long()] = True
    return active


@lru_cache
def masks(sampler: str, cells: int, density: float) -> Tensor:
    """(episodes, cells), of one tensor."""
    return torch.stack([mask((1, 2, e), sampler, cells, density) for e in range(EPISODES)])


FREQUENCIES = [
    ("stratified", 60, 0.3),
    ("stratified", 64, 0.5),
    ("stratified", 97, 0.1),
    ("stratified", 101, 0.75),
    ("bernoulli", 60, 0.3),
    ("bernoulli", 97, 0.9),
]


@pytest.mark.parametrize(("sampler", "cells", "density"), FREQUENCIES)
def test_invariant_7_each_cell_is_active_with_probability_d(
    sampler: str, cells: int, density: float
) -> None:
    """Each cell alone, and all together by a chi-square with their exact covariance in one set.

    The covariance depends on the lag alone, so that the Fourier transform makes it diagonal.
    """
    p = probability(sampler, cells, density)
    active = masks(sampler, cells, density)
    assert_binomial(active.sum(0), EPISODES, p)
    variance = torch.fft.fft(joint_probability(sampler, cells, density) - p**2).real
    power = torch.fft.fft(active.double().mean(0) - p).abs() ** 2
    free = variance > 1e-9
    assert int(free.sum()) == (cells - 1 if sampler == "stratified" else cells)
    assert float(power[~free].sum()) < 1e-20
    assert_chi_square(
        float((power[free] / variance[free]).sum()) * EPISODES / cells, int(free.sum())
    )


@pytest.mark.parametrize(("sampler", "cells", "density"), FREQUENCIES)
def test_each_pair_of_cells_is_active_together_as_often_as_expected(
    sampler: str, cells: int, density: float
) -> None:
    """Every pair by itself, and the pairs of each lag in sum."""
    active = masks(sampler, cells, density).float()
    joint = joint_probability(sampler, cells, density)
    lag = (torch.arange(cells) - torch.arange(cells).unsqueeze(1)) % cells
    assert_binomial((active.T @ active)[lag > 0], EPISODES, joint[lag[lag > 0]])
    spectrum = torch.fft.fft(active.double()).abs() ** 2
    together = torch.fft.ifft(spectrum).real[:, 1 : cells // 2 + 1]
    expected = cells * joint[1 : cells // 2 + 1]
    assert_normal((together.mean(0) - expected) / (together.std(0) / EPISODES**0.5))


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01, 0.9])
def test_the_cells_of_a_bernoulli_set_are_independent(density: float) -> None:
    """The size, the correlation at many lags, the number of runs, the gaps between active cells."""
    cells = 1 << 20
    cell = active_cells(cells, density, seed=1, tensor=1, episode=1, sampler="bernoulli").long()
    assert_binomial(torch.tensor([len(cell)]), cells, density)

    active = torch.zeros(cells, dtype=torch.bool)
    active[cell] = True
    centred = active.double() - density
    variance = density * (1 - density)
    lags = (1, 2, 3, 4, 5, 7, 8, 16, 63, 64, 65, 1 << 10, 1 << 16, (1 << 17) - 1, 1 << 17, 1 << 19)
    correlation = [
        float(centred[lag:] @ centred[:-lag]) / (variance * (cells - lag) ** 0.5) for lag in lags
    ]
    assert_normal(torch.tensor(correlation))

    # Wald and Wolfowitz.
    runs = 1 + int((active[1:] != active[:-1]).sum())
    twice = 2 * len(cell) * (cells - len(cell)) / cells
    spread = (twice * (twice - 1) / (cells - 1)) ** 0.5
    assert_normal(torch.tensor((runs - 1 - twice) / spread))

    gaps = cell.diff()[: int(0.95 * density * cells)]
    lengths = torch.arange(1, 200)
    expected = density * (1 - density) ** (lengths.double() - 1)
    assert_binomial(torch.bincount(gaps, minlength=200)[1:200], len(gaps), expected)


RELATIONS: dict[str, Callable[[int], tuple[Words, Words]]] = {
    "next seed": lambda i: ((2 * i, 2, 3), (2 * i + 1, 2, 3)),
    "next tensor": lambda i: ((1, 2 * i, 3), (1, 2 * i + 1, 3)),
    "next episode": lambda i: ((1, 2, 2 * i), (1, 2, 2 * i + 1)),
    "seed and tensor swapped": lambda i: ((i, i + 1000, 3), (i + 1000, i, 3)),
    "seed and episode swapped": lambda i: ((i, 2, i + 1000), (i + 1000, 2, i)),
    "tensor and episode swapped": lambda i: ((1, i, i + 1000), (1, i + 1000, i)),
    "seed up, tensor down": lambda i: ((i, 2 * i + 1, 3), (i + 1, 2 * i, 3)),
    "tensor up, episode down": lambda i: ((1, i, 2 * i + 1), (1, i + 1, 2 * i)),
    "two bits flipped": lambda i: ((2 * i, 2 * i, 3), (2 * i + 1, 2 * i + 1, 3)),
    "high bit of the seed": lambda i: ((i, 2, 3), (i + 2**62, 2, 3)),
    "bit 32 of the episode": lambda i: ((1, 2, i), (1, 2, i + 2**32)),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("relation", RELATIONS)
def test_invariant_7_sets_of_related_words_are_unrelated(relation: str, sampler: str) -> None:
    """Their overlap is that of independent sets, also with one of them moved round by any lag."""
    cells, density, pairs = 120, 0.3, 512
    both = [RELATIONS[relation](i) for i in range(pairs)]
    left, right = (
        torch.stack([mask(words[side], sampler, cells, density) for words in both]).double()
        for side in (0, 1)
    )
    assert not bool((left == right).all(1).any())
    spectrum = torch.fft.fft(left).conj() * torch.fft.fft(right)
    overlap = torch.fft.ifft(spectrum).real.sum(0)
    mean = cells * probability(sampler, cells, density) ** 2
    variance = cells * float((joint_probability(sampler, cells, density) ** 2).sum()) - mean**2
    assert_normal((overlap - pairs * mean) / (pairs * variance) ** 0.5)
