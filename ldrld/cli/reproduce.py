"""`ldrld reproduce` and `ldrld report`: runs, then tables and figures."""

import math
from pathlib import Path
from typing import Annotated

import typer

from ldrld.cli.app import Budget, Jobs, Only, Out, Profile, app, end, ready, seconds, start


def graphs_wanted(engine: str) -> bool:
    """Whether an engine uses CUDA graphs on this machine."""
    from ldrld.core.provenance import default_device
    from ldrld.core.validation import known

    try:
        known("--engine", engine, ["auto", "eager", "graph"])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return engine == "graph" or (engine == "auto" and default_device().startswith("cuda"))


@app.command()
def reproduce(
    profile: Profile = "quick",
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
) -> None:
    """Train every unfinished run, then make all tables and figures."""
    budget = seconds(time_budget) if time_budget else math.inf
    chosen = start(profile, only, out)
    from ldrld.batch import scheduler
    from ldrld.experiments.profiles import profile as profile_of

    if needs := profile_of(profile).needs:
        print(f"profile {profile_of(profile).name}: {needs}")
    with ready():
        outcomes = scheduler.reproduce(
            profile,
            chosen,
            jobs,
            budget,
            notebooks=not (direct or no_notebooks),
            together=together or cohort_size,
            plan=planned,
            graphs=graphs_wanted(engine),
            at_once=at_once,
        )
    if line := scheduler.compare_with_committed(Path(profile).stem):
        print(line)
    end(outcomes, profile)


@app.command()
def report(profile: Profile = "quick", only: Only = None, jobs: Jobs = 2, out: Out = None) -> None:
    """Make tables and figures from the records, without training."""
    chosen = start(profile, only, out)
    from ldrld.batch import scheduler

    with ready():
        outcomes = scheduler.report(profile, chosen, jobs)
    end(outcomes, profile)
