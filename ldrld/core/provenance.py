"""Provenance of a result: code, libraries and machine."""
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ldrld.core import paths
from ldrld.core.files import sha256_of

__all__ = ["PACKED", "git", "code_of", "installed", "compiled", "default_device", "provenance"]

PACKED = "packed.json"  # in a packed folder, next to the package: the commit, and a hash of each file
LIBRARIES = ("torch", "numpy", "scikit-learn", "matplotlib", "pillow")  # their versions are recorded


def git(
    *words: str,  # arguments of git, such as "rev-parse" and "HEAD"
) -> str | None:
    """Output of a git command in the project root; None if that is not the top of a checkout."""
    def call(*words: str) -> str:
        command = ["git", "-C", str(paths.root()), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        top = Path(call("rev-parse", "--show-toplevel")).resolve()
        return call(*words) if top == paths.root() else None
    except (OSError, subprocess.CalledProcessError):
        return None


def code_of() -> dict[str, Any]:
    """Version of the code: from git, or from `packed.json`, and whether the files still match it.

    Returns `version`, `commit` and `changed`, None where unknown; for a packed folder also `as_packed`.
    """
    commit, packed = git("rev-parse", "HEAD"), paths.root() / PACKED
    if commit:
        changed = bool(git("status", "--porcelain", "--", "ldrld"))
        return {"version": installed("ldrld"), "commit": commit, "changed": changed}
    if not packed.exists():
        return {"version": installed("ldrld"), "commit": None, "changed": None}
    info = json.loads(packed.read_text(encoding="utf-8"))
    hashes = {name: digest for name, digest in info["files"].items() if name.startswith("ldrld/")}
    present = {str(p.relative_to(paths.root())) for p in (paths.root() / "ldrld").rglob("*.py")}
    complete = present == {name for name in hashes if name.endswith(".py")}
    same = complete and all(sha256_of(paths.root() / name) == digest for name, digest in hashes.items())
    return {"version": info["version"], "commit": info["commit"], "changed": info["changed"], "as_packed": same}


def installed(
    package: str,  # its name on PyPI
) -> str:
    """Version of an installed package; "-" if it is not installed."""
    try: return version(package)
    except PackageNotFoundError: return "-"


def compiled() -> bool:
    """Whether `LDRLD_COMPILE=1` enables compiled networks."""
    return os.environ.get("LDRLD_COMPILE") == "1"


def default_device() -> str:
    """`LDRLD_DEVICE`, else a GPU if available, else the CPU."""
    return os.environ.get("LDRLD_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")


def processor() -> str:
    """Model name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Current code, libraries and machine: the fields `code`, `libraries` and `machine` of a record."""
    cuda = torch.device(device).type == "cuda"
    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
               "gpu": torch.cuda.get_device_name(device) if cuda else None,
               "compiled": compiled(), "system": platform.system()}
    if cuda: machine |= {"deterministic": torch.backends.cudnn.deterministic, "cuda": torch.version.cuda}
    libraries = {name: installed(name) for name in LIBRARIES} | {"python": platform.python_version()}
    return {"code": code_of(), "libraries": libraries, "machine": machine}
