"""Runs a whole profile in several processes, by priority, and then the notebooks with tables and figures.

Plain code rather than a notebook, because it starts processes and has nothing to do with distillation itself.
"""

import json
import math
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

from ldrld.batch.leftovers import sweep
from ldrld.batch.notebooks import COHORT, TRAIN, execute, execute_one
from ldrld.batch.pending import cohorts, free, missing, odd, taken_up_again, wanted
from ldrld.batch.preflight import NotReady, needs_of, notebooks_for
from ldrld.batch.workers import Outcome, in_parallel
from ldrld.core import paths
from ldrld.experiments.catalog import find, selected
from ldrld.experiments.config import RunConfig, name_of
from ldrld.experiments.in_flight import run_in_flight
from ldrld.experiments.profiles import profile
from ldrld.experiments.records import finished, load_divergence, load_record
from ldrld.experiments.registry import SHARED, Experiment
from ldrld.experiments.runner import Paused, run_together
from ldrld.training.divergence import Diverged

__all__ = ["Elsewhere", "reproduce", "report", "compare_with_committed"]

# given runs, the folder of their records and the seconds left; one outcome per run
Elsewhere: TypeAlias = Callable[[list[tuple[RunConfig, tuple[str, ...]]], str, float], list[Outcome]]


def execute_runs(runs: list[tuple[dict, tuple[str, ...]]], profile_name: str, notebooks: bool) -> list[Outcome]:
    """Train runs that share a data pass, in a notebook or directly; if that fails, each alone to find the cause."""
    names = [name_of(RunConfig(**config)) for config, _ in runs]
    if time.time() > float(os.environ.get("LDRLD_DEADLINE", "inf")):
        return [Outcome(name, "paused", "the time budget is spent") for name in names]
    taken = [Outcome(name, "paused", "another process runs it") for name in names if not free(name)]
    busy = {outcome.name for outcome in taken}
    runs = [run for run, name in zip(runs, names) if name not in busy]
    names = [name for name in names if name not in busy]
    if not runs: return taken
    result = Outcome(names[0], "done")
    try:
        if notebooks and len(runs) == 1:
            given = {"profile": profile_name, "keep": list(runs[0][1]), **runs[0][0]}
            result = execute(TRAIN, names[0], given, profile_name)
        elif notebooks:
            given = {"profile": profile_name, "runs": [{**config, "keep": list(keep)} for config, keep in runs]}
            result = execute(COHORT, f"{names[0]}-and-{len(names) - 1}-more", given, profile_name)
        else: run_together([(RunConfig(**config), keep) for config, keep in runs], profile_name, report=None)
    except Paused as pause: result = Outcome(names[0], "paused", str(pause))
    except Diverged as diverged: result = Outcome(names[0], "diverged", str(diverged))
    except Exception as error: result = Outcome(names[0], "failed", f"{type(error).__name__}: {error}")
    if result.status in ("failed", "diverged") and len(runs) > 1:
        return taken + [o for r in runs for o in execute_runs([r], profile_name, notebooks)]
    return taken + [Outcome(name, result.status, result.detail) for name in names]


def in_flight(runs: list[tuple[RunConfig, tuple[str, ...]]], folder: str, seconds: float,
              at_once: int) -> list[Outcome]:
    """Train runs in parallel in this process, see `ldrld.experiments.in_flight.run_in_flight`; one outcome per run."""
    run_in_flight(runs, folder, at_once, seconds, tqdm.write)
    outcomes = []
    for name in (name_of(config) for config, _ in runs):
        if found := load_divergence(name, folder): outcomes.append(Outcome(name, "diverged", str(found.error)))
        elif load_record(name, folder): outcomes.append(Outcome(name, "done"))
        else: outcomes.append(Outcome(name, "paused", "the time budget is spent"))
    return outcomes


def report(
    p: str = "quick",
    only: tuple[str, ...] = (),
    jobs: int = 2,
) -> list[Outcome]:  # one per notebook
    """Make the tables and figures of a profile, see `ldrld.results.tables.to_report`.

    At the end, the hashes of all results are in `data/manifests`, see `ldrld.results.manifest`.

    Raises `NotReady` if notebooks or papermill are missing.
    """
    from ldrld.results.manifest import folders_of, stamps, update_manifest
    from ldrld.results.tables import to_report  # not needed on machines that only train

    p = str(Path(p).resolve()) if p.endswith((".yaml", ".yml")) else p
    chosen = [find(name) for name in (only or to_report(p))]
    if problems := notebooks_for(f"paper/{e.notebook}.ipynb" for e in chosen): raise NotReady(problems)
    folder = profile(p).name
    def given(e: Experiment) -> dict:
        return {"profile": p, "experiment": e.path} if e.notebook in SHARED else {"profile": p}
    tasks = [([e.figure], execute_one, f"paper/{e.notebook}.ipynb", e.figure, given(e), folder) for e in chosen]
    before = {part: stamps(part) for part in folders_of(folder)}
    outcomes = in_parallel("tables and figures", tasks, jobs)
    for part, stamped in before.items(): update_manifest(part, stamped)
    return outcomes


