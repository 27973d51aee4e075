"""Where things are: the only module that knows.

`nbdev_test`, papermill and JupyterLab start notebooks in different folders, so nothing else may use a relative path.
"""
import os
import re
from pathlib import Path

__all__ = ["shown", "root", "out", "data_root", "records", "tables", "figures", "weights", "work", "executed", "published", "plans", "notebooks", "measurements"]


OURS = re.compile(rb"^lib_name\s*=\s*ldrld\s*$", re.M)


def _is_ours(settings: Path) -> bool:
    """Whether this is our `settings.ini`; others have files of that name, in any encoding, perhaps not for us to read."""
    try: return OURS.search(settings.read_bytes()) is not None
    except OSError: return False


def shown(path: str | os.PathLike) -> str:
    """A path as people read it: from the current folder where there is a way, else in full (another drive, a folder that is gone)."""
    try: return os.path.relpath(path)
    except (ValueError, OSError): return str(path)


def root() -> Path:
    """The project's folder: `LDRLD_ROOT`, else the nearest folder above here with our `settings.ini`, else the current one."""
    if "LDRLD_ROOT" in os.environ: return Path(os.environ["LDRLD_ROOT"]).resolve()
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if _is_ours(folder / "settings.ini"): return folder
    return Path.cwd()


def out() -> Path:
    """Where results go: `LDRLD_OUT` (a relative path counts from the root), else the root itself."""
    return (root() / os.environ.get("LDRLD_OUT", ".")).resolve()


def data_root() -> Path:
    """Where data sets lie, unpacked or made: `LDRLD_DATA`, else `data/` under the root."""
    return Path(os.environ.get("LDRLD_DATA", root() / "data")).resolve()


def records(profile: str) -> Path:
    """Run records of a profile, one JSON file a run."""
    return out() / "data" / "runs" / profile


def tables(profile: str) -> Path:
    """Tables of a profile, as CSV, Markdown and LaTeX."""
    return out() / "data" / "tables" / profile


def figures(profile: str) -> Path:
    """Figures of a profile, as SVG and PNG."""
    return out() / "figures" / profile


def weights(profile: str) -> Path:
    """Teachers' weights in half precision."""
    return out() / "data" / "teachers" / profile


def work(name: str = "") -> Path:
    """Checkpoints, weights and teachers' logits of the run `name`: large, made again at will, never committed."""
    return out() / "runs" / name


def executed(profile: str) -> Path:
    """Executed notebooks: logs, kept away from `nbs/`, where nbdev would take them for sources."""
    return out() / "runs" / "executed" / profile


def measurements(folder: str = "bench") -> Path:
    """What benchmarks measured, one folder a machine and one JSON file a benchmark; `bench-small` for trials."""
    return out() / "data" / folder


def published() -> Path:
    """Numbers from the literature, one source a row."""
    return root() / "data" / "published"


def plans() -> Path:
    """What is run to decide claims, one file a profile."""
    return root() / "data" / "plan"


def notebooks() -> Path:
    """The source notebooks."""
    return root() / "nbs"
