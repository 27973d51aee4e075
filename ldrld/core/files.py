"""Atomic and durable file writes, reserved space, and file hashes.

What a power cut can cost, and what it cannot:

- Everything that cannot be made again, or not cheaply, is written by `write_whole`: records, divergences, weights,
  model cards, checkpoints, kept logits and features, tables, figures and measurements. The bytes are on the disk
  (`fsync`) before the file gets its name, and the name is (`fsync` of the folder) before the call returns. After a
  power cut, a file therefore has its old or its new content, never half of it, and what came before it is there: a
  run's weights, card and record, in that order, and only then is its checkpoint deleted. At most the
  work since the last checkpoint is lost. On a disk that reports writes before they are durable, no software helps.
- A teacher's table of logits is mapped into memory and not synced: it is a cache. Each row has a 16-bit checksum,
  so a row that was torn by a power cut is computed again, except for one in 65,536. After a power cut during
  training, delete `runs/*/logits-*.bin` to exclude that as well; the tables are filled again.
- Data sets that are generated or unpacked carry a fingerprint, checked whenever they are loaded. Executed
  notebooks are logs and are not synced.
"""
import errno
import hashlib
import os
import shutil
from pathlib import Path

__all__ = ["DISK", "write_whole", "on_disk", "reserve", "sha256_of"]

# errors of a disk rather than of the program: full, over a limit, read-only, not allowed, a file for a folder, broken
DISK = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EIO}
DISK |= {getattr(errno, "EDQUOT", errno.ENOSPC)}  # missing on Windows


def _told(error: OSError, path: Path, needed: int) -> OSError:
    """The same error with file, needed and free space, and what to do, in one line."""
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    return OSError(error.errno, f"{error.strerror}: {path} cannot be written; it needs {needed:,} bytes, {free:,} are "
                                "free; make room or choose another folder with --out, and call again to resume")


def _sync(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if os.name != "posix": return
    opened = os.open(folder, os.O_RDONLY)
    try: os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL: raise  # some network file systems cannot sync folders
    finally: os.close(opened)


def _make(folder: Path) -> None:
    """Create a folder with its parents, their names durable, too."""
    if folder.is_dir(): return
    _make(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync(folder.parent)


def write_whole(
    path: Path,  # the file; its folder is created if missing
    content: str | bytes | memoryview,  # text is written as UTF-8
) -> None:
    """Write a file atomically and durably: once this returns, it survives a power failure.

    Raises `OSError` that names file, needed and free space; the earlier file is then unchanged.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        _make(path.parent)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync(path.parent)
    except BaseException as error:  # Ctrl-C, too, leaves no partial file
        _discard(part)
        if isinstance(error, OSError) and error.errno in DISK: raise _told(error, path, len(data)) from None
        raise


def _discard(part: Path) -> None:
    """Remove a partial file if it is still there; on a disk that refuses, it stays."""
    try: part.unlink(missing_ok=True)
    except OSError: pass


def on_disk(
    path: Path,  # the file, may be missing
) -> int:
    """The bytes that a file takes on the disk: fewer than its size if it is sparse, 0 if it is missing."""
    if not path.exists(): return 0
    found = path.stat()
    return found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size


def reserve(
    path: Path,  # the file; created if missing, else its content stays as far as it fits
    size: int,  # bytes
) -> None:
    """Give a file its size and the space for it, so that writing to it through a memory map cannot fail.

    Without the space, a mapped file ends the process with SIGBUS. Raises `OSError` before anything is written if it is
    not there. File systems that cannot reserve space get a sparse file.
    """
    there, lacking = path.exists(), size - on_disk(path)
    if lacking > shutil.disk_usage(path.parent).free:
        raise _told(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path, lacking)
    try:
        with open(path, "ab") as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"): os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP): return
        if not there: _discard(path)
        raise _told(error, path, size) from None


def sha256_of(
    path: str | Path,  # the file, read as a whole
) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
