"""Index sets: exact properties, an independent reimplementation, frozen values, compiled code, statistics.

The statistical tests have fixed seeds, so they always give the same verdict. ``FALSE_ALARM`` bounds how likely
one check was to condemn an ideal random generator when its seed was chosen; there are about 300 checks in
this file, so all of them together had a chance below 1e-6.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from itertools import combinations_with_replacement, pairwise, product
from math import log, prod
from statistics import NormalDist
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from gmixout_optim import index_sets
from gmixout_optim.index_sets import (
    MAX_CELLS,
    SAMPLERS,
    active_cells,
    active_cells_in_block,
    active_count,
    bernoulli_mask,
    episode_key,
    stratified_cells,
)

Words = tuple[int, int, int]  # seed, tensor, episode
Request = dict[str, Any]  # arguments of active_cells

# From here to ref_active_cells: an independent implementation in unbounded integers, from the documentation.
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


@given(requests(st.one_of(FEW, SOME, MANY)))
def test_a_set_is_sorted_unique_in_range_and_of_the_promised_size(request_: Request) -> None:
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
def test_the_size_of_a_stratified_set(cells: int, density: float, size: int) -> None:
    """max(1, round(d * cells)) over the whole range of both, in every episode."""
    for episode in range(5):
        cell = active_cells(cells, density, seed=0, tensor=0, episode=episode)
        assert len(cell) == size
        assert bool((cell.diff() > 0).all())
        assert 0 <= int(cell[0]) <= int(cell[-1]) < cells


@given(requests(st.one_of(FEW, SOME, MANY)), st.data())
def test_a_shard_is_exactly_its_part_of_the_whole_set(
    request_: Request, data: st.DataObject
) -> None:
    _, start, stop, _ = cut(data, request_["cells"], 2)
    whole = active_cells(**request_)
    part = active_cells(**request_, start=start, stop=stop)
    assert same(part, whole[(whole >= start) & (whole < stop)])


@given(requests(st.integers(1, 12)))
def test_every_shard_of_a_small_tensor(request_: Request) -> None:
    whole = active_cells(**request_).tolist()
    for start, stop in combinations_with_replacement(range(request_["cells"] + 1), 2):
        part = active_cells(**request_, start=start, stop=stop)
        assert part.tolist() == [c for c in whole if start <= c < stop]


@given(requests(st.one_of(FEW, SOME, MANY)), st.data())
def test_the_parts_of_a_partition_make_up_the_whole(request_: Request, data: st.DataObject) -> None:
    edges = cut(data, request_["cells"], data.draw(st.integers(0, 6), "cuts"))
    parts = [active_cells(**request_, start=start, stop=stop) for start, stop in pairwise(edges)]
    assert same(torch.cat(parts), active_cells(**request_))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("place", [0, 3, 10])
def test_an_empty_shard(sampler: Any, place: int) -> None:
    cell = active_cells(
        10, 0.5, seed=0, tensor=0, episode=0, sampler=sampler, start=place, stop=place
    )
    assert same(cell, torch.empty(0, dtype=torch.int32))


@given(requests(HUGE), st.data())
def test_a_small_shard_of_a_huge_tensor_is_right_and_quick(
    request_: Request, data: st.DataObject
) -> None:
    """It is the reference's, and the whole range (tens of gigabytes, tens of seconds) is not gone through."""
    start = data.draw(
        st.one_of(st.integers(0, 10), st.integers(0, MAX_CELLS - 2_000), st.just(MAX_CELLS - 2_000))
    )
    stop = min(request_["cells"], start + data.draw(st.integers(0, 2_000)))
    began = time.process_time()
    part = active_cells(**request_, start=start, stop=stop)
    assert time.process_time() - began < 2
    assert part.dtype == torch.int32
    assert part.tolist() == ref_active_cells(**request_, start=start, stop=stop)


