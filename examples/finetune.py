"""Fine-tunes a pretrained model on one drawing style, and asks what it still knows of the others.

A pretrained EfficientNet-Lite0 is adapted to `fluent_mono`, emoji in black and white, in three
ways: a linear probe, AdamW, and AdamW wrapped in one line. Each is then tested on emoji it has
never seen, in that style (in-distribution) and in five others (under shift):

    python examples/finetune.py
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_domains import DOMAINS, EmojiDomains, Images, augment, load, normalise
from linear_probe import WEIGHT_DECAYS, linear_probe
from models import Classifier, predict, pretrained_backbone
from picture import save_picture
from results import Method, Results, Run, Scores, optimizer_bytes
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from gmixout_optim import GMixoutOptimizer


def make_optimizer(
    model: Classifier, settings: argparse.Namespace, seed: int, *, gmixout: bool
) -> torch.optim.Optimizer:
    """AdamW, or with `gmixout` AdamW wrapped and nothing else changed."""
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        [
            {"params": model.trainable("backbone"), "lr": settings.lr},
            {"params": model.trainable("head"), "lr": settings.head_lr},
        ]
    )
    if gmixout:
        # The one line. The head is new: it has no pretrained value to return to, so it is left out.
        optimizer = GMixoutOptimizer(
            optimizer,
            exclude="head.*",
            mask_prob=settings.mask_prob,
            resample_every=settings.resample_every,
            anchor_decay=settings.anchor_decay,
            seed=seed,
        )
    return optimizer


def fine_tune(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    description: str,
) -> None:
    """An ordinary training loop, the same for every optimizer."""
    generator = torch.Generator().manual_seed(seed)
    batches = max(1, len(images) // batch_size)  # a last batch that is not full is left out
    scheduler = CosineAnnealingLR(optimizer, T_max=epochs * batches)
    with tqdm(total=epochs * batches, desc=description, unit="step", disable=None) as progress:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for rows in order.split(batch_size)[:batches]:
                rows = rows.to(images.labels.device)
                inputs = augment(normalise(images.pixels[rows]), generator)
                loss = F.cross_entropy(model(inputs), images.labels[rows], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
                progress.update()


def evaluate(model: nn.Module, data: EmojiDomains) -> dict[str, Scores]:
    """Which test emoji `model` gets right, by domain."""
    scores = {}
    for domain in data.domains:
        images = data[domain, "test"]
        correct = predict(model, images).argmax(1) == images.labels
        scores[domain] = Scores(images.emoji.cpu(), correct.cpu())
    return scores


def compare(data: EmojiDomains, settings: argparse.Namespace) -> Results:
    """Runs the three methods, all from the same weights; training starts with the probe as head."""
    train, val = data[settings.domain, "train"], data[settings.domain, "val"]
    backbone = pretrained_backbone().to(settings.device).eval()

    start = time.perf_counter()
    head, weight_decay = linear_probe(
        (predict(backbone, train), train.labels),
        (predict(backbone, val), val.labels),
        len(data.class_names),
        WEIGHT_DECAYS[:1] if settings.quick else WEIGHT_DECAYS,
    )
    seconds = time.perf_counter() - start
    probe = Method(
        "linear probe", [Run(None, seconds, 0, evaluate(Classifier(backbone, head), data))]
    )
    plain, mixed = Method("AdamW"), Method("AdamW + GMixout")
    shifted = tuple(domain for domain in data.domains if domain != settings.domain)
    results = Results(settings.domain, shifted, [probe, plain, mixed])
    print(f"linear probe fitted, weight decay {weight_decay:g} chosen on validation images")

    for seed in range(settings.seeds):
        for method in (plain, mixed):
            description = f"{method.name}, seed {seed}"
            model = Classifier(backbone, head)
            optimizer = make_optimizer(model, settings, seed, gmixout=method is mixed)
            start = time.perf_counter()
            fine_tune(
                model,
                optimizer,
                train,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                seed=seed,
                description=description,
            )
            size = optimizer_bytes(optimizer)
            if isinstance(optimizer, GMixoutOptimizer):
                optimizer.consolidate()  # leaves the weights to deploy in the model
            run = Run(seed, time.perf_counter() - start, size, evaluate(model, data))
            method.runs.append(run)
            tqdm.write(
                f"{description}: {run.accuracy([settings.domain]):.1f} % in-distribution, "
                f"{run.accuracy(shifted):.1f} % under shift"
            )
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example from the command line."""
    settings = parse_settings(arguments)
    start = time.perf_counter()
    data = load().to(settings.device)
    if settings.domain not in data.domains:
        sys.exit(f"--domain {settings.domain}: {settings.domain}.npz is not in the data folder")
    if settings.quick:
        data = data.thinned(keep_every=10)
    results = compare(data, settings)

    probe, plain, mixed = results.methods
    print(f"\nTest accuracy in %, seeds: {settings.seeds}\n\n{results.table()}\n")
    print(results.describe_difference(plain, probe))
    print(results.describe_difference(mixed, plain))
    print("(± one standard error over test emoji, paired; another seed may add a point or two)")
    if settings.quick:
        print("--quick is a smoke test: its numbers mean nothing")

    picture, numbers = settings.output / "finetune.png", settings.output / "finetune.json"
    caption = (
        f"{results.describe_difference(mixed, plain)}\n"
        f"± one standard error over {len(data[settings.domain, 'test'])} test emoji, paired; "
        f"seeds: {settings.seeds} (small dots)"
    )
    save_picture(picture, results, caption)
    results.save_json(numbers, vars(settings))
    print(f"\nSaved {picture.resolve()}\n  and {numbers.resolve()}")
    print(f"{time.perf_counter() - start:.0f} s in all on {settings.device}")


