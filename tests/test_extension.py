"""Adding something touches one place: a loss from outside trains, resumes, is recorded and tabulated like ours."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from ldrld import losses
from ldrld.experiments.config import RunConfig, name_of
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
