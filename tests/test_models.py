"""All networks: sizes and shapes as listed, arithmetic as in the original, and usable as teachers and students."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_networks import fill, images, summary

from ldrld import models
from ldrld.core import paths

golden = json.loads((Path(__file__).parent / "golden" / "networks.json").read_text())
with open(paths.published() / "architectures.csv", newline="") as file:
    listed = {row["network"]: row for row in csv.DictReader(file)}
names = list(listed)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_the_listed_networks_are_there():
    assert set(names) <= set(models.available()) and len(names) == 22


@pytest.mark.parametrize("name", names)
def test_size_and_fingerprint_as_listed(name):
    ours = models.describe(name)
    assert {key: str(value) for key, value in ours.items()} == {key: listed[name][key] for key in ours}


@pytest.mark.parametrize("name", names)
def test_arithmetic_as_in_the_original(name):
    model = fill(models.build(name)).train()
    with torch.no_grad():
        logits, features = model(images(), features=True)
    ours = summary(features.stages, features.preact, features.pooled, logits)
    assert ours.keys() == golden[name].keys()
    for key, value in ours.items():
        torch.testing.assert_close(torch.tensor(value), torch.tensor(golden[name][key]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", names)
def test_features_agree_with_the_logits(name):
    model = models.build(name, num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits, features = model(x, features=True)
        assert torch.equal(model(x), logits)
    assert isinstance(features, models.Features) and isinstance(model.head, torch.nn.Linear)
    torch.testing.assert_close(features.pooled @ model.head.weight.T + model.head.bias, logits, rtol=1e-4, atol=1e-5)
    assert [p.shape for p in features.preact] == [s.shape for s in features.stages[1:]]
    entering = {
        "MobileNetV2": lambda f: model.conv2(f.stages[-1]),
        "ShuffleV2": lambda f: F.relu(model.bn2(model.conv2(f.stages[-1]))),
    }
    if name.startswith("wrn"):
        last = F.relu(features.preact[-1])
    else:
        last = entering.get(name, lambda f: f.stages[-1])(features)
    torch.testing.assert_close(features.pooled, last.mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert torch.equal(features.last, last)


@pytest.mark.parametrize("name", names)
@pytest.mark.parametrize("side", [16, 32, 64])
def test_a_network_can_be_entered_after_every_stage(name, side):
    if side == 64 and name not in ("vgg8", "resnet8", "wrn_16_1", "MobileNetV2", "ShuffleV1", "ShuffleV2"):
        return  # slow
    model = models.build(name, num_classes=5).eval()
    with torch.no_grad():
        logits, features = model(torch.randn(2, 3, side, side), features=True)
        for i, x in enumerate(features.stages):
            assert torch.equal(model.tail(i, x), logits), i
    for wrong in (-1, len(features.stages), 1.0):
        with pytest.raises(ValueError, match=f"i={wrong}.* to {len(features.stages) - 1}"):
            model.tail(wrong, x)


@pytest.mark.parametrize("name", names)
def test_gradient_reaches_every_parameter(name):
    model = models.build(name, num_classes=5)
    logits, features = model(torch.randn(4, 3, 32, 32), features=True)
    (F.cross_entropy(logits, torch.arange(4)) + sum(p.square().mean() for p in features.preact)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert model.head.weight.grad.abs().sum() > 0 and next(model.parameters()).grad.abs().sum() > 0


@pytest.mark.parametrize("side", [16, 64])
@pytest.mark.parametrize("name", names)
def test_other_image_sizes(name, side):
    described = models.describe(name, num_classes=3, side=side)  # shapes alone
    assert described["pooled"] == int(listed[name]["pooled"])
    if side == 16:
        with torch.no_grad():
            logits = models.build(name, 3).eval()(torch.randn(2, 3, side, side))
        assert logits.shape == (2, 3) and logits.isfinite().all()


@pytest.mark.parametrize("name", names)
def test_asking_for_features_leaves_training_as_it_is(name):
    torch.manual_seed(3)
    a = models.build(name, 4)
    torch.manual_seed(3)
    b = models.build(name, 4)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(a(x), b(x, features=True)[0])
    ours, theirs = a.state_dict(), b.state_dict()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_2", "vgg8", "MobileNetV2", "ResNet50"])
def test_starting_weights(name):
    model = models.build(name)
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 10_000:
            sigma = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(sigma, rel=0.04), key
            assert module.bias is None or not module.bias.any()
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()
    if name in ("wrn_16_2", "vgg8", "MobileNetV2"):
        assert not model.head.bias.any()
    if name in ("vgg8", "MobileNetV2"):
        assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.04)


@pytest.mark.parametrize("name", ["resnet8", "ShuffleV1", "ShuffleV2"])
def test_channels_last_and_bfloat16_agree(name):
    model, x = models.build(name, 10).eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        plain = model(x)
        model.to(memory_format=torch.channels_last)
        fast = model(x.to(memory_format=torch.channels_last))
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(half.float(), plain, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "paper, ours",
    [
        ("ResNet8x4", "resnet8x4"),
        ("ResNet8×4", "resnet8x4"),
        ("RESNET-110", "resnet110"),
        ("WRN-16-2", "wrn_16_2"),
        ("wrn_40_1", "wrn_40_1"),
        ("VGG-13", "vgg13"),
        ("MobileNet-V2", "MobileNetV2"),
        ("mobile_half", "MobileNetV2"),
        ("ShuffleNetV1", "ShuffleV1"),
        ("ShuffleNet-V2", "ShuffleV2"),
        ("shufflev2", "ShuffleV2"),
        ("resnet50", "ResNet50"),
    ],
)
def test_names_as_papers_write_them(paper, ours):
    assert models.canonical(paper) == ours


@pytest.mark.parametrize("name", names)
def test_names_of_the_published_tables(name):
    assert models.canonical(listed[name]["paper_name"]) == models.canonical(name) == name


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("resnet21", "resnet20"),
        ("wrn_16_3", "wrn_16_2"),
        ("ShuffleNetV2x1.5", "ShuffleV2"),
        ("xyz", "resnet8"),
        ("", "resnet8"),
        (None, "resnet20"),
        (20, "resnet20"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(wrong, near):
    with pytest.raises(ValueError, match=near) as caught:
        models.build(wrong)
    assert f"name={wrong!r}" in str(caught.value)


@pytest.mark.parametrize("wrong", [0, -1, 10.0, "10", True, None])
def test_wrong_number_of_classes_is_refused(wrong):
    with pytest.raises(ValueError, match="num_classes"):
        models.build("resnet8", wrong)


def test_needs_torch_alone():
    others = ["numpy", "pandas", "torchvision", "safetensors", "matplotlib", "fastcore", "nbdev"]
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); import ldrld.models as m; m.build('vgg8')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=paths.root())
