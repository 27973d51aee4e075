"""All paths of the project, in one place.

`nbdev_test`, papermill and JupyterLab start notebooks in different folders, so no other module uses relative paths.
"""
import os
import re
from pathlib import Path

__all__ = ["shown", "root", "out", "data_root", "records", "tables", "table", "figures", "weights", "work",
           "executed", "jobs", "manifest", "published", "plans", "notebooks", "measurements"]


OURS = re.compile(rb"^lib_name\s*=\s*ldrld\s*$", re.M)


def _is_ours(settings: Path) -> bool:
    """Whether this is our `settings.ini`; other projects use that name too, in any encoding, perhaps unreadable."""
    try: return OURS.search(settings.read_bytes()) is not None
    except OSError: return False


def shown(
    path: str | os.PathLike,  # of a file or folder, may be missing
) -> str:
    """A path for display: relative to the current folder if possible, else as given (e.g. on another drive)."""
    try: return os.path.relpath(path)
    except (ValueError, OSError): return str(path)


def in_project(path: Path) -> str:
    """A path for display: relative to the project's root if it lies below, so the same on every machine; else as is."""
    try: return str(path.resolve().relative_to(root()))
    except ValueError: return str(path)


def root() -> Path:
    """Project root: `LDRLD_ROOT`, else the nearest parent folder with our `settings.ini`, else the current folder."""
    if "LDRLD_ROOT" in os.environ: return Path(os.environ["LDRLD_ROOT"]).resolve()
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if _is_ours(folder / "settings.ini"): return folder
    return Path.cwd()


def out() -> Path:
    """Folder for results: `LDRLD_OUT` (relative to the root), else the root itself."""
    return (root() / os.environ.get("LDRLD_OUT", ".")).resolve()


def data_root() -> Path:
    """Folder of the data sets, unpacked or generated: `LDRLD_DATA`, else `data/` under the root."""
    return Path(os.environ.get("LDRLD_DATA", root() / "data")).resolve()


def records(profile: str) -> Path:
    """Run records of a profile, one JSON file per run."""
    return out() / "data" / "runs" / profile


def tables(profile: str) -> Path:
    """Tables of a profile, as CSV, Markdown and LaTeX."""
    return out() / "data" / "tables" / profile


def table(
    profile: str,
    name: str,  # of the table, such as `decisions`, without suffix
) -> Path:
    """A table's CSV file; FileNotFoundError, saying what makes it, if it is not there."""
    path = tables(profile) / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(f"{path.name}: no such table in profile {profile}; `ldrld report` makes it")
    return path


def figures(profile: str) -> Path:
    """Figures of a profile, as SVG and PNG."""
    return out() / "figures" / profile


def weights(profile: str) -> Path:
    """Teachers' weights in half precision."""
    return out() / "data" / "teachers" / profile


def work(
    name: str = "",  # of the run; empty: the folder of all runs
) -> Path:
    """Checkpoints, weights and teacher logits of the run `name`: large, reproducible, never committed."""
    return out() / "runs" / name


def executed(profile: str) -> Path:
    """Executed notebooks: logs, kept outside `nbs/`, where nbdev would treat them as sources."""
    return out() / "runs" / "executed" / profile


def jobs(profile: str) -> Path:
    """Jobs handed to a cluster, one folder each, with its log: see `ldrld.batch.cluster`."""
    return out() / "runs" / "jobs" / profile


def measurements(
    folder: str = "bench",  # `bench` or `bench-small`
) -> Path:
    """Benchmark measurements, one folder per machine and one JSON file per benchmark; `bench-small` for trials."""
    return out() / "data" / folder


def manifest(
    folder: str,  # name of a profile, or `bench` or `bench-small`
) -> Path:
    """The hashes of a profile's results, or of the benchmarks', see `ldrld.results.manifest`."""
    return out() / "data" / "manifests" / f"{folder}.sha256"


def published() -> Path:
    """Numbers from the literature, one source per row: the project's, or without one those in the installed package."""
    there = root() / "data" / "published"
    return there if there.is_dir() else Path(__file__).parents[1] / "published"


def plans() -> Path:
    """Plans of the runs that decide claims, one file per profile."""
    return root() / "data" / "plan"


def notebooks() -> Path:
    """The source notebooks."""
    return root() / "nbs"
