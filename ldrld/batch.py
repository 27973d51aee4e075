"""Runs a whole profile: what is worth most first, several processes at a time, then the notebooks that make tables and figures.

Plain code rather than a notebook: it starts processes, and there is nothing in it to learn about distillation.
"""
import json
import math
import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

from filelock import Timeout
from tqdm import tqdm

from ldrld import data, paths
from ldrld.experiments import EXPERIMENTS, batch, profile
from ldrld.plan import planned
from ldrld.runs import KEPT, Paused, RunConfig, company, load_record, lock_of, name_of, run_together, same_pictures

__all__ = ["Outcome", "reproduce", "report", "finished", "missing", "cohorts"]

TRAIN, COHORT = "run/train.ipynb", "run/cohort.ipynb"


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook or run."""
    name: str
    status: str  # "done", "paused" or "failed"
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


def finished(config: RunConfig, keep: tuple[str, ...], profile_name: str) -> bool:
    """Whether the run `config` has its record in `profile_name`, and besides all that `keep` names."""
    name = name_of(config)
    return load_record(name, profile_name) is not None and all(KEPT[k](name, profile_name).exists() for k in keep)


def wanted(p, only: tuple[str, ...] = (), plan: bool = False) -> list[tuple[RunConfig, tuple[str, ...]]]:
    """The runs of a profile's experiments, or of its plan; arguments as in `reproduce`."""
    return planned(p) if plan else batch(p, only)


def missing(p, only: tuple[str, ...] = (), plan: bool = False) -> list[tuple[RunConfig, tuple[str, ...]]]:
    """The runs of a profile that are not finished, those that are worth most first, last those that lack nothing but a picture; arguments as in `reproduce`."""
    todo = [(config, keep) for config, keep in wanted(p, only, plan) if not finished(config, keep, profile(p).name)]
    return sorted(todo, key=lambda run: load_record(name_of(run[0]), profile(p).name) is not None)


def to_log(file: str) -> None:
    """Send what this process and its kernels say on standard error to a file, away from the progress bar."""
    with open(file, "a", encoding="utf-8") as log: os.dup2(log.fileno(), 2)


def submitted(pool: ProcessPoolExecutor, function, *arguments) -> Future:
    """A task's future, also where an earlier task took the pool with it."""
    try: return pool.submit(function, *arguments)
    except BrokenProcessPool as error:
        future: Future = Future()
        future.set_exception(error)
        return future


def result_of(future, names: list[str], log: Path) -> list[Outcome]:
    """What a process says came of its task; one that was killed takes the others with it: what is done is kept."""
    try: outcomes = future.result()
    except Exception as error: outcomes = [Outcome(name, "failed", f"a process died: {type(error).__name__}: {error}\nlog: {log}") for name in names]
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
    ready, running = [], {}
    pool = ProcessPoolExecutor(max(1, min(jobs, len(tasks))), multiprocessing.get_context("spawn"), to_log, (str(log),))
    with pool, tqdm(total=len(task_of), desc=what, unit="") as bar:
        try:
            while True:
                ready = sorted([*ready, *graph.get_ready()])
                while ready and len(running) < jobs:
                    i = ready.pop(0)
                    running[submitted(pool, *tasks[i][1:])] = i
                if not running: break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    ended = result_of(future, tasks[i := running.pop(future)][0], log)
                    outcomes += ended
                    bar.update(len(ended))
                    if all(o.status == "done" for o in ended): graph.done(i)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    left = task_of.keys() - {o.name for o in outcomes}
    return outcomes + [Outcome(name, "paused", "a run that it needs is not finished") for name in task_of if name in left]


def report(p: str = "quick", only: tuple[str, ...] = (), jobs: int = 2) -> list[Outcome]:
    """Make tables and figures of a profile from its records, see `ldrld.report.to_report`; arguments as in `reproduce`, one outcome a notebook."""
    from ldrld.report import to_report  # here, since a machine that only trains need not have what it imports

    p = str(Path(p).resolve()) if p.endswith((".yaml", ".yml")) else p
    chosen = [EXPERIMENTS[name] for name in (only or to_report(p))]
    tasks = [([e.notebook], execute_one, f"paper/{e.notebook}.ipynb", e.notebook, {"profile": p}, profile(p).name) for e in chosen]
    return in_parallel("tables and figures", tasks, jobs)


def reproduce(p: str = "quick", only: tuple[str, ...] = (), jobs: int = 2, seconds: float = math.inf,
              notebooks: bool = True, together: int = 5, plan: bool = False) -> list[Outcome]:
    """Make every run of a profile that is not finished, those that are worth most first, then its tables and figures.

    p: "quick", "small", "paper" or a YAML file.  only: names of experiments, none for those that the profile selects.  jobs: processes at a time.
    seconds: time budget; runs pause after the epoch in which it ends, and go on at the next call, on this machine or, with the folder of
    results, on another.
    notebooks: run training in its notebook through papermill, else directly; then papermill is needed for tables and figures alone, which
    are left out where it is not installed.
    together: students at most that share a pass over the pictures.
    plan: make the runs of the profile's plan (`ldrld.plan`) in place of those of its experiments, and no tables.
    Returns one outcome for each run and notebook.
    """
    folder, runs, outcomes, tried = profile(p).name, wanted(p, only, plan), [], set()
    todo = missing(p, only, plan)
    for name in {config.dataset for config, _ in todo} - {"cifar100"}:  # whose files are checked: here new runs must see what the finished ones saw
        made = [record for config, _ in runs if config.dataset == name and (record := load_record(name_of(config), folder))]
        if made: images = data.load(name)
        for record in made: same_pictures(record, images)
    print(f"{len(runs)} runs in profile {folder}, {len(runs) - len(todo)} finished before")
    if math.isfinite(seconds): os.environ["LDRLD_DEADLINE"] = str(time.time() + 0.9 * seconds)
    while todo:
        task = lambda runs: ([name_of(c) for c, _ in runs], execute_runs, [(c.model_dump(), k) for c, k in runs], folder, notebooks)
        needs = {name_of(c): {name_of(c.teacher)} for c, _ in todo if c.teacher}
        outcomes += in_parallel("runs", [task(runs) for runs in cohorts(todo, together)], jobs, needs)
        tried |= {name_of(c) for c, _ in todo}
        todo = [(c, k) for c, k in missing(p, only, plan) if name_of(c) not in tried]  # a search that is finished says what to run next
    os.environ.pop("LDRLD_DEADLINE", None)
    if plan: return outcomes
    if notebooks or find_spec("papermill"): return outcomes + report(p, only, jobs)
    print(f"no tables and figures: papermill is not installed here; `ldrld report --profile {p}` makes them where it is")
    return outcomes


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
