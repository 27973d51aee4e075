"""Before a batch starts, and around it: what is missing is said at once, what was left is swept, and one meaning of
finished."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch

import commands

from ldrld import data, models
from ldrld.batch import leftovers, notebooks, pending, preflight, scheduler
from ldrld.core import paths
from ldrld.core.files import reserve, write_whole
from ldrld.data.augmentation import Crops
from ldrld.experiments import records, runner, students
from ldrld.experiments.catalog import batch as runs_of
from ldrld.experiments.profiles import profile
from ldrld.experiments.config import RunConfig, name_of
from ldrld.experiments.records import KEPT
from ldrld.experiments.records import invented
from ldrld.results.front_page import what_waits

ROOT = Path(__file__).parent.parent
YAML = """data: handwritten digits
dataset: digits
pairs: [[resnet14, resnet8]]
teacher: {recipe: onecycle, epochs: 1, lr: 0.1}
student: {recipe: onecycle, epochs: 1, lr: 0.1}
seeds: [0]
experiments: [same_architecture, probability_gap]
"""


def ldrld(*words, **more):
    """The command, and how many seconds it took."""
    started = time.time()
    got = commands.ldrld(*words, **more)
    got.seconds = time.time() - started
    return got


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A custom profile, and a folder for its results."""
    (tmp_path / "mine.yaml").write_text(YAML)
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    return str(tmp_path / "mine.yaml")


def pretend(p, without=()):
    """Records and artifacts of every run of a profile; the names."""
    names, folder = [], profile(p).name
    for i, (config, keep) in enumerate(runs_of(p)):
        record = invented(config, 50.0 + i)
        fingerprint = data.load(config.dataset).fingerprint
        record = record.model_copy(update={"data": record.data | {"fingerprint": fingerprint}})
        write_whole(paths.records(folder) / f"{record.name}.json", record.model_dump_json())
        for kind in keep:
            path = KEPT[kind](record.name, folder)
            if kind not in without:
                write_whole(path, "pretended")
        names.append(record.name)
    return names


# ---- what is missing is said before anything starts -----------------------------------------------------------------


def test_without_the_data_nothing_starts(tmp_path):
    got = ldrld("reproduce", "--profile", "small", "--out", tmp_path / "out", LDRLD_DATA=str(tmp_path / "none"))
    assert got.returncode == 1 and got.stderr.count("data: cifar100:") == 1 and "ldrld data cifar100" in got.stderr
    assert (
        "Traceback" not in got.stderr
        and len(got.stderr) < 1500
        and got.seconds < 60
        and not list((tmp_path / "out").rglob("*.ipynb"))
    )


@pytest.mark.parametrize("command", ["reproduce", "report"])
def test_outside_of_a_checkout_the_notebooks_are_missing(tmp_path, mine, command):
    got = ldrld(command, "--profile", mine, cwd=tmp_path, LDRLD_ROOT=str(tmp_path))
    assert (
        got.returncode == 1
        and got.stderr.count("notebooks: ") == 1
        and "LDRLD_ROOT" in got.stderr
        and "Traceback" not in got.stderr
    ), got.stderr
    assert not list(tmp_path.rglob("*.ipynb")) and not list(tmp_path.rglob("*.json"))


def test_outside_of_a_checkout_training_works_without_notebooks(tmp_path, mine):
    got = ldrld(
        "reproduce",
        "--profile",
        mine,
        "--only",
        "probability_gap",
        "--no-notebooks",
        "--jobs",
        1,
        cwd=tmp_path,
        LDRLD_ROOT=str(tmp_path),
    )
    assert (
        got.returncode == 0
        and "no tables and figures: their notebooks are missing" in got.stdout
        and "1 done" in got.stdout
    ), got.stdout + got.stderr


def test_benchmarks_outside_of_a_checkout_keep_what_they_measured(tmp_path):
    got = ldrld(
        "bench", "loss-memory", "--small", "--out", tmp_path, cwd=tmp_path, LDRLD_ROOT=str(tmp_path), LDRLD_DEVICE="cpu"
    )
    assert (
        got.returncode == 1
        and "no tables and figures:" in got.stderr
        and "notebooks: " in got.stderr
        and "Traceback" not in got.stderr
    ), got.stderr
    assert list(tmp_path.rglob("loss-memory.json"))


