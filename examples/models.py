"""The pretrained model and the classifier that is fine-tuned from it."""

import copy
from pathlib import Path

import torch
from emoji_domains import DATA, Images, normalise
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision_compat import ensure_torchvision

WEIGHTS = DATA / "foundation.safetensors"


def pretrained_backbone(weights: Path = WEIGHTS) -> nn.Module:
    """EfficientNet-Lite0 with 1280 features, pretrained on all drawing styles but `fluent_mono`."""
    ensure_torchvision()
    import timm  # importable only now

    backbone: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    backbone.load_state_dict(load_file(weights))  # fp16 in the file, fp32 in the model
    return backbone.to(memory_format=torch.channels_last)  # twice as fast as the default on a CPU


class Classifier(nn.Module):
    """Copies of a backbone and a head on top; parameters are named `backbone.*` and `head.*`.

    BatchNorm is frozen, statistics (the model is trained in evaluation mode) and weights: a few
    hundred images of one style would only spoil it.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.head = copy.deepcopy(head)
        self.eval()
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)

    def trainable(self, part: str) -> list[tuple[str, nn.Parameter]]:
        """Named parameters of `part`, "backbone" or "head", less the frozen ones."""
        named = self.get_submodule(part).named_parameters(prefix=part)
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


def predict(model: nn.Module, images: Images, batch_size: int = 256) -> Tensor:
    """The model's output for every image, unaugmented."""
    with torch.no_grad():
        return torch.cat([model(normalise(pixels)) for pixels in images.pixels.split(batch_size)])
