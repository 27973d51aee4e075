"""The queue: what is run first, what waits for what, what a machine needs that only trains, and that work can move to
another."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from commands import ldrld

from ldrld.batch import pending, workers
from ldrld.core import paths
from ldrld.experiments.catalog import EXPERIMENTS
from ldrld.experiments.cells import GRID, chosen
from ldrld.experiments.methods import method_of
from ldrld.experiments.profiles import profile
from ldrld.experiments.catalog import batch as runs_of
from ldrld.experiments.config import name_of
from ldrld.experiments.records import load_record
from ldrld.experiments.runner import Paused, run

ROOT = Path(__file__).parent.parent
SEARCHING = """
data: handwritten digits
dataset: digits
pairs: [[resnet14, resnet8]]
teacher: {recipe: onecycle, epochs: 2, lr: 0.1, precision: float32}
student: {recipe: onecycle, epochs: 3, lr: 0.1, precision: float32}
seeds: [0, 1]
search_epochs: 1
methods: [CE, KD, LDRLD, "LDRLD, searched"]
experiments: [same_architecture, search]
"""


@pytest.fixture
def searching(tmp_path, monkeypatch):
    """A profile of its own file, and an empty place for its results."""
    file = tmp_path / "searching.yaml"
    file.write_text(SEARCHING)
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path / "out"))
    return file


# ---- what comes first -------------------------------------------------------------------------------------------


def test_the_paper_profile_begins_with_what_is_worth_most():
    p = profile("paper")
    runs = [config for config, _ in runs_of("paper")]
    first = [(c.model, c.loss, c.seed) for c in runs if not c.holdout][:13]
    assert first == [
        ("resnet20", "ce", 0),
        ("resnet56", "ce", 0),
        *(("resnet20", loss, 0) for loss in ("kd", "dkd", "ldrld")),
        *(("resnet20", loss, seed) for seed in (1, 2) for loss in ("ce", "kd", "dkd", "ldrld")),
    ]
    teachers = list(dict.fromkeys(c.teacher.model for c in runs if c.teacher))
    assert teachers == list(dict.fromkeys(teacher for teacher, _ in p.pairs)), (
        "pair by pair, in the order of the profile"
    )
    place = {name_of(c): i for i, c in enumerate(runs)}
    assert all(place[name_of(c.teacher)] < place[name_of(c)] for c in runs if c.teacher)
    main = max(
        place[name_of(c)]
        for e in ("same_architecture", "different_architecture")
        for c, m in EXPERIMENTS[e].plan("paper")[["config", "method"]].itertuples(index=False)
        if m in p.first
    )
    other = min(place[name_of(c)] for c in EXPERIMENTS["depth"].plan("paper").query("depth != 7")["config"])
    assert main < other, "before every pair has its first methods, no ablation is begun"


def test_cohorts_keep_the_order_and_leave_teachers_alone():
    runs = runs_of("small")
    packed = pending.cohorts(runs, 5)
    assert sorted(name_of(c) for cohort in packed for c, _ in cohort) == sorted(name_of(c) for c, _ in runs)
    place = {name_of(c): i for i, (c, _) in enumerate(runs)}
    starts = [place[name_of(cohort[0][0])] for cohort in packed]
    assert starts == sorted(starts) and max(map(len, packed)) == 5
    assert all(len(cohort) == 1 for cohort in packed if any("weights" in keep for _, keep in cohort))
    assert all(len({(c.model, c.teacher and name_of(c.teacher)) for c, _ in cohort}) == 1 for cohort in packed), (
        "one pair a cohort"
    )


# ---- what waits for what ----------------------------------------------------------------------------------------


def task(folder: Path, name: str, status: str = "done"):
    """A stand-in for a training, which leaves the time at which it began; `killed` takes the process with it, `killed
    once` the first time."""
    (folder / name).write_text(str(time.time()))
    if status == "killed":
        os._exit(1)
    if status == "killed once" and not (folder / f"{name} was killed").exists():
        (folder / f"{name} was killed").touch()
        os._exit(1)
    status = status.removesuffix("killed once") or "done"
    time.sleep(3.0 if name == "teacher" else 0.2)  # longer than a second process may take to begin
    (folder / f"{name} ended").write_text(str(time.time()))
    return [workers.Outcome(name, status)]


def test_what_needs_another_waits_for_it_and_nothing_else_does(tmp_path, monkeypatch):
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    names, needs = (
        ["teacher", "student", "alone", "bad teacher", "its student"],
        {"student": {"teacher"}, "its student": {"bad teacher"}},
    )
    tasks = [([name], task, tmp_path, name, "failed" if name == "bad teacher" else "done") for name in names]
    outcomes = {o.name: o.status for o in workers.in_parallel("tasks", tasks, 2, needs)}
    assert outcomes == {
        "teacher": "done",
        "student": "done",
        "alone": "done",
        "bad teacher": "failed",
        "its student": "paused",
    }
    when = {name: float((tmp_path / name).read_text()) for name in names if (tmp_path / name).exists()}
    assert (
        "its student" not in when and when["student"] >= float((tmp_path / "teacher ended").read_text()) > when["alone"]
    )


def test_a_killed_process_costs_only_its_own_task(tmp_path, monkeypatch):
    """It is tried once more in a process of its own, while the others go on."""
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    kinds = (("first", "done"), ("second", "killed"), ("third", "done"), ("fourth", "killed once"), ("fifth", "done"))
    tasks = [([name], task, tmp_path, name, status) for name, status in kinds]
    for jobs in (1, 2):
        outcomes = {o.name: o for o in workers.in_parallel("tasks", tasks, jobs)}
        assert {name: o.status for name, o in outcomes.items()} == {
            name: "failed" if name == "second" else "done" for name, _ in kinds
        }
        assert "killed twice" in outcomes["second"].detail
        (tmp_path / "fourth was killed").unlink()


def test_what_needs_a_task_that_was_killed_once_still_comes_after_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tasks = [(["teacher"], task, tmp_path, "teacher", "killed once"), (["student"], task, tmp_path, "student", "done")]
    assert [o.status for o in workers.in_parallel("tasks", tasks, 2, {"student": {"teacher"}})] == ["done", "done"]
    assert float((tmp_path / "student").read_text()) > float((tmp_path / "teacher ended").read_text())


PARENT = """
import sys
from pathlib import Path
from ldrld.batch import workers
from tests.test_queue import sleeper
if __name__ == "__main__": workers.in_parallel("tasks", [([n], sleeper, Path(sys.argv[1]), n) for n in ("a", "b")], 2)
"""


def sleeper(folder: Path, name: str):
    """A stand-in for a long training, which leaves the number of its process."""
    (folder / f"{name}.part").write_text(str(os.getpid()))
    (folder / f"{name}.part").rename(folder / f"{name}.pid")
    time.sleep(600)
    return [workers.Outcome(name, "done")]


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def heeds_signals():
    """A shell's background processes are started deaf to SIGINT, and so are theirs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def until(done, seconds: float = 300) -> bool:
    end = time.time() + seconds
    while not (happened := done()) and time.time() < end:
        time.sleep(0.1)
    return bool(happened)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
