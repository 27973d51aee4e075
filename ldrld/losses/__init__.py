"""Every loss by name: `build("ldrld", depth=5)`; `available()` lists them.

Every module in this package is imported, which registers its losses; a new module needs no entry here.
"""
from importlib import import_module
from pkgutil import walk_packages

from ldrld.losses.registry import available, build, needs_teacher, origin, published_settings, register

__all__ = ["available", "build", "needs_teacher", "origin", "published_settings", "register"]

for _module in walk_packages(__path__, f"{__name__}."):
    if not _module.name.endswith(".triton_kernel"): import_module(_module.name)  # the kernel is only needed on a GPU
