"""Data sets: what training relies on, and what happens to files that are missing, damaged, hostile or contested."""

import hashlib
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import urllib.error
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldrld.core.paths import data_root
from ldrld.data import (
    CLASSES,
    LISTS,
    LOADERS,
    ImageData,
    cifar100,
    fingerprint,
    folder,
    image_data,
    load,
    some_of,
    tiny_imagenet,
    with_groups,
)
from ldrld.data.glyphs import CHARACTERS, Recipe, glyphs, make
from ldrld.experiments.config import RunConfig
from ldrld.experiments.records import records
from ldrld.experiments.runner import run
from ldrld.results.arrays import superclasses

FEW = Recipe(train=200, test=100)


def check_contract(data: ImageData):
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[-1] == 3 and images.is_contiguous()
        assert labels.dtype == torch.int64 and labels.shape == images.shape[:1]
        assert set(labels.tolist()) == set(range(len(data.classes)))
    assert data.train_images.shape[1:] == data.test_images.shape[1:]
    assert isinstance(data.classes, tuple) and isinstance(data.superclasses, tuple)
    assert data.superclass_of.dtype == torch.int64 and data.superclass_of.shape == (len(data.classes),)
    assert set(data.superclass_of.tolist()) == set(range(len(data.superclasses)))
    assert len(data.mean) == len(data.std) == 3 and all(0 < x < 1 for x in (*data.mean, *data.std))
    assert data.padding >= 0 and isinstance(data.flip, bool)
    assert data.fingerprint == fingerprint(data.train_images, data.train_labels, data.test_images, data.test_labels)


def python(code: str, **environment) -> str:
    environment = {**os.environ, **environment}
    return subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip()


def test_digits():
    data = load("digits")
    check_contract(data)
    assert (data.name, data.padding, data.flip) == ("digits", 2, False)
    assert len(data.train_images) + len(data.test_images) == 1797


def test_glyphs(tmp_path):
    data = load("glyphs", root=tmp_path)
    check_contract(data)
    assert len(data.classes) == 100 and data.superclass_of.bincount().tolist() == [5] * 20 and not data.flip
    assert len(data.test_images) >= 2000
    for labels in (data.train_labels, data.test_labels):
        assert len(set(labels.bincount().tolist())) == 1
    images = torch.cat([data.train_images, data.test_images]).flatten(1)
    assert len(torch.unique(images, dim=0)) == len(images)


