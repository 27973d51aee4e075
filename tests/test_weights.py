"""Checkpoint files: all layouts in use load; anything else is refused, runs no code, and leaves the model alone."""

import argparse
import builtins
import datetime
import json
import os
import pathlib
import pickle
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch

from ldrld import models
from ldrld.models.weights import _bare, identify, read_weights


class Hostile:
    """A pickle that leaves a mark when it is run."""

    def __reduce__(self):
        return exec, ("import builtins; builtins.stranger_was_here = True",)


@pytest.fixture(autouse=True)
def no_code_ran():
    torch.manual_seed(0)
    yield
    assert not hasattr(builtins, "stranger_was_here")


def trained(name="resnet8", classes=100):
    """A network whose every state differs from a fresh one's."""
    model = models.build(name, classes)
    model(torch.randn(4, 3, 32, 32))
    return model.eval()


def same(a, b, counters=True):
    """Do two state dicts hold the same numbers?"""
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) for key in a if counters or not key.endswith("num_batches_tracked")
    )


@pytest.fixture
def source():
    return trained()


def renamed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


layouts = {
    "bare": lambda s: s,
    "model": lambda s: {"epoch": 240, "model": s, "accuracy": torch.tensor(59.0), "optimizer": {"param_groups": []}},
    "state_dict": lambda s: {"state_dict": s},
    "namespace": lambda s: {"model": s, "opt": argparse.Namespace(lr=0.05, gpu=[0], more=argparse.Namespace(a="kd"))},
    "module": lambda s: renamed("module.", s),
    "model and module": lambda s: {"model": renamed("module.", s)},
    "student": lambda s: renamed("student.", s) | {"teacher.fc.bias": torch.zeros(1), "connector.bias": torch.ones(1)},
    "module.student": lambda s: {"model": renamed("module.student.", s) | renamed("module.teacher.", s)},
    "compiled": lambda s: renamed("_orig_mod.", s),
    "compiled, then on several GPUs": lambda s: {"model": renamed("module._orig_mod.", s)},
    "on several GPUs, then compiled": lambda s: {"model": renamed("_orig_mod.module.", s)},
    "several GPUs, twice": lambda s: renamed("module.module.", s),
    "Lightning": lambda s: {
        "epoch": 3,
        "state_dict": renamed("model.", s),
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{}],
        "callbacks": {},
    },
    "Lightning, with a criterion": lambda s: {
        "state_dict": renamed("model.", s) | {"criterion.weight": torch.ones(100), "train_acc.total": torch.tensor(3)}
    },
    "Lightning, compiled": lambda s: {"state_dict": renamed("model._orig_mod.", s)},
    "Lightning, a distiller": lambda s: {"state_dict": renamed("student.model.", s) | renamed("teacher.model.", s)},
    **{
        name: (lambda s, name=name: {name: s, "epoch": 1, "acc": 59.0})
        for name in (
            "net",
            "network",
            "model_state_dict",
            "model_state",
            "net_state_dict",
            "weights",
            "params",
            "student",
        )
    },
    "one within the other": lambda s: {"state_dict": {"model": s, "epoch": 1}},
    "three within": lambda s: {"net": {"state_dict": {"model": renamed("module.", s)}}},
    "an ordered dictionary": lambda s: OrderedDict(renamed("module.", s)),
    "counted operations": lambda s: (
        s
        | {"total_ops": torch.zeros(1), "conv1.total_ops": torch.zeros(1), "layer1.0.bn1.total_params": torch.zeros(1)}
    ),
    "counted operations, several GPUs": lambda s: renamed(
        "module.", s | {"total_ops": torch.zeros(1), "conv1.total_ops": torch.zeros(1)}
    ),
    "NumPy beside it": lambda s: {
        "net": s,
        "acc": np.float64(59.0),
        "best": np.float32(60),
        "epoch": np.int64(3),
        "ok": np.bool_(True),
        "losses": np.arange(5.0),
        "dtype": np.dtype("float32"),
    },
    "paths and dates beside it": lambda s: {
        "model": s,
        "folder": pathlib.PosixPath("/data/x"),
        "pure": pathlib.PurePosixPath("y"),
        "when": datetime.datetime(2026, 1, 2),
        "took": datetime.timedelta(1),
    },
    "containers beside it": lambda s: {
        "model": s,
        "log": defaultdict(list, {"acc": [1.0, np.float64(2.0)]}),
        "tree": defaultdict(dict),
        "more": types.SimpleNamespace(a=1),
        "last": deque([1.0], 5),
    },
    "a path as a key beside it": lambda s: {
        "model": s,
        "sizes": {pathlib.PosixPath("a"): 3, pathlib.PosixPath("b"): 4},
    },
    "a default dictionary": lambda s: defaultdict(float, {"model": s}),
    "namespace of paths": lambda s: {
        "model": s,
        "opt": argparse.Namespace(root=pathlib.PosixPath("."), seed=np.int64(3)),
    },
    "parameters": lambda s: {
        "model": {key: torch.nn.Parameter(value, requires_grad=value.is_floating_point()) for key, value in s.items()}
    },
    "half precision": lambda s: {key: value.half() if value.is_floating_point() else value for key, value in s.items()},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["new format", "old format"])
