"""Searches: what is refused, what is held out, and what a kill, a second process or a lost file changes: nothing."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import optuna
import pandas as pd
import pytest
import torch
import typer
from pydantic import ValidationError
from typer.testing import CliRunner

from ldrld import cli, data
from ldrld.cli.run import run as run_command
from ldrld.batch.tuning.report import command, shown
from ldrld.batch.tuning.search import Search, declare, declared, search_for, studies, trial_config
from ldrld.batch.tuning.space import SPACES, dimension, ends, space_from, space_of
from ldrld.batch.tuning.study import study_of, values_of
from ldrld.batch.tuning.trials import table_of, tune
from ldrld.core import paths
from ldrld.experiments import records, runner
from ldrld.experiments.cells import method_config
from ldrld.experiments.methods import Method
from ldrld.experiments.profiles import Profile, profile

ROOT = Path(__file__).parent.parent
SHORT = {"recipe": "onecycle", "lr": 0.1, "batch_size": 64, "precision": "float32"}
TINY = Profile(
    name="tiny",
    data="handwritten digits",
    dataset="digits",
    pairs=(("resnet8", "resnet8"),),
    teacher={"epochs": 1, **SHORT},
    student={"epochs": 2, **SHORT},
)
SPACE = {"alpha": "0.5..50:log", "depth": "2..10"}
optuna.logging.set_verbosity(optuna.logging.WARNING)


def tiny_search(**more):
    return search_for(TINY, **{"space": SPACE, "holdout": 0.8, **more})


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    torch.set_num_threads(1)
    return tmp_path


# ---- spaces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, says",
    [
        ("alfa=1..3", "Did you mean 'alpha'"),
        ("alpha=3..1", "the lower first"),
        ("alpha=1..1", "the lower first"),
        ("alpha=0..3:log", "try 0.003..3:log"),
        ("alpha=-1..3", "alpha must be a finite number of at least 0"),
        ("alpha=0.1-30", "Expected a range such as 0.1..30"),
        ("alpha=1..3:0", "steps of 0"),
        ("temperature=1..8:2", "do not end at 8"),
        ("temperature=0..8", "above 0"),
        ("depth=1..20", "at least 2"),
        ("depth=2.5..20", "whole numbers"),
        ("depth=2,3.5", "depth must be an integer"),
        ("weighting=1..2", "its default is 'adw'"),
        ("weighting=adw,most", "'erd'"),
        ("normalize=true,maybe", "True or False"),
        ("alpha=[", "Expected"),
        ("alpha", "expected name=candidates"),
        ("alpha=", "expected name=candidates"),
        ("alpha=1..2 alpha=1..3", "given twice"),
        ("depth=2..20", "at most the number of classes, 10"),
    ],
)
def test_a_mistake_in_a_space_says_what_would_work(word, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        space_of("ldrld", 10, space_from([word]))


@pytest.mark.parametrize(
    "text, kind, values",
    [
        ("alpha=0.1..30", optuna.distributions.FloatDistribution, (0.1, 30.0)),
        ("alpha=1e-3..3e1:log", optuna.distributions.FloatDistribution, (0.001, 30.0)),
        ("depth=2..20", optuna.distributions.IntDistribution, (2, 20)),
        ("depth=2..8:2", optuna.distributions.IntDistribution, (2, 8)),
        ("temperature=1,4,1e1", optuna.distributions.CategoricalDistribution, (1.0, 4.0, 10.0)),
        ("weighting=none", optuna.distributions.CategoricalDistribution, ("none",)),
        ("normalize=true,false", optuna.distributions.CategoricalDistribution, (True, False)),
    ],
)
def test_what_a_space_may_say(text, kind, values):
    made = dimension("ldrld", *text.split("="))
    assert type(made) is kind and ends(made) == values


def test_every_space_that_comes_with_a_loss_fits_it():
    from ldrld import losses

    for loss in set(SPACES) & set(losses.available()):
        for classes in (10, 100):
            assert space_of(loss, classes)
    with pytest.raises(ValueError, match="has no default space.*ce_weight=1.0"):
        space_of("ce", 10)
    assert search_for(TINY, "ce", space={"ce_weight": "0.5..2"}).base.teacher is None


# ---- what is held out -------------------------------------------------------------------------------------------


def test_the_test_set_is_never_used(out, monkeypatch):
    """Every run of a search, the teacher's included, is given other images."""
    digits, given, train_together = data.load("digits"), [], runner.train_together
    monkeypatch.setattr(
        runner,
        "train_together",
        lambda students, images, *more: given.append(images) or train_together(students, images, *more),
    )
    table = tune(tiny_search(), 1, report=None)
    bytes_of = lambda *splits: {image.numpy().tobytes() for split in splits for image in split}
    test, train = bytes_of(digits.test_images), bytes_of(digits.train_images)
    assert len(given) == 2 and len(table) == 1
    for images in given:
        assert bytes_of(images.train_images, images.test_images) == train and not train & test
        assert not bytes_of(images.train_images) & bytes_of(images.test_images)
        assert images.test_labels.bincount().float().div(digits.train_labels.bincount()).sub(0.8).abs().max() < 0.01


