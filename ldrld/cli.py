"""The command line: `ldrld --help`."""
import codecs
import json
import math
import os
import re
import shlex
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

try: import typer
except ModuleNotFoundError: sys.exit('the ldrld command needs more than the loss does: pip install "ldrld[run]"')


class Commands(typer.core.TyperGroup):
    """The commands; one that is interrupted, by Ctrl-C or SIGTERM, says what that means."""

    def invoke(self, ctx):
        try: return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            print("\nstopped; what is finished is kept, and the epochs trained of what is not: call again to go on", file=sys.stderr)
            ctx.exit(143 if type(stop).__name__ == "Terminated" else 130)


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Reproduce LDRLD: run experiments, make tables and figures, check every number.")

Profile = Annotated[str, typer.Option(help="quick, small, paper, or a YAML file with a profile of your own.")]
Only = Annotated[list[str] | None, typer.Option(help="An experiment's name, see `ldrld status`; may be given several times. Default: those that the profile selects.")]
Jobs = Annotated[int, typer.Option(min=1, help="Processes at a time, of one thread each.")]
Out = Annotated[Path | None, typer.Option(help="Folder for records, tables and figures. Default: the project itself.")]


def seconds(text: str) -> float:
    """A time such as `90`, `90s`, `9m` or `1.5h`, in seconds."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if not found: raise typer.BadParameter(f"{text!r} is not a time; expected something like 90s, 9m or 1.5h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def start(profile: str, only: list[str] | None = None, out: Path | None = None) -> tuple[str, ...]:
    """Check the names before anything is started; returns the experiments asked for."""
    from ldrld.core.validation import known
    from ldrld.experiments.catalog import EXPERIMENTS, selected
    from ldrld.experiments.catalog import profile as profile_of

    try:
        selected(profile_of(profile))
        chosen = tuple(known("--only", name, list(EXPERIMENTS)) for name in only or ())
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    if out is not None: os.environ["LDRLD_OUT"] = str(out.resolve())
    return chosen


@contextmanager
def ready():
    """Say in one place what is missing, and exit with 1, where something cannot be started."""
    from ldrld.batch.preflight import NotReady

    try: yield
    except NotReady as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


def tell_odd(profile: str) -> list[str]:
    """The records of a profile that cannot be believed, one line each."""
    from ldrld.experiments.records import odd_records

    return [f"odd record, left out: {why}" for why in odd_records(profile).values()]


def end(outcomes, profile: str) -> None:
    """Say what became of everything, why something waits, and where it is; exit code 1 if a run failed or a record is odd."""
    from ldrld.core import paths
    from ldrld.experiments.catalog import profile as profile_of

    profile = profile_of(profile).name
    count = lambda status: sum(o.status == status for o in outcomes)
    lost = f", {count('diverged')} diverged" if count("diverged") else ""
    print(f"{count('done')} done, {count('paused')} paused, {count('failed')} failed{lost}")
    for o in outcomes:
        if o.status == "diverged": print(f"  {o.detail.splitlines()[0]}")
    for o in outcomes:
        if o.status == "failed": print(f"  failed: {o.name}: {o.detail.splitlines()[0]}")
    reasons = Counter(re.sub(r"^.*: (?=paused after)", "", o.detail) for o in outcomes if o.status == "paused")
    for why, n in reasons.items(): print(f"  {n} paused: {why}")
    if count("paused"): print("  call again to go on with what is paused")
    named = {o.name for o in outcomes if o.status == "failed"}
    odd = [line for line in tell_odd(profile) if not any(name in line for name in named)]
    for line in odd: print(f"  {line}")
    for what, folder in {"records": paths.records(profile), "tables": paths.tables(profile), "figures": paths.figures(profile),
                         "executed notebooks": paths.executed(profile)}.items():
        if folder.exists(): print(f"  {what}: {paths.shown(folder)}")
    if count("failed") or odd: raise typer.Exit(1)


def graphs_wanted(engine: str) -> bool:
    """Whether an engine's name asks for CUDA graphs here."""
    from ldrld.core.provenance import default_device
    from ldrld.core.validation import known

    try: known("--engine", engine, ["auto", "eager", "graph"])
    except ValueError as error: raise typer.BadParameter(str(error)) from None
    return engine == "graph" or (engine == "auto" and default_device().startswith("cuda"))


