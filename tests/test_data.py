"""Data sets: what training relies on, and what happens to files that are missing, damaged, hostile or contested."""
import hashlib
import os
import pickle
import subprocess
import sys
import urllib.error
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ldrld.data import CLASSES, LOADERS, ImageData, cifar100, fingerprint, folder, image_data, load, some_of, tiny_imagenet, with_groups
from ldrld.data.glyphs import CHARACTERS, Recipe, glyphs, make
from ldrld.paths import data_root
from ldrld.report import superclasses
from ldrld.runs import records

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
    for labels in (data.train_labels, data.test_labels): assert len(set(labels.bincount().tolist())) == 1
    pictures = torch.cat([data.train_images, data.test_images]).flatten(1)
    assert len(torch.unique(pictures, dim=0)) == len(pictures)


@pytest.mark.parametrize("classes", [10, 20, 50, 200])
def test_glyphs_with_other_numbers_of_classes(tmp_path, classes):
    data, hundred = load(f"glyphs-{classes}", root=tmp_path), load("glyphs", root=tmp_path)
    check_contract(data)
    assert data.name == f"glyphs-{classes}" and len(data.classes) == classes and data.superclass_of.bincount().tolist() == [5] * (classes // 5)
    assert data.train_images.shape == hundred.train_images.shape and data.test_images.shape == hundred.test_images.shape
    for labels in (data.train_labels, data.test_labels): assert len(set(labels.bincount().tolist())) == 1
    assert set(data.classes) < set(CHARACTERS) if classes < 100 else set(data.classes) > set(CHARACTERS)


def test_more_classes_leave_the_hundred_as_they_were():
    """Every record of `glyphs` was made with these bytes."""
    assert {r.data["fingerprint"] for r in records("quick") if r.config.dataset == "glyphs"} == {load("glyphs").fingerprint}
    with pytest.raises(ValueError, match="classes=30: expected 10, 20, 50, 100 or 200"): make(Recipe(classes=30), "train")
    with pytest.raises(ValueError, match="recipe.test is 100; expected a multiple of 200"): make(Recipe(classes=200, test=100), "test")


def test_the_number_of_classes_is_known_without_the_pictures():
    assert CLASSES.keys() == LOADERS.keys()
    assert all(len(load(name).classes) == CLASSES[name] for name in ("digits", "glyphs", "glyphs-10", "glyphs-20", "glyphs-50", "glyphs-200"))


def test_importing_the_module_is_light():
    heavy = {"sklearn", "matplotlib", "torchvision", "PIL"}
    assert python(f"import sys, ldrld.data; print({heavy} & set(sys.modules))") == "set()"


def test_glyphs_do_not_depend_on_the_process():
    code = ("import hashlib; from ldrld.data.glyphs import Recipe, make\n"
            "print(hashlib.sha256(make(Recipe(train=200, test=100), 'train')[0].tobytes()).hexdigest())")
    here = hashlib.sha256(make(FEW, "train")[0].tobytes()).hexdigest()
    assert python(code, PYTHONHASHSEED="1") == python(code, PYTHONHASHSEED="2", OMP_NUM_THREADS="2") == here


def test_glyphs_follow_their_recipe():
    assert Recipe(seed=1).key() != Recipe().key() == Recipe(seed=0).key()
    assert not np.array_equal(make(Recipe(train=200, seed=1), "train")[0], make(FEW, "train")[0])
    assert make(Recipe(size=24, test=100), "test")[0].shape == (100, 24, 24, 3)
    with pytest.raises(ValueError, match="recipe.train is 150"): make(Recipe(train=150), "train")


def test_glyphs_are_read_back_without_being_drawn(tmp_path, monkeypatch):
    made = glyphs(tmp_path, FEW)
    monkeypatch.setattr("ldrld.data.glyphs.make", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert glyphs(tmp_path, FEW).fingerprint == made.fingerprint


class Opened:
    def __reduce__(self): return (pytest.fail, ("a pickle in the cache was opened",))


def truncate(path): path.write_bytes(path.read_bytes()[:-2000])
def empty(path): path.write_bytes(b"")
def replace(path): path.write_bytes(b"not an archive")
def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[9000] ^= 4
    path.write_bytes(content)
def leave_out_an_array(path): np.savez(path, train_images=np.zeros(3))
def change_a_label(path):
    with np.load(path) as file: arrays = dict(file)
    arrays["train_labels"][0] += 1
    np.savez(path, **arrays)
def hide_a_pickle(path): np.savez(path, train_images=np.array([Opened()], dtype=object))


DAMAGES = [truncate, empty, replace, flip_a_bit, leave_out_an_array, change_a_label, hide_a_pickle]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_glyphs_are_made_again(tmp_path, damage):
    made = glyphs(tmp_path, FEW)
    path, = (tmp_path / "glyphs").iterdir()
    damage(path)
    with pytest.warns(UserWarning, match="is damaged .* making it again"): again = glyphs(tmp_path, FEW)
    assert again.fingerprint == made.fingerprint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        glyphs(tmp_path, FEW)


def test_glyphs_without_a_place_to_keep_them(tmp_path):
    (tmp_path / "glyphs").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be kept"): data = glyphs(tmp_path, FEW)
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
    "Files in CIFAR-100's layout, 2 training and 1 test picture a class, and a torchvision class that knows their MD5."
    from ldrld.vision import torchvision

    rng, folder = np.random.default_rng(0), tmp_path / "cifar-100-python"
    folder.mkdir()
    coarse = rng.permutation(np.arange(100) % 20)
    md5 = {}
    for split, repeats in (("train", 2), ("test", 1)):
        fine = rng.permutation(np.tile(np.arange(100), repeats))
        entry = {"data": rng.integers(256, size=(len(fine), 3072), dtype=np.uint8), "fine_labels": fine.tolist(),
                 "coarse_labels": coarse[fine].tolist(), "filenames": ["x.png"] * len(fine), "batch_label": split}
        (folder / split).write_bytes(pickle.dumps(entry, protocol=2))
    names = {"fine_label_names": [f"fine {i}" for i in range(100)],
             "coarse_label_names": [f"coarse {i}" for i in range(20)]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    for path in folder.iterdir(): md5[path.name] = hashlib.md5(path.read_bytes()).hexdigest()

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
    assert (len(ten.train_images), len(ten.test_images)) == (20, 10) and (ten.mean, ten.std, ten.padding, ten.flip) == (whole.mean, whole.std, 4, True)
    of = {image.numpy().tobytes(): whole.classes[label] for image, label in zip(whole.train_images, whole.train_labels.tolist())}
    assert all(of[image.numpy().tobytes()] == ten.classes[label] for image, label in zip(ten.train_images, ten.train_labels.tolist()))


def test_missing_cifar_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught: load("cifar100", root=tmp_path)
    for way in ("ldrld data cifar100", "download=True", "cifar-100-python"): assert way in str(caught.value)


def test_failed_download_says_how_else_to_get_it(tmp_path, tiny_cifar):
    class Offline(tiny_cifar[1]):
        def download(self): raise urllib.error.URLError("Name or service not known")

    with pytest.raises(FileNotFoundError, match="(?s)Name or service not known.*Three ways"):
        cifar100(tmp_path / "elsewhere", download=True, source=Offline)


def test_damaged_or_hostile_cifar_is_never_unpickled(tiny_cifar):
    root, source, _ = tiny_cifar
    (root / "cifar-100-python" / "test").write_bytes(pickle.dumps(Opened()))
    with pytest.raises(ValueError, match="cifar-100-python.test: MD5 .* expected .* fetch"):
        cifar100(root, source=source)


@pytest.fixture
def pictures(tmp_path):
    for split in ("train", "test"):
        for name, shade in (("dark", 10), ("light", 200)):
            place = tmp_path / "own" / split / name / "images"
            place.mkdir(parents=True)
            for i, mode in enumerate(("RGB", "L", "RGBA")):
                Image.new("L", (24, 16), shade + i).convert(mode).save(place / f"{i}.png")
    return tmp_path / "own"


def test_folder(pictures):
    data = load(str(pictures))
    check_contract(data)
    assert data.name == "own" and data.classes == ("dark", "light") and data.train_images.shape == (6, 16, 24, 3)
    assert data.train_images[:, 0, 0, 0].tolist() == [10, 11, 12, 200, 201, 202]
    assert load("own", root=pictures.parent).fingerprint == data.fingerprint


def test_folder_that_does_not_fit(pictures):
    Image.new("RGB", (8, 8)).save(pictures / "test" / "light" / "odd.png")
    with pytest.raises(ValueError, match="odd.png is 8×8 pixels, the first picture 24×16"): folder(pictures)
    (pictures / "test" / "light").rename(pictures / "test" / "bright")
    with pytest.raises(ValueError, match="the same subfolders.*'bright', 'light'"): folder(pictures)


def test_folder_with_two_sizes(pictures):
    for path in (pictures / "test").rglob("*.png"): Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(ValueError, match="test pictures are 8×8.* training pictures 24×16"): folder(pictures)


def test_folder_with_an_empty_class(pictures):
    for path in (pictures / "test" / "light").rglob("*.png"): path.unlink()
    with pytest.raises(ValueError, match="test.light: no pictures"): folder(pictures)


def test_folder_with_a_broken_picture(pictures):
    path = pictures / "train" / "dark" / "images" / "0.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="0.png cannot be read"): folder(pictures)


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="'digits', 'glyphs', 'cifar100',.*'tiny-imagenet', or a folder"):
        load("imagenet", root=tmp_path)


def test_tiny_imagenet_as_people_have_it(tmp_path):
    """The official archive, whose test pictures lie in one folder beside a list, and the same laid out by class."""
    with pytest.raises(FileNotFoundError, match="(?s)not in .*tiny-imagenet-200.*Two ways.*train/<class>/"): load("tiny-imagenet", root=tmp_path)
    official, own = tmp_path / "tiny-imagenet-200", tmp_path / "own" / "tiny-imagenet"
    listed = {"val_0.JPEG": ("n2", 200), "val_1.JPEG": ("n1", 10)}
    for root, name, shade in [(official, "train/n1/images/a.JPEG", 10), (official, "train/n2/images/a.JPEG", 200), (own, "train/n1/a.png", 10), (own, "train/n2/a.png", 200),
                              *((official, f"val/images/{n}", s) for n, (_, s) in listed.items()), *((own, f"test/{c}/{n}.png", s) for n, (c, s) in listed.items())]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (64, 64), shade).save(root / name, quality=100) if name.endswith("JPEG") else Image.new("L", (64, 64), shade).save(root / name)
    (official / "val" / "val_annotations.txt").write_text("".join(f"{n}\t{c}\t0\t0\t62\t62\n" for n, (c, _) in listed.items()))
    data, laid_out = tiny_imagenet(tmp_path), load("tiny-imagenet", root=tmp_path / "own")
    check_contract(data)
    assert data.classes == ("n1", "n2") and data.test_labels.tolist() == [1, 0] and data.test_images[:, 0, 0, 0].tolist() == [200, 10]
    assert laid_out.name == data.name == "tiny-imagenet" and (laid_out.padding, laid_out.flip) == (data.padding, data.flip) == (4, True)


@pytest.mark.parametrize(("images", "labels", "message"), [
    (np.zeros((2, 4, 4, 3), np.float32), [0, 1], "float32"),
    (np.zeros((2, 3, 4, 4), np.uint8), [0, 1], r"\(2, 3, 4, 4\)"),
    (np.zeros((2, 4, 4, 3), np.uint8), [0], "labels for 2 images"),
    (np.zeros((2, 4, 4, 3), np.uint8), [0, -1], "from -1 to 0"),
    (np.zeros((0, 4, 4, 3), np.uint8), [], "no pictures"),
])
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
    """Figures of CIFAR-100 are made from it where the pictures are not at hand."""
    groups, of = superclasses("small")
    images = load("cifar100")
    assert [groups[i] for i in of] == [images.superclasses[i] for i in images.superclass_of]
