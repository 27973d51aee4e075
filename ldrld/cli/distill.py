"""`ldrld distill`: your own teacher, student and images."""

import re
from pathlib import Path
from typing import Annotated

import typer

from ldrld.cli.app import app


def pixels(
    text: str,  # such as "32" or "48x64", height x width
) -> tuple[int, int]:  # height, width
    """A size in pixels."""
    from ldrld.data.folders import height_and_width

    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found:
        raise typer.BadParameter(f"--image-size {text!r}: expected pixels, or height x width, such as 48x64")
    try:
        return height_and_width((int(found[1]), int(found[2] or found[1])))
    except ValueError as error:
        raise typer.BadParameter(f"--image-size {text}: {error}") from None


@app.command()
def distill(
    data: Annotated[
        Path,
        typer.Option(help="Folder of images: train/ and val/ or test/ with a subfolder for each class, or these "
                          "subfolders alone, of which a part is held out."),
    ],
    teacher: Annotated[
        str,
        typer.Option(help="File of weights, or the name of a network (timm:NAME, too), which is trained first."),
    ],
    student: Annotated[str, typer.Option(help="Name of a network, e.g. resnet8; an unknown one lists them.")],
    out: Annotated[
        Path | None, typer.Option(help="New folder for the results. Default: distilled-FOLDER here.")
    ] = None,
    method: Annotated[str, typer.Option(help="Name of a loss: ldrld, kd, dkd, …; an unknown one lists all.")] = "ldrld",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value: a hyper-parameter of the loss, e.g. temperature=2; may be repeated."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 30,
    teacher_epochs: Annotated[int | None, typer.Option(min=1, help="The teacher's. Default: the student's.")] = None,
    image_size: Annotated[
        str, typer.Option(help="Pixels, or height x width: images are scaled to cover it, and cropped.")
    ] = "32",
    holdout: Annotated[
        float, typer.Option(help="Fraction of every class that is held out for testing, if there is no val/ or test/.")
    ] = 0.2,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also train the student without a teacher, for comparison.")
    ] = False,
    teacher_network: Annotated[
        str | None, typer.Option(help="The network in the teacher's file, if it is one of timm: timm:NAME.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Learning-rate schedule. Default: onecycle, or deit for networks of timm.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 64,
    lr: Annotated[float | None, typer.Option(help="The student's learning rate. Default: the network's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of initial weights, order and augmentation.")] = 0,
    flip: Annotated[
        bool, typer.Option("--flip/--no-flip", help="Whether training flips images; not for letters and digits.")
    ] = True,
) -> None:
    """Distil a teacher into a smaller student on your own images; the result is weights, a report and a model card.

    The same command resumes an interrupted training. Exit code 1 if training diverged.
    """
    from pydantic import ValidationError

    from ldrld.batch import distillation, student_pages
    from ldrld.core import paths
    from ldrld.core.settings import assigned
    from ldrld.experiments.config import explain
    from ldrld.experiments.runner import Paused
    from ldrld.training.divergence import Diverged

    place = out or Path(f"distilled-{data.expanduser().resolve().name}")
    try:
        request = distillation.Request(
            data, place, teacher, student, method, assigned(settings or []), epochs, teacher_epochs,
            pixels(image_size), holdout, baseline, teacher_network, recipe, batch_size, lr, seed, flip,
        )
        made = distillation.distill(request)
    except ValidationError as error:
        raise typer.BadParameter(explain(error)) from None
    except (Diverged, Paused) as stop:
        print(stop)
        raise typer.Exit(int(isinstance(stop, Diverged))) from None
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
    report = student_pages.write_pages(made)
    for who, z in made.logits.items():
        right = (z.argmax(1) == made.own.images.test_labels).double().mean().item()
        print(f"{who}: {100 * right:.2f} %")
    print(f"report: {paths.shown(report)}\nweights: {paths.shown(report.with_name(student_pages.WEIGHTS))}")
