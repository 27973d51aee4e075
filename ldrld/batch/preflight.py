"""Checks before a batch starts, within seconds: notebooks, data, teachers, disk space.

Each problem is reported once, with instructions, instead of one traceback per run.
"""
import shutil
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from ldrld import data, losses, models
from ldrld.core import paths
from ldrld.core.files import on_disk
from ldrld.experiments.config import Pretrained, RunConfig, file_of, name_of
from ldrld.experiments.records import KEPT, load_record, read_record, same_images

__all__ = ["NotReady", "notebooks_for", "needs_of"]

SPARE = 200e6  # bytes for records, checkpoints, tables and figures


class NotReady(RuntimeError):
    """A requirement of a batch is missing; the message says which, and what to do."""

    def __init__(
        self,
        problems: list[str],  # what is missing, each with what to do
    ):
        lines = "\n".join(problems).splitlines()
        super().__init__("\n  ".join(["not started, since something is missing:", *lines]))


def notebooks_for(
    names: Iterable[str],  # paths under `nbs/`, such as "run/train.ipynb"
) -> list[str]:
    """What prevents executing notebooks; empty if nothing does."""
    absent = [name for name in names if not (paths.notebooks() / name).is_file()]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        return [f"notebooks: {absent[0]}{more} not under {paths.notebooks()}; work in a checkout of ldrld, "
                "or set LDRLD_ROOT to one"]
    if find_spec("papermill"): return []
    return ['notebooks: papermill is not installed; pip install "ldrld[run]", or train with --no-notebooks']


def _images(names: Iterable[str]) -> tuple[dict, list[str]]:
    """The data sets by name, and problems with the others; Tiny-ImageNet takes minutes to read: only located."""
    images, problems = {}, []
    for name in sorted(names):
        large = name == "tiny-imagenet"
        if large and any((paths.data_root() / folder).is_dir() for folder in (name, f"{name}-200")): continue
        try: images[name] = data.load_list(name) if name in data.LISTS else data.load(name)
        except (OSError, ValueError) as error: problems.append(f"data: {name}: {error}")
    return images, problems


def _networks(todo: list[RunConfig]) -> list[str]:
    """Problems with networks whose package is not installed."""
    names = {network.model for config in todo for network in (config, config.teacher) if network}
    return [f"networks: {why}" for name in sorted(names) if (why := models.lacking(name))]


def _teacher(config: RunConfig, folder: str) -> list[str]:
    """Problems with a teacher's existing record and weights; missing ones will be made."""
    from ldrld.experiments.model_cards import (  # not needed otherwise
        card_path,
        complaints,
    )

    name = name_of(config)
    try:
        load_record(name, folder)
        if not (KEPT["weights"](name, folder).exists() and card_path(name, folder).exists()): return []
        return [f"teacher: {name}: {what}" for what in complaints(name, folder)]
    except ValueError as error: return [f"teacher: {error}"]


def _file(teacher: Pretrained) -> list[str]:
    """What is wrong with a teacher's file; empty if it is there and is the right one."""
    try: file_of(teacher)
    except (FileNotFoundError, ValueError) as error: return [f"teacher: {teacher.model}: {error}"]
    return []


def _table_bytes(config: RunConfig, images: data.ImageData) -> dict[Path, int]:
    """The folder of a teacher's logits and the bytes still to be written; empty if the run reads none."""
    loss = losses.build(config.loss, **config.loss_args)
    if config.teacher is None or loss.needs_features or loss.alters_images: return {}
    if config.dataset in data.LISTS: return {}  # the teacher is run on every batch
    folder = paths.work(name_of(config.teacher))
    per_image = (2 * images.padding + 1) ** 2 * (2 if images.flip else 1)
    size = len(images.train_labels) * per_image * (len(images.classes) + 1) * 2
    lacking = size - max(map(on_disk, folder.glob("logits-*.bin")), default=0)
    return {folder: lacking} if lacking > 0 else {}


def _disk(needed: float) -> list[str]:
    """Problems with writing results or with the free space."""
    try:
        paths.out().mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=paths.out()).close()
    except OSError as error:
        return [f"disk: {paths.out()} cannot be written to ({error.strerror}); choose another folder with --out"]
    free = shutil.disk_usage(paths.out()).free
    if free >= needed: return []
    return [f"disk: {paths.out()} has {free / 1e9:.1f} GB left, about {needed / 1e9:.1f} GB are needed for the "
            "teachers' logits and the results; make room, or choose another folder with --out"]


def needs_of(
    todo: list[RunConfig],  # the runs that will be started
    finished: list[RunConfig],  # other runs of the profile, whose images must be the same
    folder: str,  # of the records, below `data/runs`
) -> list[str]:
    """What prevents runs; empty if nothing does."""
    if not todo: return []
    images, problems = _images({config.dataset for config in todo})
    problems += _networks(todo)
    for config in finished:
        if config.dataset not in images or config.dataset == "cifar100": continue  # CIFAR-100 is checked when loaded
        try: same_images(read_record(name_of(config), folder), images[config.dataset])
        except ValueError as error: problems.append(f"data: {error}")
    teachers = {name_of(config.teacher): config.teacher for config in todo if config.teacher}
    for teacher in teachers.values():
        problems += _file(teacher) if isinstance(teacher, Pretrained) else _teacher(teacher, folder)
    tables: dict[Path, int] = {}
    for config in todo:
        if config.dataset in images: tables |= _table_bytes(config, images[config.dataset])
    return list(dict.fromkeys([*problems, *_disk(SPARE + sum(tables.values()))]))