@app.command()
def reproduce(profile: Profile = "quick", only: Only = None, jobs: Jobs = 2, out: Out = None,
              time_budget: Annotated[str | None, typer.Option(help="Stop after about this long, e.g. 9m; call again to go on.")] = None,
              together: Annotated[int, typer.Option(min=1, help="Students at most that share a pass over the pictures; more are quicker, fewer leave their records sooner.")] = 5,
              planned: Annotated[bool, typer.Option("--planned", help="The runs of the profile's plan, data/plan/PROFILE.yaml, in place of those of its experiments.")] = False,
              engine: Annotated[str, typer.Option(help="auto: CUDA graphs where there is a GPU, else the usual loop; eager: the usual loop; graph: the engine of CUDA graphs, which a CPU imitates by calling.")] = "auto",
              at_once: Annotated[int, typer.Option(min=1, help="Students in flight with CUDA graphs.")] = 8,
              direct: Annotated[bool, typer.Option("--direct", help="Train without notebooks: needs neither papermill nor Jupyter; without papermill the tables and figures wait for `ldrld report`.")] = False):
    """Make every run that is not finished, then all tables and figures."""
    budget = seconds(time_budget) if time_budget else math.inf
    chosen = start(profile, only, out)
    from ldrld.batch import scheduler

    with ready(): outcomes = scheduler.reproduce(profile, chosen, jobs, budget, notebooks=not direct, together=together, plan=planned, graphs=graphs_wanted(engine), at_once=at_once)
    if line := scheduler.compare_with_committed(Path(profile).stem): print(line)
    end(outcomes, profile)


@app.command()
def report(profile: Profile = "quick", only: Only = None, jobs: Jobs = 2, out: Out = None):
    """Make tables and figures again from the records; trains nothing."""
    chosen = start(profile, only, out)
    from ldrld.batch import scheduler

    with ready(): outcomes = scheduler.report(profile, chosen, jobs)
    end(outcomes, profile)


def is_file(teacher: str) -> bool:
    """Whether a teacher is meant as a file: it is there, or looks like one; ValueError for what is a file and a network."""
    from ldrld import models

    path = Path(teacher).expanduser()
    plain = teacher == path.name  # without a folder
    try: known = plain and bool(models.canonical(teacher))
    except ValueError: known = False
    if known and path.exists():
        raise ValueError(f"teacher={teacher!r} is a network and also a file here; for the file say teacher=./{teacher}")
    return not known and (path.exists() or not plain or path.suffix != "")


