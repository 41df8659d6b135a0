"""A tensor seen as (outer, cells, inner): where cells lie, what is gathered and scattered."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from gmixout_optim import mixing
from gmixout_optim.cells import Cells, Grid
from tests.scenarios import MEMORIES, SHAPES, TensorSpec


@given(data=st.data())
def test_any_view_is_gathered_scattered_and_numbered_alike(data: st.DataObject) -> None:
    """Elements and rows have outer = 1; columns, or blocks of them, do not."""
    outer, cells, inner = (data.draw(st.integers(1, 5)) for _ in range(3))
    shape = (outer, cells * inner)
    grid = Grid(shape, (shape[1], 1), True, outer, cells, inner)
    chosen = data.draw(st.lists(st.sampled_from(range(cells)), unique=True, min_size=1).map(sorted))
    index = grid.address(torch.tensor(chosen, dtype=torch.int32))
    numbers = [
        (o * cells + c) * inner + i for o in range(outer) for c in chosen for i in range(inner)
    ]
    assert grid.elements_at(index).tolist() == numbers
    assert grid.size_at(index) == len(numbers)

    tensor = torch.arange(float(prod(shape))).view(shape)
    assert mixing.gather(grid.view(tensor), index).tolist() == numbers
    assert mixing.gather_gradient(grid.view(tensor), index).tolist() == numbers
    mixing.scatter_(grid.view(tensor), index, -1.0 - torch.tensor(numbers, dtype=torch.float64))
    written = [-1.0 - n if n in numbers else float(n) for n in range(prod(shape))]
    assert tensor.flatten().tolist() == written


@given(data=st.data())
def test_addresses_are_of_the_elements_whatever_the_strides(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([shape for shape in SHAPES if 0 not in shape]))
    spec = TensorSpec(shape, data.draw(st.sampled_from(MEMORIES)), "w")
    param = torch.nn.Parameter(spec.make(torch.arange(float(prod(shape))).view(shape)))
    granularity = data.draw(st.sampled_from(["element", "row", 2, 3]))
    cells = Cells(param, 0, granularity, data.draw(st.sampled_from([0.5, 0.9])), "stratified")
    index = cells.draw(seed=1, episode=data.draw(st.integers(0, 9)))
    numbers = cells.grid.elements_at(index)
    assert numbers.tolist() == sorted(numbers.tolist())
    assert mixing.gather(cells.view(), index).tolist() == numbers.tolist()
    assert cells.mask(index).flatten().nonzero().flatten().tolist() == numbers.tolist()
    assert cells.density == cells.mask(index).double().mean()