def test_a_full_disk_and_one_that_is_read_only(mine, monkeypatch):
    todo = [config for config, _ in runs_of(mine)]
    monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    )
    (problem,) = preflight.needs_of(todo, [], "mine")
    assert problem.startswith("disk: ") and "0.0 GB left" in problem and "--out" in problem

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(preflight.tempfile, "TemporaryFile", refuse)
    (problem,) = preflight.needs_of(todo, [], "mine")
    assert "cannot be written to (Permission denied)" in problem


def test_the_room_for_a_teachers_logits_is_counted_once(mine):
    images, teacher = data.load("digits"), RunConfig(dataset="digits", model="resnet14", epochs=1)
    config = RunConfig(dataset="digits", model="resnet8", loss="kd", teacher=teacher, epochs=1)
    ((folder, size),) = preflight._table_bytes(config, images).items()
    crops = Crops(images.train_images, images.mean, images.std, images.padding, images.flip)
    assert size == crops.n * crops.per_image * 11 * 2 and folder == paths.work(name_of(teacher))
    assert (
        preflight._table_bytes(teacher, images) == {}
        and preflight._table_bytes(config.model_copy(update={"loss": "at", "loss_args": {}}), images) == {}
    )
    folder.mkdir(parents=True)
    with open(folder / "logits-0.bin", "wb") as file:
        file.truncate(size)
    assert preflight._table_bytes(config, images) == {folder: size}, "an earlier, sparse table still needs its space"
    reserve(folder / "logits-0.bin", size)
    assert preflight._table_bytes(config, images) == {}


def test_other_images_and_an_odd_teacher_are_reported(mine, tmp_path):
    names = pretend(mine)
    teacher, student = names[0], next(n for n in names if "-kd-" in n)
    (paths.records("mine") / f"{student}.json").unlink()
    path = paths.records("mine") / f"{next(n for n in names if n not in (teacher, student))}.json"
    path.write_text(path.read_text().replace(data.load("digits").fingerprint, "0" * 64))
    with pytest.raises(preflight.NotReady, match="its images have changed") as error:
        scheduler.reproduce(mine, notebooks=False)
    assert str(error.value).count("\n") == 1
    path.write_text(path.read_text().replace("0" * 64, data.load("digits").fingerprint))
    own = next(config for config, _ in runs_of(mine) if name_of(config) == student)
    assert name_of(own.teacher) in names
    odd = paths.records("mine") / f"{name_of(own.teacher)}.json"
    odd.write_text("{}")
    problems = preflight.needs_of([own], [], "mine")
    assert len(problems) == 1 and problems[0].startswith("teacher: ") and odd.name in problems[0]


def test_an_odd_record_fails_alone(mine):
    names = pretend(mine)
    (paths.records("mine") / f"{names[-1]}.json").write_text("{}")
    got = ldrld("reproduce", "--profile", mine, "--no-notebooks", "--only", "same_architecture")
    assert (
        got.returncode == 1
        and f"failed: {names[-1]}" in got.stdout
        and "1 done, 0 paused, 1 failed" in got.stdout
        and "Traceback" not in got.stdout
    ), got.stdout + got.stderr


# ---- finished -------------------------------------------------------------------------------------------------------


def test_one_number_for_what_is_finished(mine):
    names = pretend(mine, without=("logits",))
    for name in names[-2:]:
        (paths.records("mine") / f"{name}.json").unlink()
    n = len(names)
    assert f"{n - 2} of the {n} runs of profile `mine` are finished" in what_waits(mine)
    status = ldrld("status", "--profile", mine)
    assert f"{n - 2} of the {n} runs of the default experiments are finished, 2 are missing" in status.stdout, (
        status.stdout + status.stderr
    )
    lacks = [
        name
        for name in names[:-2]
        if not KEPT["logits"](name, "mine").exists()
        and any(name_of(c) == name and "logits" in k for c, k in runs_of(mine))
    ]
    assert lacks and all(name in status.stdout.split("completed: logits of ")[1] for name in lacks)


