"""Large data sets: layouts, the loader, and one training in several processes."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from ldrld import LDRLD, data, losses, models
from ldrld.data.image_list import class_folders, files_by_class, image_list
from ldrld.data.imagenet import imagenet
from ldrld.data.loader import decoded, file_batches, order_of, parts_of
from ldrld.training import files
from ldrld.training.divergence import Diverged
from ldrld.training.files import FileStudent, Settings, all_tested, logits_of_part, train_on_files
from ldrld.training.processes import ALONE, Processes, share_statistics

ROOT = Path(__file__).parent.parent
WNIDS = ("n01440764", "n01443537", "n01484850")


def saved(path, k, i, size=(40, 48)):
    """A JPEG of noise whose colour tells its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(100 * k + i).integers(0, 120, (*size, 3)) + 100 * np.eye(3)[k]
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, "JPEG")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """33 training images and 10 test images of different sizes, one of each split cut off."""
    root = tmp_path_factory.mktemp("images") / "imagenet"
    for k, wnid in enumerate(WNIDS):
        for i in range(11):
            saved(root / "train" / wnid / f"{wnid}_{i}.JPEG", k, i, (36 + i, 60 - 2 * i))
        for i in range(3 + (k == 0)):
            saved(root / "val" / wnid / f"{i}.JPEG", k, 50 + i)
    damaged = root / "train" / WNIDS[1] / f"{WNIDS[1]}_4.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:300])
    damaged = root / "val" / WNIDS[2] / "1.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:300])
    return root


def small(root):
    """The list of a folder's images, seen at 32 pixels."""
    classes = class_folders(root / "train")
    splits = [files_by_class(root, split, classes) for split in ("train", "val")]
    return image_list("small", root, *splits, classes, side=32, shorter=36)


# ---- layouts


