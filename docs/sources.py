"""Put together what Sphinx reads: the notebooks, the pages of the API and of the references, and the navigation.

python docs/sources.py FOLDER. Nothing is executed; the stored outputs are shown.
"""

import ast
import json
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

import reference

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
WITHOUT_INPUT = ("index.ipynb", "pages")  # for reading only
TRACKS = {"lesson": "Understand", "tutorials": "Use", "pages": "Reproduce"}  # where the rest of a folder goes
ROOMS = {  # folders of the library; another one has its name as its title
    "methods": "Losses",
    "models": "Networks",
    "data": "Data sets",
    "training": "Training",
    "experiments": "Experiments and records",
    "tuning": "Hyper-parameter search",
    "results": "Tables, figures and checks",
    "bench": "Benchmarks",
    "run": "Notebooks that train",
}


def write(path: Path, text: str) -> None:
    """Write a page unless it is there already, so that Sphinx reads again only what changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def linked(text: str, notebook: Path, folder: Path) -> str:
    """Markdown whose links lead to pages, or to files copied into the site; a link to anything else becomes text.

    notebook: relative to `nbs/`. folder: the site's sources.
    """

    def replace(match: re.Match[str]) -> str:
        image, words, target = match.groups()
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            return match[0]
        # JupyterLab's anchors have capitals and commas, Sphinx's do not
        anchor = anchor and "#" + re.sub(r"[^\w-]", "", unquote(anchor).lower())
        if not path:
            return f"[{words}]({anchor})"
        there = Path(os.path.normpath(NOTEBOOKS / notebook.parent / path))
        if there.suffix == ".ipynb" and there.is_relative_to(NOTEBOOKS) and there.is_file():
            return f"[{words}]({path}{anchor})"
        if not there.is_file() or not there.is_relative_to(ROOT):
            return words
        copy = folder / "files" / there.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(there, copy)
        kind = "" if image else "path:"  # of a link to a file that is no page
        return f"{image}[{words}]({kind}{os.path.relpath(copy, folder / notebook.parent)})"

    return reference.arxiv(LINK.sub(replace, text))


def directives(source: str) -> tuple[set[str], str]:
    """nbdev's directives at the head of a cell, and the rest of it."""
    lines = source.split("\n")
    named = {line.split()[1] for line in lines if line.startswith("#|") and len(line.split()) > 1}
    return named, "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")


def shown_output(output: dict, notebook: Path, folder: Path) -> dict:
    """An output with its links; of a widget, what is there without a kernel."""
    data = {kind: value for kind, value in output.get("data", {}).items() if "widget" not in kind}
    if "text/markdown" in data:
        data["text/markdown"] = linked("".join(data["text/markdown"]), notebook, folder)
    return {**output, "data": data} if data else output


