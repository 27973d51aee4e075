"""The guide to Lightning: the teacher stays out, gradients do not depend on the pieces, and training resumes."""

import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch

from ldrld import losses

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning not installed"),
    # a warning of Lightning's own class makes pytest-xdist import Lightning where torchvision's fix is not in place
    pytest.mark.filterwarnings("ignore"),
]
GUIDE = Path(__file__).parent.parent / "nbs" / "tutorials" / "lightning.ipynb"
DEFINITIONS = ("import tempfile", "digits = ", "class Distillation", "class Recorded", "class Accumulated")


@pytest.fixture(scope="module")
def guide():
    """What the guide defines, from its own cells, with an untrained teacher; without what those cells then train."""
    # lets lightning import a torchvision whose build does not match torch's
    import ldrld.core.torchvision  # noqa: F401

    made, threads = {}, torch.get_num_threads()
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel("ERROR")
    for cell in json.loads(GUIDE.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if source.startswith(DEFINITIONS):
            lines = source.partition("\nwhole = ")[0].partition("\nright = ")[0]
            exec(compile(lines, f"cell {cell['id']}", "exec"), made)
    torch.set_num_threads(threads)
    made["teacher"] = made["perceptron"](16, seed=5)
    yield made
    made["place"].cleanup()


def partly_labelled(guide):
    """The images with labels of which the first micro-batches have few."""
    labels = guide["train"].tensors[1].clone()
    labels[:14] = -100
    return guide["TensorDataset"](guide["train"].tensors[0], labels)


@pytest.mark.parametrize("name", ["ldrld", "kd", "dkd", "ttm"])
def test_a_step_does_not_depend_on_the_pieces(guide, name, monkeypatch):
    args = {"depth": 10} if name == "ldrld" else {}
    rows, loss = partly_labelled(guide), losses.build(name, **args)
    whole = guide["gradient"](rows, 1, criterion=loss)
    for piece in (1, 5, 8, 32):
        monkeypatch.setattr(guide["Accumulated"], "piece", piece)
        found = guide["gradient"](rows, 1, guide["Accumulated"], criterion=loss)
        assert guide["difference"](found, whole) < 1e-5
    means = guide["gradient"](rows, 4, criterion=loss, accumulate_grad_batches=4)
    assert guide["difference"](means, whole) > 0.01
    every = guide["gradient"](guide["train"], 4, criterion=loss, accumulate_grad_batches=4)
    assert guide["difference"](every, guide["gradient"](guide["train"], 1, criterion=loss)) < 1e-5


def test_the_teacher_is_no_part_of_the_module(guide):
    teacher = guide["perceptron"](16, seed=5).train()
    model = guide["Distillation"](guide["perceptron"](8, seed=1), teacher, losses.build("kd"))
    model.train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert {name.partition(".")[0] for name in model.state_dict()} == {"student"}
    assert len(list(model.parameters())) == 4
    optimized = model.configure_optimizers().param_groups[0]["params"]
    assert {id(p) for p in optimized} == {id(p) for p in model.student.parameters()}


def test_an_interrupted_training_resumes_with_the_same_weights(guide, tmp_path):
    def fit(epochs, **more):
        torch.manual_seed(0)
        model = guide["Distillation"](guide["perceptron"](8, seed=1), guide["teacher"], losses.build("ldrld", depth=10))
        run = guide["trainer"](max_epochs=epochs)
        run.fit(model, guide["loader"](guide["train"], 64), **more)
        return model, run

    whole, _ = fit(2)
    _, run = fit(1)
    run.save_checkpoint(tmp_path / "last.ckpt")
    parts, _ = fit(2, ckpt_path=tmp_path / "last.ckpt")
    for a, b in zip(whole.student.parameters(), parts.student.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_terms_are_logged_and_add_up(guide):
    model = guide["Distillation"](guide["perceptron"](8, seed=1), guide["teacher"], losses.build("ldrld", depth=5))
    rows = torch.utils.data.Subset(guide["train"], range(16))
    x, y = (t[:16] for t in guide["train"].tensors)
    expected = model.criterion(model.student(x), guide["teacher"](x), y).item()
    run = guide["trainer"](max_steps=1)
    run.fit(model, guide["loader"](rows, 16))
    terms = {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("train/")}
    assert set(terms) == {"train/ce", "train/pairs", "train/llki", "train/rntk"}
    assert sum(terms.values()) == pytest.approx(expected, rel=1e-5)