def as_official(folder, top, kind):
    """The same images with a flat val/, and what says their classes."""
    images = top / "ILSVRC" / "Data" / "CLS-LOC" if kind == "xml" else top / "imagenet"
    shutil.copytree(folder / "train", images / "train")
    (images / "val").mkdir()
    rows = ["ImageId,PredictionString"]
    for n, path in enumerate(sorted((folder / "val").glob("*/*"))):
        stem = f"ILSVRC2012_val_{n:08}"
        shutil.copy(path, images / "val" / f"{stem}.JPEG")
        rows.append(f"{stem},{path.parent.name} 1 2 3 4 {path.parent.name} 5 6 7 8")
        if kind == "xml":
            xml = top / "ILSVRC" / "Annotations" / "CLS-LOC" / "val" / f"{stem}.xml"
            xml.parent.mkdir(parents=True, exist_ok=True)
            xml.write_text(f"<annotation><object>\n<name>{path.parent.name}</name></object></annotation>")
    if kind == "csv":
        (images / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    return top


@pytest.mark.parametrize("kind", ["csv", "xml"])
def test_official_validation_images(folder, tmp_path, kind):
    found, sorted_by_hand = imagenet(as_official(folder, tmp_path, kind)), imagenet(folder.parent)
    assert found.classes == sorted_by_hand.classes == WNIDS
    assert found.test_labels.tolist() == sorted_by_hand.test_labels.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    assert found.train_files == sorted_by_hand.train_files and found.fingerprint != sorted_by_hand.fingerprint


def test_imagenet_is_loaded_by_name(folder):
    assert data.load_list("imagenet", folder.parent).name == "imagenet"
    with pytest.raises(ValueError, match="'imagenet' stays in files; .*load_list"):
        data.load("imagenet")
    with pytest.raises(ValueError, match="'cifar100'.*expected 'imagenet'"):
        data.load_list("cifar100")


def test_what_is_missing_is_said(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="(?s)ImageNet-1K is not in .*LOC_val_solution.csv"):
        imagenet(tmp_path)
    top = as_official(folder, tmp_path, "csv")
    listed = top / "imagenet" / "LOC_val_solution.csv"
    listed.write_text("\n".join(listed.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match="ILSVRC2012_val_00000009.JPEG: its class is in no list"):
        imagenet(top)
    for file in (top / "imagenet" / "train" / WNIDS[2]).iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=f"{WNIDS[2]}: no images"):
        imagenet(top)


# ---- loader


@pytest.mark.parametrize(
    "mode, form", [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("RGBA", "WEBP")]
)
def test_every_kind_of_file_is_decoded(mode, form):
    """As Pillow does, up to the rounding of two JPEG decoders."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    stored = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stored, form)
    expected = np.asarray(Image.open(io.BytesIO(stored.getvalue())).convert("RGB"))
    found = decoded(stored.getvalue()).permute(1, 2, 0).numpy()
    assert found.dtype == np.uint8 and np.abs(found.astype(int) - expected).max() <= 2


def test_crops_depend_on_seed_epoch_and_image_alone(folder):
    images = small(folder)
    state = torch.get_rng_state()
    whole = next(file_batches(images, True, [torch.arange(33)], seed=3, epoch=2))
    assert torch.get_rng_state().equal(state)  # the loader leaves the global generator alone
    parts = file_batches(images, True, [torch.tensor([30, 2]), torch.tensor([7])], seed=3, epoch=2, workers=2)
    at = {int(p): image for b in parts for p, image in zip(b.positions, b.images)}
    for p, image in at.items():
        assert whole.images[whole.positions.tolist().index(p)].equal(image)
    for other in ({"seed": 4, "epoch": 2}, {"seed": 3, "epoch": 3}):
        assert not next(file_batches(images, True, [torch.arange(33)], **other)).images.equal(whole.images)


def test_a_damaged_file_is_left_out_and_named(folder):
    (batch,) = file_batches(small(folder), True, [torch.arange(33)])
    assert len(batch.positions) == len(batch.images) == 32 and 16 not in batch.positions
    assert list(batch.problems) == [f"train/{WNIDS[1]}/{WNIDS[1]}_4.JPEG"] and all(batch.problems.values())


def test_an_error_of_ours_is_no_damaged_file(folder, monkeypatch):
    monkeypatch.setattr("ldrld.data.loader.FileCrops.train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(file_batches(small(folder), True, [torch.arange(3)]))


@pytest.mark.parametrize("processes, accumulate", [(1, 1), (2, 1), (3, 1), (1, 3), (2, 2)])
def test_every_image_is_seen_once(processes, accumulate):
    order = order_of(33, seed=0, epoch=4)
    parts = [parts_of(order, 12, rank, processes, accumulate) for rank in range(processes)]
    for k, step in enumerate(order.split(12)):
        assert sorted(i for part in parts for micro in part[k] for i in micro.tolist()) == sorted(step.tolist())
    assert len(parts[0]) == 3
    late = parts_of(order, 12, 0, processes, accumulate, start=2)
    assert len(late) == 1 and all(a.equal(b) for a, b in zip(late[0], parts[0][2]))


@pytest.mark.parametrize(
    "arguments, told",
    [
        ((12, 0, 4, 4), "at least one image for each of the 16 micro-batches"),
        ((31, 0, 3), "last step of an epoch has 2 of 33 images, expected at least 3"),
    ],
)
def test_steps_that_would_leave_a_process_without_images(arguments, told):
    with pytest.raises(ValueError, match=told):
        parts_of(order_of(33, 0, 1), *arguments)


# ---- training


def student_for(root, processes=ALONE, loss=None, dtype=torch.float64):
    """A student and a teacher with shared statistics, the same in every process."""
    torch.manual_seed(0)
    student, teacher = models.build("resnet8", 3).to(dtype), models.build("resnet14", 3).to(dtype)
    student = share_statistics(student, processes)
    loss = loss or LDRLD(depth=3, beta=0.0)
    return FileStudent(student, loss, small(root), teacher, processes, lr=0.05)


def summary(student, rows):
    """What must not depend on the processes."""
    tested = all_tested(student, logits_of_part(student, 4, 0, with_teacher=True))
    return {
        "rows": [{k: v for k, v in row.items() if k not in ("seconds", "pulls")} for row in rows],
        "weights": {k: v.clone() for k, v in student.model.state_dict().items()},
        "tested": tuple(tested),
        "damaged": sorted(student.problems.items()),
    }


EPOCHS = Settings(epochs=2, batch_size=12, save_every=1)


class Killed(Exception):
    """Stands for a process that is killed."""


def run_until(student, settings, checkpoint, steps):
    """Train, and stop before a step."""
    taken, whole = [], files.take_step

    def counted(*given):
        if len(taken) == steps:
            raise Killed
        taken.append(whole(*given))

    files.take_step = counted
    try:
        for _ in train_on_files(student, settings, checkpoint):
            pass
    except Killed:
        pass
    finally:
        files.take_step = whole


def work(rank, world, root, out):
    """What each of several processes does: whole trainings, one that stops, one that another number has begun."""
    dist.init_process_group("gloo", init_method=f"file://{out}/meet{world}", rank=rank, world_size=world)
    who, found = Processes(rank, world), {}
    for name, accumulate in (("plain", 1), ("accumulated", 2)):
        if (world, accumulate) == (3, 2):
            continue  # leaves a micro-batch of the last step with one image
        student = student_for(root, who)
        rows = list(train_on_files(student, EPOCHS._replace(accumulate=accumulate)))
        found[name] = summary(student, rows)
    if world == 2:
        run_until(student_for(root, who), EPOCHS, f"{out}/checkpoint", 4)
    if world == 3:
        student = student_for(root, who)
        found["resumed"] = summary(student, list(train_on_files(student, EPOCHS, f"{out}/checkpoint")))
    student = student_for(root, who, dtype=torch.float32)
    found["float32"] = summary(student, list(train_on_files(student, EPOCHS._replace(epochs=1))))
    torch.save(found, f"{out}/{world}-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    """What two processes found, then three."""
    out = tmp_path_factory.mktemp("processes")
    for world in (2, 3):
        mp.start_processes(work, (world, folder, str(out)), nprocs=world, start_method="spawn")
    load = lambda name: torch.load(out / name, weights_only=False)
    return {world: [load(f"{world}-{rank}") for rank in range(world)] for world in (2, 3)}


@pytest.fixture(scope="module")
def alone(folder):
    """What one process finds."""
    student = student_for(folder)
    return summary(student, list(train_on_files(student, EPOCHS)))


def assert_same(found, expected, rtol=1e-9, atol=1e-10):
    for row, wanted in zip(found["rows"], expected["rows"], strict=True):
        assert row["test_accuracy"] == wanted["test_accuracy"] and row["train_accuracy"] == wanted["train_accuracy"]
        assert row["lr"] == wanted["lr"] and row["terms"] == pytest.approx(wanted["terms"], rel=rtol)
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=rtol, atol=atol)
    assert found["tested"][0].equal(expected["tested"][0])
    for ours, wanted in zip(found["tested"][1:], expected["tested"][1:]):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)  # logits are kept in float32


@pytest.mark.parametrize("world, name", [(2, "plain"), (3, "plain"), (3, "resumed")])
def test_the_result_does_not_depend_on_the_processes(found, alone, world, name):
    """Of 33 images in steps of 12, 12 and 9, one damaged; resumed in the middle of an epoch, with one process more."""
    for of_process in found[world]:
        assert_same(of_process[name], alone)
        assert of_process[name]["damaged"] == alone["damaged"] and len(alone["damaged"]) == 2


def test_micro_batches_add_up(folder):
    """Without batch norm, whose statistics are those of a micro-batch."""
    results = []
    for accumulate in (1, 2, 4):
        student = student_for(folder)
        norms = [module for module in student.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.forward = lambda x: x
        results.append(summary(student, list(train_on_files(student, EPOCHS._replace(accumulate=accumulate)))))
    for result in results[1:]:
        assert_same(result, results[0])


def test_two_processes_with_micro_batches_agree(found):
    first, second = (of_process["accumulated"] for of_process in found[2])
    assert_same(second, first, rtol=0.0, atol=0.0)


def test_float32_agrees_to_its_rounding(folder, found):
    student = student_for(folder, dtype=torch.float32)
    rows = list(train_on_files(student, EPOCHS._replace(epochs=1)))
    weights = torch.cat([p.detach().flatten() for p in student.model.parameters()])
    names = [name for name, _ in student.model.named_parameters()]
    for world in (2, 3):
        found_here = found[world][0]["float32"]
        for row, wanted in zip(found_here["rows"], rows):
            assert row["terms"] == pytest.approx(wanted["terms"], rel=1e-4)
        theirs = torch.cat([found_here["weights"][name].flatten() for name in names])
        assert (theirs - weights).norm() < 1e-3 * weights.norm()


def test_it_resumes_under_the_same_settings_only(folder, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    run_until(student_for(folder), EPOCHS, checkpoint, 4)
    with pytest.raises(ValueError, match="batch_size=11 .was 12"):
        next(train_on_files(student_for(folder), EPOCHS._replace(batch_size=11), checkpoint))
    with pytest.raises(ValueError, match="was started with"):
        next(train_on_files(student_for(folder), EPOCHS, checkpoint, {"fingerprint": "another"}))


def test_a_diverging_training_stops(folder):
    student = student_for(folder)
    student.optimizer.param_groups[0]["lr"] = 1e9
    with pytest.raises(Diverged, match="epoch 1"):
        list(train_on_files(student, EPOCHS))


@pytest.mark.parametrize("name", ["dist", "fitnet", "ctkd", "mlkd"])
def test_losses_that_do_not_add_up_are_refused(folder, name):
    with pytest.raises(ValueError, match="loss must be"):
        student_for(folder, loss=losses.build(name))


def test_a_step_without_a_readable_image(folder, tmp_path):
    root = Path(shutil.copytree(folder, tmp_path / "imagenet"))
    for file in (root / "train").glob("*/*"):
        file.write_bytes(b"nothing")
    student = student_for(root)
    with pytest.raises(ValueError, match="step 1 of epoch 1: none of the images of a micro-batch can be read"):
        list(train_on_files(student, EPOCHS))


# ---- runs

OWN = """
data: a small ImageNet
dataset: imagenet
pairs: [[ResNet18-ImageNet, MobileNetV1]]
weights: {ResNet18-ImageNet: "%s"}
teacher: {recipe: imagenet, epochs: 1}
student: {recipe: imagenet, epochs: 2, batch_size: 11, lr: 0.01, weight_decay: 1.0e-4}
methods: [KD, DKD]
seeds: [0]
"""
SETTINGS = (
    "dataset=imagenet model=MobileNetV1 loss=kd teacher=MobileNetV1 recipe=imagenet epochs=1 batch_size=11 lr=0.01"
).split()


def called(*words, folder, out, **more):
    """A command of ours, or `torchrun` with one."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LDRLD_DATA": str(folder.parent), "LDRLD_WORKERS": "0", **more}
    words = [sys.executable, "-m", *words, "--out", str(out)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env)