@pytest.mark.parametrize("classes", [10, 20, 50, 200])
def test_glyphs_with_other_numbers_of_classes(tmp_path, classes):
    data, hundred = load(f"glyphs-{classes}", root=tmp_path), load("glyphs", root=tmp_path)
    check_contract(data)
    assert (
        data.name == f"glyphs-{classes}"
        and len(data.classes) == classes
        and data.superclass_of.bincount().tolist() == [5] * (classes // 5)
    )
    assert data.train_images.shape == hundred.train_images.shape and data.test_images.shape == hundred.test_images.shape
    for labels in (data.train_labels, data.test_labels):
        assert len(set(labels.bincount().tolist())) == 1
    assert set(data.classes) < set(CHARACTERS) if classes < 100 else set(data.classes) > set(CHARACTERS)


def test_more_classes_leave_the_hundred_as_they_were():
    """Every record of `glyphs` was made with these bytes."""
    assert {r.data["fingerprint"] for r in records("quick") if r.config.dataset == "glyphs"} == {
        load("glyphs").fingerprint
    }
    with pytest.raises(ValueError, match="classes=30: expected 10, 20, 50, 100 or 200"):
        make(Recipe(classes=30), "train")
    with pytest.raises(ValueError, match="recipe.test is 100; expected a multiple of 200"):
        make(Recipe(classes=200, test=100), "test")


def test_the_number_of_classes_is_known_without_the_images():
    assert CLASSES.keys() == LOADERS.keys() | LISTS.keys()
    assert all(
        len(load(name).classes) == CLASSES[name]
        for name in ("digits", "glyphs", "glyphs-10", "glyphs-20", "glyphs-50", "glyphs-200")
    )


def test_importing_the_module_is_light():
    heavy = {"sklearn", "matplotlib", "torchvision", "PIL"}
    assert python(f"import sys, ldrld.data; print({heavy} & set(sys.modules))") == "set()"


def test_glyphs_do_not_depend_on_the_process():
    code = (
        "import hashlib; from ldrld.data.glyphs import Recipe, make\n"
        "print(hashlib.sha256(make(Recipe(train=200, test=100), 'train')[0].tobytes()).hexdigest())"
    )
    here = hashlib.sha256(make(FEW, "train")[0].tobytes()).hexdigest()
    assert python(code, PYTHONHASHSEED="1") == python(code, PYTHONHASHSEED="2", OMP_NUM_THREADS="2") == here


def test_glyphs_follow_their_recipe():
    assert Recipe(seed=1).key() != Recipe().key() == Recipe(seed=0).key()
    assert not np.array_equal(make(Recipe(train=200, seed=1), "train")[0], make(FEW, "train")[0])
    assert make(Recipe(size=24, test=100), "test")[0].shape == (100, 24, 24, 3)
    with pytest.raises(ValueError, match="recipe.train is 150"):
        make(Recipe(train=150), "train")


def test_glyphs_are_read_back_without_being_drawn(tmp_path, monkeypatch):
    made = glyphs(tmp_path, FEW)
    monkeypatch.setattr("ldrld.data.glyphs.make", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert glyphs(tmp_path, FEW).fingerprint == made.fingerprint


class Opened:
    def __reduce__(self):
        return (pytest.fail, ("a pickle in the cache was opened",))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


def empty(path):
    path.write_bytes(b"")


def replace(path):
    path.write_bytes(b"not an archive")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[9000] ^= 4
    path.write_bytes(content)


def leave_out_an_array(path):
    np.savez(path, train_images=np.zeros(3))


def change_a_label(path):
    with np.load(path) as file:
        arrays = dict(file)
    arrays["train_labels"][0] += 1
    np.savez(path, **arrays)


def hide_a_pickle(path):
    np.savez(path, train_images=np.array([Opened()], dtype=object))


DAMAGES = [truncate, empty, replace, flip_a_bit, leave_out_an_array, change_a_label, hide_a_pickle]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_glyphs_are_made_again(tmp_path, damage):
    made = glyphs(tmp_path, FEW)
    (path,) = (tmp_path / "glyphs").iterdir()
    damage(path)
    with pytest.warns(UserWarning, match="is damaged .* generating it again"):
        again = glyphs(tmp_path, FEW)
    assert again.fingerprint == made.fingerprint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        glyphs(tmp_path, FEW)


def test_glyphs_without_a_place_to_keep_them(tmp_path):
    (tmp_path / "glyphs").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written"):
        data = glyphs(tmp_path, FEW)
    check_contract(data)


def test_processes_that_start_together_agree(tmp_path):
    code = f"from ldrld.data.glyphs import *; print(glyphs({str(tmp_path)!r}, Recipe(train=200, test=100)).fingerprint)"
    together = [subprocess.Popen([sys.executable, "-W", "error", "-c", code], stdout=subprocess.PIPE) for _ in range(4)]
    printed = {process.communicate()[0] for process in together}
    assert [process.returncode for process in together] == [0] * 4 and len(printed) == 1
    assert [path.suffix for path in (tmp_path / "glyphs").iterdir()] == [".npz"]  # nothing half-written left behind
    assert glyphs(tmp_path, FEW).fingerprint == printed.pop().decode().strip()


@pytest.fixture
def tiny_cifar(tmp_path):
    "Files in CIFAR-100's layout, 2 training and 1 test image a class, and a torchvision class that knows their MD5."
    from ldrld.core.torchvision import torchvision

    rng, folder = np.random.default_rng(0), tmp_path / "cifar-100-python"
    folder.mkdir()
    coarse = rng.permutation(np.arange(100) % 20)
    md5 = {}
    for split, repeats in (("train", 2), ("test", 1)):
        fine = rng.permutation(np.tile(np.arange(100), repeats))
        entry = {
            "data": rng.integers(256, size=(len(fine), 3072), dtype=np.uint8),
            "fine_labels": fine.tolist(),
            "coarse_labels": coarse[fine].tolist(),
            "filenames": ["x.png"] * len(fine),
            "batch_label": split,
        }
        (folder / split).write_bytes(pickle.dumps(entry, protocol=2))
    names = {
        "fine_label_names": [f"fine {i}" for i in range(100)],
        "coarse_label_names": [f"coarse {i}" for i in range(20)],
    }
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    for path in folder.iterdir():
        md5[path.name] = hashlib.md5(path.read_bytes()).hexdigest()

    class TinyCIFAR100(torchvision.datasets.CIFAR100):
        train_list, test_list = [["train", md5["train"]]], [["test", md5["test"]]]
        meta = {"filename": "meta", "key": "fine_label_names", "md5": md5["meta"]}

    return tmp_path, TinyCIFAR100, coarse


def test_cifar_layout(tiny_cifar):
    root, source, coarse = tiny_cifar
    data = cifar100(root, source=source)
    check_contract(data)
    assert len(data.train_images) == 200 and len(data.test_images) == 100 and (data.padding, data.flip) == (4, True)
    assert data.classes[7] == "fine 7" and data.superclasses[3] == "coarse 3"
    assert data.superclass_of.tolist() == coarse.tolist()
    theirs = source(root, train=True)  # torchvision's own reading of the same files
    assert np.array_equal(theirs.data, data.train_images.numpy()) and theirs.targets == data.train_labels.tolist()
    assert cifar100(root, download=True, source=source).fingerprint == data.fingerprint  # nothing to fetch


def test_ten_classes_of_cifar(tiny_cifar):
    root, source, coarse = tiny_cifar
    assert set(some_of(20)) < set(some_of(20, 4)) < set(some_of(20, 10))
    whole, groups = cifar100(root, source=source), some_of(20)
    ten = with_groups(whole, groups, "cifar100-10")
    check_contract(ten)
    assert len(ten.classes) == 10 and ten.superclasses == tuple(whole.superclasses[g] for g in groups)
    assert ten.classes == tuple(f"fine {c}" for c in range(100) if coarse[c] in groups)
    assert (len(ten.train_images), len(ten.test_images)) == (20, 10) and (ten.mean, ten.std, ten.padding, ten.flip) == (
        whole.mean,
        whole.std,
        4,
        True,
    )
    of = {
        image.numpy().tobytes(): whole.classes[label]
        for image, label in zip(whole.train_images, whole.train_labels.tolist())
    }
    assert all(
        of[image.numpy().tobytes()] == ten.classes[label]
        for image, label in zip(ten.train_images, ten.train_labels.tolist())
    )


def test_missing_cifar_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load("cifar100", root=tmp_path)
    for way in ("ldrld data cifar100", "download=True", "cifar-100-python"):
        assert way in str(caught.value)


def test_failed_download_says_how_else_to_get_it(tmp_path, tiny_cifar):
    class Offline(tiny_cifar[1]):
        def download(self):
            raise urllib.error.URLError("Name or service not known")

    with pytest.raises(FileNotFoundError, match="(?s)Name or service not known.*Three ways"):
        cifar100(tmp_path / "elsewhere", download=True, source=Offline)


def test_damaged_or_hostile_cifar_is_never_unpickled(tiny_cifar):
    root, source, _ = tiny_cifar
    (root / "cifar-100-python" / "test").write_bytes(pickle.dumps(Opened()))
    with pytest.raises(ValueError, match="cifar-100-python.test: MD5 .* expected .* download"):
        cifar100(root, source=source)


@pytest.fixture
def images(tmp_path):
    for split in ("train", "test"):
        for name, shade in (("dark", 10), ("light", 200)):
            place = tmp_path / "own" / split / name / "images"
            place.mkdir(parents=True)
            for i, mode in enumerate(("RGB", "L", "RGBA")):
                Image.new("L", (24, 16), shade + i).convert(mode).save(place / f"{i}.png")
    return tmp_path / "own"


def test_folder(images):
    data = load(str(images))
    check_contract(data)
    assert data.name == "own" and data.classes == ("dark", "light") and data.train_images.shape == (6, 16, 24, 3)
    assert data.train_images[:, 0, 0, 0].tolist() == [10, 11, 12, 200, 201, 202]
    assert load("own", root=images.parent).fingerprint == data.fingerprint


def test_folder_that_does_not_fit(images):
    Image.new("RGB", (8, 8)).save(images / "test" / "light" / "odd.png")
    with pytest.raises(
        ValueError,
        match="odd.png is 8×8 pixels, the first image 24×16; all must have one size: give one, .*size=32.*@32",
    ):
        folder(images)
    (images / "test" / "light").rename(images / "test" / "bright")
    with pytest.raises(ValueError, match="the same subfolders.*'bright', 'light'"):
        folder(images)


def test_folder_with_two_sizes(images):
    for path in (images / "test").rglob("*.png"):
        Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(
        ValueError, match="test images are 8×8.* training images 24×16; all must have one size: give one"
    ):
        folder(images)


def test_folder_with_an_empty_class(images):
    for path in (images / "test" / "light").rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="test.light: no images"):
        folder(images)


def test_folder_with_a_broken_image(images):
    path = images / "train" / "dark" / "images" / "0.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"0.png \(40 bytes\) cannot be read as an image: damaged"):
        folder(images)


# ---- folders as they are: what systems leave behind, files that are no images, links --------------------------------


def test_what_systems_leave_behind_is_passed_over(images):
    before = folder(images).fingerprint
    for name in (
        "train/dark/.ipynb_checkpoints/0-checkpoint.png",
        "train/.ipynb_checkpoints/1.png",
        "test/.hidden/0.png",
        "test/light/._0.png",
        "train/__MACOSX/dark/._0.png",
        "train/light/__MACOSX/0.png",
        "train/dark/Thumbs.db",
        "test/thumbs.db",
        "train/.DS_Store",
        "train/light/.DS_Store",
        "train/light/images/desktop.ini",
        "train/dark/@eaDir/0.png",
        "train/dark/__pycache__/0.png",
        "train/labels.csv",
        "test/dark/boxes.txt",
        "train/README",
    ):
        (place := images / name).parent.mkdir(parents=True, exist_ok=True)
        if place.name.endswith("0.png") and not place.name.startswith("._"):
            Image.new("RGB", (24, 16)).save(place)
        else:
            place.write_bytes(b"none of ours")
    data = folder(images)
    assert data.fingerprint == before and data.classes == ("dark", "light")


@pytest.mark.parametrize("name", ["notes.pdf", "0.heic", "0.npy", "0", "movie.mp4", "images.zip", "0.svg", "0.PNG"])
def test_a_file_that_might_be_an_image_is_never_dropped_without_a_word(name, images):
    (images / "train" / "light" / name).write_bytes(b"no image at all")
    with pytest.raises(ValueError, match=f"light/{name} .* cannot be read as an image"):
        folder(images)


def test_images_next_to_the_folders_of_the_classes_are_named(images):
    Image.new("RGB", (24, 16)).save(images / "train" / "stray.png")
    with pytest.raises(ValueError, match="train/stray.png is next to the class folders; move it"):
        folder(images)


@pytest.mark.parametrize(
    "suffix, format",
    [
        ("png", "PNG"),
        ("PNG", "PNG"),
        ("gif", "GIF"),
        ("tif", "TIFF"),
        ("tiff", "TIFF"),
        ("TIF", "TIFF"),
        ("ppm", "PPM"),
        ("pgm", "PPM"),
        ("pbm", "PPM"),
        ("pnm", "PPM"),
        ("bmp", "BMP"),
        ("dib", "DIB"),
        ("webp", "WEBP"),
        ("", "PNG"),
        ("dat", "GIF"),
        ("jpg", "PNG"),
    ],
)
def test_images_are_recognised_by_their_content(suffix, format, images):
    """Beside png, where they were dropped, or alone, where there were none."""
    before, more = folder(images), {"lossless": True} if format == "WEBP" else {}
    mode = {"pgm": "L", "pbm": "1"}.get(suffix, "RGB")
    Image.new(mode, (24, 16), 255 if mode != "RGB" else (255, 255, 255)).save(
        images / "test" / "light" / f"last.{suffix}".rstrip("."), format=format, **more
    )
    after = folder(images)
    assert (
        len(after.test_images) == len(before.test_images) + 1
        and (after.test_images[-1] == 255).all()
        and after.test_labels[-1] == 1
    )


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPEG", "jpg"])
def test_jpeg_has_many_suffixes(suffix, images):
    Image.new("RGB", (24, 16), (200, 200, 200)).save(
        images / "test" / "light" / f"last.{suffix}", format="JPEG", quality=100
    )
    assert (folder(images).test_images[-1] == 200).all()


def test_links_are_followed_but_not_in_circles(images, tmp_path):
    (images / "train" / "dark").rename(tmp_path / "elsewhere")
    (images / "train" / "dark").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "more").mkdir()
    Image.new("RGB", (24, 16), (7, 7, 7)).save(tmp_path / "more" / "0.png")
    (tmp_path / "elsewhere" / "more").symlink_to(tmp_path / "more")
    assert folder(images).train_images[:, 0, 0, 0].tolist() == [10, 11, 12, 7, 200, 201, 202]
    (tmp_path / "more" / "back").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="more/back: a link to one of its parent folders"):
        folder(images)
    (tmp_path / "more" / "back").unlink()
    (tmp_path / "more" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="more/gone.png cannot be read as an image.*No such file"):
        folder(images)


