"""A batch on a Slurm cluster: each cohort is a job, submitted with submitit; Slurm keeps the order and requeues.

One machine needs no engine: `ldrld.batch.workers` starts the processes itself and requires no other package. From two
machines on, queues, time limits, pre-emption and dependencies are Slurm's, and submitit carries calls and results
between this process and the jobs. A job is safe to kill at any time: its runs resume from their checkpoints.

Why submitit, and not Snakemake (9.27.1 with its Slurm plugin 2.8.0), which we tried, too: without Slurm's accounting
and with its defaults, Snakemake waited for ever for a job that had failed; inside a job it removes `SLURM_CONF`, so its
srun finds only a cluster configured under /etc; its 28 packages replace the SQLAlchemy that Optuna uses by an older
one; and it must run as long as the batch. submitit brings one package (cloudpickle), and the process that submits may
end. It has no graph and asks only the accounting for states, so `graph` and `queue` are here.
Plain code rather than a notebook, because it starts jobs; the guide is `nbs/tutorials/cluster.ipynb`.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Set
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from ldrld.batch.pending import cohorts
from ldrld.batch.preflight import NotReady
from ldrld.batch.scheduler import execute_runs
from ldrld.batch.workers import Outcome, terminable
from ldrld.core import files, paths
from ldrld.experiments.config import RunConfig, name_of
from ldrld.experiments.records import KEPT, load_record

__all__ = ["SlurmOptions", "Cohort", "graph", "dry_run", "train_cohort", "on_slurm", "job_states"]

Runs: TypeAlias = list[tuple[RunConfig, tuple[str, ...]]]
LOG = "log.txt"  # of a job, attempt after attempt
WAITS, QUEUED = "a run that it needs is not finished", "its job is still in Slurm's queue"
LATE = 20.0  # seconds in which a network file system shows the result of a job that has left the queue


@dataclass(frozen=True)
class SlurmOptions:
    """Options of the jobs."""
    minutes: int = 240  # time limit; runs pause when 90 % of it are over, and the job requeues itself
    partition: str | None = None  # None: the cluster's default
    more: dict[str, str] = field(default_factory=dict)  # options of sbatch by long names, such as {"gres": "gpu:1"}

    def sbatch(
        self,
        after: list[str],  # numbers of the jobs that must have ended before, with whatever outcome
    ) -> dict[str, str | bool]:  # long name -> value; True for a flag
        """The options of sbatch for a job that starts after others."""
        options: dict[str, str | bool] = {"time": str(self.minutes), "requeue": True}
        if self.partition: options["partition"] = self.partition
        if after: options["dependency"] = "afterany:" + ":".join(after)
        return options | self.more


@dataclass(frozen=True)
class Cohort:
    """Runs that one job trains together, and the names of the runs that must be finished before."""
    runs: Runs  # configurations, each with what to keep
    needs: list[str]  # names of the runs that train its teacher, if they are not finished

    @property
    def names(self) -> list[str]:
        """The names of the runs."""
        return [name_of(config) for config, _ in self.runs]

    @property
    def name(self) -> str:
        """The name of the job and of its folder."""
        first, *others = self.names
        return f"{first}-and-{len(others)}-more" if others else first


def graph(
    todo: Runs,  # configurations, each with what to keep
    size: int,  # runs of a cohort, at most
    queued: Set[str] = frozenset(),  # names of the runs of earlier jobs, still in the queue
) -> list[Cohort]:
    """The cohorts of some runs, each after those that train its teacher."""
    packed = cohorts(todo, size)
    place = {name_of(config): i for i, cohort in enumerate(packed) for config, _ in cohort}
    teachers = [{name_of(config.teacher) for config, _ in cohort if config.teacher} for cohort in packed]
    needs = [sorted(names & (place.keys() | queued)) for names in teachers]
    order = TopologicalSorter({i: {place[name] for name in names & place.keys()} for i, names in enumerate(teachers)})
    return [Cohort(packed[i], needs[i]) for i in order.static_order()]


def dry_run(
    todo: Runs,  # configurations, each with what to keep
    size: int,  # runs of a cohort, at most
    options: SlurmOptions | None = None,  # None: the lines with the options of sbatch are left out
) -> str:  # a line or two per job, and the number of jobs
    """The jobs that would train some runs, in their order."""
    lines, job_of = [], dict[str, int]()
    for number, cohort in enumerate(graph(todo, size), 1):
        job_of |= dict.fromkeys(cohort.names, number)
        after = [f"job {job}" for job in sorted({job_of[name] for name in cohort.needs})]
        when = f" after {', '.join(after)}" if after else ""
        lines.append(f"job {number}{when}: {cohort.name}, epochs: {cohort.runs[0][0].epochs}")
        given = options.sbatch([f"<{job}>" for job in after]) if options else {}
        flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
        if flags: lines.append(f"    sbatch {' '.join(flags)}")
    return "\n".join([*lines, f"{len(todo)} runs in {len(set(job_of.values()))} jobs; nothing was started"])


def train_cohort(
    runs: list[tuple[dict, tuple[str, ...]]],  # settings of `RunConfig`, each with what to keep
    needs: list[str],  # names of the runs whose weights must exist
    folder: str,  # of the records, below `data/runs`
    notebooks: bool,  # whether to train in a notebook
    seconds: float,  # the job's time limit
) -> list[Outcome]:  # one per run
    """What a job does: train its runs, and requeue itself if its time limit comes first."""
    if any(not KEPT["weights"](name, folder).exists() for name in needs):
        return [Outcome(name_of(RunConfig(**config)), "paused", WAITS) for config, _ in runs]
    ends = float(os.environ.get("LDRLD_DEADLINE", "inf"))  # of the whole batch
    os.environ["LDRLD_DEADLINE"] = str(min(ends, time.time() + 0.9 * seconds))
    outcomes = execute_runs(runs, folder, notebooks)
    if any(o.status == "paused" for o in outcomes) and time.time() < ends and "SLURM_JOB_ID" in os.environ:
        requeued = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]])
        if requeued.returncode <= 0: time.sleep(600)  # until Slurm ends this process, and perhaps scontrol before
    return outcomes


@dataclass(frozen=True)
class Submitted:
    """A job in Slurm's hands: its number, its folder and the names of its runs."""
    number: str
    home: Path
    names: list[str]

    def outcomes(self, folder: str) -> list[Outcome] | None:
        """The outcomes of its runs; None without a result.  A run fails if its record is invalid or not in `folder`."""
        from submitit.slurm.slurm import SlurmJob

        job: Any = SlurmJob(self.home, self.number)
        if not job.paths.result_pickle.exists(): return None
        if error := job.exception(): return self.failed(str(error))
        outcomes = []
        for outcome in job.result():
            why = f"its record is not in {paths.records(folder)}; --out must be a folder that all machines share"
            try: lacks = outcome.status == "done" and not load_record(outcome.name, folder)
            except ValueError as error: lacks, why = True, str(error)
            outcomes.append(Outcome(outcome.name, "failed", why) if lacks else outcome)
        return outcomes

    def failed(self, why: str) -> list[Outcome]:
        """The outcomes of a job that left none."""
        return [Outcome(name, "failed", f"{why}\nlog: {self.home / LOG}") for name in self.names]


