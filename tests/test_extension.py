"""Adding something touches one place: a loss from outside trains, resumes, is recorded and tabulated like ours."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from ldrld import losses
from ldrld.experiments.catalog import EXPERIMENTS, find, selected, shown_in
from ldrld.experiments.config import RunConfig, name_of
from ldrld.experiments.registry import SHARED, experiment
from ldrld.experiments.records import records
from ldrld.losses.registry import loss_class
from ldrld.training.graphs import why_eager

ROOT = Path(__file__).parent.parent
LOSS = '''
from ldrld.losses.base import LogitLoss


class Squared(LogitLoss):
    """Squared differences of logits around their mean."""

    def __init__(self, weight: float = 1.0, ce_weight: float = 1.0):
        super().__init__()
        self.weight, self.ce_weight = weight, ce_weight

    def row_terms(self, student, teacher, target):
        centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
        return self.cross_entropy(student, target) | {"squared": self.weight * centred.square().mean(1)}
'''
PROFILE = """
data: handwritten digits
dataset: digits
pairs: [[resnet8, resnet8]]
teacher: {recipe: onecycle, epochs: 1, lr: 0.1}
student: {recipe: onecycle, epochs: 1, lr: 0.1}
seeds: [0]
methods: [KD, "their_losses:Squared"]
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A module of somebody else."""
    (tmp_path / "their_losses.py").write_text(LOSS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "their_losses.py"
    sys.modules.pop("their_losses", None)


def test_a_loss_from_outside_is_built_like_ours(theirs):
    loss = losses.build("their_losses:Squared", weight=2.0)
    student, teacher = torch.randn(6, 10), torch.randn(6, 10)
    target = torch.tensor([1, 2, -100, 3, -100, 4])
    counted = target >= 0
    alone = loss(student[counted], teacher[counted], target[counted])
    torch.testing.assert_close(loss(student, teacher, target), alone)  # ignored rows are the base class's
    assert loss.hyperparameters["weight"] == 2.0
    with pytest.raises(ValueError, match="unknown hyper-parameter of 'their_losses:Squared' 'wieght'"):
        losses.build("their_losses:Squared", wieght=2.0)


@pytest.mark.parametrize(
    "name, told",
    [
        ("their_losses:Cubed", "cannot be imported"),
        ("nobody_has:This", "cannot be imported"),
        ("pathlib:Path", "expected a subclass of ldrld.losses.base.LogitLoss"),
        ("skd", "Did you mean"),
    ],
)
def test_what_is_no_loss_is_refused(theirs, name, told):
    with pytest.raises(ValueError, match=told):
        losses.build(name)


def test_an_entry_point_names_a_loss(theirs):
    folder = theirs.parent / "their_losses-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: their-losses\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[ldrld.losses]\nsquared = their_losses:Squared\n")
    assert type(losses.build("squared")).__name__ == "Squared"


def test_a_run_is_recorded_with_the_source_of_its_loss(theirs):
    config = RunConfig(loss="their_losses:Squared", teacher="resnet8", dataset="digits")
    assert name_of(config).startswith("digits-resnet8-their-losses-squared-s0-")
    origin = losses.origin("their_losses:Squared")
    assert origin == {"class": "their_losses:Squared", "sha256": hashlib.sha256(theirs.read_bytes()).hexdigest()}
    assert losses.origin("kd") == {}


def test_nothing_is_assumed_about_recording_a_loss_from_outside(theirs, monkeypatch):
    """Neither about the loss nor about one of ours that wraps it, unless the loss says that it can be recorded."""
    name = "their_losses:Squared"
    wrapped = {"loss": name}
    assert "does not say" in why_eager(name) and "does not say" in why_eager("standardized", wrapped)
    monkeypatch.setattr(loss_class(name), "can_be_recorded", True)
    assert not why_eager(name) and not why_eager("standardized", wrapped)


def test_it_trains_resumes_and_is_tabulated_through_papermill(theirs, tmp_path, monkeypatch):
    """From a profile that names it, by the command that makes every table."""
    profile, out = tmp_path / "theirs.yaml", tmp_path / "out"
    profile.write_text(PROFILE)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    words = ["reproduce", "--profile", profile, "--only", "same_architecture", "--jobs", "1", "--out", out]
    call = [sys.executable, "-m", "ldrld", *map(str, words)]
    first = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=env)
    assert first.returncode == 0, first.stdout + first.stderr
    table = pd.read_csv(out / "data" / "tables" / "theirs" / "same_architecture.csv").set_index("method")
    assert table.loc["their_losses:Squared", "n"] == 1
    monkeypatch.setenv("LDRLD_OUT", str(out))
    (record,) = [r for r in records("theirs") if r.config.loss == "their_losses:Squared"]
    assert record.code["loss"]["sha256"] == losses.origin("their_losses:Squared")["sha256"]
    again = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=env)
    assert again.returncode == 0 and [r for r in records("theirs") if r.config.loss == record.config.loss] == [record]


NETWORK = '''
"""A network with one convolution a stage."""
import torch.nn.functional as F
from torch import Tensor, nn

from ldrld.models.parts import Output, Staged, classify, conv
from ldrld.models.registry import register


@register("tiny", lr=0.02)
class Tiny(Staged):
    """Two stages of one convolution each."""
    def __init__(
        self,
        num_classes: int = 100,  # outputs of the last layer
    ):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv(3, 4, 3), conv(4, 8, 3, 2), conv(8, 8, 3, 2)
        self.fc = nn.Linear(8, num_classes)

    @property
    def head(self) -> nn.Linear: return self.fc

    @property
    def rows(self) -> tuple: return self.conv2, self.conv3

    def stem(self, x: Tensor) -> Tensor: return F.relu(self.conv1(x))

    def onward(self, x: Tensor, rows: tuple, features: bool = False) -> Output:
        stages, preact = [x], []
        for row in rows:
            preact.append(row(stages[-1]))
            stages.append(F.relu(preact[-1]))
        return classify(self.fc, stages[-1], stages, preact, features)
'''
DATA = '''
"""Squares that are bright on the left or on the right."""
from pathlib import Path

import torch

from ldrld.data.images import ImageData, image_data
from ldrld.data.registry import register


@register("sides", classes=2)
def sides(
    root: Path,  # not used: nothing is on the disk
    download: bool = False,  # not used
) -> ImageData:
    """Images of 16 by 16 pixels, drawn from a seed."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(n) % 2
        pixels = torch.randint(0, 128, (n, 16, 16, 3), generator=generator, dtype=torch.uint8)
        for side in (0, 1): pixels[labels == side, :, 8 * side : 8 * side + 8] += 100
        return pixels, labels

    return image_data("sides", split(128), split(64), classes=("left", "right"), padding=1, flip=False)
