"""What holds the project together: pins, tags, exports, README, and no trace of one particular machine."""

import ast
import configparser
import csv
import importlib.util
import json
import os
import re
import statistics
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ldrld.bench import registered
from ldrld.experiments.catalog import EXPERIMENTS
from ldrld.experiments.profiles import PROFILES

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
BIN = Path(sys.executable).parent


def room(notebook):
    """The folder below nbs/ that a notebook lies in, or in whose folders it lies."""
    return notebook.relative_to(ROOT / "nbs").parts[0]


def tracked():
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True
    )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def cells(notebook, kind="code"):
    return [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def test_environment_equals_requirements():
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    *_, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert pip["pip"] == [*pins, "-e ."]
    assert all("==" in pin for pin in pins)


def test_extras_are_pinned_and_bring_no_other_torch():
    listed = (ROOT / "requirements-extras.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in listed if line and not line.startswith("#"))
    here = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}
    assert not pins.keys() & (here | {"torch", "torchvision"}) and not [name for name in pins if "nvidia" in name]
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    for extra in ("hf", "timm", "torchdistill", "lightning", "onnx", "slurm"):
        for requirement in settings["DEFAULT"][f"{extra}_requirements"].split():
            assert re.split(r"[<>=;]", requirement)[0] in pins, requirement


def test_settings_name_only_what_is_pinned():
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    pinned = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line}
    for extra in ("", "run_", "lab_", "dev_"):
        for requirement in settings["DEFAULT"][f"{extra}requirements"].split():
            assert re.split(r"[<>=;]", requirement)[0] in pinned, requirement


def test_the_parameters_tag_survives_cleaning():
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert settings["DEFAULT"]["allowed_cell_metadata_keys"].strip() == "tags"


@pytest.mark.parametrize("notebook", [n for n in NOTEBOOKS if room(n) in ("run", "paper")], ids=lambda n: n.stem)
def test_run_and_paper_notebooks_have_one_parameters_cell(notebook):
    tagged = [c for c in cells(notebook) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert cells(notebook)[0] == tagged[0], "papermill injects after it: nothing may run before"
    assert not any(re.search(r"^#\|\s*export", "".join(c["source"]), re.M) for c in cells(notebook))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: f"{n.parent.name}/{n.stem}")
def test_notebooks_are_readable(notebook):
    for c in cells(notebook):
        source = "".join(c["source"])
        if re.search(r"^#\|\s*export", source, re.M):
            assert len(source.splitlines()) <= 60
        assert not any(o["output_type"] == "error" for o in c["outputs"])
    shown = [
        c for c in cells(notebook) if not re.search(r"^#\|\s*(export|hide|default_exp)", "".join(c["source"]), re.M)
    ]
    if len(shown) > 3:
        assert any(c["outputs"] for c in shown), "a reader on the web sees nothing"


def test_exported_cells_are_a_dozen_lines():
    """Half of them at least; a cell holds one definition where it would be longer."""
    sizes = [
        len([line for line in "".join(c["source"]).strip().splitlines() if not line.startswith("#|")])
        for notebook in NOTEBOOKS
        for c in cells(notebook)
        if re.search(r"^#\|\s*export", "".join(c["source"]), re.M)
    ]
    assert statistics.median(sizes) <= 12


def links_in(text):
    """Where links and images in Markdown lead, without anchors; not those into the web or the same page."""
    found = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    return [t for t in found if t and "{" not in t and not re.match(r"[a-z]+:", t)]


def pages():
    """What people read, with the folder that its links are relative to.

    Outputs count on pages and in the paper's notebooks; elsewhere they show examples, made in temporary folders.
    """
    for file in tracked():
        if file.suffix == ".md" and file.name != "pull_request_template.md":
            yield file, file.parent, file.read_text(encoding="utf-8")
    for notebook in NOTEBOOKS:
        for cell in cells(notebook, "markdown") + cells(notebook):
            if cell["cell_type"] == "markdown":
                yield notebook, notebook.parent, "".join(cell["source"])
            for output in cell.get("outputs", []) if room(notebook) in ("index.ipynb", "pages", "paper") else []:
                yield notebook, notebook.parent, "".join(output.get("data", {}).get("text/markdown", ""))
    for e in EXPERIMENTS.values():
        yield Path(ROOT / f"experiment {e.name}"), ROOT / "nbs" / "paper", e.introduction


def test_every_link_leads_somewhere():
    broken = {
        f"{page.relative_to(ROOT)}: {target}"
        for page, folder, text in pages()
        for target in links_in(text)
        if not (folder / target).exists()
    }
    assert not broken


def test_notebooks_of_the_paper_have_names_of_their_own():
    """Figures and executed copies are named after them; each is the notebook of an experiment or a benchmark."""
    names = [n.stem for n in NOTEBOOKS if room(n) == "paper"]
    assert len(set(names)) == len(names) and not [n for n in names if n[0].isdigit()]
    figures = [e.figure for e in EXPERIMENTS.values()]
    assert len(set(figures)) == len(figures)
    there = {str(n.relative_to(ROOT / "nbs" / "paper").with_suffix("")) for n in NOTEBOOKS if room(n) == "paper"}
    assert there == {e.notebook for e in (*EXPERIMENTS.values(), *registered().values())}


