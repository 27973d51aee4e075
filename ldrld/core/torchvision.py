"""Imports torchvision, even if its compiled extension does not match torch.

The torchvision wheel on PyPI is built for CUDA. With a CPU build of torch, its extension cannot be loaded, and
`import torchvision` then fails where it registers a fake kernel for an undeclared operator (`torchvision::nms`).
Declaring the schemas of two operators first is enough for everything this project uses (data sets, transforms,
models). If the plain import works, this module does nothing else.
"""
import sys
from typing import Any

import torch

__all__ = ["torchvision"]

_schemas: torch.library.Library | None = None  # must stay alive: the declarations are removed with the object


def _import() -> Any:
    global _schemas
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error): raise
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]: del sys.modules[name]
        _schemas = declared = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            declared.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


torchvision = _import()