@pytest.mark.parametrize("layout", layouts)
def test_layouts(layout, zipped, source, tmp_path):
    torch.save(layouts[layout](source.state_dict()), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    model = models.build("resnet8")
    assert models.load_weights(model, str(tmp_path / "a.pth")) is model
    expected = source.state_dict()
    if layout == "half precision":
        expected = {k: v.half().to(v.dtype) for k, v in expected.items()}
    assert same(model.state_dict(), expected)


@pytest.mark.parametrize(
    "name",
    [
        "teacher.pth.tar",
        "teacher.ckpt",
        "TEACHER.PTH",
        "teacher",
        "teacher.bin",
        "teacher.safetensors.pth",
        "a teacher's best (1).pth",
        "model_best.tar",
    ],
)
def test_a_checkpoint_may_have_any_name(name, source, tmp_path):
    torch.save({"model": source.state_dict()}, tmp_path / name)
    assert same(models.load_weights(models.build("resnet8"), tmp_path / name).state_dict(), source.state_dict())
    models.save_weights(source, tmp_path / "a.safetensors").rename(tmp_path / name)
    assert same(models.load_weights(models.build("resnet8"), tmp_path / name).state_dict(), source.state_dict())


@pytest.mark.parametrize(
    "package",
    [
        "easydict.EasyDict",
        "addict.addict.Dict",
        "yacs.config.CfgNode",
        "omegaconf.dictconfig.DictConfig",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning_fabric.utilities.data.AttributeDict",
    ],
)
def test_settings_of_packages_that_need_not_be_here(package, source, tmp_path, monkeypatch):
    module, _, name = package.rpartition(".")
    kind = (
        type(name, (dict,), {"__module__": module})
        if name != "DictConfig"
        else type(name, (types.SimpleNamespace,), {"__module__": module, "__reduce__": object.__reduce__})
    )
    for i in range(len(parts := module.split("."))):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType("stand-in"))
    setattr(sys.modules[module], name, kind)
    torch.save(
        {"state_dict": renamed("model.", source.state_dict()), "hyper_parameters": kind(lr=0.1, inner=kind(a=[1]))},
        tmp_path / "a.ckpt",
    )
    monkeypatch.undo()
    assert same(models.load_weights(models.build("resnet8"), tmp_path / "a.ckpt").state_dict(), source.state_dict())


def test_nothing_stored_with_the_weights_is_created(source, tmp_path, monkeypatch):
    """Not even the harmless: NumPy and pathlib are never called."""
    torch.save(
        {"model": source.state_dict(), "acc": np.float64(1), "path": pathlib.PosixPath("a"), "log": defaultdict(list)},
        tmp_path / "a.pth",
    )
    before = set(torch.serialization.get_safe_globals())  # PyTorch keeps them without order
    content = models.weights._read(tmp_path / "a.pth")
    assert [type(content[key]).__bases__[0].__name__ for key in ("acc", "path")] == ["_StandIn"] * 2 and type(
        content["log"]
    ) is OrderedDict
    assert set(torch.serialization.get_safe_globals()) == before, "the permission ends with the call"


