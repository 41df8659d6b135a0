"""Corruptions of the test images, eight kinds at three severities, in the manner of CIFAR-100-C.

Source: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations (arXiv 1903.12261). The strengths are chosen for 64 x 64 drawings on white.
"""

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from emoji_domains import Images
from PIL import Image
from torch import Tensor

SEVERITIES = (1, 2, 3)


def gaussian_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Additive, of standard deviation 0.12, 0.24, 0.36."""
    return images + 0.12 * severity * torch.randn(images.shape, generator=generator)


def impulse_noise(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A share of 0.05, 0.1, 0.15 of all values becomes black or white."""
    uniform = torch.rand(images.shape, generator=generator)
    share = 0.05 * severity
    return images.masked_fill(uniform < share / 2, 0).masked_fill(uniform > 1 - share / 2, 1)


def defocus_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A disk of radius 1.5, 2.5, 3.5 pixels."""
    radius = 0.5 + severity
    reach = torch.arange(-4.0, 5.0)
    disk = (reach[:, None] ** 2 + reach**2 <= radius**2).float()
    return _filtered(images, disk)


def motion_blur(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Along a line of 5, 9, 13 pixels: half of the images along each diagonal."""
    line = torch.eye(1 + 4 * severity)
    halves = images[::2], images[1::2]
    blurred = torch.empty_like(images)
    blurred[::2], blurred[1::2] = _filtered(halves[0], line), _filtered(halves[1], line.flip(0))
    return blurred


def contrast(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Toward each image's mean: a share of 0.4, 0.25, 0.1 of the contrast is left."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (0.4, 0.25, 0.1)[severity - 1] * (images - mean)


def darkening(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The white background, too: by 0.25, 0.45, 0.65."""
    return images - (0.25, 0.45, 0.65)[severity - 1]


def pixelation(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Down to 32, 24, 16 pixels a side and up again."""
    small = F.interpolate(images, size=(32, 24, 16)[severity - 1], mode="area")
    return F.interpolate(small, size=images.shape[-1], mode="nearest")


def jpeg(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Of quality 25, 12, 6."""
    quality = (25, 12, 6)[severity - 1]
    decoded = []
    for pixels in _as_uint8(images).permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 255


Corruption = Callable[[Tensor, int, torch.Generator], Tensor]
CORRUPTIONS: dict[str, Corruption] = {
    corruption.__name__: corruption
    for corruption in (
        gaussian_noise,
        impulse_noise,
        defocus_blur,
        motion_blur,
        contrast,
        darkening,
        pixelation,
        jpeg,
    )
}


def corrupted(images: Images, corruption: str, severity: int) -> Images:
    """Those images, corrupted, the same in every call.

    Args:
        images: pixels uint8 [N, 3, H, W].
        corruption: a key of `CORRUPTIONS`.
        severity: 1, 2 or 3.
    """
    number = list(CORRUPTIONS).index(corruption)
    generator = torch.Generator().manual_seed(10 * number + severity)
    pixels = CORRUPTIONS[corruption](images.pixels.float() / 255, severity, generator)
    return Images(_as_uint8(pixels), images.labels, images.emoji)


def _filtered(images: Tensor, kernel: Tensor) -> Tensor:
    kernel = (kernel / kernel.sum()).expand(3, 1, *kernel.shape)
    margin = kernel.shape[-1] // 2
    padded = F.pad(images, [margin] * 4, mode="replicate")
    return F.conv2d(padded, kernel, groups=3)


def _as_uint8(images: Tensor) -> Tensor:
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.contiguous(memory_format=torch.channels_last)