def test_a_search_without_held_out_images_is_refused():
    with pytest.raises(ValidationError, match="compared on the test set"):
        tiny_search(holdout=0.0)
    good = tiny_search()
    knows = good.base.model_copy(update={"teacher": good.base.teacher.model_copy(update={"holdout": 0.0})})
    with pytest.raises(ValidationError, match="it would be trained on the held-out images"):
        Search(**{**dict(good), "base": knows})
    values = {"alpha": 3.0, "depth": 4}
    config = good.config(values, 2)
    assert (
        config.holdout == config.teacher.holdout == 0.8
        and config.seed == 2
        and {k: config.loss_args[k] for k in values} == values
    )


# ---- suggestions ------------------------------------------------------------------------------------------------


def suggested(search, n, opened_anew=False):
    """What n trials try if their results are 1, 2, 3, …"""
    study, got = study_of(search), []
    for k in range(n):
        if opened_anew:
            study = study_of(search)
        trial = study.ask(search.dimensions)
        got.append(values_of(search, trial.params))
        study.tell(trial, k)
    return got


def test_suggestions_depend_on_the_seed_alone(tmp_path, monkeypatch):
    got = {}
    for key, seed, opened_anew in (("one", 0, False), ("again", 0, False), ("anew", 0, True), ("other", 1, False)):
        monkeypatch.setenv("LDRLD_OUT", str(tmp_path / key))
        got[key] = suggested(tiny_search(seed=seed, startup=3), 8, opened_anew)
    assert got["one"] == got["again"] == got["anew"] and got["one"][0] != got["other"][0]
    assert len({tuple(values.items()) for values in got["one"]}) > 5
    assert all(
        0.5 <= v["alpha"] <= 50 and v["alpha"] == float(f"{v['alpha']:.3g}") and 2 <= v["depth"] <= 10
        for v in got["one"]
    )


def test_defaults_come_first_and_outside_of_the_space_beside_it(out):
    table = tune(tiny_search(), 2, report=None)
    assert (
        table["defaults"].tolist() == [True, False]
        and table.loc[0, ["alpha", "depth"]].tolist() == [10.5, 7]
        and table.loc[0, "gain"] == 0
    )
    beside = tiny_search(space={"alpha": "0.5..5:log"}, name="beside")
    table = tune(beside, 1, report=None)
    assert (
        table["trial"].isna().tolist() == [True, False]
        and table["defaults"].tolist() == [True, False]
        and table.loc[1, "alpha"] <= 5
    )
    assert table.loc[1, "gain"] == table.loc[1, "held_out"] - table.loc[0, "held_out"]
    assert shown(beside, table)["trial"].tolist().count("– (defaults)") == 1


def test_a_trial_of_several_seeds_is_their_mean(out):
    search = tiny_search(seeds=2)
    line = tune(search, 1, report=None).iloc[0]
    accuracies = [records.load_record(name, search.folder).last_accuracy for name in line["runs"].split()]
    assert len(set(accuracies)) == 2 and line["held_out"] == pytest.approx(sum(accuracies) / 2) and line["sd"] > 0
    assert study_of(search).best_value == pytest.approx(line["held_out"])


