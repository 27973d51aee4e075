"""`ldrld bench`: time and memory on this machine."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ldrld.cli.app import Out, app


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names of benchmarks; an unknown one lists them. Default: all."
        ),
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="Small sizes, a few seconds each, as a check; saved separately.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Also benchmarks that need some ten gigabytes.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Repeat earlier measurements of this machine.")
    ] = False,
    out: Out = None,
) -> None:
    """Measure the cost of the loss, training and every method on this machine, then plot all measurements."""
    if small and full:
        raise typer.BadParameter("--small and --full exclude each other")
    if out is not None:
        os.environ["LDRLD_OUT"] = str(out.resolve())
    from ldrld.batch.notebooks import execute_one
    from ldrld.batch.preflight import notebooks_for
    from ldrld.batch.workers import in_parallel
    from ldrld.bench import registered
    from ldrld.bench.measurements import folder_for, measure
    from ldrld.core import paths
    from ldrld.core.validation import known
    from ldrld.results.manifest import stamps, update_manifest

    benchmarks = registered()
    try:
        chosen = [benchmarks[known("benchmark", name, list(benchmarks))] for name in names or benchmarks]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    scale = "usual"
    if small: scale = "small"
    if full: scale = "full"
    folder = folder_for(scale)
    before = stamps(folder)
    for b in chosen:
        measure(b.name, scale, again)
    notebooks = dict.fromkeys(b.notebook for b in chosen)
    if problems := notebooks_for(f"paper/{n}.ipynb" for n in notebooks):
        print(
            "\n".join(
                [f"measurements: {paths.shown(paths.measurements(folder))}", "no tables and figures:", *problems]
            ),
            file=sys.stderr,
        )
        raise typer.Exit(1)
    outcomes = in_parallel(
        "tables and figures",
        [
            ([Path(n).name], execute_one, f"paper/{n}.ipynb", Path(n).name, {"profile": folder}, folder)
            for n in notebooks
        ],
        1,
    )
    update_manifest(folder, before)
    for what, place in {
        "measurements": paths.measurements(folder),
        "tables": paths.tables(folder),
        "figures": paths.figures(folder),
        "executed notebooks": paths.executed(folder),
    }.items():
        if place.exists():
            print(f"{what}: {paths.shown(place)}")
    if any(o.status == "failed" for o in outcomes):
        raise typer.Exit(1)
