"""Portable batches: a folder with all that a bare machine with PyTorch needs, and the way home for its results.

Plain code rather than a notebook: it copies, checks and counts bytes.
"""

import gzip
import hashlib
import io
import json
import lzma
import math
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath

import ldrld
from ldrld import data
from ldrld.core import paths
from ldrld.core.files import sha256_of, write_whole
from ldrld.core.provenance import PACKED, code_of
from ldrld.experiments.config import Pretrained, RunConfig, file_of, name_of
from ldrld.experiments.model_cards import card_path, facts, page, read_card
from ldrld.experiments.records import KEPT, Divergence, Record, divergence_path, load_record
from ldrld.training.checkpoint import epochs_trained

__all__ = ["MIB", "Limits", "chosen_runs", "pack", "deliveries", "collect", "merge", "Merged"]

MIB = 2**20
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
RECORDS, MANIFEST, LOG = "records.tar.gz", "summary.json", "log.txt"


@dataclass(frozen=True)
class Limits:
    """How much can be carried at a time.

    delivery: bytes of one delivery to the machine, at least 8 MiB.  files: that come back, at least 4.  file: bytes
    of each.
    """

    delivery: int = 64 * MIB
    files: int = 8
    file: int = 16 * MIB


def hash_of(content: bytes) -> str:
    """SHA-256 of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


# ---- there ----------------------------------------------------------------------------------------------------------


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

    def add(config, keep):
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
    say=print,
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


# ---- and back -------------------------------------------------------------------------------------------------------


@dataclass
class Merged:
    """What became of results that were brought home; each a list of names."""

    added: list[str] = field(default_factory=list)  # records that are new here
    same: list[str] = field(default_factory=list)  # that were here already
    diverged: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)  # that were added, with their cards
    checkpoints: list[str] = field(default_factory=list)  # of unfinished runs, which go on here or there
    refused: list[str] = field(default_factory=list)  # what and why
    left_out: list[str] = field(default_factory=list)  # what the machine did not bring home, by name


def tar_of(files: dict[str, Path]) -> bytes:
    """An uncompressed tar archive of some files, by the names they get in it."""
    room = io.BytesIO()
    with tarfile.open(fileobj=room, mode="w") as tar:
        for name, path in sorted(files.items()):
            tar.add(path, arcname=name, recursive=False)
    return room.getvalue()


def collect(out: Path, profile: str, home: Path, limits: Limits, names: list[str], log: str = "") -> list[str]:
    """Write what is there so far where it will be fetched from: at most `limits.files` files, each whole and within
    `limits.file`.

    out: where runs leave their results.  profile: folder of records.  home: folder that is brought home.
    names: of the runs of this batch.  log: what was said so far.
    Records come first, then weights, then checkpoints, those that are furthest ahead first. What does not fit is
    named in
    `summary.json`. Returns what was left out.
    """
    home.mkdir(parents=True, exist_ok=True)
    records = out / "data" / "runs" / profile
    small = {
        f"{kind}/{p.name}": p
        for kind, p in (
            *(("records", records / f"{n}.json") for n in names),
            *(("diverged", records / "diverged" / f"{n}.json") for n in names),
            *(("cards", out / "data" / "teachers" / profile / f"{n}.md") for n in names),
        )
        if p.exists()
    }
    arrays = [
        (f"{kind}/{n}.npz", p)
        for n in names
        for kind in ("logits", "insight")
        if (p := records / kind / f"{n}.npz").exists()
    ]
    large = [
        (f"weights/{n}.safetensors", p)
        for n in names
        if (p := out / "data" / "teachers" / profile / f"{n}.safetensors").exists()
    ]
    begun = [(f"checkpoints/{n}.pt", p) for n in names if (p := out / "runs" / n / "checkpoint.pt").exists()]
    left: list[str] = []
    parts = _parts(large + arrays + begun, limits.file, limits.files - 3, left)
    written = {RECORDS: _compressed(tar_of(small))}
    if len(written[RECORDS]) > limits.file:
        raise RuntimeError(f"{RECORDS} would be larger than {limits.file / MIB:.0f} MiB")
    written |= {f"part-{k}.tar": content for k, content in enumerate(parts)}
    written[LOG] = log.encode()[-limits.file :]
    files = {name: hash_of(content) for name, content in written.items()}
    summary = {
        "format": 1,
        "profile": profile,
        "files": files,
        "left_out": left,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    for name, content in written.items():
        _replace(home / name, content)
    _replace(home / MANIFEST, json.dumps(summary, indent=1).encode())
    for stale in (p for p in home.glob("part-*.tar") if p.name not in written):
        stale.unlink()
    return left


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, unless it holds this already."""
    if path.exists() and path.read_bytes() == content:
        return
    part = path.with_name(f"{path.name}.tmp")
    part.write_bytes(content)
    part.replace(path)


