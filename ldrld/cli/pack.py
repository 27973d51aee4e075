"""`ldrld pack` and `ldrld merge`: a batch for another machine, and its results."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ldrld.cli.app import Only, Out, ProfileName, app, start


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="A new folder, to be copied to the other machine.")],
    profile: ProfileName = "paper",
    only: Only = None,
    planned: Annotated[
        bool, typer.Option("--planned", help="The runs of the profile's plan instead of its experiments.")
    ] = False,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this pair, e.g. vgg13:vgg8; may be repeated, in order of priority."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Only losses of this name, e.g. ldrld; may be repeated. Teachers are always included."
        ),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(help="Version of Python there, e.g. 3.12, to include the wheels needed in addition to torch."),
    ] = None,
    platform: Annotated[str, typer.Option(help="The platform there, as named by pip.")] = "manylinux2014_x86_64",
    delivery: Annotated[int, typer.Option(min=8, help="Largest delivery, MiB.")] = 64,
    files: Annotated[int, typer.Option(min=4, help="Maximum number of returned files.")] = 8,
    file: Annotated[int, typer.Option(min=1, help="Largest returned file, MiB.")] = 16,
) -> None:
    """Create a folder with everything that a machine with only PyTorch needs for the missing runs."""
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
            "nothing to run: every requested run is finished, or none was requested"
        )
    limits = archives.Limits(delivery * archives.MIB, files, file * archives.MIB)
    try:
        packing.pack(folder, runs, profile_of(profile).name, limits, python, platform)
    except (ValueError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(
        f"{len(runs)} runs; there: python run.py --seconds 600   (see --help)\nback here: ldrld merge HOME "
        f"--packed {shlex.quote(str(folder))}"
    )


@app.command()
def merge(
    home: Annotated[Path, typer.Argument(help="The folder with the returned results.")],
    packed: Annotated[Path, typer.Option(help="The folder that was packed, or its packed.json.")],
    out: Out = None,
) -> None:
    """Merge the results of a packed batch; existing files are kept, damaged or foreign ones are rejected."""
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
