"""JupyterLab as `make lab` starts it, in a browser: the front page, every lesson and the explorers run and are shown.

Screenshots are left in runs/screenshots. Needs Playwright (requirements-extras.txt) and Debian's Chromium.
"""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from test_project import ROOT, links_in, tracked

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright not installed"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt-get install chromium"),
]
BIN = Path(sys.executable).parent
TOKEN = "0" * 16
SCREENSHOTS = ROOT / "runs" / "screenshots"
LESSONS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("nbs/lesson/*.ipynb"))
FRONT, EXPLORERS = "nbs/index.ipynb", "nbs/tutorials/explore.ipynb"
PATIENCE = 180  # seconds for a notebook; a lesson takes ten on a quiet machine
NEWS = '{"fetchNews": "false", "checkForUpdates": false}'  # else a question about news covers a corner

# what a reader of the notebook sees, cell by cell
LOOK = """async () => {
  const images = [...document.querySelectorAll('.jp-Notebook img')];
  for (const image of images) await image.decode().catch(() => null);
  const opaque = image => {
    const canvas = document.createElement('canvas');
    canvas.width = canvas.height = 1;
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    return context.getImageData(0, 0, 1, 1).data[3] == 255;
  };
  const all = (cell, what) => [...cell.querySelectorAll(what)];
  return {
    images: images.map(image => ({width: image.naturalWidth, opaque: image.naturalWidth > 0 && opaque(image)})),
    cells: all(document, '.jp-Notebook .jp-Cell').map(cell => ({
      formulas: all(cell, '.jp-RenderedMarkdown mjx-container').filter(m => m.getBoundingClientRect().width > 0).length,
      wrong: all(cell, 'mjx-merror, [data-mjx-error]').map(m => m.textContent),
      links: all(cell, '.jp-RenderedMarkdown a[href]').map(a => a.href),
      outputs: all(cell, '.jp-OutputArea-output').filter(o => o.getBoundingClientRect().height > 0).length,
    })),
  };
}"""
DONE = """() => {
  const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent);
  const state = document.querySelector('.jp-Notebook-ExecutionIndicator').dataset.status;
  const failed = document.querySelector('[data-mime-type="application/vnd.jupyter.error"]');
  return state == 'idle' && (failed || prompts.every(p => /\\d/.test(p)));
}"""


class Lab:
    """A running JupyterLab and a browser."""

    def __init__(self, folder, url, browser):
        self.folder, self.url, self.browser = folder, url, browser

    def get(self, path, method="GET"):
        request = urllib.request.Request(self.url + path, method=method, headers={"Authorization": f"token {TOKEN}"})
        with urllib.request.urlopen(request) as got:
            return json.loads(got.read() or "null")

    def stop_kernels(self):
        for session in self.get("/api/sessions"):
            self.get(f"/api/sessions/{session['id']}", method="DELETE")

    def open(self, notebook):
        """A page with one notebook, its kernel started; a second attempt if two kernels raced for a port."""
        page = self.browser.new_page(viewport={"width": 1400, "height": 900})
        workspace = re.sub(r"\W", "-", notebook)
        for attempt in range(2):
            page.goto(f"{self.url}/lab/workspaces/{workspace}/tree/{notebook}?reset&token={TOKEN}")
            try:
                page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
                page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
                return page
            except Exception:
                if attempt:
                    raise
                self.stop_kernels()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(url, server, seconds=60):
    """Wait until the server answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(f"{url}/api/status?token={TOKEN}")
        except OSError:
            assert server.poll() is None and time.monotonic() < end, "JupyterLab does not start"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project, as a clone would have it: notebooks can be run and saved in it."""
    copy = tmp_path_factory.mktemp("lab") / "project"
    for file in tracked():
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return copy