'''
BRIER = '''
"""Squared differences of probabilities."""
from torch import Tensor

from ldrld.losses.base import LogitLoss
from ldrld.losses.registry import register


@register("brier")
class Brier(LogitLoss):
    """Squared differences of probabilities: w_ce·CE + w·Σ_c (p^s_c − p^t_c)²."""
    def __init__(
        self,
        weight: float = 1.0,  # w ≥ 0
        ce_weight: float = 1.0,  # w_ce ≥ 0
    ):
        super().__init__()
        self.weight, self.ce_weight = weight, ce_weight

    def row_terms(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        apart = student.softmax(1) - teacher.softmax(1)
        return self.cross_entropy(student, target) | {"brier": self.weight * apart.square().sum(1)}
'''
OWN = """
data: bright sides
dataset: sides
pairs: [[tiny, tiny]]
teacher: {recipe: crd, epochs: 2}
student: {recipe: crd, epochs: 2}
seeds: [0]
methods: [KD, brier]
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project with a loss, a network and a data set more: one file each, nothing else touched."""
    folder = tmp_path_factory.mktemp("copy") / "ldrld"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():  # figures and records too: pages link to them
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name, text in {"losses/logits/brier": BRIER, "models/tiny": NETWORK, "data/sides": DATA}.items():
        (folder / "ldrld" / f"{name}.py").write_text(text.lstrip())
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (folder / ".venv").symlink_to(sys.prefix)
    assert called(folder, "nbdev_export").returncode == 0  # its index lists all modules
    return folder


def called(folder, command, *words):
    """One of the environment's commands, in the copy."""
    env = {**os.environ, "PYTHONPATH": str(folder), "LDRLD_ROOT": str(folder)}
    program = [sys.executable, "-m", command]
    if command in ("lint-imports", "nbdev_export"):
        program = [Path(sys.executable).parent / command]
    call = [*map(str, program), *map(str, words)]
    return subprocess.run(call, capture_output=True, text=True, cwd=folder, env=env)


def test_one_file_each_trains_resumes_and_is_tabulated(copy, tmp_path):
    """The rate is the one that the network registers; the second call trains nothing."""
    profile, out = tmp_path / "own.yaml", tmp_path / "out"
    profile.write_text(OWN)
    words = ["ldrld", "reproduce", "--profile", profile, "--only", "same_architecture", "--jobs", "1", "--out", out]
    first = called(copy, *words)
    assert first.returncode == 0, first.stdout + first.stderr
    table = pd.read_csv(out / "data" / "tables" / "own" / "same_architecture.csv").set_index("method")
    assert table.loc["brier", "n"] == 1
    written = {p: p.stat().st_mtime_ns for p in (out / "data" / "runs" / "own").glob("*.json")}
    assert len(written) == 3 and '"lr": 0.02' in next(iter(written)).read_text()
    again = called(copy, *words)
    assert again.returncode == 0 and written == {p: p.stat().st_mtime_ns for p in written}


def test_the_other_checks_still_pass(copy):
    """Style, imports, words, and the tests that run over all losses, networks and data sets."""
    for words in (["ruff", "check", "ldrld"], ["lint-imports", "--no-cache"], ["mypy"]):
        got = called(copy, *words)
        assert got.returncode == 0, got.stdout + got.stderr
    names = ["test_project.py", "test_models.py", "test_edges.py"]
    got = called(copy, "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *(f"tests/{n}" for n in names))
    assert got.returncode == 0, got.stdout[-3000:]


TABLES = """
from ldrld.experiments.cells import on_pair
from ldrld.experiments.profiles import ablation_pair
from ldrld.experiments.registry import experiment


@experiment("ce_weight", "Weight of the labels", "comparison", by=("weight",), baseline={"weight": 1.0})
def ce_weight(p):
    "LDRLD with less and less cross-entropy."
    for w in (1.0, 0.5):
        yield from on_pair(p, ablation_pair(p), {"weight": w}, "LDRLD", ce_weight=w, depth=10)
"""


@pytest.fixture
def their_tables(tmp_path, monkeypatch):
    """A module of somebody else, with an experiment, and a profile whose last line names it."""
    (tmp_path / "their_tables.py").write_text(TABLES)
    (tmp_path / "theirs.yaml").write_text(PROFILE.replace(', "their_losses:Squared"', "") + EXPERIMENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "theirs.yaml"
    sys.modules.pop("their_tables", None)
    EXPERIMENTS.pop("ce_weight", None)


EXPERIMENT = 'experiments: ["their_tables:ce_weight"]\n'


def test_an_experiment_from_outside_is_found_like_ours(their_tables):
    assert selected(str(their_tables)) == ("ce_weight",)
    e = shown_in("comparison", "their_tables:ce_weight", str(their_tables))
    assert e is EXPERIMENTS["ce_weight"] and (e.figure, e.path) == ("ce_weight", "their_tables:ce_weight")
    assert e.introduction == "# Weight of the labels" and e.label({"weight": 0.5}) == "0.5"
    assert len(e.plan(str(their_tables))) == 2


@pytest.mark.parametrize(
    "notebook, name, told",
    [
        ("comparison", "adws", "unknown experiment 'adws'. Did you mean 'adw'"),
        ("curve", "adw", "its notebook is paper/comparison; paper/curve shows depth, temperature"),
        ("comparison", "claims", "its notebook is paper/claims/claims"),
        ("comparison", "nobody_has:this", "cannot be imported .* expected module:name"),
        ("comparison", "their_tables:ce_wieght", "Did you mean 'ce_weight'"),
    ],
)
def test_a_wrong_experiment_says_which_are_right(their_tables, notebook, name, told):
    with pytest.raises(ValueError, match=told):
        shown_in(notebook, name)


def test_the_name_of_a_notebook_finds_its_experiment_and_an_old_one_a_hint():
    assert find("baselines").name == "rivals" and find("grad_norms").name == "pulls"
    with pytest.raises(ValueError, match="Did you mean 'adw'"):
        find("20_adw", "--only")


def test_what_a_shared_notebook_cannot_draw_is_refused():
    lines = EXPERIMENTS["same_architecture"].lines
    for name, more, told in (("bare", {}, "no baseline"), ("pairs", {"baseline": {"method": "KD"}}, "2 pairs")):
        experiment(name, name, "comparison", **more)(lines)
        with pytest.raises(ValueError, match=told):
            shown_in("comparison", name, "small")
        EXPERIMENTS.pop(name)


def test_a_name_that_is_taken_is_refused(their_tables):
    their_tables.with_name("their_tables.py").write_text(TABLES.replace('"ce_weight"', '"adw"'))
    ours = EXPERIMENTS["adw"]
    with pytest.raises(ValueError, match="experiment 'adw' is declared in ldrld.experiments.ablations and in their_"):
        find("their_tables:adw")
    assert EXPERIMENTS["adw"] is ours


def test_a_table_is_a_line_in_a_profile(their_tables):
    """Runs, table, figure and page through the shared notebook, and the numbers are checked like ours."""
    out = their_tables.parent / "out"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{their_tables.parent}"}
    for words in (["reproduce", "--jobs", "1"], ["verify"]):
        call = [sys.executable, "-m", "ldrld", *words, "--profile", str(their_tables), "--out", str(out)]
        got = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=env)
        assert got.returncode == 0, got.stdout + got.stderr
    assert "tables checked, 0 problems" in got.stdout and "not made yet" not in got.stdout
    table = pd.read_csv(out / "data" / "tables" / "theirs" / "ce_weight.csv")
    assert list(table["weight"]) == [1.0, 0.5] and (table["n"] == 1).all()
    assert (out / "figures" / "theirs" / "ce_weight.svg").exists()
    assert "Weight of the labels" in (out / "runs" / "executed" / "theirs" / "ce_weight.ipynb").read_text()


@pytest.mark.parametrize("notebook", SHARED)
def test_every_shared_notebook_is_shared(notebook):
    assert len([e for e in EXPERIMENTS.values() if e.notebook == notebook]) > 1
