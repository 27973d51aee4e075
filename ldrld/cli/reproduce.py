"""`ldrld reproduce` and `ldrld report`: runs, then tables and figures."""

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldrld.cli.app import Budget, Jobs, Only, Out, ProfileName, app, end, ready, seconds, start
from ldrld.cli.verify import verify

if TYPE_CHECKING:
    from ldrld.batch.cluster import SlurmOptions


def graphs_wanted(
    engine: str,  # "auto": CUDA graphs on a GPU; "eager": none; "graph": imitated on a CPU
) -> bool:
    """Whether an engine uses CUDA graphs on this machine."""
    from ldrld.core.provenance import default_device
    from ldrld.core.validation import known

    try:
        known("--engine", engine, ["auto", "eager", "graph"])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return engine == "graph" or (engine == "auto" and default_device().startswith("cuda"))


def slurm_options(
    executor: str,  # "local" or "slurm"
    job_time: str,  # time limit of a job, such as "4h"; rounded up to minutes
    partition: str | None,  # None: the cluster's default
    given: list[str] | None,  # other options of sbatch, such as "gres=gpu:1"
) -> "SlurmOptions | None":  # None for processes on this machine
    """The options of Slurm's jobs."""
    from ldrld.batch.cluster import SlurmOptions
    from ldrld.core.validation import known

    try:
        known("--executor", executor, ["local", "slurm"])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    minutes = math.ceil(seconds(job_time) / 60)
    for option in given or ():
        if not all(option.partition("=")[::2]):
            raise typer.BadParameter(f"--slurm {option}: expected name=value, an option of sbatch such as gres=gpu:1")
    more = dict(option.split("=", 1) for option in given or ())
    return SlurmOptions(minutes, partition, more) if executor == "slurm" else None


@app.command()
def reproduce(
    profile: ProfileName = "quick",
    only: Only = None,
    jobs: Jobs = 2,
    out: Out = None,
    time_budget: Budget = None,
    cohort_size: Annotated[
        int,
        typer.Option(
            "--cohort-size",
            min=1,
            help="Students at most that share a pass over the images; more are quicker, fewer leave their records "
                 "sooner.",
        ),
    ] = 5,
    together: Annotated[int | None, typer.Option(min=1, hidden=True, help="Earlier name of --cohort-size.")] = None,
    planned: Annotated[
        bool,
        typer.Option(
            "--planned",
            help="The runs of the profile's plan, data/plan/PROFILE.yaml, instead of its experiments.",
        ),
    ] = False,
    engine: Annotated[
        str,
        typer.Option(
            help="eager: the usual loop; graph: CUDA graphs, imitated on a CPU; auto: graph on a GPU."
        ),
    ] = "auto",
    at_once: Annotated[int, typer.Option(min=1, help="Students trained in parallel with CUDA graphs.")] = 8,
    direct: Annotated[bool, typer.Option("--direct", hidden=True, help="Earlier name of --no-notebooks.")] = False,
    no_notebooks: Annotated[
        bool,
        typer.Option(
            "--no-notebooks",
            help="Train without notebooks, which needs neither papermill nor Jupyter; without papermill, make the "
                 "tables and figures later with `ldrld report`.",
        ),
    ] = False,
    executor: Annotated[
        str, typer.Option(help="local: processes on this machine; slurm: every cohort is a job of Slurm.")
    ] = "local",
    job_time: Annotated[
        str, typer.Option(help="Time limit of a Slurm job; one that needs longer requeues itself and resumes.")
    ] = "4h",
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    slurm: Annotated[
        list[str] | None, typer.Option(help="Another option of sbatch, e.g. gres=gpu:1; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the jobs and their order; start nothing.")] = False,
) -> None:
    """Train every unfinished run, then make all tables and figures."""
    budget = seconds(time_budget) if time_budget else math.inf
    chosen = start(profile, only, out)
    from ldrld.batch import cluster, scheduler
    from ldrld.batch.pending import missing
    from ldrld.core import paths
    from ldrld.experiments.profiles import profile as profile_of

    options = slurm_options(executor, job_time, partition, slurm)
    size = together or cohort_size
    if dry_run:
        print(cluster.dry_run(missing(profile, chosen, planned), size, options))
        return
    if options and engine == "graph":
        raise typer.BadParameter("--engine graph trains in this process; use --engine eager with --executor slurm")
    notebooks = not (direct or no_notebooks)
    if needs := profile_of(profile).needs:
        print(f"profile {profile_of(profile).name}: {needs}")
    on_slurm = partial(cluster.on_slurm, size=size, notebooks=notebooks, options=options) if options else None
    with ready():
        outcomes = scheduler.reproduce(
            profile,
            chosen,
            jobs,
            budget,
            notebooks=notebooks,
            together=size,
            plan=planned,
            graphs=graphs_wanted(engine),
            at_once=at_once,
            elsewhere=on_slurm,
        )
    if line := scheduler.compare_with_committed(Path(profile).stem):
        print(line)
    end(outcomes, profile)
    if options and not planned and paths.tables(profile_of(profile).name).exists():
        verify([profile])


@app.command()
def report(profile: ProfileName = "quick", only: Only = None, jobs: Jobs = 2, out: Out = None) -> None:
    """Make tables and figures from the records, without training."""
    chosen = start(profile, only, out)
    from ldrld.batch import scheduler

    with ready():
        outcomes = scheduler.report(profile, chosen, jobs)
    end(outcomes, profile)
