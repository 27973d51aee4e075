"""Every loss by name: `build("ldrld", depth=5)`; `available()` lists them.

Every module in the folders beside this file is imported, which registers its losses: a new one needs no line here.
"""
from importlib import import_module
from pkgutil import walk_packages

from ldrld.losses.registry import available, build, needs_teacher, published_settings, register

__all__ = ["available", "build", "needs_teacher", "published_settings", "register"]

for _module in walk_packages(__path__, f"{__name__}."):
    if not _module.name.endswith(".triton_kernel"): import_module(_module.name)   # which the GPU alone needs