def test_one_class_fails_early(images):
    for split in ("train", "test"):
        shutil.rmtree(images / split / "light")
    (images / "train" / "dark" / "images" / "0.png").write_bytes(b"never looked at")
    with pytest.raises(ValueError, match="train: one class only, 'dark'; expected two or more subfolders"):
        folder(images)
    for split in ("train", "test"):
        shutil.rmtree(images / split / "dark")
    with pytest.raises(ValueError, match="train: no classes"):
        folder(images)
    one = np.zeros((2, 4, 4, 3), np.uint8), [0, 0]
    with pytest.raises(ValueError, match="mine: one class only, 'a'; a classifier needs two or more"):
        image_data("mine", one, one, classes=("a",))


def test_a_split_that_is_missing_is_named(images):
    (images / "test").rename(images / "val")
    for call in (lambda: folder(images), lambda: load(str(images)), lambda: load("own", root=images.parent)):
        with pytest.raises(ValueError, match="own: no test in it; expected train/<class>/ and test/<class>/"):
            call()


def test_names_of_classes_in_two_spellings(images):
    """macOS stores é as e and an accent, Linux as it is typed: a split copied from each fits."""
    (images / "train" / "light").rename(images / "train" / "caf\u00e9")
    (images / "test" / "light").rename(images / "test" / "cafe\u0301")
    assert folder(images).classes == ("caf\u00e9", "dark")
    (images / "train" / "cafe\u0301").mkdir()
    with pytest.raises(ValueError, match="two subfolders have names that look the same"):
        folder(images)


