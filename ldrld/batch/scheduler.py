"""Runs a whole profile: what is worth most first, several processes at a time, then the notebooks that make tables and figures.

Plain code rather than a notebook: it starts processes, and there is nothing in it to learn about distillation.
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
from ldrld.experiments.catalog import EXPERIMENTS, batch, profile, selected
from ldrld.experiments.config import RunConfig, name_of
from ldrld.experiments.records import KEPT, finished, load_divergence, load_record
from ldrld.experiments.runs import Diverged, Paused, company, lock_of, run_in_flight, run_together

__all__ = ["Outcome", "Terminated", "reproduce", "report", "missing", "taken_up_again", "cohorts", "sweep"]

TRAIN, COHORT = "run/train.ipynb", "run/cohort.ipynb"


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook or run."""
    name: str
    status: str  # "done", "paused", "diverged" or "failed"
    detail: str = ""


def with_kernel(call, *arguments, **options):
    """Call what starts a Jupyter kernel and executes a notebook there; anew, twice at most, where the kernel did not come up.

    A kernel is told five ports before it binds them. Where several start side by side another may take one in between; this
    one then dies of "Address already in use", before it has seen a cell.
    call: with `arguments` and `options`; must start from scratch each time.
    """
    from tenacity import Retrying, retry_if_exception_message, stop_after_attempt
    again = retry_if_exception_message(match="Kernel died before replying to kernel_info")
    return Retrying(retry=again, stop=stop_after_attempt(3), reraise=True)(call, *arguments, **options)


@cache
def own_kernel() -> type:
    """A manager of kernels that run this very Python, whatever somebody has registered under the name `python3`."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class OwnKernel(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec: return KernelSpec(**get_kernel_dict())

    return OwnKernel


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
        with_kernel(papermill.execute_notebook, str(source), str(target), parameters, kernel_name="python3",
                    kernel_manager_class=own_kernel(), progress_bar=False, cwd=str(source.parent))
    except papermill.PapermillExecutionError as error:
        if error.ename in ("Paused", "Diverged"): return Outcome(name, error.ename.lower(), error.evalue)
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
    except Diverged as diverged: result = Outcome(names[0], "diverged", str(diverged))
    except Exception as error: result = Outcome(names[0], "failed", f"{type(error).__name__}: {error}")
    if result.status in ("failed", "diverged") and len(runs) > 1: return taken + [o for r in runs for o in execute_runs([r], profile_name, notebooks)]
    return taken + [Outcome(name, result.status, result.detail) for name in names]


def cohorts(runs: list[tuple[RunConfig, tuple[str, ...]]], size: int) -> list[list[tuple[RunConfig, tuple[str, ...]]]]:
    """Pack runs of one network that can share a pass and a teacher into cohorts of at most `size`, as equal as they come.

    The cohorts stand in the order of their first runs in `runs`; a run whose weights others need stands alone. Other networks
    could share the pass, too, but belong to other pairs: what is worth most would wait for them.
    """
    groups: dict = {}
    for i, (config, keep) in enumerate(runs):
        alone = name_of(config) if "weights" in keep else None
        groups.setdefault((company(config), config.model, config.teacher and name_of(config.teacher), alone), []).append((i, config, keep))
    packed = []
    for group in groups.values():
        n = math.ceil(len(group) / size)
        packed += [group[k * len(group) // n : (k + 1) * len(group) // n] for k in range(n)]
    return [[(config, keep) for _, config, keep in cohort] for cohort in sorted(packed, key=lambda cohort: cohort[0][0])]


def odd(name: str, folder: str) -> str:
    """What is wrong with a run's record; empty if nothing is, or if there is none."""
    try: load_record(name, folder)
    except ValueError as error: return str(error)
    return ""


def wanted(p, only: tuple[str, ...] = (), plan: bool = False) -> list[tuple[RunConfig, tuple[str, ...]]]:
    """The runs of a profile's experiments, or of its plan; arguments as in `reproduce`."""
    if not plan: return batch(p, only)
    from ldrld.experiments.plan import planned  # here, since it needs what tables are made with
    return planned(p)


def missing(p, only: tuple[str, ...] = (), plan: bool = False) -> list[tuple[RunConfig, tuple[str, ...]]]:
    """The runs of a profile that are to be carried out, each with what is to be kept of it; arguments as in `reproduce`.

    First those that are not finished, as `ldrld.experiments.runs.finished` says it, those that are worth most first. Then finished ones that
    lack something that is needed: what a figure shows, or a teacher's weights while a student is still to be trained.
    """
    folder, runs = profile(p).name, wanted(p, only, plan)
    made = {name_of(config) for config, _ in runs if finished(config, folder)}
    there = lambda kind, name: KEPT[kind](name, folder).exists()
    first, again, asked = [], [], set()
    for config, keep in reversed(runs):                     # students before their teachers
        name = name_of(config)
        lacks = tuple(kind for kind in keep if not there(kind, name) and (kind != "weights" or name in asked))
        if load_divergence(name, folder): continue             # that is what came of it
        if name not in made: first.append((config, keep))
        elif lacks: again.append((config, lacks))
        else: continue
        if config.teacher and not (name in made and there("weights", name)): asked.add(name_of(config.teacher))
    return first[::-1] + again[::-1]


