"""Runs a whole profile in several processes, the most valuable runs first, then the notebooks with tables and figures.

Plain code rather than a notebook: it starts processes and teaches nothing about distillation.
"""
import json
import math
import multiprocessing
import os
import re
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

from filelock import Timeout
from tqdm import tqdm

from ldrld.batch.preflight import NotReady, needs_of, notebooks_for
from ldrld.core import paths
from ldrld.experiments.catalog import EXPERIMENTS, batch, selected
from ldrld.experiments.profiles import profile
from ldrld.experiments.config import RunConfig, name_of
from ldrld.experiments.records import KEPT, finished, load_divergence, load_record
from ldrld.experiments.in_flight import run_in_flight
from ldrld.experiments.runner import Paused, company, lock_of, run_together
from ldrld.training.loop import Diverged

__all__ = ["Outcome", "Terminated", "reproduce", "report", "missing", "taken_up_again", "cohorts", "sweep"]

TRAIN, COHORT = "run/train.ipynb", "run/cohort.ipynb"


@dataclass(frozen=True)
class Outcome:
    """The outcome of one notebook or run."""
    name: str
    status: str  # "done", "paused", "diverged" or "failed"
    detail: str = ""


def with_kernel(call, *arguments, **options):
    """Call a function that starts a Jupyter kernel and executes a notebook; retry at most twice if the kernel fails.

    A kernel gets five ports before it binds them. If several kernels start at once, another may take one of the ports;
    the kernel then dies of "Address already in use" before the first cell.
    call: called with `arguments` and `options`; must start from scratch each time.
    """
    from tenacity import Retrying, retry_if_exception_message, stop_after_attempt
    again = retry_if_exception_message(match="Kernel died before replying to kernel_info")
    return Retrying(retry=again, stop=stop_after_attempt(3), reraise=True)(call, *arguments, **options)


@cache
def own_kernel() -> type:
    """A manager of kernels that use this Python, whatever is registered under the name `python3`."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class OwnKernel(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec: return KernelSpec(**get_kernel_dict())

    return OwnKernel


def execute(notebook: str, name: str, parameters: dict, folder: str) -> Outcome:
    """Execute a source notebook with papermill; failures are reported with cell and traceback.

    notebook: path under `nbs/`.  name: of the executed copy.  parameters: injected.  folder: below `runs/executed/`.
    """
    try: import papermill
    except ModuleNotFoundError:
        why = 'papermill is not installed; pip install "ldrld[run]", or train with --no-notebooks'
        return Outcome(name, "failed", why)
    target = paths.executed(folder) / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    source = paths.notebooks() / notebook
    if not source.exists():
        why = f"{notebook} is not under {paths.notebooks()}: call this in a checkout of ldrld, or set LDRLD_ROOT to one"
        return Outcome(name, "failed", why)
    unknown = set(parameters) - set(papermill.inspect_notebook(str(source)))
    if unknown: return Outcome(name, "failed", f"{notebook} has no parameter {', '.join(sorted(unknown))}")
    try:
        with_kernel(papermill.execute_notebook, str(source), str(target), parameters, kernel_name="python3",
                    kernel_manager_class=own_kernel(), progress_bar=False, cwd=str(source.parent))
    except papermill.PapermillExecutionError as error:
        if error.ename in ("Paused", "Diverged"): return Outcome(name, error.ename.lower(), error.evalue)
        trace = "\n".join(error.traceback) if isinstance(error.traceback, list) else str(error.traceback)
        where = f"{notebook}, cell {error.cell_index}"
        return Outcome(name, "failed", f"{where}: {error.ename}: {error.evalue}\n{trace}\nlog: {target}")
    except Exception as error:  # a dead kernel, a full disk: reported like any other failure, the other runs continue
        return Outcome(name, "failed", f"{notebook}: {type(error).__name__}: {error}\nlog: {target}")
    return Outcome(name, "done")


def execute_one(*arguments) -> list[Outcome]:
    """`execute`, as a task: a list with one outcome."""
    return [execute(*arguments)]


def free(name: str) -> bool:
    """Whether no process, here or on a machine sharing this folder, holds the lock of a run."""
    try:
        with lock_of(name, timeout=0): return True
    except Timeout: return False


def execute_runs(runs: list[tuple[dict, tuple[str, ...]]], profile_name: str, notebooks: bool) -> list[Outcome]:
    """Train runs that share a data pass, in a notebook or directly; if that fails, each alone to find the cause."""
    names = [name_of(RunConfig(**config)) for config, _ in runs]
    if time.time() > float(os.environ.get("LDRLD_DEADLINE", "inf")):
        return [Outcome(name, "paused", "the time budget is spent") for name in names]
    taken = [Outcome(name, "paused", "another process is at it") for name in names if not free(name)]
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


def cohorts(runs: list[tuple[RunConfig, tuple[str, ...]]], size: int) -> list[list[tuple[RunConfig, tuple[str, ...]]]]:
    """Group runs of one network that can share a data pass and a teacher into similar cohorts of at most `size`.

    Cohorts are in the order of their first runs in `runs`; a run whose weights others need is alone. Other networks
    could share the pass, too, but belong to other pairs, and the most valuable runs would wait for them.
    """
    groups: dict = {}
    for i, (config, keep) in enumerate(runs):
        alone = name_of(config) if "weights" in keep else None
        key = company(config), config.model, config.teacher and name_of(config.teacher), alone
        groups.setdefault(key, []).append((i, config, keep))
    packed = []
    for group in groups.values():
        n = math.ceil(len(group) / size)
        packed += [group[k * len(group) // n : (k + 1) * len(group) // n] for k in range(n)]
    packed.sort(key=lambda cohort: cohort[0][0])
    return [[(config, keep) for _, config, keep in cohort] for cohort in packed]


def odd(name: str, folder: str) -> str:
    """What is wrong with a run's record; empty if it is valid or missing."""
    try: load_record(name, folder)
    except ValueError as error: return str(error)
    return ""