def test_no_process_outlives_its_batch(tmp_path, number):
    """However the batch ends, its workers end with it."""
    (tmp_path / "parent.py").write_text(PARENT)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "LDRLD_OUT": str(tmp_path)}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", tmp_path],
        env=env,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=heeds_signals,
    )
    assert until(lambda: all((tmp_path / f"{n}.pid").exists() for n in "ab")), "the workers did not begin"
    started = [int((tmp_path / f"{n}.pid").read_text()) for n in "ab"]
    assert all(map(alive, started))
    parent.send_signal(number)
    parent.wait(120)
    assert until(lambda: not any(map(alive, started)), 60), f"left: {[p for p in started if alive(p)]}"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_stopped_batch_says_that_it_can_continue(searching, number, code):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    words = ("reproduce", "--profile", str(searching), "--no-notebooks", "--jobs", "1")
    stopped = subprocess.Popen(
        [sys.executable, "-c", "from ldrld.cli import main; main()", *words],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heeds_signals,
    )
    assert until(lambda: list(paths.work().glob("*/checkpoint.pt")) or list(paths.records("searching").glob("*.json")))
    stopped.send_signal(number)
    out, err = stopped.communicate(timeout=300)
    assert stopped.returncode == code and "call again to resume" in err and "Traceback" not in err, err


# ---- a search, and what follows from it -------------------------------------------------------------------------


