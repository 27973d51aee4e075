"""Benchmarks on large data: every implementation makes the same images, and a training is what is measured."""

import math

import pandas as pd
import pytest
import torch
from PIL import Image

from ldrld.bench import loader, processes
from ldrld.bench.synthetic_imagenet import SIZES, synthetic_imagenet
from ldrld.core.seeds import seeded
from ldrld.data.loader import Crop, largest_crop, random_crop


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return synthetic_imagenet(tmp_path_factory.mktemp("files"), images=6, classes=3)


def test_the_files_are_as_large_as_photographs(images, tmp_path):
    sizes = []
    for name in images.train_files:
        with Image.open(images.root / name) as image:
            assert image.format == "JPEG" and image.size in {(w, h) for h, w in SIZES}
        sizes.append((images.root / name).stat().st_size)
    assert 80_000 < sum(sizes) / len(sizes) < 140_000
    again = synthetic_imagenet(tmp_path, images=6, classes=3)
    assert again.fingerprint == images.fingerprint
    assert all((again.root / n).read_bytes() == (images.root / n).read_bytes() for n in again.train_files)


def test_candidates_make_the_images_of_our_loader(images):
    ours = torch.cat(list(loader.our_batches(images, 4)))
    assert ours.shape == (6, 3, 224, 224) and ours.dtype == torch.uint8
    crops, here = loader.crops_of(images), loader.ready((images.root / images.train_files[0]).read_bytes())
    assert {"Pillow", "simplejpeg"} <= here.candidates.keys()
    for name, candidate in here.candidates.items():
        found = torch.cat(list(loader.plain_batches(images, 4, candidate, crops)))
        assert (found.int() - ours).abs().double().mean() < 1, name
        assert found.equal(ours) or name != "simplejpeg"


def test_a_candidate_that_fails_is_left_out_with_its_reason(images, monkeypatch):
    def broken():
        raise OSError("Could not load this library\nmore")

    monkeypatch.setitem(loader.CANDIDATES, "simplejpeg", broken)
    here = loader.ready((images.root / images.train_files[0]).read_bytes())
    assert "simplejpeg" not in here.candidates and here.missing["simplejpeg"] == "Could not load this library"


def test_the_loader_is_measured_beside_what_works(monkeypatch, capsys):
    monkeypatch.setattr(loader, "CANDIDATES", {"Pillow": loader.CANDIDATES["Pillow"], "none": lambda: 1 / 0})
    with pytest.raises(ZeroDivisionError):  # an error of ours is no missing library
        loader.in_turn(2, rounds=1)
    monkeypatch.setitem(loader.CANDIDATES, "none", lambda: __import__("a_library_that_is_not_there"))
    points = loader.in_turn(2, rounds=2, batch_size=2)
    assert [p.implementation for p in points] == ["ours", "Pillow"]
    assert "none is left out: No module" in capsys.readouterr().out
    assert all(len(p.values) == 2 and p.unit == "s/image" and min(p.values) > 0 for p in points)


@pytest.mark.parametrize("ours, reached", [(1.0, True), (1.11, True), (1.12, False)])
def test_the_verdict_is_on_the_best_candidate(ours, reached):
    seconds = {"ours": (ours, ours), "A": (2.0, 2.0), "B": (1.0, 1.0)}
    table = pd.DataFrame([{"implementation": k, "values": v, "median": v[0]} for k, v in seconds.items()])
    verdict = loader.compared_with_best(table)
    assert verdict.best == "B" and verdict.median == pytest.approx(1 / ours) and verdict.reached is reached


# ---- crops


@pytest.mark.parametrize("height, width", [(375, 500), (500, 375), (1, 1), (2, 900), (900, 2), (224, 224)])
def test_random_crops_lie_in_the_image(height, width):
    for i in range(200):
        crop = random_crop(height, width, seeded(0, 1, i))
        assert 0 <= crop.top <= crop.top + crop.height <= height and crop.height > 0
        assert 0 <= crop.left <= crop.left + crop.width <= width and crop.width > 0
        if min(height, width) > 200:
            assert 0.07 < crop.height * crop.width / (height * width) <= 1
            assert 0.73 < crop.width / crop.height < 1.36


def test_random_crops_reach_every_edge_and_flip_half():
    crops = [random_crop(100, 100, seeded(0, 1, i)) for i in range(2000)]
    assert min(c.top for c in crops) == min(c.left for c in crops) == 0
    assert max(c.top + c.height for c in crops) == max(c.left + c.width for c in crops) == 100
    assert abs(sum(c.flipped for c in crops) / 2000 - 0.5) < 4 * math.sqrt(0.25 / 2000)


def test_the_largest_crop_is_in_the_middle():
    assert largest_crop(100, 500) == Crop(0, 183, 100, 133) and largest_crop(500, 100) == Crop(183, 0, 133, 100)
    assert largest_crop(80, 100) == Crop(0, 0, 80, 100)


# ---- processes

WORK = processes.Work("MobileNetV1", batch_size=4, steps=1)


def test_the_same_batch_with_any_number_of_processes():
    one, two = WORK.command(1, "out"), WORK.command(2, "out")
    assert [(a, b) for a, b in zip(one, two) if a != b] == [("1", "2")] and "batch_size=4" in one
    assert WORK.images == 4 and processes.numbers_here("cpu") == [1, 2]


def test_two_processes_are_measured(images):
    found = processes.seconds_per_image(WORK, 2, str(images.root.parent))
    assert 0 < found < 60
    assert not [p for p in images.root.parent.iterdir() if p.name != "imagenet"]  # nothing is left behind


def test_a_training_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(processes.Work, "command", lambda *_: [processes.sys.executable, "-c", "raise OSError('full')"])
    with pytest.raises(RuntimeError, match="(?s)with 2 processes failed:.*OSError: full"):
        processes.seconds_per_image(WORK, 2, str(tmp_path))


def test_speed_ups_are_relative_to_one_process():
    lines = [("training", 1, (4.0, 8.0)), ("training", 2, (2.0, 5.0)), ("loader alone", 1, (0.5, 0.5))]
    table = pd.DataFrame(
        [{"implementation": k, "processes": n, "values": v, "median": sum(v) / 2} for k, n, v in lines]
    )
    found = processes.speed_ups(table).set_index("processes")
    assert found["median"].to_dict() == {1: 1.0, 2: pytest.approx((2.0 + 1.6) / 2)}
    assert found["loading"].to_dict() == {1: pytest.approx(0.5 / 6), 2: pytest.approx(0.25 / 3.5)}
