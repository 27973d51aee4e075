"""Local Dense Logit Relations for knowledge distillation. Importing this needs torch and nothing else."""
__version__ = "0.1.0"

from importlib import import_module

from ldrld import losses
from ldrld.losses.ldrld.loss import LDRLD
from ldrld.losses.ldrld.weights import adw_weights

__all__ = ["LDRLD", "adw_weights", "losses", "models", "data", "RunConfig", "Record", "run"]

# Found on first use, so that the loss alone needs torch alone.
_LATER = {"models": "ldrld.models", "data": "ldrld.data", "RunConfig": "ldrld.experiments.runs", "Record": "ldrld.experiments.runs", "run": "ldrld.experiments.runs"}


def __getattr__(name: str):
    if name not in _LATER: raise AttributeError(f"module 'ldrld' has no attribute {name!r}")
    try: module = import_module(_LATER[name])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ldrld"): raise
        raise ModuleNotFoundError(f"ldrld.{name} needs {error.name}, which is not installed; "
                                  'pip install "ldrld[run]" brings everything that training and reports use', name=error.name) from error
    return module if module.__name__ == f"ldrld.{name}" else getattr(module, name)
