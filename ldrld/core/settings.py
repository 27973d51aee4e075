"""Parsing of user settings: YAML files and `name=value` arguments. Errors are one-line `ValueError`s with the location.

PyYAML reads YAML 1.1, in which `5e-4` is a string, `012` is ten, `1:30` is ninety, and duplicate keys are silently
dropped. Here, numbers, booleans and null follow YAML 1.2, and duplicate keys and excessive aliases raise an error.
"""
import re
import reprlib
from pathlib import Path
from typing import Any

import yaml

__all__ = ["read", "read_file", "assigned"]

LARGEST = 10_000  # maximum number of values in a text, with aliases expanded


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 (and `<<`, and Python's None)."""
    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) < 2: continue
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


SCALARS = {  # kind: pattern, and possible first characters
    "merge": (r"<<", ["<"]),
    "null": (r"~|null|Null|NULL|None|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
              list("-+.0123456789")),
}
for _kind, (_looks, _begins) in SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_looks})$"), _begins)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def _expanded(node: yaml.Node, above: tuple = (), known: dict | None = None) -> int:
    """Number of values with aliases expanded; `ValueError` for an alias that contains itself."""
    known = {} if known is None else known
    if id(node) in above: raise ValueError("an alias contains itself")
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode): parts = [part for pair in parts for part in pair]
        known[id(node)] = 1 + sum(_expanded(part, (*above, id(node)), known) for part in parts)
    return known[id(node)]


def _in_short(error: Exception) -> str:
    """The YAML error and its location, in one line."""
    if isinstance(error, RecursionError): return "too deeply nested"
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    said = " ".join((problem or str(error)).split())
    return said + (f" (line {mark.line + 1}, column {mark.column + 1})" if mark else "")


def read(
    text: str,  # YAML
    where: str,  # file or argument, for the message
    expected: str = "YAML",  # description of a valid value, for the message
) -> Any:
    """Parse a YAML text.

    Raises ValueError for invalid YAML, a duplicate key, or an alias bomb, which is detected before it is expanded.
    """
    loader = _Loader("")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None: return None
        if (size := _expanded(node)) > LARGEST:
            raise ValueError(f"{size:,} values with aliases expanded; the limit is {LARGEST:,}")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: {_in_short(error)}; expected {expected}") from None
    finally: loader.dispose()


def read_file(
    path: str | Path,  # the file, in UTF-8
    expected: str,  # description of a valid file, for the message
) -> dict:
    """The fields of a YAML file, by name.

    Raises ValueError, with the file's name, if it is not a mapping; OSError if it cannot be opened.
    """
    try: text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{path}: not valid UTF-8 ({where}); expected {expected}") from None
    given = read(text, str(path), expected)
    if not isinstance(given, dict): raise ValueError(f"{path}: {reprlib.repr(given)}; expected {expected}")
    for name in given:
        if isinstance(name, str): continue
        raise ValueError(f"{path}: {name!r} is not a field name; expected {expected}")
    return given


def assigned(
    words: list[str],  # arguments of a command, each `name=value`
) -> dict:
    """Settings from arguments such as `epochs=5`, `loss_args.depth=3`, `loss_args={depth: 3}` or `teacher=resnet14`.

    A dot addresses a nested setting; a teacher's name and its settings may come in any order. If a setting is given
    twice, the last one wins, so later arguments override earlier ones.
    Raises ValueError for an argument that is not an assignment, cannot be parsed, or assigns into a plain value.
    """
    given: dict = {}
    for word in words:
        name, is_assigned, text = word.partition("=")
        *folders, last = name.split(".")
        if not is_assigned or not all([*folders, last]):
            raise ValueError(f"{word!r}: expected name=value, such as epochs=5 or loss_args.depth=3")
        value = read(text, repr(word), "a number, a name, or YAML such as {depth: 3}")
        place = given
        for folder in folders:
            if folder == "teacher" and isinstance(place.get(folder), str): place[folder] = {"model": place[folder]}
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise ValueError(f"{word!r}: {folder} was already set to {place!r}, which has no fields")
        named_late = last == "teacher" and isinstance(place.get(last), dict) and isinstance(value, str)
        if named_late: place[last]["model"] = value
        else: place[last] = value
    return given
