"""`ldrld compare`: runs that were trained again, beside the committed ones."""

import typer

from ldrld.cli.app import Out, ProfileName, app, start


@app.command()
def compare(profile: ProfileName = "quick", out: Out = None) -> None:
    """Compare runs trained again, in the folder --out, with the committed records, and keep the comparison."""
    start(profile, out=out)
    from ldrld.core import paths
    from ldrld.experiments.profiles import profile as profile_of
    from ldrld.experiments.records import records
    from ldrld.results.reproduction import in_words, reproduction_of, save

    if paths.out() == paths.root():
        raise typer.BadParameter("the project's own records would be compared with themselves; "
                                 "name the folder with the repeated runs", param_hint="--out")
    folder = profile_of(profile).name
    try:
        again = reproduction_of(records(folder), folder)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None
    print(f"{folder}: {in_words(again)}")
    print(f"kept as {paths.shown(save(again))}; copied to data/reproductions, it is listed on nbs/pages/reproduce")