# ---- what must not matter ---------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, optuna
from ldrld.batch.tuning.trials import tune
from tests.test_tune import tiny_search
def report(line):
    print(line, flush=True)
    if sys.argv[1] == "kill" and line.startswith("trial 1 ") and "epoch 1/2" in line: os._exit(9)
tune(tiny_search(), int(sys.argv[2]), report)
"""


def process(out, *words):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LDRLD_OUT": str(out), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def test_killed_lost_or_undisturbed_the_trials_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path / "whole"))
    search, said = tiny_search(), []
    whole = tune(search, 3, report=None)

    killed = process(tmp_path / "killed", "kill", "3")
    assert killed.communicate() and killed.returncode == 9
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path / "killed"))
    assert [t.state.name for t in study_of(search).trials] == ["COMPLETE", "RUNNING"]
    pd.testing.assert_frame_equal(tune(search, 3, said.append), whole)
    assert any(line.startswith("trial 1 ") and "resumes after epoch 1/2" in line for line in said) and not any(
        line.startswith("trial 0") for line in said
    )

    (studies(search.folder) / f"{search.name}.journal").unlink()  # the records alone give the study back
    said.clear()
    pd.testing.assert_frame_equal(tune(search, 3, said.append), whole)
    assert not any("epoch" in line for line in said)


def test_two_processes_share_a_study(tmp_path, monkeypatch):
    both = [process(tmp_path, "", "3") for _ in range(2)]
    said = [p.communicate() for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    search = tiny_search()
    table, done = table_of(search), [set(re.findall(r"^trial (\d+): ", out, re.M)) for out, _ in said]
    assert (
        table["trial"].tolist() == [0, 1, 2]
        and table["runs"].is_unique
        and table["defaults"].tolist() == [True, False, False]
    )
    assert not done[0] & done[1] and done[0] | done[1] == {"0", "1", "2"}
    assert len(list(paths.records(search.folder).glob("*.json"))) == 4  # the teacher was made once


def test_a_name_belongs_to_one_search(out):
    declare(tiny_search())
    declare(tiny_search())
    for other, says in (
        ({"space": {**SPACE, "alpha": "1..5"}}, "space.alpha was '0.5..50:log', now '1..5'"),
        ({"epochs": 1}, "base.epochs was 2, now 1"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"holdout": 0.5}, "base.holdout was 0.8, now 0.5"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            tune(tiny_search(**other), 1, report=None)
    declare(tiny_search(epochs=1, name="shorter"))
    file = studies("tiny-tune") / f"{tiny_search().name}.json"
    file.write_text(file.read_text()[:50])
    with pytest.raises(ValueError, match="is not a declaration of a search"):
        declare(tiny_search())


def test_a_damaged_study_says_how_to_continue(out):
    search = tiny_search()
    study_of(search)
    (studies(search.folder) / f"{search.name}.journal").write_text("{\n{\n")
    with pytest.raises(ValueError, match="delete it and call again"):
        study_of(search)


@pytest.mark.parametrize("cut", [1, 7, 40, "zeros", "first line"])
def test_a_journal_cut_in_mid_line_loses_no_study(out, cut):
    """What a kill or a power cut leaves: looked at before anything is appended, and then as if nothing had happened."""
    search = tiny_search()
    whole = suggested(search, 3)
    journal = studies(search.folder) / f"{search.name}.journal"
    content = journal.read_bytes()
    if cut == "zeros":
        journal.write_bytes(content + b"\0" * 100)
    elif cut == "first line":
        journal.write_bytes(content[:10])
    else:
        journal.write_bytes(content[:-cut])
    again = [values_of(search, t.params) for t in study_of(search).trials]
    for line in journal.read_bytes().splitlines():
        json.loads(line)
    assert again == ([] if cut == "first line" else whole)
    assert len(study_of(search).trials) == len(again)


@pytest.mark.parametrize("damage", [b'{"op_code": 0\n', b"3\n", b"\xff\xfe\n", b"[]\n"])
def test_other_damage_of_a_journal_changes_nothing(out, damage):
    search = tiny_search()
    suggested(search, 2)
    journal = studies(search.folder) / f"{search.name}.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(damaged := b"".join([*lines[:2], damage, *lines[2:]]))
    with pytest.raises(ValueError, match=r"journal is damaged in line 3; delete it and call again"):
        study_of(search)
    assert journal.read_bytes() == damaged


# ---- the command ------------------------------------------------------------------------------------------------


def test_the_command_at_the_end_names_the_run_of_the_profile(monkeypatch):
    asked = []

    def carry_out(config, folder, keep):
        asked.append((config, folder))
        raise runner.Paused

    monkeypatch.setattr(runner, "run", carry_out)
    for p, loss, args in (
        (profile("small"), "ldrld", {"alpha": 2.31, "depth": 5, "weighting": "none"}),
        (profile("paper"), "kd", {"temperature": 2.0}),
        (TINY, "ldrld", {"normalize": False}),
    ):
        pair = p.pairs[-1]
        program, run, *words = shlex.split(command(trial_config(p, pair, loss, **args), p.name))
        with pytest.raises(typer.Exit):
            run_command(words[:-2], profile=words[-1])
        assert asked[-1] == (method_config(p, pair, Method(loss, args)), p.name) and (program, run) == ("ldrld", "run")


def ldrld(*words):
    return CliRunner().invoke(cli.app, list(map(str, words)))


def test_the_command_line(out, monkeypatch):
    monkeypatch.setenv("LDRLD_DEADLINE", "inf")
    monkeypatch.setenv("COLUMNS", "200")
    words = (
        "tune",
        "--profile",
        ROOT / "tests/tiny.yaml",
        "--teacher",
        "resnet8",
        "--holdout",
        "0.8",
        "--space",
        "alpha=0.5..50:log",
        "depth=2..10",
    )
    got = ldrld(*words, "--trials", 2)
    assert got.exit_code == 0, got.output
    assert (
        "training images held out" in got.output
        and "test set was not used" in got.output
        and "  test " not in got.output
        and got.output.count("ldrld run model=resnet8 loss=ldrld") == 1
    )
    name = "tune-ldrld-resnet8-resnet8"
    assert (
        len(pd.read_csv(out / f"data/tables/tiny-tune/{name}.csv")) == 2
        and (out / f"figures/tiny-tune/{name}.svg").exists()
    )
    declared = json.loads((out / f"data/runs/tiny-tune/studies/{name}.json").read_text())
    assert (
        declared["search"]["space"] == {"alpha": "0.5..50:log", "depth": "2..10"}
        and declared["search"]["base"]["holdout"] == 0.8
        and "commit" in declared["made"]
    )
    more = ldrld(*words, "--trials", 3, "--time-budget", "0s")
    assert more.exit_code == 0 and "2 of 3 trials are finished; call again to resume" in more.output
    none = ldrld(*words, "--name", "another", "--time-budget", "0s")
    assert none.exit_code == 0 and "no trial is finished yet" in none.output
    for wrong, says in (
        ("alpha=0..1:log", "logarithmic range above 0"),
        ("alpha=1..5", "give this search another name"),
    ):
        refused = ldrld(*words[:-2], wrong, "depth=2..10")
        assert refused.exit_code == 2 and says in " ".join(re.sub("[│╭╮╰╯─]", " ", refused.output).split())


def test_committed_searches_follow_from_their_records(tmp_path, monkeypatch):
    """In a copy: to open a study is to write a line into its journal."""
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    for file in (ROOT / "data" / "runs").glob("*/studies/*.json"):
        shutil.copytree(file.parent.parent, tmp_path / "data" / "runs" / file.parent.parent.name, dirs_exist_ok=True)
        search = declared(file.stem, file.parent.parent.name)
        kept = ROOT / "data" / "tables" / search.folder / f"{search.name}.csv"
        assert kept.read_text() == table_of(search).to_csv(index=False), f"{kept}: call ldrld tune again"
