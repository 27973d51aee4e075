"""Portable batches: a folder with all that a bare machine with PyTorch needs.

Plain code rather than a notebook: it copies, checks and counts bytes.
"""

import json
import lzma
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import ldrld
from ldrld import data
from ldrld.batch.archives import MIB, Limits
from ldrld.core import paths
from ldrld.core.files import sha256_of
from ldrld.core.provenance import PACKED, code_of
from ldrld.experiments.config import Pretrained, RunConfig, file_of, name_of
from ldrld.experiments.model_cards import card_path
from ldrld.experiments.records import KEPT, load_record

__all__ = ["chosen_runs", "deliveries", "pack"]

NEEDED = (
    "pydantic",
    "typing-inspection",
    "annotated-types",
    "filelock",
    "numpy",
    "pyyaml",
    "safetensors",
)  # what training imports besides torch
# of the compression: each byte less the one above it, 32 bytes before, which suits images 32 pixels wide
FILTERS = [{"id": lzma.FILTER_DELTA, "dist": 32}, {"id": lzma.FILTER_LZMA2, "preset": 4}]
MAKES = {"digits": "scikit-learn", "glyphs": "matplotlib"}  # what else a machine needs that makes a data set itself


def files_of(dataset: str) -> list[Path]:
    """The files of a data set, under the data root; ValueError for one that is not made of files.

    dataset: name in `ldrld.data`; of CIFAR-100 all variants share one set of files.
    """
    if dataset.startswith("cifar100"):
        data.load("cifar100")  # checks the files, and says what to do where they are missing
        return [paths.data_root() / "cifar-100-python" / name for name in ("train", "test", "meta")]
    if dataset == "digits":
        return []  # comes with scikit-learn, which the machine must then have
    if dataset.startswith("glyphs"):
        data.load(dataset)
        return sorted((paths.data_root() / "glyphs").glob("*.npz"))
    folder = paths.data_root() / dataset if not Path(dataset).is_absolute() else Path(dataset)
    raise ValueError(
        f"dataset={dataset!r}: {folder} is a folder of images, which is not packed; copy it yourself and name it "
        "there with LDRLD_DATA"
    )


def in_pieces(content: bytes, size: int) -> list[bytes]:
    """Bytes, compressed and cut into pieces of at most `size` bytes."""
    small = lzma.compress(content, filters=FILTERS)
    return [small[k : k + size] for k in range(0, len(small), size)]


def wheels_for(python: str, platform: str, folder: Path, datasets: list[str]) -> None:
    """Fetch the wheels that training needs besides torch, for another Python and platform, into a folder.

    python: version, such as "3.12".  platform: as pip names it, such as "manylinux2014_x86_64".  datasets: names in
    `ldrld.data`; some are made by another package.  RuntimeError if pip fails.
    """
    more = {package for dataset in datasets for name, package in MAKES.items() if dataset.startswith(name)}
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        "--python-version",
        python,
        "--platform",
        platform,
        *NEEDED,
        *sorted(more),
    ]
    got = subprocess.run(command, capture_output=True, text=True)
    if got.returncode:
        raise RuntimeError(f"wheels for Python {python}, {platform}: {got.stderr.strip().splitlines()[-1]}")


def with_teachers(runs: list[tuple[RunConfig, tuple[str, ...]]]) -> list[tuple[RunConfig, tuple[str, ...]]]:
    """Runs in order, each once, teachers before their students; a teacher's weights are kept."""
    found: dict[str, tuple[RunConfig, set]] = {}

    def add(config: RunConfig, keep: tuple[str, ...]) -> None:
        if isinstance(config.teacher, RunConfig):
            add(config.teacher, ("weights",))
        found.setdefault(name_of(config), (config, set()))[1].update(keep)

    for config, keep in runs:
        add(config, keep)
    return [(config, tuple(sorted(keep))) for config, keep in found.values()]


def chosen_runs(
    runs: list[tuple[RunConfig, tuple[str, ...]]], pairs: list[tuple[str, str]], methods: list[str]
) -> list[tuple[RunConfig, tuple[str, ...]]]:
    """Those of some runs that belong to given pairs and methods, in the order of the pairs; all where none are given.

    runs: in the order of their worth.  pairs: (teacher, student).  methods: names of losses in `ldrld.losses`.
    A pair's teacher comes first, then its students from labels alone, then the others; for teachers the method does
    not count.
    """
    if not pairs:
        return [(c, keep) for c, keep in runs if not methods or "weights" in keep or c.loss in methods]
    found: dict[str, tuple] = {}
    for teacher, student in pairs:
        first = [run for run in runs if run[0].model == teacher and "weights" in run[1] and run[0].teacher is None]
        alone = [run for run in runs if run[0].model == student and run[0].teacher is None and "weights" not in run[1]]
        taught = [
            run
            for run in runs
            if run[0].model == student and run[0].teacher is not None and run[0].teacher.model == teacher
        ]
        for c, keep in first + [run for run in alone + taught if not methods or run[0].loss in methods]:
            found.setdefault(name_of(c), (c, keep))
    return list(found.values())


