"""The site: built from the notebooks without a warning or a network, and no link in it is broken."""

import importlib.util
import inspect
import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from test_project import BIN, NOTEBOOKS, ROOT

needed = ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx-mathjax-offline")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: requirements-extras.txt"),
    pytest.mark.xdist_group("site"),  # built once
]


class Page(HTMLParser):
    """Where a page leads, what it loads, and where in it one can arrive."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors, self.text = [], [], {""}, path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found.get("id"), found.get("name") if tag == "a" else None}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(found["href"])
        elif found.get("src"):
            self.loaded.append(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of a fresh build, by path."""
    folder = tmp_path_factory.mktemp("built") / "site"
    made = subprocess.run(
        ["make", "-s", "-o", ".venv/extras", "site", f"BIN={BIN}", f"SITE={folder}"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "http_proxy": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    files = [path for path in folder.rglob("*.html") if "_static" not in path.parts]  # there, the theme's templates
    return {str(path.relative_to(folder)): Page(path) for path in files}, folder


def test_every_notebook_has_a_page_and_the_front_page_names_the_tracks(site):
    pages, _ = site
    assert {str(n.relative_to(ROOT / "nbs").with_suffix(".html")) for n in NOTEBOOKS} <= pages.keys()
    captions = re.findall(r'class="caption-text">(\w+)<', pages["index.html"].text)
    assert captions[:4] == ["Understand", "Use", "Reproduce", "API"]


def test_no_link_is_broken(site):
    pages, folder = site
    broken = set()
    for name, page in pages.items():
        for link in [*page.links, *page.loaded]:
            url = urlsplit(link)
            if url.scheme in ("http", "https"):
                if not re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", url.netloc):
                    broken.add((name, link))
            elif url.scheme not in ("data", "mailto"):
                target = os.path.normpath(Path(name).parent / unquote(url.path)) if url.path else name
                there = pages.get(target)
                if not (folder / target).is_file() or there and unquote(url.fragment) not in there.anchors:
                    broken.add((name, link))
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site):
    pages, folder = site
    assert not {link for page in pages.values() for link in page.loaded if re.match(r"(https?:)?//", link)}
    assert "_static/mathjax/tex-chtml.js" in "".join(pages["lesson/03_loss.html"].loaded)
    assert list((folder / "_static" / "mathjax" / "output" / "chtml" / "fonts").rglob("*.woff"))


def test_parameters_are_explained(site):
    """Each parameter of the loss has a row with its type, its default and the comment behind it."""
    from ldrld import LDRLD

    pages, _ = site
    text = pages["api/ldrld.losses.ldrld.html"].text
    entry = text[text.index('id="ldrld.losses.ldrld.loss.LDRLD"') :]
    rows = [re.sub(r"<[^>]+>", "", row) for row in re.findall(r"<tr.*?</tr>", entry, re.S)]
    for name, parameter in inspect.signature(LDRLD).parameters.items():
        row = next(row.split("\n") for row in rows if row.split("\n")[0] == name)
        assert row[2].strip("'\"‘’“”") == str(parameter.default) and len(row[3]) > 2, row


def test_formula_and_code_are_linked_both_ways(site):
    pages, _ = site
    entry = "api/ldrld.losses.ldrld.html"
    assert f"../{entry}#ldrld.losses.ldrld.loss.LDRLD" in pages["lesson/03_loss.html"].links
    assert any(link.startswith("../lesson/03_loss.html#code-") for link in pages[entry].links)
    assert "api/ldrld.losses.logits.html#ldrld.losses.logits.kd.KD" in pages["references.html"].links
    assert "https://arxiv.org/abs/1503.02531" in pages["references.html"].links


def test_search_finds_parameters_and_prose(site):
    _, folder = site
    index = (folder / "searchindex.js").read_text(encoding="utf-8")
    assert all(word in index for word in ("adw_weights", '"temperatur"', '"student"'))
