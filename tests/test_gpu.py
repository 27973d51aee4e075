"""What runs on a GPU only: the loss by its kernel within autograd, training, and a teacher's table held there."""

import pytest
import torch

from ldrld import LDRLD, data, losses, models
from ldrld.data.augmentation import Crops
from ldrld.experiments import runner
from ldrld.experiments.cells import method_config
from ldrld.experiments.methods import METHODS, VARIANTS
from ldrld.experiments.profiles import Profile
from ldrld.experiments.config import RunConfig
from ldrld.losses.ldrld.analytic import choose, kernel
from ldrld.training.loop import Student, train_together
from ldrld.training.teacher import TeacherLogits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows, classes", [(64, 100), (256, 1000), (64, 32_000), (16, 128_256)])
def test_the_loss_against_its_formulas(rows, classes, dtype, tolerance):
    student = torch.stack([torch.randperm(classes, device="cuda") for _ in range(rows)]).to(dtype) / classes * 20
    teacher, target = (
        (4 * torch.randn(rows, classes, device="cuda")).to(dtype),
        torch.randint(classes, (rows,), device="cuda"),
    )
    # only equal logits at the edge of the selection could be chosen differently: give the upper ones room
    student.scatter_(1, student.topk(8).indices, torch.arange(40, 24, -2, device="cuda", dtype=dtype).expand(rows, -1))
    loss, z = LDRLD(), student.clone().requires_grad_()
    assert choose("auto", student, teacher, 7) is kernel
    value = loss(z, teacher, target)
    gradient = torch.autograd.grad(value, z)[0].double()
    loss.backend, wide = "plain", student.double().requires_grad_()
    plain = loss(wide, teacher.double(), target)
    exact = torch.autograd.grad(plain, wide)[0]
    assert abs(value / plain - 1) < 1e-4 and (gradient - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("compiled", [False, True])
def test_a_cohort_learns(compiled):
    digits, students = data.load("digits"), []
    for name in ("ce", "ldrld"):
        torch.manual_seed(0)
        students.append(
            Student(
                models.build("resnet8", 10).cuda(),
                losses.build(name, **({"depth": 10} if name == "ldrld" else {})),
                "onecycle",
                0.1,
                compiled=compiled,
            )
        )
    teacher = lambda index, crop, x: 8 * torch.nn.functional.one_hot(digits.train_labels.cuda()[index], 10).float()
    *_, last = train_together(students, digits, teacher, epochs=6, dtype=torch.bfloat16)
    assert all(row["test_accuracy"] > 80 for row in last)


def test_a_table_that_is_held(tmp_path):
    digits = data.load("digits")
    crops, network = (
        Crops(digits.train_images[:100], digits.mean, digits.std, 1, True, "cuda"),
        models.build("resnet8", 10).cuda(),
    )
    table = TeacherLogits(network, crops, 10, tmp_path / "t.bin", batch_size=4096, resident=True)
    index, crop = torch.arange(100, device="cuda"), torch.arange(100, device="cuda") % crops.per_image
    table.ahead(index, crop)
    assert table.held.is_cuda
    torch.testing.assert_close(table(index, crop), TeacherLogits(network, crops, 10)(index, crop), rtol=1e-2, atol=1e-2)


def test_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    short = {"dataset": "digits", "recipe": "onecycle", "lr": 0.1, "epochs": 2}
    record = runner.run(
        RunConfig(model="resnet8", loss="kd", teacher="resnet8", **short), "t", keep=("logits",), report=None
    )
    assert record.machine["gpu"] and len(record.history) == 2


@pytest.mark.parametrize("name", [*METHODS, *(f"LDRLD, {v}" for v in VARIANTS if v != "LDRLD")])
def test_a_method_trains(tmp_path_factory, name, monkeypatch):
    """Generators, memories and parts are where the images are."""
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path_factory.getbasetemp() / "methods"))
    short = dict(recipe="onecycle", epochs=2, lr=0.02)
    p = Profile(
        name="t", data="digits", dataset="digits", pairs=(("resnet14", "resnet8"),), teacher=short, student=short
    )
    record = runner.run(
        method_config(p, p.pairs[0], METHODS[name] if name in METHODS else VARIANTS[name.removeprefix("LDRLD, ")]),
        "t",
        report=None,
    )
    assert record.machine["gpu"] and all(
        torch.tensor(list(row["terms"].values())).isfinite().all() for row in record.history
    )
