"""The missing runs of a profile, and which of them can share a pass over the data."""

import math

from filelock import Timeout

from ldrld.experiments.catalog import batch
from ldrld.experiments.config import RunConfig, name_of
from ldrld.experiments.profiles import Profile, profile
from ldrld.experiments.records import KEPT, finished, load_divergence, load_record
from ldrld.experiments.records import lock_of
from ldrld.experiments.runner import batch_key

__all__ = ["missing", "taken_up_again", "wanted", "cohorts", "free", "odd"]


def free(
    name: str,  # a run's name
) -> bool:
    """Whether no process, here or on a machine sharing this folder, holds the lock of a run."""
    try:
        with lock_of(name, timeout=0): return True
    except Timeout: return False


def cohorts(
    runs: list[tuple[RunConfig, tuple[str, ...]]],  # configurations, each with what to keep, by priority
    size: int,  # runs of a cohort, at most
) -> list[list[tuple[RunConfig, tuple[str, ...]]]]:
    """Group runs of one network that can share a data pass and a teacher into similar cohorts of at most `size`.

    Cohorts are in the order of their first runs in `runs`; a run whose weights others need is alone. Other networks
    could share the pass, too, but belong to other pairs, and the most valuable runs would wait for them.
    """
    groups: dict = {}
    for i, (config, keep) in enumerate(runs):
        alone = name_of(config) if "weights" in keep else None
        key = batch_key(config), config.model, config.teacher and name_of(config.teacher), alone
        groups.setdefault(key, []).append((i, config, keep))
    packed = []
    for group in groups.values():
        n = math.ceil(len(group) / size)
        packed += [group[k * len(group) // n : (k + 1) * len(group) // n] for k in range(n)]
    packed.sort(key=lambda cohort: cohort[0][0])
    return [[(config, keep) for _, config, keep in cohort] for cohort in packed]


def odd(
    name: str,  # a run's name
    folder: str,  # of the records, below `data/runs`
) -> str:
    """What is wrong with a run's record; empty if it is valid or missing."""
    try: load_record(name, folder)
    except ValueError as error: return str(error)
    return ""


def wanted(
    p: str | Profile,
    only: tuple[str, ...] = (),
    plan: bool = False,  # the runs of the profile's plan instead of its experiments
) -> list[tuple[RunConfig, tuple[str, ...]]]:
    """The runs of a profile's experiments, or of its plan."""
    if not plan: return batch(p, only)
    from ldrld.experiments.plan import planned  # here, since it needs what tables are made with
    return planned(p)


def missing(
    p: str | Profile,
    only: tuple[str, ...] = (),
    plan: bool = False,  # the runs of the profile's plan instead of its experiments
) -> list[tuple[RunConfig, tuple[str, ...]]]:  # configurations, each with what to keep
    """The missing runs of a profile.

    First the unfinished runs (see `ldrld.experiments.records.finished`), the most valuable first. Then finished runs
    without a required file: data for a figure, or a teacher's weights while one of its students is unfinished.
    """
    folder, runs = profile(p).name, wanted(p, only, plan)
    made = {name_of(config) for config, _ in runs if finished(config, folder)}
    there = lambda kind, name: KEPT[kind](name, folder).exists()
    first, again, asked = [], [], set()
    for config, keep in reversed(runs):  # students before their teachers
        name = name_of(config)
        lacks = tuple(kind for kind in keep if not there(kind, name) and (kind != "weights" or name in asked))
        if load_divergence(name, folder): continue  # it has a result
        if name not in made: first.append((config, keep))
        elif lacks: again.append((config, lacks))
        else: continue
        if config.teacher and not (name in made and there("weights", name)): asked.add(name_of(config.teacher))
    return first[::-1] + again[::-1]


def taken_up_again(
    todo: list[tuple[RunConfig, tuple[str, ...]]],  # from `missing`
    folder: str,  # of the records, below `data/runs`
) -> str:
    """The finished runs of `todo` that lack required files, and which; empty if none does."""
    of: dict[str, list[str]] = {}
    for config, lacks in todo:
        for kind in lacks if finished(config, folder) else (): of.setdefault(kind, []).append(name_of(config))
    if not of: return ""
    some = lambda names: ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    lacking = "; ".join(f"{kind} of {some(names)}" for kind, names in of.items())
    return f"finished, but required files are missing, so they are completed: {lacking}"
