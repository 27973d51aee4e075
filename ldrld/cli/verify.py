"""`ldrld verify`: recomputes every number of every table from the records, and compares every file with its hash."""

import os
from typing import Annotated

import typer

from ldrld.cli.app import Out, app, start, tell_odd


def tables_of(
    profile: str,  # name of a profile, or the path of a YAML file with one
) -> tuple[list[str], int, list[str]]:
    """Recompute a profile's tables: the problems, the number of tables checked, and those that are not made yet."""
    from ldrld.experiments.catalog import EXPERIMENTS
    from ldrld.experiments.profiles import profile as profile_of
    from ldrld.results.tables import to_report
    from ldrld.results.verification import verify_table

    wrong, checked, missing, p = [], 0, [], profile_of(profile)
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
    return wrong, checked, missing


def hashes_of(
    folder: str,  # a profile's name, or "bench"
) -> list[str]:
    """The files of a profile, or of the benchmarks, that differ from the manifest; says which are not in it."""
    from ldrld.core import paths
    from ldrld.results.manifest import changed_results, not_in_manifest

    try:
        changed, new = changed_results(folder), not_in_manifest(folder)
    except ValueError as error:
        return [str(error)]
    if new:
        some = ", ".join(new[:3]) + (", …" if len(new) > 3 else "")
        print(f"{len(new)} files without a hash in {paths.shown(paths.manifest(folder))}: {some}; "
              f"`ldrld {'bench' if folder == 'bench' else 'report'}` adds them")
    return changed


def readme() -> list[str]:
    """What the README says differently from the records, if the results are the project's own."""
    from ldrld.core import paths
    from ldrld.results.front_page import wrong_on_front_page

    page = paths.root() / "README.md"
    if paths.out() != paths.root() or not page.exists():
        return []
    return wrong_on_front_page(page.read_text(encoding="utf-8", errors="replace"))


@app.command()
def verify(
    profile: Annotated[
        list[str] | None,
        typer.Option(help="A profile, or a YAML file of your own; may be repeated. Default: those that have tables, "
                          "the benchmarks and the README."),
    ] = None,
    out: Out = None,
) -> None:
    """Recompute every number of every table from its records; compare all results and weights with their hashes."""
    for name in profile or ():
        start(name)
    if out is not None:
        os.environ["LDRLD_OUT"] = str(out.resolve())
    from ldrld.core import paths
    from ldrld.experiments.model_cards import wrong_teachers
    from ldrld.experiments.profiles import PROFILES
    from ldrld.experiments.profiles import profile as profile_of
    from ldrld.results.manifest import folders_of

    wrong: list[str] = []
    missing: list[str] = []
    checked = 0
    for name in profile or [name for name in PROFILES if paths.tables(name).exists()]:
        folder = profile_of(name).name
        found, tables, absent = tables_of(name)
        wrong += [*(f"{folder}: {line}" for line in tell_odd(folder)), *found]
        missing += absent
        checked += tables
        wrong += [f"{folder}: {line}" for line in wrong_teachers(folder)]
        wrong += [line for part in folders_of(folder) for line in hashes_of(part)]
    if not profile:
        wrong += [*hashes_of("bench"), *readme()]
    if missing:
        print(f"not made yet: {', '.join(missing)}")
    print("\n".join([*wrong, f"{checked} tables checked, {len(wrong)} problems"]))
    print(f"records and tables: {paths.shown(paths.out() / 'data')}")
    if not checked:
        print(f"no table found under {paths.out()}; use `ldrld report` to make them, or --out for another folder")
    if wrong or not checked:
        raise typer.Exit(1)
