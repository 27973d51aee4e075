"""`ldrld teachers`: weights of teachers, and checkpoints published by others."""

import json
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from ldrld.cli.app import Out, app


def compare_files(
    files: list[Path],  # checkpoints
    dataset: str,  # name in `ldrld.data`: what they were trained on
    keep: bool,  # whether a copy of each is kept as a teacher for runs
) -> int:  # number of wrong ones
    """Identify and evaluate each checkpoint."""
    from ldrld.experiments.config import pretrained
    from ldrld.experiments.model_cards import checkpoint

    wrong = 0
    for file in files:
        try:
            found = checkpoint(file, dataset)
        except (ValueError, OSError) as error:
            print(error)
            wrong += 1
            continue
        wrong += found["disagrees"]
        print(
            f"{file}: {found['network']}, {found['classes']} classes, {found['bytes'] / 1e6:.1f} MB\n  SHA-256 "
            f"{found['sha256']}"
        )
        accuracy = f"not measured: {found['reason']}"
        if found["reason"] is None:
            accuracy = f"{found['accuracy']:.2f} % (in float32, images normalised by the data's mean and deviation)"
        print(f"  accuracy on {dataset}: {accuracy}")
        print(f"  {found['verdict']}")
        if keep:
            print(f"  kept; as a teacher in a configuration: {json.dumps(pretrained(file).model_dump())}")
        words = shlex.join([f"dataset={dataset}", "model=resnet8", "loss=ldrld", f"teacher={file}"])
        print(f"  to train a student of it: ldrld run {words}")
    return wrong


def list_teachers(
    profile: str | None,  # None: all that have teachers
    check: bool,  # whether each is loaded, and measured if its data are available
    write: bool,  # whether missing model cards are written
) -> int:  # number of problems
    """Show the teachers of one profile or of all."""
    import pandas as pd

    from ldrld.core import paths
    from ldrld.core.validation import known
    from ldrld.experiments.profiles import PROFILES
    from ldrld.experiments.profiles import profile as profile_of
    from ldrld.experiments.model_cards import listed, write_missing

    there = sorted(p.name for p in paths.weights("").glob("*") if p.is_dir())
    try:
        if profile is None: chosen = there
        elif profile.endswith((".yaml", ".yml")): chosen = [profile_of(profile).name]
        else: chosen = [known("--profile", profile, sorted({*there, *PROFILES}))]
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    wrong, tables = [], []
    for name in chosen:
        for path in write_missing(name) if write else ():
            print(f"written: {paths.shown(path)}")
        if (table := listed(name, check)).empty:
            continue
        wrong += [
            f"{name}/{record}: {what}" for record, said in zip(table["record"], table.pop("wrong")) for what in said
        ]
        tables.append(table.assign(profile=name))
    if not tables:
        print(
            f"no teacher under {paths.shown(paths.weights(chosen[0] if profile else ''))}; `ldrld reproduce` trains "
            "some; use --out for another folder"
        )
        return 0
    table = pd.concat(tables).set_index("profile").reset_index()

    def shown(value: str | float | None) -> str:
        if isinstance(value, str): return value
        return "-" if pd.isna(value) else f"{value:.2f}"

    print(table.to_string(index=False, formatters=dict.fromkeys(table, shown)))
    print("\n".join([*wrong, f"{len(table)} teachers, {len(wrong)} problems"]))
    if check and (blind := int(table["measured, %"].isna().sum())):
        print(f"{blind} not measured: data or weights are missing, or there is a problem listed above")
    return len(wrong)


@app.command()
def teachers(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Published checkpoints, whatever their suffix (from torch.save, or safetensors): each is "
                 "identified, measured, and compared with the published accuracy of its network.",
        ),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Profile whose teachers are listed. Default: all profiles with teachers.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Also load each one, and measure it if its data are available.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Write missing cards; existing ones are not changed.")
    ] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep a copy of each FILE as a teacher for runs.")
    ] = False,
    dataset: Annotated[str, typer.Option("--data", help="The data set that the FILEs were trained on.")] = "cifar100",
    out: Out = None,
) -> None:
    """List and check the teachers' weights, or compare checkpoints with published accuracies.

    Exit code 1 if anything is wrong.
    """
    if files and (check or write or profile):
        raise typer.BadParameter(
            "--profile, --check and --write are for the project's own teachers; omit them or the FILEs"
        )
    if keep and not files:
        raise typer.BadParameter("--keep needs a FILE")
    if out is not None:
        os.environ["LDRLD_OUT"] = str(out.resolve())
    wrong = compare_files(files, dataset, keep) if files else list_teachers(profile, check, write)
    if wrong:
        raise typer.Exit(1)
