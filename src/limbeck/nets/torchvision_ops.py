"""Make ``import torchvision`` (and so ``import timm``) work where its compiled ops cannot be loaded.

PyPI's torchvision wheel is built against CUDA torch. Beside a CPU-only torch its library does not load, and
the import stops at ``operator torchvision::nms does not exist``, because torchvision registers shape
functions for two operators that nobody has declared. Their schemas are all that is missing: timm never calls
the operators themselves.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[Any] = []  # a library's schemas live as long as the object


def declared() -> bool:
    """Whether schemas had to be declared: torchvision was built for another torch."""
    declare_missing_ops()
    return bool(_declared)


def declare_missing_ops() -> bool:
    """Declare the schemas of ``nms`` and ``qnms`` if torchvision cannot be imported without them.

    Returns:
        True if they had to be declared. Where torchvision loads, nothing is touched.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        return False
    new_library: Any = torch.library.Library
    library = new_library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    importlib.import_module("torchvision")
    return True
