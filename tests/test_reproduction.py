"""Runs that were trained again, beside the committed ones."""

import shutil

import pytest

from commands import ldrld
from ldrld.core import paths
from ldrld.experiments.config import name_of
from ldrld.experiments.records import records
from ldrld.results.reproduction import compared, in_words, load, reproduction_of, reproductions, save, summary

@pytest.fixture
def quick():
    """Three committed runs that differ in the seed alone, and one of another arm."""
    found = records("quick")
    arms = {}
    for record in found:
        arms.setdefault(name_of(record.config.model_copy(update={"seed": 0})), []).append(record)
    arm = next(same for same in arms.values() if len(same) >= 3)
    return [*arm[:3], next(r for r in found if r.config.loss != arm[0].config.loss)]


def with_accuracy(record, accuracy):
    return record.model_copy(update={"last_accuracy": accuracy})


def test_the_committed_records_reproduce_themselves(quick):
    again = reproduction_of(quick, "quick")
    assert (compared(again)["change"] == 0).all()
    assert in_words(again).endswith("all end at the committed accuracy.") and "4 runs" in in_words(again)


def test_changes_of_runs_and_of_means(quick):
    a, b, c, other = quick
    moved = [with_accuracy(a, a.last_accuracy + 1), with_accuracy(b, b.last_accuracy - 0.4), c, other]
    numbers = summary(compared(reproduction_of(moved, "quick")))
    assert numbers["runs"] == 4 and numbers["exact"] == 2
    assert numbers["highest"] == pytest.approx(1) and numbers["lowest"] == pytest.approx(-0.4)
    assert numbers["mean"] == pytest.approx(0.6 / 4) and numbers["of_means"] == pytest.approx(0.6 / 3)
    assert numbers["minutes"] == pytest.approx(sum(r.seconds for r in quick) / 60)


def test_a_run_without_a_committed_record_is_left_out(quick):
    unknown = quick[0].model_copy(update={"name": "glyphs-resnet8-ce-s0-0000000000"})
    again = reproduction_of([unknown, *quick[1:]], "quick")
    assert len(compared(again)) == 3
    assert in_words(again).startswith("3 runs") and "without 1 that have no committed record" in in_words(again)
    assert "None of the 1 runs" in in_words(reproduction_of([unknown], "quick"))


def test_two_commits_of_one_batch_are_both_named(quick):
    first, *others = quick
    code = {"version": "0.1.0", "commit": "f" * 40, "changed": True}
    later = first.model_copy(update={"code": code, "finished": "2030-01-01T00:00:00+00:00"})
    again = reproduction_of([later, *others], "quick")
    assert "fffffff with changes" in again.commits and len(again.code) >= 2
    assert again.file_name == "quick-2030-01-01-fffffff.json"


def test_a_file_is_read_as_it_was_written(quick, tmp_path):
    again = reproduction_of(quick, "quick")
    assert load(save(again, tmp_path)) == again
    (tmp_path / "odd.json").write_text("{}")
    with pytest.raises(ValueError, match=r"odd\.json is not a reproduction: profile"):
        load(tmp_path / "odd.json")


def test_committed_reproductions_belong_to_committed_records():
    found = reproductions()
    assert len(found) >= 2
    for again in found:
        assert (paths.root() / "data" / "reproductions" / again.file_name).is_file()
        assert set(compared(again)["name"]) == set(again.runs)


def test_command(tmp_path):
    there = tmp_path / "data" / "runs" / "quick"
    shutil.copytree(paths.root() / "data" / "runs" / "quick-repeated", there)
    done = ldrld("compare", "--out", tmp_path)
    assert done.returncode == 0 and "20 runs trained again" in done.stdout, done.stderr
    (kept,) = (tmp_path / "data" / "reproductions").iterdir()
    assert len(load(kept).runs) == 20
    empty = ldrld("compare", "--out", tmp_path / "empty")
    assert empty.returncode == 2 and "no records of profile quick" in empty.stderr
    itself = ldrld("compare")
    assert itself.returncode == 2 and "compared with" in itself.stderr
