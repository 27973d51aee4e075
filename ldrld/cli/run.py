"""`ldrld run`: one run."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from ldrld.cli.app import Out, app


def is_file(
    teacher: str,  # name of a network, or path of a file, which need not exist
) -> bool:
    """Whether a teacher is given as a file. ValueError for a name that is both a file and a network."""
    from ldrld import models

    path = Path(teacher).expanduser()
    plain = teacher == path.name  # without a folder
    try:
        known = plain and bool(models.canonical(teacher))
    except ValueError:
        known = False
    if known and path.exists():
        raise ValueError(f"teacher={teacher!r} is a network and also a file here; for the file say teacher=./{teacher}")
    return not known and (path.exists() or not plain or path.suffix != "")


@app.command()
def run(
    settings: Annotated[
        list[str],
        typer.Argument(
            help="name=value, e.g. model=resnet8 loss=ldrld loss_args.depth=5 teacher=resnet14 (or a file of weights)"
        ),
    ],
    profile: Annotated[str, typer.Option(help="Folder of records under data/runs.")] = "try",
    out: Out = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="weights, logits or insight (arrays for the analysis notebooks), saved with the record."),
    ] = None,
) -> None:
    """Execute one run and save its record."""
    from pydantic import ValidationError

    if out is not None:
        os.environ["LDRLD_OUT"] = str(out.resolve())
    if not re.fullmatch(r"\w[\w.-]*", profile):
        raise typer.BadParameter(
            f"--profile {profile!r}: expected the name of a folder, of letters, digits, dots and dashes"
        )
    from ldrld.core.settings import assigned

    try:
        given = assigned(settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    from ldrld.core import paths
    from ldrld.core.validation import known
    from ldrld.experiments.config import RunConfig, explain, name_of, pretrained
    from ldrld.experiments.records import KEPT, divergence_path
    from ldrld.experiments.runner import Paused
    from ldrld.training.divergence import Diverged
    from ldrld.experiments.runner import run as carry_out

    try:
        for k in keep or ():
            known("--keep", k, list(KEPT))
        teacher = given.get("teacher")
        if isinstance(teacher, str) and is_file(teacher):
            given["teacher"] = pretrained(Path(teacher).expanduser())
        config = RunConfig(**given)
    except ValidationError as error:
        raise typer.BadParameter(explain(error)) from None
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
    try:
        record = carry_out(config, profile, tuple(keep or ()))
    except Diverged as diverged:
        print(f"{diverged}\n(kept as {paths.shown(divergence_path(name_of(config), profile))}; delete it to try again)")
        raise typer.Exit(1) from None
    except Paused as pause:
        print(pause)
        raise typer.Exit(0) from None
    except (
        ValueError,
        FileNotFoundError,
        ModuleNotFoundError,
    ) as error:  # such as networks that a loss on feature maps cannot connect, or missing data
        raise typer.BadParameter(str(error)) from None
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes that torchrun started; the first one says it
    print(
        f"{record.last_accuracy:.2f} % after the last epoch, {record.best_accuracy:.2f} % at best (epoch "
        f"{record.best_epoch}, chosen on {'held-out' if config.holdout else 'test'} data)"
    )
    print(f"record: {paths.shown(paths.records(profile) / record.name)}.json")