def taken_up_again(todo: list[tuple[RunConfig, tuple[str, ...]]], folder: str) -> str:
    """Which finished runs of `todo`, from `missing`, lack what is needed, and what; empty if none does."""
    of: dict[str, list[str]] = {}
    for config, lacks in todo:
        for kind in lacks if finished(config, folder) else (): of.setdefault(kind, []).append(name_of(config))
    if not of: return ""
    some = lambda names: ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    lacking = "; ".join(f"{kind} of {some(names)}" for kind, names in of.items())
    return f"finished, but what is needed of them is not here, so they are taken up again: {lacking}"


LEFT = re.compile(r"\.(\d+)\.(?:tmp|part)$")  # the process that wrote it


def _is_left(path: Path) -> bool:
    """Whether a half-written file was left by a process that is gone; one that may be at it, here or elsewhere, keeps its file."""
    try: age = time.time() - path.stat().st_mtime
    except FileNotFoundError: return False
    if age > 3600 or os.name != "posix": return age > 3600
    try: os.kill(int(LEFT.search(path.name)[1]), 0)
    except ProcessLookupError: return age > 60
    except (PermissionError, OverflowError): pass
    return False


def sweep(p, only: tuple[str, ...] = ()) -> list[Path]:
    """Remove what killed processes left of a profile, and return it: half-written files, checkpoints of finished runs.

    Arguments as in `reproduce`.
    """
    folder, swept = profile(p).name, []
    records = paths.records(folder)
    results = (records, records / "logits", records / "insight", paths.tables(folder), paths.figures(folder), paths.weights(folder))
    for place in (*results, *paths.work().glob("*")):
        if place.is_dir(): swept += [path for path in place.iterdir() if LEFT.search(path.name) and _is_left(path)]
    busy = {name_of(config) for config, _ in missing(p, only)}
    for name in {name_of(config) for config, _ in batch(p, only)} - busy:
        checkpoints = [path for path in paths.work(name).glob("checkpoint.pt*") if path.is_file()]
        if checkpoints and free(name): swept += checkpoints
    for path in swept: path.unlink(missing_ok=True)
    return swept


class Terminated(KeyboardInterrupt):
    """SIGTERM: a batch that is told to end ends its processes first."""


@contextmanager
def terminable():
    """Have SIGTERM raise `Terminated` within; where this is not the main thread, signals are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number, frame): raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try: yield
    finally: signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, however it went; a kernel started here ends likewise."""
    multiprocessing.parent_process().join()
    os._exit(1)