@pytest.fixture(scope="module")
def lab(project):
    from playwright.sync_api import sync_playwright

    settings = project.parent / "jupyter" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(NEWS)
    own = {"JUPYTER_CONFIG_DIR": settings.parents[3], "JUPYTER_RUNTIME_DIR": settings.parents[3], "PYTHONPATH": project}
    asked = ["make", "-n", "-s", "-o", ".venv/ready", "lab", f"BIN={BIN}"]
    command = subprocess.run(asked, cwd=project, capture_output=True, text=True, check=True).stdout.strip()
    port = free_port()
    command = f"exec {command} --no-browser --port={port} --ServerApp.port_retries=0 --IdentityProvider.token={TOKEN}"
    with open(project.parent / "log", "w") as log:
        env = {**os.environ, **{name: str(path) for name, path in own.items()}, "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(command, shell=True, cwd=project, env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    try:
        wait_for(url, server)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
            yield Lab(project, url, browser)
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(autouse=True)
def no_kernels_are_left(lab, request):
    """Close what the test opened; a screenshot shows where it failed."""
    failed_before, name = request.session.testsfailed, f"failed-{request.node.name}"
    (SCREENSHOTS / f"{name}.png").unlink(missing_ok=True)
    yield
    for context in lab.browser.contexts:
        if request.session.testsfailed > failed_before:
            screenshot(context.pages[0], name)
        context.close()
    lab.stop_kernels()


def choose(page, *items):
    """Choose from JupyterLab's menus, such as Run, Run All Cells."""
    for item in items:
        page.locator(".lm-Menu-itemLabel, .lm-MenuBar-itemLabel").get_by_text(item, exact=True).last.click()


def run_all(page):
    choose(page, "Run", "Run All Cells")
    page.wait_for_function(DONE, timeout=PATIENCE * 1000)


def save(page, notebook, lab):
    """Save from the menu; the cells in the file, once it is written."""
    file = lab.folder / notebook
    before = file.stat().st_mtime_ns
    choose(page, "File", "Save Notebook")
    end = time.monotonic() + 30
    while time.monotonic() < end:
        page.wait_for_timeout(100)
        try:
            if file.stat().st_mtime_ns != before:
                return json.loads(file.read_text(encoding="utf-8"))["cells"]
        except (ValueError, FileNotFoundError):
            continue  # half written
    raise AssertionError(f"{notebook} was not saved")


def screenshot(page, name, whole=False):
    """Leave a screenshot in runs/screenshots; `whole` shows the notebook from its first cell to its last."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    if whole:
        height = page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollHeight")
        page.set_viewport_size({"width": 1400, "height": min(height + 150, 16_000)})
        page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0")
        page.wait_for_timeout(500)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
    page.set_viewport_size({"width": 1400, "height": 900})


def has_formula(source):
    """Whether Markdown has a formula, outside of code."""
    return re.search(r"\$[^$]+\$", re.sub(r"```.*?```|`[^`]*`", "", source, flags=re.S)) is not None


def check(lab, page, notebook, fresh):
    """What was run has outputs and no errors; formulas, images and links are shown and lead somewhere."""
    stored = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
    for before, now in zip(stored, fresh, strict=True):
        if now["cell_type"] == "markdown":
            continue
        source = "".join(now["source"])
        assert now["execution_count"], f"not run: {source}"
        errors = [f"{o['ename']}: {o['evalue']}" for o in now["outputs"] if o["output_type"] == "error"]
        assert not errors, f"{errors} in {source}"
        assert bool(now["outputs"]) == bool(before["outputs"]), f"outputs differ from the stored ones: {source}"
    page.wait_for_timeout(500)  # the last formulas and images
    seen = page.evaluate(LOOK)
    assert len(seen["cells"]) == len(fresh)
    for cell, shown in zip(fresh, seen["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            assert not shown["wrong"] and bool(shown["formulas"]) == has_formula(source), f"formulas: {source}"
        elif cell["outputs"]:
            assert shown["outputs"], f"nothing is shown of {source}"
    assert all(image["width"] > 0 for image in seen["images"]), "an image is missing"
    assert all(image["opaque"] for image in seen["images"]), "an image is transparent: unreadable on a dark ground"
    wanted = sum(len(links_in("".join(c["source"]))) for c in fresh if c["cell_type"] == "markdown")
    links = [urllib.parse.urlparse(link) for shown in seen["cells"] for link in shown["links"]]
    paths = [urllib.parse.unquote(link.path) for link in links if link.netloc == urllib.parse.urlparse(lab.url).netloc]
    files = [path.removeprefix("/files/") for path in paths if path.startswith("/files/")]
    assert len(files) + len(seen["images"]) >= wanted, "a link is not shown"
    assert not [file for file in files if not (lab.folder / file).exists()]
    return seen


@pytest.mark.parametrize(
    "notebook",
    [pytest.param(n, marks=pytest.mark.xdist_group(f"lab-{k % 2}")) for k, n in enumerate([FRONT, *LESSONS])],
    ids=lambda n: Path(n).stem,
)
def test_a_notebook_runs_and_is_shown(lab, notebook):
    page = lab.open(notebook)
    run_all(page)
    seen = check(lab, page, notebook, save(page, notebook, lab))
    screenshot(page, Path(notebook).stem, whole=True)
    follow_last_link(page)
    assert notebook == FRONT or any(cell["formulas"] for cell in seen["cells"])


def follow_last_link(page):
    """A click on the last link to another notebook opens it in a tab of its own."""
    link = page.locator('.jp-RenderedMarkdown a[href*=".ipynb"]:not([href^="#"])').last
    name = Path(urllib.parse.urlparse(link.get_attribute("href")).path).name
    link.click()
    page.locator(".lm-DockPanel .lm-TabBar-tabLabel").get_by_text(name, exact=True).wait_for(timeout=30_000)
    page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell").first.wait_for(timeout=30_000)


@pytest.mark.xdist_group("lab-1")
def test_make_lab_opens_the_front_page_in_both_themes(lab):
    page = lab.browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(f"{lab.url}/?token={TOKEN}")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
    assert page.locator(".lm-DockPanel .lm-TabBar-tabLabel").all_text_contents() == ["index.ipynb"]
    page.wait_for_selector("mjx-container")
    screenshot(page, "front-page")
    choose(page, "Settings", "Theme", "JupyterLab Dark")
    page.wait_for_selector('body[data-jp-theme-light="false"]', state="attached")
    page.wait_for_timeout(1000)
    screenshot(page, "front-page-dark")
    choose(page, "Settings", "Theme", "JupyterLab Light")
    page.wait_for_selector('body[data-jp-theme-light="true"]', state="attached")


def cell_of(page, call):
    """The cell that makes a call."""
    return page.locator(".jp-CodeCell").filter(has_text=call)


def changes(page, image, before):
    """Wait until the image is not the one of before."""
    end = time.monotonic() + 60
    while image.get_attribute("src") == before:
        assert time.monotonic() < end, "the figure does not change"
        page.wait_for_timeout(100)


@pytest.mark.xdist_group("lab-0")
def test_explorers_follow_their_controls(lab):
    page = lab.open(EXPLORERS)
    run_all(page)
    for call in ("explore(draw_weights", "explore(partial(draw_image"):
        cell = cell_of(page, call)
        image = cell.locator("img")
        before = image.get_attribute("src")
        cell.locator(".noUi-handle").first.press("ArrowRight")
        changes(page, image, before)
        image.scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        screenshot(page, f"explore-{call.split('draw_')[1]}")
    cell = cell_of(page, "explore_training()")
    image = cell.locator("img")
    bar, before = cell.locator(".widget-hprogress .progress-bar"), image.get_attribute("src")
    cell.locator("select").select_option("KD")
    cell.get_by_role("button", name="Train").click()
    changes(page, image, before)
    assert bar.bounding_box()["width"] > 0
    cell.get_by_text(re.compile(r"epoch [1-7]/8, .* left")).wait_for(timeout=60_000)
    image.scroll_into_view_if_needed()
    screenshot(page, "explore-training")
    cell.get_by_text("epoch 8/8").wait_for(timeout=PATIENCE * 1000)
    shown = [list(o["data"]) for c in save(page, EXPLORERS, lab) for o in c.get("outputs", []) if "data" in o]
    assert sum("image/png" in kinds for kinds in shown) == 3
    assert sum("application/vnd.jupyter.widget-view+json" in kinds for kinds in shown) == 3
    seen = page.evaluate(LOOK)
    assert all(image["width"] > 0 and image["opaque"] for image in seen["images"]) and len(seen["images"]) == 3
