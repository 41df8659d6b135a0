"""Optimizers from other packages as bases: what works, in which layout, and what is refused."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from gmixout_optim import GMixoutOptimizer
from tests.training import assert_equal, saved_and_loaded, weights

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from torchvision_compat import ensure_torchvision

ensure_torchvision()  # torchao looks for it
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_optimizer
    import schedulefree
    import torchao.optim
    from lion_pytorch import Lion

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

# torchao quantises a state of 4096 values or more in blocks of 256: packed ones need cells of whole
# blocks.
WIDTH, BLOCK = 256, 256

Make = Callable[[Any], Optimizer]
ELEMENTWISE: dict[str, Make] = {
    "lion_pytorch.Lion": lambda params: Lion(params, lr=1e-3, weight_decay=0.1),
    "pytorch_optimizer.Lion": lambda params: pytorch_optimizer.Lion(params, lr=1e-3),
    "pytorch_optimizer.AdaBelief": lambda params: pytorch_optimizer.AdaBelief(params, lr=1e-3),
    "pytorch_optimizer.AdEMAMix": lambda params: pytorch_optimizer.AdEMAMix(params, lr=1e-3),
}
QUANTISED: dict[str, Make] = {
    "torchao.AdamW8bit": lambda params: torchao.optim.AdamW8bit(params, lr=1e-3),
}
MATRIX: dict[str, Make] = {
    "pytorch_optimizer.SOAP": lambda params: pytorch_optimizer.SOAP(params, lr=1e-3),
    "pytorch_optimizer.Shampoo": lambda params: pytorch_optimizer.Shampoo(params, lr=1e-3),
}


def model_of(width: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))
    for param in model.parameters():
        nn.init.normal_(param, std=0.1)
    return model


def steps(model: nn.Module, optimizer: Optimizer, numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(8, model[0].in_features, generator=generator)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def wrap(model: nn.Module, make: Make, **settings: Any) -> GMixoutOptimizer:
    return GMixoutOptimizer(
        make(model.named_parameters() if settings.get("exclude") else model.parameters()),
        resample_every=3,
        **settings,
    )


def resumes(make: Make, width: int, **settings: Any) -> GMixoutOptimizer:
    """Train, save, load and train on: as if never stopped."""
    model, resumed_model = model_of(width), model_of(width)
    optimizer = wrap(model, make, **settings)
    steps(model, optimizer, range(5))
    of_model, of_optimizer = saved_and_loaded([model.state_dict(), optimizer.state_dict()])
    resumed = wrap(resumed_model, make, **settings)
    resumed_model.load_state_dict(of_model)
    resumed.load_state_dict(of_optimizer)
    steps(model, optimizer, range(5, 8))
    steps(resumed_model, resumed, range(5, 8))
    assert_equal(weights(model), weights(resumed_model))
    return optimizer


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_packed_where_the_user_says_so_equals_dense(name: str) -> None:
    """Unknown optimizers are dense by default; both layouts train the same."""
    packed_model, dense_model = model_of(16), model_of(16)
    packed = wrap(packed_model, ELEMENTWISE[name], layout="packed")
    dense = wrap(dense_model, ELEMENTWISE[name])
    assert (packed.report().layout, dense.report().layout) == ("packed", "dense")
    steps(packed_model, packed, range(8))
    steps(dense_model, dense, range(8))
    torch.testing.assert_close(weights(packed_model), weights(dense_model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "auto"])
@pytest.mark.parametrize("name", {**ELEMENTWISE, **QUANTISED})
def test_resumes(name: str, layout: str) -> None:
    optimizer = resumes({**ELEMENTWISE, **QUANTISED}[name], WIDTH, layout=layout, granularity=BLOCK)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert (type(state["exp_avg"]) is not torch.Tensor) == (name in QUANTISED)


@pytest.mark.parametrize("name", MATRIX)
def test_matrix_optimizers_work_on_whole_matrices(name: str) -> None:
    model = model_of(16)
    optimizer = wrap(model, MATRIX[name])
    start = [param.detach().clone() for param in model.parameters()]
    steps(model, optimizer, range(2))
    for param, before in zip(model.parameters(), start, strict=True):
        mask = optimizer.active_mask(param)
        assert torch.equal(param[~mask], before[~mask])
        assert not torch.equal(param[mask], before[mask])


def test_quantised_state_on_active_cells_multiplies_the_savings() -> None:
    def state_bytes(make: Make, wrapped: bool) -> int:
        model = model_of(WIDTH)
        base = make(model.parameters())
        settings = dict(layout="packed", granularity=BLOCK) if wrapped else dict(mask_prob=0.0)
        optimizer = GMixoutOptimizer(base, **settings)
        steps(model, optimizer, range(2))
        return optimizer.report().total("state_bytes")

    adamw = state_bytes(lambda params: torch.optim.AdamW(params), wrapped=False)
    quantised = state_bytes(QUANTISED["torchao.AdamW8bit"], wrapped=False)
    both = state_bytes(QUANTISED["torchao.AdamW8bit"], wrapped=True)
    assert quantised < 0.28 * adamw
    assert both < 0.04 * adamw


def test_quantised_state_is_created_anew_at_a_redraw() -> None:
    model = model_of(WIDTH)
    make = QUANTISED["torchao.AdamW8bit"]
    optimizer = wrap(model, make, layout="packed", granularity=BLOCK)
    steps(model, optimizer, range(4))
    assert int(optimizer.state[model[0].weight]["step"]) == 1


def test_a_quantised_base_that_has_stepped_is_refused_packed() -> None:
    model = model_of(WIDTH)
    base = QUANTISED["torchao.AdamW8bit"](model.parameters())
    steps(model, base, range(1))
    before = copy.deepcopy(weights(model))
    with pytest.raises(TypeError, match="OptimState8bit, which cannot be packed"):
        GMixoutOptimizer(base, layout="packed")
    assert_equal(before, weights(model))


def test_schedule_free_optimizers_are_refused_by_name() -> None:
    model = model_of(16)
    with pytest.raises(ValueError, match=r"AdamWScheduleFree has train\(\) and eval\(\)"):
        GMixoutOptimizer(schedulefree.AdamWScheduleFree(model.parameters()))
    unmixed = schedulefree.AdamWScheduleFree(model.parameters())
    unmixed.train()
    steps(model, GMixoutOptimizer(unmixed, mask_prob=0.0), range(2))