def _compressed(content: bytes) -> bytes:
    return gzip.compress(content, compresslevel=6, mtime=0)


def _parts(files: list[tuple[str, Path]], size: int, count: int, left: list[str]) -> list[bytes]:
    """Files in at most `count` archives of at most `size` bytes; one too large for an archive is cut. `left`: gets
    the others."""
    groups: list[dict[str, Path]] = []
    room: list[int] = []
    contents: list[bytes] = []
    for name, path in files:
        need = path.stat().st_size + 2048  # header and padding
        if need + 10240 > size:  # such as vgg13's weights: in pieces of its own
            pieces = math.ceil(path.stat().st_size / (size - 20480))
            if len(groups) + len(contents) + pieces > count:
                left.append(f"{name}: {path.stat().st_size / MIB:.1f} MiB")
            else:
                contents += _cut(name, path.read_bytes(), pieces)
            continue
        place = next((k for k, free in enumerate(room) if free >= need), None)
        if place is None and len(groups) + len(contents) >= count:
            left.append(f"{name}: {path.stat().st_size / MIB:.1f} MiB")
            continue
        if place is None:
            groups.append({})
            room.append(size - 10240)
            place = len(groups) - 1
        groups[place][name] = path
        room[place] -= need
    return [tar_of(g) for g in groups] + contents


def _cut(name: str, content: bytes, pieces: int) -> list[bytes]:
    """Archives that hold a file's bytes one after the other, as NAME.0-of-2, NAME.1-of-2."""
    step, made = math.ceil(len(content) / pieces), []
    for k in range(pieces):
        room, part = io.BytesIO(), content[k * step : (k + 1) * step]
        with tarfile.open(fileobj=room, mode="w") as tar:
            info = tarfile.TarInfo(f"{name}.{k}-of-{pieces}")
            info.size = len(part)
            tar.addfile(info, io.BytesIO(part))
        made.append(room.getvalue())
    return made


