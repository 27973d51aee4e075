"""The committed evidence: tables follow from records, and are what the paper notebooks make of them today."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ldrld.experiments import EXPERIMENTS, PROFILES
from ldrld.report import to_report, verify_table
from ldrld.runs import load_record, records

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
    if (ROOT / "data" / "runs" / profile).exists(): shutil.copytree(ROOT / "data" / "runs" / profile, tmp_path / "data" / "runs" / profile)
    got = subprocess.run([sys.executable, "-c", "from ldrld.cli import main; main()", "report", "--profile", profile, "--out", tmp_path],
                         capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert got.returncode == 0, got.stdout + got.stderr
    for folder in (Path("data/tables") / profile, Path("figures") / profile):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == sorted(p.name for p in (ROOT / folder).iterdir())
        for file in (f for f in (tmp_path / folder).iterdir() if f.suffix in (".csv", ".md", ".tex", ".svg")):
            assert file.read_text() == (ROOT / folder / file.name).read_text(), f"{folder / file.name}: run `ldrld report --profile {profile}`"


def test_a_teacher_is_better_than_a_student_without_one():
    """Else there is nothing to transfer."""
    plan = EXPERIMENTS["same_architecture"].plan("quick")
    alone = plan[(plan["method"] == "CE")]["name"].map(lambda n: load_record(n, "quick").last_accuracy).mean()
    teacher = load_record(next(c.teacher and load_record(n, "quick").teacher for n, c in zip(plan["name"], plan["config"]) if c.teacher), "quick")
    assert teacher.last_accuracy >= alone + 4