def test_a_folder_named_like_a_built_in_set_is_not_shadowed(images, monkeypatch):
    images.rename(images.parent / "digits")
    monkeypatch.chdir(images.parent)
    with pytest.raises(
        ValueError, match="'digits' is a built-in data set and also a folder; for the folder say './digits'"
    ):
        load("digits")
    assert load("./digits").classes == ("dark", "light") and RunConfig(dataset="./digits").dataset == str(
        images.parent / "digits"
    )
    monkeypatch.chdir("/")
    assert load("digits").name == "digits" and len(load("digits").classes) == 10
    with pytest.raises(ValueError, match=f"for the folder say '{images.parent}/digits'"):
        load("digits", root=images.parent)


def test_a_name_that_is_two_folders_is_refused(images, tmp_path, monkeypatch):
    shutil.copytree(images, tmp_path / "sets" / "own")
    monkeypatch.chdir(images.parent)
    with pytest.raises(ValueError, match="'own' is two folders; say './own' or '.*/sets/own'"):
        load("own", root=tmp_path / "sets")
    assert load("./own", root=tmp_path / "sets").fingerprint == load("own", root=images.parent).fingerprint


# ---- sizes ---------------------------------------------------------------------------------------------------------


def test_sizes_are_brought_to_one(images):
    """The whole is covered and the middle kept, without distortion; how is part of the fingerprint."""
    wide = Image.new("RGB", (64, 16), (255, 0, 0))
    wide.paste((0, 0, 255), (24, 0, 40, 16))
    wide.save(images / "test" / "light" / "wide.png")
    Image.new("RGB", (4, 100), (9, 9, 9)).save(images / "test" / "light" / "tall.png")
    data = load(str(images), size=16)
    check = fingerprint(data.train_images, data.train_labels, data.test_images, data.test_labels, data.resampled)
    assert data.train_images.shape == (6, 16, 16, 3) and data.fingerprint == check and data.padding == 2
    assert (data.test_images[-1] == torch.tensor([0, 0, 255], dtype=torch.uint8)).all() and (
        data.test_images[-2] == 9
    ).all()
    assert data.resampled == "16×16 (scaled to cover, cropped in the middle, bicubic)" and "resampled to 16×16" in repr(
        data
    )
    for name, size in ((f"{images}@16", None), (str(images), (16, 16))):
        assert load(name, size=size).fingerprint == data.fingerprint
    assert load("own@16", root=images.parent).fingerprint == data.fingerprint
    assert load(f"{images}@8x12").train_images.shape == (6, 8, 12, 3)