@app.command()
def run(settings: Annotated[list[str], typer.Argument(help="name=value, e.g. model=resnet8 loss=ldrld loss_args.depth=5 teacher=resnet14; a teacher may also be a file of weights, see `ldrld teachers`")],
        profile: Annotated[str, typer.Option(help="Folder of records under data/runs.")] = "try", out: Out = None,
        keep: Annotated[list[str] | None, typer.Option(help="weights, logits or insight (features and Grad-CAM maps), kept besides the record.")] = None):
    """Carry out one run; its record is the result."""
    from pydantic import ValidationError

    if out is not None: os.environ["LDRLD_OUT"] = str(out.resolve())
    if not re.fullmatch(r"\w[\w.-]*", profile):
        raise typer.BadParameter(f"--profile {profile!r}: expected the name of a folder, of letters, digits, dots and dashes")
    from ldrld.core.settings import assigned

    try: given = assigned(settings)
    except ValueError as error: raise typer.BadParameter(str(error)) from None
    from ldrld.core import paths
    from ldrld.core.validation import known
    from ldrld.experiments.config import RunConfig, explain, name_of, pretrained
    from ldrld.experiments.records import KEPT, divergence_path
    from ldrld.experiments.runs import Diverged, Paused
    from ldrld.experiments.runs import run as carry_out

    try:
        for k in keep or (): known("--keep", k, list(KEPT))
        teacher = given.get("teacher")
        if isinstance(teacher, str) and is_file(teacher): given["teacher"] = pretrained(Path(teacher).expanduser())
        config = RunConfig(**given)
    except ValidationError as error:
        raise typer.BadParameter(explain(error)) from None
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
    try: record = carry_out(config, profile, tuple(keep or ()))
    except Diverged as diverged:
        print(f"{diverged}\n(kept as {paths.shown(divergence_path(name_of(config), profile))}; delete it to try again)")
        raise typer.Exit(1) from None
    except Paused as pause:
        print(pause)
        raise typer.Exit(0) from None
    except (ValueError, FileNotFoundError) as error:  # such as a pair of networks that a loss on feature maps cannot join, or data that are not there
        raise typer.BadParameter(str(error)) from None
    print(f"{record.last_accuracy:.2f} % after the last epoch, {record.best_accuracy:.2f} % at best (epoch {record.best_epoch}, chosen on {'held-out' if config.holdout else 'test'} data)")
    print(f"record: {paths.shown(paths.records(profile) / record.name)}.json")


@app.command()
def tune(words: Annotated[list[str] | None, typer.Argument(metavar="[SPACE]...", help="More of the space, after --space.")] = None, profile: Profile = "quick",
         loss: Annotated[str, typer.Option(help="The loss whose hyper-parameters are searched.")] = "ldrld",
         teacher: Annotated[str | None, typer.Option(help="Default: of the profile's ablation pair.")] = None,
         student: Annotated[str | None, typer.Option(help="Default: of the profile's ablation pair.")] = None,
         space: Annotated[list[str] | None, typer.Option(help="What to try, e.g. --space alpha=0.1..30:log depth=2..20 weighting=adw,none. Default: the loss's own.")] = None,
         trials: Annotated[int, typer.Option(min=1, help="In all, those of earlier calls included; the first one has the loss's defaults.")] = 30,
         time_budget: Annotated[str | None, typer.Option(help="Stop after about this long, e.g. 30m; call again to go on.")] = None,
         holdout: Annotated[float, typer.Option(help="Share of the training pictures of each class to compare on; the test set is never looked at.")] = 0.1,
         epochs: Annotated[int | None, typer.Option(min=1, help="Of a trial. Default: the profile's.")] = None,
         seeds: Annotated[int, typer.Option(min=1, help="Runs of a trial, whose mean counts.")] = 1,
         seed: Annotated[int, typer.Option(min=0, help="Of the suggestions.")] = 0,
         name: Annotated[str | None, typer.Option(help="Of the search. Default: from loss and pair; the same name goes on with the same search.")] = None, out: Out = None):
    """Search a loss's hyper-parameters for a pair, on training pictures held out for it, never on the test set."""
    import time

    budget = seconds(time_budget) if time_budget else math.inf
    start(profile, out=out)
    import optuna
    from pydantic import ValidationError

    from ldrld.batch import tuning as searching
    from ldrld.core import paths
    from ldrld.experiments.catalog import ablation_pair
    from ldrld.experiments.catalog import profile as profile_of
    from ldrld.experiments.config import explain

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    p = profile_of(profile)
    pair = (teacher or ablation_pair(p)[0], student or ablation_pair(p)[1])
    if math.isfinite(budget): os.environ["LDRLD_DEADLINE"] = str(time.time() + budget)
    try:
        chosen = searching.space_from([*(space or ()), *(words or ())]) or None
        search = searching.search_for(p, loss, pair, chosen, holdout, epochs, name, seeds=seeds, seed=seed)
    except ValidationError as error: raise typer.BadParameter(explain(error)) from None
    except (ValueError, OSError) as error: raise typer.BadParameter(str(error)) from None
    try: table = searching.tune(search, trials)
    except ValueError as error: raise typer.BadParameter(str(error)) from None
    if table.empty:
        print("no trial is finished yet; call again to go on")
        return
    searching.keep(search, table, p)
    print(f"\n{searching.shown(search, table).head(10).to_string(index=False)}\n\n{searching.caption(search, table)}\n")
    if (done := int(table["trial"].notna().sum())) < trials: print(f"{done} of {trials} trials are finished; call again to go on")
    print(f"best settings, on all training pictures and then tested:\n  {searching.next_step(search, table, p)}")
    for what, place in {"trials": paths.records(search.folder), "table": paths.tables(search.folder) / f"{search.name}.csv",
                        "figure": paths.figures(search.folder) / f"{search.name}.svg"}.items(): print(f"{what}: {paths.shown(place)}")


