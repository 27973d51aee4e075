"""Merges the results of a portable batch: every file is checked, and damaged or foreign ones are rejected by name."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ldrld.batch.archives import LOG, MANIFEST, hash_of, joined, members
from ldrld.core import paths
from ldrld.core.files import sha256_of, write_whole
from ldrld.core.provenance import PACKED
from ldrld.experiments.config import name_of
from ldrld.experiments.model_cards import card_path, facts, page, read_card
from ldrld.experiments.records import KEPT, Divergence, Record, divergence_path, load_record
from ldrld.training.checkpoint import epochs_trained

__all__ = ["Merged", "merge"]


@dataclass
class Merged:
    """The outcome of a merge; each field is a list of names."""

    added: list[str] = field(default_factory=list)  # records that are new here
    same: list[str] = field(default_factory=list)  # records that were here already
    diverged: list[str] = field(default_factory=list)  # runs that diverged there, new here
    weights: list[str] = field(default_factory=list)  # that were added, with their cards
    checkpoints: list[str] = field(default_factory=list)  # of unfinished runs, which can be resumed here or there
    refused: list[str] = field(default_factory=list)  # rejected files, with reasons
    left_out: list[str] = field(default_factory=list)  # files that the machine did not return


def merge(
    home: str | Path,  # folder with the returned files
    packed: str | Path,  # the folder that was packed, or its `packed.json`
    say: Callable[[str], object] = print,  # called with each line of the outcome
) -> Merged:  # the outcome of every file
    """Merge results: every file is checked, existing files are kept, damaged or foreign ones are rejected by name.

    Raises ValueError if nothing can be read at all.
    """
    home, packed = Path(home), Path(packed)
    told = json.loads((packed / PACKED if packed.is_dir() else packed).read_text(encoding="utf-8"))
    if not (home / MANIFEST).exists():
        raise ValueError(f"{home}: no {MANIFEST}; nothing came back, or not from here")
    try:
        summary = json.loads((home / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{home / MANIFEST} is damaged; fetch it again") from None
    merged = Merged(left_out=list(summary["left_out"]))
    found: dict[str, bytes] = {}
    for name, digest in summary["files"].items():
        if name == LOG:
            continue
        path = home / name
        if not path.exists():
            merged.refused.append(f"{name}: is missing")
        elif sha256_of(path) != digest:
            merged.refused.append(f"{name}: is not what was written there; fetch it again")
        else:
            try:
                found |= members(path.read_bytes(), name)
            except ValueError as error:
                merged.refused.append(str(error))
    expected = {run["name"]: run for run in told["runs"]}
    _take_all(joined(found), expected, told, merged)
    for what in ("added", "same", "diverged", "weights", "checkpoints", "left_out"):
        if names := getattr(merged, what):
            say(f"{what.replace('_', ' ')}: {len(names)}" + (f" ({', '.join(names)})" if what == "left_out" else ""))
    for line in merged.refused:
        say(f"refused: {line}")
    return merged


def _take_all(found: dict[str, bytes], expected: dict[str, dict], told: dict, merged: Merged) -> None:
    """Merge every file of the results, records first."""
    profile = told["profile"]
    for name, content in sorted(found.items(), key=lambda item: not item[0].startswith("records/")):
        kind, file = name.split("/")
        run = file.rsplit(".", 1)[0]
        if run not in expected:
            merged.refused.append(f"{name}: is no run of this batch")
        elif kind in ("records", "diverged"):
            _take_record(kind, run, content, expected[run], told, merged)
        elif kind in ("logits", "insight"):
            _take_kept(KEPT[kind](run, profile), content)
        elif kind == "weights":
            _take_weights(run, content, found.get(f"cards/{run}.md"), profile, merged)
        elif kind == "checkpoints":
            _take_checkpoint(run, content, profile, merged)
        elif kind != "cards":
            merged.refused.append(f"{name}: results hold no such thing")


def _take_record(kind: str, run: str, content: bytes, expected: dict, told: dict, merged: Merged) -> None:
    """Add a record, or the outcome of a run that diverged, if it is valid, of this batch, and new."""
    try:
        record = (Record if kind == "records" else Divergence).model_validate_json(content, strict=False)
    except ValueError as error:
        return merged.refused.append(f"{run}: is no record ({str(error).splitlines()[0]})")
    if record.name != run or name_of(record.config, record.schema_version) != run:
        return merged.refused.append(f"{run}: holds the settings of another run")
    if record.code.get("commit") != told["commit"]:
        return merged.refused.append(
            f"{run}: was made by commit {record.code.get('commit')}, packed was {told['commit']}"
        )
    if not record.code.get("as_packed"):
        return merged.refused.append(f"{run}: the code there was not the one that was packed")
    path = (
        paths.records(told["profile"]) / f"{run}.json" if kind == "records" else divergence_path(run, told["profile"])
    )
    if not path.exists():
        write_whole(path, content)
        (merged.added if kind == "records" else merged.diverged).append(run)
        if kind == "records" and not _loads(run, told["profile"]):
            path.unlink()
            merged.added.remove(run)
            merged.refused.append(f"{run}: its numbers contradict each other")
    elif path.read_bytes() == content:
        merged.same.append(run)
    else:
        merged.refused.append(f"{run}: there is another record of it here, which stays")


def _loads(run: str, profile: str) -> bool:
    """Whether a record that was just written passes every check."""
    try:
        return load_record(run, profile) is not None
    except ValueError:
        return False


def _take_kept(path: Path, content: bytes) -> None:
    """Add logits or features that are not here yet."""
    if not path.exists():
        write_whole(path, content)


def _take_weights(run: str, content: bytes, card: bytes | None, profile: str, merged: Merged) -> None:
    """Add a teacher's weights with their model card, if the bytes match the card."""
    path = KEPT["weights"](run, profile)
    if path.exists():
        return
    if card is None:
        return merged.refused.append(f"{run}: weights without a model card")
    place = card_path(run, profile)
    write_whole(place, card)
    if read_card(place)["sha256"] != hash_of(content):
        place.unlink()
        return merged.refused.append(f"{run}: the weights are not those of their model card")
    write_whole(path, content)
    if record := load_record(run, profile):
        _write_card(record, profile, read_card(place))
    merged.weights.append(run)


def _write_card(record: Record, profile: str, there: dict) -> None:
    """A model card with facts known here, such as published numbers, and with the measurements made there."""
    write_whole(card_path(record.name, profile), page(there | facts(record, profile)))


def _take_checkpoint(run: str, content: bytes, profile: str, merged: Merged) -> None:
    """Keep the checkpoint of an unfinished run, unless the one here is at least as advanced."""
    if load_record(run, profile):
        return
    path = paths.work(run) / "checkpoint.pt"
    new = path.with_name("checkpoint-merged.pt")
    write_whole(new, content)
    try:
        further = epochs_trained(new) > epochs_trained(path)
    except ValueError as error:
        new.unlink()
        return merged.refused.append(str(error))
    if further:
        new.replace(path)
        merged.checkpoints.append(run)
    else:
        new.unlink()