def test_a_run_by_torchrun(folder, tmp_path):
    """It trains its teacher first; its record says how many processes made it; the accuracies are those of one."""
    shared, accuracies = {"LDRLD_SHARED_STATISTICS": "1"}, []
    for n, command in ((1, ["ldrld"]), (2, ["torch.distributed.run", "--nproc-per-node", "2", "-m", "ldrld"])):
        done = called(*command, "run", *SETTINGS, folder=folder, out=tmp_path / str(n), **shared)
        assert done.returncode == 0, done.stdout + done.stderr
        (record,) = (tmp_path / str(n) / "data" / "runs" / "try").glob("*-kd-*.json")
        found = json.loads(record.read_text())
        assert found["machine"]["processes"] == n and found["measures"]["damaged_files"] == 2
        assert done.stdout.count("epoch 1/1") == 2 and done.stdout.count("record: ") == 1 and "_4.JPEG: " in done.stdout
        accuracies.append([row["test_accuracy"] for row in found["history"]])
    assert accuracies[0] == accuracies[1]


def test_a_profile_with_a_teacher_from_a_file(folder, tmp_path):
    """Named by the first digits of its SHA-256; missing at first, which is said before anything is trained."""
    weights, out, profile = tmp_path / "resnet18.pth", tmp_path / "out", tmp_path / "own.yaml"
    torch.save(models.build("ResNet18-ImageNet", 3).state_dict(), weights)
    profile.write_text(OWN % hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    words = ["ldrld", "reproduce", "--profile", str(profile), "--only", "different_architecture", "--jobs", "1"]
    missing = called(*words, folder=folder, out=out)
    assert missing.returncode == 1 and "add the checkpoint: ldrld teachers FILE --keep" in missing.stderr
    added = called("ldrld", "teachers", str(weights), "--keep", "--data", "imagenet", folder=folder, out=out)
    assert added.returncode == 0 and "stay in files" in added.stdout, added.stdout + added.stderr
    done = called(*words, folder=folder, out=out)
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(out / "data" / "tables" / "own" / "different_architecture.csv").set_index("method")
    assert list(table["n"]) == [1, 1] and list(table.index) == ["KD", "DKD"]
    checked = called("ldrld", "verify", "--profile", str(profile), folder=folder, out=out)
    assert checked.returncode == 0, checked.stdout + checked.stderr
