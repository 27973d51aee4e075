"""`ldrld distill`: layouts of folders, error messages before anything is trained, and one student from end to end."""

import importlib.util
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from commands import ldrld
from ldrld import data, models
from ldrld.batch import distillation
from ldrld.batch.distillation import PROFILE, Request, check_folder, configured, distill, results_in
from ldrld.batch.student_pages import as_markdown, write_pages
from ldrld.data.own_images import own_images
from ldrld.data.registry import LOADERS, registered
from ldrld.experiments.config import RunConfig
from ldrld.experiments.records import load_record

CLASSES = ("round|ish", "square", "wide")
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm not installed")


def draw(folder, n, seed=0):
    """n images of every class: bright rectangles of a class's shape on noise."""
    generator = np.random.default_rng(seed)
    for name, (height, width) in zip(CLASSES, ((12, 6), (10, 10), (5, 14))):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(n):
            pixels = generator.integers(0, 80, (20, 24, 3), dtype=np.uint8)
            top, left = generator.integers(0, 20 - height), generator.integers(0, 24 - width)
            pixels[top : top + height, left : left + width] += 150
            Image.fromarray(pixels).save(folder / name / f"{k:02}.{'png' if k % 2 else 'jpg'}")


@pytest.fixture
def plain(tmp_path):
    """A folder with three class folders of ten images."""
    draw(tmp_path / "shapes", 10)
    return tmp_path / "shapes"


@pytest.fixture
def split(tmp_path):
    """A folder with train/ and val/."""
    draw(tmp_path / "shapes" / "train", 6)
    draw(tmp_path / "shapes" / "val", 3, seed=1)
    return tmp_path / "shapes"


def request_for(folder, **more):
    """A small request for a folder, with results beside it."""
    given = {"teacher": "resnet14", "student": "resnet8", "size": (16, 16), "epochs": 2, "batch_size": 16, "lr": 0.1}
    return Request(folder, folder.parent / "out", **given | more)


def settings(request):
    """The runs of a request, without training."""
    own = own_images(request.data, request.size)
    with results_in(request.out), registered(own.images):
        return configured(request, own)


# ---- images ---------------------------------------------------------------------------------------------------------


def test_plain_class_folders_are_split_class_by_class_the_same_way_every_time(plain):
    own, again = own_images(plain, (16, 16)), own_images(plain, (16, 16))
    assert own.images.train_labels.bincount().tolist() == [8] * 3
    assert own.images.test_labels.bincount().tolist() == [2] * 3
    assert own.test_files == again.test_files and own.images.fingerprint == again.images.fingerprint
    assert not set(own.train_files) & set(own.test_files) and own.images.classes == CLASSES
    read = np.asarray(Image.open(plain / own.test_files[0]).convert("RGB").resize((19, 16)))
    assert own.images.test_images.shape == (6, 16, 16, 3) and read.shape == (16, 19, 3)
    assert "held out" in own.split and own_images(plain, (16, 16), holdout=0.4).images.test_labels.sum() == 12


@pytest.mark.parametrize("name", ["val", "test", "validation"])
def test_a_split_is_used_as_it_is(split, name):
    (split / "val").rename(split / name)
    own = own_images(split, (16, 16))
    assert (len(own.train_files), len(own.test_files)) == (18, 9) and own.split == f"the folder {name}/"
    assert all(file.startswith(f"{name}/") for file in own.test_files)


def test_test_is_preferred_to_val(split):
    draw(split / "test", 2, seed=2)
    assert len(own_images(split, (16, 16)).test_files) == 6


def test_unreadable_images_are_left_out_by_name(plain):
    (plain / "square" / "00.jpg").write_bytes(b"half a download")
    (plain / "wide" / "more.png").write_bytes(b"")
    (plain / "wide" / "notes.txt").write_text("not an image, and not counted")
    own = own_images(plain, (16, 16))
    assert sorted(own.unreadable) == ["square/00.jpg", "wide/more.png"]
    assert all("damaged" in why for why in own.unreadable.values())
    assert len(own.train_files) + len(own.test_files) == 29


