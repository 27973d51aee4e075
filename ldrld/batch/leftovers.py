"""Files left on the disk by killed processes."""

import os
import re
import time
from pathlib import Path

from ldrld.batch.pending import free, missing
from ldrld.core import paths
from ldrld.experiments.catalog import batch
from ldrld.experiments.config import name_of
from ldrld.experiments.profiles import Profile, profile

__all__ = ["sweep"]

LEFT = re.compile(r"\.(\d+)\.(?:tmp|part)$")  # the process that wrote it


def _is_left(path: Path) -> bool:
    """Whether a partial file was left by a dead process; one that may be alive, here or elsewhere, keeps it."""
    found = LEFT.search(path.name)
    if not found: return False
    try: age = time.time() - path.stat().st_mtime
    except FileNotFoundError: return False
    if age > 3600 or os.name != "posix": return age > 3600
    try: os.kill(int(found[1]), 0)
    except ProcessLookupError: return age > 60
    except (PermissionError, OverflowError): pass
    return False


def sweep(p: str | Profile, only: tuple[str, ...] = ()) -> list[Path]:
    """Remove and return leftovers of killed processes: partial files and checkpoints of finished runs."""
    folder, swept = profile(p).name, []
    records = paths.records(folder)
    results = (records, records / "diverged", records / "logits", records / "insight", paths.tables(folder),
               paths.figures(folder), paths.weights(folder), paths.manifest(folder).parent)
    for place in (*results, *paths.work().glob("*")):
        if place.is_dir(): swept += [path for path in place.iterdir() if _is_left(path)]
    busy = {name_of(config) for config, _ in missing(p, only)}
    for name in {name_of(config) for config, _ in batch(p, only)} - busy:
        checkpoints = [path for path in paths.work(name).glob("checkpoint.pt*") if path.is_file()]
        if checkpoints and free(name): swept += checkpoints
    for path in swept: path.unlink(missing_ok=True)
    return swept
