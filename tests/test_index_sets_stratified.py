"""The parts of a stratified set: the strata, the picks inside them, the rotation."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gmixout_optim import index_sets
from gmixout_optim.index_sets import MAX_CELLS, active_cells, strata
from tests.index_set_tools import (
    DENSITIES,
    EPISODES,
    FEW,
    HUGE,
    MANY,
    SOME,
    assert_binomial,
    assert_uniform,
    assert_uniform_in_pairs,
    ref_size,
)


@given(st.one_of(FEW, SOME, MANY, HUGE), DENSITIES, st.data())
def test_strata_partition_the_cells_evenly(cells: int, density: float, data: st.DataObject) -> None:
    """From 0 to ``cells``, with lengths that differ by one at most; ``of`` finds a place's."""
    size = ref_size(cells, density)
    strata = index_sets._Partition(cells, size)

    def start(j: int) -> int:
        return j * strata.step >> strata.shift

    assert start(0) == 0
    assert start(size) == cells
    assert (size + 1) * strata.step < 2**63
    for j in data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50), "strata"):
        low, high = start(j), start(j + 1)
        assert cells // size <= high - low <= -(-cells // size)
        assert strata.of(low) == strata.of(high - 1) == j
        if size**2 < 1 << strata.shift:
            assert low == j * cells // size


@pytest.mark.parametrize(("cells", "size"), [(5, 2), (6, 4), (7, 3), (10, 3)])
def test_every_possible_stratified_set_is_as_frequent_as_expected(cells: int, size: int) -> None:
    """Against all rotations and all picks, enumerated."""
    edges = [j * cells // size for j in range(size + 1)]
    strata = [range(low, high) for low, high in pairwise(edges)]
    outcomes = [
        tuple(sorted((pick + rotation) % cells for pick in picks))
        for rotation, picks in product(range(cells), product(*strata))
    ]
    expected = Counter(outcomes)
    seen = Counter(
        tuple(active_cells(cells, size / cells, seed=3, tensor=4, episode=e).tolist())
        for e in range(EPISODES)
    )
    assert seen.keys() <= expected.keys()
    assert_binomial(
        torch.tensor([seen[cell] for cell in expected]),
        EPISODES,
        torch.tensor(list(expected.values())).double() / len(outcomes),
    )


def stratified_parts(cells: int, size: int, episode: int) -> tuple[int, Tensor, Tensor]:
    """The rotation; each stratum's length and the place of its cell."""
    drawn = dict(seed=5, tensor=6, episode=episode)
    rotation = strata(cells, size / cells, **drawn, start=0, stop=cells).numbers[2]
    cell = active_cells(cells, size / cells, **drawn)
    starts = torch.tensor([j * cells // size for j in range(size + 1)])
    place = ((cell - rotation) % cells).sort().values
    return rotation, starts.diff(), place - starts[:-1]


@pytest.mark.parametrize(
    ("cells", "size"), [(40_000, 20_000), (60_000, 20_000), (200_000, 20_000), (151_000, 20_000)]
)
def test_the_picks_inside_the_strata_are_uniform_and_independent(cells: int, size: int) -> None:
    """For each length of strata: frequencies, pairs at several lags and in two episodes, runs."""
    parts = [stratified_parts(cells, size, episode) for episode in range(8)]
    lengths = parts[0][1]
    places = torch.stack([place for _, _, place in parts])
    for length in sorted(set(lengths.tolist())):
        place = places[:, lengths == length]
        assert 0 <= int(place.min()) <= int(place.max()) < length
        assert_uniform(place.flatten(), length)
        assert_uniform_in_pairs(place[0::2], place[1::2], length)
        for lag in (1, 2, 3, 8, 64, 1024):
            whole = place.shape[1] // (2 * lag) * (2 * lag)
            paired = place[:, :whole].reshape(len(place), -1, 2, lag)
            assert_uniform_in_pairs(paired[:, :, 0], paired[:, :, 1], length)
        if length % 2 == 0:
            upper = place >= length // 2
            changes = (upper[:, 1:] != upper[:, :-1]).sum(1)
            assert_binomial(changes, place.shape[1] - 1, 0.5)


@pytest.mark.parametrize("cells", [16, 4_096, MAX_CELLS])
def test_the_rotation_is_uniform_and_independent_from_episode_to_episode(cells: int) -> None:
    size = 2
    rotation = torch.tensor([stratified_parts(cells, size, e)[0] for e in range(EPISODES)])
    assert 0 <= int(rotation.min()) <= int(rotation.max()) < cells
    for buckets in (2, 16):
        bucket = rotation * buckets // cells
        assert_uniform(bucket, buckets)
        for lag in (1, 2, 16):
            paired = bucket.reshape(-1, 2, lag)
            assert_uniform_in_pairs(paired[:, 0], paired[:, 1], buckets)
