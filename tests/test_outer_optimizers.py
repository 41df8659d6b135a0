"""Optimizers that step others: refused as a base, and at work around the wrapper."""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bases import _OWN_KEYS
from tests.optimizers import ELEMENTWISE
from tests.training import assert_equal, loss_of, saved_and_loaded, small_model, train, weights

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from torchvision_compat import ensure_torchvision

ensure_torchvision()  # accelerate and timm look for it
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    import pytorch_optimizer
    import timm.optim
    from accelerate import Accelerator

pytestmark = pytest.mark.filterwarnings("ignore:weights of")

Make = Callable[..., Optimizer]


class SAM(Optimizer):
    """Sharpness-aware minimization as it is usually written: the inner optimizer's groups."""

    def __init__(self, params: Any, base_optimizer: Make, **kwargs: Any) -> None:
        super().__init__(params, dict(rho=0.05, **kwargs))
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.enable_grad():
            loss = closure()
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad, alpha=0.05 / float(norm))
        with torch.enable_grad():
            closure()
        for p in params:
            p.data = self.state[p]["old"]
        self.base_optimizer.step()
        return loss


class Slow(Optimizer):
    """Lookahead without Optimizer.__init__(), its slow weights in the inner optimizer's state."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.defaults = inner.defaults
        self.param_groups = inner.param_groups
        self.state = defaultdict(dict)
        self._optimizer_step_pre_hooks = OrderedDict()  # all that a step asks for
        self._optimizer_step_post_hooks = OrderedDict()
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.inner.step()
        self.steps += 1
        if self.steps % 3 == 0:
            for group in self.param_groups:
                for p in group["params"]:
                    slow = self.inner.state[p].setdefault("slow", p.detach().clone())
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)


class Several(Optimizer):
    """Several optimizers in a list."""

    def __init__(self, *inner: Optimizer) -> None:
        super().__init__([p for o in inner for p in o.param_groups[0]["params"]], {})
        self.inner = list(inner)


class Proxy(Optimizer):
    """Groups and state are the inner optimizer's, as frameworks prepare optimizers."""

    def __init__(self, inner: Optimizer) -> None:
        self.__dict__.update(inner.__dict__)
        self._optimizer = inner


def adamw(params: Any, **kwargs: Any) -> Optimizer:
    return torch.optim.AdamW(params, **{"lr": 0.02, **kwargs})


