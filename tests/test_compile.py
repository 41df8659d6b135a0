"""Compiled equals eager, and nothing is compiled again after the first redraw."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from gmixout_optim import GMixoutOptimizer
from tests.optimizers import ELEMENTWISE, Case
from tests.training import assert_equal

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    """Two of a shape, a filter in channels_last, a vector, a scalar."""
    torch.manual_seed(0)
    shapes = [(12, 10), (12, 10), (6, 4, 3, 3), (30,), ()]
    params = [nn.Parameter(torch.randn(shape).to(device)) for shape in shapes]
    params[2].data = params[2].data.to(memory_format=torch.channels_last)
    return params


def run(
    case: Case, compile: bool, steps: int = 10, device: str = "cpu", **settings: object
) -> tuple[list[torch.Tensor], GMixoutOptimizer, list[int]]:
    """Weights after some steps, the optimizer, and how many graphs had been compiled after each step."""
    params = parameters(device)
    optimizer = GMixoutOptimizer(
        case(params), resample_every=3, mask_prob=0.6, compile=compile, **settings
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    graphs = []
    for step in range(steps):
        for number, param in enumerate(params):
            generator = torch.Generator().manual_seed(100 * step + number)
            noise = torch.randn(param.shape, generator=generator).to(device)
            param.grad = torch.empty_like(param).copy_(0.5 * param.detach() + noise)
        optimizer.step()
        if (
            step > 4
        ):  # constant at first: a rate that starts to change later must not compile either
            scheduler.step()
        graphs.append(counters["stats"]["unique_graphs"])
    return [param.detach().clone() for param in params], optimizer, graphs


@pytest.mark.parametrize(
    "case",
    [c for c in ELEMENTWISE if c.name in ("AdamW", "AdamW-fused", "SGD-momentum", "Adagrad")],
    ids=repr,
)
def test_compiled_equals_eager_and_compiles_once(case: Case) -> None:
    eager, eager_optimizer, _ = run(case, compile=False)
    assert counters["stats"]["unique_graphs"] == 0
    compiled, optimizer, graphs = run(case, compile=True)
    assert graphs[0] > 0
    # Steps 3, 6 and 9 end episodes; the first of them compiles the redraw.
    assert graphs[3:] == [graphs[3]] * len(graphs[3:])
    assert not counters["graph_break"]
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for param, other in zip(
        optimizer.param_groups[0]["params"], eager_optimizer.param_groups[0]["params"], strict=True
    ):
        assert_equal(optimizer.active_mask(param), eager_optimizer.active_mask(other))
    assert isinstance(optimizer.param_groups[0]["lr"], float)


def test_settings_compiled() -> None:
    adamw = next(case for case in ELEMENTWISE if case.name == "AdamW")
    settings = dict(rescale=True, carry_state=True, granularity="row", anchor_decay=0.5)
    eager, _, _ = run(adamw, compile=False, **settings)
    compiled, optimizer, graphs = run(adamw, compile=True, **settings)
    assert graphs[3:] == [graphs[3]] * len(graphs[3:])
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    restored = copy.deepcopy(optimizer)  # compiled code stays behind
    assert_equal(restored.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("AdamW", dict(sampler="bernoulli")),
        ("AdamW", dict(layout="dense")),
        ("AdamW", dict(residual="persistent")),
        ("SGD-dampening", dict()),
    ],
    ids=str,
)
def test_what_would_compile_again_and_again_runs_eagerly(name: str, settings: dict) -> None:
    case = next(case for case in ELEMENTWISE if case.name == name)
    eager, _, _ = run(case, compile=False, steps=4, **settings)
    compiled, _, graphs = run(case, compile=True, steps=4, **settings)
    assert graphs == [0] * 4
    assert_equal(eager, compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ELEMENTWISE, ids=repr)
def test_compiled_on_cuda(case: Case) -> None:
    eager, _, _ = run(case, compile=False, device="cpu")
    compiled, _, graphs = run(case, compile=True, device="cuda")
    assert graphs[3:] == [graphs[3]] * len(graphs[3:])
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)
