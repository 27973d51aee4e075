"""What people install: the wheel has everything, needs torch alone, imports quickly, and brings the command."""

import email
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from test_project import ROOT, tracked

ALTERNATIONS = 9  # of `import torch` and `from ldrld import LDRLD`
SITE_PACKAGES = Path(metadata.distribution("torch").locate_file(""))


def build(what, source, folder):
    """A wheel or sdist, by the build backend itself, so that nothing is downloaded."""
    folder.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(folder)!r}))"
    made = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return folder / made.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist and the wheel of this tree, and the wheel of the sdist."""
    folder = tmp_path_factory.mktemp("package")
    for file in tracked():
        place = file.relative_to(ROOT)
        if place.parts[0] in ("ldrld", "data") and place.parts[:2] != ("data", "runs") or len(place.parts) == 1:
            (folder / "tree" / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / "tree" / place)
    sdist = build("sdist", folder / "tree", folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return {
        "sdist": sdist,
        "wheel": build("wheel", folder / "tree", folder / "wheel"),
        "its wheel": build("wheel", unpacked, folder / "its wheel"),
    }


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def required(name):
    """A distribution and what it requires, directly or not."""
    found, waiting = {}, [name]
    while waiting:
        distribution = metadata.distribution(waiting.pop())
        found[distribution.metadata["Name"]] = distribution
        for requirement in distribution.requires or ():
            short = re.split(r"[^\w.-]", requirement)[0]
            if "extra ==" in requirement or short in found:
                continue
            try:
                metadata.distribution(short)
            except metadata.PackageNotFoundError:  # for another platform
                continue
            waiting.append(short)
    return found


def run(words, folder, **env):
    """A process that sees neither this checkout nor its variables."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LDRLD"))}
    given = {**ours, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **env}
    return subprocess.run(list(map(str, words)), cwd=folder, env=given, capture_output=True, text=True)


def links(folder, *names):
    """A folder with links to some distributions, and to what these require."""
    folder.mkdir()
    for distribution in [d for name in names for d in required(name).values()]:
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                (folder / name).symlink_to(SITE_PACKAGES / name)
    return folder


