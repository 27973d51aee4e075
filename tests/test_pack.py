"""Portable batches: packed, carried out elsewhere, killed, and merged; damaged or foreign files are rejected."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from ldrld.batch.archives import MIB, Limits, collect
from ldrld.batch.merge import merge
from ldrld.batch.pack import deliveries, in_pieces, pack
from ldrld.core.provenance import PACKED
from ldrld.batch.priority import Cost, fitting, kind_of
from ldrld.experiments import runner
from ldrld.experiments.config import RunConfig, name_of
from ldrld.experiments.records import KEPT, load_record

TEACHER = {"model": "resnet14", "recipe": "onecycle", "epochs": 2, "lr": 0.1}


def config(loss="kd", seed=0, epochs=2, **more):
    teacher = None if loss == "ce" else TEACHER
    return RunConfig(
        dataset="digits",
        model="resnet8",
        loss=loss,
        recipe="onecycle",
        lr=0.1,
        epochs=epochs,
        seed=seed,
        teacher=teacher,
        **more,
    )


BATCH = [(config("kd"), ("logits",)), (config("ldrld", loss_args={"depth": 5}), ()), (config("ce"), ())]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder with three runs and the teacher that they need, of which nothing is finished here."""
    here = tmp_path_factory.mktemp("empty")
    before, os.environ["LDRLD_OUT"] = os.environ.get("LDRLD_OUT"), str(here)
    try:
        yield pack(tmp_path_factory.mktemp("packed") / "batch", BATCH, "t", say=lambda line: None)
    finally:
        os.environ.pop("LDRLD_OUT") if before is None else os.environ.update(LDRLD_OUT=before)


@pytest.fixture
def there(packed, tmp_path):
    """The folder, delivered to another place."""
    return Path(shutil.copytree(packed, tmp_path / "there"))


def carry_out(folder, *more, **options):
    """Run a packed folder with nothing of this checkout on the path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("LDRLD_") and k != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1"
    }
    return subprocess.Popen(
        [sys.executable, "-P", "run.py", *more],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def names():
    return [name_of(BATCH[0][0].teacher), *(name_of(c) for c, _ in BATCH)]


@pytest.fixture(scope="module")
def home(packed, tmp_path_factory):
    """The returned files of a completed batch."""
    there = Path(shutil.copytree(packed, tmp_path_factory.mktemp("complete") / "there"))
    process = carry_out(there)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return there / "home"


def test_there_and_back(home, packed, tmp_path, monkeypatch):
    """Records as they would have been made here, weights with their card; merging again changes nothing."""
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    merged = merge(home, packed, say=lambda line: None)
    assert sorted(merged.added) == sorted(names()) and not merged.refused and not merged.left_out
    assert merged.weights == names()[:1]
    record = load_record(names()[1], "t")
    told = json.loads((packed / PACKED).read_text())
    assert record.code == {**{k: told[k] for k in ("version", "commit", "changed")}, "as_packed": True}
    assert KEPT["logits"](names()[1], "t").exists()
    again = merge(home, packed, say=lambda line: None)
    assert sorted(again.same) == sorted(names()) and not again.added and not again.refused
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path / "here"))
    here = runner.run(BATCH[0][0], "t", report=None)
    assert (here.last_accuracy, here.history[-1]["terms"]) == (record.last_accuracy, record.history[-1]["terms"])


BARE = """
import runpy, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def found(name, path=None, target=None):
    return None if name.split(".")[0] in {hidden!r} else find(name, path, target)
