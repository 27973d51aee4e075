"""What is written down about a run: that it diverged, who trained it, and which code did."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

import commands

from ldrld import losses, models
from ldrld.core.files import sha256_of
from ldrld.core.provenance import code_of
from ldrld import data
from ldrld.experiments import runner
from ldrld.experiments.config import RunConfig, name_of
from ldrld.experiments.records import Divergence, divergence_path, load_divergence, load_record, odd_records
from ldrld.models.evaluation import set_numerics
from ldrld.results.statistics import collect, summarise
from ldrld.results.tables import save_table, shown
from ldrld.results.verification import verify_table
from ldrld.training.divergence import Diverged
from ldrld.training.loop import Student, train_together

ROOT = Path(__file__).parent.parent
GOOD = RunConfig(dataset="digits", model="resnet8", recipe="onecycle", epochs=2, lr=0.1)
BAD = RunConfig(dataset="digits", model="resnet8", recipe="onecycle", epochs=1, lr=1e6)


def ldrld(*words, out):
    """The command with its results in `out`."""
    return commands.ldrld(*words, "--out", out, OMP_NUM_THREADS="1")


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    return tmp_path


# ---- diverged --------------------------------------------------------------------------------------------------------


def test_a_diverged_run_on_the_command_line(out):
    """It says where, exits 1, leaves no record, and the folder can be read afterwards."""
    settings = ("dataset=digits", "model=resnet8", "recipe=onecycle", "epochs=1", "lr=1e6")
    for _ in range(2):  # the second call knows it
        got = ldrld("run", *settings, out=out)
        assert got.returncode == 1 and "diverged in epoch 1, step" in got.stdout and "try a lower lr" in got.stdout, (
            got.stdout + got.stderr
        )
    assert (
        not list((out / "data/runs/try").glob("*.json"))
        and len(list((out / "data/runs/try/diverged").glob("*.json"))) == 1
    )
    assert ldrld("run", *settings[:4], "lr=0.1", out=out).returncode == 0
    got = ldrld("status", "--profile", "try", out=out)
    assert got.returncode == 0 and "digits-resnet8-ce" in got.stdout
    assert odd_records("try") == {}


def test_the_others_of_a_cohort_continue(out):
    config = GOOD.model_copy(update={"epochs": 1})
    with pytest.raises(Diverged, match=name_of(BAD)):
        runner.run_together([(BAD, ()), (config, ())], "t", report=None)
    assert load_record(name_of(config), "t") and load_record(name_of(BAD), "t") is None
    found = load_divergence(name_of(BAD), "t")
    assert (found.epoch, found.term) == (1, "logits") and found.value in ("nan", "inf") and found.history == []
    assert not (out / "runs" / name_of(BAD) / "checkpoint.pt").exists()


def test_a_student_of_a_diverged_teacher(out):
    student = RunConfig(dataset="digits", model="resnet8", loss="kd", recipe="onecycle", epochs=1, lr=0.1, teacher=BAD)
    with pytest.raises(Diverged, match=name_of(BAD)):
        runner.run(student, "t", report=None)
    assert load_divergence(name_of(student), "t") is None  # it never began


def test_an_outcome_that_was_edited_is_refused(out):
    with pytest.raises(Diverged):
        runner.run(BAD, "t", report=None)
    path = divergence_path(name_of(BAD), "t")
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "config": {**told["config"], "seed": 3}}))
    with pytest.raises(ValueError, match="holds the settings of"):
        load_divergence(name_of(BAD), "t")
    path.write_text("{")
    with pytest.raises(ValueError, match="delete it and run again"):
        load_divergence(name_of(BAD), "t")


def test_weights_that_break_in_the_last_step(out):
    """All losses were finite, the network is not: its logits on the test images tell."""
    torch.manual_seed(0)
    digits, student = data.load("digits"), Student(models.build("resnet8", 10), losses.build("ce"), "crd", 0.1)
    end = Student.step

    def last_step_breaks(self, batch, dtype):
        end(self, batch, dtype)
        if self.seen == len(digits.train_labels):
            self.model.conv1.weight.data.fill_(float("nan"))

    student.step = last_step_breaks.__get__(student)
    assert [row for (row,) in train_together([student], digits, epochs=1)] == [None]
    assert student.diverged.term == "test logits"


def test_tables_say_diverged(out, tmp_path):
    """A batch goes on without them, does not try them again, and its tables and their check know."""
    profile = tmp_path / "wild.yaml"
    profile.write_text("""
