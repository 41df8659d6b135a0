"""A tensor seen as (outer, cells, inner): where cells lie, what is gathered and scattered."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gmixout_optim import GMixoutOptimizer, mixing
from gmixout_optim.cells import Cells, Grid, column_block
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
    granularity = data.draw(st.sampled_from(["element", "row", "column", 2, 3]))
    cells = Cells(param, 0, granularity, data.draw(st.sampled_from([0.5, 0.9])), "stratified")
    index = cells.draw(seed=1, episode=data.draw(st.integers(0, 9)))
    numbers = cells.grid.elements_at(index)
    assert numbers.tolist() == sorted(numbers.tolist())
    assert mixing.gather(cells.view(), index).tolist() == numbers.tolist()
    assert cells.mask(index).flatten().nonzero().flatten().tolist() == numbers.tolist()
    assert cells.density == cells.mask(index).double().mean()


@pytest.mark.parametrize(
    ("shape", "block", "columns"),
    [
        ((5, 384), 8, 48),
        ((5, 768), 16, 48),
        ((5, 4096), 16, 256),
        ((5, 64), 1, 64),
        ((5, 33), 1, 33),
        ((5, 100), 2, 50),
        ((5, 384, 3, 3), 8, 48),
    ],
)
def test_columns_are_input_features_in_blocks(
    shape: tuple[int, ...], block: int, columns: int
) -> None:
    """Of all outputs alike, and of a filter with the whole kernel."""
    param = torch.nn.Parameter(torch.randn(shape))
    optimizer = GMixoutOptimizer(torch.optim.SGD([param], lr=0.1), granularity="column")
    for _ in range(3):
        mask = optimizer.active_mask(param)
        chosen = mask[0].reshape(columns, -1)
        assert torch.equal(mask, mask[:1].expand(shape))
        assert torch.equal(chosen.all(1), chosen.any(1))
        assert int(chosen.any(1).sum()) == round(0.1 * columns)
        optimizer.resample()
    assert optimizer.report().tensors[0].width == param.numel() // columns


@pytest.mark.parametrize(
    ("shape", "note"),
    [
        ((8, 3, 16, 16), "3 columns are too few: element-wise"),
        ((40, 1, 3, 3), "has 1 column: element-wise"),
        ((40,), "has no columns: element-wise"),
        ((1, 40), "has no columns: element-wise"),
        ((40, 40), ""),
    ],
)
def test_what_has_too_few_columns_falls_back_to_elements(shape: tuple[int, ...], note: str) -> None:
    param = torch.nn.Parameter(torch.randn(shape))
    optimizer = GMixoutOptimizer(torch.optim.SGD([param], lr=0.1), granularity="column")
    (tensor,) = optimizer.report().tensors
    assert tensor.note == note
    assert (tensor.width == 1) == bool(note)


@given(st.integers(1, 1 << 16))
def test_blocks_divide_a_tensor_and_leave_enough_of_them(columns: int) -> None:
    block = column_block(columns)
    assert columns % block == 0
    assert block in (1, 2, 4, 8, 16)
    assert block == 1 or columns // block >= 48
    assert block == 16 or columns % (2 * block) or columns // (2 * block) < 48
