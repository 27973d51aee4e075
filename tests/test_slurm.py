"""A batch on a real Slurm, on this machine: pre-empted, killed, drained, and in the end the same records.

The short form is part of `make test-all`; `make slurm` runs the long one, which takes several minutes, of which the
trainings are the smaller part.
"""

import importlib.util
import json
import subprocess
import sys

import pytest
from slurm_cluster import NODE, cluster, missing, until

from commands import ROOT, ldrld
from ldrld.training.checkpoint import epochs_trained

if lacking := missing() + ["submitit"] * (importlib.util.find_spec("submitit") is None):
    pytest.skip(f"no {', '.join(lacking)} here: apt-get install slurm-wlm munge; pip install submitit",
                allow_module_level=True)
PREEMPTIONS = 10
PROFILE = """\
data: handwritten digits
dataset: digits
pairs: [[resnet14, resnet8]]
teacher: {{recipe: onecycle, epochs: {epochs}, lr: 0.1}}
student: {{recipe: onecycle, epochs: {epochs}, lr: 0.1}}
seeds: {seeds}
depths: [2, 7]
temperatures: [4.0]
"""
TIMES = {"seconds", "images_per_second", "finished"}


def without_times(record):
    """A record without what differs between two runs of the same training."""
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in record["history"]]
    return {name: value for name, value in record.items() if name not in TIMES} | {"history": rows}


def records(out):
    """The records below a folder, by name, without times."""
    return {file.stem: without_times(json.loads(file.read_text())) for file in out.glob("data/runs/*/*.json")}


class Batch:
    """A batch on a cluster: `ldrld reproduce --executor slurm`, and how far its runs are."""

    def __init__(self, slurm, out, epochs, seeds):
        self.slurm, self.out, self.epochs = slurm, out, epochs
        self.profile = out.with_suffix(".yaml")
        self.profile.write_text(PROFILE.format(epochs=epochs, seeds=seeds))
        out.mkdir()
        self.words = ("reproduce", "--profile", self.profile, "--only", "same_architecture", "--no-notebooks",
                      "--out", out)
        command = "from ldrld.cli import main; main()"
        self.log = open(out.with_suffix(".log"), "w+")
        env = {**slurm.env, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen([sys.executable, "-c", command, *map(str, self.words), "--executor", "slurm"],
                                        env=env, stdout=self.log, stderr=self.log)

    def said(self):
        self.log.seek(0)
        return self.log.read()

    def preemptions(self):
        """How often Slurm took a job's place from it, according to the jobs' logs."""
        logs = self.out.glob("runs/jobs/*/*/log.txt")
        return sum(file.read_text().count("DUE TO PREEMPTION") for file in logs)

    def trained(self):
        """Epochs trained so far by every unfinished run."""
        return {file.parent.name: epochs_trained(file) for file in self.out.glob("runs/*/checkpoint.pt")}

    def progress(self):
        """Wait until a running job has trained another epoch, and is not about to end."""
        before = self.trained()
        more = lambda: [k for k, n in self.trained().items() if before.get(k, 0) < n < self.epochs - 4]
        until(more, 300, f"another epoch after {before}; {self.slurm.jobs()}; {self.said()}")

    def kill_job(self):
        """Kill the processes of a running job."""
        (killed, *_) = [number for number, state in self.slurm.jobs().items() if state == "RUNNING"]
        self.slurm("scancel", "--signal=KILL", "--full", killed)

    def end(self):
        """Stop waiting for the jobs, if the batch still does."""
        self.process.terminate()
        self.process.wait()

    def same_as_local(self, out, finished):
        """Assert that local processes make the same records, `finished` of them."""
        got = ldrld(*self.words[:-1], out, "--jobs", 2)
        assert got.returncode == 0, got.stdout + got.stderr
        assert len(records(out)) == finished and records(self.out) == records(out)


def test_a_preempted_and_a_killed_job_leave_the_same_records(tmp_path):
    with cluster(grace=1) as slurm:
        batch = Batch(slurm, tmp_path / "shared", epochs=20, seeds=[0])
        try:
            batch.progress()
            batch.kill_job()
            batch.progress()
            slurm.preempt()
            assert batch.process.wait(300) == 0, batch.said()
        finally:
            batch.end()
    said = batch.said()
    assert "a job was lost" in said and "1 tables checked, 0 problems" in said, said
    assert batch.preemptions() >= 1, said
    batch.same_as_local(tmp_path / "alone", finished=4)


@pytest.mark.campaign
def test_ten_preemptions_a_dead_node_a_drained_one_and_a_killed_job_leave_the_same_records(tmp_path):
    with cluster(grace=1) as slurm:
        # with fewer epochs, the trainings would end before the tenth pre-emption on a quiet machine
        batch = Batch(slurm, tmp_path / "shared", epochs=100, seeds=[0, 1])
        try:
            batch.progress()
            batch.kill_job()
            while batch.preemptions() < PREEMPTIONS:
                batch.progress()
                slurm.preempt()
            batch.progress()
            slurm.kill_node()
            until(lambda: "down" in slurm.node_state(), 60, "the controller misses the node")
            slurm.start_node()
            batch.progress()
            slurm("scontrol", "update", f"NodeName={NODE}", "State=DRAIN", "Reason=test")
            until(lambda: slurm.node_state() in ("drain", "drng"), 20, "drained")
            slurm("scontrol", "update", f"NodeName={NODE}", "State=RESUME")
            assert batch.process.wait(900) == 0, batch.said()
        finally:
            batch.end()
        status = ldrld("status", "--profile", batch.profile, "--out", batch.out, **slurm.env)
    said = batch.said()
    print(f"{batch.preemptions()} pre-emptions\n{said}")
    assert "a job was lost" in said and "8 done, 0 paused, 0 failed" in said and "1 tables checked, 0 problems" in said
    assert status.stdout.count(": finished, ") == 5, status.stdout + status.stderr
    assert batch.preemptions() >= PREEMPTIONS
    batch.same_as_local(tmp_path / "alone", finished=7)
