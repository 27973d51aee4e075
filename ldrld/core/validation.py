"""Argument checks shared by all losses: shapes and types only, so a training step never synchronizes with the GPU."""
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from math import isfinite
from numbers import Integral, Real
from typing import Any

import torch

__all__ = ["number", "integer", "flag", "choice", "known", "unknown_name", "depth_fits", "enough_remain", "logits",
           "transformed", "may_look", "labels", "mask", "normalizer", "values_unseen"]

_unseen = False  # True within `values_unseen`


def number(
    name: str,  # of the argument, for the message
    value: Any,  # what was given
    above: float | None = None,  # exclusive lower bound; None: no such bound
    at_least: float | None = None,  # inclusive lower bound; None: no such bound
) -> float:
    """`value` as a float; ValueError unless it is a finite real number within the bound."""
    bound = ""
    if above is not None: bound = f" above {above:g}"
    elif at_least is not None: bound = f" of at least {at_least:g}"
    ok = isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
    if not ok or (above is not None and value <= above) or (at_least is not None and value < at_least):
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return float(value)


def integer(
    name: str,  # of the argument, for the message
    value: Any,  # what was given
    at_least: int,  # inclusive lower bound
) -> int:
    """`value` as an int; ValueError unless it is a whole number of at least `at_least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")
    return int(value)


def flag(
    name: str,  # of the argument, for the message
    value: Any,  # what was given
) -> bool:
    """`value`; ValueError unless it is True or False."""
    if value is not True and value is not False: raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def choice(
    name: str,  # of the argument, for the message
    value: Any,  # what was given
    options: Iterable[str],  # the values that are allowed
) -> str:
    """`value`; ValueError unless it is one of `options`."""
    if value not in tuple(options):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def known(
    what: str,  # what is named, such as "profile", for the message
    name: str,  # what was given
    names: Collection[str],  # all that are known
) -> str:
    """`name`, if it is one of `names`; else a ValueError with suggestions."""
    if name in names: return name
    raise unknown_name(what, name, names)


def unknown_name(
    what: str,  # what is named, such as "profile", for the message
    name: str,  # what was given
    known: Collection[str],  # all names that are known
) -> ValueError:
    """The error for an unknown name, with suggestions."""
    near = get_close_matches(str(name).lower(), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return ValueError(f"unknown {what} {name!r}.{hint} Known: {', '.join(sorted(known))}")


def depth_fits(depth: int, classes: int) -> int:
    """`depth` as an int; ValueError unless it is a whole number from 2 to `classes`."""
    if integer("depth", depth, at_least=2) > classes:
        raise ValueError(f"depth must be at most the number of classes, {classes}, got {depth}")
    return int(depth)


@cache
def _few_remain(depth: int, classes: int) -> None:
    warnings.warn(f"depth={depth} leaves only {classes - depth} of {classes} classes to the remaining term (beta): "
                  f"with so few classes set depth={classes}; at ten classes that did better than depth=7 "
                  "(see nbs/paper/open_questions/depth_classes)", stacklevel=5)


def enough_remain(depth: int, classes: int) -> None:
    """Warn once if two or more classes remain, but fewer than are selected: the remaining term is then too strong."""
    if 2 <= classes - depth < depth and not transformed(): _few_remain(depth, classes)


def _kind(x: Any) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"


def _logits(name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor of raw logits, got {_kind(x)}")
    if x.ndim >= 2 and x.shape[-1] >= 2 and not x.numel():
        raise ValueError(f"{name} has no rows, shape {tuple(x.shape)}; skip such a batch")
    if x.ndim < 2 or x.shape[-1] < 2:
        raise ValueError(f"{name} must have shape (batch, classes) or (batch, sequence, vocabulary) with at least two "
                         f"classes, got {tuple(x.shape)}")


def logits(
    student_logits: Any,  # expected: floating (…, classes), at least two classes and one row
    teacher_logits: Any,  # expected: the same shape and device
    needs_teacher: bool = True,  # whether None is an error for the teacher's
) -> None:
    """ValueError unless these are floating (…, classes) logits with the same shape and device."""
    _logits("student_logits", student_logits)
    if not needs_teacher and teacher_logits is None: return
    _logits("teacher_logits", teacher_logits)
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(f"teacher_logits must have the shape of student_logits, {tuple(student_logits.shape)}, "
                         f"got {tuple(teacher_logits.shape)}")
    _same_device("teacher_logits", teacher_logits, student_logits)


def _same_device(name: str, x: torch.Tensor, student_logits: torch.Tensor) -> None:
    if x.device != student_logits.device:
        raise ValueError(f"{name} must be on the device of student_logits, {student_logits.device}, got {x.device}")


def _one_per_row(name: str, x: Any, student_logits: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype != dtype: raise ValueError(f"{name} must be {what}, got {_kind(x)}")
    if x.shape != student_logits.shape[:-1]:
        raise ValueError(f"{name} must have shape {tuple(student_logits.shape[:-1])}, one entry per row of "
                         f"student_logits, got {tuple(x.shape)}")
    _same_device(name, x, student_logits)


def transformed() -> bool:
    """Whether this runs within `torch.compile` or a `torch.func` transform, where tensor values cannot be read."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def may_look(
    x: torch.Tensor,  # whose values a check would read
) -> bool:
    """Whether a check may read a tensor's values: on the CPU, outside transforms and `values_unseen`."""
    return x.device.type == "cpu" and not transformed() and not _unseen


