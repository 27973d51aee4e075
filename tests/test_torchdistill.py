"""The guide to torchdistill: its class takes every loss on logits, and adds up with other terms."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from ldrld import losses
from ldrld.losses.registry import loss_class

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchdistill") is None, reason="torchdistill not installed")
GUIDE = Path(__file__).parent.parent / "nbs" / "tutorials" / "torchdistill.ipynb"


@pytest.fixture(scope="module")
def guide():
    "What the guide defines before it trains, from its own cells."
    # lets torchdistill import a torchvision whose build does not match torch's
    import ldrld.core.torchvision  # noqa: F401

    made, threads = {}, torch.get_num_threads()
    for cell in json.loads(GUIDE.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if source.startswith(("import tempfile", "@register_mid_level_loss", "CONFIG =")):
            exec(compile(source, f"cell {cell['id']}", "exec"), made)
    torch.set_num_threads(threads)
    return made


def outputs(z):
    return {".": {"output": z}, "fc": {"output": 2 * z}}


def test_the_value_is_that_of_the_loss(guide):
    torch.manual_seed(0)
    z_s, z_t, y = torch.randn(6, 10), torch.randn(6, 10), torch.arange(6)
    for name in losses.available("logits"):
        if name.startswith(("my-", "test-")) or loss_class(name).versions != 1:
            continue
        arguments = loss_class(name).alone
        plain, theirs = losses.build(name, **arguments), guide["LogitsOfBoth"](loss=name, **arguments)
        if name in ("ctkd", "wkd", "tekap"):
            continue  # they prepare something, or draw
        torch.testing.assert_close(theirs(outputs(z_s), outputs(z_t), y), plain(z_s, z_t, y))
    hooked = guide["LogitsOfBoth"]("kd", student_module_path="fc")
    torch.testing.assert_close(hooked(outputs(z_s), outputs(z_t), y), losses.build("kd")(2 * z_s, z_t, y))


def test_a_term_with_a_weight_beside_another(guide):
    from torchdistill.losses.registry import get_high_level_loss

    config = guide["configured"](guide["CONFIG"])["criterion"]
    config["kwargs"]["sub_terms"]["distillation"]["weight"] = 0.5
    label = {"is_from_teacher": False, "module_path": ".", "io": "output"}
    config["kwargs"]["sub_terms"]["ce"] = {
        "criterion": {"key": "CrossEntropyLoss", "kwargs": {}},
        "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": {"input": label, "target": {"uses_label": True}}},
        "weight": 2.0,
    }
    torch.manual_seed(0)
    z_s, z_t, y = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10), torch.arange(6)
    value = get_high_level_loss(config)({"student": outputs(z_s), "teacher": outputs(z_t)}, {}, y)
    expected = 0.5 * losses.build("ldrld", depth=10)(z_s, z_t, y) + 2 * torch.nn.functional.cross_entropy(z_s, y)
    torch.testing.assert_close(value, expected)
    assert "ldrld: LDRLD" in str(get_high_level_loss(config))