def test_a_size_that_all_have_leaves_the_bytes_alone_and_is_stated(images):
    plain, sized = folder(images), folder(images, size=(16, 24))
    assert (
        plain.train_images.equal(sized.train_images)
        and plain.resampled == "" != sized.resampled
        and plain.fingerprint != sized.fingerprint
    )


def test_shrinking_averages():
    """A chequerboard of single pixels becomes grey, not black or white."""
    from ldrld.data.image_files import read_image

    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        board.save(file.name)
        small = read_image(Path(file.name), (8, 8))
    assert abs(small[2:-2, 2:-2].astype(int) - 128).max() < 8


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "32", (32,), (32, 0), (1, 2, 3), 5000])
def test_a_size_that_makes_no_sense_is_refused(size, images):
    with pytest.raises(ValueError, match="size=.*expected a number of pixels from 1 to 4096"):
        load(str(images), size=size)


def test_a_size_is_for_folders_and_given_once(images):
    for call in (lambda: load("digits", size=32), lambda: load("digits@32")):
        with pytest.raises(ValueError, match="'digits' is a built-in data set of fixed size; sizes are for folders"):
            call()
    with pytest.raises(ValueError, match="already contains a size"):
        load(f"{images}@8", size=8)
    with pytest.raises(ValueError, match="expected a number of pixels"):
        load(f"{images}@0")


def test_a_folder_whose_name_has_a_size_in_it(images):
    named = images.rename(images.with_name("own@64"))
    assert load(str(named)).train_images.shape == (6, 16, 24, 3) and load(f"{named}@8").train_images.shape == (
        6,
        8,
        8,
        3,
    )