@app.command()
def pack(folder: Annotated[Path, typer.Argument(help="A new folder, to be copied to the other machine.")], profile: Profile = "paper", only: Only = None,
         planned: Annotated[bool, typer.Option("--planned", help="The runs of the profile's plan in place of those of its experiments.")] = False,
         pair: Annotated[list[str] | None, typer.Option(help="Only this pair, e.g. vgg13:vgg8; may be given several times, the first one is carried out first.")] = None,
         method: Annotated[list[str] | None, typer.Option(help="Only losses of this name, e.g. ldrld; may be given several times. Teachers always come along.")] = None,
         python: Annotated[str | None, typer.Option(help="Version of Python there, e.g. 3.12, to bring the wheels that it needs besides torch.")] = None,
         platform: Annotated[str, typer.Option(help="Its platform, as pip names it.")] = "manylinux2014_x86_64",
         delivery: Annotated[int, typer.Option(min=8, help="Largest delivery, MiB.")] = 64,
         files: Annotated[int, typer.Option(min=4, help="Files at most that come back.")] = 8,
         file: Annotated[int, typer.Option(min=1, help="Largest file that comes back, MiB.")] = 16):
    """Make a folder with all that a bare machine with PyTorch needs to carry out the runs that are missing."""
    chosen = start(profile, only)
    from ldrld.batch import pack as packing
    from ldrld.batch.scheduler import missing
    from ldrld.experiments.catalog import profile as profile_of

    pairs = [tuple(text.split(":")) for text in pair or ()]
    for words in pairs:
        if len(words) != 2: raise typer.BadParameter(f"--pair {':'.join(words)}: expected teacher:student")
    runs = packing.chosen_runs(missing(profile, chosen, planned), pairs, method or [])
    if not runs: raise typer.BadParameter("nothing to carry out: every run that was asked for is finished, or none was asked for")
    limits = packing.Limits(delivery * packing.MIB, files, file * packing.MIB)
    try: packing.pack(folder, runs, profile_of(profile).name, limits, python, platform)
    except (ValueError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"{len(runs)} runs; there: python run.py --seconds 600   (--help says more)\nback here: ldrld merge HOME --packed {shlex.quote(str(folder))}")


@app.command()
def merge(home: Annotated[Path, typer.Argument(help="The folder that came back.")],
          packed: Annotated[Path, typer.Option(help="The folder that was packed, or its packed.json.")], out: Out = None):
    """Take the results of a packed batch home; what is here stays, what is damaged or foreign is refused."""
    if out is not None: os.environ["LDRLD_OUT"] = str(out.resolve())
    from ldrld.batch import pack as packing

    try: merged = packing.merge(home, packed)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    if merged.refused: raise typer.Exit(1)