def test_a_fresh_clone_runs_nothing_again_for_weights_that_are_not_needed(mine):
    names = pretend(mine, without=("weights",))
    assert pending.missing(mine) == []
    student = next(n for n in names if "-kd-" in n)
    (paths.records("mine") / f"{student}.json").unlink()
    todo = pending.missing(mine)
    assert [name_of(c) for c, _ in todo] == [student, names[names.index(name_of(todo[0][0].teacher))]] and todo[1][
        1
    ] == ("weights",)
    assert pending.taken_up_again(todo, "mine").endswith(f"weights of {name_of(todo[0][0].teacher)}")
    write_whole(KEPT["weights"](name_of(todo[0][0].teacher), "mine"), "pretended")
    assert [name_of(c) for c, _ in pending.missing(mine)] == [student]


def test_the_committed_profiles_count_alike():
    for p in ("quick", "small"):
        planned, todo = runs_of(p), pending.missing(p)
        finished = sum(records.finished(config, p) for config, _ in planned)
        assert f"{finished} of the {len(planned)} runs" in what_waits(p)
        assert len([c for c, _ in todo if not records.finished(c, p)]) == len(planned) - finished
        assert pending.taken_up_again(todo, p).count("insight of") == (p == "small")


# ---- leftovers ------------------------------------------------------------------------------------------------------