def labels(
    target: Any,  # expected: int64, shape of the logits without classes
    student_logits: torch.Tensor,  # (…, classes)
    ignored: int,  # class index of rows that do not count, such as −100
) -> bool:
    """ValueError unless `target` holds one int64 class, or `ignored`, per row; True if known that none is ignored.

    Values are checked on the CPU only: a GPU would synchronize, and `torch.compile` and `torch.func` have no values.
    """
    what = "an int64 tensor of class indices (convert with .long())"
    _one_per_row("target", target, student_logits, torch.int64, what)
    if not may_look(target): return False
    classes, (low, high) = student_logits.shape[-1], (int(v) for v in target.aminmax())
    if low == ignored:
        low = int(target.where(target != ignored, max(high, 0)).min())
        if low >= 0 and high < classes: return False
    if low < 0 or high >= classes:
        raise ValueError(f"target must hold classes from 0 to {classes - 1}, or {ignored} for rows that do not count, "
                         f"got values from {low} to {high}")
    return True


def mask(
    mask: Any,  # expected: bool, shape of the logits without classes
    student_logits: torch.Tensor,  # (…, classes)
) -> None:
    """ValueError unless `mask` holds one bool per row of logits."""
    _one_per_row("mask", mask, student_logits, torch.bool, "a bool tensor, true where a row counts")


@contextmanager
def values_unseen() -> Iterator[None]:
    """Context without value checks, even on a CPU: as on a GPU, where a captured CUDA graph cannot read values."""
    global _unseen
    before, _unseen = _unseen, True
    try: yield
    finally: _unseen = before


def normalizer(
    value: Any,  # expected: a number, or a tensor with one element, at least 0
    student_logits: torch.Tensor,  # (…, classes), for the device
) -> float | torch.Tensor:
    """`value`, a number of rows as a number or scalar tensor, with 0 (no row counts) replaced by 1; else ValueError.

    The value of a tensor is checked on the CPU only.
    """
    what = "normalizer must be the number of rows that count in all micro-batches, a number or a scalar tensor"
    if not isinstance(value, torch.Tensor):
        number("normalizer", value, at_least=0.0)
        return value or 1
    if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
        raise ValueError(f"{what}, got shape {tuple(value.shape)} of {value.dtype}")
    if value.device.type != "cpu": _same_device("normalizer", value, student_logits)
    elif may_look(value): number("normalizer", value.item(), at_least=0.0)
    value = value.detach().reshape(())
    return value.where(value != 0, torch.ones_like(value))
