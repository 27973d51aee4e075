"""`ldrld data`: download, generate or find a data set."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ldrld.cli.app import app


@app.command("data")
def data_command(
    name: Annotated[
        str,
        typer.Argument(
            help="cifar100, glyphs, digits and others (an unknown name lists them), or a folder of images: own@32."
        ),
    ],
    root: Annotated[Path | None, typer.Option(help="Folder of the data sets. Default: data/ of the project.")] = None,
) -> None:
    """Download, generate or find a data set, and describe it."""
    from ldrld import data

    try:
        images = data.load(name, root=root, download=True)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    shape = "x".join(map(str, images.train_images.shape[1:3]))
    print(
        json.dumps(
            {
                "name": images.name,
                "train": len(images.train_labels),
                "test": len(images.test_labels),
                "size": shape,
                "classes": len(images.classes),
                "fingerprint": images.fingerprint,
            },
            indent=1,
        )
    )