def test_prefixes_that_are_the_model_s_own_stay(tmp_path):
    """A custom network with parts called `model` and `net`, as its own state dict names them."""

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.net = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)

    mine, other = Own(), Own()
    for content in (mine.state_dict(), {"state_dict": mine.state_dict()}):
        torch.save(content, tmp_path / "a.pth")
        assert same(models.load_weights(other, tmp_path / "a.pth").state_dict(), mine.state_dict())


@pytest.mark.parametrize("name", models.available())
def test_no_network_of_ours_has_a_name_like_a_prefix(name):
    with torch.device("meta"):
        state = models.build(name).state_dict()
    assert _bare(state) is state


@pytest.mark.parametrize(
    "name",
    ["resnet56", "resnet110", "resnet32x4", "wrn_40_2", "vgg13", "ResNet50", "MobileNetV2", "ShuffleV1", "ShuffleV2"],
)
def test_files_without_counters(name, tmp_path):
    state = models.build(name).state_dict()
    torch.save({"model": {k: v for k, v in state.items() if "num_batches" not in k}}, tmp_path / "a.pth")
    model = trained(name)
    models.load_weights(model, tmp_path / "a.pth")
    assert same(model.state_dict(), state)  # fresh counters are 0, and so are those filled in


def test_simkd_names_of_resnet50(tmp_path):
    state = trained("ResNet50").state_dict()
    torch.save({"model": {k.replace(".shortcut.", ".downsample."): v for k, v in state.items()}}, tmp_path / "a.pth")
    assert same(models.load_weights(models.build("ResNet50"), tmp_path / "a.pth").state_dict(), state)


@pytest.mark.parametrize("name", ["resnet8x4", "ShuffleV1", "MobileNetV2", "vgg8"])
def test_cat_kd_students(name, tmp_path):
    model = trained(name, 12)
    state, weight = model.state_dict(), torch.randn_like(model.head.weight)
    body = {k: v for k, v in state.items() if not k.startswith(("fc.", "linear.", "classifier."))}
    torch.save({"model": body | {"conv_test.weight": weight[:, :, None, None]}}, tmp_path / "a.pth")
    loaded = models.load_weights(models.build(name, 12), tmp_path / "a.pth")
    assert torch.equal(loaded.head.weight, weight) and not loaded.head.bias.any()
    with pytest.raises(models.WeightsError, match=f"build\\('{name}', 12\\)"):
        models.load_weights(models.build(name, 5), tmp_path / "a.pth")