PathFinder.find_spec = found
sys.argv = ["run.py"]
runpy.run_path("run.py", run_name="__main__")
"""
WHEELS = {"pydantic", "typing_inspection", "annotated_types", "filelock", "numpy", "yaml", "safetensors"}
HIDDEN = {
    "torchvision",
    "pandas",
    "matplotlib",
    "statsmodels",
    "PIL",
    "papermill",
    "tenacity",
    "optuna",
    "typer",
    "tqdm",
    "tabulate",
    "ipykernel",
    "jupyterlab",
    "nbdev",
    "execnb",
    "fastcore",
    "nbconvert",
    "nbclient",
    "nbformat",
    "pytest",
    "triton",
}


def test_nothing_but_torch_and_the_wheels_is_needed(there):
    """With every other package hidden, all runs are carried out, weights and model card included."""
    import re

    from ldrld.batch.pack import NEEDED

    assert {re.sub("-", "_", n).replace("pyyaml", "yaml") for n in NEEDED} == WHEELS
    bare = BARE.format(hidden=HIDDEN)
    env = {k: v for k, v in os.environ.items() if not k.startswith("LDRLD_") and k != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1"
    }
    got = subprocess.run(
        [sys.executable, "-P", "-c", bare], cwd=there, env=env, capture_output=True, text=True, timeout=300
    )
    assert got.returncode == 0 and "FAILED" not in got.stdout, got.stdout + got.stderr
    assert len(list((there / "out" / "data" / "runs" / "t").glob("*.json"))) == len(names())


def test_changed_code_is_seen(there):
    """A file that is not what was packed stops everything; a record could not say what made it."""
    loss = there / "ldrld" / "losses" / "ldrld" / "loss.py"
    loss.write_text(loss.read_text() + "\n")
    process = carry_out(there)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "ldrld/losses/ldrld/loss.py is damaged: deliver it again" in said


def test_an_undelivered_file_is_named(there):
    (there / "settings.ini").unlink()
    process = carry_out(there)
    assert "settings.ini is missing: deliver it, too" in process.communicate(timeout=60)[0]


@pytest.mark.parametrize("turn", range(2))
def test_killed_and_brought_home(there, packed, turn, tmp_path, monkeypatch):
    """SIGKILL at a random moment: what was collected merges; called again there, the rest is done."""
    process = carry_out(there)
    time.sleep(random.Random(turn).uniform(4, 9))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path / "here"))
    collect(there / "out", "t", there / "home", Limits(), names())
    first = merge(there / "home", packed, say=lambda line: None)
    assert not first.refused
    process = carry_out(there)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    second = merge(there / "home", packed, say=lambda line: None)
    assert sorted(second.added + second.same) == sorted(names()) and not second.refused


def tampered(home, tmp_path, change):
    """A copy of the results whose records were changed by `change(name, text)`, hashed anew as a forger would."""
    import hashlib
    import io

    place = Path(shutil.copytree(home, tmp_path / "tampered"))
    room = io.BytesIO()
    with tarfile.open(place / "records.tar.gz") as old, tarfile.open(fileobj=room, mode="w:gz") as new:
        for member in old:
            name, content = change(member.name, old.extractfile(member).read())
            info = tarfile.TarInfo(name)
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))
    (place / "records.tar.gz").write_bytes(room.getvalue())
    summary = json.loads((place / "summary.json").read_text())
    summary["files"]["records.tar.gz"] = hashlib.sha256(room.getvalue()).hexdigest()
    (place / "summary.json").write_text(json.dumps(summary))
    return place


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda n, c: (n, c[: len(c) // 2] if n.startswith("records") else c), "is no record"),
        (lambda n, c: (n, c.replace(b'"seed": 0', b'"seed": 7') if "-kd-" in n else c), "settings of another run"),
        (lambda n, c: (n.replace("kd-s0", "kd-s9"), c), "no run of this batch"),
        (lambda n, c: (f"../{n}", c), "which results never do"),
        (lambda n, c: (n, c.replace(b'"commit": "', b'"commit": "0')), "was made by commit 0"),
        (lambda n, c: (n, c.replace(b'"last_accuracy": ', b'"last_accuracy": 1') if "-kd-" in n else c), "kd-s0"),
        (
            lambda n, c: (n, c.replace(b"sha256: ", b"sha256: 0") if n.startswith("cards") else c),
            "not those of their model card",
        ),
    ],
)
def test_damaged_and_foreign_results_are_refused(home, packed, tmp_path, monkeypatch, change, said):
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path / "here"))
    merged = merge(tampered(home, tmp_path, change), packed, say=lambda line: None)
    assert any(said in line for line in merged.refused), merged.refused
    for name in merged.added:
        assert load_record(name, "t")  # what was taken is sound


def test_a_flipped_bit_is_seen(home, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path / "here"))
    place = Path(shutil.copytree(home, tmp_path / "flipped"))
    content = bytearray((place / "records.tar.gz").read_bytes())
    content[len(content) // 2] ^= 1
    (place / "records.tar.gz").write_bytes(content)
    merged = merge(place, packed, say=lambda line: None)
    assert not merged.added and "records.tar.gz: is not what was written there" in merged.refused[0]


def test_what_is_here_stays(home, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    record = runner.run(BATCH[2][0], "t", report=None)
    before = (tmp_path / "data/runs/t" / f"{record.name}.json").read_bytes()
    merged = merge(home, packed, say=lambda line: None)
    assert (tmp_path / "data/runs/t" / f"{record.name}.json").read_bytes() == before
    assert f"{record.name}: there is another record of it here, which stays" in merged.refused


def test_limits_of_what_comes_back(tmp_path):
    """Large weights are cut over archives; what does not fit is named, and nothing is larger than agreed."""
    out, home = tmp_path / "out", tmp_path / "home"
    place = out / "data" / "teachers" / "t"
    place.mkdir(parents=True)
    for k, size in enumerate((18, 5, 5, 40)):
        (place / f"run{k}.safetensors").write_bytes(random.Random(k).randbytes(size * MIB))
    left = collect(out, "t", home, Limits(files=6, file=16 * MIB), [f"run{k}" for k in range(4)])
    assert left == ["weights/run3.safetensors: 40.0 MiB"]
    assert len(list(home.iterdir())) <= 6 and all(p.stat().st_size <= 16 * MIB for p in home.iterdir())
    from ldrld.batch.archives import joined, members

    found = {n: c for p in home.glob("part-*.tar") for n, c in members(p.read_bytes(), p.name).items()}
    whole = joined(found)
    assert all(whole[f"weights/run{k}.safetensors"] == (place / f"run{k}.safetensors").read_bytes() for k in range(3))


def test_deliveries(packed):
    size = 200_000
    groups = deliveries(packed, size)
    everything = [str(p.relative_to(packed)) for p in packed.rglob("*") if p.is_file()]
    assert sorted(n for g in groups for n in g) == sorted(everything)
    assert all(sum((packed / n).stat().st_size for n in g) <= size or len(g) == 1 for g in groups)
    import lzma

    content = random.Random(0).randbytes(100_000)
    pieces = in_pieces(content, 30_000)
    assert len(pieces) == 4 and lzma.decompress(b"".join(pieces)) == content


def test_a_folder_that_is_not_empty_is_unchanged(packed):
    with pytest.raises(ValueError, match="is not empty"):
        pack(packed, BATCH, "t")


def test_nothing_is_begun_that_cannot_be_ended_or_brought_home():
    teacher = config("kd").teacher
    batch = [
        (teacher, ()),
        (config("kd"), ()),
        (config("kd", 1), ()),
        (config("kd", epochs=1000), ()),
        (config("ce", epochs=1000), ()),
    ]
    costs = {kind_of(c): Cost(begin=1.0, epoch=1.0, table=4.0 if c.teacher else 0.0) for c, _ in batch}
    chosen, reasons = fitting(batch, 60.0, costs, {}, largest=MIB)
    assert [c.epochs for c, _ in chosen] == [2, 2, 2, 1000] and chosen[3][
        0
    ].loss == "kd"  # the last one's checkpoint is collected
    assert "its checkpoint is collected" in reasons[0] and "0 s are left" in reasons[1]
    chosen, _ = fitting(batch, 60.0, costs, {}, largest=1000)
    assert len(chosen) == 3  # a run whose checkpoint cannot be collected is not begun
    chosen, reasons = fitting(batch, 3.0, costs, {}, largest=1000)
    assert not chosen and "its teacher will not be finished" in reasons[1]
    chosen, _ = fitting(batch, 60.0, costs, {name_of(batch[3][0]): 990}, largest=1000)
    assert len(chosen) == 4  # what it has behind it counts
