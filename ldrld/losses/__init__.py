"""Every loss by name: `build("ldrld", depth=5)`; `available()` lists them. Importing a module of losses registers them."""
from ldrld.losses.registry import available, build, needs_teacher, published_settings, register
from ldrld.losses import features, hints, logits, memory, reuse, teacherless  # noqa: F401

__all__ = ["available", "build", "needs_teacher", "published_settings", "register"]
