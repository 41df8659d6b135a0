"""Lets timm be imported where torchvision's compiled operators do not match the installed torch.

timm needs a few of torchvision's Python definitions only, yet importing torchvision fails with
"operator torchvision::nms does not exist" when its binary was built for another torch: a CUDA build
beside a CPU torch, say. With a matching build nothing here has any effect.
"""

import importlib
import sys

import torch

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[
    torch.library.Library
] = []  # the schemas vanish with the Library that defined them


def ensure_torchvision() -> None:
    """Imports torchvision, declaring the operators that a mismatched build lacks if it must."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _libraries.append(library)
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half-imported
        importlib.import_module("torchvision")
