"""Imports torchvision, also where its compiled extension does not match torch.

The registry's torchvision wheel is built for CUDA. Beside a CPU build of torch its extension cannot load, and
`import torchvision` then stops at one line, which registers a fake kernel for an operator (`torchvision::nms`) that
nobody declared. Declaring the two operators' schemas first is enough for all that this project uses (data sets,
transforms, models). Where the plain import works, this module does nothing else.
"""
import sys

import torch

__all__ = ["torchvision"]

_schemas = None  # must stay alive: the declarations end with the object


def _import():
    global _schemas
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error): raise
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]: del sys.modules[name]
        _schemas = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            _schemas.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


torchvision = _import()