def pack(
    folder: str | Path,
    runs: list[tuple[RunConfig, tuple[str, ...]]],
    profile: str,
    limits: Limits = Limits(),  # noqa: B008
    python: str | None = None,
    platform: str = "manylinux2014_x86_64",
    say: Callable[[str], object] = print,
) -> Path:
    """Make a folder that carries runs to another machine: copy it there, and call `python run.py`.

    folder: new or empty.  runs: configurations and what to keep of each, in the order of their worth; teachers are
    added.
    profile: folder of records here.  limits: of a delivery, and of what comes back.
    python: version of Python there, to fetch the wheels that it needs; None if it has them.  platform: as pip names it.
    say: called with each line of progress.
    Returns the folder. Raises ValueError for a folder that is not empty, or data that cannot be packed.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    runs = with_teachers(runs)
    finished = {name_of(c): load_record(name_of(c), profile) for c, _ in runs}
    todo = [
        (c, keep)
        for c, keep in runs
        if not finished[name_of(c)] or not all(KEPT[k](name_of(c), profile).exists() for k in keep)
    ]
    _copy_code(folder)
    if code_of()["changed"]:
        say("the code differs from its commit, and the records will say so")
    for name in dict.fromkeys(name_of(c.teacher) for c, _ in todo if c.teacher):
        _copy_teacher(name, profile, folder)
    for teacher in {c.teacher for c, _ in todo if isinstance(c.teacher, Pretrained)}:
        _copy(file_of(teacher), folder / "out" / "runs" / name_of(teacher) / "weights")
    for config, _ in todo:
        _copy(
            paths.work(name_of(config)) / "checkpoint.pt", folder / "out" / "runs" / name_of(config) / "checkpoint.pt"
        )
    parts = {}
    for path in dict.fromkeys(p for d in dict.fromkeys(c.dataset for c, _ in todo) for p in files_of(d)):
        say(f"packing {path.name}, {path.stat().st_size / MIB:.0f} MiB")
        parts[str(path.relative_to(paths.data_root()))] = _write_pieces(
            path, folder / "pieces", limits.delivery * 2 // 3
        )
    if python:
        wheels_for(python, platform, folder / "wheels", [c.dataset for c, _ in todo])
    shutil.copy(Path(__file__).with_name("portable.py"), folder / "run.py")
    packed = {
        "format": 1,
        "profile": profile,
        "packed": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **code_of(),
        "runs": [{"name": name_of(c), "config": c.model_dump(), "keep": list(keep)} for c, keep in todo],
        "data": parts,
        "limits": {"files": limits.files, "file": limits.file},
        "files": {str(p.relative_to(folder)): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()},
    }
    (folder / PACKED).write_text(json.dumps(packed, indent=1) + "\n", encoding="utf-8")
    for k, names in enumerate(deliveries(folder, limits.delivery), 1):
        size = sum((folder / n).stat().st_size for n in names)
        say(f"delivery {k}: {len(names)} files, {size / MIB:.1f} MiB{', ' + names[0] + ' …' if k > 1 else ''}")
    return folder


def _copy(source: Path, target: Path) -> None:
    """Copy a file that may not be there."""
    if not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _copy_code(folder: Path) -> None:
    """Copy what training needs of the project."""
    package = Path(ldrld.__file__).parent
    for path in sorted((*package.rglob("*.py"), *package.rglob("*.yaml"))):
        _copy(path, folder / "ldrld" / path.relative_to(package))
    _copy(paths.root() / "settings.ini", folder / "settings.ini")
    for path in sorted(paths.published().glob("*")):
        _copy(path, folder / "data" / "published" / path.name)


def _copy_teacher(name: str, profile: str, folder: Path) -> None:
    """Copy a teacher that is trained already: record, weights and model card."""
    there = folder / "out" / "data"
    _copy(KEPT["weights"](name, profile), there / "teachers" / profile / f"{name}.safetensors")
    _copy(card_path(name, profile), there / "teachers" / profile / f"{name}.md")
    _copy(paths.records(profile) / f"{name}.json", there / "runs" / profile / f"{name}.json")


def _write_pieces(path: Path, folder: Path, size: int) -> dict:
    """Write a file in pieces; returns their names, and the hash of the whole."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for k, piece in enumerate(in_pieces(path.read_bytes(), size)):
        names.append(f"pieces/{path.name}-{k}.xz")
        (folder.parent / names[-1]).write_bytes(piece)
    return {"pieces": names, "sha256": sha256_of(path)}


def deliveries(folder: str | Path, size: int = Limits().delivery) -> list[list[str]]:
    """A packed folder's files in deliveries of at most `size` bytes, largest first into the first that has room.

    What the machine needs to begin (everything but pieces of data) is in the first one, if it fits.
    """
    folder = Path(folder)
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    order = sorted(sizes, key=lambda n: (n.startswith("pieces/"), -sizes[n], n))
    groups: list[list[str]] = []
    for name in order:
        fits = next((g for g in groups if sum(sizes[n] for n in g) + sizes[name] <= size), None)
        if fits is None:
            groups.append([name])
        else:
            fits.append(name)
    return groups
