"""The command line and the batch: their output, with failures, budgets and invalid input."""

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
from jupyter_client.connect import LocalPortCache

import commands

from ldrld.batch.notebooks import execute
from ldrld.experiments.config import RunConfig

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.yaml"
ldrld = partial(commands.ldrld, OMP_NUM_THREADS=None)  # the command itself must see to its threads
pytestmark = pytest.mark.xdist_group("batch")  # they share what the first of them makes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tiny profile's first table, made once through notebooks."""
    out = tmp_path_factory.mktemp("made")
    got = ldrld("reproduce", "--profile", TINY, "--only", "same_architecture", "--out", out)
    assert got.returncode == 0, got.stdout + got.stderr
    return out, got


def test_reproduce_makes_records_tables_and_logs(made):
    out, got = made
    assert len(list((out / "data/runs/tiny").glob("*.json"))) == 7  # a teacher, three methods, two seeds
    table = pd.read_csv(out / "data/tables/tiny/same_architecture.csv")
    assert table["n"].tolist() == [2, 2, 2] and table["method"].tolist() == ["CE", "KD", "LDRLD"]
    assert {p.suffix for p in (out / "data/tables/tiny").iterdir()} == {".csv", ".md", ".tex"}
    assert (
        len(list((out / "runs/executed/tiny").glob("*.ipynb"))) == 6
    )  # a teacher, two CE, two cohorts of KD and LDRLD, a table
    assert "8 done, 0 paused, 0 failed" in got.stdout and "tables:" in got.stdout


def test_executed_notebooks_took_their_parameters(made):
    """The injected cell must come after the defaults, or they would overwrite it."""
    for file in (made[0] / "runs/executed/tiny").glob("digits-*.ipynb"):
        tags = [
            c["metadata"].get("tags", []) for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code"
        ]
        assert "parameters" in tags[0] and "injected-parameters" in tags[1]


def test_finished_work_is_skipped(made):
    out, _ = made
    before = {p: p.stat().st_mtime_ns for p in (out / "data/runs/tiny").rglob("*.json")}
    got = ldrld("reproduce", "--profile", TINY, "--only", "same_architecture", "--out", out)
    assert "7 finished before" in got.stdout and before == {p: p.stat().st_mtime_ns for p in before}


