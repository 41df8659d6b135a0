"""Which cells a set holds: exact properties, an independent implementation, frozen values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gmixout_optim.index_sets import (
    MAX_CELLS,
    SAMPLERS,
    active_cells,
    active_cells_in_block,
    active_count,
    episode_key,
)
from tests.index_set_tools import (
    EPISODE,
    FEW,
    MANY,
    SEED,
    SOME,
    TENSOR,
    Request,
    Words,
    cut,
    ref_active_cells,
    ref_size,
    requests,
    same,
)


@given(requests(st.one_of(FEW, SOME, MANY)))
def test_invariant_7_a_set_is_sorted_unique_in_range_and_of_the_promised_size(
    request_: Request,
) -> None:
    cell = active_cells(**request_)
    cells, density = request_["cells"], request_["density"]
    assert cell.dtype == torch.int32
    assert cell.ndim == 1
    assert bool((cell.diff() > 0).all())
    if len(cell):
        assert 0 <= int(cell[0]) <= int(cell[-1]) < cells
    if request_["sampler"] == "stratified":
        assert len(cell) == active_count(cells, density) == ref_size(cells, density)
    if density == 1:
        assert len(cell) == cells


@pytest.mark.parametrize(
    ("cells", "density", "size"),
    [
        (1, 1.0, 1),
        (1, 1e-300, 1),
        (2, 0.5, 1),
        (3, 0.5, 2),
        (5, 0.5, 2),  # a half goes to the even number
        (7, 0.5, 4),
        (10, 0.05, 1),
        (10, 0.15, 2),
        (10, 0.99, 10),
        (1_000, 0.0014, 1),
        (1_000, 0.0016, 2),
        (1_000_000, 1e-9, 1),
        (1_000_000, 1.0, 1_000_000),
        (2**20 + 1, 0.9999999, 2**20 + 1),
        (MAX_CELLS, 1e-12, 1),
        (MAX_CELLS, 1e-9, 2),
        (MAX_CELLS, 1e-5, 21_475),
    ],
)
def test_invariant_7_the_size_of_a_stratified_set(cells: int, density: float, size: int) -> None:
    """max(1, round(d * cells)) over the whole range of both, in every episode."""
    for episode in range(5):
        cell = active_cells(cells, density, seed=0, tensor=0, episode=episode)
        assert len(cell) == size
        assert bool((cell.diff() > 0).all())
        assert 0 <= int(cell[0]) <= int(cell[-1]) < cells


@given(requests(st.integers(1, 10_000)), requests(SOME))
def test_invariant_7_recomputing_a_set_gives_it_again(request_: Request, other: Request) -> None:
    """Also after other sets were computed: there is no state."""
    first = active_cells(**request_)
    active_cells(**other)
    assert same(active_cells(**request_), first)


@given(requests(SOME), st.integers(0, 2**32 - 1))
def test_torch_generator_is_neither_used_nor_advanced(request_: Request, seed: int) -> None:
    torch.manual_seed(0)
    expected = active_cells(**request_)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    cell = active_cells(**request_)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(cell, expected)


@given(
    st.tuples(SEED, TENSOR, EPISODE),
    st.tuples(SEED, TENSOR, EPISODE),
    st.sampled_from(["seed", "tensor", "episode", "all"]),
    st.integers(200, 5_000),
    st.floats(0.2, 0.8),
    st.sampled_from(SAMPLERS),
)
def test_invariant_7_other_words_give_another_set(
    words: Words, others: Words, changed: str, cells: int, density: float, sampler: Any
) -> None:
    """By accident less than once in 2**100."""
    names = ("seed", "tensor", "episode")
    left: Request = dict(zip(names, words, strict=True))
    right: Request = {
        name: other if changed in (name, "all") else left[name]
        for name, other in zip(names, others, strict=True)
    }
    assume(left != right)
    sets = [active_cells(cells, density, sampler=sampler, **request_) for request_ in (left, right)]
    assert not torch.equal(*sets)


@given(requests(st.one_of(FEW, st.integers(1, 100), SOME)), st.data())
def test_active_cells_against_the_reference(request_: Request, data: st.DataObject) -> None:
    assert active_cells(**request_).tolist() == ref_active_cells(**request_)
    _, start, stop, _ = cut(data, request_["cells"], 2)
    part = active_cells(**request_, start=start, stop=stop)
    assert part.tolist() == ref_active_cells(**request_, start=start, stop=stop)


# Frozen values: a change here changes what existing checkpoints mean.
@pytest.mark.parametrize(
    ("words", "key"),
    [
        ((0, 0, 0), 2558736989570252433),
        ((1, 0, 0), -9174984717662021586),
        ((0, 1, 0), 3391245575278488096),
        ((0, 0, 1), -533072482827883436),
        ((1, 2, 3), 2869315087210772132),
        ((3, 2, 1), -8878347843359994909),
        ((2**63 - 1, 200, 1_000_000), -7162958393846311603),
    ],
)
def test_frozen_keys(words: Words, key: int) -> None:
    assert episode_key(*words) == key


BERNOULLI = dict(sampler="bernoulli")

FROZEN: list[tuple[int, float, Words, Request, str]] = [
    (1, 0.1, (0, 0, 0), {}, "0"),
    (20, 0.3, (0, 0, 0), {}, "2 3 8 10 13 18"),
    (20, 0.3, (0, 0, 1), {}, "0 2 6 9 13 15"),
    (20, 0.3, (0, 1, 0), {}, "2 5 8 11 16 18"),
    (20, 0.3, (1, 0, 0), {}, "0 3 7 9 12 15"),
    (100, 0.1, (1234567, 8, 90), {}, "1 7 23 30 43 52 63 70 79 92"),
    (
        768 * 3072,
        0.1,
        (2, 7, 40),
        dict(start=1_000_000, stop=1_000_050),
        "1000000 1000007 1000023 1000030 1000037",
    ),
    (MAX_CELLS, 1.5e-9, (2**63 - 1, 3, 5), {}, "1055313592 1479329025 2086245975"),
    (20, 0.3, (0, 0, 0), BERNOULLI, "2 3 5 7 10 12 16"),
    (100, 0.1, (1234567, 8, 90), BERNOULLI, "3 7 16 20 24 37 56 64 67 79 82 84 93"),
    (
        MAX_CELLS,
        0.1,
        (2**63 - 1, 3, 5),
        BERNOULLI | dict(start=MAX_CELLS - 50),
        "2147483615 2147483629",
    ),
]


@pytest.mark.parametrize(("cells", "density", "words", "others", "active"), FROZEN)
def test_frozen_sets(
    cells: int, density: float, words: Words, others: Request, active: str
) -> None:
    seed, tensor, episode = words
    cell = active_cells(cells, density, seed=seed, tensor=tensor, episode=episode, **others)
    assert cell.tolist() == [int(number) for number in active.split()]


@pytest.mark.parametrize(
    ("sampler", "cell"),
    [("stratified", [0, 3, 7, 12, 14, 16]), ("bernoulli", [0, 1, 7, 11])],
)
def test_frozen_blocks(sampler: Any, cell: list[int]) -> None:
    block: Request = dict(offsets=(1, 2), sizes=(4, 5), seed=5, tensor=1, episode=2)
    assert active_cells_in_block((6, 10), 0.3, sampler=sampler, **block).tolist() == cell
