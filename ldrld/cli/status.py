"""`ldrld status`: progress of a profile."""

import os

from ldrld.cli.app import Out, ProfileName, app, start, tell_odd


@app.command()
def status(profile: ProfileName = "quick", out: Out = None) -> None:
    """Show the progress of a profile: runs planned, finished and missing for each experiment, and the next runs.

    The name of another folder of records lists its records.
    """
    import pandas as pd

    from ldrld.core import paths

    if out is not None:
        os.environ["LDRLD_OUT"] = str(out.resolve())
    if profile not in ("quick", "small", "paper") and paths.records(profile).is_dir():
        from ldrld.experiments.records import records

        columns = ["record", "last epoch, %", "finished"]
        print(
            pd.DataFrame(
                [(r.name, round(r.last_accuracy, 2), r.finished) for r in records(profile)], columns=columns
            ).to_string(index=False)
        )
        for line in tell_odd(profile):
            print(line)
        return
    start(profile)
    from ldrld.experiments.catalog import EXPERIMENTS, selected
    from ldrld.results.statistics import collect

    lines, usual = [], selected(profile)
    for name, e in EXPERIMENTS.items():
        runs = collect(e, profile)
        when = "always" if name in usual else "by name"
        lines.append(
            {
                "experiment": name,
                "run": "reads" if e.reads else when,
                "planned": len(runs),
                "finished": int(runs["last"].notna().sum()),
                "missing": int(runs["last"].isna().sum()),
                "about": e.title,
            }
        )
    print(pd.DataFrame(lines).to_string(index=False))
    from ldrld.batch.cluster import job_states
    from ldrld.batch.pending import missing, taken_up_again
    from ldrld.experiments.catalog import batch as runs_of
    from ldrld.experiments.profiles import profile as profile_of
    from ldrld.experiments.config import name_of
    from ldrld.experiments.records import finished
    from ldrld.training.checkpoint import epochs_trained

    folder, planned, todo = profile_of(profile).name, runs_of(profile), missing(profile)
    waiting = [config for config, _ in todo if not finished(config, folder)]
    print(
        f"\n{len(planned) - len(waiting)} of the {len(planned)} runs of the default experiments are finished, "
        f"{len(waiting)} are missing{'; these come next' if waiting else ''}"
    )
    begun = lambda name: epochs_trained(paths.work(name) / "checkpoint.pt")
    coming = [
        {
            "run": name_of(c),
            "teacher": c.teacher.model if c.teacher else "-",
            "epochs trained": f"{begun(name_of(c))} of {c.epochs}",
        }
        for c in waiting[:10]
    ]
    if coming:
        print(pd.DataFrame(coming).to_string(index=False))
    if again := taken_up_again(todo, folder):
        print(again)
    for line in (*job_states(folder), *tell_odd(folder)):
        print(line)
