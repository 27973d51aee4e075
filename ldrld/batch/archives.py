"""Results of a packed batch, collected for transfer: a few archives within size limits, each file with its hash."""

import gzip
import hashlib
import io
import json
import math
import re
import tarfile
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath

from ldrld.core.files import write_whole

__all__ = ["MIB", "Limits", "collect", "joined", "members"]

MIB = 2**20
RECORDS, MANIFEST, LOG = "records.tar.gz", "summary.json", "log.txt"


@dataclass(frozen=True)
class Limits:
    """Limits of a transfer."""

    delivery: int = 64 * MIB  # bytes of one delivery to the machine, at least 8 MiB
    files: int = 8  # number of files returned, at least 4
    file: int = 16 * MIB  # bytes of each returned file


def hash_of(content: bytes) -> str:
    """SHA-256 of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def tar_of(files: dict[str, Path]) -> bytes:
    """An uncompressed tar archive of some files, by their names in the archive."""
    room = io.BytesIO()
    with tarfile.open(fileobj=room, mode="w") as tar:
        for name, path in sorted(files.items()):
            tar.add(path, arcname=name, recursive=False)
    return room.getvalue()


def collect(
    out: Path,  # where runs save their results
    profile: str,  # folder of the records
    home: Path,  # folder to be fetched; made if missing
    limits: Limits,
    names: list[str],  # of the runs of this batch
    log: str = "",  # the log so far, of which the end is kept
) -> list[str]:  # names and sizes of the files that do not fit
    """Write the results so far to the folder that will be fetched: at most `limits.files` files, each complete and
    within `limits.file`.

    Records come first, then weights, then arrays and checkpoints. Files that do not fit are listed in `summary.json`.
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
    """Write a file atomically, unless it has this content already."""
    if path.exists() and path.read_bytes() == content:
        return
    write_whole(path, content)


def _compressed(content: bytes) -> bytes:
    return gzip.compress(content, compresslevel=6, mtime=0)


def _parts(files: list[tuple[str, Path]], size: int, count: int, left: list[str]) -> list[bytes]:
    """Files in at most `count` archives of at most `size` bytes; a file too large for an archive is split. The names
    of the others are added to `left`."""
    groups: list[dict[str, Path]] = []
    room: list[int] = []
    contents: list[bytes] = []
    for name, path in files:
        need = path.stat().st_size + 2048  # header and padding
        if need + 10240 > size:  # such as vgg13's weights: in separate pieces
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
    """Archives that hold consecutive parts of a file, as NAME.0-of-2, NAME.1-of-2."""
    step, made = math.ceil(len(content) / pieces), []
    for k in range(pieces):
        room, part = io.BytesIO(), content[k * step : (k + 1) * step]
        with tarfile.open(fileobj=room, mode="w") as tar:
            info = tarfile.TarInfo(f"{name}.{k}-of-{pieces}")
            info.size = len(part)
            tar.addfile(info, io.BytesIO(part))
        made.append(room.getvalue())
    return made


def members(
    content: bytes,  # of the archive
    where: str,  # its name, for error messages
) -> dict[str, bytes]:  # name in the archive -> content
    """The files of an archive; ValueError for anything else in it, such as a link or a path outside the archive."""
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:*") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if not member.isfile() or path.is_absolute() or ".." in path.parts or len(path.parts) != 2:
                    raise ValueError(f"{where}: holds {member.name!r}, which results never do")
                file = tar.extractfile(member)
                found[member.name] = file.read() if file else b""
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{where}: cannot be read as an archive ({error})") from None
    return found


def joined(
    found: dict[str, bytes],  # name -> content, from `members`; parts of a file end in .0-of-2, .1-of-2
) -> dict[str, bytes]:  # name -> content, without files of which a part is missing
    """The files of all archives, with split files joined."""
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
