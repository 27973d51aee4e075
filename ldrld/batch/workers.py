"""Tasks in several processes: a process that is killed costs only its own task.

Plain code rather than a notebook, because it starts processes and has nothing to do with distillation itself.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

from tqdm import tqdm

from ldrld.core import paths
from ldrld.core.signals import terminable

__all__ = ["Outcome", "Workers", "in_parallel"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one notebook or run."""
    name: str  # the run's, or the executed notebook's
    status: str  # "done", "paused", "diverged" or "failed"
    detail: str = ""  # why it is not done, perhaps with a traceback and the path of a log; empty if it is


def end_with_parent() -> None:
    """End this process, and with it its kernels, as soon as its parent is gone."""
    if parent := multiprocessing.parent_process(): parent.join()
    os._exit(1)


def prepared(log_file: str) -> None:
    """Prepare a worker process: it ends with its parent, and standard error, also of its kernels, goes to a log."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    with open(log_file, "a", encoding="utf-8") as log: os.dup2(log.fileno(), 2)


class Workers:
    """A number of processes, each in its own pool, so that one that is killed does not affect the others."""

    def __init__(
        self,
        jobs: int,
        log: Path,  # where the processes append what they write to standard error
    ):
        self.log, self.others = log, multiprocessing.active_children()
        self.idle = [self.new() for _ in range(jobs)]
        self.busy: dict[Future, ProcessPoolExecutor] = {}

    def new(self) -> ProcessPoolExecutor:
        """A pool of one process, which starts with its first task."""
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepared, (str(self.log),))

    def submit(
        self,
        function: Callable,  # defined in a module, so that the process can import it
        *arguments: object,  # of `function`; must be picklable
    ) -> Future:
        """Hand a task to an idle process, of which there must be one."""
        pool = self.idle.pop()
        try: future = pool.submit(function, *arguments)
        except BrokenProcessPool:  # killed while idle
            pool = self.new()
            future = pool.submit(function, *arguments)
        self.busy[future] = pool
        return future

    def ended(
        self,
        future: Future,  # from `submit`, and done
    ) -> bool:  # whether the process was killed
        """Release the process of a finished task."""
        pool, killed = self.busy.pop(future), isinstance(future.exception(), BrokenProcessPool)
        if killed: pool.shutdown(wait=False)
        self.idle.append(self.new() if killed else pool)
        return killed

    def close(
        self,
        at_once: bool = False,  # whether tasks that are not finished are given up
    ) -> None:
        """End all processes, after their tasks or at once."""
        if at_once:
            for child in multiprocessing.active_children():
                if child not in self.others: child.terminate()
        for pool in (*self.idle, *self.busy.values()): pool.shutdown(wait=not at_once, cancel_futures=True)


def result_of(future: Future, names: list[str], log: Path) -> list[Outcome]:
    """The outcomes of a task; a process that was killed twice fails, the others continue."""
    try: outcomes = future.result()
    except Exception as error:
        what = "a process was killed twice" if isinstance(error, BrokenProcessPool) else "its process failed"
        outcomes = [Outcome(name, "failed", f"{what}: {type(error).__name__}: {error}\nlog: {log}") for name in names]
    for outcome in outcomes:
        if outcome.status == "failed": tqdm.write(f"FAILED {outcome.name}\n{outcome.detail}")
    return outcomes


def in_parallel(
    what: str,  # label of the progress bar
    tasks: list[tuple],  # (names, function, *arguments) each; the function returns one outcome per name
    jobs: int,
    needs: dict[str, set[str]] | None = None,  # name -> names that must be done before
) -> list[Outcome]:  # one per name
    """Execute tasks in order, in processes of one thread each.

    A task that needs a failed or paused one is reported as paused; one whose process is killed is tried once more.
    """
    if not tasks: return []
    os.environ["OMP_NUM_THREADS"] = "1"  # on two cores, two processes with two threads are slower than with one
    outcomes: list[Outcome] = []
    log = paths.executed("kernels.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    task_of = {name: i for i, (names, *_) in enumerate(tasks) for name in names}
    graph: TopologicalSorter[int] = TopologicalSorter()
    for i, (names, *_) in enumerate(tasks):
        needed = set().union(*((needs or {}).get(name, ()) for name in names))
        graph.add(i, *(task_of[name] for name in needed if name in task_of))
    graph.prepare()
    ready: list[int] = []
    running: dict[Future, int] = {}
    killed_once: set[int] = set()
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
