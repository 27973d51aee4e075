"""Every notebook runs from top to bottom, and its stored outputs are what running it gives."""

import importlib.util
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

from ldrld.batch.notebooks import with_kernel

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
OPTIONAL = {  # without these libraries a notebook's cells are skipped
    "tutorials/hugging_face": ("transformers", "accelerate"),
    "tutorials/language_models": ("transformers", "accelerate"),
    "tutorials/timm": ("timm",),
    "tutorials/torchdistill": ("torchdistill",),
    "tutorials/lightning": ("lightning",),
    "tutorials/export": ("onnx", "onnxscript", "onnxruntime"),
    "models/timm_networks": ("timm",),
}
READ_REPOSITORY = {"index", "results/front_page", "results/reproduction"}  # as the pages do; they write nothing
READ_RECORDS = (
    "methods/varied_depth",
    "lesson/02_weights",
    "experiments/catalog",
    "experiments/plan",
    "results/claims",
    "results/claims_report",
)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def name_of(path):
    """A notebook's place under nbs/, such as "lesson/03_loss"."""
    return str(path.relative_to(NBS).with_suffix(""))


def texts(cell):
    """What a reader of the cell's output sees as text; images and tables in HTML have a text beside them."""
    for o in cell.get("outputs", []):
        text = o.get("text") or o.get("data", {}).get("text/markdown") or o.get("data", {}).get("text/plain") or ""
        yield re.sub(r" at 0x[0-9a-f]+", "", "".join(text))


def agree(stored: str, fresh: str, numbers: bool) -> bool:
    """The same words, and the same numbers to two per cent: another processor rounds differently."""
    if NUMBER.sub("#", stored).split() != NUMBER.sub("#", fresh).split():
        return False
    pairs = zip(NUMBER.findall(stored), NUMBER.findall(fresh))
    return not numbers or all(math.isclose(float(a), float(b), rel_tol=0.02, abs_tol=1e-4) for a, b in pairs)


def test_agreement_can_fail():
    assert agree("loss 1.00, 3 of 4", "loss 1.01, 3 of 4", numbers=True)
    assert not agree("loss 1.00", "loss 1.10", numbers=True)
    assert not agree("loss 1.00", "gain 1.00", numbers=False)


@pytest.mark.parametrize("name", OPTIONAL)
def test_without_its_libraries_a_notebook_says_what_to_install(name, monkeypatch, capsys):
    """The cell that looks for them, in a process where they cannot be found; the cells below are then skipped."""
    cells = [c for c in json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    sources = [source for source in code if "default_exp" not in source]
    shell = SimpleNamespace(input_transformers_cleanup=[])
    monkeypatch.setattr(importlib.util, "find_spec", lambda library: None)
    exec(compile(sources[0], name, "exec"), {"get_ipython": lambda: shell})
    assert f"pip install {' '.join(OPTIONAL[name])}" in capsys.readouterr().out
    assert shell.input_transformers_cleanup[0](["every line"]) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook(path, tmp_path, monkeypatch):
    if name_of(path) not in READ_REPOSITORY and path.relative_to(NBS).parts[0] != "pages":
        monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    if path.relative_to(NBS).parts[0] in ("paper", "tutorials") or name_of(path) in READ_RECORDS:
        for evidence in ("runs/quick", "bench", "tables/quick-tune"):
            shutil.copytree(ROOT / "data" / evidence, tmp_path / "data" / evidence)
    stored = json.loads(path.read_text(encoding="utf-8"))
    fresh = nbformat.read(path, as_version=4)
    # the last cell exports; a test must not write into the package
    fresh.cells = [c for c in fresh.cells if "nbdev_export" not in c.source]
    with_kernel(
        lambda: NotebookClient(
            fresh, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
        ).execute()
    )
    if path.parent.name == "run":
        return  # its outputs are logs
    needed = OPTIONAL.get(name_of(path), ())
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        said, *rest = [text for c in fresh.cells for text in texts(c)]
        assert f"pip install {' '.join(needed)}" in said and not rest
        pytest.skip(f"{' and '.join(missing)} not installed")
    by_id = {c["id"]: c for c in fresh.cells}
    for cell in stored["cells"]:
        if cell["cell_type"] != "code" or cell["id"] not in by_id:
            continue
        numbers = "varies" not in cell["metadata"].get("tags", [])
        old, new = list(texts(cell)), list(texts(by_id[cell["id"]]))
        source = "".join(cell["source"])[:200]
        assert len(old) == len(new), f"{len(old)} stored outputs, {len(new)} now, of:\n{source}"
        for a, b in zip(old, new):
            assert agree(a, b, numbers), f"stored:\n{a}\nnow:\n{b}\nof:\n{source}"


@pytest.mark.parametrize("path", sorted(NBS.glob("lesson/*.ipynb")), ids=name_of)
def test_a_lesson_says_what_one_will_know_and_ends_with_exercises(path):
    cells = [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    prose = [source for kind, source in cells if kind == "markdown"]
    assert any("At the end you" in source for source in prose[:3])
    begin = next(k for k, (_, source) in enumerate(cells) if "## Exercises" in source)
    solutions = [source for kind, source in cells[begin:] if kind == "code" and "nbdev_export" not in source]
    assert len(solutions) >= 2 and all("assert" in source for source in solutions)
    assert re.search(r"Next: \[.+\]\(.+\)", prose[-1])


def test_nothing_is_left_behind():
    assert not [
        p
        for p in set(NBS.rglob("*")) - {NBS / "tutorials" / "job_array.sh"}  # part of a guide
        if p.suffix not in (".ipynb", "") and ".ipynb_checkpoints" not in p.parts and p.is_file()
    ]
    assert os.environ.get("OMP_NUM_THREADS", "1") == "1"