def test_committed_figures_are_named_after_experiments():
    names = {e.figure for e in EXPERIMENTS.values()}
    made = {p.stem for profile in PROFILES for p in (ROOT / "figures" / profile).glob("*.svg")}
    assert made <= names, made - names


def test_export_clean_and_readme_change_nothing(tmp_path):
    """The package is what the notebooks export, the notebooks are clean, and the README is what the index gives."""
    copy = tmp_path / "copy"
    for file in tracked():
        target = copy / file.relative_to(ROOT)
        if target.suffix in (".npz", ".safetensors", ".png", ".svg"):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.suffix in (".py", ".ipynb", ".md") and p.is_file()}
    env = {**os.environ, "PYTHONPATH": str(copy)}
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([BIN / command], cwd=copy, env=env, check=True, capture_output=True)
    made = subprocess.run(
        ["make", "-s", "-o", ".venv/ready", "readme", f"BIN={BIN}"], cwd=copy, env=env, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    changed = [str(p.relative_to(copy)) for p, content in before.items() if p.read_bytes() != content]
    changed += [str(p.relative_to(copy)) for p in (copy / "ldrld").rglob("*.py") if p not in before]
    assert not changed, f"run `nbdev_export && nbdev_clean && make readme` and commit: {changed}"


def test_no_trace_of_one_machine():
    for file in tracked():
        if (
            file.suffix in (".py", ".ipynb", ".md", ".ini", ".yml", ".toml", ".json", ".csv", ".txt", ".cff")
            or file.name == "Makefile"
        ):
            found = re.search(r"(?<![\w.])/(work|root|home)/\w+", file.read_text(encoding="utf-8"))
            assert not found or file == Path(__file__), f"{file.relative_to(ROOT)}: {found[0]}"


def test_importing_the_loss_needs_torch_alone():
    code = (
        "import sys, ldrld; ldrld.LDRLD(); bad = "
        "{'pandas', 'torchvision', 'matplotlib', 'pydantic', 'scipy', 'papermill', 'safetensors', 'PIL', 'sklearn', "
        "'typer', 'transformers', 'timm', 'torchdistill', 'submitit', 'lightning', 'onnx', 'onnxruntime'} "
        "& set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_missing_extra_says_what_to_install(tmp_path):
    (tmp_path / "pydantic.py").write_text("raise ModuleNotFoundError(\"No module named 'pydantic'\", name='pydantic')")
    got = subprocess.run(
        [sys.executable, "-c", "import ldrld; ldrld.RunConfig"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert 'pip install "ldrld[run]"' in got.stderr


@pytest.mark.parametrize("module", ["ldrld", "ldrld.cli"])
def test_the_command_as_a_module(module):
    got = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert got.returncode == 0 and "reproduce" in got.stdout


def long_lines(path):
    """Lines of code over 120 characters; what nbdev writes into `__all__` does not count."""
    if path.suffix == ".ipynb":
        lines = [line for cell in cells(path) for line in "".join(cell["source"]).split("\n")]
    else:
        lines = path.read_text(encoding="utf-8").split("\n")
    return [line for line in lines if len(line) > 120 and not line.startswith("__all__")]


def test_no_line_of_code_is_longer_than_120_characters():
    files = [p for p in tracked() if p.suffix in (".py", ".ipynb") and p.name != "_modidx.py"]
    assert not {str(p.relative_to(ROOT)): lines for p in files if (lines := long_lines(p))}


@pytest.fixture(scope="module")
def reference():
    """The module that makes the API pages; it reads the package's source and needs no other library."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_parameter_says_what_it_means(reference):
    assert not list(reference.unexplained(reference.modules(ROOT)))


def test_conventions_are_unique_and_used(reference):
    """A row of docs/parameters.csv explains at least one parameter that says nothing itself."""
    with reference.CONVENTIONS.open(encoding="utf-8", newline="") as file:
        rows = [(row["name"], row["type"]) for row in csv.DictReader(file)]
    assert len(rows) == len(set(rows)) and all(reference.conventions().values())
    silent = set()
    for module in reference.modules(ROOT):
        functions = [node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef)]
        silent |= {(p.name, p.type) for f in functions for p in reference.parameters(module, f) if not p.meaning}
        classes = [node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
        silent |= {(p.name, p.type) for c in classes for p in reference.fields(module, c) if not p.meaning}
    assert not set(rows) - silent


def test_a_meaning_comes_from_the_comment_the_class_above_or_the_convention(reference, tmp_path):
    (tmp_path / "ldrld").mkdir()
    (tmp_path / "ldrld" / "m.py").write_text(
        "class Above:\n"
        "    def f(self,\n"
        "        x: int,  # from above\n"
        "    ): 'Do.'\n"
        "class Below(Above):\n"
        "    def f(self, x: int, seed: int, y: int): 'Do.'\n"
    )
    namesake = "class Above:\n    def f(self,\n        y: int,  # of another class\n    ): 'Do.'\n"
    (tmp_path / "ldrld" / "a.py").write_text(namesake)
    modules = reference.modules(tmp_path)
    assert list(reference.unexplained(modules)) == ["ldrld.m.Below.f(y: int)"]
    page = "\n".join(reference.section(modules[1], {}, modules))
    assert "| `x` | `int` |  | from above |" in page and "| `seed` | `int` |  | seed of the random numbers |" in page