def wanted(p, only: tuple[str, ...] = (), plan: bool = False) -> list[tuple[RunConfig, tuple[str, ...]]]:
    """The runs of a profile's experiments, or of its plan; arguments as in `reproduce`."""
    if not plan: return batch(p, only)
    from ldrld.experiments.plan import planned  # here, since it needs what tables are made with
    return planned(p)


def missing(p, only: tuple[str, ...] = (), plan: bool = False) -> list[tuple[RunConfig, tuple[str, ...]]]:
    """The missing runs of a profile, each with what to keep; arguments as in `reproduce`.

    First the unfinished runs (see `ldrld.experiments.records.finished`), the most valuable first. Then finished runs
    without a required file: data for a figure, or a teacher's weights while one of its students is unfinished.
    """
    folder, runs = profile(p).name, wanted(p, only, plan)
    made = {name_of(config) for config, _ in runs if finished(config, folder)}
    there = lambda kind, name: KEPT[kind](name, folder).exists()
    first, again, asked = [], [], set()
    for config, keep in reversed(runs):  # students before their teachers
        name = name_of(config)
        lacks = tuple(kind for kind in keep if not there(kind, name) and (kind != "weights" or name in asked))
        if load_divergence(name, folder): continue  # it has a result
        if name not in made: first.append((config, keep))
        elif lacks: again.append((config, lacks))
        else: continue
        if config.teacher and not (name in made and there("weights", name)): asked.add(name_of(config.teacher))
    return first[::-1] + again[::-1]


def taken_up_again(todo: list[tuple[RunConfig, tuple[str, ...]]], folder: str) -> str:
    """The finished runs of `todo` (from `missing`) that lack required files, and which; empty if none does."""
    of: dict[str, list[str]] = {}
    for config, lacks in todo:
        for kind in lacks if finished(config, folder) else (): of.setdefault(kind, []).append(name_of(config))
    if not of: return ""
    some = lambda names: ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    lacking = "; ".join(f"{kind} of {some(names)}" for kind, names in of.items())
    return f"finished, but what is needed of them is not here, so they are taken up again: {lacking}"


LEFT = re.compile(r"\.(\d+)\.(?:tmp|part)$")  # the process that wrote it


def _is_left(path: Path) -> bool:
    """Whether a partial file was left by a dead process; one that may be alive, here or elsewhere, keeps it."""
    try: age = time.time() - path.stat().st_mtime
    except FileNotFoundError: return False
    if age > 3600 or os.name != "posix": return age > 3600
    try: os.kill(int(LEFT.search(path.name)[1]), 0)
    except ProcessLookupError: return age > 60
    except (PermissionError, OverflowError): pass
    return False


def sweep(p, only: tuple[str, ...] = ()) -> list[Path]:
    """Remove and return leftovers of killed processes: partial files and checkpoints of finished runs.

    Arguments as in `reproduce`.
    """
    folder, swept = profile(p).name, []
    records = paths.records(folder)
    results = (records, records / "logits", records / "insight",
               paths.tables(folder), paths.figures(folder), paths.weights(folder))
    for place in (*results, *paths.work().glob("*")):
        if place.is_dir(): swept += [path for path in place.iterdir() if LEFT.search(path.name) and _is_left(path)]
    busy = {name_of(config) for config, _ in missing(p, only)}
    for name in {name_of(config) for config, _ in batch(p, only)} - busy:
        checkpoints = [path for path in paths.work(name).glob("checkpoint.pt*") if path.is_file()]
        if checkpoints and free(name): swept += checkpoints
    for path in swept: path.unlink(missing_ok=True)
    return swept


