"""`ldrld pack` and `ldrld merge`: a batch for another machine, and its results."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ldrld.cli.app import Only, Out, Profile, app, start


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="A new folder, to be copied to the other machine.")],
    profile: Profile = "paper",
    only: Only = None,
    planned: Annotated[
        bool, typer.Option("--planned", help="The runs of the profile's plan in place of those of its experiments.")
    ] = False,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this pair, e.g. vgg13:vgg8; may be given several times, the first one is carried out first."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Only losses of this name, e.g. ldrld; may be given several times. Teachers always come along."
        ),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(help="Version of Python there, e.g. 3.12, to bring the wheels that it needs besides torch."),
    ] = None,
    platform: Annotated[str, typer.Option(help="Its platform, as pip names it.")] = "manylinux2014_x86_64",
    delivery: Annotated[int, typer.Option(min=8, help="Largest delivery, MiB.")] = 64,
    files: Annotated[int, typer.Option(min=4, help="Files at most that come back.")] = 8,
    file: Annotated[int, typer.Option(min=1, help="Largest file that comes back, MiB.")] = 16,
) -> None:
    """Make a folder with all that a bare machine with PyTorch needs to carry out the runs that are missing."""
    chosen = start(profile, only)
    from ldrld.batch import archives
    from ldrld.batch import pack as packing
    from ldrld.batch.pending import missing
    from ldrld.experiments.profiles import profile as profile_of

    pairs = []
    for text in pair or ():
        teacher, _, student = text.partition(":")
        if not teacher or not student or ":" in student:
            raise typer.BadParameter(f"--pair {text}: expected teacher:student")
        pairs.append((teacher, student))
    runs = packing.chosen_runs(missing(profile, chosen, planned), pairs, method or [])
    if not runs:
        raise typer.BadParameter(
            "nothing to carry out: every run that was asked for is finished, or none was asked for"
        )
    limits = archives.Limits(delivery * archives.MIB, files, file * archives.MIB)
    try:
        packing.pack(folder, runs, profile_of(profile).name, limits, python, platform)
    except (ValueError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(
        f"{len(runs)} runs; there: python run.py --seconds 600   (--help says more)\nback here: ldrld merge HOME "
        f"--packed {shlex.quote(str(folder))}"
    )


@app.command()
def merge(
    home: Annotated[Path, typer.Argument(help="The folder that came back.")],
    packed: Annotated[Path, typer.Option(help="The folder that was packed, or its packed.json.")],
    out: Out = None,
) -> None:
    """Take the results of a packed batch home; what is here stays, what is damaged or foreign is refused."""
    if out is not None:
        os.environ["LDRLD_OUT"] = str(out.resolve())
    from ldrld.batch import merge as merging

    try:
        merged = merging.merge(home, packed)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    if merged.refused:
        raise typer.Exit(1)
