"""Registry of losses by name. To add one, decorate its class with `@register("name")`.

A loss from another package needs no line here: use `build("my_package.module:MyLoss")`, or a name that an installed
package declares in the entry-point group `ldrld.losses`.
"""
import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from ldrld.core.validation import unknown_name
from ldrld.losses.base import LossBase

__all__ = [
    "IMAGENET_PAIRS", "register", "available", "build", "loss_class", "needs_teacher", "origin", "published_settings",
]

GROUP = "ldrld.losses"  # of entry points

# teacher and student of the ImageNet tables, for `pair_settings`
IMAGENET_PAIRS = (("ResNet34-ImageNet", "ResNet18-ImageNet"), ("ResNet50-ImageNet", "MobileNetV1"))

Loss = TypeVar("Loss", bound=LossBase)

_losses: dict[str, type[LossBase]] = {}


def register(
    name: str,  # under which `build` finds the class
) -> Callable[[type[Loss]], type[Loss]]:
    """Class decorator that registers a loss as `name`. ValueError if another class has that name."""
    def add(loss: type[Loss]) -> type[Loss]:
        known = _losses.get(name)
        if known is not None and known.__qualname__ != loss.__qualname__:
            raise ValueError(f"name {name!r} is taken by {known.__qualname__}; choose another for {loss.__qualname__}")
        _losses[name] = loss
        return loss
    return add


def available(
    kind: str | None = None,  # "logits" | "features" | "images" | "teachers"; None: all
) -> list[str]:
    """Names of all registered losses, in alphabetical order, or of those of a kind.

    "logits": they need only logits and labels; "features": they need intermediate features of the networks; "images":
    they generate their own training images; "teachers": they tune a teacher. ValueError for an unknown kind.
    """
    kinds = {"teachers": "trains_teacher", "features": "needs_features", "images": "alters_images"}
    if kind not in (None, "logits", *kinds):
        raise ValueError(f"kind must be 'logits', 'features', 'images' or 'teachers', got {kind!r}")
    of = lambda loss: next((k for k, attribute in kinds.items() if getattr(loss, attribute, False)), "logits")
    return sorted(name for name, loss in _losses.items() if kind in (None, of(loss)))


def _imported(path: str) -> Any:
    """What is at `package.module:Class`; ValueError if it cannot be imported."""
    module, _, attribute = path.partition(":")
    try: return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"loss {path!r} cannot be imported ({error}); expected package.module:Class, installed or on "
                         "PYTHONPATH") from error


def loss_class(
    name: str,  # registered, or of an entry point in the group `ldrld.losses`, or `package.module:Class`
) -> type[LossBase]:
    """The class of the loss called `name`.

    ValueError for an unknown name, a class that cannot be imported, or one that is no loss of this kind.
    """
    if name in _losses: return _losses[name]
    if ":" in name: found = _imported(name)
    else:
        point = next(iter(entry_points(group=GROUP, name=name)), None)
        if point is None: raise unknown_name("loss", name, _losses)
        found = _imported(point.value)
    if not (inspect.isclass(found) and issubclass(found, LossBase)):
        raise ValueError(f"loss {name!r} is {found!r}; expected a subclass of ldrld.losses.base.LogitLoss or LossBase")
    return found


def origin(
    name: str,  # of a loss, see `loss_class`
) -> dict[str, str]:
    """Where a loss from outside comes from: its class, and the SHA-256 of the file that holds it; empty for ours."""
    found = loss_class(name)
    if found.__module__.partition(".")[0] == "ldrld": return {}
    source = inspect.getsourcefile(found)
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""
    return {"class": f"{found.__module__}:{found.__qualname__}", "sha256": digest}


@cache
def _arguments(loss: Callable[..., LossBase]) -> tuple[str, ...]:
    """Names of a loss's hyper-parameters; cached, because a batch of runs needs them thousands of times."""
    return tuple(inspect.signature(loss).parameters)


def build(
    name: str,  # of a loss, see `loss_class`
    **hyperparameters: Any,  # arguments of the class, by name
) -> LossBase:
    """Build the loss called `name`; hyper-parameters that are not given have their defaults.

    ValueError for an unknown name or hyper-parameter, with suggestions, or for a value out of range.
    """
    made: Callable[..., LossBase] = loss_class(name)
    known = _arguments(made)
    for argument in hyperparameters:
        if argument not in known: raise unknown_name(f"hyper-parameter of {name!r}", argument, known)
    return made(**hyperparameters)


def needs_teacher(
    name: str,  # of a loss, see `loss_class`
) -> bool:
    """Whether the loss called `name` needs a teacher. ValueError for an unknown name."""
    return loss_class(name).needs_teacher


def published_settings(
    name: str,  # of a loss, see `loss_class`
    teacher: str,  # name in `ldrld.models.available()`
    student: str,  # name in `ldrld.models.available()`
    loss: str | None = None,  # for a wrapper, the wrapped loss that was published with it; None: the wrapper's default
) -> dict[str, Any]:  # by name
    """Published hyper-parameters of a loss for a pair of networks; empty if none were found.

    ValueError for an unknown loss.
    """
    found = loss_class(name)
    by_loss = getattr(found, "wrapped_pair_settings", None)
    if by_loss is None or loss is None: table = getattr(found, "pair_settings", {})
    else: table = by_loss.get(loss, {})
    return dict(table.get((teacher, student), {}))