def test_a_run_on_a_folder_of_several_sizes(images, tmp_path, monkeypatch):
    """From the configuration on; teacher and student see the same images, and names of other runs are what they
    were."""
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path / "out"))
    monkeypatch.chdir(images.parent)
    Image.new("RGB", (40, 40)).save(images / "train" / "dark" / "odd.png")
    short = {"model": "resnet8", "recipe": "onecycle", "epochs": 1, "batch_size": 4, "precision": "float32"}
    with pytest.raises(ValueError, match="dataset=folder@32"):
        run(RunConfig(dataset="own", **short), "t", report=None)
    config = RunConfig(dataset="own@16", loss="kd", teacher="resnet8", **short)
    assert config.dataset == config.teacher.dataset == f"{images}@16" == RunConfig(**config.model_dump()).dataset
    record = run(config, "t", report=None)
    assert (
        record.name.startswith("own-16-resnet8-kd-s0-")
        and record.data["fingerprint"] == load("own", size=16).fingerprint
    )
    with pytest.raises(ValueError, match="unknown dataset"):
        RunConfig(dataset="nowhere@16")


# ---- what is in a file ---------------------------------------------------------------------------------------------


def read_back(name, image, tmp_path, **how):
    from ldrld.data.image_files import read_image

    image.save(tmp_path / name, **how)
    return read_image(tmp_path / name)


RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(256, size=(6, 5, 3), dtype=np.uint8))
GREY = Image.fromarray(RNG.integers(256, size=(6, 5), dtype=np.uint8))
PALETTE = GREY.convert("P")
PALETTE.putpalette(RNG.integers(256, size=768, dtype=np.uint8).tobytes())
OPAQUE = Image.merge("RGBA", (*NOISE.split(), Image.new("L", NOISE.size, 255)))
FAITHFUL = {
    **{f"rgb.{suffix}": (NOISE, {}) for suffix in ("png", "tif", "ppm", "bmp")},
    "rgb.webp": (NOISE, {"lossless": True}),
    "rgb-lzw.tif": (NOISE, {"compression": "tiff_lzw"}),
    **{f"grey.{suffix}": (GREY, {}) for suffix in ("png", "tif", "pgm", "bmp", "gif")},
    **{f"two.{suffix}": (GREY.convert("1"), {}) for suffix in ("png", "tif", "pbm", "bmp", "gif")},
    **{f"palette.{suffix}": (PALETTE, {}) for suffix in ("png", "tif", "bmp", "gif")},
    **{f"opaque.{suffix}": (OPAQUE, {}) for suffix in ("png", "tif")},
    "opaque.webp": (OPAQUE, {"lossless": True}),
    "opaque-grey.png": (Image.merge("LA", (GREY, Image.new("L", GREY.size, 255))), {}),
    "unused-transparency.png": (NOISE.point(lambda v: v | 1), {"transparency": (0, 0, 0)}),
    "few-colours.png": (PALETTE.point(lambda v: v % 4), {"bits": 2}),
}


@pytest.mark.parametrize("name", FAITHFUL)
def test_what_is_read_is_what_the_file_shows(name, tmp_path):
    image, how = FAITHFUL[name]
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(read_back(name, image, tmp_path, **how), expected) and len(np.unique(expected)) > 1


DEEP = Image.fromarray(RNG.integers(65536, size=(6, 5), dtype=np.uint16))
SEEN_THROUGH = Image.merge("RGBA", (*NOISE.split(), GREY))
UNFAITHFUL = {
    **{f"deep.{suffix}": (DEEP, {}, "mode I") for suffix in ("png", "tif", "pgm")},
    "integers.tif": (Image.new("I", (5, 6), 70_000), {}, "mode I"),
    "float.tif": (Image.new("F", (5, 6), 0.5), {}, "mode F: floating point"),
    **{f"print.{s}": (NOISE.convert("CMYK"), {}, "mode CMYK: its colours depend on a profile") for s in ("jpg", "tif")},
    "lab.tif": (Image.new("LAB", (5, 6)), {}, "mode LAB"),
    **{f"seen-through.{s}": (SEEN_THROUGH, {}, "transparent pixels; flatten") for s in ("png", "tif", "webp")},
    "grey-alpha.png": (Image.merge("LA", (GREY, GREY)), {}, "transparent pixels"),
    "palette.png": (PALETTE, {"transparency": int(np.asarray(PALETTE)[0, 0])}, "transparent pixels"),
    "palette-alpha.png": (PALETTE, {"transparency": bytes(range(256))}, "transparent pixels"),
    "palette.gif": (PALETTE, {"transparency": int(np.asarray(PALETTE)[0, 0])}, "transparent"),
    "keyed.png": (NOISE, {"transparency": NOISE.getpixel((0, 0))}, "transparent pixels"),
    **{
        f"moving.{s}": (
            NOISE,
            {"save_all": True, "append_images": [NOISE.rotate(180), NOISE.rotate(90)]},
            "3 frames or pages",
        )
        for s in ("gif", "png", "webp", "tif")
    },
    "drawing.ico": (NOISE, {}, "none of PNG, JPEG"),
    "map.jp2": (NOISE, {}, "none of PNG, JPEG"),
    "old.tga": (NOISE, {}, "none of PNG, JPEG"),
}