class Terminated(KeyboardInterrupt):
    """SIGTERM: a batch stops its processes before it ends."""


@contextmanager
def terminable():
    """Let SIGTERM raise `Terminated`, but only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number, frame): raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try: yield
    finally: signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """End this process, and with it its kernels, as soon as its parent is gone."""
    multiprocessing.parent_process().join()
    os._exit(1)


def prepared(log_file: str) -> None:
    """Prepare a worker process: it ends with its parent, and standard error, also of its kernels, goes to a log."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    with open(log_file, "a", encoding="utf-8") as log: os.dup2(log.fileno(), 2)


class Workers:
    """A number of processes, each in its own pool, so that one that is killed does not affect the others."""

    def __init__(self, jobs: int, log: Path):
        self.log, self.others = log, multiprocessing.active_children()
        self.idle = [self.new() for _ in range(jobs)]
        self.busy: dict[Future, ProcessPoolExecutor] = {}

    def new(self) -> ProcessPoolExecutor:
        """A pool of one process, which starts with its first task."""
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepared, (str(self.log),))

    def submit(self, function, *arguments) -> Future:
        """Hand a task to an idle process."""
        pool = self.idle.pop()
        try: future = pool.submit(function, *arguments)
        except BrokenProcessPool:  # killed while idle
            pool = self.new()
            future = pool.submit(function, *arguments)
        self.busy[future] = pool
        return future

    def ended(self, future: Future) -> bool:
        """Release the process of a finished task; returns whether it was killed."""
        pool, killed = self.busy.pop(future), isinstance(future.exception(), BrokenProcessPool)
        if killed: pool.shutdown(wait=False)
        self.idle.append(self.new() if killed else pool)
        return killed

    def close(self, at_once: bool = False) -> None:
        """End all processes, after their tasks or at once."""
        if at_once:
            for child in multiprocessing.active_children():
                if child not in self.others: child.terminate()
        for pool in (*self.idle, *self.busy.values()): pool.shutdown(wait=not at_once, cancel_futures=True)


def in_flight(runs: list[tuple[RunConfig, tuple[str, ...]]], folder: str, seconds: float,
              at_once: int) -> list[Outcome]:
    """Train runs side by side in this process, see `ldrld.experiments.in_flight.run_in_flight`; one outcome per run."""
    run_in_flight(runs, folder, at_once, seconds, tqdm.write)
    outcomes = []
    for name in (name_of(config) for config, _ in runs):
        if found := load_divergence(name, folder): outcomes.append(Outcome(name, "diverged", str(found.error)))
        elif load_record(name, folder): outcomes.append(Outcome(name, "done"))
        else: outcomes.append(Outcome(name, "paused", "the time budget is spent"))
    return outcomes


def result_of(future, names: list[str], log: Path) -> list[Outcome]:
    """The outcomes of a task; a process that was killed twice fails, the others continue."""
    try: outcomes = future.result()
    except Exception as error:
        what = "a process was killed twice" if isinstance(error, BrokenProcessPool) else "its process failed"
        outcomes = [Outcome(name, "failed", f"{what}: {type(error).__name__}: {error}\nlog: {log}") for name in names]
    for outcome in outcomes:
        if outcome.status == "failed": tqdm.write(f"FAILED {outcome.name}\n{outcome.detail}")
    return outcomes


