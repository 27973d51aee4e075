"""The project's own words stay out: prose, names and messages use the field's, listed in `words.txt`."""

import json
import re
from pathlib import Path

import pytest

from test_project import ROOT, tracked

HERE = Path(__file__).parent
LINES = [line for line in (HERE / "words.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
WORDS = dict(line.split(" -> ") for line in LINES)
# names of arrays in files that were written before, and what reads them
STORED = re.compile(r'"(pictures|picture_labels|contender|picture)"|contender and picture')


def text_of(path):
    """Everything that a person wrote in a file; of a notebook, its cells without their outputs."""
    if path.suffix == ".ipynb":
        return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("pattern", WORDS)
def test_the_words_are_the_fields(pattern):
    wanted = re.compile(rf"(?<![a-z])({pattern})(?![a-z])", re.IGNORECASE)
    found = {}
    for path in tracked():
        ours = path.suffix in (".ipynb", ".py", ".md", ".yaml", ".yml", ".toml", ".ini", ".cff")
        records = path.relative_to(ROOT).parts[0] in ("data", "figures")
        if records or not ours or path.name in ("CHANGELOG.md", Path(__file__).name, "_modidx.py"):
            continue
        lines = [line.strip() for line in text_of(path).splitlines() if wanted.search(STORED.sub("", line))]
        if lines:
            found[path.name] = lines
    assert not found, f"say {WORDS[pattern]!r} instead"


@pytest.mark.parametrize("sentence", ["Two pictures of it", "alters_pictures = True", "An Undecided claim"])
def test_a_word_is_found_in_names_and_sentences(sentence):
    assert any(re.search(rf"(?<![a-z])({p})(?![a-z])", sentence, re.IGNORECASE) for p in WORDS)
