"""Configurations, names, records, interruption, and repeatability to the last bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from ldrld import losses, models
from ldrld.core import paths
from ldrld import data
from ldrld.experiments import records, runner
from ldrld.models.evaluation import logits_of
from ldrld.experiments.config import RunConfig, name_of

ROOT = Path(__file__).parent.parent
SHORT = {"dataset": "digits", "recipe": "onecycle", "lr": 0.1, "epochs": 2}
TEACHER = RunConfig(model="resnet8", **SHORT)
STUDENT = RunConfig(model="resnet8", loss="kd", teacher=TEACHER, seed=1, **SHORT)


def test_a_teacher_shares_the_split_but_neither_few_images_nor_wrong_labels():
    config = RunConfig(
        model="resnet8", loss="kd", teacher="resnet14", holdout=0.2, train_share=0.5, label_noise=0.1, **SHORT
    )
    assert (config.teacher.holdout, config.teacher.train_share, config.teacher.label_noise) == (0.2, 1.0, 0.0)


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    torch.set_num_threads(1)
    return tmp_path


@pytest.mark.parametrize(
    "wrong",
    [
        {"epcohs": 2},
        {"epochs": "2"},
        {"epochs": 2.5},
        {"epochs": 0},
        {"lr": "0.1"},
        {"lr": 0.0},
        {"seed": -1},
        {"seed": True},
        {"model": "resnet9"},
        {"dataset": "cifar"},
        {"recipe": "cosine"},
        {"loss": "kdd"},
        {"loss": "kd"},
        {"loss_args": {"dept": 3}},
        {"teacher": {"model": "resnet14"}},
        {"loss": "kd", "teacher": {"model": "resnet14", "dataset": "cifar100"}},
        {"precision": "half"},
        {"momentum": 1.0},
    ],
)
def test_a_wrong_setting_is_refused(wrong):
    with pytest.raises(ValidationError):
        RunConfig(**wrong)


def test_a_name_depends_on_every_setting_and_on_nothing_else():
    base = {"model": "resnet8", "loss": "ldrld", "teacher": TEACHER, **SHORT}
    name = name_of(RunConfig(**base))
    assert (
        name
        == name_of(RunConfig(**base, loss_args={"depth": 7, "temperature": 4}))
        == name_of(RunConfig(**{**base, "model": "ResNet8"}))
    )
    others = [
        {"epochs": 3},
        {"seed": 5},
        {"lr": 0.2},
        {"loss_args": {"depth": 6}},
        {"teacher": "resnet14"},
        {"precision": "float32"},
        {"batch_size": 32},
        {"weight_decay": 0.0},
        {"momentum": 0.8},
        {"recipe": "crd"},
        {"train_share": 0.5},
        {"label_noise": 0.1},
        {"holdout": 0.1},
    ]
    assert len({name, *(name_of(RunConfig(**{**base, **other})) for other in others)}) == 1 + len(others)


def test_names_of_committed_records_still_hold():
    """A change that renames finished runs would do days of work again: the schema version is there for that."""
    for folder in (ROOT / "data" / "runs").glob("*"):
        for file in folder.glob("*.json"):
            assert name_of(RunConfig(**json.loads(file.read_text())["config"])) == file.stem


def test_a_run_leaves_a_record_and_is_not_done_twice(out):
    record = runner.run(STUDENT, "t", keep=("weights", "logits"), report=None)
    assert (
        len(record.history) == 2
        and record.last_accuracy == record.history[-1]["test_accuracy"]
        and record.teacher == name_of(TEACHER)
    )
    assert record.best_accuracy == max(h["test_accuracy"] for h in record.history)
    assert set(record.history[0]["terms"]) == {"ce", "kd"}
    said = []
    assert runner.run(STUDENT, "t", report=said.append) == record and "finished before" in said[0]
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("checkpoint.pt"))
    weights = records.KEPT["weights"](record.name, "t")
    z = logits_of(
        models.load_weights(models.build("resnet8", 10), weights),
        *[getattr(data.load("digits"), f) for f in ("test_images", "mean", "std")],
    )
    kept = __import__("numpy").load(records.KEPT["logits"](record.name, "t"))["logits"]
    assert (z.argmax(1).numpy() == kept.argmax(1)).mean() > 0.98  # weights in half precision, logits from the full ones


def test_measures_say_more_than_accuracy(out):
    teacher, student = runner.run(TEACHER, "t", report=None), runner.run(STUDENT, "t", keep=("insight",), report=None)
    assert {"agreement", "overlap", "kendall"} & teacher.measures.keys() == set() and student.measures["kendall"] <= 1
    assert (
        student.measures["parameters"] == student.measures["used_parameters"]
        and student.measures["extra_parameters"] == 0
    )
    assert 0 <= student.measures["ece"] <= 100 and student.measures["top5"] >= student.last_accuracy
    kept = __import__("numpy").load(records.KEPT["insight"](student.name, "t"))
    assert kept["maps"].shape[0] == kept["pictures"].shape[0] == 8 and kept["pooled"].shape[1] == 64


@pytest.mark.parametrize("settings", [{"train_share": 0.3}, {"label_noise": 0.3}, {"holdout": 0.3}])
def test_a_run_on_altered_data(out, settings):
    """Two selections of images need two tables of the teacher's logits."""
    altered = RunConfig(
        model="resnet8",
        loss="kd",
        teacher=TEACHER.model_copy(update={"holdout": settings.get("holdout", 0.0)}),
        seed=1,
        **settings,
        **SHORT,
    )
    plain, record = runner.run(STUDENT, "t", report=None), runner.run(altered, "t", report=None)
    assert record.name != plain.name and record.history != plain.history
    assert record.data["train"] < plain.data["train"] or "label_noise" in settings
    assert (record.data["test"] != plain.data["test"]) == ("holdout" in settings)
    assert record.data["fingerprint"] == plain.data["fingerprint"]


