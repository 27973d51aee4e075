"""`ldrld verify`: recomputes every number of every table from the records."""

import os
from typing import Annotated

import typer

from ldrld.cli.app import Out, app, start, tell_odd


@app.command()
def verify(
    profile: Annotated[
        list[str] | None,
        typer.Option(help="Default: quick, small and paper, if they have tables; or a YAML file of your own."),
    ] = None,
    out: Out = None,
) -> None:
    """Recompute every number of every table from its records; compare teachers' weights with their model cards."""
    for name in profile or ():
        start(name)
    if out is not None:
        os.environ["LDRLD_OUT"] = str(out.resolve())
    from ldrld.core import paths
    from ldrld.experiments.catalog import EXPERIMENTS
    from ldrld.experiments.profiles import PROFILES
    from ldrld.experiments.profiles import profile as profile_of
    from ldrld.experiments.model_cards import wrong_teachers
    from ldrld.results.tables import to_report
    from ldrld.results.verification import verify_table

    wrong, checked, missing = [], 0, []
    names = profile or [name for name in PROFILES if paths.tables(name).exists()]
    for p in map(profile_of, names):
        wrong += [f"{p.name}: {line}" for line in tell_odd(p.name)]
        for e in (EXPERIMENTS[name] for name in to_report(p) if EXPERIMENTS[name].table):
            try:
                found = verify_table(e, p)
            except FileNotFoundError:
                missing.append(f"{p.name}/{e.name}")
            except ValueError as error:
                wrong.append(f"{p.name}/{e.name}: {error}")
            else:
                wrong += [f"{p.name}: {line}" for line in found]
                checked += 1
        wrong += [f"{p.name}: {line}" for line in wrong_teachers(p.name)]
    if missing:
        print(f"not made yet: {', '.join(missing)}")
    print("\n".join([*wrong, f"{checked} tables checked, {len(wrong)} problems"]))
    print(f"records and tables: {paths.shown(paths.out() / 'data')}")
    if not checked:
        print(f"no table found under {paths.out()}; use `ldrld report` to make them, or --out for another folder")
    if wrong or not checked:
        raise typer.Exit(1)
