"""What is learned: a pretrained model, the style that it is fine-tuned on, its test images."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_domains import EmojiDomains, Images, load, normalise
from linear_probe import WEIGHT_DECAYS, linear_probe
from models import Classifier, pretrained_backbone
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision_compat import ensure_torchvision

from study.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from study.foundation import foundation_vit

HELD_OUT = "fluent_mono"  # the style that no backbone of settings A and C has seen
PRETRAINED = Path(os.environ.get("STUDY_PRETRAINED", "results/pretrained_vit.safetensors"))


@dataclass(frozen=True)
class Task:
    """A setting of the study."""

    name: str
    model: str  # in words
    domain: str  # the style that is learned, in-distribution
    backbone: Callable[[], nn.Module]
    to_input: Callable[[Tensor], Tensor]  # uint8 [N, 3, 64, 64] to what the backbone takes
    steps: int
    bfloat16: bool  # forward and backward under autocast
    long_tailed: bool = False
    toy: bool = False
    batch_size: int = 32
    device: str = "cpu"

    @cached_property
    def data(self) -> EmojiDomains:
        """All images, at toy size every fortieth emoji."""
        data = load().thinned(40) if self.toy else load()
        return data.to(torch.device(self.device))

    @cached_property
    def train(self) -> Images:
        """What is learned from."""
        images = self.data[self.domain, "train"]
        return long_tail(images, len(self.data.class_names)) if self.long_tailed else images

    @property
    def shifted(self) -> tuple[str, ...]:
        """The styles that are only tested."""
        return tuple(domain for domain in self.data.domains if domain != self.domain)

    @cached_property
    def corrupted(self) -> dict[str, Images]:
        """The in-distribution test images, by corruption and severity, as "jpeg 2".

        Every image is seen under every corruption, at one severity: a third of them at each.
        """
        test = self.data[self.domain, "test"].to(torch.device("cpu"))
        third = torch.arange(len(test)) % len(SEVERITIES)
        return {
            f"{corruption} {severity}": corrupted(
                test.where((third + number) % len(SEVERITIES) == severity - 1), corruption, severity
            ).to(torch.device(self.device))
            for number, corruption in enumerate(CORRUPTIONS)
            for severity in SEVERITIES
        }

    @cached_property
    def pretrained(self) -> Classifier:
        """The pretrained backbone with the linear probe as head: where fine-tuning starts."""
        backbone = self.backbone().to(self.device).eval()
        with torch.no_grad():
            features = {
                split: torch.cat(
                    [backbone(self.to_input(part)) for part in images.pixels.split(64)]
                )
                for split, images in (("train", self.train), ("val", self.data[self.domain, "val"]))
            }
        head, _ = linear_probe(
            (features["train"], self.train.labels),
            (features["val"], self.data[self.domain, "val"].labels),
            len(self.data.class_names),
            WEIGHT_DECAYS[:1] if self.toy else WEIGHT_DECAYS,
        )
        return Classifier(backbone, head)

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of forward and backward."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16)


def long_tail(images: Images, classes: int, ratio: float = 10.0, largest: int = 30) -> Images:
    """A long-tailed part of `images`: class c keeps `largest * ratio ** (-c / (classes - 1))`.

    The order of the classes is random and fixed; a class that has fewer images keeps all.
    """
    generator = torch.Generator().manual_seed(0)
    rank = torch.randperm(classes, generator=generator)
    labels = images.labels.cpu()
    kept = torch.zeros(len(images), dtype=torch.bool)
    for label in range(classes):
        rows = (labels == label).nonzero().flatten()
        size = round(largest * ratio ** (-rank[label].item() / (classes - 1)))
        kept[rows[torch.randperm(len(rows), generator=generator)[: max(1, size)]]] = True
    return images.where(kept.to(images.labels.device))


def shots(task: Task) -> dict[str, Tensor]:
    """Which test images are of classes with many (over 12), medium and few (up to 5) examples."""
    counts = torch.bincount(task.train.labels, minlength=len(task.data.class_names))
    count = counts[task.data[task.domain, "test"].labels]
    return {"many": count > 12, "medium": (count > 5) & (count <= 12), "few": count <= 5}


def imagenet_input(side: int) -> Callable[[Tensor], Tensor]:
    """uint8 [N, 3, 64, 64] to float [N, 3, side, side] with ImageNet's mean and deviation."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def to_input(pixels: Tensor) -> Tensor:
        images = F.interpolate(pixels.float() / 255, size=side, mode="bilinear", antialias=True)
        return (images - mean.to(images.device)) / std.to(images.device)

    return to_input


EFFICIENTNET = Task(
    name="A",
    model="EfficientNet-Lite0 that knows many drawing styles",
    domain=HELD_OUT,
    backbone=pretrained_backbone,
    to_input=normalise,
    steps=152,
    bfloat16=False,
)
VIT = Task(
    name="B",
    model="ViT-S/14, a foundation model",
    domain="noto",
    backbone=lambda: foundation_vit(70),
    to_input=imagenet_input(70),
    steps=152,
    bfloat16=True,
)


def new_vit(model: str, image_size: int) -> nn.Module:
    """A ViT of timm's with weights drawn anew."""
    ensure_torchvision()
    import timm  # importable only now

    backbone: nn.Module = timm.create_model(model, num_classes=0, img_size=image_size)
    return backbone


def own_vit(weights: Path = PRETRAINED) -> Task:
    """Setting C: a ViT that `study.pretrain` has trained, on a GPU where there is one."""
    form = {"model": "vit_small_patch16_224", "image_size": "224"}
    if weights.exists():
        with safe_open(weights, "pt") as file:
            form = file.metadata()

    def backbone() -> nn.Module:
        model = new_vit(form["model"], int(form["image_size"]))
        model.load_state_dict(load_file(weights))
        return model

    return Task(
        name="C",
        model=f"{form['model']} at {form['image_size']} pixels that knows many drawing styles",
        domain=HELD_OUT,
        backbone=backbone,
        to_input=imagenet_input(int(form["image_size"])),
        steps=912,
        bfloat16=True,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


@cache
def task(name: str) -> Task:
    """A task by name: "A", "B" or "C", "A long-tailed", and each of them "toy A"."""
    setting = name.removeprefix("toy ").removesuffix(" long-tailed")
    chosen = own_vit() if setting == "C" else {"A": EFFICIENTNET, "B": VIT}[setting]
    if name.startswith("toy "):
        chosen = replace(chosen, toy=True, steps=3, batch_size=8)
    return replace(chosen, name=name, long_tailed=name.endswith(" long-tailed"))