def test_test_images_that_were_trained_on_are_counted(split):
    (split / "val" / "wide" / "copy.png").write_bytes((split / "train" / "wide" / "01.png").read_bytes())
    assert own_images(split, (16, 16)).repeated == 1


def test_a_name_of_one_s_own_is_known_only_while_the_images_are(plain):
    own = own_images(plain, (16, 16))
    with registered(own.images) as name:
        assert name == "own:shapes-16x16" and data.load(name) is own.images
    assert name not in LOADERS and RunConfig(dataset=name).dataset == name  # a record can be read anywhere
    with pytest.raises(ValueError, match="only `ldrld distill` has"):
        data.load(name)
    with pytest.raises(ValueError, match="begins with 'own:'"), registered(replace(own.images, name="digits")):
        pass


def spoil_missing(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()


def one_class(folder):
    for name in CLASSES[1:]:
        (folder / name).rename(folder.parent / f"away-{CLASSES.index(name)}")


@pytest.mark.parametrize(
    "spoil, said",
    [
        (spoil_missing, "no such folder"),
        (one_class, "one class only"),
        (lambda f: [p.unlink() for p in (f / "wide").iterdir()], "0 readable images of class 'wide'"),
        (lambda f: [p.write_bytes(b"x") for p in sorted((f / "wide").iterdir())[1:]], "1 readable images of class"),
        (lambda f: (f / "val").mkdir(), "has val/, but no train/"),
        (lambda f: (f / "train").mkdir(), "neither test/ nor val/"),
    ],
)
def test_wrong_folders_say_what_is_wrong(plain, spoil, said):
    spoil(plain)
    with pytest.raises(ValueError, match=re.escape(said)):
        own_images(plain, (16, 16))


def test_classes_that_only_one_split_has_are_named(split):
    (split / "val" / "wide").rename(split / "val" / "Wide")
    with pytest.raises(ValueError, match="val: Wide not in train/.*cannot learn a class without training images"):
        own_images(split, (16, 16))
    (split / "val" / "Wide").rename(split.parent / "away")
    with pytest.raises(ValueError, match="train: wide not in val/.*could not be measured"):
        own_images(split, (16, 16))


def test_a_folder_of_other_files_is_refused(plain):
    for path in plain.rglob("*.png"):
        path.write_bytes(b"x")
    for path in list(plain.rglob("*.jpg")):
        (path.parent / f"{path.stem}-2.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="30 files cannot be read, more than can; the first is"):
        own_images(plain, (16, 16))


# ---- settings -------------------------------------------------------------------------------------------------------


def test_what_is_trained(plain):
    student, baseline = settings(request_for(plain, teacher_epochs=5))
    assert (student.loss, student.loss_args["depth"], student.recipe) == ("ldrld", 3, "onecycle")
    assert (student.teacher.model, student.teacher.epochs, student.teacher.lr) == ("resnet14", 5, 0.05)
    assert baseline.loss == "ce" and baseline.lr == student.lr == 0.1 and baseline.teacher is None
    assert settings(request_for(plain, method="kd", loss_args={"temperature": 2.0}))[0].loss_args["temperature"] == 2


@pytest.mark.parametrize(
    "more, said",
    [
        ({"teacher": "resnet15"}, "--teacher 'resnet15': no such network; did you mean"),
        ({"teacher": "missing.pth"}, "--teacher missing.pth: no such file"),
        ({"student": "resnet9"}, "--student 'resnet9': no such network; did you mean"),
        ({"method": "ce"}, "--method ce: needs no teacher"),
        ({"method": "simkd"}, "--method simkd: deploys more than the student's network"),
        ({"method": "ldrdl"}, "Did you mean 'ldrld'"),
        ({"loss_args": {"depht": 3}}, "depht"),
        ({"size": (2, 2), "teacher": "vgg8"}, "--image-size 2x2: vgg8 cannot take such images"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(plain, more, said):
    request = request_for(plain, **more)
    with pytest.raises(ValueError, match=re.escape(said)):
        distill(request, say=lambda line: None)
    assert not request.out.exists()


def weights_of(network, classes, path):
    torch.manual_seed(0)
    return models.save_weights(models.build(network, classes), path)


def test_a_teacher_in_a_file_is_identified(plain, tmp_path):
    file = weights_of("resnet20", 3, tmp_path / "teacher.safetensors")
    student, _ = settings(request_for(plain, teacher=str(file)))
    assert student.teacher.model == "resnet20" and len(student.teacher.sha256) == 64
    with pytest.raises(ValueError, match="teacher.safetensors holds resnet20"):
        settings(request_for(plain, teacher=str(file), teacher_network="resnet32"))
    other = weights_of("resnet20", 100, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="resnet20 for 100 classes, but .*shapes has 3 .*say --teacher resnet20"):
        settings(request_for(plain, teacher=str(other)))


def test_the_accuracy_of_a_teacher_in_a_file_is_said_before_training(plain, tmp_path):
    request = request_for(plain, teacher=str(weights_of("resnet8", 3, tmp_path / "teacher.safetensors")))
    own, lines = own_images(request.data, request.size), []
    with results_in(request.out), registered(own.images):
        distillation.check_teacher(configured(request, own)[0], own, lines.append)
    accuracy = float(re.match(r"teacher: ([\d.]+) % of the test images", lines[0])[1])
    assert ("near chance" in lines[-1]) == (accuracy < 200 / 3)
    assert not list(request.out.glob("data/runs/*/*.json"))


@needs_timm
def test_a_teacher_of_timm_in_a_file(plain, tmp_path):
    """Saved by ldrld, or by timm itself, whose names lack the wrapper's."""
    name = "timm:resnet10t"
    network = models.build(name, 3)
    files = [models.save_weights(network, tmp_path / "ours.safetensors"),
             models.save_weights(network.network, tmp_path / "theirs.safetensors")]
    found = [settings(request_for(plain, teacher=str(file), teacher_network=name))[0].teacher for file in files]
    assert found[0] == found[1] and found[0].model == name
    with pytest.raises(ValueError, match="resnet10t|fit|shape"):
        settings(request_for(plain, teacher=str(weights_of("resnet8", 3, tmp_path / "w.safetensors")),
                             teacher_network=name))
    assert settings(request_for(plain, student=name))[0].recipe == "deit"


def test_nothing_of_the_user_s_is_overwritten(plain):
    request = request_for(plain)
    request.out.mkdir()
    (request.out / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="exists, and `ldrld distill` did not make it"):
        distill(request, say=lambda line: None)
    assert [path.name for path in request.out.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="lies in the folder of images"):
        distill(replace(request, out=plain / "out"), say=lambda line: None)


def test_a_table_with_bars_in_its_cells():
    assert as_markdown(pd.DataFrame({"a": ["x|y"], "b": [1]})) == "| a | b |\n|---|---|\n| x\\|y | 1 |"


# ---- end to end -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One student with teacher and baseline, from a folder with a broken file, by the command."""
    place = tmp_path_factory.mktemp("distill")
    draw(place / "shapes", 24)
    (place / "shapes" / "wide" / "broken.png").write_bytes(b"x")
    words = ["distill", "--data", "shapes", "--teacher", "resnet14", "--student", "resnet8", "--out", "out"]
    words += ["--image-size", "16", "--epochs", "3", "--batch-size", "16", "--lr", "0.1", "--no-flip"]
    got = ldrld(*words, "--baseline", cwd=place)
    assert got.returncode == 0, got.stdout + got.stderr
    return place, words, got.stdout


def test_from_a_folder_to_the_report(made, monkeypatch):
    place, _, said = made
    out = place / "out"
    assert "left out: wide/broken.png" in said and "report: out/report.md" in said
    report = (out / "report.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", report):
        assert (out / target).exists(), target
    tables = {path.stem: pd.read_csv(path) for path in (out / "report").glob("*.csv") if path.stat().st_size > 1}
    comparison = tables["comparison"].set_index("network")
    assert list(comparison.index) == ["teacher", "student", "baseline"]
    assert ((comparison["low"] <= comparison["accuracy"]) & (comparison["accuracy"] <= comparison["high"])).all()
    differ = tables["differences"]
    assert len(differ) == round((100 - comparison.loc["student", "agreement"]) / 100 * 15)
    assert (tables["images"]["split"] == "test").sum() == 15 and list(tables["left_out"]["file"]) == ["wide/broken.png"]
    mistakes = tables["confusions"]["student"].sum()
    assert mistakes == round(15 * (1 - comparison.loc["student", "accuracy"] / 100))
    assert set(tables["curves"]["epoch"]) == {1, 2, 3} and set(tables["latency"]["batch"]) == {1, 32}
    monkeypatch.setenv("LDRLD_OUT", str(out))
    names = [path.stem for path in (out / "data" / "runs" / PROFILE).glob("*.json")]
    records = [load_record(name, PROFILE) for name in names]
    assert len(records) == 3 and {r.config.dataset for r in records} == {"own:shapes-16x16"}
    assert str(place) not in "".join(r.model_dump_json() for r in records)


def test_the_card_s_lines_load_the_student(made, monkeypatch, capsys):
    """The accuracy on the card is that of the file, loaded as the card says."""
    place, _, _ = made
    out = place / "out"
    card = (out / "model_card.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    monkeypatch.chdir(out)
    tests = pd.read_csv(out / "report" / "images.csv").query("split == 'test'")["file"]
    right = 0
    for file in tests:
        exec(code.replace('"image.jpg"', repr(str(place / "shapes" / file))), {})
        right += capsys.readouterr().out.startswith(Path(file).parts[0])
    assert round(100 * right / len(tests), 2) == front["accuracy"]
    assert models.read_metadata(out / "student.safetensors")["classes"] == front["classes"] == list(CLASSES)


def test_a_second_call_trains_nothing_and_other_settings_are_refused(made):
    place, words, _ = made
    record = next((place / "out" / "data" / "runs" / PROFILE).glob("*resnet8-ldrld*.json"))
    before = record.stat().st_mtime_ns
    again = ldrld(*words, cwd=place)
    assert again.returncode == 0 and "finished before" in again.stdout and "epoch 1/3" not in again.stdout
    assert record.stat().st_mtime_ns == before
    assert "without a teacher)" not in (place / "out" / "report.md").read_text()
    other = ldrld(*words, "--epochs", "4", cwd=place)
    assert other.returncode == 2 and "epochs was 3, now 4" in " ".join(other.stderr.split())
    request = Request(place / "shapes", place / "out", "resnet14", "resnet8", epochs=3, size=(16, 16), batch_size=16,
                      lr=0.1, flip=False)
    check_folder(request)
    with open(request.out / "report.md", "a", encoding="utf-8") as page:
        page.write("A note of my own.\n")
    with pytest.raises(ValueError, match="report.md: was edited since"):
        check_folder(request)


def test_an_interrupted_training_resumes_with_the_same_result(plain, monkeypatch):
    from ldrld.experiments.runner import Paused

    torch.set_num_threads(1)
    quiet = {"say": lambda line: None}
    file = weights_of("resnet8", 3, plain.parent / "teacher.safetensors")
    request = request_for(plain, teacher=str(file), epochs=3)
    whole = distill(request, **quiet)
    monkeypatch.setenv("LDRLD_DEADLINE", "1")  # long past: paused after every epoch
    parts = replace(request, out=plain.parent / "parts")
    with pytest.raises(Paused):
        distill(parts, **quiet)
    assert list((parts.out / "runs").rglob("checkpoint.pt")) and not (parts.out / "report.md").exists()
    monkeypatch.delenv("LDRLD_DEADLINE")
    made = distill(parts, **quiet)
    assert made.records["student"].last_accuracy == whole.records["student"].last_accuracy
    torch.testing.assert_close(made.logits["student"], whole.logits["student"], rtol=0, atol=0)
    page = write_pages(made).read_text(encoding="utf-8")
    assert "The teacher is a file" in page and "was not trained; `--baseline` adds it" in page
    assert "near chance" in page and "LDRLD_OUT" not in os.environ
    remembered = json.loads((parts.out / distillation.MEMORY).read_text())
    assert "report.md" in remembered["pages"] and remembered["settings"]["epochs"] == 3