OUTER: dict[str, Callable[[Any, Make], Optimizer]] = {
    "SAM": lambda params, make: SAM(params, make, lr=0.02),
    "Lookahead": lambda params, make: Slow(make(params)),
    "timm.Lookahead": lambda params, make: timm.optim.Lookahead(make(params)),
    "pytorch_optimizer.Lookahead": lambda params, make: pytorch_optimizer.Lookahead(make(params)),
}
REFUSED: dict[str, Callable[[Any], Optimizer]] = {
    **{name: lambda params, outer=outer: outer(params, adamw) for name, outer in OUTER.items()},
    "several": lambda params: Several(adamw(params)),
    "proxy": lambda params: Proxy(adamw(params)),
    "accelerate": lambda params: Accelerator(cpu=True).prepare(adamw(params)),
    "fabric": lambda params: lightning.Fabric(accelerator="cpu").setup_optimizers(adamw(params)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_as_a_base_they_are_refused_and_left_alone(name: str) -> None:
    """Their inner optimizer would step past the wrapper, its state never made fresh or saved."""
    model = small_model()
    base = REFUSED[name](list(model.named_parameters()))
    before = [dict(group) for group in base.param_groups]
    prepared = name in ("proxy", "accelerate", "fabric")
    message = "wrap AdamW first" if prepared else "wrap that one.*around the wrapper"
    with pytest.raises(TypeError, match=f"(?s)base=.*{message}"):
        GMixoutOptimizer(base)
    assert [dict(group) for group in base.param_groups] == before
    loss_of(model, 0).backward()
    start = weights(model)
    if name not in ("SAM", "several", "proxy", "fabric"):  # which need a closure, or step nothing
        base.step()
        assert not torch.equal(start[0], model.body.weight)


def test_a_base_that_knows_an_optimizer_of_other_parameters() -> None:
    generator, discriminator = small_model(), small_model(seed=1)
    base = adamw(generator.parameters())
    base.partner = adamw(discriminator.parameters())
    GMixoutOptimizer(base)


def test_a_base_that_is_around_a_wrapper_is_refused() -> None:
    inner = GMixoutOptimizer(adamw(small_model().parameters()))
    with pytest.raises(TypeError, match="around a GMixoutOptimizer already"):
        GMixoutOptimizer(Slow(inner))


def test_a_base_without_hooks_is_refused() -> None:
    class Bare(Optimizer):
        def __init__(self, params: Any) -> None:
            self.defaults: dict[str, Any] = {}
            self.state = defaultdict(dict)
            self.param_groups = [{"params": list(params), "lr": 0.1}]

    base = Bare(small_model().parameters())
    with pytest.raises(TypeError, match=r"Optimizer.__init__\(\).*Bare"):
        GMixoutOptimizer(base)
    assert base.param_groups[0].keys() == {"params", "lr"}


def trained_around(name: str, wrap: Callable[[Optimizer], Optimizer], steps: int) -> nn.Module:
    model = small_model()
    make = OUTER[name]
    optimizer = make(model.named_parameters(), lambda params, **kw: wrap(adamw(params, **kw)))
    for step in range(steps):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if name == "SAM":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return model


@pytest.mark.parametrize("name", OUTER)
def test_around_the_wrapper_they_work(name: str) -> None:
    """With nothing mixed bit for bit as around the bare optimizer; mixed, over redraws as well."""
    bare = trained_around(name, lambda base: base, 12)
    unmixed = trained_around(name, lambda base: GMixoutOptimizer(base, mask_prob=0.0), 12)
    assert_equal(weights(bare), weights(unmixed))

    start = small_model()
    wrapped: list[GMixoutOptimizer] = []

    def wrap(base: Optimizer) -> Optimizer:
        wrapped.append(GMixoutOptimizer(base, mask_prob=0.5, exclude="head.*", resample_every=5))
        return wrapped[-1]

    model = trained_around(name, wrap, 60)
    losses = [sum(loss_of(m, step).item() for step in range(50, 60)) for m in (start, model)]
    assert losses[1] < 0.9 * losses[0]
    assert wrapped[0].episode == 12


@pytest.mark.parametrize("case", [c for c in ELEMENTWISE if not c.closure], ids=repr)
def test_state_that_is_somebody_elses_is_left_alone(case: Any) -> None:
    """Redraws and files keep it as it is; only a state that is made anew is dropped whole."""
    model = small_model()
    optimizer = GMixoutOptimizer(case(model.named_parameters()), mask_prob=0.5, resample_every=3)
    train(model, optimizer, range(1))
    if not optimizer.base.state[model.body.weight]:
        return  # it keeps none
    own = {key for entry in optimizer.base.state.values() for key in entry}
    assert own <= _OWN_KEYS
    slow = {p: torch.full_like(p, 7.0) for p in model.parameters()}
    for param in model.parameters():
        optimizer.base.state[param]["slow"] = slow[param].clone()
    train(model, optimizer, range(1, 3))
    assert optimizer.episode == 1
    for param in model.parameters():
        kept = optimizer.base.state.get(param, {}).get("slow")
        if kept is not None:
            assert_equal(kept, slow[param])
    is_dropped = "slow" not in optimizer.base.state.get(model.body.weight, {})
    assert is_dropped == (case.name in ("ASGD", "Rprop", "SGD-dampening"))
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    if not is_dropped:
        assert_equal(optimizer.base.state[model.body.weight]["slow"], slow[model.body.weight])
    train(model, optimizer, range(3, 8))
