"""Notebooks executed with papermill, in kernels that use this Python."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

from ldrld.batch.workers import Outcome
from ldrld.core import paths

__all__ = ["TRAIN", "COHORT", "execute", "execute_one", "with_kernel"]

T = TypeVar("T")
TRAIN, COHORT = "run/train.ipynb", "run/cohort.ipynb"


def with_kernel(
    call: Callable[..., T],  # must start from scratch each time
    *arguments: object,  # of `call`
    **options: object,  # of `call`, by name
) -> T:  # what `call` returns
    """Call a function that starts a Jupyter kernel and executes a notebook; retry at most twice if the kernel fails.

    A kernel gets five ports before it binds them. If several kernels start at once, another may take one of the ports;
    the kernel then dies of "Address already in use" before the first cell.
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


def execute(
    notebook: str,  # path under `nbs/`, such as "run/train.ipynb"
    name: str,  # of the executed copy, without ending
    parameters: dict,  # name -> value, injected; each must be in the cell tagged `parameters`
    folder: str,  # of the executed copy, below `runs/executed/`
) -> Outcome:
    """Execute a source notebook with papermill; failures are reported with cell and traceback."""
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


def execute_one(
    notebook: str,  # path under `nbs/`
    name: str,  # of the executed copy, without ending
    parameters: dict,  # name -> value, injected
    folder: str,  # of the executed copy, below `runs/executed/`
) -> list[Outcome]:
    """`execute`, as a task: a list with one outcome."""
    return [execute(notebook, name, parameters, folder)]
