"""The trainer of the guide to Hugging Face: one step is the same in any number of micro-batches and processes."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from ldrld import losses

missing = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")
GUIDE = Path(__file__).parent.parent / "nbs" / "tutorials" / "hugging_face.ipynb"
DEFINITIONS = (
    "import tempfile",
    "def llama",
    "torch.manual_seed(0)\ndata =",
    "class DistillationTrainer",
    "folder = ",
    "class ObviousTrainer",
    "class Plain",
)


@pytest.fixture(scope="module")
def guide():
    "What the guide defines, from its own cells."
    # lets transformers import a torchvision whose build does not match torch's
    import ldrld.core.torchvision  # noqa: F401

    made = {}
    threads = torch.get_num_threads()
    for cell in json.loads(GUIDE.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if source.startswith(DEFINITIONS):
            exec(compile(source, f"cell {cell['id']}", "exec"), made)
    torch.set_num_threads(threads)
    yield made
    made["folder"].cleanup()


def relative(gradient, whole):
    return ((gradient - whole).norm() / whole.norm()).item()


@pytest.mark.parametrize("name", ["ldrld", "kd", "dkd", "ttm"])
def test_a_step_does_not_depend_on_the_number_of_micro_batches(guide, name):
    loss = losses.build(name)
    whole_loss, whole = guide["one_step"](guide["DistillationTrainer"], 1, loss=loss)
    for steps in (2, 4, 8):
        value, gradient = guide["one_step"](guide["DistillationTrainer"], steps, loss=loss)
        assert value == pytest.approx(whole_loss, rel=1e-4)  # older versions log four digits
        assert relative(gradient, whole) < 1e-5
        value, gradient = guide["one_step"](guide["ObviousTrainer"], steps, loss=loss)
        mean, divided = guide["one_step"](guide["ObviousTrainer"], steps, loss=loss, model_accepts_loss_kwargs=False)
        assert value / whole_loss == pytest.approx(steps, rel=0.15)
        assert value / mean == pytest.approx(steps, rel=1e-4) and relative(gradient, steps * divided) < 1e-5
        assert relative(divided, whole) > 0.01  # sequences of different length: a mean of means


def test_a_forward_without_kwargs(guide):
    _, whole = guide["one_step"](guide["DistillationTrainer"], 1)
    step = lambda **attributes: guide["one_step"](guide["DistillationTrainer"], 4, guide["Plain"], **attributes)[1]
    assert relative(step(), whole) < 1e-5
    assert 0.01 < relative(step(model_accepts_loss_kwargs=False), whole) < 0.5


def trainer(guide, **settings):
    "A trainer for one student and the whole batch."
    arguments = guide["TrainingArguments"](
        guide["folder"].name, report_to="none", disable_tqdm=True, use_cpu=True, **settings
    )
    made = guide["DistillationTrainer"](
        guide["llama"](1, seed=1),
        arguments,
        data_collator=guide["collate"],
        train_dataset=guide["data"],
        eval_dataset=guide["data"],
        teacher=guide["teacher"],
        loss=losses.build("ldrld"),
    )
    made.remove_callback(guide["PrinterCallback"])
    return made


def test_the_mean_over_processes_is_the_whole_batch(guide, monkeypatch):
    "Each process has its own sequences and the number of tokens of all; gradients are averaged over processes."
    made = trainer(guide)
    n = torch.tensor(guide["tokens_that_count"])
    whole = made.compute_loss(made.model, guide["batch"], num_items_in_batch=n)
    monkeypatch.setattr(type(made.accelerator), "num_processes", property(lambda self: 2))
    parts = [
        made.compute_loss(made.model, guide["collate"](guide["data"][k::2]), num_items_in_batch=n) for k in range(2)
    ]
    torch.testing.assert_close(sum(parts) / 2, whole)
    made.args.average_tokens_across_devices = False  # then each process counts its own
    own = made.compute_loss(made.model, guide["batch"], num_items_in_batch=n)
    torch.testing.assert_close(own, whole)


def test_evaluation(guide):
    made = trainer(guide, per_device_eval_batch_size=8)
    with torch.no_grad():
        expected = made.compute_loss(made.model.eval(), guide["batch"]).item()
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert not made.teacher.training


def test_training_lowers_the_loss(guide):
    made = trainer(
        guide,
        max_steps=20,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
    )
    before = {name: value.clone() for name, value in made.teacher.state_dict().items()}
    made.train()
    logged = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(logged) == 20 and logged[-1] < 0.9 * logged[0]
    assert all(torch.equal(value, before[name]) for name, value in made.teacher.state_dict().items())