def markdown_cell(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def converted(notebook: Path, folder: Path, labels: dict[str, str]) -> dict:
    """A notebook as the site shows it, without its hidden cells; notes in `labels` which cell defines what."""
    content = json.loads((NOTEBOOKS / notebook).read_text(encoding="utf-8"))
    cells, module, names = [], "", []
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cells.append(markdown_cell(linked(source, notebook, folder)))
            continue
        named, code = directives(source)
        if "default_exp" in named:
            module = "ldrld." + source.split("default_exp")[1].split()[0].removesuffix(".__init__")
        outputs = [shown_output(output, notebook, folder) for output in cell["outputs"]]
        if "hide" in named or not code or (notebook.parts[0] in WITHOUT_INPUT and not outputs):
            continue
        if "export" in named:
            defined = [name for part in ast.parse(code).body for name in reference.names_of(part)]
            if defined and module:
                label = f"code-{module}-{len(cells)}"
                labels |= {f"{module}.{name}": label for name in defined}
                names += [name for name in defined if not name.startswith("_")]
                cells.append(markdown_cell(f"({label})="))
        tags = ["remove-input"] if notebook.parts[0] in WITHOUT_INPUT else []
        cells.append({**cell, "source": code, "outputs": outputs, "metadata": {"tags": tags}})
    if names:
        links = ", ".join(f"{{py:obj}}`{name} <{module}.{name}>`" for name in names)
        cells.insert(1, markdown_cell(f"In the package: {{py:mod}}`{module}` – {links}"))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    return {**content, "cells": cells}


def toctree(caption: str, entries: list[str]) -> str:
    """A part of the navigation."""
    return "\n".join(["```{toctree}", ":hidden:", ":titlesonly:", f":caption: {caption}", "", *entries, "```"])


def navigation(front: dict) -> str:
    """The tracks of the front page (`**Understand.** [..](..)`), and the API after them."""
    text = "\n".join(cell["source"] for cell in front["cells"] if cell["cell_type"] == "markdown")
    tracks = {}
    for paragraph in re.findall(r"^\*\*(\w+)\.\*\* (.+)", text, re.M):
        pages = [target.partition("#")[0].removesuffix(".ipynb") for _, _, target in LINK.findall(paragraph[1])]
        tracks[paragraph[0]] = [f"/{page}" for page in dict.fromkeys(pages)]
    for folder, track in TRACKS.items():
        found = sorted(f"/{folder}/{p.stem}" for p in (NOTEBOOKS / folder).glob("*.ipynb"))
        tracks[track] += [page for page in found if page not in sum(tracks.values(), [])]
    tracks["Reproduce"].append("/tables")
    tracks["API"] = ["/api/index", "/library", "/references"]
    assert len(tracks) == 4, f"the front page names the tracks Understand, Use and Reproduce; found {list(tracks)}"
    return "\n\n".join(toctree(track, entries) for track, entries in tracks.items())


def listing(folders: dict[str, str], elsewhere: str) -> str:
    """Headings, each with the notebooks of a folder that the navigation does not list elsewhere."""
    lines = []
    for name, title in folders.items():
        found = sorted(p.relative_to(NOTEBOOKS).with_suffix("") for p in (NOTEBOOKS / name).glob("*.ipynb"))
        entries = [f"/{page}" for page in found if f"/{page}\n" not in elsewhere]
        lines += [f"## {title}", "", "```{toctree}", ":maxdepth: 1", ":titlesonly:", "", *entries, "```", ""]
    return "\n".join(lines)


def main(folder: Path) -> None:
    """Put the site's sources together in `folder`."""
    labels: dict[str, str] = {}
    found = sorted(p.relative_to(NOTEBOOKS) for p in NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    pages = {notebook: converted(notebook, folder, labels) for notebook in found}
    tree = navigation(pages[Path("index.ipynb")])
    pages[Path("index.ipynb")]["cells"].append({**markdown_cell(tree), "id": "navigation"})
    for notebook in ("comparison", "curve", "grid"):  # their headings come with their parameters
        title = markdown_cell(f"# Tables of one shape: {notebook}")
        pages[Path("paper", f"{notebook}.ipynb")]["cells"].insert(0, {**title, "id": "title"})
    texts = {str(notebook): json.dumps(page, ensure_ascii=False, indent=1) for notebook, page in pages.items()}
    modules = reference.modules(ROOT)
    texts |= reference.api_pages(modules, labels)
    rooms = sorted(p.name for p in NOTEBOOKS.iterdir() if p.is_dir() and not p.name.startswith("."))
    rooms = ROOMS | {name: name.capitalize() for name in rooms if name not in (*ROOMS, *TRACKS, "paper")}
    paper = sorted(p.name for p in (NOTEBOOKS / "paper").iterdir() if p.is_dir() and not p.name.startswith("."))
    parts = {"paper": "Of one shape"} | {f"paper/{name}": name.replace("_", " ").capitalize() for name in paper}
    texts["library.md"] = f"# Notebooks of the library\n\n{listing(rooms, tree)}"
    texts["tables.md"] = f"# Notebooks of the tables and figures\n\n{listing(parts, tree)}"
    cite = linked("[CITATION.cff](../CITATION.cff)", Path("index.ipynb"), folder)
    start = (Path(__file__).with_name("references.md")).read_text(encoding="utf-8").replace("CITATION.cff", cite)
    texts["references.md"] = f"{start}\n{reference.references(modules)}\n"
    written = {str(p.relative_to(folder)) for ending in ("*.ipynb", "*.md") for p in folder.rglob(ending)}
    for stale in written - texts.keys():
        if not stale.startswith("files/"):
            (folder / stale).unlink()
    for name, text in texts.items():
        write(folder / name, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