data: handwritten digits
dataset: digits
pairs: [[resnet8, resnet8]]
teacher: {recipe: onecycle, epochs: 1, lr: 0.1}
student: {recipe: onecycle, epochs: 1, lr: 1.0e+6}
seeds: [0]
methods: [CE, KD]
first: [CE, KD]
experiments: [same_architecture]
""")
    got = ldrld("reproduce", "--profile", str(profile), "--no-notebooks", "--jobs", "1", out=out)
    assert "diverged" in got.stdout and "0 failed, 2 diverged" in got.stdout, got.stdout + got.stderr
    table = summarise(collect("same_architecture", str(profile)), "same_architecture")
    assert list(shown(table)["last epoch, %"]) == ["1 diverged", "1 diverged"] and list(table["n"]) == [0, 0]
    save_table(table, "same_architecture", "", str(profile))
    assert verify_table("same_architecture", str(profile)) == []
    again = ldrld("reproduce", "--profile", str(profile), "--no-notebooks", "--jobs", "1", out=out)
    assert "runs:" not in again.stderr, "what diverged is tried again"


# ---- who trained it -------------------------------------------------------------------------------------------------


def test_a_run_begun_here_and_ended_there_names_both(out, monkeypatch):
    machine = {"processor": "one", "gpu": None}
    made = {"code": {"commit": "c"}, "libraries": {"torch": "1"}, "machine": machine}
    monkeypatch.setattr(runner, "provenance", lambda device="cpu": {**made, "machine": dict(machine)})
    monkeypatch.setenv("LDRLD_DEADLINE", "0")
    with pytest.raises(runner.Paused):
        runner.run(GOOD, "t", report=None)
    monkeypatch.delenv("LDRLD_DEADLINE")
    machine["processor"] = "another"
    record = runner.run(GOOD, "t", report=None)
    assert [(leg["from_epoch"], leg["machine"]["processor"]) for leg in record.legs] == [(1, "one"), (2, "another")]
    assert load_record(record.name, "t") == record


def test_a_run_of_one_machine_has_no_legs(out, monkeypatch):
    monkeypatch.setenv("LDRLD_DEADLINE", "0")
    with pytest.raises(runner.Paused):
        runner.run(GOOD, "t", report=None)
    monkeypatch.delenv("LDRLD_DEADLINE")
    assert runner.run(GOOD, "t", report=None).legs == []


# ---- which code did -------------------------------------------------------------------------------------------------


def test_unknown_is_not_unchanged(tmp_path, monkeypatch):
    monkeypatch.setenv("LDRLD_ROOT", str(tmp_path))
    assert {k: code_of()[k] for k in ("commit", "changed")} == {"commit": None, "changed": None}


def test_a_checkout_around_the_folder_is_not_ours(tmp_path, monkeypatch):
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    (tmp_path / "inside").mkdir()
    monkeypatch.setenv("LDRLD_ROOT", str(tmp_path / "inside"))
    assert code_of()["commit"] is None
    monkeypatch.setenv("LDRLD_ROOT", str(tmp_path))
    assert len(code_of()["commit"]) == 40


def test_a_packed_folder_knows_whether_it_is_what_was_packed(tmp_path, monkeypatch):
    monkeypatch.setenv("LDRLD_ROOT", str(tmp_path))
    (tmp_path / "ldrld").mkdir()
    (tmp_path / "ldrld" / "a.py").write_text("x = 1\n")
    files = {"ldrld/a.py": sha256_of(tmp_path / "ldrld" / "a.py")}
    (tmp_path / "packed.json").write_text(json.dumps({"version": "1", "commit": "c", "changed": False, "files": files}))
    assert code_of() == {"version": "1", "commit": "c", "changed": False, "as_packed": True}
    (tmp_path / "ldrld" / "a.py").write_text("x = 2\n")
    assert code_of()["as_packed"] is False
    (tmp_path / "ldrld" / "a.py").write_text("x = 1\n")
    (tmp_path / "ldrld" / "b.py").write_text("")
    assert code_of()["as_packed"] is False  # a file more


def test_numerics_of_a_gpu_are_set():
    """What a GPU run would compute with; nothing is touched for a CPU."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    set_numerics("cpu")
    assert torch.backends.cudnn.allow_tf32
    set_numerics("cuda")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    set_numerics("cuda", deterministic=False)
    assert torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False


def test_a_divergence_is_strict():
    with pytest.raises(ValueError):
        Divergence(
            name="x",
            config=BAD,
            epoch=0,
            step=1,
            term="ce",
            value="nan",
            lr=1.0,
            history=[],
            finished="",
            code={},
            libraries={},
            machine={},
        )
