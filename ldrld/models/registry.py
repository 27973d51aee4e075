"""Registry of networks by name. A new network is a file in `ldrld/models` that calls `register`."""
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TypeVar

from torch import nn

__all__ = ["import_all", "networks", "optional", "rates", "register"]

Maker = TypeVar("Maker", bound=Callable[..., nn.Module])

networks: dict[str, Callable[..., nn.Module]] = {}  # name -> function of `num_classes`
optional: dict[str, Callable[..., nn.Module]] = {}  # the same for networks that need a package and lack features
rates: dict[str, float] = {}  # name -> base learning rate, for networks that need another than 0.05


def called(network: Callable) -> str:
    """The name of a class or function, or of the function of a partial; notebooks define them again."""
    return getattr(network, "func", network).__qualname__


def register(
    name: str,  # under which `build` finds the network
    lr: float | None = None,  # base learning rate of the common CIFAR recipe at batch size 64; None: the usual 0.05
    needs: str = "",  # package without which it cannot be built; such a network is not listed by `available()`
) -> Callable[[Maker], Maker]:
    """Decorator that registers a network, a class or a function of `num_classes`, as `name`.

    ValueError if the name is taken by another network.
    """
    def add(network: Maker) -> Maker:
        taken = networks.get(name) or optional.get(name)
        if taken is not None and called(taken) != called(network):
            raise ValueError(f"name {name!r} is taken by {called(taken)}; choose another for {called(network)}")
        (optional if needs else networks)[name] = network
        if lr is not None: rates[name] = lr
        return network
    return add


def import_all(
    leave: tuple[str, ...] = (),  # names of modules that are left out
) -> None:
    """Import the modules of this folder, each of which registers its networks."""
    for module in iter_modules([str(Path(__file__).parent)]):
        if module.name not in leave: import_module(f"{__package__}.{module.name}")