def test_verify_finds_a_changed_digit(made, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(made[0], out)
    words = ("verify", "--profile", TINY, "--out", out)
    others = {p.stem for p in (out / "data/tables/tiny").glob("*.csv")}
    assert others == {"same_architecture"}
    good = ldrld(*words)
    assert good.returncode == 0 and "1 tables checked, 0 problems" in good.stdout, good.stdout + good.stderr
    assert not [line for line in good.stdout.splitlines() if "same_architecture" in line]
    csv = out / "data/tables/tiny/same_architecture.csv"
    table = pd.read_csv(csv)
    table.loc[1, "sd"] += 0.01
    table.to_csv(csv, index=False)
    bad = ldrld(*words)
    assert bad.returncode == 1 and "KD: sd is" in bad.stdout


def test_a_failing_run_is_reported_and_the_rest_continues(tmp_path):
    """A folder lies where one run keeps its checkpoint, so that run must fail."""
    from ldrld.experiments.catalog import EXPERIMENTS

    plan = EXPERIMENTS["same_architecture"].plan(str(TINY))
    bad = plan["name"].iloc[0]
    (tmp_path / "runs" / bad / "checkpoint.pt").mkdir(parents=True)
    got = ldrld("reproduce", "--profile", TINY, "--only", "same_architecture", "--out", tmp_path)
    assert got.returncode == 1
    assert f"failed: {bad}: run/train.ipynb, cell" in got.stdout and "IsADirectoryError" in got.stdout
    assert len(list((tmp_path / "data/runs/tiny").glob("*.json"))) == 6
    assert pd.read_csv(tmp_path / "data/tables/tiny/same_architecture.csv")["n"].tolist() == [1, 2, 2]


def test_a_kernel_whose_port_was_taken_is_started_anew(tmp_path, monkeypatch):
    """The first kernel is told a port that is taken; one that is always told it is given up, and told."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        find, told, held = LocalPortCache.find_available_port, [], {1}

        def first_taken(self, ip):
            told.append(ip)
            return taken.getsockname()[1] if len(told) in held else find(self, ip)

        monkeypatch.setattr(LocalPortCache, "find_available_port", first_taken)
        monkeypatch.setenv("LDRLD_ROOT", str(tmp_path))
        monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
        (tmp_path / "nbs").mkdir()
        nbformat.write(
            nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 1")]), tmp_path / "nbs" / "one.ipynb"
        )
        assert execute("one.ipynb", "once", {}, "try").status == "done" and len(told) == 10  # five ports each
        held.update(range(1000))
        outcome = execute("one.ipynb", "never", {}, "try")
        assert outcome.status == "failed" and "Kernel died" in outcome.detail and len(told) == 25


def test_a_time_budget_pauses_and_continues(tmp_path):
    words = (
        "reproduce",
        "--profile",
        TINY,
        "--only",
        "probability_gap",
        "--out",
        tmp_path,
        "--no-notebooks",
        "--jobs",
        1,
    )
    first = ldrld(*words, "--time-budget", "1s")
    assert first.returncode == 0 and "call again" in first.stdout, first.stdout + first.stderr
    second = ldrld(*words)
    assert (
        second.returncode == 0
        and "0 paused" in second.stdout
        and len(list((tmp_path / "data/runs/tiny").glob("*.json"))) == 1
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("reproduce", "--profile", "quik"), "Did you mean 'quick'"),
        (("reproduce", "--only", "dept"), "Did you mean 'depth'"),
        (("reproduce", "--time-budget", "soon"), "is not a time"),
        (("reproduce", "--profile", "nowhere.yaml"), "nowhere.yaml"),
        (("run", "epcohs=2"), "epcohs"),
        (("run", "epochs=two"), "epochs"),
        (("run", "epochs"), "expected name=value"),
        (("run", "loss_args={depth: 3"), "'loss_args={depth: 3'"),
        (("run", "loss=kd", "teacher=resnet8", "teacher.lr=@x"), "'teacher.lr=@x'"),
        (("run", "teacher=0.1"), "teacher=0.1: expected the name of a network"),
        (("run", "lr=10**400"), "lr='10**400'"),
        (("run", "loss=sdd", "teacher=resnet8", "loss_args.regions=nan"), "regions"),
        (("run", "loss=corrected", "teacher=resnet8", "loss_args.loss={}"), "loss_args={'loss': {}}"),
        (("run", "a: &a [*a]=1"), "unknown setting"),
        (("run", "seed=1", "--profile", "../elsewhere"), "expected the name of a folder"),
        (("run", "seed=1", "--profile", ""), "expected the name of a folder"),
        (("tune", "--space", "alpha=[*x]"), "undefined alias"),
        (("run", "model=resnet8", "--keep", "wieghts"), "Did you mean 'weights'"),
    ],
)
def test_a_mistake_is_reported_before_anything_runs(words, says, tmp_path):
    got = ldrld(*words, LDRLD_OUT=str(tmp_path))
    assert got.returncode == 2 and says in got.stderr and "Traceback" not in got.stderr, got.stderr
    assert not list(tmp_path.rglob("*.json"))


def test_run_from_the_command_line(tmp_path):
    got = ldrld(
        "run",
        "dataset=digits",
        "model=resnet8",
        "loss=ldrld",
        "loss_args.depth=3",
        "teacher=resnet8",
        "recipe=onecycle",
        "epochs=1",
        "lr=0.1",
        "--out",
        tmp_path,
    )
    assert got.returncode == 0, got.stderr
    record = json.loads(next((tmp_path / "data/runs/try").glob("*-ldrld-*.json")).read_text())
    assert record["machine"]["threads"] == 1, "or the result would not repeat"
    assert record["config"]["loss_args"]["depth"] == 3 and record["config"]["teacher"]["epochs"] == 1


def test_data_says_what_it_is_or_how_to_get_it(tmp_path):
    assert json.loads(ldrld("data", "digits").stdout)["classes"] == 10
    got = ldrld("data", "cifar10", LDRLD_DATA=str(tmp_path))
    assert got.returncode == 1 and "cifar100" in got.stderr and "Traceback" not in got.stderr


@pytest.mark.parametrize(
    ("notebook", "parameters", "says"),
    [
        ("train", ("-p", "epcohs", "3"), "WrongSetting: unknown parameter 'epcohs'. Did you mean 'epochs'"),
        ("train", ("-p", "epochs", "two"), "WrongSetting: epochs='two': Input should be a valid integer"),
        ("train", ("-p", "model", "resnet9"), "resnet9"),
        ("train", ("-y", "{keep: [wieghts]}"), "Did you mean 'weights'"),
        ("train", ("-y", "{keep: logits}"), "keep='logits': expected a list"),
        ("train", ("-p", "teacher", "None", "-p", "loss", "kd"), "teacher is missing"),
        ("train", ("-p", "dataset", "tiny-imagenet"), "Tiny-ImageNet is not in"),
        (
            "cohort",
            ("-y", "{runs: [{dataset: digits, epochs: 1}, {dataset: digits, epochs: two}]}"),
            "WrongSetting: runs[1]: epochs='two'",
        ),
        ("cohort", ("-y", "{runs: {epochs: 1}}"), "expected a list of settings"),
        ("cohort", ("-y", "{runs: [digits]}"), "expected a dict of settings"),
    ],
)
def test_papermill_by_hand_refuses_a_mistake_in_one_line(notebook, parameters, says, tmp_path):
    got = subprocess.run(
        [
            Path(sys.executable).parent / "papermill",
            ROOT / f"nbs/run/{notebook}.ipynb",
            tmp_path / "out.ipynb",
            "--no-progress-bar",
            *parameters,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "LDRLD_OUT": str(tmp_path), "LDRLD_DATA": str(tmp_path)},
        cwd=tmp_path,
    )
    assert got.returncode == 1 and says in got.stderr, got.stderr
    (error,) = [
        o
        for c in json.loads((tmp_path / "out.ipynb").read_text())["cells"]
        for o in c.get("outputs", [])
        if o["output_type"] == "error"
    ]
    assert error["ename"] == "WrongSetting" and len(error["traceback"]) == 1


@pytest.mark.parametrize("notebook", ["train", "cohort"])
def test_papermill_knows_the_type_of_every_parameter(notebook):
    told = papermill.inspect_notebook(str(ROOT / f"nbs/run/{notebook}.ipynb"))
    assert told and all(p["inferred_type_name"] not in ("None", "") and p["help"] for p in told.values())
    if notebook == "train":
        assert (
            set(told) == {"profile", "keep", *RunConfig.model_fields} and told["epochs"]["inferred_type_name"] == "int"
        )


def test_the_example_of_the_commands_teaches_something(tmp_path):
    page = json.loads((ROOT / "nbs" / "pages" / "reproduce.ipynb").read_text(encoding="utf-8"))
    lines = "".join(page["cells"][0]["source"]).splitlines()
    (line,) = [line for line in lines if "papermill nbs/run/train.ipynb" in line]
    words = line.split()[1:]
    got = subprocess.run(
        [
            Path(sys.executable).parent / "papermill",
            ROOT / words[0],
            tmp_path / words[1],
            "--no-progress-bar",
            *words[2:],
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "LDRLD_OUT": str(tmp_path)},
        cwd=ROOT,
    )
    assert got.returncode == 0, got.stderr
    student, teacher = sorted(
        (json.loads(f.read_text()) for f in tmp_path.glob("data/runs/try/*.json")),
        key=lambda r: r["config"]["loss"] == "ce",
    )
    assert student["last_accuracy"] > 90 and teacher["last_accuracy"] > 90 and student["config"]["seed"] == 1
