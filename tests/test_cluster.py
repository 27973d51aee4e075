"""Batches on a cluster without one: the graph of jobs, the dry run, the options, and what is missing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import ROOT, ldrld
from ldrld.batch import cluster
from ldrld.batch.cluster import graph, on_slurm, train_cohort
from ldrld.batch.pending import missing
from ldrld.batch.preflight import NotReady
from ldrld.batch.workers import Outcome
from ldrld.experiments.config import name_of

TINY = ROOT / "tests" / "tiny.yaml"
WORDS = ("reproduce", "--profile", TINY, "--only", "same_architecture")


@pytest.fixture
def todo(tmp_path, monkeypatch):
    """The runs of the tiny profile's first table, none of them made."""
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    return missing(str(TINY), ("same_architecture",))


def test_every_cohort_comes_after_its_teacher(todo):
    jobs = graph(todo[::-1], 5)  # students first
    made = [name for job in jobs for name in job.names]
    assert sorted(made) == sorted(name_of(config) for config, _ in todo) and len(jobs) == 5
    for job in jobs:
        teachers = {name_of(config.teacher) for config, _ in job.runs if config.teacher}
        assert job.needs == sorted(teachers)
        assert all(made.index(name) < made.index(job.names[0]) for name in teachers)


def test_a_cohort_waits_for_a_teacher_that_another_call_submitted(todo):
    (teacher,) = {name_of(config.teacher) for config, _ in todo if config.teacher}
    students = [run for run in todo if name_of(run[0]) != teacher]
    assert {tuple(job.needs) for job in graph(students, 5)} == {()}
    assert {tuple(job.needs) for job in graph(students, 5, {teacher})} == {(), (teacher,)}


def test_a_dry_run_lists_the_jobs_and_starts_nothing(tmp_path):
    got = ldrld(*WORDS, "--out", tmp_path, "--dry-run", "--executor", "slurm", "--job-time", "90m", "--partition", "p",
                "--slurm", "gres=gpu:1", "--cohort-size", "1", PATH="")
    assert got.returncode == 0, got.stderr
    jobs = re.findall(r"^job (\d+)(?: after job (\d+))?: (\S+),", got.stdout, re.M)
    (teacher,) = {after for _, after, _ in jobs if after}
    assert len(jobs) == 7 and "resnet14" in dict((number, name) for number, _, name in jobs)[teacher]
    assert sum(after == teacher for _, after, _ in jobs) == 4
    options = f"--time=90 --requeue --partition=p --dependency=afterany:<job {teacher}> --gres=gpu:1"
    assert got.stdout.count(options) == 4 and not any(tmp_path.iterdir())
    local = ldrld(*WORDS, "--out", tmp_path, "--dry-run")
    assert "sbatch" not in local.stdout and "7 runs in 5 jobs; nothing was started" in local.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--executor", "slurmm"), "Did you mean 'slurm'"),
        (("--executor", "slurm", "--slurm", "gres"), "expected name=value"),
        (("--executor", "slurm", "--job-time", "soon"), "is not a time"),
        (("--executor", "slurm", "--engine", "graph"), "use --engine eager"),
    ],
)
def test_a_wrong_option_is_reported_before_anything_runs(words, says, tmp_path):
    got = ldrld(*WORDS, "--out", tmp_path, *words)
    assert got.returncode == 2 and says in " ".join(got.stderr.split()) and not any(tmp_path.iterdir()), got.stderr


@pytest.mark.parametrize(
    ("program", "module", "says"),
    [(None, "spec", "sbatch is not on the PATH"), ("sbatch", None, 'pip install "ldrld[slurm]"')],
)
def test_what_is_not_installed_is_said_in_one_line(todo, monkeypatch, program, module, says):
    monkeypatch.setattr(cluster.shutil, "which", lambda name: program)
    monkeypatch.setattr(cluster, "find_spec", lambda name: module)
    with pytest.raises(NotReady, match=re.escape(says)) as caught:
        on_slurm(todo, "tiny")
    assert len(str(caught.value).splitlines()) == 2  # "not started …" and the reason


def test_a_cohort_without_its_teacher_waits(todo):
    (job,) = [job for job in graph(todo, 5) if job.needs][:1]
    outcomes = train_cohort([(config.model_dump(), keep) for config, keep in job.runs], job.needs, "tiny", False, 60)
    assert [o.name for o in outcomes] == job.names and {(o.status, o.detail) for o in outcomes} == {
        ("paused", cluster.WAITS)
    }


@pytest.mark.parametrize(
    ("status", "deadline", "requeued"), [("paused", None, True), ("paused", "0", False), ("done", None, False)]
)
def test_a_job_whose_time_is_up_requeues_itself(todo, tmp_path, monkeypatch, status, deadline, requeued):
    """Not once the time budget of the whole batch is spent; Slurm may end scontrol before it reports success."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\nkill $$\n')
    scontrol.chmod(0o755)
    limits, slept = [], []
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("LDRLD_DEADLINE", deadline or "inf")
    monkeypatch.setattr(cluster.time, "sleep", slept.append)
    monkeypatch.setattr(cluster.time, "time", lambda: 1000.0)

    def trained(runs, folder, notebooks):
        limits.append(float(os.environ["LDRLD_DEADLINE"]))
        return [Outcome("one", status)]

    monkeypatch.setattr(cluster, "execute_runs", trained)
    assert train_cohort([(todo[0][0].model_dump(), ())], [], "tiny", False, 600.0)[0].status == status
    assert limits == [0.0 if deadline else 1540.0]  # 90 % of the time limit
    called = tmp_path / "called"
    assert slept == [600] * requeued
    assert called.exists() == requeued and (not requeued or called.read_text() == "requeue 17\n")


def test_the_job_array_trains_its_task_in_a_notebook(tmp_path):
    """Two tasks, as Slurm would start them; they share the teacher."""
    script = ROOT / "nbs" / "tutorials" / "job_array.sh"
    bare = subprocess.run([script], capture_output=True, text=True, cwd=ROOT)
    assert bare.returncode == 1 and "call this with sbatch" in bare.stderr
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for task in ("0", "5"):
        env = {**os.environ, "PATH": path, "LDRLD_OUT": str(tmp_path), "SLURM_ARRAY_TASK_ID": task}
        got = subprocess.run([script, "-p", "epochs", "1"], capture_output=True, text=True, cwd=ROOT, env=env)
        assert got.returncode == 0, got.stderr
    records = [json.loads(file.read_text())["config"] for file in tmp_path.glob("data/runs/job_array/*.json")]
    assert sorted((r["loss"], r["seed"]) for r in records if r["loss"] != "ce") == [("kd", 0), ("ldrld", 1)]