@pytest.mark.parametrize("name", UNFAITHFUL)
def test_what_would_be_changed_is_refused_by_name(name, tmp_path):
    image, how, says = UNFAITHFUL[name]
    with pytest.raises(ValueError, match=f"{name} .* cannot be read as an image: .*{says}"):
        read_back(name, image, tmp_path, **how)


def png(*chunks):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in chunks) + chunk(b"IEND", b"")


def header(width, height, bits, colour):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)


MADE_BY_HAND = {  # what Pillow opens with a mode that does not tell what it leaves out
    "deep-rgb.png": (
        png(header(2, 2, 16, 2), (b"IDAT", zlib.compress((b"\0" + bytes(range(12))) * 2))),
        "16 bits per channel",
    ),
    "deep-rgba.png": (
        png(header(2, 2, 16, 6), (b"IDAT", zlib.compress((b"\0" + bytes(range(16))) * 2))),
        "16 bits per channel",
    ),
    "deep-grey-alpha.png": (
        png(header(2, 2, 16, 4), (b"IDAT", zlib.compress((b"\0" + bytes(range(8))) * 2))),
        "16 bits per channel",
    ),
    "deep.ppm": (b"P6 2 2 65535\n" + bytes(range(24)), "16 bits per channel"),
    "deep-plain.ppm": (b"P3 1 1 1000\n900 1000 1\n", "16 bits per channel"),
    "bomb.png": (png(header(40_000, 40_000, 8, 2), (b"IDAT", zlib.compress(b"\0" * 99))), "decompression bomb"),
    "half-a-bomb.png": (png(header(10_000, 10_000, 8, 2), (b"IDAT", zlib.compress(b"\0" * 99))), "decompression bomb"),
    "bomb.ppm": (b"P6 65000 65000 255\n", "decompression bomb"),
    "text-bomb.png": (png(header(2, 2, 8, 2), (b"zTXt", b"a\0\0" + zlib.compress(b"a" * 10**8))), "large"),
    "empty.png": (b"", "damaged, or none of"),
    "page.jpg": (b"<html>404</html>", "damaged, or none of"),
    "short.ppm": (b"P6 2 2 255\n123", "truncated|not enough"),
}


@pytest.mark.parametrize("name", MADE_BY_HAND)
def test_a_hostile_or_odd_file_is_refused_by_name(name, tmp_path):
    from ldrld.data.image_files import read_image

    content, says = MADE_BY_HAND[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} \({len(content):,} bytes\) cannot be read as an image: .*({says})"):
        read_image(tmp_path / name)


def test_a_tiff_with_more_channels_than_colours_is_refused(tmp_path):
    """Such as near infrared in a photograph from the air: Pillow leaves the fourth channel out."""
    from ldrld.data.image_files import read_image

    path = tmp_path / "aerial.tif"
    SEEN_THROUGH.save(path)
    alpha, more = (
        struct.pack("<HHIHH", 338, 3, 1, meaning, 0) for meaning in (2, 0)
    )  # ExtraSamples: alpha, unspecified
    path.write_bytes(path.read_bytes().replace(alpha, more))
    with Image.open(path) as image:
        assert image.mode == "RGB"
    with pytest.raises(ValueError, match="aerial.tif .*it has 4 channels"):
        read_image(path)


def test_small_ranges_are_scaled_to_white(tmp_path):
    from ldrld.data.image_files import read_image

    (tmp_path / "a.pgm").write_bytes(b"P2 3 1 4\n0 2 4\n")
    assert read_image(tmp_path / "a.pgm")[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_as_viewers_show_them(orientation, suffix, tmp_path):
    """By the EXIF orientation: how the stored rows and columns lie in the upright image."""
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8] = 255  # the stored top left corner is white
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
    read = read_back(f"turned.{suffix}", Image.fromarray(stored), tmp_path, exif=exif, **how)
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}[
        orientation
    ]
    assert read.shape == ((16, 32, 3) if orientation < 5 else (32, 16, 3)) and read[corner].min() > 200
    assert sum(read[c].min() > 200 for c in ((0, 0), (0, -1), (-1, 0), (-1, -1))) == 1


