"""Runs a packed batch on a bare machine: `python run.py --seconds 540 --home results`.

`ldrld pack` copies this file next to the package as `run.py`. It starts with the standard library only: it checks the
delivered files, assembles the data, makes wheels importable, and only then imports PyTorch and `ldrld`.
"""
import argparse
import hashlib
import json
import lzma
import os
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
MARGIN = 20.0  # seconds before the end by which all results are collected
EVERY = 60.0  # seconds between two collections of results


def problems(
    folder: Path,  # the packed folder, as it was delivered
    packed: dict,  # content of its `packed.json`
) -> list[str]:
    """Missing and damaged files."""
    found = []
    for name, digest in packed["files"].items():
        path = folder / name
        if not path.exists(): found.append(f"{name} is missing: deliver it, too")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            found.append(f"{name} is damaged: deliver it again")
    return found


def unpack_wheels(
    folder: Path,  # the packed folder; without wheels in it nothing is unpacked
) -> None:
    """Make the wheels importable, after the machine's own packages."""
    site = folder / "wheels" / "site"
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive: archive.extractall(site)
    sys.path.append(str(site))


def put_data_together(
    folder: Path,  # the packed folder; the data sets go to `data/` below
    packed: dict,  # content of its `packed.json`
) -> None:
    """Assemble the files of the data sets from their pieces, atomically."""
    for name, part in packed["data"].items():
        target = folder / "data" / name
        if target.exists(): continue
        content = lzma.decompress(b"".join((folder / piece).read_bytes() for piece in part["pieces"]))
        if hashlib.sha256(content).hexdigest() != part["sha256"]:
            sys.exit(f"{name}: the pieces do not give the file that was packed")
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f"{target.name}.tmp")
        beside.write_bytes(content)
        beside.replace(target)


def budget(
    text: str,  # seconds, more than `MARGIN`
) -> float:
    """Seconds of a time budget."""
    value = float(text)
    if value <= MARGIN: raise argparse.ArgumentTypeError(f"{text}: expected more than {MARGIN:.0f} seconds")
    return value


def arguments(
    given: list[str] | None = None,  # words of the command line; None: those of this process
) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the packed runs within the available time.")
    parser.add_argument("--seconds", type=budget, default=float("inf"),
                        help="total time, including checks; results are collected 20 seconds before its end")
    parser.add_argument("--home", type=Path, default=HERE / "home",
                        help="folder for the results; default: home/ next to this file")
    parser.add_argument("--at-once", type=int, default=8, help="students trained at the same time on a GPU")
    parser.add_argument("--check", action="store_true",
                        help="check the engine on this machine first, for at most 90 seconds, and stop if it fails")
    parser.add_argument("--only-check", action="store_true", help="only check the engine")
    return parser.parse_args(given)


class Said:
    """The log: prints lines with times and keeps them."""
    def __init__(self) -> None:
        self.started = time.monotonic()
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(f"{time.monotonic() - self.started:7.1f} s  {line}")
        print(self.lines[-1], flush=True)


class Home:
    """Collects results every minute and at the end."""
    def __init__(
        self,
        packed: dict,  # content of `packed.json`
        folder: Path,  # for the results
        said: Said,  # the log, which is collected, too
    ):
        from ldrld.batch.archives import Limits
        self.packed, self.folder, self.said, self.at = packed, folder, said, time.monotonic()
        self.limits, self.names = Limits(**packed["limits"]), [run["name"] for run in packed["runs"]]
        self.busy = threading.Lock()

    def bring(self) -> list[str]:
        """Collect everything now; returns the names of files that do not fit."""
        from ldrld.batch.archives import collect
        from ldrld.core import paths
        with self.busy:
            self.at = time.monotonic()
            log = "\n".join(self.said.lines) + "\n"
            return collect(paths.out(), self.packed["profile"], self.folder, self.limits, self.names, log)

    def now_and_then(self) -> None:
        """Collect in the background if a minute has passed."""
        if time.monotonic() - self.at < EVERY: return
        self.at = time.monotonic()
        threading.Thread(target=self.bring, daemon=True).start()


def main(
    given: list[str] | None = None,  # words of the command line; None: those of this process
) -> int:  # the exit status
    """Check, assemble, train and collect."""
    said, chosen = Said(), arguments(given)
    packed = json.loads((HERE / "packed.json").read_text(encoding="utf-8"))
    if wrong := problems(HERE, packed):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    unpack_wheels(HERE)
    put_data_together(HERE, packed)
    os.environ.update(LDRLD_ROOT=str(HERE), LDRLD_OUT=str(HERE / "out"), LDRLD_DATA=str(HERE / "data"),
                      CUBLAS_WORKSPACE_CONFIG=":4096:8")
    sys.path.insert(0, str(HERE))
    import torch

    from ldrld.batch.priority import plan_by_worth
    from ldrld.core.provenance import default_device
    from ldrld.experiments.config import RunConfig
    from ldrld.training.selfcheck import selfcheck
    home = Home(packed, chosen.home, said)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    said(f"torch {torch.__version__}, {gpu}, {len(packed['runs'])} runs packed")
    if chosen.check or chosen.only_check:
        passed = selfcheck(said, seconds=min(90.0, chosen.seconds / 3))
        home.bring()
        if not passed or chosen.only_check: return 0 if passed else 1
    runs = [(RunConfig(**run["config"]), tuple(run["keep"])) for run in packed["runs"]]
    left = lambda: chosen.seconds - (time.monotonic() - said.started) - MARGIN
    runs = plan_by_worth(runs, packed["profile"], left(), chosen.at_once, home.limits, said)
    well = carry_out(runs, packed["profile"], left, chosen.at_once, said, home, default_device())
    for name in home.bring(): said(f"left out: {name}")
    home.bring()
    said(f"everything that fits is in {chosen.home}")
    return 0 if well else 1


def carry_out(
    runs: list[tuple],  # configurations, each with what to keep, by priority
    profile: str,  # folder of the records
    left: Callable[[], float],  # returns the seconds left for training
    at_once: int,  # students trained at the same time on a GPU
    said: Said,  # the log
    home: Home,  # where results are collected, at most once a minute
    device: str,  # "cpu" or "cuda"
) -> bool:  # False after an error
    """Train the runs; an error in one of them must not prevent collecting the results of the others."""
    from ldrld.experiments.in_flight import run_in_flight
    try: run_in_flight(runs, profile, at_once if device == "cuda" else 1, left(), said, after_row=home.now_and_then)
    except Exception as error: said(f"FAILED {type(error).__name__}: {error}")
    else: return True
    return False


if __name__ == "__main__": sys.exit(main())