def reproduce(
    p: str = "quick",
    only: tuple[str, ...] = (),
    jobs: int = 2,
    seconds: float = math.inf,  # time budget
    notebooks: bool = True,  # whether to train in notebooks with papermill
    together: int = 5,  # students that share a data pass, at most
    plan: bool = False,  # the runs of the profile's plan (`ldrld.experiments.plan`), and no tables
    graphs: bool = False,  # train in this process with CUDA graphs (`ldrld.training.graphs`), without notebooks
    at_once: int = 8,  # students trained at the same time with `graphs`
    elsewhere: Elsewhere | None = None,  # trains the runs, see `ldrld.batch.cluster`; None: processes here
) -> list[Outcome]:  # one per run and notebook
    """Make the missing runs of a profile (see `missing`), the most valuable first, then its tables and figures.

    At the end of the time budget, runs pause; the next call resumes them, on this machine or, with a copy of the output
    folder, on another. Without `notebooks`, papermill is needed only for tables and figures, which are skipped if it is
    not installed. A run with an invalid record is not repeated, and reported as failed.
    Raises `NotReady`, before anything is started, if data, notebooks, a teacher or disk space are missing.
    """
    folder, runs, tried = profile(p).name, wanted(p, only, plan), set()
    sweep(p, only)
    outcomes = [Outcome(name, "failed", why) for config, _ in runs if (why := odd(name := name_of(config), folder))]
    for o in outcomes: print(f"FAILED {o.name}\n{o.detail}")
    not_tried = {o.name for o in outcomes}
    todo = [(c, k) for c, k in missing(p, only, plan) if name_of(c) not in not_tried]
    made = [config for config, _ in runs if finished(config, folder)]
    print(f"{len(runs)} runs in profile {folder}, {len(made)} finished before")
    if again := taken_up_again(todo, folder): print(again)
    drawn = [f"paper/{find(name).notebook}.ipynb" for name in only or selected(p)] if not plan else []
    problems = notebooks_for([TRAIN, COHORT, *drawn]) if notebooks else []
    problems += needs_of([config for config, _ in todo], made, folder)
    if problems: raise NotReady(problems)
    if math.isfinite(seconds): os.environ["LDRLD_DEADLINE"] = str(time.time() + 0.9 * seconds)
    ends = time.monotonic() + seconds
    while todo:
        def task(runs: list[tuple[RunConfig, tuple[str, ...]]]) -> tuple:
            given = [(c.model_dump(), k) for c, k in runs]
            return [name_of(c) for c, _ in runs], execute_runs, given, folder, notebooks
        needs = {name_of(c): {name_of(c.teacher)} for c, _ in todo if c.teacher}
        if elsewhere: outcomes += elsewhere(todo, folder, ends - time.monotonic())
        elif graphs: outcomes += in_flight(todo, folder, ends - time.monotonic(), at_once)
        else: outcomes += in_parallel("runs", [task(runs) for runs in cohorts(todo, together)], jobs, needs)
        tried |= {name_of(c) for c, _ in todo} | not_tried
        # a finished search determines further runs
        todo = [(c, k) for c, k in missing(p, only, plan) if name_of(c) not in tried]
    os.environ.pop("LDRLD_DEADLINE", None)
    if plan: return outcomes
    why = "papermill is not installed here"
    if notebooks or find_spec("papermill"):
        try: return outcomes + report(p, only, jobs)
        except NotReady:
            if notebooks: raise
        why = "their notebooks are missing, since this is no checkout of ldrld"
    print(f"no tables and figures: {why}; use `ldrld report --profile {p}` where it is")
    return outcomes


def compare_with_committed(
    profile_name: str,  # folder of the records, below `data/runs`
) -> str | None:  # a sentence; None if they are the same files, or none is committed
    """How the new records differ from those committed with the project."""
    made, committed = paths.records(profile_name), paths.root() / "data" / "runs" / profile_name
    if made.resolve() == committed.resolve() or not committed.exists(): return None
    def accuracy(file: Path) -> float | None:
        try: return float(json.loads(file.read_text(encoding="utf-8"))["last_accuracy"])
        except (OSError, ValueError, KeyError, TypeError): return None  # invalid, reported elsewhere
    read = [(accuracy(file), accuracy(committed / file.name)) for file in sorted(made.glob("*.json"))]
    both = [(a, b) for a, b in read if a is not None and b is not None]
    if not both: return "none of these runs has a committed record to compare with"
    equal, largest = sum(a == b for a, b in both), max(abs(a - b) for a, b in both)
    mean = sum(a - b for a, b in both) / len(both)
    return (f"{len(both)} runs have a committed record: {equal} repeat it exactly; "
            f"the largest difference is {largest:.2f} points, the mean over all {mean:+.3f}")
