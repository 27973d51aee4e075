"""Which code, libraries and machine made a result."""
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ldrld.core import paths
from ldrld.core.files import sha256_of

__all__ = ["PACKED", "git", "code_of", "installed", "compiled", "default_device", "provenance"]

PACKED = "packed.json"  # beside the package in a packed folder: the commit, and a hash of each file
LIBRARIES = ("torch", "numpy", "scikit-learn", "matplotlib", "pillow")  # whose versions a record names


def git(*words: str) -> str | None:
    """What git says about the project's folder; None if it is no checkout (or only a folder within another one)."""
    def call(*words):
        command = ["git", "-C", str(paths.root()), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        top = Path(call("rev-parse", "--show-toplevel")).resolve()
        return call(*words) if top == paths.root() else None
    except (OSError, subprocess.CalledProcessError):
        return None


def code_of() -> dict:
    """Which code this is: as git says, or as the folder was packed, and whether it still is what was packed.

    Returns `version`, `commit` and `changed`, None for what nobody knows; for a packed folder also `as_packed`.
    """
    commit, packed = git("rev-parse", "HEAD"), paths.root() / PACKED
    if commit:
        changed = bool(git("status", "--porcelain", "--", "ldrld"))
        return {"version": installed("ldrld"), "commit": commit, "changed": changed}
    if not packed.exists():
        return {"version": installed("ldrld"), "commit": None, "changed": None}
    told = json.loads(packed.read_text(encoding="utf-8"))
    hashes = {name: digest for name, digest in told["files"].items() if name.startswith("ldrld/")}
    there = {str(p.relative_to(paths.root())) for p in (paths.root() / "ldrld").rglob("*.py")}
    complete = there == {name for name in hashes if name.endswith(".py")}
    same = complete and all(sha256_of(paths.root() / name) == digest for name, digest in hashes.items())
    return {"version": told["version"], "commit": told["commit"], "changed": told["changed"], "as_packed": same}


def installed(package: str) -> str:
    """Version of an installed package; "-" if it is not there."""
    try: return version(package)
    except PackageNotFoundError: return "-"


def compiled() -> bool:
    """Whether `LDRLD_COMPILE=1` asks for compiled networks."""
    return os.environ.get("LDRLD_COMPILE") == "1"


def default_device() -> str:
    """`LDRLD_DEVICE`, else a GPU where there is one, else the CPU."""
    return os.environ.get("LDRLD_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")


def processor() -> str:
    """The CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def provenance(device: str = "cpu") -> dict:
    """Code, libraries and machine of a run made now: the fields `code`, `libraries` and `machine` of a record."""
    cuda = torch.device(device).type == "cuda"
    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
               "gpu": torch.cuda.get_device_name(device) if cuda else None,
               "compiled": compiled(), "system": platform.system()}
    if cuda: machine |= {"deterministic": torch.backends.cudnn.deterministic, "cuda": torch.version.cuda}
    libraries = {name: installed(name) for name in LIBRARIES} | {"python": platform.python_version()}
    return {"code": code_of(), "libraries": libraries, "machine": machine}
