"""Pretrains a ViT of timm's to recognise single emoji in five drawing styles, for setting C.

As the EfficientNet of setting A was: all styles but `fluent_mono`, no test emoji, a cosine
classifier. At a larger resolution and size than a CPU takes; meant for a GPU:

    PYTHONPATH=examples python -m study.pretrain
    PYTHONPATH=examples python -m study --tasks C --results results/robustness_gpu.jsonl --workers 1
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_domains import DOMAINS, augment, load
from results import write_atomically
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from study.tasks import HELD_OUT, PRETRAINED, imagenet_input, new_vit


class CosineClassifier(nn.Module):
    """Logits are cosines of features and class vectors, times a scale."""

    def __init__(self, backbone: nn.Module, features: int, classes: int, scale: float = 20) -> None:
        super().__init__()
        self.backbone, self.scale = backbone, scale
        self.classes = nn.Parameter(torch.randn(classes, features))

    def forward(self, images: Tensor) -> Tensor:
        """float [N, classes]."""
        features = F.normalize(self.backbone(images), dim=1)
        return self.scale * features @ F.normalize(self.classes, dim=1).T


def pretrain(
    *, model: str, image_size: int, epochs: int, batch_size: int, device: torch.device, toy: bool
) -> nn.Module:
    """The backbone, trained with AdamW, label smoothing and flips, turns, zooms and shifts."""
    torch.manual_seed(0)
    data = load().thinned(20) if toy else load()
    parts = [
        data[domain, split]
        for domain in DOMAINS
        if domain != HELD_OUT and domain in data.domains
        for split in ("train", "val")
    ]
    pixels = torch.cat([part.pixels for part in parts])
    names, labels = torch.cat([part.emoji for part in parts]).unique(return_inverse=True)
    backbone = new_vit(model, image_size).to(device)
    classifier = CosineClassifier(backbone, backbone.num_features, len(names)).to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=0.05)
    batches = max(1, len(pixels) // batch_size)
    schedule = OneCycleLR(optimizer, max_lr=1e-3, total_steps=epochs * batches, pct_start=0.1)
    to_input, generator = imagenet_input(image_size), torch.Generator().manual_seed(0)
    with tqdm(total=epochs * batches, unit="step", desc="pretraining", disable=None) as progress:
        for _ in range(epochs):
            order = torch.randperm(len(pixels), generator=generator)
            for rows in order.split(batch_size)[:batches]:
                white = pixels[rows].to(device).float() / 127.5 - 1
                inputs = to_input((augment(white, generator) + 1) * 127.5)
                with torch.autocast(device.type, torch.bfloat16):
                    logits = classifier(inputs)
                loss = F.cross_entropy(
                    logits.float(), labels[rows].to(device), label_smoothing=0.05
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
                progress.update()
    return backbone


def main() -> None:
    """Writes the weights that setting C begins with."""
    parser = argparse.ArgumentParser(
        description="Pretrains the ViT of setting C.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="vit_small_patch16_224", help="a ViT of timm's")
    add("--image-size", type=int, default=224, help="side in pixels")
    add("--epochs", type=int, default=300)
    add("--batch-size", type=int, default=256)
    add("--output", type=Path, default=PRETRAINED, help="where to write the weights")
    add("--toy", action="store_true", help="a tiny ViT for a few steps")
    given = parser.parse_args()
    if given.toy:
        given.model, given.image_size, given.epochs, given.batch_size = (
            "vit_tiny_patch16_224",
            32,
            1,
            32,
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = pretrain(
        model=given.model,
        image_size=given.image_size,
        epochs=given.epochs,
        batch_size=given.batch_size,
        device=device,
        toy=given.toy,
    )
    given.output.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.cpu().contiguous() for name, value in backbone.state_dict().items()}
    form = {"model": given.model, "image_size": str(given.image_size)}
    write_atomically(given.output, lambda file: file.write(save(weights, form)))
    print(f"Saved {given.output}")


if __name__ == "__main__":
    main()