@given(requests(st.just(0)), st.lists(st.integers(1, 12), min_size=1, max_size=3), st.data())
def test_a_block_is_exactly_its_part_of_the_whole_set(
    request_: Request, shape: list[int], data: st.DataObject
) -> None:
    """In indices of the block itself, for all blocks of a grid that is cut in every dimension."""
    request_["cells"] = prod(shape)
    whole = torch.zeros(prod(shape), dtype=torch.bool)
    whole[active_cells(**request_).long()] = True
    del request_["cells"]
    for block in product(*(pairwise(cut(data, n, 2)) for n in shape)):
        offsets = [start for start, _ in block]
        sizes = [stop - start for start, stop in block]
        local = active_cells_in_block(shape, offsets=offsets, sizes=sizes, **request_)
        inside = whole.view(shape)[tuple(slice(start, stop) for start, stop in block)]
        assert same(local, inside.flatten().nonzero().squeeze(1).to(torch.int32))


def test_a_block_of_a_huge_grid() -> None:
    words: Request = dict(seed=3, tensor=1, episode=4)
    shape, offsets, sizes = (40_000, 53_000), (39_998, 100), (2, 52_900)
    local = active_cells_in_block(shape, 1e-3, offsets=offsets, sizes=sizes, **words)
    rows = []
    for row in range(sizes[0]):
        start = (offsets[0] + row) * shape[1] + offsets[1]
        cell = active_cells(prod(shape), 1e-3, **words, start=start, stop=start + sizes[1])
        rows.append((cell - start + row * sizes[1]).to(torch.int32))
    assert len(local) > 80
    assert same(local, torch.cat(rows))


@given(requests(st.integers(1, 10_000)), requests(SOME))
def test_recomputing_a_set_gives_it_again(request_: Request, other: Request) -> None:
    """Also after other sets were computed: there is no state."""
    first = active_cells(**request_)
    active_cells(**other)
    assert same(active_cells(**request_), first)


@given(requests(st.integers(1, 3_000)), st.integers(1, 500))
def test_the_chunks_do_not_matter(request_: Request, chunk: int) -> None:
    whole = active_cells(**request_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_sets, "CPU_CHUNK", chunk)
        assert same(active_cells(**request_), whole)


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
def test_other_words_give_another_set(
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


def test_the_generator_is_splitmix64() -> None:
    """The published output of splitmix64.c for seed 1234567: its n-th number is that of counter n, from 1."""
    words = index_sets.random_bits(1234567, torch.arange(1, 6)).tolist()
    assert [word % TWO_64 for word in words] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(st.integers(-(2**63), 2**63 - 1), st.lists(st.integers(0, 2**31), min_size=1))
def test_bits_against_the_reference(key: int, places: list[int]) -> None:
    words = index_sets.random_bits(key, torch.tensor(places)).tolist()
    assert [word % TWO_64 for word in words] == [ref_bits(key, place) for place in places]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1), st.integers(1, MAX_CELLS))
def test_below_against_the_reference(bits: list[int], bound: int) -> None:
    number = index_sets._below(torch.tensor(bits), bound).tolist()
    assert number == [ref_below(word % TWO_64, bound) for word in bits]
    assert all(0 <= n < bound for n in number)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_episode_key_against_the_reference(seed: int, tensor: int, episode: int) -> None:
    key = episode_key(seed, tensor, episode)
    assert -(2**63) <= key < 2**63
    assert key % TWO_64 == ref_key(seed, tensor, episode)


@given(requests(st.one_of(FEW, st.integers(1, 100), SOME)), st.data())
def test_active_cells_against_the_reference(request_: Request, data: st.DataObject) -> None:
    assert active_cells(**request_).tolist() == ref_active_cells(**request_)
    _, start, stop, _ = cut(data, request_["cells"], 2)
    part = active_cells(**request_, start=start, stop=stop)
    assert part.tolist() == ref_active_cells(**request_, start=start, stop=stop)


@given(st.one_of(FEW, SOME, MANY, HUGE), DENSITIES, st.data())
def test_strata_partition_the_cells_evenly(cells: int, density: float, data: st.DataObject) -> None:
    """They run from 0 to ``cells``, differ in length by one at most, and ``of`` finds the one that holds a place."""
    size = ref_size(cells, density)
    strata = index_sets._Strata(cells, size)

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(start=-1), "start=-1"),
        (dict(start=6, stop=5), "start=6, stop=5"),
        (dict(stop=11), "stop=11, cells=10"),
        (dict(start=11), "start=11"),
        (dict(cells=-1), "cells=-1"),
        (dict(cells=2**31), f"cells={2**31}"),
        (dict(cells=2**31, stop=5), "wider granularity"),
        (dict(density=0.0), "density.*0.0"),
        (dict(density=1.1), "density.*1.1"),
        (dict(density=float("nan")), "density.*nan"),
        (dict(sampler="uniform"), "sampler.*'uniform'"),
    ],
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bad_arguments_of_active_cells(sampler: str, changes: Request, message: str) -> None:
    good: Request = dict(cells=10, density=0.5, seed=0, tensor=0, episode=0, sampler=sampler)
    with pytest.raises(ValueError, match=message):
        active_cells(**good | changes)


