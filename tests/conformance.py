"""One battery for optimizer wrappers: what training loops expect of a torch optimizer.

``make conformance`` runs it against ours and against wrappers that people know, and writes
docs/conformance.md from what it saw. A check passes if it does not raise.
"""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, lr_scheduler

from gmixout_optim import GMixoutOptimizer, __version__
from tests.training import assert_equal, loss_of, saved_and_loaded, small_model, weights

Make = Callable[[nn.Module], Any]
PAGE = Path(__file__).parent.parent / "docs" / "conformance.md"


def step(model: nn.Module, optimizer: Any, number: int) -> None:
    """A plain step, with a closure where the wrapper has no other."""
    if getattr(optimizer, "wants_closure", False):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            return loss

        optimizer.step(closure)
        return
    optimizer.zero_grad()
    loss_of(model, number).backward()
    optimizer.step()


def train(model: nn.Module, optimizer: Any, numbers: range) -> None:
    for number in numbers:
        step(model, optimizer, number)


def built(make: Make, seed: int = 0) -> tuple[nn.Module, Any]:
    model = small_model(torch.float32, seed)
    return model, make(model)


def is_optimizer_with_schedulers(make: Make) -> None:
    model, optimizer = built(make)
    assert isinstance(optimizer, Optimizer), "is no torch.optim.Optimizer"
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    for number in range(6):
        step(model, optimizer, number)
        scheduler.step()
    other_model, other = built(make)
    train(other_model, other, range(6))
    assert not torch.equal(weights(model)[0], weights(other_model)[0]), "the rate has no effect"


def grad_scaler_skips_inf(make: Make) -> None:
    model, optimizer = built(make)
    plain_model, plain = built(make)
    train(plain_model, plain, range(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in (0, 1, None, 2, 3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, number or 0)).backward()
        if number is None:
            model.body.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(weights(model), weights(plain_model))


def accumulates_gradients(make: Make) -> None:
    """Two half losses make the step of the whole one."""
    model, optimizer = built(make)
    plain_model, plain = built(make)
    for number in range(5):
        optimizer.zero_grad()
        for _ in range(2):
            (loss_of(model, number) / 2).backward()
        optimizer.step()
    train(plain_model, plain, range(5))
    torch.testing.assert_close(weights(model), weights(plain_model))


def takes_a_closure(make: Make) -> None:
    model, optimizer = built(make)
    plain_model, plain = built(make)
    for number in range(5):

        def closure(number: int = number) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            return loss

        assert optimizer.step(closure) is not None, "gives no loss back"
        step(plain_model, plain, number)
    assert_equal(weights(model), weights(plain_model))


def calls_hooks_once(make: Make) -> None:
    model, optimizer = built(make)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda opt, state: calls.append("state"))
    step(model, optimizer, 0)
    optimizer.state_dict()
    assert calls == ["pre", "post", "state"], calls


def copies_and_pickles(make: Make) -> None:
    model, optimizer = built(make)
    train(model, optimizer, range(3))
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer, range(3, 8))
    for other_model, other in copies:
        train(other_model, other, range(3, 8))
        assert_equal(weights(model), weights(other_model))


def resumes_exactly(make: Make) -> None:
    model, optimizer = built(make)
    train(model, optimizer, range(7))
    of_model, of_optimizer = saved_and_loaded([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, range(7, 14))
    other_model, other = built(make, seed=1)
    other_model.load_state_dict(of_model)
    other.load_state_dict(of_optimizer)
    train(other_model, other, range(7, 14))
    assert_equal(weights(model), weights(other_model))


def takes_param_groups(make: Make) -> None:
    model, optimizer = built(make)
    step(model, optimizer, 0)
    extra = nn.Parameter(torch.ones(40))
    optimizer.add_param_group({"params": [extra]})

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = extra.square().sum() + loss_of(model, 0)
        loss.backward()
        return loss

    for _ in range(3):
        closure()
        optimizer.step(*([closure] if getattr(optimizer, "wants_closure", False) else []))
    assert not torch.equal(extra.detach(), torch.ones(40)), "the new parameter does not train"


def goes_through_distributed_checkpoint(make: Make) -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    model, optimizer = built(make)
    train(model, optimizer, range(7))
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=True)
    saved = copy.deepcopy(dcp.get_state_dict(model, optimizer, options=options))
    train(model, optimizer, range(7, 12))
    other_model, other = built(make, seed=1)
    dcp.set_state_dict(
        other_model,
        other,
        model_state_dict=saved[0],
        optim_state_dict=saved[1],
        options=options,
    )
    train(other_model, other, range(7, 12))
    assert_equal(weights(model), weights(other_model))


def is_prepared_by_accelerate(make: Make) -> None:
    from accelerate import Accelerator

    model, optimizer = built(make)
    plain_model, plain = built(make)
    train(plain_model, plain, range(5))
    accelerator = Accelerator(cpu=True)
    prepared_model, prepared = accelerator.prepare(model, optimizer)
    assert prepared is not optimizer, "Accelerate passes it over"
    for number in range(5):
        prepared.zero_grad()
        accelerator.backward(loss_of(prepared_model, number))
        prepared.step()
    assert_equal(weights(model), weights(plain_model))


