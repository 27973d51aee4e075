"""Atomic file writes, and file hashes."""
import hashlib
import os
from pathlib import Path

__all__ = ["write_whole", "sha256_of"]


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically and durably: once this returns, it survives a power failure.

    path: the file; its folder is created if missing.  text: the content, written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
