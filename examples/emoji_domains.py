"""The emoji-domains data: one object, many drawing styles.

1116 emoji in 35 classes, drawn in six open-licensed styles ("domains"). The split is by emoji and
the same in every domain, so nothing was trained on a test emoji in any style. Accuracy in the style
trained on is in-distribution; in the other styles it is accuracy under shift, on the same emoji.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DATA = Path(__file__).resolve().parent / "data"
DOMAINS = ("fluent_mono", "fluent_flat", "noto", "noto_line", "twemoji", "openmoji")

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Images:
    """Images of one domain and split."""

    pixels: Tensor  # uint8 [N, 3, 64, 64]
    labels: Tensor  # int64 [N]
    emoji: Tensor  # int64 [N], which emoji is drawn: the same number in every domain

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, rows: Tensor) -> "Images":
        """Those rows that a bool [N] selects."""
        return Images(self.pixels[rows], self.labels[rows], self.emoji[rows])

    def to(self, device: torch.device) -> "Images":
        """A copy on `device`."""
        return Images(self.pixels.to(device), self.labels.to(device), self.emoji.to(device))


@dataclass(frozen=True)
class EmojiDomains:
    """All images, by domain and split."""

    images: dict[tuple[str, str], Images]
    class_names: tuple[str, ...]

    def __getitem__(self, key: tuple[str, Split]) -> Images:
        return self.images[key]

    def to(self, device: torch.device) -> "EmojiDomains":
        """A copy on `device`."""
        moved = {key: images.to(device) for key, images in self.images.items()}
        return EmojiDomains(moved, self.class_names)

    def thinned(self, keep_every: int) -> "EmojiDomains":
        """Every `keep_every`-th emoji, the same in all domains: for smoke tests."""
        return EmojiDomains(
            {
                key: images.where(images.emoji % keep_every == 0)
                for key, images in self.images.items()
            },
            self.class_names,
        )

    @property
    def domains(self) -> tuple[str, ...]:
        """The styles that are there, always in this order."""
        return tuple(name for name in DOMAINS if (name, "test") in self.images)


def load(folder: Path = DATA) -> EmojiDomains:
    """Reads `main.npz`, and `openmoji.npz` if it is there: share-alike, so some leave it out."""
    images: dict[tuple[str, str], Images] = {}
    class_names: tuple[str, ...] = ()
    for path in (folder / "main.npz", folder / "openmoji.npz"):
        if path.name == "openmoji.npz" and not path.exists():
            continue
        with np.load(path, allow_pickle=False) as npz:
            arrays = dict(npz)
        class_names = tuple(map(str, arrays["class_names"]))
        pixels = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)  # channels_last in memory
        labels = torch.from_numpy(arrays["label"]).long()
        emoji = torch.from_numpy(arrays["emoji"]).long()
        for d, domain in enumerate(arrays["domain_names"]):
            for s, split in enumerate(arrays["split_names"]):
                rows = torch.from_numpy((arrays["domain"] == d) & (arrays["split"] == s))
                images[str(domain), str(split)] = Images(pixels[rows], labels[rows], emoji[rows])
    return EmojiDomains(images, class_names)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [N, 3, 64, 64] to the float input that the pretrained model expects, white being 1."""
    return ((pixels.float() - 127) / 128).contiguous(memory_format=torch.channels_last)


def augment(
    images: Tensor,
    generator: torch.Generator,
    *,
    degrees: float = 12.0,
    scale: float = 0.15,
    shift: float = 0.08,
) -> Tensor:
    """A random flip, rotation, zoom and shift of each normalised image, on the images' own device.

    The random numbers come from a CPU generator, so that a seed means the same on every device.
    """
    n = len(images)
    uniform = torch.rand(5, n, generator=generator) * 2 - 1
    angle = uniform[0] * (degrees * torch.pi / 180)
    zoom = torch.exp(uniform[1] * scale)
    flip = torch.where(uniform[2] < 0, -1.0, 1.0)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack(
        [
            torch.stack([cos * flip, -sin, uniform[3] * shift], dim=1),
            torch.stack([sin * flip, cos, uniform[4] * shift], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    # Sampling pads with zeros while the background is white, 1: so sample the ink, image - 1.
    return F.grid_sample(images - 1, grid, align_corners=False) + 1
