"""Wrong arguments of the functions that make index sets are named and refused."""

from __future__ import annotations

import pytest

from gmixout_optim.index_sets import SAMPLERS, active_cells, active_cells_in_block
from tests.index_set_tools import Request


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
