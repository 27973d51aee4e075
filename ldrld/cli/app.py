"""Common parts of the commands: the application, its options, and the beginning and end of a batch."""

import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ModuleNotFoundError:
    sys.exit('the ldrld command needs more packages than the loss: pip install "ldrld[run]"')

if TYPE_CHECKING:
    from ldrld.batch.workers import Outcome


class Commands(typer.core.TyperGroup):
    """The commands: an interrupted one (Ctrl-C, SIGTERM) prints how to resume; a full disk is reported in one line."""

    def invoke(self, ctx: Any) -> Any:
        from ldrld.core.files import DISK
        from ldrld.core.signals import Terminated, terminable

        try:
            with terminable():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            print(
                "\nstopped; finished runs and the epochs trained so far are kept: call again to resume\n"
                f"  {shlex.join(['ldrld', *sys.argv[1:]])}",
                file=sys.stderr,
            )
            ctx.exit(143 if isinstance(stop, Terminated) else 130)
        except OSError as error:
            if error.errno not in DISK:
                raise
            hint = "" if "--out" in str(error) else "; choose another folder with --out"
            print(f"disk: {error}{hint}", file=sys.stderr)
            ctx.exit(1)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reproduce LDRLD: run experiments, make tables and figures, check every number.",
)


def tell_version(
    wanted: bool,  # whether `--version` was given
) -> None:
    """Print the version and end."""
    if not wanted:
        return
    from ldrld import __version__

    print(f"ldrld {__version__}")
    raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Reproduce LDRLD: run experiments, make tables and figures, check every number."""


ProfileName = Annotated[str, typer.Option(help="quick, small, paper, or a YAML file with a custom profile.")]


Only = Annotated[
    list[str] | None,
    typer.Option(
        help="An experiment's name, see `ldrld status`, or module:name for your own; may be repeated. Default: "
             "the profile's experiments."
    ),
]


Jobs = Annotated[int, typer.Option(min=1, help="Number of parallel processes, each with one thread.")]


Budget = Annotated[
    str | None, typer.Option(help="Stop after about this long, e.g. 9m or 1.5h; call again to resume.")
]
Out = Annotated[Path | None, typer.Option(help="Folder for records, tables and figures. Default: the project itself.")]


def seconds(
    text: str,  # such as "90", "90s", "9m" or "1.5h"
) -> float:
    """A time in seconds."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if not found:
        raise typer.BadParameter(f"{text!r} is not a time; expected something like 90s, 9m or 1.5h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def start(
    profile: str,  # name of a profile, or the path of a YAML file with one
    only: list[str] | None = None,  # names of experiments, or module:name; None: those of the profile
    out: Path | None = None,  # folder of the results, which becomes `LDRLD_OUT`; None: as it is
) -> tuple[str, ...]:  # names of the requested experiments; empty: those of the profile
    """Check the names before anything is started."""
    from ldrld.experiments.catalog import find, selected
    from ldrld.experiments.profiles import profile as profile_of

    try:
        selected(profile_of(profile))
        chosen = tuple(find(name, "--only").name for name in only or ())
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    if out is not None:
        os.environ["LDRLD_OUT"] = str(out.resolve())
    return chosen


@contextmanager
def ready() -> Iterator[None]:
    """Context that prints what is missing and exits with 1 if something cannot be started."""
    from ldrld.batch.preflight import NotReady

    try:
        yield
    except NotReady as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


def tell_odd(profile: str) -> list[str]:
    """The invalid records of a profile, one line each."""
    from ldrld.experiments.records import odd_records

    return [f"odd record, left out: {why}" for why in odd_records(profile).values()]


def end(
    outcomes: list["Outcome"],  # one per run and notebook
    profile: str,  # name of a profile, or the path of a YAML file with one
) -> None:
    """Print the outcome of the runs and the place of the results; exit code 1 for a failed run or invalid record."""
    from ldrld.core import paths
    from ldrld.experiments.profiles import profile as profile_of

    profile = profile_of(profile).name
    count = lambda status: sum(o.status == status for o in outcomes)
    lost = f", {count('diverged')} diverged" if count("diverged") else ""
    print(f"{count('done')} done, {count('paused')} paused, {count('failed')} failed{lost}")
    for o in outcomes:
        if o.status == "diverged":
            print(f"  {o.detail.splitlines()[0]}")
    for o in outcomes:
        if o.status == "failed":
            print(f"  failed: {o.name}: {o.detail.splitlines()[0]}")
    reasons = Counter(re.sub(r"^.*: (?=paused after)", "", o.detail) for o in outcomes if o.status == "paused")
    for why, n in reasons.items():
        print(f"  {n} paused: {why}")
    if count("paused"):
        print("  call again to resume the paused runs")
    named = {o.name for o in outcomes if o.status == "failed"}
    odd = [line for line in tell_odd(profile) if not any(name in line for name in named)]
    for line in odd:
        print(f"  {line}")
    for what, folder in {
        "records": paths.records(profile),
        "tables": paths.tables(profile),
        "figures": paths.figures(profile),
        "executed notebooks": paths.executed(profile),
    }.items():
        if folder.exists():
            print(f"  {what}: {paths.shown(folder)}")
    if count("failed") or odd:
        raise typer.Exit(1)
