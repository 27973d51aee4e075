"""Runs a whole profile: training notebooks two at a time, then the notebooks that make tables and figures.

Plain code rather than a notebook: it starts processes, and there is nothing in it to learn about distillation.
"""
import json
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout
from tqdm import tqdm

from ldrld import data, paths
from ldrld.experiments import EXPERIMENTS, batch, profile
from ldrld.report import to_report
from ldrld.runs import KEPT, Paused, RunConfig, company, load_record, lock_of, name_of, run_together, same_pictures

__all__ = ["Outcome", "reproduce", "report", "finished", "cohorts"]

TRAIN, COHORT = "run/train.ipynb", "run/cohort.ipynb"


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook or run."""
    name: str
    status: str  # "done", "paused" or "failed"
    detail: str = ""


def execute(notebook: str, name: str, parameters: dict, folder: str) -> Outcome:
    """Execute a source notebook with papermill; a failure is told by cell and traceback.

    notebook: path under `nbs/`.  name: of the executed copy.  parameters: injected.  folder: below `runs/executed/`.
    """
    try: import papermill
    except ModuleNotFoundError: return Outcome(name, "failed", 'papermill is not installed; pip install "ldrld[run]", or train with --direct')
    target = paths.executed(folder) / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    source = paths.notebooks() / notebook
    if not source.exists(): return Outcome(name, "failed", f"{notebook} is not under {paths.notebooks()}: call this in a checkout of ldrld, or set LDRLD_ROOT to one")
    unknown = set(parameters) - set(papermill.inspect_notebook(str(source)))
    if unknown: return Outcome(name, "failed", f"{notebook} has no parameter {', '.join(sorted(unknown))}")
    try:
        papermill.execute_notebook(str(source), str(target), parameters, kernel_name="python3",
                                   progress_bar=False, cwd=str(source.parent))
    except papermill.PapermillExecutionError as error:
        if error.ename == "Paused": return Outcome(name, "paused", error.evalue)
        trace = "\n".join(error.traceback) if isinstance(error.traceback, list) else str(error.traceback)
        return Outcome(name, "failed", f"{notebook}, cell {error.cell_index}: {error.ename}: {error.evalue}\n{trace}\nlog: {target}")
    except Exception as error:  # a kernel that died, a full disk: reported like any other failure, the rest goes on
        return Outcome(name, "failed", f"{notebook}: {type(error).__name__}: {error}\nlog: {target}")
    return Outcome(name, "done")


def execute_one(*arguments) -> list[Outcome]:
    """`execute`, as a task: a list with one outcome."""
    return [execute(*arguments)]


def free(name: str) -> bool:
    """Whether nobody is carrying out this run; another machine may share this folder."""
    try:
        with lock_of(name, timeout=0): return True
    except Timeout: return False


def execute_runs(runs: list[tuple[dict, tuple[str, ...]]], profile_name: str, notebooks: bool) -> list[Outcome]:
    """Carry out runs that share a pass, in a notebook or directly; if that fails, each alone, to know which one it is."""
    names = [name_of(RunConfig(**config)) for config, _ in runs]
    if time.time() > float(os.environ.get("LDRLD_DEADLINE", "inf")): return [Outcome(name, "paused", "the time budget is spent") for name in names]
    taken = [Outcome(name, "paused", "another process is at it") for name in names if not free(name)]
    runs, names = [r for r, name in zip(runs, names) if name not in {o.name for o in taken}], [n for n in names if n not in {o.name for o in taken}]
    if not runs: return taken
    result = Outcome(names[0], "done")
    try:
        if notebooks and len(runs) == 1: result = execute(TRAIN, names[0], {"profile": profile_name, "keep": list(runs[0][1]), **runs[0][0]}, profile_name)
        elif notebooks:
            given = {"profile": profile_name, "runs": [{**config, "keep": list(keep)} for config, keep in runs]}
            result = execute(COHORT, f"{names[0]}-and-{len(names) - 1}-more", given, profile_name)
        else: run_together([(RunConfig(**config), keep) for config, keep in runs], profile_name, report=None)
    except Paused as pause: result = Outcome(names[0], "paused", str(pause))
    except Exception as error: result = Outcome(names[0], "failed", f"{type(error).__name__}: {error}")
    if result.status == "failed" and len(runs) > 1: return taken + [o for r in runs for o in execute_runs([r], profile_name, notebooks)]
    return taken + [Outcome(name, result.status, result.detail) for name in names]


def cohorts(runs: list[tuple[RunConfig, tuple[str, ...]]], size: int) -> list[list[tuple[RunConfig, tuple[str, ...]]]]:
    """Pack runs that can share a pass and a teacher into cohorts of at most `size`, as equal as they come, in the order of `runs`."""
    groups: dict = {}
    for config, keep in runs: groups.setdefault((company(config), config.teacher and name_of(config.teacher)), []).append((config, keep))
    packed = []
    for group in groups.values():
        n = math.ceil(len(group) / size)
        packed += [group[k * len(group) // n : (k + 1) * len(group) // n] for k in range(n)]
    return packed


def finished(config: RunConfig, keep: tuple[str, ...], profile_name: str) -> bool:
    """Whether the run `config` has its record in `profile_name`, and besides all that `keep` names."""
    name = name_of(config)
    return load_record(name, profile_name) is not None and all(KEPT[k](name, profile_name).exists() for k in keep)


def to_log(file: str) -> None:
    """Send what this process and its kernels say on standard error to a file, away from the progress bar."""
    with open(file, "a", encoding="utf-8") as log: os.dup2(log.fileno(), 2)


def in_parallel(what: str, tasks: list[tuple], jobs: int) -> list[Outcome]:
    """Carry out tasks (names, function, arguments) in `jobs` processes of one thread each; failures are told at once."""
    if not tasks: return []
    os.environ["OMP_NUM_THREADS"] = "1"  # two processes of two threads on two cores are slower than two of one
    outcomes, log = [], paths.executed("kernels.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(max(1, min(jobs, len(tasks))), multiprocessing.get_context("spawn"), to_log, (str(log),))
    with pool, tqdm(total=sum(len(names) for names, *_ in tasks), desc=what, unit="") as bar:
        futures = {pool.submit(function, *arguments): names for names, function, *arguments in tasks}
        try:
            for future in as_completed(futures):
                try: ended = future.result()
                except Exception as error:  # a worker that was killed takes the others with it: say so, keep what is done
                    ended = [Outcome(name, "failed", f"a process died: {type(error).__name__}: {error}\nlog: {log}") for name in futures[future]]
                outcomes += ended
                for outcome in ended:
                    if outcome.status == "failed": tqdm.write(f"FAILED {outcome.name}\n{outcome.detail}")
                bar.update(len(ended))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return outcomes


def report(p: str = "quick", only: tuple[str, ...] = (), jobs: int = 2) -> list[Outcome]:
    """Make tables and figures of a profile from its records, see `ldrld.report.to_report`; arguments as in `reproduce`, one outcome a notebook."""
    p = str(Path(p).resolve()) if p.endswith((".yaml", ".yml")) else p
    chosen = [EXPERIMENTS[name] for name in (only or to_report(p))]
    tasks = [([e.notebook], execute_one, f"paper/{e.notebook}.ipynb", e.notebook, {"profile": p}, profile(p).name) for e in chosen]
    return in_parallel("tables and figures", tasks, jobs)


def reproduce(p: str = "quick", only: tuple[str, ...] = (), jobs: int = 2, seconds: float = math.inf,
              notebooks: bool = True, together: int = 5) -> list[Outcome]:
    """Make every run of a profile that is not finished, then its tables and figures.

    p: "quick", "small", "paper" or a YAML file.  only: names of experiments, none for those that the profile selects.  jobs: processes at a time.
    seconds: time budget; runs pause after the epoch in which it ends, and go on at the next call.
    notebooks: run training in its notebook through papermill, else directly.
    together: students at most that share a pass over the pictures.
    Returns one outcome for each run and notebook.
    """
    folder, runs = profile(p).name, batch(p, only)
    todo = [(config, keep) for config, keep in runs if not finished(config, keep, folder)]
    if todo and profile(p).dataset != "cifar100":  # whose files are checked: here new runs must see what the finished ones saw
        images = data.load(profile(p).dataset)
        for record in filter(None, (load_record(name_of(config), folder) for config, _ in runs)): same_pictures(record, images)
    print(f"{len(runs)} runs in profile {folder}, {len(runs) - len(todo)} finished before")
    if math.isfinite(seconds): os.environ["LDRLD_DEADLINE"] = str(time.time() + 0.9 * seconds)
    task = lambda runs: ([name_of(c) for c, _ in runs], execute_runs, [(c.model_dump(), k) for c, k in runs], folder, notebooks)
    teachers, students = [[run] for run in todo if "weights" in run[1]], [run for run in todo if "weights" not in run[1]]
    # while a teacher learns, other processes need not wait: there are students that ask none
    meanwhile = cohorts([run for run in students if not run[0].teacher], together) if 0 < len(teachers) < jobs else []
    outcomes = in_parallel("teachers", [task(runs) for runs in teachers + meanwhile], jobs)
    untrained = {name_of(c) for ((c, k),) in teachers if not finished(c, k, folder)}
    students = [run for run in students if run not in sum(meanwhile, [])]
    ready = [(c, k) for c, k in students if not c.teacher or name_of(c.teacher) not in untrained]
    outcomes += [Outcome(name_of(c), "paused", "its teacher is not finished") for c, k in students if (c, k) not in ready]
    outcomes += in_parallel("students", [task(runs) for runs in cohorts(ready, together)], jobs)
    os.environ.pop("LDRLD_DEADLINE", None)
    return outcomes + report(p, only, jobs)


def compare_with_committed(profile_name: str) -> str | None:
    """How the records made now differ from those committed with the project; None if they are the same files."""
    made, committed = paths.records(profile_name), paths.root() / "data" / "runs" / profile_name
    if made.resolve() == committed.resolve() or not committed.exists(): return None
    accuracy = lambda file: json.loads(Path(file).read_text(encoding="utf-8"))["last_accuracy"]
    both = [(accuracy(f), accuracy(committed / f.name)) for f in sorted(made.glob("*.json")) if (committed / f.name).exists()]
    if not both: return "none of these runs has a committed record to compare with"
    equal, largest = sum(a == b for a, b in both), max(abs(a - b) for a, b in both)
    mean = sum(a - b for a, b in both) / len(both)
    return (f"{len(both)} runs have a committed record: {equal} repeat it exactly; the largest difference is {largest:.2f} points, "
            f"the mean over all {mean:+.3f}")
