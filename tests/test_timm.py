"""Networks from timm: names, where they can be used, and the guide's task; what needs timm is skipped without it."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from ldrld import RunConfig, losses, models
from ldrld.experiments import runner
from ldrld.experiments.catalog import EXPERIMENTS, selected
from ldrld.experiments.config import name_of
from ldrld.experiments.profiles import OTHERS, PROFILES, profile
from ldrld.models.timm_networks import canonical_timm, split_name, stages_of
from ldrld.training.recipes import RECIPES, optimizer_for, schedule

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm not installed")
NATIVE = "timm:vit_tiny_patch16_224,embed_dim=32,depth=2,num_heads=2,img_size=16,patch_size=8"


@pytest.fixture
def without_timm(monkeypatch):
    """A process in which timm cannot be found."""
    find = importlib.util.find_spec
    hidden = lambda name, *more: None if name == "timm" else find(name, *more)
    monkeypatch.setattr("ldrld.models.timm_networks.find_spec", hidden)
    monkeypatch.setattr("ldrld.models.find_spec", hidden)


# ---- without timm ---------------------------------------------------------------------------------------------------


def test_a_name_and_its_arguments():
    assert split_name("timm:a, x=1,y=0.5, z=True ,w=avg") == ("a", {"x": 1, "y": 0.5, "z": True, "w": "avg"})
    for wrong, said in (("timm:a,b", "'b' is not an argument"), ("timm:a,pretrained=True", "weights come from a file")):
        with pytest.raises(ValueError, match=said):
            models.canonical(wrong)


def test_equal_networks_have_one_name(without_timm):
    assert canonical_timm("timm:a,y=1,x=2") == canonical_timm("timm:a, x=2, y=1") == "timm:a,x=2,y=1"
    runs = [RunConfig(dataset="digits", model=name) for name in ("timm:a,y=1,x=2", "timm:a,x=2,y=1")]
    assert runs[0] == runs[1]
    assert name_of(runs[0]) == name_of(runs[1]) and not set(name_of(runs[0])) & set(":,= ")


def test_without_timm_networks_say_what_to_install(without_timm):
    for name in ("vit_mini", "mixer_mini", "timm:resnet18"):
        assert models.canonical(name) == name and name not in models.available()
        with pytest.raises(ModuleNotFoundError, match=r'pip install "ldrld\[timm\]"'):
            models.build(name, 10)
    run = RunConfig(dataset="digits", model="resnet8", loss="kd", teacher="vit_mini", epochs=1)
    with pytest.raises(ModuleNotFoundError, match="vit_mini.*pip install"):  # before the teacher is trained
        runner.run(run, report=None)


def test_without_timm_a_batch_says_so_before_it_starts(without_timm, tmp_path, monkeypatch):
    from ldrld.batch.preflight import needs_of

    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    runs = [RunConfig(dataset="digits", model="resnet8", loss="kd", teacher="vit_mini", epochs=1)]
    assert [line for line in needs_of(runs, [], "t") if "vit_mini" in line and "pip install" in line]


@pytest.mark.parametrize("loss", ["fitnet", "rkd", "simkd", "dhkd", "blockkd", "sdd"])
def test_losses_on_features_are_refused_by_name(loss):
    for student, teacher in (("mixer_mini", "resnet14"), ("resnet8", "timm:deit_tiny_patch16_224")):
        with pytest.raises(ValueError, match=f"'{loss}'.*'ofa'") as caught:
            RunConfig(dataset="digits", model=student, teacher=teacher, loss=loss)
        assert models.canonical(student if student != "resnet8" else teacher) in str(caught.value)
    assert RunConfig(dataset="digits", model="mixer_mini", teacher="resnet14", loss="ofa").loss == "ofa"


def test_where_stages_end():
    assert stages_of([16] * 12) == ([1, 3, 9, 11], True)  # deit_tiny, vit_small and mixer_b16 in OFA-KD's code
    assert stages_of([16] * 4) == ([0, 1, 3], True) and stages_of([8, 16, 32]) == ([0, 1, 2], False)
    assert stages_of([2, 4, 8, 16, 32]) == ([1, 2, 3, 4], False) and stages_of([8]) == ([0], False)


def test_the_experiment_is_run_only_when_asked_for():
    for p in PROFILES.values():
        assert "heterogeneous" not in selected(p)
        plan = EXPERIMENTS["heterogeneous"].plan(p)
        assert set(plan["method"]) == {"CE", "KD", "DKD", "LDRLD", "OFA-KD"}
        for teacher, student in set(zip(plan["teacher"], plan["student"])):
            assert models.returns_features(teacher) + models.returns_features(student) == 1
    used = {name for p in PROFILES.values() for pair in p.pairs for name in pair}
    assert all(models.returns_features(name) for name in used), "make reproduce needs no timm"


def test_the_field_s_setting_is_a_profile_of_its_own(without_timm):
    assert "transformers" in OTHERS and not set(OTHERS) & set(PROFILES)
    p = profile("transformers")
    assert "different experiment" in p.needs and "GPU" in p.needs and "timm" in p.needs
    configs = [c for c in EXPERIMENTS["different_architecture"].plan(p)["config"] if c]
    settings = {(c.recipe, c.epochs, c.batch_size, c.lr, c.weight_decay) for c in configs}
    assert settings == {("deit", 300, 128, 5e-4, 0.05)}
    assert {c.teacher.lr for c in configs if c.teacher} == {0.05}


# ---- with timm ------------------------------------------------------------------------------------------------------


@needs_timm
@pytest.mark.parametrize("name", ["vit_mini", "mixer_mini", NATIVE, "timm:resnet18", "timm:deit_tiny_patch16_224"])
def test_a_network_has_our_interface(name):
    torch.manual_seed(0)
    model, x = models.build(name, 7).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        logits, maps = model(x, features=True)
        torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-5)
    assert logits.shape == (2, 7) and model.head.out_features == 7
    assert all(m.shape[0] == 2 and m.ndim == 4 for m in maps.stages)
    assert maps.tokens == (name != "timm:resnet18") and len({m.shape for m in maps.stages}) == 1 or not maps.tokens
    torch.manual_seed(0)
    again = models.build(name, 7).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


@needs_timm
def test_wrong_names_and_arguments():
    with pytest.raises(ValueError, match="timm:vit_tiny_patch16_224"):
        models.build("timm:vit_tiny_patch16_22", 10)
    with pytest.raises(ValueError, match="cannot build it with these arguments.*bogus"):
        models.build("timm:vit_tiny_patch16_224,bogus=1", 10)


@needs_timm
def test_images_are_resized_to_a_fixed_input_size():
    model, x = models.build("vit_mini", 3).eval(), torch.randn(2, 3, 16, 16)
    large = torch.nn.functional.interpolate(x, (32, 32), mode="bicubic")
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(large))


@needs_timm
def test_prepare_refuses_stage_maps_by_name():
    student, teacher, x = models.build("mixer_mini", 10), models.build("resnet8", 10).eval(), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="TimmNetwork returns StageMaps"):
        losses.build("fitnet").prepare(student, teacher, x)


@needs_timm
@pytest.mark.parametrize("pair", [(NATIVE, "resnet8"), ("resnet8", NATIVE)], ids=["student", "teacher"])
@pytest.mark.parametrize("loss", ["ldrld", "ofa"])
def test_a_run_trains_resumes_and_is_recorded(tmp_path, monkeypatch, pair, loss):
    torch.set_num_threads(1)
    config = RunConfig(
        dataset="digits",
        model=pair[0],
        loss=loss,
        loss_args={"depth": 10} if loss == "ldrld" else {},
        teacher={"model": pair[1], "epochs": 1},
        recipe="deit",
        epochs=2,
        train_share=0.2,
    )
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    whole = runner.run(config, "whole", keep=("weights", "logits"), report=None)
    assert whole.config == config and whole.config.model == models.canonical(pair[0])
    monkeypatch.setenv("LDRLD_DEADLINE", "1")  # long past: paused after every epoch
    with pytest.raises(runner.Paused):
        runner.run(config, "parts", report=None)
    record = runner.run(config, "parts", report=None)
    strip = lambda r: [{k: v for k, v in row.items() if k != "seconds"} for row in r.history]
    assert strip(record) == strip(whole) and record.measures == whole.measures
    assert (whole.measures["extra_parameters"] > 0) == (loss == "ofa")
    card = next((tmp_path / "data" / "teachers" / "whole").rglob(f"{whole.name}.md")).read_text()
    assert "knows no network" not in card and f'models.build("{config.model}", 10)' in card


# ---- the guide ------------------------------------------------------------------------------------------------------


@needs_timm
def test_the_guide_s_task_on_soft_targets_and_other_losses():
    """Mixup's targets are probabilities: labels are timm's business, the relations need none."""
    import ldrld.core.torchvision  # noqa: F401
    import timm
    from timm.loss import SoftTargetCrossEntropy

    guide = Path(__file__).parent.parent / "nbs" / "tutorials" / "timm.ipynb"
    cells = ["".join(c["source"]) for c in json.loads(guide.read_text(encoding="utf-8"))["cells"]]
    made = {"torch": torch}
    exec(next(c for c in cells if "class RelationTask" in c), made)
    torch.manual_seed(0)
    small = dict(num_classes=10, img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    student, teacher = (timm.create_model("vit_tiny_patch16_224", **small) for _ in range(2))
    settings = dict(task_loss_weight=0.5, verbose=False, relations=losses.build("ldrld", depth=10))
    task = made["RelationTask"](student, teacher, SoftTargetCrossEntropy(), **settings).train()
    assert not task.teacher.training and student.training
    x, soft = torch.randn(4, 3, 16, 16), torch.rand(4, 10).softmax(1)
    result = task(x, soft)
    torch.testing.assert_close(result["loss"], 0.5 * result["task_loss"] + 0.5 * result["kd_loss"])
    result["loss"].backward()
    assert all(p.grad is not None for p in student.parameters()) and all(p.grad is None for p in teacher.parameters())
    task.relations = losses.build("dkd")
    with pytest.raises(ValueError, match="target must be given for 'dkd'"):
        task(x, soft)


def test_adamw_is_not_replaced_by_sgd():
    """A loop that builds its own optimiser must not train `deit` with SGD unnoticed."""
    weights = [torch.zeros(2, 2, requires_grad=True)]
    with pytest.raises(ValueError, match="'deit' needs AdamW.*got SGD"):
        schedule(torch.optim.SGD(weights, 0.1), "deit", 2, 3)
    for recipe in RECIPES:
        optimizer = optimizer_for([("w", weights[0])], recipe, 0.1, 0.9, 0.05)
        schedule(optimizer, recipe, 2, 3)
        assert type(optimizer).__name__ == ("AdamW" if recipe == "deit" else "SGD")
