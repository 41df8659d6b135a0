"""Where the host waits for a GPU: each phase of a training, with each element-wise optimizer.

    python -m tests.cuda_without_gpu.waits [eager | compiled] [case ...]

Prints a line for each wait, and one for each case.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

from gmixout_optim import GMixoutOptimizer
from gmixout_optim.bench.pretend.device import pretend
from gmixout_optim.bench.pretend.fake import pass_fakes_as_tensors
from gmixout_optim.bench.pretend.trace import trace
from tests.optimizers import ELEMENTWISE

SHAPES = [(96, 96), (96, 96), (64, 32, 3, 3), (70,), ()]

# The base itself steps these, or only begins to after each redraw.
NOT_PLANNED = ("Lion", "AdamW persistent", "AdamW dense", "ASGD", "Rprop", "SGD-dampening")


def _eval(optimizer: GMixoutOptimizer) -> None:
    with optimizer.eval_weights():
        pass


def _step(optimizer: GMixoutOptimizer) -> None:
    optimizer.step()


def _clip(optimizer: GMixoutOptimizer) -> None:
    optimizer.clip_grad_norm_(1.0)


FURTHER = {
    "clip_grad_norm_": _clip,
    "eval_weights": _eval,
    "another step": _step,
    "zero_grad": lambda optimizer: optimizer.zero_grad(),
    "resample": lambda optimizer: optimizer.resample(),
    "report": lambda optimizer: optimizer.report(),
    "consolidate": lambda optimizer: optimizer.consolidate(),
}


def _change_options(optimizer: GMixoutOptimizer, step: int) -> None:
    """Steps 3, 5 and 6 are eager ones, whatever was compiled before."""
    if step in (3, 5, 6):
        optimizer.param_groups[0]["eps"] *= 1.5


def lion(params: Any) -> torch.optim.Optimizer:
    from lion_pytorch import Lion

    return Lion(params, lr=1e-4)


def cases(eager: bool) -> dict[str, tuple[Any, dict[str, Any]]]:
    found: dict[str, tuple[Any, dict[str, Any]]] = {case.name: (case, {}) for case in ELEMENTWISE}

    def adamw(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params)

    def on_device(params: Any) -> torch.optim.Optimizer:
        lr = torch.tensor(1e-3, device="cuda")
        return torch.optim.AdamW(params, lr=lr, capturable=True, foreach=True)

    found["lr on the device"] = on_device, {}
    adagrad = next(case for case in ELEMENTWISE if case.name == "Adagrad")
    found["AdamW, options change"] = adamw, dict(before_step=_change_options)
    found["Adagrad, options change"] = adagrad, dict(before_step=_change_options)
    for granularity in (4, "column", "row"):
        found[f"AdamW {granularity}"] = adamw, dict(granularity=granularity)
    found["AdamW packed"] = adamw, dict(grad_layout="packed")
    found["AdamW rescale"] = adamw, dict(rescale=True)
    rounded = dict(dtype=torch.bfloat16, stochastic_rounding=True)
    found["AdamW rounded stochastically"] = adamw, rounded
    if eager:
        found["Lion"] = lion, dict(layout="packed")
        found["AdamW persistent"] = adamw, dict(residual="persistent")
        found["AdamW dense"] = adamw, dict(layout="dense")
    return found


def main(arguments: list[str]) -> None:
    eager = "compiled" not in arguments
    names = [name for name in arguments if name not in ("eager", "compiled")]
    pretend()
    pass_fakes_as_tensors()
    for name, (make, settings) in cases(eager).items():
        if names and name not in names:
            continue
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            traced = trace(
                SHAPES,
                make,
                compile=False if eager else "auto",
                memory_format=torch.channels_last,
                steps=6,
                further=FURTHER,
                **settings,
            )
        told = [
            str(each.message) for each in warned if "could not be compiled" in str(each.message)
        ]
        for text in told:
            print(f"NOT COMPILED {name}: {text[:300]}")
        for phase, seen in traced.phases.items():
            if phase in ("", "backward", "build"):
                continue
            for place, count in seen.waits.items():
                print(f"WAITS {name} | {phase} | {count} x {place}")
            for graph in seen.graphs:
                for line in graph.on_host:
                    print(f"ON HOST {name} | {phase} | {line[:100]}")
        for line in traced.early_writes:
            print(f"EARLY WRITE {name} | {line}")
        missing = {3, 6} - set(traced.planned)
        if missing and "change" not in name and name not in NOT_PLANNED:
            print(f"NO PLAN {name} in steps {missing}")
        step, redraw = traced.phases["step 6"], traced.phases["redraw 4"]
        print(
            f"{name}: step {step.compiled_launches} + {step.launches.total()} launches, "
            f"redraw {redraw.compiled_launches} + {redraw.launches.total()}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
