"""What a step costs: time and optimizer-state bytes with ViT-B/16's parameter shapes, against fused AdamW.

Both optimizers take turns in one run, so that the ratio holds where the machine's speed drifts. No forward or backward
pass is measured: gradients are constant.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import nn

from gmixout_optim import GMixoutOptimizer


def vit_b_16_shapes() -> list[tuple[int, ...]]:
    width, classes = 768, 1000
    block = [
        *[(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)],
        *[(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)],
    ]
    stem = [(1, 1, width), (width, 3, 16, 16), (width,), (1, 197, width)]
    return [*stem, *block * 12, (width,), (width,), (classes, width), (classes,)]


def parameters(device: str) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(0.02 * torch.randn(s, device=device)) for s in vit_b_16_shapes()]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def milliseconds(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [item for state in optimizer.state.values() for item in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def swap_in_and_out(optimizer: GMixoutOptimizer) -> None:
    with optimizer.eval_weights():
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--mask-prob", type=float, default=0.9, help="p")
    parser.add_argument("--rounds", type=int, default=30, help="measured steps of each optimizer")
    parser.add_argument("--compile", action="store_true", help="also the compiled step (minutes)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*freshly initialised")

    plain = torch.optim.AdamW(parameters(args.device), fused=True)
    for _ in range(3):
        plain.step()
    plain_bytes = state_bytes(plain)
    print(
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, "
        f"p = {args.mask_prob}; ratios to fused AdamW's step, median (min to max)"
    )
    print("granularity  compiled  step                   redraw / step  eval in+out / step  bytes")
    for granularity in ("element", 16, "row"):
        for compiled in (False, True) if args.compile else (False,):
            optimizer = GMixoutOptimizer(
                torch.optim.AdamW(parameters(args.device), fused=True),
                mask_prob=args.mask_prob,
                granularity=granularity,
                resample_every=None,
                compile=compiled,
            )
            for _ in range(3):  # warm up, and compile
                optimizer.step()
            optimizer.resample()
            optimizer.step()
            steps, ratios = [], []
            for _ in range(args.rounds):
                reference = milliseconds(plain.step, args.device)
                steps.append(milliseconds(optimizer.step, args.device))
                ratios.append(steps[-1] / reference)
            few = range(max(3, args.rounds // 2))
            swap = median(
                milliseconds(partial(swap_in_and_out, optimizer), args.device) for _ in few
            )
            redraw = median(milliseconds(optimizer.resample, args.device) for _ in few)
            share = optimizer.report().total("bytes") / plain_bytes
            print(
                f"{granularity!s:<11}  {'yes' if compiled else 'no':<8}  "
                f"{median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})  "
                f"{redraw / median(steps):13.1f}  {swap / median(steps):18.2f}  {share:.3f}x"
            )


if __name__ == "__main__":
    main()
