"""A parameter in pieces: what the ranks of a mesh hold makes up the whole, for all meshes.

The ranks are those of a process group that does not communicate, one after the other in this
process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gmixout_optim import GMixoutOptimizer, shards
from gmixout_optim.cells import Cells
from gmixout_optim.index_sets import SAMPLERS, active_cells, capacity
from tests.ranks import needs_gloo

pytestmark = needs_gloo

SEED, EPISODE = 3, 2


@contextmanager
def rank_of(mesh_shape: Sequence[int], rank: int) -> Iterator[Any]:
    """The mesh, as one of its ranks sees it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=prod(mesh_shape))
    try:
        yield init_device_mesh("cpu", tuple(mesh_shape))
    finally:
        dist.destroy_process_group()


def piece_on(mesh: Any, placements: Sequence[Any], whole: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


@st.composite
def spreads(draw: st.DrawFn) -> tuple[list[int], list[int], list[Any]]:
    """A shape, that of a mesh, and placements. Odd sizes make uneven, short and empty pieces."""
    from torch.distributed.tensor import Replicate, Shard

    sizes = st.sampled_from([1, 2, 3, 5, 8, 33, 40])
    shape = draw(st.lists(sizes, min_size=1, max_size=3).filter(lambda s: prod(s) <= 4000))
    mesh = draw(st.sampled_from([[1], [2], [3], [4], [2, 2], [2, 3]]))
    kinds = st.one_of(st.just(Replicate()), st.integers(0, len(shape) - 1).map(Shard))
    return shape, mesh, [draw(kinds) for _ in mesh]


GRANULARITIES = st.sampled_from(["element", "column", "row", 2, 3, 5, 8])


@given(spreads(), GRANULARITIES, st.sampled_from(SAMPLERS), st.floats(0.05, 0.95))
def test_invariant_14_pieces_make_up_the_whole(
    spread: tuple[list[int], list[int], list[Any]],
    granularity: Any,
    sampler: Any,
    mask_prob: float,
) -> None:
    """Sets, places of elements, and the packed vector of the whole: on all ranks of a mesh."""
    shape, mesh_shape, placements = spread
    numbers = torch.arange(prod(shape), dtype=torch.float32).view(shape)
    one = Cells(numbers, 7, granularity, mask_prob, sampler)
    active = one.draw(SEED, EPISODE)
    mask, packed = one.mask(active), one.grid.elements_at(active)
    seen = torch.zeros_like(numbers)
    for rank in range(prod(mesh_shape)):
        with rank_of(mesh_shape, rank) as mesh:
            param = piece_on(mesh, placements, numbers)
            cells = Cells(param, 7, granularity, mask_prob, sampler)
            index = cells.draw(SEED, EPISODE)
            local = shards.local_of(param)
            assert cells.density == one.density
            assert cells.are_outputs == one.are_outputs
            own = shards.local_of(piece_on(mesh, placements, mask))
            assert torch.equal(cells.mask(index), own)
            held = cells.grid.numbers_at(index)
            taken = cells.view().reshape(-1)[cells.grid.offsets_at(index)]
            assert torch.equal(held.float(), taken)
            assert len(held) == cells.grid.size_at(index) == int(own.sum())
            places, size = cells._places(index, SEED, EPISODE)
            assert size == len(packed)
            assert torch.equal(packed[places], held)
            seen.view(-1)[local.long().reshape(-1)] = 1
    assert seen.all()


@pytest.mark.parametrize(
    ("placement", "granularity", "width"),
    [
        (0, "element", 1),
        (0, 16, 16),  # 12 rows of 64 on 3 ranks: no block is cut
        (0, 96, 1),  # two rows and a half
        (1, 16, 1),  # 22 columns
        (0, "column", 4),  # of four rows, singly: 64 columns are too few for blocks
        (1, "column", 12),
        (0, "row", 64),
        (1, "row", 22),  # a row is active in all of its pieces
    ],
)
def test_cells_of_a_piece_are_as_wide_as_can_be(
    placement: int, granularity: Any, width: int
) -> None:
    from torch.distributed.tensor import Shard

    with rank_of([3], 0) as mesh:
        param = piece_on(mesh, [Shard(placement)], torch.zeros(12, 64))
        assert Cells(param, 0, granularity, 0.9, "stratified").grid.width == width


def test_drawing_for_columns_costs_in_proportion_to_the_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not to the range that it spans: each row of the piece is drawn for itself."""
    from torch.distributed.tensor import Shard

    from gmixout_optim import index_sets

    bits, made = index_sets.random_bits, []
    monkeypatch.setattr(
        index_sets, "random_bits", lambda key, at: made.append(at.numel()) or bits(key, at)
    )
    with rank_of([8], 3) as mesh:
        param = piece_on(mesh, [Shard(1)], torch.empty(512, 4096))
        index = Cells(param, 0, "element", 0.9, "stratified").draw(SEED, EPISODE)
    assert len(index) > 25_000
    assert sum(made) < 1.2 * len(index)


@pytest.mark.parametrize("cells", [1, 2, 3, 10, 1000, 100_000])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.99])
def test_capacity_holds_bernoulli_sets(cells: int, density: float) -> None:
    room = capacity(cells, density, "bernoulli")
    words: Any = dict(seed=1, tensor=0, sampler="bernoulli")
    sizes = [len(active_cells(cells, density, episode=episode, **words)) for episode in range(50)]
    assert max(sizes) <= room <= cells
    assert room <= density * cells + 10 * (density * cells) ** 0.5 + 10


def test_partial_parameters_are_refused() -> None:
    from torch.distributed.tensor import DTensor, Partial

    with rank_of([2], 0) as mesh:
        param = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
        with pytest.raises(TypeError, match=r"parameter 0 \(4x4\) is a DTensor.*Partial"):
            GMixoutOptimizer(torch.optim.AdamW([param]))


def test_a_piece_that_is_no_box_is_refused() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import _StridedShard

    with rank_of([2], 0) as mesh:
        local = torch.ones(4, 4)
        param = torch.nn.Parameter(
            DTensor.from_local(
                local,
                mesh,
                [_StridedShard(0, split_factor=2)],
                run_check=False,
                shape=(8, 4),
                stride=(4, 1),
            )
        )
        with pytest.raises(TypeError, match=r"parameter 0 \(8x4\) is a DTensor.*not contiguous"):
            GMixoutOptimizer(torch.optim.AdamW([param]))


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Adafactor])
def test_bases_that_do_not_take_pieces_are_refused_by_name(kind: Any) -> None:
    from torch.distributed.tensor import Shard

    with rank_of([2], 0) as mesh:
        param = torch.nn.Parameter(piece_on(mesh, [Shard(0)], torch.ones(4, 4)))
        with pytest.raises(ValueError, match=f"base={kind.__name__} cannot train DTensors"):
            GMixoutOptimizer(kind([param]))