def in_parallel(what: str, tasks: list[tuple], jobs: int, needs: dict[str, set[str]] | None = None) -> list[Outcome]:
    """Execute tasks (names, function, arguments) in order, in `jobs` processes of one thread each.

    needs: per name the names that must be done before; tasks that need a failed or paused one are reported as paused.
    """
    if not tasks: return []
    os.environ["OMP_NUM_THREADS"] = "1"  # on two cores, two processes with two threads are slower than with one
    outcomes, log = [], paths.executed("kernels.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    task_of = {name: i for i, (names, *_) in enumerate(tasks) for name in names}
    graph = TopologicalSorter()
    for i, (names, *_) in enumerate(tasks):
        needed = set().union(*((needs or {}).get(name, ()) for name in names))
        graph.add(i, *(task_of[name] for name in needed if name in task_of))
    graph.prepare()
    ready, running, killed_once = [], {}, set()
    workers = Workers(max(1, min(jobs, len(tasks))), log)
    with terminable(), tqdm(total=len(task_of), desc=what, unit="") as bar:
        try:
            while True:
                ready = sorted([*ready, *graph.get_ready()])
                while ready and workers.idle:
                    i = ready.pop(0)
                    running[workers.submit(*tasks[i][1:])] = i
                if not running: break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    i, killed = running.pop(future), workers.ended(future)
                    if killed and i not in killed_once:
                        tqdm.write(f"a process was killed; {', '.join(tasks[i][0])}: tried once more")
                        killed_once.add(i)
                        ready.append(i)
                        continue
                    ended = result_of(future, tasks[i][0], log)
                    outcomes += ended
                    bar.update(len(ended))
                    if all(o.status == "done" for o in ended): graph.done(i)
        except BaseException:
            workers.close(at_once=True)
            raise
        workers.close()
    left = task_of.keys() - {o.name for o in outcomes}
    waiting = [name for name in task_of if name in left]
    return outcomes + [Outcome(name, "paused", "a run that it needs is not finished") for name in waiting]


def report(p: str = "quick", only: tuple[str, ...] = (), jobs: int = 2) -> list[Outcome]:
    """Make the tables and figures of a profile, see `ldrld.results.tables.to_report`; one outcome per notebook.

    Arguments as in `reproduce`. Raises `NotReady` if notebooks or papermill are missing.
    """
    from ldrld.results.tables import to_report  # not needed on machines that only train

    p = str(Path(p).resolve()) if p.endswith((".yaml", ".yml")) else p
    chosen = [EXPERIMENTS[name] for name in (only or to_report(p))]
    if problems := notebooks_for(f"paper/{e.notebook}.ipynb" for e in chosen): raise NotReady(problems)
    folder = profile(p).name
    tasks = [([e.notebook], execute_one, f"paper/{e.notebook}.ipynb", e.notebook, {"profile": p}, folder)
             for e in chosen]
    return in_parallel("tables and figures", tasks, jobs)


def reproduce(p: str = "quick", only: tuple[str, ...] = (), jobs: int = 2, seconds: float = math.inf,
              notebooks: bool = True, together: int = 5, plan: bool = False,
              graphs: bool = False, at_once: int = 8) -> list[Outcome]:
    """Make the missing runs of a profile (see `missing`), the most valuable first, then its tables and figures.

    p: "quick", "small", "paper" or a YAML file.  only: names of experiments; by default those of the profile.
    jobs: parallel processes.
    seconds: time budget; runs pause at its end and resume at the next call, on this machine or, with a copy of the
    output folder, on another.
    notebooks: train in notebooks with papermill, else directly; then papermill is needed only for tables and figures,
    which are skipped if it is not installed.
    together: maximum number of students that share a data pass.
    plan: make the runs of the profile's plan (`ldrld.experiments.plan`) instead of its experiments, and no tables.
    graphs: train in this process with CUDA graphs on separate streams (`ldrld.training.graphs`), without notebooks.
    at_once: number of concurrent students for `graphs`.
    Returns one outcome per run and notebook; a run with an invalid record is not repeated, and reported as failed.
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
    drawn = [f"paper/{EXPERIMENTS[name].notebook}.ipynb" for name in only or selected(p)] if not plan else []
    problems = notebooks_for([TRAIN, COHORT, *drawn]) if notebooks else []
    problems += needs_of([config for config, _ in todo], made, folder)
    if problems: raise NotReady(problems)
    if math.isfinite(seconds): os.environ["LDRLD_DEADLINE"] = str(time.time() + 0.9 * seconds)
    ends = time.monotonic() + seconds
    while todo:
        def task(runs):
            given = [(c.model_dump(), k) for c, k in runs]
            return [name_of(c) for c, _ in runs], execute_runs, given, folder, notebooks
        needs = {name_of(c): {name_of(c.teacher)} for c, _ in todo if c.teacher}
        if graphs: outcomes += in_flight(todo, folder, ends - time.monotonic(), at_once)
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
        why = "their notebooks are not here, since this is no checkout of ldrld"
    print(f"no tables and figures: {why}; `ldrld report --profile {p}` makes them where it is")
    return outcomes


def compare_with_committed(profile_name: str) -> str | None:
    """How the new records differ from those committed with the project; None if they are the same files."""
    made, committed = paths.records(profile_name), paths.root() / "data" / "runs" / profile_name
    if made.resolve() == committed.resolve() or not committed.exists(): return None
    def accuracy(file: Path) -> float | None:
        try: return float(json.loads(file.read_text(encoding="utf-8"))["last_accuracy"])
        except (OSError, ValueError, KeyError, TypeError): return None  # invalid, reported elsewhere
    both = [(accuracy(file), accuracy(committed / file.name)) for file in sorted(made.glob("*.json"))]
    both = [pair for pair in both if None not in pair]
    if not both: return "none of these runs has a committed record to compare with"
    equal, largest = sum(a == b for a, b in both), max(abs(a - b) for a, b in both)
    mean = sum(a - b for a, b in both) / len(both)
    return (f"{len(both)} runs have a committed record: {equal} repeat it exactly; "
            f"the largest difference is {largest:.2f} points, the mean over all {mean:+.3f}")
