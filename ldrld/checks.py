"""Checks of arguments, shared by all losses: shapes and types only, so a training step never waits for the device."""
from difflib import get_close_matches
from math import isfinite
from numbers import Integral, Real

import torch

__all__ = ["number", "integer", "flag", "choice", "unknown_name", "student", "student_and_teacher", "labels"]


def number(name: str, value, above: float | None = None, at_least: float | None = None) -> float:
    """`value` as a float; ValueError unless it is a finite real number within the bound."""
    bound = f" above {above:g}" if above is not None else f" of at least {at_least:g}" if at_least is not None else ""
    ok = isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
    if not ok or (above is not None and value <= above) or (at_least is not None and value < at_least):
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return float(value)


def integer(name: str, value, at_least: int) -> int:
    """`value` as an int; ValueError unless it is a whole number of at least `at_least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")
    return int(value)


def flag(name: str, value) -> bool:
    """`value`; ValueError unless it is True or False."""
    if value is not True and value is not False: raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def choice(name: str, value, options) -> str:
    """`value`; ValueError unless it is one of `options`."""
    if value not in tuple(options):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def unknown_name(what: str, name: str, known) -> ValueError:
    """The error for a name that nobody registered, with near matches first."""
    near = get_close_matches(str(name).lower(), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return ValueError(f"unknown {what} {name!r}.{hint} Known: {', '.join(sorted(known))}")


def _matrix(name: str, x) -> None:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        found = f"a tensor of {x.dtype}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"{name} must be a floating-point tensor of raw logits, got {found}")
    if x.ndim == 2 and not len(x): raise ValueError(f"{name} has no rows, shape {tuple(x.shape)}; skip such a batch")
    if x.ndim != 2 or x.shape[0] < 1 or x.shape[1] < 2:
        raise ValueError(f"{name} must have shape (batch, classes) with at least one row and two classes, "
                         f"got {tuple(x.shape)}; reshape token or pixel logits to (-1, classes)")


def student(student_logits) -> None:
    """ValueError unless these are floating (batch, classes) logits."""
    _matrix("student_logits", student_logits)


def student_and_teacher(student_logits, teacher_logits) -> None:
    """ValueError unless both are floating (batch, classes) logits of one shape on one device."""
    _matrix("student_logits", student_logits)
    _matrix("teacher_logits", teacher_logits)
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(f"teacher_logits must have the shape of student_logits, {tuple(student_logits.shape)}, "
                         f"got {tuple(teacher_logits.shape)}")
    if teacher_logits.device != student_logits.device:
        raise ValueError(f"teacher_logits must be on the device of student_logits, {student_logits.device}, "
                         f"got {teacher_logits.device}")


def labels(target, student_logits) -> None:
    """ValueError unless `target` holds one int64 class per row. Its range is checked on the CPU only: a GPU would wait."""
    batch, classes = student_logits.shape
    if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
        found = f"a tensor of {target.dtype}" if isinstance(target, torch.Tensor) else f"a {type(target).__name__}"
        raise ValueError(f"target must be an int64 tensor of class indices, got {found}; convert with .long()")
    if target.shape != (batch,):
        raise ValueError(f"target must have shape ({batch},), one class per row of student_logits, "
                         f"got {tuple(target.shape)}")
    if target.device != student_logits.device:
        raise ValueError(f"target must be on the device of student_logits, {student_logits.device}, "
                         f"got {target.device}")
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(v) for v in target.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"target must hold classes from 0 to {classes - 1}, got values from {low} to {high}")
