"""What people write: YAML files and `name=value` words. Every slip is a `ValueError` of one line that says where it is.

PyYAML reads YAML 1.1, in which `5e-4` is a text, `012` is ten, `1:30` is ninety and a key given twice counts once. Here
numbers, truth values and null are those of YAML 1.2, and nothing is dropped or multiplied in silence.
"""
import re
import reprlib
from pathlib import Path

import yaml

__all__ = ["read", "read_file", "assigned"]

LARGEST = 10_000  # values in a text, with each alias counted as what it stands for


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 (and `<<`, and Python's None)."""
    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) < 2: continue
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


SCALARS = {  # kind: what it looks like, and what it begins with
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
    """How many values a text holds once its aliases are written out; `ValueError` for one that holds itself."""
    known = {} if known is None else known
    if id(node) in above: raise ValueError("an alias stands within what it stands for")
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode): parts = [part for pair in parts for part in pair]
        known[id(node)] = 1 + sum(_expanded(part, (*above, id(node)), known) for part in parts)
    return known[id(node)]


def _in_short(error: Exception) -> str:
    """What YAML complains of, and where, in one line."""
    if isinstance(error, RecursionError): return "too deeply nested"
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    said = " ".join((problem or str(error)).split())
    return said + (f" (line {mark.line + 1}, column {mark.column + 1})" if mark else "")


def read(text: str, where: str, expected: str = "YAML"):
    """The value of a text in YAML.

    where: file or argument, for the message.  expected: what should have stood there, for the message.
    Raises ValueError for what is not YAML, names a key twice, or is a bomb of aliases: that is seen before it is expanded.
    """
    loader = _Loader("")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None: return None
        if (size := _expanded(node)) > LARGEST:
            raise ValueError(f"{size:,} values, its aliases written out; at most {LARGEST:,} are read")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: {_in_short(error)}; expected {expected}") from None
    finally: loader.dispose()


def read_file(path: str | Path, expected: str) -> dict:
    """The fields of a YAML file, by name.

    path: the file, in UTF-8.  expected: what should stand in it, for the message.
    Raises ValueError, with the file's name, for one that holds no fields; OSError if it cannot be opened.
    """
    try: text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{path}: not a text in UTF-8 ({where}); expected {expected}") from None
    given = read(text, str(path), expected)
    if not isinstance(given, dict): raise ValueError(f"{path}: {reprlib.repr(given)}; expected {expected}")
    for name in given:
        if not isinstance(name, str): raise ValueError(f"{path}: {name!r} is not the name of a field; expected {expected}")
    return given


def assigned(words: list[str]) -> dict:
    """Settings from words such as `epochs=5`, `loss_args.depth=3`, `loss_args={depth: 3}` or `teacher=resnet14`.

    A dot leads into what a setting holds; a teacher's name and settings of the teacher add up in any order. Of a setting
    given twice the last one counts, so that a script's own settings can be overridden behind them.
    Raises ValueError for a word that assigns nothing, cannot be read, or assigns to a part of what has none.
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
                raise ValueError(f"{word!r}: {folder} was given as {place!r} before, which has no parts")
        named_late = last == "teacher" and isinstance(place.get(last), dict) and isinstance(value, str)
        if named_late: place[last]["model"] = value
        else: place[last] = value
    return given
