"""Processes that die at chosen moments of writing a file, for the tests of what a killed process leaves.

`SITE` is the text of a `sitecustomize.py`: in a folder on PYTHONPATH it reaches every process of a batch, its workers
and kernels too. FAULTS, a JSON list, says which file (a regular expression for its path), at which moment, and who
dies; each death happens once, and leaves a file in the folder FAULTS_DONE.

Moments: "before" (the new file is empty), "in" (half of it is written), "whole" (it is complete, under its temporary
name), "after" (it is in place).  Who: "self" (the process that writes), "parent" (the one that started it), "group"
(all).
"""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import NamedTuple

SITE = '''
import json, os, re, signal
os.environ.setdefault("FAULTS_ROOT", str(os.getpid()))
replace, fsync = os.replace, os.fsync

def due(path, moments):
    """Whether somebody dies now: the moment and who, or None."""
    for death in json.loads(os.environ.get("FAULTS", "[]")):
        if death["moment"] not in moments or not re.search(death["file"], path): continue
        try: os.close(os.open(os.path.join(os.environ["FAULTS_DONE"], death["name"]), os.O_CREAT | os.O_EXCL))
        except FileExistsError: continue
        return death["moment"], death["who"]

def die(who):
    if who == "self": os.kill(os.getpid(), signal.SIGKILL)
    if who == "parent": os.kill(os.getppid(), signal.SIGKILL)
    if who == "group":
        os.killpg(int(os.environ["FAULTS_ROOT"]), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)  # a kernel leads a group of its own

def fsync_or_die(opened):
    path = os.readlink(f"/proc/self/fd/{opened}")
    if death := due(re.sub(r"[.][0-9]+[.]tmp$", "", path), ("before", "in")):
        if death[1] != "parent":  # else this process goes on writing
            os.ftruncate(opened, 0 if death[0] == "before" else os.fstat(opened).st_size // 2)
        die(death[1])
    fsync(opened)

def replace_or_die(source, target, **more):
    if death := due(str(target), ("whole",)): die(death[1])
    replace(source, target, **more)
    if death := due(str(target), ("after",)): die(death[1])

os.fsync, os.replace = fsync_or_die, replace_or_die
'''


class Death(NamedTuple):
    """Who dies when which file is written."""

    file: str
    moment: str
    who: str = "self"

    @property
    def name(self):
        return re.sub(r"\W+", "-", " ".join(self))


def environment(folder: Path, deaths=()) -> dict:
    """The variables with which a command dies of `deaths`, where they have not happened yet; `folder` is for notes."""
    (folder / "site").mkdir(parents=True, exist_ok=True)
    (folder / "done").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    faults = json.dumps([{**d._asdict(), "name": d.name} for d in deaths])
    root = Path(__file__).parent.parent
    return {"PYTHONPATH": f"{folder / 'site'}:{root}:{root / 'tests'}", "FAULTS": faults,
            "FAULTS_DONE": str(folder / "done"), "OMP_NUM_THREADS": "1"}


def happened(folder: Path) -> set[str]:
    """The names of the deaths so far."""
    return {path.name for path in (folder / "done").iterdir()}


def alive(folder: Path) -> dict[int, str]:
    """The processes that were started with `environment(folder)`: number -> "kernel", "worker" or "other"."""
    mark, found = f"FAULTS_DONE={folder / 'done'}\0".encode(), {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark not in (process / "environ").read_bytes(): continue
            command = (process / "cmdline").read_bytes()
        except OSError: continue  # it ended, or is not ours
        kind = "kernel" if b"ipykernel" in command else "worker" if b"spawn_main" in command else "other"
        found[int(process.name)] = kind
    return found


def kill(number: int) -> bool:
    """SIGKILL for a process, if it is still there."""
    try: os.kill(number, signal.SIGKILL)
    except ProcessLookupError: return False
    return True


def until(done, seconds: float = 120) -> bool:
    """Wait for `done()`; returns whether it happened."""
    end = time.monotonic() + seconds
    while not (happened_now := done()) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(happened_now)


def hears_signals():
    """A shell's background processes are started deaf to SIGINT, and so are theirs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def result(path: Path) -> bytes | dict:
    """What of a result is the same in every repetition: all of it, except times, and who shared a pass with whom."""
    if path.suffix == ".json":
        record = json.loads(path.read_text())
        for key in ("seconds", "images_per_second", "finished", "together"): del record[key]
        for row in record["history"]: del row["seconds"]
        return record
    content = path.read_bytes()
    if path.parent.parent.name == "teachers" and path.suffix == ".md":
        return re.sub(rb"(?m)^(seconds|finished): .*\n|, [\d,]+ seconds, finished \S+", b"", content)
    return content


def results(out: Path) -> dict[str, bytes | dict]:
    """All records, weights, tables and figures below a folder."""
    files = [path for part in ("data", "figures") for path in (out / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): result(path) for path in files if path.suffix not in (".tmp", ".sha256")}


def leftovers(out: Path) -> list[Path]:
    """Partial files, and checkpoints."""
    return [path for path in out.rglob("*") if path.suffix in (".tmp", ".part") or path.name == "checkpoint.pt"]
