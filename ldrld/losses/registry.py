"""Losses by name. A new one is a class and one line: `@register("name")`."""
import inspect

from torch import nn

from ldrld.core.validation import unknown_name

__all__ = ["register", "available", "build", "needs_teacher", "published_settings"]

_losses: dict[str, type[nn.Module]] = {}


def register(name: str):
    """Class decorator that makes a loss known as `name`. ValueError if another class has that name."""
    def add(loss: type[nn.Module]) -> type[nn.Module]:
        known = _losses.get(name)
        if known is not None and known.__qualname__ != loss.__qualname__:
            raise ValueError(f"name {name!r} is taken by {known.__qualname__}; choose another for {loss.__qualname__}")
        _losses[name] = loss
        return loss
    return add


def available(kind: str | None = None) -> list[str]:
    """Names that `build` knows, in alphabetical order.

    kind: "logits" for losses that a loop can call with logits and labels alone, "features" for those that look inside the
    networks, "pictures" for those that train on pictures of their own making, "teachers" for those that tune a teacher;
    None for all.
    """
    kinds = {"teachers": "trains_teacher", "features": "needs_features", "pictures": "alters_pictures"}
    if kind not in (None, "logits", *kinds):
        raise ValueError(f"kind must be 'logits', 'features', 'pictures' or 'teachers', got {kind!r}")
    of = lambda loss: next((k for k, attribute in kinds.items() if getattr(loss, attribute, False)), "logits")
    return sorted(name for name, loss in _losses.items() if kind in (None, of(loss)))


def build(name: str, **hyperparameters) -> nn.Module:
    """The loss called `name`; what is not given has its default.

    ValueError for an unknown name or hyper-parameter, with near matches, or for a value out of its range.
    """
    if name not in _losses: raise unknown_name("loss", name, _losses)
    known = inspect.signature(_losses[name]).parameters
    for argument in hyperparameters:
        if argument not in known: raise unknown_name(f"hyper-parameter of {name!r}", argument, known)
    return _losses[name](**hyperparameters)


def needs_teacher(name: str) -> bool:
    """Whether the loss called `name` asks what a teacher says. ValueError for an unknown name."""
    if name not in _losses: raise unknown_name("loss", name, _losses)
    return _losses[name].needs_teacher


def published_settings(name: str, teacher: str, student: str, loss: str | None = None) -> dict:
    """Hyper-parameters that were published for the loss `name` on a pair of CIFAR-100 networks; empty where none were found.

    teacher, student: names in `ldrld.models.available()`. loss: for a wrapper, the name of the loss that it wraps, with
    which its settings were published; None for the wrapper's own default. ValueError for an unknown loss.
    """
    if name not in _losses: raise unknown_name("loss", name, _losses)
    by_loss = getattr(_losses[name], "wrapped_pair_settings", None)
    table = getattr(_losses[name], "pair_settings", {}) if by_loss is None or loss is None else by_loss.get(loss, {})
    return dict(table.get((teacher, student), {}))
