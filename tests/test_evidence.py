"""The committed evidence: tables follow from records, and are what the paper notebooks make of them today."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from ldrld.experiments.catalog import EXPERIMENTS, batch
from ldrld.experiments.profiles import PROFILES
from ldrld.experiments.records import load_record, records
from ldrld.results import figures, statistics
from ldrld.results.tables import to_report
from ldrld.results.verification import verify_table

ROOT = Path(__file__).parent.parent
COMMITTED = [p for p in PROFILES if (ROOT / "data" / "tables" / p).exists()]


def test_there_is_evidence():
    assert {"quick", "small"} <= set(COMMITTED)
    assert len(records("quick")) >= 50 and len(records("small")) >= 4


@pytest.mark.parametrize("profile", COMMITTED)
def test_every_number_of_every_table(profile):
    tables = [EXPERIMENTS[name] for name in to_report(profile) if EXPERIMENTS[name].table]
    wrong = [line for e in tables for line in verify_table(e, profile)]
    assert tables
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("profile", COMMITTED)
def test_tables_and_figures_are_made_again(profile, tmp_path):
    """Cheap and complete: every table and figure from the records, in the same words and digits."""
    if (ROOT / "data" / "runs" / profile).exists():
        shutil.copytree(ROOT / "data" / "runs" / profile, tmp_path / "data" / "runs" / profile)
    got = subprocess.run(
        [sys.executable, "-c", "from ldrld.cli import main; main()", "report", "--profile", profile, "--out", tmp_path],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert got.returncode == 0, got.stdout + got.stderr
    for folder in (Path("data/tables") / profile, Path("figures") / profile):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == sorted(
            p.name for p in (ROOT / folder).iterdir()
        )
        for file in (f for f in (tmp_path / folder).iterdir() if f.suffix in (".csv", ".md", ".tex", ".svg")):
            assert file.read_text() == (ROOT / folder / file.name).read_text(), (
                f"{folder / file.name}: run `ldrld report --profile {profile}`"
            )


def test_a_teacher_is_better_than_a_student_without_one():
    """Else there is nothing to transfer."""
    plan = EXPERIMENTS["same_architecture"].plan("quick")
    alone = plan[(plan["method"] == "CE")]["name"].map(lambda n: load_record(n, "quick").last_accuracy).mean()
    teacher = load_record(
        next(c.teacher and load_record(n, "quick").teacher for n, c in zip(plan["name"], plan["config"]) if c.teacher),
        "quick",
    )
    assert teacher.last_accuracy >= alone + 4


# ---- the paper's open questions -----------------------------------------------------------------------------------

OPEN = ("normalisation", "plateau", "classes", "best_epoch")


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The committed records and tables of `quick`, to be tampered with."""
    for folder in ("runs", "tables"):
        shutil.copytree(ROOT / "data" / folder / "quick", tmp_path / "data" / folder / "quick")
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    return tmp_path / "data"


def test_only_one_experiment_leaves_the_data_of_its_profile():
    for p in PROFILES.values():
        for name, e in EXPERIMENTS.items():
            assert {c.dataset for c in e.plan(p)["config"] if c} <= (
                {p.dataset} if name != "classes" or not p.class_sets else set(p.class_sets)
            ), f"{name} in {p.name}"


def test_what_only_reads_makes_no_run():
    assert batch("quick", ("best_epoch",)) == [] and len(EXPERIMENTS["best_epoch"].plan("quick")) > 100
    assert {"few_shot", "learning_rate"} <= set(to_report("quick")), (
        "that one experiment reads all records hides no other"
    )


@pytest.mark.parametrize("name", OPEN)
def test_a_changed_digit_is_found(copied, name):
    assert verify_table(name, "quick") == []
    path = copied / "tables" / "quick" / f"{name}.csv"
    lines, column = path.read_text().splitlines(), "best − last max" if name == "best_epoch" else "mean"
    place, row = (
        lines[0].split(",").index(column),
        next(i for i, line in enumerate(lines) if i and line.split(",")[lines[0].split(",").index("n")] != "0"),
    )
    fields = lines[row].split(",")
    fields[place] = str(float(fields[place]) + 0.01)
    path.write_text("\n".join([*lines[:row], ",".join(fields), *lines[row + 1 :]]))
    wrong = verify_table(name, "quick")
    assert len(wrong) == 1 and f"{column} is" in wrong[0]


def test_images_may_differ_between_data_sets_but_not_within_one(copied):
    run = EXPERIMENTS["classes"].plan("quick").query("data == 'glyphs-10'")["name"].iloc[0]
    path = copied / "runs" / "quick" / f"{run}.json"
    path.write_text(path.read_text().replace(load_record(run, "quick").data["fingerprint"], "0" * 64))
    assert ["images of glyphs-10" in line for line in verify_table("classes", "quick")] == [True]


def test_open_questions_without_any_record(tmp_path):
    """Tables say so, and no figure is saved."""
    only = [word for name in OPEN for word in ("--only", name)]
    got = subprocess.run(
        [sys.executable, "-c", "from ldrld.cli import main; main()", "report", *only, "--jobs", "1", "--out", tmp_path],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert got.returncode == 0, got.stdout + got.stderr
    for name in OPEN:
        assert "not run" in (tmp_path / "data" / "tables" / "quick" / f"{name}.md").read_text()
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("name, base", [("newer_methods", "KD"), ("adw", "none")])
def test_a_plot_of_differences_has_the_baseline_of_its_table(name, base):
    """Wherever its line is: the seeds' differences average to the interval's centre; far out there is an arrow."""
    e = EXPERIMENTS[name]
    table = statistics.summarise(statistics.collect(e, "quick"), e)
    figure = figures.interval_plot(table, e.by[-1], "quick")
    (ax,) = figure.axes
    assert ax.get_xlabel() == f"difference to “{base}”, points"
    dots = {float(y): xs for c in ax.collections if len(xs := c.get_offsets()) for y in [xs[0][1]] if len(xs) > 1}
    edge, arrows = figures.edge_of(table), {text.xy[1] for text in ax.texts}
    for y, line in enumerate(table.itertuples()):
        if not line.pairs: continue
        far = max(-line.low, line.high) > edge
        assert (y in arrows) == far
        if not far: assert dots[y][:, 0].mean() == pytest.approx(line.difference, abs=1e-6)
    plt.close(figure)