@app.command()
def status(profile: Profile = "quick", out: Out = None):
    """How far a profile is: for each experiment whether it is run always or by name, or only reads what others run, and the runs planned, finished and missing; then what comes next. For other folders, their records."""
    import pandas as pd

    from ldrld.core import paths

    if out is not None: os.environ["LDRLD_OUT"] = str(out.resolve())
    if profile not in ("quick", "small", "paper") and paths.records(profile).is_dir():
        from ldrld.experiments.records import records

        columns = ["record", "last epoch, %", "finished"]
        print(pd.DataFrame([(r.name, round(r.last_accuracy, 2), r.finished) for r in records(profile)], columns=columns).to_string(index=False))
        for line in tell_odd(profile): print(line)
        return
    start(profile)
    from ldrld.experiments.catalog import EXPERIMENTS, selected
    from ldrld.results.report import collect

    lines, usual = [], selected(profile)
    for name, e in EXPERIMENTS.items():
        runs = collect(e, profile)
        lines.append({"experiment": name, "run": "reads" if e.reads else "always" if name in usual else "by name", "planned": len(runs),
                      "finished": int(runs["last"].notna().sum()), "missing": int(runs["last"].isna().sum()), "about": e.title})
    print(pd.DataFrame(lines).to_string(index=False))
    from ldrld.batch.scheduler import missing, taken_up_again
    from ldrld.experiments.catalog import batch as runs_of
    from ldrld.experiments.catalog import profile as profile_of
    from ldrld.experiments.config import name_of
    from ldrld.experiments.records import finished
    from ldrld.training.loop import epochs_trained

    folder, planned, todo = profile_of(profile).name, runs_of(profile), missing(profile)
    waiting = [config for config, _ in todo if not finished(config, folder)]
    print(f"\n{len(planned) - len(waiting)} of the {len(planned)} runs that are run always are finished, "
          f"{len(waiting)} are missing{'; these come next' if waiting else ''}")
    begun = lambda name: epochs_trained(paths.work(name) / "checkpoint.pt")
    coming = [{"run": name_of(c), "teacher": c.teacher.model if c.teacher else "-",
               "epochs trained": f"{begun(name_of(c))} of {c.epochs}"} for c in waiting[:10]]
    if coming: print(pd.DataFrame(coming).to_string(index=False))
    if again := taken_up_again(todo, folder): print(again)
    for line in tell_odd(folder): print(line)


@app.command()
def verify(profile: Annotated[list[str] | None, typer.Option(help="Default: quick, small and paper, where they have tables; a YAML file for one of your own.")] = None, out: Out = None):
    """Compute every number of every table again from its records, and compare the teachers' weights with their cards."""
    for p in profile or (): start(p)
    if out is not None: os.environ["LDRLD_OUT"] = str(out.resolve())
    from ldrld.core import paths
    from ldrld.experiments.catalog import EXPERIMENTS, PROFILES
    from ldrld.experiments.catalog import profile as profile_of
    from ldrld.experiments.model_cards import wrong_teachers
    from ldrld.results.report import to_report, verify_table

    wrong, checked, missing = [], 0, []
    for p in map(profile_of, profile or [p for p in PROFILES if paths.tables(p).exists()]):
        wrong += [f"{p.name}: {line}" for line in tell_odd(p.name)]
        for e in (EXPERIMENTS[name] for name in to_report(p) if EXPERIMENTS[name].table):
            try: found = verify_table(e, p)
            except FileNotFoundError: missing.append(f"{p.name}/{e.name}")
            except ValueError as error: wrong.append(f"{p.name}/{e.name}: {error}")
            else:
                wrong += [f"{p.name}: {line}" for line in found]
                checked += 1
        wrong += [f"{p.name}: {line}" for line in wrong_teachers(p.name)]
    if missing: print(f"not made yet: {', '.join(missing)}")
    print("\n".join([*wrong, f"{checked} tables checked, {len(wrong)} things wrong"]))
    print(f"records and tables: {paths.shown(paths.out() / 'data')}")
    if not checked: print(f"no table found under {paths.out()}; `ldrld report` makes them, --out says where they are")
    if wrong or not checked: raise typer.Exit(1)