def test_a_lost_file_is_made_again_and_the_record_stays(out):
    record = runner.run(TEACHER, "t", keep=("weights",), report=None)
    before, weights = (
        (paths.records("t") / f"{record.name}.json").read_bytes(),
        records.KEPT["weights"](record.name, "t"),
    )
    first = weights.read_bytes()
    weights.unlink()
    runner.run(TEACHER, "t", keep=("weights",), report=None)
    assert weights.read_bytes() == first and (paths.records("t") / f"{record.name}.json").read_bytes() == before


def test_an_edited_or_damaged_record_is_refused(out):
    record = runner.run(TEACHER, "t", report=None)
    file = paths.records("t") / f"{record.name}.json"
    text = file.read_text()
    for damage in (text[:100], text.replace('"epochs": 2', '"epochs": 3'), "", "[]"):
        file.write_text(damage)
        with pytest.raises(ValueError, match="run again"):
            records.load_record(record.name, "t")


SCRIPT = """
import os, sys, torch
torch.set_num_threads(1)
from ldrld.experiments import runner
from tests.test_runs import STUDENT
lines = []
def report(line):
    if sys.argv[1] == "kill" and "epoch 1/2" in line and "-kd-" in line: os._exit(9)
try: print(runner.run(STUDENT, "t", keep=("weights",), report=report).last_accuracy)
except runner.Paused: print("paused")
"""


def process(out, mode, **env):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, mode],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "LDRLD_OUT": str(out), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
    )


def test_killed_paused_or_undisturbed_the_weights_are_the_same(tmp_path):
    """To the last bit: one thread per process."""
    whole, killed, paused = tmp_path / "whole", tmp_path / "killed", tmp_path / "paused"
    assert process(whole, "").returncode == 0
    assert process(killed, "kill").returncode == 9
    assert not list(killed.glob("data/runs/t/*-kd-*.json")), "a broken run leaves no record"
    assert process(killed, "").returncode == 0
    stops = 0
    while "paused" in (got := process(paused, "", LDRLD_DEADLINE="1")).stdout:
        stops += 1
    assert got.returncode == 0 and stops == 2, got.stderr  # the teacher once, the student once
    made = [next(folder.glob("data/teachers/t/*-kd-*.safetensors")).read_bytes() for folder in (whole, killed, paused)]
    assert made[0] == made[1] == made[2]


def test_two_processes_make_one_teacher(tmp_path):
    configs = [STUDENT.model_copy(update={"seed": s}) for s in (3, 4)]
    code = (
        "import sys, torch; torch.set_num_threads(1); from ldrld.experiments.runner import RunConfig, run; "
        "run(RunConfig.model_validate_json(sys.argv[1], strict=False), 't', report=print)"
    )
    env = {**os.environ, "LDRLD_OUT": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, c.model_dump_json()],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for c in configs
    ]
    said = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert sum(f"{name_of(TEACHER)}  epoch 2/2" in out for out, _ in said) == 1
    assert len(list((tmp_path / "data/runs/t").glob("*.json"))) == 3


def test_every_loss_can_be_configured():
    for name in losses.available():
        teacher = TEACHER if losses.build(name).needs_teacher else None
        assert RunConfig(loss=name, teacher=teacher, **SHORT).loss_args == losses.build(name).hyperparameters


# ---- together ---------------------------------------------------------------------------------------------------

CE = RunConfig(model="resnet8", seed=1, **SHORT)
LDRLD = RunConfig(model="resnet8", loss="ldrld", loss_args={"depth": 4}, teacher=TEACHER, seed=1, **SHORT)


def without_times(record):
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in record.history]
    return record.last_accuracy, history, record.config, record.teacher


def test_together_each_learns_what_it_learns_alone(out, monkeypatch):
    alone = [runner.run(config, "alone", report=None) for config in (CE, STUDENT, LDRLD)]
    together = runner.run_together([(CE, ()), (STUDENT, ("logits",)), (LDRLD, ("weights",))], "together", report=None)
    assert [without_times(r) for r in together] == [without_times(r) for r in alone]
    assert [r.together for r in alone] == [1, 1, 1] and [r.together for r in together] == [3, 3, 3]
    assert (
        records.KEPT["logits"](name_of(STUDENT), "together").exists()
        and records.KEPT["weights"](name_of(LDRLD), "together").exists()
    )
    assert not list(out.rglob("checkpoint.pt"))