def prepared(log_file: str) -> None:
    """Make a process ready for tasks: it ends with its parent, and its standard error, and its kernels', goes to a log."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    with open(log_file, "a", encoding="utf-8") as log: os.dup2(log.fileno(), 2)


class Workers:
    """So many processes, each a pool of its own: one that is killed takes no other with it, and is replaced."""

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
        except BrokenProcessPool:                              # killed while it had nothing to do
            pool = self.new()
            future = pool.submit(function, *arguments)
        self.busy[future] = pool
        return future

    def ended(self, future: Future) -> bool:
        """Take back the process of a task that ended; whether it was killed."""
        pool, killed = self.busy.pop(future), isinstance(future.exception(), BrokenProcessPool)
        if killed: pool.shutdown(wait=False)
        self.idle.append(self.new() if killed else pool)
        return killed

    def close(self, at_once: bool = False) -> None:
        """End all processes: when they have nothing left to do, or at once."""
        if at_once:
            for child in multiprocessing.active_children():
                if child not in self.others: child.terminate()
        for pool in (*self.idle, *self.busy.values()): pool.shutdown(wait=not at_once, cancel_futures=True)


def in_flight(runs: list[tuple[RunConfig, tuple[str, ...]]], folder: str, seconds: float, at_once: int) -> list[Outcome]:
    """Carry out runs side by side in this process, see `ldrld.experiments.runs.run_in_flight`; one outcome a run."""
    run_in_flight(runs, folder, at_once, seconds, tqdm.write)
    outcomes = []
    for name in (name_of(config) for config, _ in runs):
        if found := load_divergence(name, folder): outcomes.append(Outcome(name, "diverged", str(found.error)))
        elif load_record(name, folder): outcomes.append(Outcome(name, "done"))
        else: outcomes.append(Outcome(name, "paused", "the time budget is spent"))
    return outcomes


def result_of(future, names: list[str], log: Path) -> list[Outcome]:
    """What a process says came of its task; one that was killed twice fails, the others go on."""
    try: outcomes = future.result()
    except Exception as error:
        what = "a process was killed twice" if isinstance(error, BrokenProcessPool) else "its process failed"
        outcomes = [Outcome(name, "failed", f"{what}: {type(error).__name__}: {error}\nlog: {log}") for name in names]
    for outcome in outcomes:
        if outcome.status == "failed": tqdm.write(f"FAILED {outcome.name}\n{outcome.detail}")
    return outcomes


def in_parallel(what: str, tasks: list[tuple], jobs: int, needs: dict[str, set[str]] | None = None) -> list[Outcome]:
    """Carry out tasks (names, function, arguments) in `jobs` processes of one thread each, the first ones first.

    needs: for a name those that must be done before it; what waits for a failed or paused one is left, as paused.
    """
    if not tasks: return []
    os.environ["OMP_NUM_THREADS"] = "1"  # two processes of two threads on two cores are slower than two of one
    outcomes, log = [], paths.executed("kernels.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    task_of = {name: i for i, (names, *_) in enumerate(tasks) for name in names}
    graph = TopologicalSorter({i: {task_of[n] for name in names for n in (needs or {}).get(name, ()) if n in task_of} for i, (names, *_) in enumerate(tasks)})
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
    return outcomes + [Outcome(name, "paused", "a run that it needs is not finished") for name in task_of if name in left]


def report(p: str = "quick", only: tuple[str, ...] = (), jobs: int = 2) -> list[Outcome]:
    """Make tables and figures of a profile from its records, see `ldrld.results.report.to_report`; one outcome a notebook.

    Arguments as in `reproduce`. Raises `NotReady` where notebooks or papermill are not there.
    """
    from ldrld.results.report import to_report  # here, since a machine that only trains need not have what it imports

    p = str(Path(p).resolve()) if p.endswith((".yaml", ".yml")) else p
    chosen = [EXPERIMENTS[name] for name in (only or to_report(p))]
    if problems := notebooks_for(f"paper/{e.notebook}.ipynb" for e in chosen): raise NotReady(problems)
    tasks = [([e.notebook], execute_one, f"paper/{e.notebook}.ipynb", e.notebook, {"profile": p}, profile(p).name) for e in chosen]
    return in_parallel("tables and figures", tasks, jobs)


def reproduce(p: str = "quick", only: tuple[str, ...] = (), jobs: int = 2, seconds: float = math.inf,
              notebooks: bool = True, together: int = 5, plan: bool = False,
              graphs: bool = False, at_once: int = 8) -> list[Outcome]:
    """Make every run of a profile that is not finished (see `missing`), those that are worth most first, then its tables and figures.

    p: "quick", "small", "paper" or a YAML file.  only: names of experiments, none for those that the profile selects.  jobs: processes at a time.
    seconds: time budget; runs pause after the epoch in which it ends, and go on at the next call, on this machine or, with the folder of
    results, on another.
    notebooks: run training in its notebook through papermill, else directly; then papermill is needed for tables and figures alone, which
    are left out where it is not installed.
    together: students at most that share a pass over the pictures.
    plan: make the runs of the profile's plan (`ldrld.experiments.plan`) in place of those of its experiments, and no tables.
    graphs: train in this process, every student as a recording on a stream of its own (`ldrld.training.graphs`), without notebooks.
    at_once: students in flight then.
    Returns one outcome for each run and notebook; a run whose record is odd is not tried, and failed.
    Raises `NotReady`, before anything is started, where data, notebooks, a teacher or room on the disk are missing.
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
        task = lambda runs: ([name_of(c) for c, _ in runs], execute_runs, [(c.model_dump(), k) for c, k in runs], folder, notebooks)
        needs = {name_of(c): {name_of(c.teacher)} for c, _ in todo if c.teacher}
        if graphs: outcomes += in_flight(todo, folder, ends - time.monotonic(), at_once)
        else: outcomes += in_parallel("runs", [task(runs) for runs in cohorts(todo, together)], jobs, needs)
        tried |= {name_of(c) for c, _ in todo} | not_tried
        todo = [(c, k) for c, k in missing(p, only, plan) if name_of(c) not in tried]  # a search that is finished says what to run next
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
    """How the records made now differ from those committed with the project; None if they are the same files."""
    made, committed = paths.records(profile_name), paths.root() / "data" / "runs" / profile_name
    if made.resolve() == committed.resolve() or not committed.exists(): return None
    def accuracy(file: Path) -> float | None:
        try: return float(json.loads(file.read_text(encoding="utf-8"))["last_accuracy"])
        except (OSError, ValueError, KeyError, TypeError): return None      # odd, which is told elsewhere
    both = [(accuracy(file), accuracy(committed / file.name)) for file in sorted(made.glob("*.json"))]
    both = [pair for pair in both if None not in pair]
    if not both: return "none of these runs has a committed record to compare with"
    equal, largest = sum(a == b for a, b in both), max(abs(a - b) for a, b in both)
    mean = sum(a - b for a, b in both) / len(both)
    return (f"{len(both)} runs have a committed record: {equal} repeat it exactly; the largest difference is {largest:.2f} points, "
            f"the mean over all {mean:+.3f}")
