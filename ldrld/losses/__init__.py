"""Every loss by name: `build("ldrld", depth=5)`; `available()` lists them. Importing a module of losses registers them."""
from ldrld.losses.registry import available, build, register
from ldrld.losses import features, logits  # noqa: F401
from ldrld.losses import distributions  # noqa: F401
from ldrld.losses import targets  # noqa: F401
from ldrld.losses import wrappers  # noqa: F401

__all__ = ["available", "build", "register"]
