"""The plan of decisions: what it may say, what it runs, and a check that notices a changed digit."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from ldrld.experiments import plan
from ldrld.experiments.catalog import EXPERIMENTS, batch, selected
from ldrld.experiments.profiles import PROFILES, profile
from ldrld.experiments.config import name_of
from ldrld.experiments.records import load_record

ROOT = Path(__file__).parent.parent
PLANNED = ("quick", "small")


@pytest.mark.parametrize("p", PLANNED)
def test_every_comparison_is_run_by_its_stage(p):
    """A cell that no stage runs would wait for ever."""
    declared = plan.plan_of(p)
    stages = {stage.experiment: stage for stage in declared.stages}
    for c in (*declared.primary, *declared.secondary):
        cells = {text for _, _, text in plan.accuracies(stages[c.experiment], profile(p))}
        assert plan.cell_text(c.ours) in cells and (c.theirs is None or plan.cell_text(c.theirs) in cells), c
    names = [name_of(config) for config, _ in plan.planned(p)]
    assert len(set(names)) == len(names)


def test_what_is_planned_extends_what_is_there():
    """The seeds that existed are the first of the plan, so that they are counted, not trained again."""
    made = {name for name in EXPERIMENTS["adw"].plan("small")["name"]}
    assert made <= {name_of(config) for config, _ in plan.planned("small")}


def test_no_number_before_all_seeds():
    few, stage = {0: 5.0, 1: 5.1, 2: 4.9}, plan.Stage(experiment="adw", seeds=20)
    line = plan.decided(few, stage, plan.plan_of("small"))
    assert (
        line["verdict"] == "waiting"
        and line["n"] == 3
        and all(np.isnan(line[k]) for k in ("difference", "low", "high", "p", "new seeds"))
    )


@pytest.mark.parametrize(
    "differences, verdict",
    [
        ([1.0, 1.1, 0.9, 1.05], "supported"),
        ([-1.0, -1.1, -0.9, -1.05], "refuted"),
        ([0.1, -0.1, 0.05, -0.05], "equivalent"),
        ([3.0, -3.0, 2.0, -2.5], "inconclusive"),
        ([0.5, 0.5, 0.5, 0.5], "inconclusive"),
        ([float("nan"), 1.0, 1.1, 0.9], "inconclusive"),
    ],
)
def test_the_rule(differences, verdict):
    assert plan.decide(np.array(differences), 4, 0.7) == verdict


@pytest.mark.parametrize(
    "text, said",
    [
        ("stages: []", "declared"),
        ("smallest_effect: 0", "smallest_effect"),
        ("stages:\n - {experiment: adv, seeds: 3}", "Did you mean 'adw'"),
        ("stages:\n - {experiment: adw, seeds: 3, only: {weight: [adw]}}", "Did you mean 'weighting'"),
        ("stages:\n - {experiment: adw, seeds: 3}\n - {experiment: adw, seeds: 4}", "only once"),
    ],
)
def test_a_plan_that_cannot_be_read_says_why(tmp_path, monkeypatch, text, said):
    whole = {
        "declared": "declared: 2026-11-27",
        "smallest_effect": "smallest_effect: 1",
        "stages": "stages:\n - {experiment: adw, seeds: 3}",
        "primary": "primary: []",
    }
    whole[text.split(":")[0]] = text
    if said == "declared":
        del whole["declared"]
    (tmp_path / "quick.yaml").write_text("\n".join(whole.values()))
    monkeypatch.setattr(plan.paths, "plans", lambda: tmp_path)
    with pytest.raises(ValueError, match="quick.yaml") as told:
        plan.plan_of("quick")
    assert said in str(told.value)


def test_a_profile_without_a_plan():
    assert plan.plan_of("paper") is None and plan.decisions("paper").empty and "no plan" in plan.caption("paper")
    with pytest.raises(ValueError, match="has no plan"):
        plan.planned("paper")


def test_a_changed_digit_is_found(tmp_path, monkeypatch):
    for folder in ("runs", "tables"):
        shutil.copytree(ROOT / "data" / folder / "quick", tmp_path / "data" / folder / "quick")
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    assert plan.verify("quick") == []
    path = tmp_path / "data" / "tables" / "quick" / "decisions.csv"
    text = path.read_text()
    for old, new in (("equivalent", "supported"), (",20,20,", ",19,20,")):
        path.write_text(text.replace(old, new, 1))
        assert len(plan.verify("quick")) == 1
    run = plan.decisions("quick").query("n == 20").iloc[0]["runs"].split()[0]
    (tmp_path / "data" / "runs" / "quick" / f"{run}.json").unlink()
    path.write_text(text)
    assert plan.verify("quick"), "a record that is gone is missed"
    assert load_record(run, "quick") is None


@pytest.mark.parametrize("name", ("newer_methods", "ldrld_switches"))
def test_the_newer_methods_run_only_when_asked_with_the_seeds_of_the_plan(name):
    stages = {stage.experiment: stage for stage in plan.plan_of("quick").stages}
    asked = EXPERIMENTS[name].plan("quick")
    assert stages[name].seeds == 5 and {tuple(seeds) for _, seeds in asked.groupby("method")["seed"]} == {(*range(5),)}
    assert set(asked["name"]) == {name_of(config) for _, config in plan.lines_of(stages[name], profile("quick"))}
    assert all(name not in selected(p) and len(EXPERIMENTS[name].plan(p)["seed"].unique()) >= 3 for p in PROFILES)
    usual = {name_of(config) for config, _ in batch("quick")}
    own = asked[~asked["method"].isin(("CE", "KD", "DKD", "LDRLD", "FitNet", "AT"))]
    assert not set(own["name"]) & usual


@pytest.mark.parametrize("name", PROFILES)
def test_our_prior_for_beta_is_run_where_its_teachers_are(name):
    p = PROFILES[name]
    ran = {(t, s) for t, s, m in EXPERIMENTS["rivals"].plan(p)[["teacher", "student", "method"]].itertuples(index=False)
           if m == "LDRLD, β = 2, our prior"}
    assert ran == {pair for pair in p.pairs if pair[0] in ("resnet56", "resnet110")}
    assert bool(ran) == name.startswith("paper")