def test_file_saved_on_a_gpu(source, tmp_path):
    torch.save({"model": source.state_dict()}, tmp_path / "cpu.pth")
    with zipfile.ZipFile(tmp_path / "cpu.pth") as old, zipfile.ZipFile(tmp_path / "gpu.pth", "w") as new:
        for name in old.namelist():  # what torch.save writes there instead of "cpu"
            new.writestr(name, old.read(name).replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    assert b"cuda:0" in (tmp_path / "gpu.pth").read_bytes()
    assert same(models.load_weights(models.build("resnet8"), tmp_path / "gpu.pth").state_dict(), source.state_dict())


def test_mode_memory_format_and_type_are_kept(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = models.build("resnet8").eval().double().to(memory_format=torch.channels_last)
    models.load_weights(model, tmp_path / "a.pth")
    weight = model.layer1[0].conv1.weight
    assert not model.training and weight.dtype == torch.float64
    assert weight.is_contiguous(memory_format=torch.channels_last)


def write(content):
    return lambda path, source: torch.save(content(source.state_dict()), path)


def cut(part, zipped=True):
    def make(path, source):
        torch.save({"model": source.state_dict()}, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(part * len(whole))])

    return make


def hostile(zipped):
    return lambda path, source: torch.save(
        {"model": source.state_dict(), "opt": Hostile()}, path, _use_new_zipfile_serialization=zipped
    )


def bundle(path, source):
    torch.save(source.state_dict(), path.with_name("inner.pth"))
    with tarfile.open(path, "w") as tar:
        tar.add(path.with_name("inner.pth"), "inner.pth")


def damaged_safetensors(path, source):
    good = models.save_weights(source, path.with_name("good.safetensors")).read_bytes()
    path.write_bytes(good[:-100])


def zipped_text(path, source):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def torchscript(path, source):
    torch.jit.trace(source, torch.zeros(1, 3, 16, 16)).save(str(path))


class Calls:
    """A pickle that calls a function when it is run."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def bomb(path, source):
    """A checkpoint, and in its archive 200 MB of zeros that pack to 200 kB."""
    torch.save({"model": source.state_dict()}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/99", bytes(200_000_000))


def zipped(path, source):
    torch.save(source.state_dict(), path.with_name("inner.pth"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_name("inner.pth"), "inner.pth")


def nested(depth, content):
    for _ in range(depth):
        content = {"model": content}
    return content


def fresh(name, classes=100):
    return lambda path, source: torch.save({"model": models.build(name, classes).state_dict()}, path)


def replaced(key, value):
    return write(lambda s: {"model": s | {key: value}})


refused = {  # how the file is made, and what its refusal says
    "hostile": (hostile(True), "exec.*could run code"),
    "hostile, old format": (hostile(False), "exec.*could run code"),
    "hostile inside a namespace": (write(lambda s: {"opt": argparse.Namespace(a=Hostile())}), "could run code"),
    "hostile bare pickle": (lambda path, _: path.write_bytes(pickle.dumps(Hostile(), protocol=2)), "could run code"),
    "hostile bare pickle, new": (lambda path, _: path.write_bytes(pickle.dumps(Hostile())), "not a PyTorch checkpoint"),
    "a whole module": (lambda path, source: torch.save(source, path), "ResNet.*save model.state_dict"),
    "a TorchScript program": (torchscript, "TorchScript"),
    "hostile beside NumPy": (
        write(lambda s: {"model": s, "acc": np.float64(1), "opt": Hostile()}),
        "references builtins.exec.*could run code",
    ),
    "hostile within a default dictionary": (
        write(lambda s: {"model": s, "log": defaultdict(list, a=[Hostile()])}),
        "builtins.exec",
    ),
    "a system call": (
        write(lambda s: {"model": s, "opt": Calls(os.system, "touch /tmp/ldrld-was-here")}),
        "system.*|not a PyTorch checkpoint",
    ),
    "a method of a NumPy array": (
        write(lambda s: {"model": s, "opt": Calls(np.load, "x.npy")}),
        r"references numpy.load",
    ),
    "eval": (write(lambda s: {"model": s, "opt": Calls(eval, "1")}), "builtins.eval"),
    "getattr": (write(lambda s: {"model": s, "opt": Calls(getattr, s, "clear")}), "builtins.getattr"),
    "an optimiser object": (
        write(lambda s: {"model": s, "optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)}),
        "references torch.optim.*SGD",
    ),
    "a zip bomb": (lambda path, source: bomb(path, source), "unpacks to 20.,...,... bytes, which no checkpoint does"),
    "a zip archive of checkpoints": (
        lambda path, source: zipped(path, source),
        "a zip archive; unpack it and name the checkpoint inside",
    ),
    "a Git LFS pointer": (
        lambda path, _: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
        "Git LFS pointer.*git lfs pull",
    ),
    "gzip": (lambda path, _: path.write_bytes(b"\x1f\x8b\x08" + bytes(60)), "a gzip archive; unpack it first"),
    "Keras": (lambda path, _: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(60)), "an HDF5 file"),
    "meta tensors": (
        write(lambda s: {"model": {key: value.to("meta") for key, value in s.items()}}),
        "without the numbers of conv1.weight.*meta device",
    ),
    "one meta tensor": (replaced("fc.bias", torch.zeros(100, device="meta")), "without the numbers of fc.bias"),
    "one number for many": (
        replaced("conv_test.weight", torch.zeros(1).expand(10**9, 64, 1, 1)),
        "without the numbers of conv_test.weight",
    ),
    "a head of no dimension": (replaced("conv_test.weight", torch.zeros(())), "unexpected conv_test.weight"),
    "a sparse head": (
        replaced("conv_test.weight", torch.zeros(9, 64, 1, 1).to_sparse()),
        "unexpected conv_test.weight",
    ),
    "a nested tensor": (
        replaced("fc.bias", torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
        r"'fc.bias' \(Tensor\)",
    ),
    "a NumPy array for weights": (
        replaced("fc.bias", np.zeros(100)),
        r"'fc.bias' \(_reconstruct\)|'fc.bias' \(ndarray\)",
    ),
    "a path for weights": (replaced("fc.bias", pathlib.PosixPath("x")), r"'fc.bias' \(PosixPath\)"),
    "two state dicts": (
        write(lambda s: {"model": s, "net": s}),
        "2 state dicts, under 'model', 'net'; save only the one you want",
    ),
    "two within": (
        write(lambda s: {"state_dict": {"student": s, "net": s}}),
        "under 'state_dict.net', 'state_dict.student'",
    ),
    "wrapped without end": (write(lambda s: nested(200, s)), "expected tensors by name"),
    "cut short": (cut(0.5), "cut short"),
    "nearly whole": (cut(0.999), "cut short"),
    "cut short, old format": (cut(0.5, zipped=False), "cut short"),
    "only a beginning": (cut(0.001), "cut short"),
    "empty": (lambda path, _: path.write_bytes(b""), "0 bytes"),
    "an error page": (lambda path, _: path.write_text("<html>404</html>"), "not a PyTorch checkpoint"),
    "noise": (lambda path, _: path.write_bytes(bytes(i * i % 251 for i in range(5000))), "not a PyTorch checkpoint"),
    "a zip of something else": (zipped_text, "not a PyTorch checkpoint"),
    "a tar of checkpoints": (bundle, "tar archive; unpack"),
    "damaged safetensors": (damaged_safetensors, "damaged .safetensors"),
    "a number": (write(lambda s: 3), "holds a int; expected tensors by name"),
    "a list": (write(lambda s: list(s.values())), "holds a list"),
    "an empty dict": (write(lambda s: {}), "holds a dict; expected tensors"),
    "no state dict": (
        write(lambda s: {"epoch": 3, "optimizer": {}}),
        r"'epoch' \(int\), 'optimizer' \(dict\).*expected tensors by name",
    ),
    "a text among the tensors": (replaced("fc.bias", "zero"), "'fc.bias'"),
    "numbered tensors": (write(lambda s: dict(enumerate(s.values()))), "expected tensors by name"),
    "other classes": (fresh("resnet8", 10), r"10 classes, .* resnet8 for 100 classes: it fits .*\('resnet8', 10\)"),
    "other depth": (fresh("resnet14"), r"holds resnet14 .* model is resnet8 .*: it fits .*build\('resnet14', 100\)"),
    "other family": (fresh("wrn_16_1", 7), r"holds wrn_16_1 for 7 classes.*build\('wrn_16_1', 7\)"),
    "foreign network": (write(lambda s: {"features.0.weight": torch.zeros(4, 3, 7, 7)}), "unexpected features.0"),
    "a tensor missing": (write(lambda s: {k: v for k, v in s.items() if k != "fc.bias"}), "missing fc.bias"),
    "a tensor too many": (replaced("extra.weight", torch.zeros(1)), "unexpected extra.weight"),
    "a wrong shape": (replaced("bn1.bias", torch.zeros(8)), r"bn1.bias is \(8,\) instead of \(16,\)"),
    "a counter of wrong shape": (replaced("bn1.num_batches_tracked", torch.zeros(3)), "num_batches_tracked is"),
    "integers for weights": (replaced("fc.bias", torch.zeros(100, dtype=torch.int64)), "number type in fc.bias"),
    "complex weights": (replaced("fc.bias", torch.zeros(100, dtype=torch.complex64)), "number type in fc.bias"),
    "sparse weights": (replaced("fc.weight", torch.zeros(100, 64).to_sparse()), "number type in fc.weight"),
    "not finite": (replaced("fc.bias", torch.full((100,), float("nan"))), "nan.* in fc.bias"),
    "an infinite variance": (replaced("bn1.running_var", torch.full((16,), float("inf"))), "inf.* in bn1.running_var"),
}


@pytest.mark.parametrize("case", refused)
def test_refused_and_unchanged(case, source, tmp_path):
    make, says = refused[case]
    path = tmp_path / "file.pth"
    make(path, source)
    model = models.build("resnet8")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(models.WeightsError, match=says) as caught:
        models.load_weights(model, path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    assert same(before, model.state_dict())


def test_the_hostile_file_is_hostile(source, tmp_path):
    hostile(True)(tmp_path / "file.pth", source)
    torch.load(tmp_path / "file.pth", weights_only=False)
    assert builtins.stranger_was_here
    del builtins.stranger_was_here


def test_permission_for_namespaces_ends_with_the_call(source, tmp_path):
    torch.save({"model": source.state_dict(), "opt": argparse.Namespace(a=1)}, tmp_path / "a.pth")
    models.load_weights(models.build("resnet8"), tmp_path / "a.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth: no such file"):
        models.load_weights(models.build("resnet8"), tmp_path / "nowhere.pth")
    folder = tmp_path / "resnet56_vanilla"
    folder.mkdir()
    (folder / "ckpt_epoch_240.pth").touch()
    with pytest.raises(models.WeightsError, match="a folder; name a file in it, such as ckpt_epoch_240.pth"):
        models.load_weights(models.build("resnet8"), folder)


def test_a_custom_model(tmp_path):
    torch.manual_seed(1)
    model, other = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)) for _ in range(2))
    models.save_weights(model, tmp_path / "own.safetensors")
    assert same(models.load_weights(other, tmp_path / "own.safetensors").state_dict(), model.state_dict())
    with pytest.raises(models.WeightsError, match="a network that ldrld does not know, and the model is resnet8"):
        models.load_weights(models.build("resnet8"), tmp_path / "own.safetensors")


@pytest.mark.parametrize("name", models.available())
def test_round_trip_and_identity(name, tmp_path):
    model = models.build(name, 11)
    models.save_weights(model, tmp_path / "a.safetensors")
    assert identify(read_weights(tmp_path / "a.safetensors")) == (name, 11)
    loaded = models.load_weights(models.build(name, 11), tmp_path / "a.safetensors")
    assert same(loaded.state_dict(), model.state_dict())


def test_saved_bytes_and_metadata(source, tmp_path):
    facts = {"network": "resnet8", "top1": 58.25, "seed": 0, "note": "3", "recipe": {"epochs": [1, 2], "half": True}}
    a = models.save_weights(source, tmp_path / "new" / "folder" / "a.safetensors", facts)
    other = source.to(memory_format=torch.channels_last)
    b = models.save_weights(other, tmp_path / "b.safetensors", dict(reversed(facts.items())))
    assert a.read_bytes() == b.read_bytes() and models.read_metadata(a) == facts
    assert models.read_metadata(models.save_weights(source, tmp_path / "c.safetensors")) == {}


def test_foreign_safetensors_without_metadata(source, tmp_path):
    from safetensors.torch import save_file

    save_file(source.state_dict(), tmp_path / "plain.safetensors")
    path = (tmp_path / "plain.safetensors").rename(tmp_path / "misnamed.pth")
    assert models.read_metadata(path) == {}
    assert same(models.load_weights(models.build("resnet8"), path).state_dict(), source.state_dict())


def test_metadata_of_files_that_have_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        models.read_metadata(tmp_path / "none.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    with pytest.raises(models.WeightsError, match="text.safetensors"):
        models.read_metadata(text)


def test_save_refuses_other_suffixes_and_other_metadata(source, tmp_path):
    with pytest.raises(ValueError, match="path=.*safetensors"):
        models.save_weights(source, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="metadata="):
        models.save_weights(source, tmp_path / "a.safetensors", {"a": object()})
    assert not list(tmp_path.iterdir())


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing(source, tmp_path, monkeypatch):
    path = models.save_weights(source, tmp_path / "a.safetensors", {"run": 1})
    old = path.read_bytes()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        models.save_weights(source, path, {"run": 2})
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_metadata_is_plain_json_in_the_header(source, tmp_path):
    raw = models.save_weights(source, tmp_path / "a.safetensors", {"network": "resnet8"}).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == {"ldrld": '{"network": "resnet8"}'}


def test_a_sequence_of_layers_in_a_wrapper(tmp_path):
    """`module.0.weight` is wrapped; `model.0.weight` may be the network's own name, as in MobileNetV1."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        torch.save({"model": renamed(prefix, network.state_dict())}, tmp_path / "file.pth")
        again = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        models.load_weights(again, tmp_path / "file.pth")
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), network.parameters()))
    torch.save(models.build("MobileNetV1").state_dict(), tmp_path / "mobile.pth")
    models.load_weights(models.build("MobileNetV1"), tmp_path / "mobile.pth")