def test_a_photograph_with_previews_is_its_photograph(tmp_path):
    """MPO, which phones write under .jpg."""
    assert read_back(
        "photo.jpg",
        Image.new("RGB", (24, 16), (200, 200, 200)),
        tmp_path,
        format="MPO",
        save_all=True,
        append_images=[Image.new("RGB", (8, 8))],
    ).shape == (16, 24, 3)


def test_unknown_name(tmp_path):
    known = "'cifar100', 'cifar100-10', 'digits', 'glyphs', .*'tiny-imagenet', or a folder"
    with pytest.raises(ValueError, match=known):
        load("cinic", root=tmp_path)


def test_tiny_imagenet_as_people_have_it(tmp_path):
    """The official archive, whose test images lie in one folder beside a list, and the same laid out by class."""
    with pytest.raises(FileNotFoundError, match="(?s)not in .*tiny-imagenet-200.*Two ways.*train/<class>/"):
        load("tiny-imagenet", root=tmp_path)
    official, own = tmp_path / "tiny-imagenet-200", tmp_path / "own" / "tiny-imagenet"
    listed = {"val_0.JPEG": ("n2", 200), "val_1.JPEG": ("n1", 10)}
    for root, name, shade in [
        (official, "train/n1/images/a.JPEG", 10),
        (official, "train/n2/images/a.JPEG", 200),
        (own, "train/n1/a.png", 10),
        (own, "train/n2/a.png", 200),
        *((official, f"val/images/{n}", s) for n, (_, s) in listed.items()),
        *((own, f"test/{c}/{n}.png", s) for n, (c, s) in listed.items()),
    ]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (64, 64), shade).save(root / name, quality=100) if name.endswith("JPEG") else Image.new(
            "L", (64, 64), shade
        ).save(root / name)
    (official / "val" / "val_annotations.txt").write_text(
        "".join(f"{n}\t{c}\t0\t0\t62\t62\n" for n, (c, _) in listed.items())
    )
    data, laid_out = tiny_imagenet(tmp_path), load("tiny-imagenet", root=tmp_path / "own")
    check_contract(data)
    assert (
        data.classes == ("n1", "n2")
        and data.test_labels.tolist() == [1, 0]
        and data.test_images[:, 0, 0, 0].tolist() == [200, 10]
    )
    assert laid_out.name == data.name == "tiny-imagenet" and (laid_out.padding, laid_out.flip) == (
        data.padding,
        data.flip,
    ) == (4, True)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), [0, 1], "float32"),
        (np.zeros((2, 3, 4, 4), np.uint8), [0, 1], r"\(2, 3, 4, 4\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0], "labels for 2 images"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, -1], "from -1 to 0"),
        (np.zeros((0, 4, 4, 3), np.uint8), [], "no images"),
    ],
)
def test_arrays_that_do_not_fit(images, labels, message):
    sound = np.zeros((1, 4, 4, 3), np.uint8), [0]
    with pytest.raises(ValueError, match=f"x, test split: .*{message}"):
        image_data("x", sound, (images, labels), classes=("a", "b"), padding=0, flip=False)


def test_characters_are_in_the_basic_plane():
    assert all(len(c.encode("utf-16-le")) == 2 for c in CHARACTERS)


@pytest.mark.skipif(not (data_root() / "cifar-100-python").is_dir(), reason="needs the official files")
def test_official_cifar():
    data = load("cifar100")
    check_contract(data)
    assert data.train_labels.bincount().tolist() == [500] * 100 and data.test_labels.bincount().tolist() == [100] * 100
    assert data.superclass_of.bincount().tolist() == [5] * 20
    assert data.classes[:2] == ("apple", "aquarium_fish") and data.superclasses[data.superclass_of[1]] == "fish"


@pytest.mark.skipif(not (data_root() / "cifar-100-python").is_dir(), reason="needs the official files")
def test_the_list_of_superclasses_is_that_of_the_data():
    """Figures of CIFAR-100 are made from it where the images are not at hand."""
    groups, of = superclasses("small")
    images = load("cifar100")
    assert [groups[i] for i in of] == [images.superclasses[i] for i in images.superclass_of]


def test_the_official_files_without_torchvision():
    """A machine that only trains knows the same names and MD5 sums."""
    from ldrld.core.torchvision import torchvision
    from ldrld.data.cifar import _Cifar100Files

    official = torchvision.datasets.CIFAR100
    for name in ("base_folder", "train_list", "test_list"):
        assert getattr(_Cifar100Files, name) == getattr(official, name)
    assert {k: official.meta[k] for k in _Cifar100Files.meta} == _Cifar100Files.meta
