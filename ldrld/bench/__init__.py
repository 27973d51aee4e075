"""Benchmarks of the loss, training and every method; each module registers its own."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any


def registered() -> dict[str, Any]:
    """All benchmarks by name, in the order of their modules.

    Returns: dict of name -> `ldrld.bench.measurements.Benchmark`.
    """
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return import_module(f"{__name__}.measurements").BENCHMARKS