def test_a_search_decides_and_its_student_is_trained(searching):
    p = profile(str(searching))
    assert method_of("LDRLD, searched").searched and chosen(p, p.pairs[0]) is None
    open_lines = EXPERIMENTS["same_architecture"].plan(p).query("method == 'LDRLD, searched'")
    assert open_lines["seed"].tolist() == [0, 1] and open_lines["name"].tolist() == ["", ""]
    got = ldrld("reproduce", "--profile", searching, "--no-notebooks", "--jobs", 1, LDRLD_OUT=os.environ["LDRLD_OUT"])
    assert got.returncode == 0 and "0 paused, 0 failed" in got.stdout, got.stdout + got.stderr
    tried = EXPERIMENTS["search"].plan(p)
    held_out = {
        (a, b): load_record(name, p.name).last_accuracy
        for a, b, name in tried[["alpha", "beta", "name"]].itertuples(index=False)
    }
    assert len(held_out) == len(GRID["alpha"]) * len(GRID["beta"]) and all(
        c.holdout == 0.1 and c.epochs == 1 for c in tried["config"]
    )
    won = chosen(p, p.pairs[0])
    assert held_out[tuple(won.values())] == max(held_out.values())
    line = EXPERIMENTS["same_architecture"].plan(p).query("method == 'LDRLD, searched'")
    assert {(c.loss_args["alpha"], c.loss_args["beta"], c.holdout, c.epochs) for c in line["config"]} == {
        (*won.values(), 0.0, 3)
    }
    table = pd.read_csv(paths.tables(p.name) / "same_architecture.csv")
    assert table.set_index("method").loc["LDRLD, searched", "n"] == 2
    assert ldrld("verify", "--profile", searching, LDRLD_OUT=os.environ["LDRLD_OUT"]).returncode == 0


# ---- a machine that only trains ---------------------------------------------------------------------------------

ABSENT = """
from importlib.machinery import PathFinder
absent = {"papermill", "jupyter_client", "jupyter_core", "nbformat", "nbclient", "ipykernel", "IPython", "nbdev"}
absent |= {"optuna", "statsmodels", "matplotlib"}
find = PathFinder.find_spec
def found(name, path=None, target=None):
    return None if name.split(".")[0] in absent else find(name, path, target)
PathFinder.find_spec = found
"""


def test_training_needs_neither_papermill_nor_jupyter(searching, tmp_path):
    """Nor what tables, figures and searches are made with; the processes it starts do not need them either."""
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    bare = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "LDRLD_OUT": str(tmp_path / "out")}
    assert (
        "No module named 'papermill'"
        in subprocess.run(
            [sys.executable, "-c", "import papermill"], capture_output=True, text=True, env={**os.environ, **bare}
        ).stderr
    )
    got = ldrld(
        "run",
        "dataset=digits",
        "model=resnet8",
        "loss=kd",
        "teacher=resnet8",
        "recipe=onecycle",
        "epochs=1",
        "lr=0.1",
        **bare,
    )
    assert got.returncode == 0 and len(list((tmp_path / "out/data/runs/try").glob("*.json"))) == 2, got.stderr
    got = ldrld(
        "reproduce", "--profile", searching, "--only", "same_architecture", "--no-notebooks", "--jobs", 1, **bare
    )
    assert got.returncode == 0 and "`ldrld report" in got.stdout and "7 done, 0 paused, 0 failed" in got.stdout, (
        got.stdout + got.stderr
    )


def test_work_continues_on_another_machine(searching, tmp_path, monkeypatch):
    """Stopped by its budget, taken along with its folder, it ends as if nothing had happened."""
    config = runs_of(str(searching), ("same_architecture",))[0][0]
    whole = run(config, "searching", report=None)
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path / "here"))
    monkeypatch.setenv("LDRLD_DEADLINE", "0")
    with pytest.raises(Paused, match="paused after epoch 1 of 3"):
        run(config, "searching", report=None)
    monkeypatch.delenv("LDRLD_DEADLINE")
    shutil.move(tmp_path / "here", tmp_path / "there")
    there = {"LDRLD_OUT": str(tmp_path / "there")}
    assert "1 of 3" in ldrld("status", "--profile", searching, **there).stdout
    got = ldrld(
        "reproduce", "--profile", searching, "--only", "same_architecture", "--no-notebooks", "--jobs", 1, **there
    )
    assert got.returncode == 0, got.stderr
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path / "there"))
    again = load_record(whole.name, "searching")
    assert [row["test_accuracy"] for row in again.history] == [row["test_accuracy"] for row in whole.history]
