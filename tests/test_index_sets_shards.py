"""A set is the same in whatever pieces, on whatever device and by whatever code it is made.

Shards, blocks and chunks are held against the whole set, compiled code and a GPU against eager code
on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate, combinations_with_replacement, pairwise, product
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from gmixout_optim import fused, index_sets
from gmixout_optim.index_sets import (
    MAX_CELLS,
    SAMPLERS,
    active_cells,
    active_cells_in_block,
    bernoulli_mask,
    episode_key,
    strata,
    stratified_cells_of_many,
    stratified_ordinals,
)
from tests.index_set_tools import (
    FEW,
    HUGE,
    MANY,
    SOME,
    Request,
    cut,
    ref_active_cells,
    requests,
    same,
)


@given(requests(st.one_of(FEW, SOME, MANY)), st.data())
def test_invariant_10_a_shard_is_exactly_its_part_of_the_whole_set(
    request_: Request, data: st.DataObject
) -> None:
    _, start, stop, _ = cut(data, request_["cells"], 2)
    whole = active_cells(**request_)
    part = active_cells(**request_, start=start, stop=stop)
    assert same(part, whole[(whole >= start) & (whole < stop)])


@given(requests(st.one_of(FEW, SOME, MANY)), st.data())
def test_where_active_cells_stand_in_the_whole_set(request_: Request, data: st.DataObject) -> None:
    words = {**request_, "sampler": "stratified"}
    _, start, stop, _ = cut(data, words["cells"], 2)
    whole, part = active_cells(**words), active_cells(**words, start=start, stop=stop)
    del words["sampler"]
    assert same(whole[stratified_ordinals(part.long(), **words)], part)


@given(requests(st.integers(1, 12)))
def test_invariant_10_every_shard_of_a_small_tensor(request_: Request) -> None:
    whole = active_cells(**request_).tolist()
    for start, stop in combinations_with_replacement(range(request_["cells"] + 1), 2):
        part = active_cells(**request_, start=start, stop=stop)
        assert part.tolist() == [c for c in whole if start <= c < stop]


@given(requests(st.one_of(FEW, SOME, MANY)), st.data())
def test_invariant_10_the_parts_of_a_partition_make_up_the_whole(
    request_: Request, data: st.DataObject
) -> None:
    edges = cut(data, request_["cells"], data.draw(st.integers(0, 6), "cuts"))
    parts = [active_cells(**request_, start=start, stop=stop) for start, stop in pairwise(edges)]
    assert same(torch.cat(parts), active_cells(**request_))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("place", [0, 3, 10])
def test_invariant_10_an_empty_shard(sampler: Any, place: int) -> None:
    cell = active_cells(
        10, 0.5, seed=0, tensor=0, episode=0, sampler=sampler, start=place, stop=place
    )
    assert same(cell, torch.empty(0, dtype=torch.int32))


@given(requests(HUGE), st.data())
def test_invariant_10_a_small_shard_of_a_huge_tensor_is_right_and_quick(
    request_: Request, data: st.DataObject
) -> None:
    """It is the reference's, and the whole range is not gone through.

    That would be tens of gigabytes and tens of seconds.
    """
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
def test_invariant_10_a_block_is_exactly_its_part_of_the_whole_set(
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


def test_invariant_10_a_block_of_a_huge_grid() -> None:
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


@given(requests(st.integers(1, 3_000)), st.integers(1, 500))
def test_the_chunks_do_not_matter(request_: Request, chunk: int) -> None:
    whole = active_cells(**request_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_sets, "CPU_CHUNK", chunk)
        assert same(active_cells(**request_), whole)


TENSORS = [(1_000, 0.1), (50, 0.5), (300_000, 0.9), (MAX_CELLS, 1e-7), (64, 1.0)]


def compile_anew(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(function, dynamic=True, fullgraph=True)


def drawn_together(requests: list[Request], device: str) -> list[torch.Tensor]:
    """The sets as compiled code draws them: all in one call."""
    drawn = [strata(**request_) for request_ in requests]
    starts = accumulate([each.size for each in drawn], initial=0)
    rows = [(start, *each.numbers) for start, each in zip(starts, drawn, strict=False)]
    sizes = [each.size for each in drawn]
    cells = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    call, tensors = fused.fuse(stratified_cells_of_many, torch.tensor(rows, device=device), cells)
    call(tensors)
    return list(cells.split(sizes))


def check_compiled_stratified(device: str) -> None:
    torch._dynamo.reset()
    fused.forget()
    counters.clear()
    for episode in range(3):
        requests = [
            dict(cells=cells, density=density, seed=11, tensor=tensor, episode=episode, start=0)
            | dict(stop=cells)
            for tensor, (cells, density) in enumerate(TENSORS)
        ]
        for request_, cells in zip(requests, drawn_together(requests, device), strict=True):
            assert same(cells, active_cells(**request_))
    assert counters["stats"]["unique_graphs"] == 1


def check_compiled_bernoulli(device: str) -> None:
    kernel = compile_anew(bernoulli_mask)
    for (tensor, cells), episode in product(enumerate((1_000, 50, 300_000)), range(3)):
        cell, key = torch.arange(cells), episode_key(11, tensor, episode)
        compiled = kernel(cell.to(device), torch.tensor(key, device=device), 0.3)
        assert same(compiled, bernoulli_mask(cell, key, 0.3))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.compile
def test_one_compilation_of_the_stratified_sampler_serves_all_episodes() -> None:
    check_compiled_stratified("cpu")


@pytest.mark.compile
def test_compiled_shards_of_no_or_one_cell() -> None:
    requests: list[Request] = [
        dict(cells=20, density=0.5, seed=0, tensor=0, episode=0, start=start, stop=start + 1)
        for start in range(20)
    ]
    for request_, cells in zip(requests, drawn_together(requests, "cpu"), strict=True):
        assert same(cells, active_cells(**request_))


@pytest.mark.compile
def test_one_compilation_of_bernoulli_mask_serves_all_tensors_and_episodes() -> None:
    """Of one density, which is a constant of the compiled code."""
    check_compiled_bernoulli("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("cells", "density"), [(1, 0.5), (7, 1.0), (1_000, 0.1), (3_000_001, 0.37)]
)
def test_invariant_10_a_gpu_gives_the_same_sets(sampler: Any, cells: int, density: float) -> None:
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
def test_invariant_10_a_gpu_gives_the_same_blocks(sampler: Any) -> None:
    block: Request = dict(offsets=(5, 0, 2), sizes=(9, 40, 31), seed=1, tensor=2, episode=3)
    block["sampler"] = sampler
    on_gpu = active_cells_in_block((20, 40, 33), 0.2, **block, device="cuda")
    assert on_gpu.is_cuda
    assert same(on_gpu, active_cells_in_block((20, 40, 33), 0.2, **block))


@pytest.mark.gpu
@pytest.mark.compile
@pytest.mark.parametrize("check", [check_compiled_stratified, check_compiled_bernoulli])
def test_invariant_10_compiled_for_a_gpu(check: Callable[[str], None]) -> None:
    check("cuda")
