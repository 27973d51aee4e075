"""Local Dense Logit Relations for knowledge distillation. The losses require only torch."""
__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldrld import data, losses, models
    from ldrld.experiments.records import Record
    from ldrld.experiments.config import RunConfig
    from ldrld.experiments.runner import run
    from ldrld.losses.ldrld.loss import LDRLD
    from ldrld.losses.ldrld.weights import adw_weights

__all__ = ["LDRLD", "adw_weights", "losses", "models", "data", "RunConfig", "Record", "run"]

# Imported on first use: the losses require only torch, and `ldrld --help` not even that.
_HOMES = {
    "LDRLD": "ldrld.losses.ldrld.loss",
    "adw_weights": "ldrld.losses.ldrld.weights",
    "losses": "ldrld.losses",
    "models": "ldrld.models",
    "data": "ldrld.data",
    "RunConfig": "ldrld.experiments.config",
    "Record": "ldrld.experiments.records",
    "run": "ldrld.experiments.runner",
    "paths": "ldrld.core.paths",  # as the committed model cards import it
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES: raise AttributeError(f"module 'ldrld' has no attribute {name!r}")
    try: module = import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ldrld"): raise
        raise ModuleNotFoundError(f"ldrld.{name} needs {error.name}, which is not installed; "
                                  'pip install "ldrld[run]" installs everything for training and reports',
                                  name=error.name) from error
    return module if module.__name__.endswith(f".{name}") and not hasattr(module, name) else getattr(module, name)


def __dir__() -> list[str]: return sorted([*globals(), *__all__])