@pytest.mark.parametrize(
    ("shape", "offsets", "sizes", "message"),
    [
        ((4, 5), (0,), (1, 1), r"offsets=\(0,\)"),
        ((4, 5), (0, 0), (1,), r"sizes=\(1,\)"),
        ((4, 5), (0, 0, 0), (1, 1, 1), r"shape=\(4, 5\)"),
        ((4, 5), (-1, 0), (1, 1), r"offsets=\(-1, 0\)"),
        ((4, 5), (0, 0), (1, -1), r"sizes=\(1, -1\)"),
        ((4, 5), (0, 0), (1, 6), r"sizes=\(1, 6\)"),
        ((4, 5), (4, 0), (1, 1), r"offsets=\(4, 0\)"),
        ((2**16, 2**15), (0, 0), (1, 1), f"cells={2**31}"),
    ],
)
def test_bad_arguments_of_active_cells_in_block(
    shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        active_cells_in_block(shape, 0.5, offsets=offsets, sizes=sizes, seed=0, tensor=0, episode=0)


TENSORS = [(1_000, 0.1), (50, 0.5), (300_000, 0.9), (MAX_CELLS, 1e-7), (64, 1.0)]


def compile_anew(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(function, dynamic=True, fullgraph=True)


def check_compiled_stratified(device: str) -> None:
    kernel = compile_anew(stratified_cells)
    for (tensor, (cells, density)), episode in product(enumerate(TENSORS), range(3)):
        whole: Request = dict(cells=cells, density=density, seed=11, tensor=tensor, episode=episode)
        third = whole | dict(start=cells // 3, stop=cells // 3 * 2)
        for request_ in (whole, third):
            compiled = active_cells(**request_, device=device, kernel=kernel)
            assert same(compiled, active_cells(**request_))
    assert counters["stats"]["unique_graphs"] == 1


def check_compiled_bernoulli(device: str) -> None:
    kernel = compile_anew(bernoulli_mask)
    for (tensor, cells), episode in product(enumerate((1_000, 50, 300_000)), range(3)):
        cell, key = torch.arange(cells), episode_key(11, tensor, episode)
        compiled = kernel(cell.to(device), torch.tensor(key, device=device), 0.3)
        assert same(compiled, bernoulli_mask(cell, key, 0.3))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.compile
def test_one_compilation_of_stratified_cells_serves_all_tensors_and_episodes() -> None:
    """Those with two active cells or more: torch compiles separately for a length of 0 or 1."""
    check_compiled_stratified("cpu")


@pytest.mark.compile
def test_compiled_sets_of_no_or_one_cell() -> None:
    kernel = compile_anew(stratified_cells)
    for start in range(20):
        part: Request = dict(seed=0, tensor=0, episode=0, start=start, stop=start + 1)
        eager = active_cells(20, 0.5, **part)
        assert same(active_cells(20, 0.5, **part, kernel=kernel), eager)


@pytest.mark.compile
def test_one_compilation_of_bernoulli_mask_serves_all_tensors_and_episodes() -> None:
    """Of one density, which is a constant of the compiled code."""
    check_compiled_bernoulli("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("cells", "density"), [(1, 0.5), (7, 1.0), (1_000, 0.1), (3_000_001, 0.37)]
)
def test_a_gpu_gives_the_same_sets(sampler: Any, cells: int, density: float) -> None:
    for episode in range(3):
        request_: Request = dict(
            cells=cells, density=density, seed=1, tensor=2, episode=episode, sampler=sampler
        )
        whole = active_cells(**request_, device="cuda")
        assert whole.is_cuda
        assert same(whole, active_cells(**request_))
        third = request_ | dict(start=cells // 3, stop=cells // 3 * 2)
        assert same(active_cells(**third, device="cuda"), active_cells(**third))


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_gpu_gives_the_same_blocks(sampler: Any) -> None:
    block: Request = dict(offsets=(5, 0, 2), sizes=(9, 40, 31), seed=1, tensor=2, episode=3)
    block["sampler"] = sampler
    on_gpu = active_cells_in_block((20, 40, 33), 0.2, **block, device="cuda")
    assert on_gpu.is_cuda
    assert same(on_gpu, active_cells_in_block((20, 40, 33), 0.2, **block))


@pytest.mark.gpu
@pytest.mark.compile
@pytest.mark.parametrize("check", [check_compiled_stratified, check_compiled_bernoulli])
def test_compiled_for_a_gpu(check: Callable[[str], None]) -> None:
    check("cuda")


# The chance that one check below condemns an ideal generator. Exact (Chernoff's and Bonferroni's bounds) for
# binomial counts, in the normal approximation, which the sizes make good within a small factor, for the rest.
FALSE_ALARM = 1e-9


def assert_binomial(counts: Tensor, trials: int | Tensor, probability: float | Tensor) -> None:
    """Every count is plausible as a binomial number; the counts need not be independent of each other."""
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
    """Every number is plausible as a standard normal one; they need not be independent of each other."""
    bound = -NormalDist().inv_cdf(FALSE_ALARM / (2 * z.numel()))
    worst = float(z.abs().max())
    assert worst < bound, f"worst of {z.numel()} z-scores is {worst:.1f}, bound {bound:.1f}"


def assert_chi_square(value: float, freedom: int) -> None:
    """Neither too large nor too small, by the approximation of Wilson and Hilferty."""
    spread = 2 / (9 * freedom)
    assert_normal(torch.tensor(((value / freedom) ** (1 / 3) - 1 + spread) / spread**0.5))


def assert_random_words(words: Tensor) -> None:
    """Each of the 64 bits is balanced and unrelated to all others, of the same word and of the words 1 to 3 later.

    ``words`` is an int64 vector. The products of the signs compared here are independent fair coins.
    """
    number = len(words)
    signs = 1 - 2 * ((words >> torch.arange(64).unsqueeze(1)) & 1).float()
    assert_binomial((number + signs.sum(1)) / 2, number, 0.5)
    agreements = (number + signs @ signs.T) / 2
    above = torch.triu_indices(64, 64, 1)
    assert_binomial(agreements[above[0], above[1]], number, 0.5)
    for lag in (1, 2, 3):
        pairs = number - lag
        assert_binomial((pairs + signs[:, lag:] @ signs[:, :-lag].T) / 2, pairs, 0.5)
    for low in range(0, 64, 8):
        assert_binomial(torch.bincount((words >> low) & 255, minlength=256), number, 1 / 256)


def assert_uniform(number: Tensor, bound: int) -> None:
    """Integers in [0, bound), by their frequencies."""
    assert_binomial(torch.bincount(number, minlength=bound), number.numel(), 1 / bound)


def assert_uniform_in_pairs(left: Tensor, right: Tensor, bound: int) -> None:
    """Independent pairs of integers in [0, bound), by the frequencies of the pairs."""
    assert_uniform((left * bound + right).flatten(), bound**2)


def probability(sampler: str, cells: int, density: float) -> float:
    return ref_size(cells, density) / cells if sampler == "stratified" else density


@lru_cache
def joint_probability(sampler: str, cells: int, density: float) -> Tensor:
    """The chance that cells a and a + lag (around the end) are both active, for each lag; the same for every a.

    Stratified: by enumeration of the rotations, which is to say of the places that cell a may have in the strata.
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


EPISODES = 4096


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
def test_each_cell_is_active_with_probability_d(sampler: str, cells: int, density: float) -> None:
    """Each cell alone, and all together by a chi-square with the exact covariance of the cells in one set.

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


def stratified_parts(cells: int, size: int, episode: int) -> tuple[int, Tensor, Tensor]:
    """The rotation that the kernel is given, and each stratum's length and the place of its cell in it."""
    rotations = []

    def spy(order: Tensor, key: Any, first: Any, rotation: Any, *others: Any) -> Tensor:
        rotations.append(int(rotation))
        return stratified_cells(order, key, first, rotation, *others)

    cell = active_cells(cells, size / cells, seed=5, tensor=6, episode=episode, kernel=spy)
    starts = torch.tensor([j * cells // size for j in range(size + 1)])
    place = ((cell - rotations[0]) % cells).sort().values
    return rotations[0], starts.diff(), place - starts[:-1]


@pytest.mark.parametrize(
    ("cells", "size"), [(40_000, 20_000), (60_000, 20_000), (200_000, 20_000), (151_000, 20_000)]
)
def test_the_picks_inside_the_strata_are_uniform_and_independent(cells: int, size: int) -> None:
    """For each length of strata: frequencies; pairs of strata at several lags; the same stratum in two episodes; runs."""
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


def stream(words: Words, counter: Tensor) -> Tensor:
    return index_sets.random_bits(episode_key(*words), counter)


def streams(words: Callable[[int], Words]) -> Tensor:
    """The first number of 512 streams, then the second of each, ...: neighbouring streams are one word apart."""
    return torch.stack([stream(words(i), torch.arange(512)) for i in range(512)], dim=1).flatten()


def keys(words: Callable[[int], Words]) -> Tensor:
    return torch.tensor([episode_key(*words(i)) for i in range(EPISODES)])


def by_seed(i: int) -> Words:
    return i, 2, 3


def by_tensor(i: int) -> Words:
    return 1, i, 3


def by_episode(i: int) -> Words:
    return 1, 2, i


def by_turns(i: int) -> Words:
    """Seed and tensor, and then the two swapped."""
    one, other = i // 2, 1_000 + i // 2
    return (one, other, 3) if i % 2 else (other, one, 3)


RANDOM_WORDS: dict[str, Callable[[], Tensor]] = {
    "consecutive counters": lambda: stream((0, 0, 0), torch.arange(1 << 18)),
    "counters 8192 apart": lambda: stream((0, 0, 0), torch.arange(1 << 18) << 13),
    "key 0": lambda: index_sets.random_bits(0, torch.arange(1, 1 << 18)),
} | {
    f"{make.__name__} {words.__name__}": lambda make=make, words=words: make(words)
    for make in (streams, keys)
    for words in (by_seed, by_tensor, by_episode, by_turns)
}


@pytest.mark.parametrize("name", RANDOM_WORDS)
def test_words_are_random_in_every_bit(name: str) -> None:
    assert_random_words(RANDOM_WORDS[name]())


def test_flipping_one_bit_of_a_word_flips_half_of_the_key() -> None:
    """Avalanche: each output bit turns with probability 1/2, independently, for each bit of each input word."""
    rng = random.Random(0)
    bases = [tuple(rng.getrandbits(rng.randint(1, 63)) for _ in range(3)) for _ in range(64)]
    turned = torch.empty(64, 3, 63, dtype=torch.int64)
    for i, base in enumerate(bases):
        key = episode_key(*base)
        for word, bit in product(range(3), range(63)):
            flipped = list(base)
            flipped[word] ^= 1 << bit
            turned[i, word, bit] = key ^ episode_key(*flipped)
    bits = (turned.unsqueeze(-1) >> torch.arange(64)) & 1
    assert_binomial(bits.sum(0), 64, 0.5)
    assert_binomial(bits.sum((0, 3)), 64 * 64, 0.5)
    assert_binomial(bits.sum((0, 2)), 64 * 63, 0.5)


def test_streams_do_not_overlap() -> None:
    """All streams are parts of one sequence: those of small words start at places that are far apart.

    Two of 1000 random places among 2**64 are closer than 4096 with a chance below 3e-10.
    """
    inverse = pow(GOLDEN, -1, TWO_64)
    grid = product(range(10), repeat=3)
    places = sorted(episode_key(*words) * inverse % TWO_64 for words in grid)
    gaps = [(after - before) % TWO_64 for before, after in pairwise([*places, places[0]])]
    assert min(gaps) > 4096


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
def test_sets_of_related_words_are_unrelated(relation: str, sampler: str) -> None:
    """Their overlap, also when one set is moved round by any number of cells, is that of independent sets."""
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