@app.command()
def teachers(files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="Checkpoints of others, whatever their suffix (what torch.save writes, or safetensors): each is identified, measured, and set beside what is published for its network.")] = None,
             profile: Annotated[str | None, typer.Option(help="Whose teachers to list. Default: of every profile that has some.")] = None,
             check: Annotated[bool, typer.Option("--check", help="Also load each and measure it where its data are at hand.")] = False,
             write: Annotated[bool, typer.Option("--write", help="Write the cards that are missing; those that are there are left alone.")] = False,
             keep: Annotated[bool, typer.Option("--keep", help="Keep a copy of each FILE where runs find it, as a teacher.")] = False,
             dataset: Annotated[str, typer.Option("--data", help="The data set that the FILEs were trained on.")] = "cifar100", out: Out = None):
    """List the teachers' weights with what their cards say, check them, or compare published checkpoints with what is published; exit code 1 if anything is wrong."""
    if files and (check or write or profile): raise typer.BadParameter("--profile, --check and --write are about the project's own teachers; leave them or the FILEs out")
    if keep and not files: raise typer.BadParameter("--keep needs a FILE")
    if out is not None: os.environ["LDRLD_OUT"] = str(out.resolve())
    wrong = compare_files(files, dataset, keep) if files else list_teachers(profile, check, write)
    if wrong: raise typer.Exit(1)


def compare_files(files: list[Path], dataset: str, keep: bool) -> int:
    """Say of each checkpoint what it is and what it reaches; returns how many are wrong."""
    from ldrld.experiments.config import pretrained
    from ldrld.experiments.model_cards import checkpoint

    wrong = 0
    for file in files:
        try: found = checkpoint(file, dataset)
        except (ValueError, OSError) as error:
            print(error)
            wrong += 1
            continue
        wrong += found["disagrees"]
        print(f"{file}: {found['network']}, {found['classes']} classes, {found['bytes'] / 1e6:.1f} MB\n  SHA-256 {found['sha256']}")
        print(f"  accuracy on {dataset}: " + (f"{found['accuracy']:.2f} % (in float32, on pictures normalised by the data's own mean and deviation)" if found["reason"] is None else f"not measured: {found['reason']}"))
        print(f"  {found['verdict']}")
        if keep: print(f"  kept; as a teacher in a configuration: {json.dumps(pretrained(file).model_dump())}")
        words = shlex.join([f"dataset={dataset}", "model=resnet8", "loss=ldrld", f"teacher={file}"])
        print(f"  a student learns from it with: ldrld run {words}")
    return wrong


def list_teachers(profile: str | None, check: bool, write: bool) -> int:
    """Show the teachers of one profile or of all; returns how many things are wrong."""
    import pandas as pd

    from ldrld.core import paths
    from ldrld.core.validation import known
    from ldrld.experiments.catalog import PROFILES
    from ldrld.experiments.catalog import profile as profile_of
    from ldrld.experiments.model_cards import listed, write_missing

    there = sorted(p.name for p in paths.weights("").glob("*") if p.is_dir())
    try: chosen = there if profile is None else [profile_of(profile).name if profile.endswith((".yaml", ".yml")) else known("--profile", profile, sorted({*there, *PROFILES}))]
    except (ValueError, OSError) as error: raise typer.BadParameter(str(error)) from None
    wrong, tables = [], []
    for name in chosen:
        for path in write_missing(name) if write else (): print(f"written: {paths.shown(path)}")
        if (table := listed(name, check)).empty: continue
        wrong += [f"{name}/{record}: {what}" for record, said in zip(table["record"], table.pop("wrong")) for what in said]
        tables.append(table.assign(profile=name))
    if not tables:
        print(f"no teacher under {paths.shown(paths.weights(chosen[0] if profile else ''))}; `ldrld reproduce` trains some, --out says where they are")
        return 0
    table = pd.concat(tables).set_index("profile").reset_index()
    shown = {column: lambda value: "-" if pd.isna(value) else value if isinstance(value, str) else f"{value:.2f}" for column in table}
    print(table.to_string(index=False, formatters=shown))
    print("\n".join([*wrong, f"{len(table)} teachers, {len(wrong)} things wrong"]))
    if check and (blind := int(table["measured, %"].isna().sum())): print(f"{blind} not measured: the data are not at hand, the weights are not here, or something above is wrong")
    return len(wrong)