def make_parser() -> argparse.ArgumentParser:
    """All flags with their defaults."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes a pretrained model on one drawing style, with and without GMixout, "
        "and tests it in that style and in the others.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    count = _number(int, "a whole number, at least 1", lambda n: n >= 1)
    rate = _number(float, "a positive number", lambda lr: 0 < lr < math.inf)
    add("--domain", choices=DOMAINS, default="fluent_mono", help="drawing style to fine-tune on")
    add("--seeds", metavar="N", type=count, default=3, help="runs per method, with seeds 0, 1, ...")
    add("--epochs", metavar="N", type=count, default=16, help="passes over the training images")
    add("--batch-size", metavar="N", type=count, default=32, help="images per step")
    add(
        "--lr",
        type=rate,
        default=1e-3,
        help="learning rate of the backbone",
    )
    add("--head-lr", metavar="LR", type=rate, default=1e-4, help="learning rate of the head")
    add(
        "--mask-prob",
        metavar="P",
        type=_number(float, "in [0, 1)", lambda p: 0 <= p < 1),
        default=0.9,
        help="share of weights at their anchor, p",
    )
    add("--resample-every", metavar="K", type=count, default=20, help="steps in an episode, k")
    add(
        "--anchor-decay",
        metavar="LAMBDA",
        type=_number(float, "in [0, 1]", lambda decay: 0 <= decay <= 1),
        default=0.5,
        help="weight of the old anchor, lambda",
    )
    add("--device", type=_device, default="auto", help="auto (a GPU where there is one), cpu, ...")
    add("--output", type=Path, default=Path("results"), help="folder for picture and JSON")
    add("--quick", action="store_true", help="a smoke test: few images, few steps, one seed")
    return parser


def parse_settings(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Flags, with what follows from them filled in and the output folder made."""
    parser = make_parser()
    settings = parser.parse_args(arguments)
    if settings.quick:
        settings.seeds, settings.epochs = 1, 2
        settings.resample_every = min(settings.resample_every, 2)
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: no folder {settings.output}: {error.strerror}")
    return settings


def _number(
    kind: Callable[[str], float], requirement: str, holds: Callable[[float], bool]
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {requirement}, not {text}")
        return value

    return parse


def _device(text: str) -> torch.device:
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=text).device  # a device may be well named and yet not there
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"no such device here: {text} ({reason})") from None


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