def test_what_a_killed_process_left_is_swept(mine):
    names = pretend(mine)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    old = time.time() - 120
    places = [
        paths.records("mine") / f"a.json.{gone.pid}.tmp",
        paths.tables("mine") / f"t.md.{gone.pid}.tmp",
        paths.figures("mine") / f"f.md.{gone.pid}.tmp",
        paths.weights("mine") / f".w.safetensors.{gone.pid}.part",
        paths.records("mine") / "logits" / f"l.npz.{gone.pid}.tmp",
        paths.work("x") / f"weights.{gone.pid}.tmp",
        paths.work(names[0]) / "checkpoint.pt",
        paths.work(names[0]) / "checkpoint.pt.tmp",
    ]
    kept = [
        paths.records("mine") / f"b.json.{os.getpid()}.tmp",
        paths.records("mine") / "my.tmp",
        paths.records("mine") / "notes.part",
        paths.work("another") / "checkpoint.pt",
    ]
    for path in (*places, *kept):
        write_whole(path, "half")
        os.utime(path, (old, old))
    young = paths.tables("mine") / f"u.md.{gone.pid}.tmp"  # perhaps another machine's, at it now
    write_whole(young, "half")
    assert sorted(leftovers.sweep(mine)) == sorted(places)
    assert (
        all(path.exists() for path in (*kept, young))
        and not any(path.exists() for path in places)
        and (paths.records("mine") / f"{names[0]}.json").exists()
    )
    ignored = subprocess.run(
        [
            "git",
            "check-ignore",
            f"data/runs/quick/a.json.{gone.pid}.tmp",
            f"figures/quick/f.md.{gone.pid}.tmp",
            f"data/teachers/quick/.w.safetensors.{gone.pid}.part",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert len(ignored.stdout.splitlines()) == 3


def test_a_checkpoint_that_is_in_use_or_needed_stays(mine):
    names = pretend(mine)
    checkpoint = paths.work(names[0]) / "checkpoint.pt"
    write_whole(checkpoint, "half")
    with runner.lock_of(names[0]):
        busy = subprocess.run(
            [sys.executable, "-c", f"from ldrld.batch import leftovers; print(leftovers.sweep({mine!r}))"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert busy.stdout.strip() == "[]", busy.stderr
    (paths.records("mine") / f"{names[0]}.json").unlink()
    assert leftovers.sweep(mine) == [] and checkpoint.exists()


# ---- terminals, kernels, folders ------------------------------------------------------------------------------------

ASCII = {"PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (ASCII, ("status", "--profile", "small")),
        (ASCII, ("verify", "--profile", "small")),
        (ASCII, ("--help",)),
        (ASCII, ("run", "loss=kd→", "lr=α")),
        (ASCII, ("tune", "--space", "alpha=β")),
        (ASCII, ("data", "α")),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, ("status",)),
        ({"PYTHONIOENCODING": "latin-1"}, ("status",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_terminals_without_our_letters(env, words):
    got = subprocess.run(
        [sys.executable, "-c", "from ldrld.cli import main; main()", *words],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **env},
    )
    assert (
        b"Traceback" not in got.stderr
        and b"UnicodeEncodeError" not in got.stderr + got.stdout
        and got.returncode in (0, 1, 2)
    ), got.stderr
    if "latin-1" not in env.values():
        (got.stdout + got.stderr).decode("ascii")
    assert got.returncode == 0 or words[0] in ("run", "tune", "data")


def test_a_broken_user_kernelspec_does_not_matter(tmp_path, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(
        json.dumps(
            {
                "argv": ["/nowhere/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "mine",
                "language": "python",
            }
        )
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("LDRLD_ROOT", str(tmp_path))
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    (tmp_path / "nbs").mkdir()
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import sys; print(sys.executable)")]),
        tmp_path / "nbs" / "one.ipynb",
    )
    assert notebooks.execute("one.ipynb", "once", {}, "try").status == "done"
    assert sys.executable in (tmp_path / "runs/executed/try/once.ipynb").read_text()


@pytest.mark.parametrize(
    "content",
    [
        "lib_name = straße".encode("utf-16"),
        "naïve".encode("latin-1"),
        b"\xff" * 100,
        b"lib_name = ldrld-fork\n",
        b"# lib_name = ldrld is not this\n",
    ],
)
def test_a_foreign_settings_ini_is_passed_by(tmp_path, monkeypatch, content):
    (tmp_path / "settings.ini").write_bytes(content)
    (tmp_path / "below").mkdir()
    monkeypatch.delenv("LDRLD_ROOT", raising=False)
    monkeypatch.chdir(tmp_path / "below")
    assert paths.root() == ROOT
    (tmp_path / "settings.ini").unlink()
    (tmp_path / "settings.ini").mkdir()
    assert paths.root() == ROOT
    (tmp_path / "below" / "settings.ini").write_bytes(b"[DEFAULT]\r\nlib_name=ldrld\r\n")
    assert paths.root() == tmp_path / "below"


def test_another_drive_has_no_relative_path(tmp_path, monkeypatch):
    import ntpath

    assert paths.shown(Path.cwd() / "a" / "b") == os.path.join("a", "b")
    monkeypatch.setattr(os.path, "relpath", lambda path: ntpath.relpath("D:\\results\\record.json", "C:\\Users\\me"))
    assert paths.shown("D:\\results\\record.json") == "D:\\results\\record.json"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert paths.shown("/a/b") == "/a/b"
    os.chdir(tmp_path)


# ---- a last batch of one image --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "batch_size", "refused"),
    [
        ("MobileNetV2", 64, True),
        ("resnet8", 64, False),
        ("vgg8", 64, False),
        ("MobileNetV2", 63, False),
        ("MobileNetV2", 1, True),
        ("resnet8", 1, False),
    ],
)
def test_a_last_batch_of_one_image_is_reported_before_training(model, batch_size, refused):
    digits = data.load("digits")
    images = 641  # ten batches of 64, and one image
    one_left = data.ImageData(
        **{f: getattr(digits, f) for f in digits.__dataclass_fields__}
        | {"train_images": digits.train_images[:images], "train_labels": digits.train_labels[:images]}
    )
    config = RunConfig(dataset="digits", model=model, epochs=1, batch_size=batch_size)
    if not refused:
        students.start(config, one_left, "cpu")
        return
    with pytest.raises(
        ValueError, match=rf"batch_size={batch_size}: of 641 training images one is left.*would work"
    ) as error:
        students.start(config, one_left, "cpu")
    fits = int(str(error.value).split("; ")[1].split()[0])
    assert images % fits != 1
    students.start(config.model_copy(update={"batch_size": fits}), one_left, "cpu")


def test_the_check_on_one_image_changes_nothing():
    digits = data.load("digits")
    config = RunConfig(dataset="digits", model="resnet8", epochs=1, batch_size=1)
    student = students.start(config, digits, "cpu")
    torch.manual_seed(0)
    fresh = models.build("resnet8", 10)
    assert all(torch.equal(a, b) for a, b in zip(student.model.state_dict().values(), fresh.state_dict().values()))
