"""Every loss by name: `build("ldrld", depth=5)`; `available()` lists them. Importing a module of losses registers them."""
from ldrld.losses.registry import available, build, needs_teacher, published_settings, register
from ldrld.losses import distributions, features, hints, logits, memory, reuse, targets, teacherless, wrappers  # noqa: F401

__all__ = ["available", "build", "needs_teacher", "published_settings", "register"]