def environment(folder, visible):
    """The python of a new virtual environment that also sees the packages in another folder."""
    venv.create(folder, with_pip=False)
    (there,) = (folder / "lib").glob("python*/site-packages")
    (there / "visible.pth").write_text(f"{visible}\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def environments(built, tmp_path_factory):
    """Two virtual environments with the wheel: one with torch and what torch requires, one with everything else."""
    folder = tmp_path_factory.mktemp("environments")
    pythons = {}
    for name, visible in (("torch", links(folder / "links", "torch")), ("all", SITE_PACKAGES)):
        pythons[name] = environment(folder / name, visible)
        install = [sys.executable, "-m", "pip", "--python", pythons[name], "install", "-q", "--no-deps", "--no-index"]
        got = run([*install, built["wheel"]], folder)
        assert got.returncode == 0, got.stderr
    return pythons


def test_the_wheel_has_what_the_package_needs(built):
    names = contents(built["wheel"]).keys()
    package = {str(file.relative_to(ROOT)) for file in tracked() if file.is_relative_to(ROOT / "ldrld")}
    numbers = {f"ldrld/published/{file.name}" for file in (ROOT / "data" / "published").iterdir()}
    assert package | numbers <= names
    assert {name for name in names if ".dist-info/" not in name} == package | numbers


def test_the_sdist_gives_the_same_wheel(built):
    assert contents(built["wheel"]) == contents(built["its wheel"])


def test_the_wheel_requires_torch_alone(built):
    (name,) = (name for name in contents(built["wheel"]) if name.endswith(".dist-info/METADATA"))
    stated = email.message_from_bytes(contents(built["wheel"])[name])
    assert [r for r in stated.get_all("Requires-Dist") if "extra ==" not in r] == ["torch>=2.6"]
    assert (stated["Name"], stated["License-File"]) == ("ldrld", "LICENSE")


def test_with_torch_alone(environments, tmp_path):
    code = """
import importlib.util, sys, torch, ldrld
assert "environments" in ldrld.__file__, ldrld.__file__
assert not [n for n in ("pandas", "torchvision", "typer", "matplotlib", "pydantic") if importlib.util.find_spec(n)]
student, teacher = torch.randn(8, 100, requires_grad=True), torch.randn(8, 100)
ldrld.LDRLD()(student, teacher, torch.arange(8)).backward()
assert student.grad.isfinite().all() and ldrld.adw_weights(7).shape == (7, 7)
assert len([ldrld.losses.build(n) for n in ldrld.losses.available("logits")]) > 10
assert ldrld.models.build("resnet8", 10)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
"""
    got = run([environments["torch"], "-c", code], tmp_path)
    assert got.returncode == 0, got.stderr
    got = run([environments["torch"].with_name("ldrld"), "--help"], tmp_path)
    assert got.returncode == 1 and 'pip install "ldrld[run]"' in got.stderr and "Traceback" not in got.stderr


def test_without_a_checkout(environments, tmp_path):
    """Profiles and published numbers are the wheel's; one run trains, in an empty folder."""
    code = """
from ldrld.experiments import profiles, published
from ldrld.experiments.catalog import EXPERIMENTS
assert len(published.load()) > 1000 and len(published.sources()) > 10
assert all(profiles.profile(name).name == name for name in profiles.PROFILES) and EXPERIMENTS
"""
    got = run([environments["all"], "-c", code], tmp_path)
    assert got.returncode == 0, got.stderr
    command = environments["all"].with_name("ldrld")
    assert "reproduce" in run([command, "--help"], tmp_path).stdout
    settings = "dataset=digits model=resnet8 loss=kd teacher=resnet8 recipe=onecycle epochs=1 lr=0.1".split()
    got = run([command, "run", *settings], tmp_path)
    assert got.returncode == 0 and list(tmp_path.glob("data/runs/try/*.json")), got.stderr


def test_the_lesson_for_colab_installs_the_wheel_and_ends_soon(built, tmp_path):
    """In an environment with torch, scikit-learn and pip; two minutes of CPU time at most."""
    python = environment(tmp_path / "colab", links(tmp_path / "links", "torch", "scikit-learn", "pip"))
    notebook = json.loads((ROOT / "nbs" / "tutorials" / "colab.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "lesson.py").write_text("\n".join(code), encoding="utf-8")
    got = run([python, "lesson.py"], tmp_path)
    assert got.returncode == 1 and "set ADDRESS" in got.stderr
    before = os.times()
    got = run([python, "lesson.py"], tmp_path, LDRLD_ADDRESS=str(built["wheel"]))
    after = os.times()
    assert got.returncode == 0 and re.search(r"LDRLD +\d", got.stdout), got.stderr
    seconds = after.children_user - before.children_user + after.children_system - before.children_system
    print(f"the lesson takes {seconds:.0f} s of CPU time")
    assert seconds < 120


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands(environments, tmp_path, shell):
    command = environments["all"].with_name("ldrld")
    script = run([command], tmp_path, _LDRLD_COMPLETE=f"source_{shell}").stdout
    assert "ldrld" in script and f"complete_{shell}" in script
    typed = {"bash": {"COMP_WORDS": "ldrld re", "COMP_CWORD": "1"}}.get(shell, {"_TYPER_COMPLETE_ARGS": "ldrld re"})
    typed |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"} if shell == "fish" else {}
    assert "reproduce" in run([command], tmp_path, _LDRLD_COMPLETE=f"complete_{shell}", **typed).stdout


def test_the_loss_is_imported_about_as_fast_as_torch(environments, tmp_path):
    """CPU time of fresh processes, alternating: other load on the machine hardly changes it."""
    seconds = {"import torch": [], "from ldrld import LDRLD": []}
    for _ in range(ALTERNATIONS + 1):
        for statement, times in seconds.items():
            code = f"import time; start = time.process_time(); {statement}; print(time.process_time() - start)"
            got = run([environments["torch"], "-W", "ignore", "-c", code], tmp_path)
            times.append(float(got.stdout))
    torch, ours = (times[1:] for times in seconds.values())  # the first reads the files from the disk
    ratio = statistics.median(b / a for a, b in zip(torch, ours))
    print(f"import torch {statistics.median(torch):.2f} s, LDRLD {statistics.median(ours):.2f} s: {ratio:.3f} times")
    assert ratio <= 1.2