def _members(content: bytes, where: str) -> dict[str, bytes]:
    """The files of an archive; ValueError for anything else in it, such as a link or a path that leads out of it."""
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:*") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if not member.isfile() or path.is_absolute() or ".." in path.parts or len(path.parts) != 2:
                    raise ValueError(f"{where}: holds {member.name!r}, which results never do")
                found[member.name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{where}: cannot be read as an archive ({error})") from None
    return found


def _joined(found: dict[str, bytes]) -> dict[str, bytes]:
    """The files of all archives, those that were cut put together."""
    whole = {name: content for name, content in found.items() if not re.search(r"\.\d+-of-\d+$", name)}
    cut: dict[str, dict[int, bytes]] = {}
    for name, content in found.items():
        if match := re.fullmatch(r"(.+)\.(\d+)-of-(\d+)", name):
            cut.setdefault(f"{match[1]}|{match[3]}", {})[int(match[2])] = content
    for key, pieces in cut.items():
        name, count = key.rsplit("|", 1)
        if len(pieces) == int(count):
            whole[name] = b"".join(pieces[k] for k in sorted(pieces))
    return whole


def merge(home: str | Path, packed: str | Path, say=print) -> Merged:
    """Take results home: every file is checked, what is here already stays, what is damaged or foreign is refused
    by name.

    home: folder with the files that came back.  packed: the folder that was packed, or its `packed.json`.
    say: called with each line.
    Returns what became of everything. Raises ValueError where nothing can be read at all.
    """
    home, packed = Path(home), Path(packed)
    told = json.loads((packed / PACKED if packed.is_dir() else packed).read_text(encoding="utf-8"))
    if not (home / MANIFEST).exists():
        raise ValueError(f"{home}: no {MANIFEST}; nothing came back, or not from here")
    try:
        summary = json.loads((home / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{home / MANIFEST} is damaged; fetch it again") from None
    merged, found = Merged(left_out=list(summary["left_out"])), {}
    for name, digest in summary["files"].items():
        if name == LOG:
            continue
        path = home / name
        if not path.exists():
            merged.refused.append(f"{name}: is missing")
        elif sha256_of(path) != digest:
            merged.refused.append(f"{name}: is not what was written there; fetch it again")
        else:
            try:
                found |= _members(path.read_bytes(), name)
            except ValueError as error:
                merged.refused.append(str(error))
    expected = {run["name"]: run for run in told["runs"]}
    _take_all(_joined(found), expected, told, merged)
    for what in ("added", "same", "diverged", "weights", "checkpoints", "left_out"):
        if names := getattr(merged, what):
            say(f"{what.replace('_', ' ')}: {len(names)}" + (f" ({', '.join(names)})" if what == "left_out" else ""))
    for line in merged.refused:
        say(f"refused: {line}")
    return merged


def _take_all(found: dict[str, bytes], expected: dict[str, dict], told: dict, merged: Merged) -> None:
    """Put every file of the results in its place, records first."""
    profile = told["profile"]
    for name, content in sorted(found.items(), key=lambda item: not item[0].startswith("records/")):
        kind, file = name.split("/")
        run = file.rsplit(".", 1)[0]
        if run not in expected:
            merged.refused.append(f"{name}: is no run of this batch")
        elif kind in ("records", "diverged"):
            _take_record(kind, run, content, expected[run], told, merged)
        elif kind in ("logits", "insight"):
            _take_kept(KEPT[kind](run, profile), content)
        elif kind == "weights":
            _take_weights(run, content, found.get(f"cards/{run}.md"), profile, merged)
        elif kind == "checkpoints":
            _take_checkpoint(run, content, profile, merged)
        elif kind != "cards":
            merged.refused.append(f"{name}: results hold no such thing")


def _take_record(kind: str, run: str, content: bytes, expected: dict, told: dict, merged: Merged) -> None:
    """Add a record, or the outcome of a run that diverged, if it is whole, of this batch, and new."""
    try:
        record = (Record if kind == "records" else Divergence).model_validate_json(content, strict=False)
    except ValueError as error:
        return merged.refused.append(f"{run}: is no record ({str(error).splitlines()[0]})")
    if record.name != run or name_of(record.config, record.schema_version) != run:
        return merged.refused.append(f"{run}: holds the settings of another run")
    if record.code.get("commit") != told["commit"]:
        return merged.refused.append(
            f"{run}: was made by commit {record.code.get('commit')}, packed was {told['commit']}"
        )
    if not record.code.get("as_packed"):
        return merged.refused.append(f"{run}: the code there was not the one that was packed")
    path = (
        paths.records(told["profile"]) / f"{run}.json" if kind == "records" else divergence_path(run, told["profile"])
    )
    if not path.exists():
        _write_new(path, content)
        (merged.added if kind == "records" else merged.diverged).append(run)
        if kind == "records" and not _loads(run, told["profile"]):
            path.unlink()
            merged.added.remove(run)
            merged.refused.append(f"{run}: its numbers contradict each other")
    elif path.read_bytes() == content:
        merged.same.append(run)
    else:
        merged.refused.append(f"{run}: there is another record of it here, which stays")


def _loads(run: str, profile: str) -> bool:
    """Whether a record that was just written passes every check."""
    try:
        return load_record(run, profile) is not None
    except ValueError:
        return False


def _write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp")
    part.write_bytes(content)
    part.replace(path)


def _take_kept(path: Path, content: bytes) -> None:
    """Add logits or features that are not here yet."""
    if not path.exists():
        _write_new(path, content)


def _take_weights(run: str, content: bytes, card: bytes | None, profile: str, merged: Merged) -> None:
    """Add a teacher's weights with their card, if the card says that they are whole."""
    path = KEPT["weights"](run, profile)
    if path.exists():
        return
    if card is None:
        return merged.refused.append(f"{run}: weights without a model card")
    place = card_path(run, profile)
    _write_new(place, card)
    if read_card(place)["sha256"] != hash_of(content):
        place.unlink()
        return merged.refused.append(f"{run}: the weights are not those of their model card")
    _write_new(path, content)
    if record := load_record(run, profile):
        _write_card(record, profile, read_card(place))
    merged.weights.append(run)


def _write_card(record: Record, profile: str, there: dict) -> None:
    """A model card with what is known here, such as published numbers, and with what was measured there."""
    write_whole(card_path(record.name, profile), page(there | facts(record, profile)))


def _take_checkpoint(run: str, content: bytes, profile: str, merged: Merged) -> None:
    """Keep the checkpoint of an unfinished run, unless the one here is at least as far."""
    if load_record(run, profile):
        return
    path = paths.work(run) / "checkpoint.pt"
    new = path.with_name("checkpoint-merged.pt")
    _write_new(new, content)
    try:
        further = epochs_trained(new) > epochs_trained(path)
    except ValueError as error:
        new.unlink()
        return merged.refused.append(str(error))
    if further:
        new.replace(path)
        merged.checkpoints.append(run)
    else:
        new.unlink()
