"""`ldrld tune`: a search for hyper-parameters."""

import math
import os
from typing import Annotated

import typer

from ldrld.cli.app import Budget, Out, ProfileName, app, seconds, start


@app.command()
def tune(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[SPACE]...", help="Further parts of the space, after --space.")
    ] = None,
    profile: ProfileName = "quick",
    loss: Annotated[str, typer.Option(help="The loss whose hyper-parameters are searched.")] = "ldrld",
    teacher: Annotated[str | None, typer.Option(help="Default: of the profile's ablation pair.")] = None,
    student: Annotated[str | None, typer.Option(help="Default: of the profile's ablation pair.")] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="Candidates, e.g. --space alpha=0.1..30:log depth=2..20 weighting=adw,none. Default: by loss."
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Total number, including earlier calls; the first one uses the defaults.")
    ] = 30,
    time_budget: Budget = None,
    holdout: Annotated[
        float,
        typer.Option(
            help="Fraction of the training images of each class to compare on; the test set is never used."
        ),
    ] = 0.1,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs per trial. Default: the profile's.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per trial; their mean accuracy counts.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the suggestions.")] = 0,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the search. Default: from loss and pair; the same name continues the same search."),
    ] = None,
    out: Out = None,
) -> None:
    """Search for the hyper-parameters of a loss for a pair, on held-out training images, never on the test set."""
    import time

    budget = seconds(time_budget) if time_budget else math.inf
    start(profile, out=out)
    import optuna
    from pydantic import ValidationError

    from ldrld.batch.tuning.report import caption, keep, next_step, shown
    from ldrld.batch.tuning.search import search_for
    from ldrld.batch.tuning.space import space_from
    from ldrld.batch.tuning.trials import tune as carry_out
    from ldrld.core import paths
    from ldrld.experiments.profiles import ablation_pair
    from ldrld.experiments.profiles import profile as profile_of
    from ldrld.experiments.config import explain
    from ldrld.results.manifest import stamps, update_manifest

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    p = profile_of(profile)
    pair = (teacher or ablation_pair(p)[0], student or ablation_pair(p)[1])
    if math.isfinite(budget):
        os.environ["LDRLD_DEADLINE"] = str(time.time() + budget)
    try:
        chosen = space_from([*(space or ()), *(words or ())]) or None
        search = search_for(p, loss, pair, chosen, holdout, epochs, name, seeds=seeds, seed=seed)
    except ValidationError as error:
        raise typer.BadParameter(explain(error)) from None
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    try:
        table = carry_out(search, trials)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if table.empty:
        print("no trial is finished yet; call again to resume")
        return
    before = stamps(search.folder)
    keep(search, table, p)
    update_manifest(search.folder, before)
    print(f"\n{shown(search, table).head(10).to_string(index=False)}\n\n{caption(search, table)}\n")
    if (done := int(table["trial"].notna().sum())) < trials:
        print(f"{done} of {trials} trials are finished; call again to resume")
    print(f"to train with the best settings on all training images, and test:\n  {next_step(search, table, p)}")
    for what, place in {
        "trials": paths.records(search.folder),
        "table": paths.tables(search.folder) / f"{search.name}.csv",
        "figure": paths.figures(search.folder) / f"{search.name}.svg",
    }.items():
        print(f"{what}: {paths.shown(place)}")