@app.command()
def bench(names: Annotated[list[str] | None, typer.Argument(help="loss-targets, loss-depth, loss-classes, loss-vocabulary, loss-memory, loss-linear, training, training-shared, training-accuracy, graphs, methods. Default: all.")] = None,
          small: Annotated[bool, typer.Option("--small", help="Small sizes, a few seconds each: shows that all works, and is kept apart.")] = False,
          full: Annotated[bool, typer.Option("--full", help="Also what needs some ten gigabytes of memory.")] = False,
          again: Annotated[bool, typer.Option("--again", help="Measure anew what was measured on this machine before.")] = False, out: Out = None):
    """Measure what the loss, training and every method cost on this machine, then draw all measurements."""
    if small and full: raise typer.BadParameter("--small and --full exclude each other")
    if out is not None: os.environ["LDRLD_OUT"] = str(out.resolve())
    from ldrld.batch import scheduler
    from ldrld.batch.preflight import notebooks_for
    from ldrld.bench.graphs import graphs  # noqa: F401, registers itself
    from ldrld.bench.methods import methods  # noqa: F401, likewise
    from ldrld.bench.timing import BENCHMARKS, folder_for, measure
    from ldrld.bench.training import training  # noqa: F401, likewise
    from ldrld.core import paths
    from ldrld.core.validation import known

    try: chosen = [BENCHMARKS[known("benchmark", name, list(BENCHMARKS))] for name in names or BENCHMARKS]
    except ValueError as error: raise typer.BadParameter(str(error)) from None
    scale = "small" if small else "full" if full else "usual"
    for b in chosen: measure(b.name, scale, again)
    folder = folder_for(scale)
    notebooks = dict.fromkeys(b.notebook for b in chosen)
    if problems := notebooks_for(f"paper/{n}.ipynb" for n in notebooks):
        print("\n".join([f"measurements: {paths.shown(paths.measurements(folder))}", "no tables and figures:", *problems]), file=sys.stderr)
        raise typer.Exit(1)
    outcomes = scheduler.in_parallel("tables and figures", [([n], scheduler.execute_one, f"paper/{n}.ipynb", n, {"profile": folder}, folder) for n in notebooks], 1)
    for what, place in {"measurements": paths.measurements(folder), "tables": paths.tables(folder), "figures": paths.figures(folder),
                        "executed notebooks": paths.executed(folder)}.items():
        if place.exists(): print(f"{what}: {paths.shown(place)}")
    if any(o.status == "failed" for o in outcomes): raise typer.Exit(1)


@app.command("data")
def data_command(name: Annotated[str, typer.Argument(help="glyphs, glyphs-10, -20, -50 or -200, digits, cifar100, cifar100-10, tiny-imagenet, or a folder of images, with its size if need be: own@32.")],
                 root: Annotated[Path | None, typer.Option(help="Where data sets lie. Default: data/ of the project.")] = None):
    """Fetch, make or find a data set, and say what it is."""
    from ldrld import data

    try: images = data.load(name, root=root, download=True)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    shape = "x".join(map(str, images.train_images.shape[1:3]))
    print(json.dumps({"name": images.name, "train": len(images.train_labels), "test": len(images.test_labels), "size": shape,
                      "classes": len(images.classes), "fingerprint": images.fingerprint}, indent=1))


ASCII = {"→": "->", "±": "+-", "×": "x", "−": "-", "–": "-", "…": "...", "≥": ">=", "≤": "<=", "α": "alpha", "β": "beta", "“": '"', "”": '"', "·": "."}


def in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What a terminal shows of a character that it does not have."""
    if not isinstance(error, UnicodeEncodeError): raise error
    return "".join(ASCII.get(c, "?") for c in error.object[error.start:error.end]), error.end


def main():
    """Entry point of the `ldrld` command."""
    codecs.register_error("ldrld", in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"): stream.reconfigure(errors="ldrld")
    warnings.filterwarnings("ignore", message="left out: ")     # odd records, which the commands list themselves
    app()


if __name__ == "__main__": main()