def test_one_that_is_finished_and_one_that_is_ahead_join_those_that_begin(out, monkeypatch):
    whole = [runner.run(config, "whole", report=None) for config in (CE, STUDENT, LDRLD)]
    runner.run(CE, "t", report=None)
    runner.run(TEACHER, "t", keep=("weights",), report=None)
    monkeypatch.setenv("LDRLD_DEADLINE", "0")
    with pytest.raises(runner.Paused, match="paused after epoch 1 of 2"):
        runner.run(STUDENT, "t", report=None)
    monkeypatch.delenv("LDRLD_DEADLINE")
    said = []
    records = runner.run_together([(CE, ()), (STUDENT, ()), (LDRLD, ())], "t", report=said.append)
    assert [without_times(r) for r in records] == [without_times(r) for r in whole]
    assert records[0].together == 1 and any("finished before" in line for line in said)


def test_a_cohort_that_was_paused_continues(out, monkeypatch):
    cohort = [(CE, ()), (STUDENT, ())]
    whole = runner.run_together(cohort, "whole", report=None)
    runner.run(TEACHER, "t", keep=("weights",), report=None)
    monkeypatch.setenv("LDRLD_DEADLINE", "0")
    with pytest.raises(runner.Paused, match="paused after epoch 1 of 2"):
        runner.run_together(cohort, "t", report=None)
    assert len(list(out.rglob("checkpoint.pt"))) == 2 and not list((out / "data/runs/t").glob("*-kd-*"))
    monkeypatch.delenv("LDRLD_DEADLINE")
    resumed = runner.run_together(cohort, "t", report=None)
    assert [without_times(r) for r in resumed] == [without_times(r) for r in whole]


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 2},
        {"epochs": 3},
        {"batch_size": 32},
        {"precision": "float32"},
        {"train_share": 0.5},
        {"label_noise": 0.1},
    ],
)
def test_runs_that_see_other_images_are_not_trained_together(out, other):
    with pytest.raises(ValueError, match="must share dataset, seed, epochs"):
        runner.run_together([(CE, ()), (RunConfig(**{**CE.model_dump(), **other}), ())], "t")


def test_cohorts_are_packed_in_order_and_evenly():
    from ldrld.batch.pending import cohorts

    make = lambda loss, seed, **args: (
        RunConfig(
            model="resnet8", loss=loss, loss_args=args, teacher=None if loss == "ce" else TEACHER, seed=seed, **SHORT
        ),
        (),
    )
    todo = [make("ldrld", seed, depth=d) for d in (2, 3, 4, 5, 6, 7) for seed in (0, 1)] + [make("ce", 0)]
    packed = cohorts(todo, 5)
    assert [len(c) for c in packed] == [3, 3, 3, 3, 1] and sum(packed, [])[:3] == [todo[0], todo[2], todo[4]]
    assert all(len({(config.seed, config.teacher and name_of(config.teacher)) for config, _ in c}) == 1 for c in packed)
    assert [len(c) for c in cohorts(todo, 1)] == [1] * 13


def test_a_compiled_network_learns_the_same_to_rounding(out, monkeypatch):
    from ldrld.data import load
    from ldrld.training.loop import Student, train_together

    monkeypatch.setattr(
        torch, "compile", lambda model, **how: torch._dynamo.optimize("aot_eager")(model)
    )  # inductor needs a C++ compiler
    digits, results = load("digits"), []
    for compiled in (False, True):
        torch.manual_seed(0)
        student = Student(models.build("resnet8", 10), losses.build("ce"), "onecycle", 0.1, compiled=compiled)
        ((row,),) = train_together([student], digits, epochs=1, batch_size=512)
        results.append((row["terms"]["ce"], student.model.state_dict()["fc.weight"]))
    assert student.network is not student.model and results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize("recipe", ["crd", "crd-warmup", "ldrld-released", "onecycle"])
def test_training_follows_the_schedule_of_its_recipe(out, recipe):
    from ldrld.data import load
    from ldrld.training.loop import train
    from ldrld.training.recipes import schedule

    digits, epochs = load("digits"), 8
    rows = list(
        train(
            models.build("resnet8", 10),
            losses.build("ce"),
            digits,
            recipe=recipe,
            epochs=epochs,
            lr=0.1,
            batch_size=600,
        )
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1, momentum=0.9)
    steps = -(-len(digits.train_labels) // 600)
    scheduler, per_batch = schedule(optimizer, recipe, epochs, steps)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        for _ in range(steps if per_batch else 1):
            optimizer.step()
            scheduler.step()
    assert [row["lr"] for row in rows] == pytest.approx(rates) and len(set(rates)) > 2