def queue() -> dict[str, str] | None:
    """This user's jobs that Slurm has not finished: number -> state, such as PENDING; None if it does not reply."""
    try: got = subprocess.run(["squeue", "--me", "--noheader", "--format=%A %T"], capture_output=True, text=True)
    except FileNotFoundError: return None
    return dict(line.split() for line in got.stdout.splitlines()) if got.returncode == 0 else None


def submitted(folder: str) -> list[Submitted]:
    """The latest job of every cohort of a profile, also those of earlier calls."""
    told = {file.parent: json.loads(file.read_text()) for file in sorted(paths.jobs(folder).glob("*/job.json"))}
    return [Submitted(job["number"], home, job["names"]) for home, job in told.items()]


def job_states(
    folder: str,  # of the profile's records, below `data/runs`
) -> list[str]:
    """One line per job of a profile: its number, its state, its log; empty without jobs."""
    states = queue() or {}
    ended = lambda job: "finished" if (job.home / f"{job.number}_0_result.pkl").exists() else "not in the queue"
    return [f"Slurm's job {job.number}: {states.get(job.number) or ended(job)}, {paths.shown(job.home / LOG)}"
            for job in submitted(folder)]


def submit(todo: Runs, folder: str, size: int, notebooks: bool, options: SlurmOptions) -> list[Submitted]:
    """The jobs of some runs, submitted unless they are in the queue already; arguments as in `on_slurm`."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    waiting, wanted = queue() or {}, {name_of(config) for config, _ in todo}
    jobs = [job for job in submitted(folder) if job.number in waiting and wanted & set(job.names)]
    job_of = {name: job.number for job in jobs for name in job.names}
    for cohort in graph([run for run in todo if name_of(run[0]) not in job_of], size, set(job_of)):
        home = paths.jobs(folder) / cohort.name
        for stale in home.glob("*_result.pkl"): stale.unlink()  # a new cluster counts its jobs from 1
        # without `exec` the shell would get SIGTERM, and the training could outlive the job
        executor = SlurmExecutor(home, python=f"exec {shlex.quote(sys.executable)}")
        more = options.sbatch(sorted({job_of[name] for name in cohort.needs}))
        more |= {"job_name": cohort.name, "output": str(home / LOG)}
        executor.update_parameters(use_srun=False, stderr_to_stdout=True, additional_parameters=more)
        runs = [(config.model_dump(), keep) for config, keep in cohort.runs]
        try: job = executor.submit(train_cohort, runs, cohort.needs, folder, notebooks, 60.0 * options.minutes)
        except FailedJobError as error: raise NotReady([f"slurm: {cohort.name}: {error}"]) from None
        files.write_whole(home / "job.json", json.dumps({"number": job.job_id, "names": cohort.names}))
        jobs.append(Submitted(job.job_id, home, cohort.names))
        job_of |= dict.fromkeys(cohort.names, job.job_id)
    return jobs


def follow(jobs: list[Submitted], folder: str, seconds: float, pause: float) -> tuple[list[Outcome], set[str]]:
    """Wait for jobs; the outcomes of their runs, and the names of those that were lost. Arguments as in `on_slurm`."""
    ends, left, seen = time.monotonic() + seconds, list(jobs), dict[str, float]()
    outcomes, lost = list[Outcome](), set[str]()
    with tqdm(total=sum(len(job.names) for job in jobs), desc="runs", unit="") as bar:
        while left and time.monotonic() < ends:
            time.sleep(pause)
            active, now = queue(), time.monotonic()
            for job in list(left):
                if active is None or job.number in active:  # a job that was requeued may have left a result
                    seen[job.number] = now
                    continue
                found = job.outcomes(folder)
                if found is None:
                    if now - seen.setdefault(job.number, now) < LATE: continue
                    found = job.failed(f"Slurm's job {job.number} ended without a result")
                    lost |= set(job.names)
                left.remove(job)
                outcomes += found
                bar.update(len(found))
    return outcomes + [Outcome(name, "paused", QUEUED) for job in left for name in job.names], lost


def on_slurm(
    todo: Runs,  # configurations, each with what to keep
    folder: str,  # of the records, below `data/runs`, which all machines must share
    seconds: float = math.inf,  # how long to wait; the jobs go on after that
    size: int = 5,  # runs of a cohort, at most
    notebooks: bool = True,  # whether to train in notebooks
    options: SlurmOptions = SlurmOptions(),  # of each job
    pause: float = 5.0,  # seconds between two looks at the queue
) -> list[Outcome]:  # one per run
    """Train runs as jobs of Slurm and wait for them.

    A job that dies costs its own runs; at the end it is submitted once more, with those that needed it. If this process
    ends, the jobs stay, and the next call follows them. Raises `NotReady` without Slurm or submitit.
    """
    problems = []
    if not shutil.which("sbatch"):
        problems.append("slurm: sbatch is not on the PATH; call this where jobs are submitted, or use --executor local")
    if not find_spec("submitit"): problems.append('slurm: submitit is not installed; pip install "ldrld[slurm]"')
    if problems: raise NotReady(problems)
    os.environ["OMP_NUM_THREADS"] = "1"  # jobs inherit the environment
    jobs, ends = list[Submitted](), time.monotonic() + seconds
    try:
        with terminable():
            jobs = submit(todo, folder, size, notebooks, options)
            outcomes, lost = follow(jobs, folder, ends - time.monotonic(), pause)
            if not lost: return outcomes
            lost |= {o.name for o in outcomes if o.detail == WAITS}
            tqdm.write(f"a job was lost; {', '.join(sorted(lost))}: submitted once more")
            jobs = submit([run for run in todo if name_of(run[0]) in lost], folder, size, notebooks, options)
            return [o for o in outcomes if o.name not in lost] + follow(jobs, folder, ends - time.monotonic(), pause)[0]
    except KeyboardInterrupt:
        print("the jobs stay with Slurm; repeat the command to follow them, or scancel", *(job.number for job in jobs))
        raise