def compiles_once(make: Make) -> None:
    """``torch.compile(optimizer.step)`` over 12 steps with a new rate in each, or the wrapper's own
    compiled step."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, optimizer = built(partial(ours, compile=True) if make is ours else make)
    compiled = optimizer.step if make is ours else torch.compile(optimizer.step)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.01)
    made = []
    for number in range(12):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        compiled()
        for group in optimizer.param_groups:
            group["lr"].mul_(0.9)
        made.append(counters["stats"]["unique_graphs"])
    assert made[-1] > 0, "nothing was compiled"
    assert made[-1] == made[4], f"{made[-1] - made[4]} graphs after the fifth step"


CHECKS: dict[str, Callable[[Make], None]] = {
    "`isinstance`, schedulers": is_optimizer_with_schedulers,
    "GradScaler, a step with inf": grad_scaler_skips_inf,
    "gradient accumulation": accumulates_gradients,
    "closure": takes_a_closure,
    "hooks": calls_hooks_once,
    "deepcopy, pickle": copies_and_pickles,
    "resume, bit for bit": resumes_exactly,
    "`add_param_group`": takes_param_groups,
    "distributed checkpoint": goes_through_distributed_checkpoint,
    "Accelerate": is_prepared_by_accelerate,
    "no recompiling, 12 steps": compiles_once,
}


def ours(model: nn.Module, *, compile: bool = False) -> GMixoutOptimizer:
    base = AdamW(model.parameters(), lr=0.01)
    return GMixoutOptimizer(base, mask_prob=0.5, resample_every=4, compile=compile)


def others() -> dict[str, tuple[str, Make]]:
    """The wrappers that people know, around AdamW; each with the package that it comes from."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from torchvision_compat import ensure_torchvision

    ensure_torchvision()
    import badam
    import pytorch_optimizer
    import schedulefree
    import timm.optim

    def schedule_free(model: nn.Module) -> Any:
        wrapper = schedulefree.ScheduleFreeWrapper(AdamW(model.parameters(), lr=0.01), momentum=0.9)
        wrapper.train()
        return wrapper

    def sam(model: nn.Module) -> Any:
        wrapper = pytorch_optimizer.SAM(model.parameters(), AdamW, lr=0.01)
        wrapper.wants_closure = True
        return wrapper

    def block(model: nn.Module) -> Any:
        return badam.BlockOptimizer(
            base_optimizer=AdamW(model.parameters(), lr=0.01),
            named_parameters_list=list(model.named_parameters()),
            block_prefix_list=[["body."], ["head."]],
            switch_block_every=4,
        )

    return {
        "ScheduleFreeWrapper": ("schedulefree", schedule_free),
        "Lookahead": (
            "pytorch_optimizer",
            lambda model: pytorch_optimizer.Lookahead(AdamW(model.parameters(), lr=0.01)),
        ),
        "SAM": ("pytorch_optimizer", sam),
        "timm Lookahead": (
            "timm",
            lambda model: timm.optim.Lookahead(AdamW(model.parameters(), lr=0.01)),
        ),
        "BlockOptimizer": ("badam", block),
    }


def outcome(check: Callable[[Make], None], make: Make) -> str | None:
    """None where the check passes, else what happened, in a line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(make)
    except Exception as error:
        lines = str(error).strip().splitlines()
        text = next((line for line in lines if line.strip()), "the weights differ")
        return f"{type(error).__name__}: {text[:110]}"
    return None


def main() -> None:
    wrappers = {"GMixoutOptimizer": ("gmixout_optim", ours), **others()}
    seen = {
        name: {row: outcome(check, make) for row, check in CHECKS.items()}
        for name, (_, make) in wrappers.items()
    }
    packages = {
        package: version(package) for package, _ in wrappers.values() if package != "gmixout_optim"
    }
    head = "| | " + " | ".join(seen) + " |"
    rows = [
        f"| {row} | " + " | ".join("yes" if not seen[name][row] else "no" for name in seen) + " |"
        for row in CHECKS
    ]
    why = [
        f"- **{name}**, {row}: `{text.replace('`', '')}`"
        for name, results in seen.items()
        for row, text in results.items()
        if text
    ]
    used = ", ".join(f"{name} {number}" for name, number in sorted(packages.items()))
    PAGE.write_text(
        "# Conformance\n\n"
        "What training loops expect of a torch optimizer, tried on wrappers of optimizers that "
        "people know. Written by `make conformance`\nfrom what it saw; the checks are in "
        "[tests/conformance.py](../tests/conformance.py). Each wrapper is around "
        "`torch.optim.AdamW`,\nSAM is called with the closure that it needs.\n\n"
        f"torch {torch.__version__}, gmixout_optim {__version__}, {used}, "
        f"accelerate {version('accelerate')}.\n\n"
        + "\n".join([head, "|---" * (len(seen) + 1) + "|", *rows])
        + "\n\n## What happened\n\n"
        + "\n".join(why)
        + "\n"
    )
    print("\n".join([head, *rows]))
    if any(seen["GMixoutOptimizer"].values()):
        raise SystemExit(f"ours fails: {seen['GMixoutOptimizer']}")


if __name__ == "__main__":
    main()
