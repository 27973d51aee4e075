"""Teachers' model cards, messages for files that do not match them, and teachers from files."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

import commands

from ldrld import data, models
from ldrld.core import paths
from ldrld.core.files import sha256_of
from ldrld.experiments import model_cards, records, runner
from ldrld.experiments.config import Pretrained, RunConfig, file_of, name_of, pretrained
from ldrld.experiments.records import KEPT

ROOT = Path(__file__).parent.parent
SHORT = {"dataset": "digits", "recipe": "onecycle", "lr": 0.1, "epochs": 2, "precision": "float32"}
TEACHER = RunConfig(model="resnet8", **SHORT)


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path / "out"))
    torch.set_num_threads(1)
    return tmp_path / "out"


@pytest.fixture
def teacher(out):
    """The record of a teacher that a run has just left in profile t."""
    return runner.run(TEACHER, "t", keep=("weights",), report=None)


def checkpoint_at(path, model="resnet8", classes=10, seed=0):
    torch.manual_seed(seed)
    torch.save({"epoch": 240, "model": models.build(model, classes).state_dict()}, path)
    return path


def ldrld(*words, out=None, **env):
    """Exit status, and everything that is printed."""
    where = {"LDRLD_OUT": str(out)} if out else {}
    got = commands.ldrld(*words, OMP_NUM_THREADS="1", COLUMNS="400", **where, **env)
    assert "Traceback" not in got.stderr, got.stderr
    return got.returncode, got.stdout + got.stderr


def wrong(profile="t", check=False):
    return sum(model_cards.listed(profile, check)["wrong"], [])


# ---- what is committed ------------------------------------------------------------------------------------------

PROFILES = [p for p in ("quick", "small", "paper") if (ROOT / "data" / "teachers" / p).is_dir()]


@pytest.mark.parametrize("profile", PROFILES)
def test_committed_teachers_are_what_their_cards_say(profile, monkeypatch):
    monkeypatch.setenv("LDRLD_OUT", str(ROOT))
    assert len(model_cards.listed(profile)) and not wrong(profile)


def test_committed_glyph_teachers_still_reach_what_their_records_say(monkeypatch):
    monkeypatch.setenv("LDRLD_OUT", str(ROOT))
    table = model_cards.listed("quick", check=True)
    assert table["measured, %"].notna().all() and not sum(table["wrong"], [])
    assert (table["measured, %"] - table["last epoch, %"]).abs().max() < model_cards.HALF


def test_no_committed_file_is_larger_than_the_cards_say():
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "-co", "--exclude-standard"], capture_output=True, text=True
    ).stdout.split("\0")
    large = [
        name
        for name in listed
        if name and (ROOT / name).is_file() and (ROOT / name).stat().st_size > model_cards.LARGEST
    ]
    assert not large, (
        f"larger than {model_cards.LARGEST // 10**6} MB, not to be committed; name them in .gitignore: {large}"
    )


def test_gitignore_names_the_networks_whose_weights_are_too_large():
    """And no others: by size in half precision, 100 classes."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    for network in models.available():
        with torch.device("meta"):
            size = 2 * sum(v.numel() for v in models.build(network).state_dict().values())
        name = name_of(RunConfig(dataset="cifar100", model=network))
        ignored = (
            subprocess.run(
                ["git", "-C", ROOT, "check-ignore", "-q", f"data/teachers/paper/{name}.safetensors"]
            ).returncode
            == 0
        )
        card = (
            subprocess.run(["git", "-C", ROOT, "check-ignore", "-q", f"data/teachers/paper/{name}.md"]).returncode == 0
        )
        assert ignored == (size > model_cards.LARGEST) and not card, f"{network}: {size:,} bytes in half precision"


# ---- cards ------------------------------------------------------------------------------------------------------


def test_a_run_that_keeps_weights_leaves_a_card(teacher):
    place = model_cards.card_path(teacher.name, "t")
    text, card = place.read_text(encoding="utf-8"), model_cards.read_card(place)
    weights = KEPT["weights"](teacher.name, "t")
    assert (
        card["sha256"] == sha256_of(weights)
        and card["bytes"] == weights.stat().st_size
        and card["committed"]
        and card["loads"]
    )
    assert card["accuracy_last_epoch"] == round(teacher.last_accuracy, 2) and card["accuracy_best_epoch"] == round(
        teacher.best_accuracy, 2
    )
    assert abs(card["accuracy_stored_file"] - teacher.last_accuracy) <= 0.5 and card["published"] is None
    assert (
        place.parent / f"../../runs/t/{teacher.name}.json"
    ).resolve().exists() and f"(../../runs/t/{teacher.name}.json)" in text
    assert "chosen on test data" in text and not wrong(check=True)


def test_the_line_that_loads_it_works(teacher):
    code = model_cards.card_path(teacher.name, "t").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    scope = {}
    exec(code, scope)
    stored = models.load_weights(models.build("resnet8", 10), KEPT["weights"](teacher.name, "t")).state_dict()
    assert (
        all(torch.equal(v, stored[k]) for k, v in scope["teacher"].state_dict().items())
        and not scope["teacher"].training
    )


def test_a_card_without_the_images_says_not_measured(teacher, monkeypatch):
    place = model_cards.card_path(teacher.name, "t")
    place.unlink()
    monkeypatch.setattr(data, "load", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError("not here")))
    assert model_cards.write_missing("t") == [place]
    assert model_cards.read_card(place)[
        "accuracy_stored_file"
    ] is None and "| accuracy of this file | not measured |" in place.read_text(encoding="utf-8")
    assert not wrong(check=True) and model_cards.listed("t", check=True)["measured, %"].isna().all()


def test_a_card_that_is_there_is_unchanged(teacher):
    place = model_cards.card_path(teacher.name, "t")
    place.write_text(place.read_text(encoding="utf-8") + "\na remark of mine\n", encoding="utf-8")
    assert (
        model_cards.write_missing("t") == [] and "a remark of mine" in place.read_text(encoding="utf-8") and not wrong()
    )


def test_weights_made_again_get_their_card_again(teacher):
    place = model_cards.card_path(teacher.name, "t")
    before = place.read_bytes()
    KEPT["weights"](teacher.name, "t").unlink()
    assert "is missing" in wrong()[0]
    place.write_text("---\nold: 1\n---\n", encoding="utf-8")
    runner.run(TEACHER, "t", keep=("weights",), report=None)
    assert place.read_bytes() == before


def test_what_is_wrong_is_reported(teacher):
    place, weights = model_cards.card_path(teacher.name, "t"), KEPT["weights"](teacher.name, "t")
    text, good = place.read_text(encoding="utf-8"), weights.read_bytes()
    place.write_text(
        text.replace(f"accuracy_last_epoch: {teacher.last_accuracy:.2f}", "accuracy_last_epoch: 99.0"), encoding="utf-8"
    )
    assert "accuracy_last_epoch: 99.0" in wrong()[0]
    for damage in ("", "---", "no card", "---\n: [\n---\n", "---\n- 1\n---\n"):
        place.write_text(damage, encoding="utf-8")
        assert "is not a card" in wrong()[0]
    place.unlink()
    assert "--write" in wrong()[0]
    weights.write_bytes(good[:-2])
    assert model_cards.write_missing("t") == [] and wrong()
    place.write_text(text, encoding="utf-8")
    assert "SHA-256" in wrong()[0] and model_cards.listed("t")["card"].item() == "other bytes"
    weights.write_bytes(good)
    (paths.records("t") / f"{teacher.name}.json").unlink()
    assert not wrong(check=True), "the card alone says what is needed"
    place.unlink()
    assert "neither card nor record" in wrong()[0]


def test_other_weights_under_a_card_of_their_own_are_found_by_their_accuracy(teacher):
    """What a checksum cannot see: the card fits the file, but the file is not what the record tells of."""
    untrained(teacher)
    model_cards.card_path(teacher.name, "t").unlink()
    assert model_cards.write_missing("t") and "more than half precision explains" in wrong()[0]
    with pytest.raises(ValueError, match="more than half precision explains; fetch it again"):
        model_cards.checked_weights(teacher.name, "t")
    place = model_cards.card_path(teacher.name, "t")
    card = model_cards.read_card(place)
    stored = f"accuracy_stored_file: {card['accuracy_stored_file']}"
    assert stored in (text := place.read_text(encoding="utf-8"))
    place.write_text(text.replace(stored, "accuracy_stored_file: null"), encoding="utf-8")
    assert not wrong() and "more than half precision explains" in wrong(check=True)[0]


def untrained(teacher):
    """The file of a teacher, replaced by a network that has learnt nothing."""
    weights = KEPT["weights"](teacher.name, "t")
    torch.manual_seed(1)
    models.save_weights(models.build("resnet8", 10).half(), weights, models.read_metadata(weights))


def flip_a_bit(teacher):
    content = bytearray((path := KEPT["weights"](teacher.name, "t")).read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def exchange_4_kb(teacher):
    content = (path := KEPT["weights"](teacher.name, "t")).read_bytes()
    path.write_bytes(content[:20_000] + content[24_096:28_192] + content[24_096:])


def cut(teacher):
    (path := KEPT["weights"](teacher.name, "t")).write_bytes(path.read_bytes()[:-2])


def empty(teacher):
    KEPT["weights"](teacher.name, "t").write_bytes(b"")


def another_epoch(teacher):
    """Weights that are as good as these, but are others."""
    model = models.load_weights(models.build("resnet8", 10), path := KEPT["weights"](teacher.name, "t"))
    with torch.no_grad():
        model.fc.bias += 1e-3
    models.save_weights(model.half(), path, models.read_metadata(path))


STUDENT = RunConfig(model="resnet8", loss="kd", teacher=TEACHER, seed=1, **SHORT)


@pytest.mark.parametrize("damage", [flip_a_bit, exchange_4_kb, untrained, cut, empty, another_epoch])
def test_no_student_learns_from_other_weights_than_the_cards(damage, teacher, out):
    weights, good = KEPT["weights"](teacher.name, "t"), KEPT["weights"](teacher.name, "t").read_bytes()
    before = sha256_of(weights)
    damage(teacher)
    told = f"{weights.name}: its SHA-256 is {sha256_of(weights)[:10]}…, its card says {before[:10]}….*fetch it again"
    with pytest.raises(ValueError, match=told):
        runner.run(STUDENT, "t", report=None)
    with pytest.raises(ValueError, match=told):
        runner.run(TEACHER, "t", keep=("logits",), report=None)
    assert len(list(paths.records("t").glob("*.json"))) == 1 and not KEPT["logits"](teacher.name, "t").exists(), (
        "nothing came of it"
    )
    assert model_cards.wrong_teachers("t") and ldrld("teachers", "--profile", "t", out=out)[0] == 1
    weights.write_bytes(good)
    assert runner.run(STUDENT, "t", report=None).teacher == teacher.name and not model_cards.wrong_teachers("t")


def test_the_advice_of_the_error_works(teacher):
    flip_a_bit(teacher)
    for path in (KEPT["weights"](teacher.name, "t"), model_cards.card_path(teacher.name, "t")):
        path.unlink()
    assert runner.run(STUDENT, "t", report=None).teacher == teacher.name and not wrong(check=True)


def test_weights_without_a_card_are_measured_before_use(teacher):
    """From before there were cards, or after somebody has deleted one."""
    place = model_cards.card_path(teacher.name, "t")
    text = place.read_text(encoding="utf-8")
    place.unlink()
    assert (
        model_cards.checked_weights(teacher.name, "t") == KEPT["weights"](teacher.name, "t")
        and place.read_text(encoding="utf-8") == text
    )
    place.unlink()
    untrained(teacher)
    with pytest.raises(ValueError, match="has no card, and reaches .*damaged or exchanged; move .* away"):
        runner.run(STUDENT, "t", report=None)
    assert not place.exists()


def test_weights_of_unknown_origin_are_rejected(teacher, monkeypatch):
    weights, place = KEPT["weights"](teacher.name, "t"), model_cards.card_path(teacher.name, "t")
    with pytest.raises(FileNotFoundError, match="no such file; run glyphs-x again"):
        model_cards.checked_weights("glyphs-x", "t")
    text = place.read_text(encoding="utf-8")
    place.write_text("---\nsha256: 0\n---\n", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a card, or was damaged"):
        runner.run(STUDENT, "t", report=None)
    place.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_cards, "images_of", lambda *_: data.load("glyphs-10"))
        with pytest.raises(ValueError, match="the images of digits have changed since"):
            model_cards.checked_weights(teacher.name, "t")
    (paths.records("t") / f"{teacher.name}.json").unlink()
    with pytest.raises(ValueError, match="neither card nor record"):
        model_cards.checked_weights(teacher.name, "t")
    place.write_text(text, encoding="utf-8")
    assert model_cards.checked_weights(teacher.name, "t") == weights, "the card alone says what is needed"


def test_verify_checks_the_teachers(out):
    """Of the committed profile, in a copy with one table: one flipped bit in a teacher's weights, and nothing else."""
    for kind in ("runs", "teachers"):
        shutil.copytree(ROOT / "data" / kind / "quick", out / "data" / kind / "quick")
    (out / "data" / "tables" / "quick").mkdir(parents=True)
    shutil.copy(ROOT / "data" / "tables" / "quick" / "adw.csv", out / "data" / "tables" / "quick")
    before = ldrld("verify", "--profile", "quick", out=out)[1].splitlines()
    path = next((out / "data" / "teachers" / "quick").glob("glyphs-resnet14-ce-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, said = ldrld("verify", "--profile", "quick", out=out)
    (new,) = [line for line in said.splitlines() if line not in before and "tables checked" not in line]
    assert code == 1 and f"{path.name}: its SHA-256 is" in new and f"quick: {path.stem}: " in new


def test_a_run_whose_file_is_no_network_of_ours_leaves_a_card_too(out):
    """SimKD leaves the student with the teacher's head behind."""
    record = runner.run(
        RunConfig(model="resnet8", loss="simkd", teacher=TEACHER, **SHORT), "t", keep=("weights",), report=None
    )
    place = model_cards.card_path(record.name, "t")
    card = model_cards.read_card(place)
    assert (
        not card["loads"]
        and card["accuracy_stored_file"] is None
        and "No network of `ldrld.models.build` fits these weights" in place.read_text(encoding="utf-8")
    )
    assert card["parameters"] == record.measures["used_parameters"] and not wrong(check=True)


def test_a_training_that_diverged_leaves_record_and_card(out):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            model_cards,
            "measured",
            lambda *_: (_ for _ in ()).throw(models.WeightsError("infinite or missing numbers")),
        )
        record = runner.run(TEACHER, "t", keep=("weights",), report=None)
    assert model_cards.read_card(model_cards.card_path(record.name, "t"))["accuracy_stored_file"] is None


def test_large_weights_are_not_missed_where_they_are_not(teacher, monkeypatch):
    place, weights = model_cards.card_path(teacher.name, "t"), KEPT["weights"](teacher.name, "t")
    monkeypatch.setattr(model_cards, "LARGEST", 1_000_000 // 100)
    place.unlink()
    model_cards.write_missing("t")
    assert "not committed: larger than" in place.read_text(encoding="utf-8")
    weights.unlink()
    assert not wrong(check=True) and model_cards.listed("t")["card"].item() == "no file"


def test_published_numbers_stand_on_cards_of_the_paper_profile_only(teacher):
    record = teacher.model_copy(
        update={"config": RunConfig(dataset="cifar100", model="resnet56"), "data": {**teacher.data, "classes": 100}}
    )
    for profile, expected in (("paper", {"value": 72.34, "source": "CRD README"}), ("small", None)):
        file = KEPT["weights"](record.name, profile)
        models.save_weights(models.build("resnet56").half(), file)
        card = model_cards.facts(record, profile)
        assert card["published"] == expected and card["loads"]
        model_cards.write_card(record, profile)
        assert ("72.34 % (CRD README)" in model_cards.card_path(record.name, profile).read_text(encoding="utf-8")) == (
            expected is not None
        )
        assert (
            yaml.safe_load(model_cards.card_path(record.name, profile).read_text(encoding="utf-8").split("---\n")[1])[
                "published"
            ]
            == expected
        )


# ---- teachers that are files --------------------------------------------------------------------------------------


def test_a_checkpoint_compared_with_published_accuracies(tmp_path):
    file = checkpoint_at(tmp_path / "ckpt.pth")
    found = model_cards.checkpoint(file, "digits")
    assert (found["network"], found["classes"], found["sha256"]) == ("resnet8", 10, sha256_of(file)) and not found[
        "disagrees"
    ]
    with pytest.raises(ValueError, match="for 100 classes, and digits has 10"):
        model_cards.checkpoint(checkpoint_at(tmp_path / "c.pth", classes=100), "digits")
    theirs = model_cards.published_accuracy("resnet56")
    assert (
        theirs["value"] == 72.34
        and model_cards.verdict(72.44, theirs)[1] is False
        and model_cards.verdict(72.45, theirs)[1] is True
    )
    assert "CRD README" in model_cards.verdict(None, theirs)[0] and model_cards.verdict(1.0, None)[1] is False


def test_a_student_learns_from_a_file(out, tmp_path):
    given = pretrained(checkpoint_at(tmp_path / "ckpt.pth"))
    assert given.sha256 == sha256_of(tmp_path / "ckpt.pth") and pretrained(tmp_path / "ckpt.pth") == given
    other = pretrained(checkpoint_at(tmp_path / "other.pth", seed=1))
    config = RunConfig(model="resnet8", loss="kd", teacher=given, **SHORT)
    names = {
        name_of(config),
        name_of(config.model_copy(update={"teacher": other})),
        name_of(config.model_copy(update={"teacher": TEACHER})),
    }
    assert len(names) == 3 and RunConfig(**config.model_dump()) == config
    (tmp_path / "ckpt.pth").unlink()  # runs keep a copy
    record, another = (
        runner.run(config, "t", report=None),
        runner.run(config.model_copy(update={"teacher": other}), "t", report=None),
    )
    assert (
        record.config.teacher == given
        and record.teacher == name_of(given)
        and records.load_record(record.name, "t") == record
    )
    assert record.history != another.history and "agreement" in record.measures
    assert [p.stem for p in paths.records("t").glob("*.json")] and not (
        paths.records("t") / f"{name_of(given)}.json"
    ).exists()


def test_a_file_teaches_what_the_same_weights_teach_as_a_trained_teacher(teacher):
    """To the last bit: only the way to the weights differs."""
    given = pretrained(KEPT["weights"](teacher.name, "t"))
    students = [
        runner.run(
            RunConfig(model="resnet8", loss="ldrld", loss_args={"depth": 4}, teacher=t, seed=1, **SHORT),
            "t",
            report=None,
        )
        for t in (TEACHER, given)
    ]
    scores = [[(row["terms"], row["test_accuracy"]) for row in record.history] for record in students]
    assert scores[0] == scores[1] and students[0].name != students[1].name


def test_a_missing_or_exchanged_file_is_reported_and_nothing_is_trained(out, tmp_path):
    given = pretrained(checkpoint_at(tmp_path / "ckpt.pth"))
    config, place = RunConfig(model="resnet8", loss="kd", teacher=given, **SHORT), file_of(given)
    checkpoint_at(place, seed=1)
    with pytest.raises(ValueError, match="has changed since.*--keep"):
        runner.run(config, "t", report=None)
    assert pretrained(tmp_path / "ckpt.pth") == given and file_of(given) == place
    place.unlink()
    with pytest.raises(FileNotFoundError, match="is missing; add the checkpoint: ldrld teachers FILE --keep"):
        runner.run(config, "t", report=None)
    assert not paths.records("t").exists()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"teacher": {"model": "resnet8", "sha256": "0" * 7}}, "sha256"),
        ({"teacher": {"sha256": "0" * 64}}, "model"),
        ({"teacher": {"model": "resnet9", "sha256": "0" * 64}}, "no such network"),
        ({"teacher": {"model": "resnet8", "sha256": "0" * 64, "epochs": 3}}, "trained already"),
        ({"teacher": {"model": "resnet8", "sha256": "0" * 64}, "holdout": 0.1}, "held-out"),
        ({"teacher": {"model": "resnet8", "sha256": "0" * 64}, "loss": "ce"}, "needs none"),
    ],
)
def test_a_wrong_setting_of_a_file_is_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        RunConfig(**{"model": "resnet8", "loss": "kd", **SHORT, **settings})


def test_a_file_is_no_run(out):
    with pytest.raises(ValueError, match="a teacher's file, trained already"):
        runner.run(Pretrained(model="resnet8", sha256="0" * 64), "t")


def test_a_file_for_other_classes_is_refused(out, tmp_path):
    given = pretrained(checkpoint_at(tmp_path / "ckpt.pth", classes=100))
    with pytest.raises(ValueError, match="resnet8 for 100 classes"):
        runner.run(RunConfig(model="resnet8", loss="kd", teacher=given, **SHORT), "t", report=None)


# ---- the command ------------------------------------------------------------------------------------------------


def test_the_command_lists_and_checks(teacher, out):
    assert (
        ldrld("teachers", "--check", out=out) == (0, (said := ldrld("teachers", "--check", out=out)[1]))
        and "same bytes" in said
        and "0 problems" in said
    )
    KEPT["weights"](teacher.name, "t").write_bytes(b"\0" * 100)
    code, said = ldrld("teachers", "--profile", "t", "--check", out=out)
    assert code == 1 and "SHA-256" in said and ldrld("teachers", out=out)[0] == 1
    model_cards.card_path(teacher.name, "t").write_text("not mine", encoding="utf-8")
    code, said = ldrld("teachers", "--check", out=out)
    assert code == 1 and "is not a card" in said and "1 not measured" in said
    code, said = ldrld("teachers", "--profile", "nobody", out=out)
    assert code == 2 and "unknown --profile" in said


def test_the_command_writes_missing_cards(teacher, out):
    model_cards.card_path(teacher.name, "t").unlink()
    code, said = ldrld("teachers", "--write", "--check", out=out)
    assert code == 0 and "written:" in said and model_cards.card_path(teacher.name, "t").exists()


def test_the_command_without_teachers(tmp_path):
    code, said = ldrld("teachers", "--check", out=tmp_path)
    assert code == 0 and "no teacher under" in said


def test_the_command_on_files(out, tmp_path):
    file = checkpoint_at(tmp_path / "ckpt_epoch_240.pth")
    code, said = ldrld("teachers", file, "--data", "digits", "--keep", out=out)
    assert code == 0 and "resnet8, 10 classes" in said and "nothing published" in said and '"sha256": "' in said
    assert file_of(Pretrained(model="resnet8", sha256=sha256_of(file))).exists()
    (tmp_path / "junk.pth").write_bytes(b"junk")
    for wrong_file, why in (("junk.pth", "not a PyTorch checkpoint"), ("nowhere.pth", "no such file")):
        code, said = ldrld("teachers", tmp_path / wrong_file, out=out)
        assert code == 1 and why in said
    assert ldrld("teachers", file, "--check", out=out)[0] == 2 and ldrld("teachers", "--keep", out=out)[0] == 2


@pytest.mark.parametrize("reached, code", [(72.40, 0), (71.0, 1)])
def test_a_checkpoint_that_is_not_the_published_one_is_reported(reached, code, tmp_path, monkeypatch, capsys):
    from ldrld.cli.teachers import compare_files

    monkeypatch.setattr(
        model_cards,
        "images_of",
        lambda *_: data.ImageData(*["stands for CIFAR-100", *[None] * 4, range(100), *[None] * 7]),
    )
    monkeypatch.setattr(model_cards, "measured", lambda *_: reached)
    assert compare_files([checkpoint_at(tmp_path / "ckpt.pth", "resnet56", 100)], "cifar100", keep=False) == code
    assert ("does not agree" if code else ": agrees") in capsys.readouterr().out


def test_a_checkpoint_where_cifar_is_not(tmp_path):
    code, said = ldrld(
        "teachers", checkpoint_at(tmp_path / "ckpt.pth", "resnet56", 100), out=tmp_path, LDRLD_DATA=str(tmp_path)
    )
    assert code == 0 and "not measured: CIFAR-100 is not in" in said and "published: 72.34 % (CRD README)" in said


def test_a_run_from_a_file_on_the_command_line(out, tmp_path):
    file = checkpoint_at(tmp_path / "ckpt.pth")
    words = (
        "run",
        "dataset=digits",
        "model=resnet8",
        "loss=ldrld",
        "loss_args.depth=4",
        f"teacher={file}",
        "recipe=onecycle",
        "lr=0.1",
        "epochs=1",
    )
    code, said = ldrld(*words, out=out)
    assert code == 0 and "after the last epoch" in said
    (record,) = records.records("try")
    assert record.config.teacher.sha256 == sha256_of(file)
    code, said = ldrld(*(w.replace(str(file), str(tmp_path / "nowhere.pth")) for w in words), out=out)
    assert code == 2 and "no such file" in said


@pytest.mark.parametrize(
    "name",
    ["teacher.pth.tar", "teacher.ckpt", "TEACHER.PTH", "teacher", "a teacher's best (1).pth", "resnet8 copy", "0.1"],
)
def test_a_teacher_s_file_may_have_any_name(name, out, tmp_path):
    """What `ldrld teachers` identifies, `ldrld run` takes: the command that the one suggests is carried out by the
    other."""
    file = checkpoint_at(tmp_path / name)
    code, said = ldrld("teachers", file, "--data", "digits", out=out)
    suggested = shlex.split(said.split("to train a student of it: ldrld ")[1].splitlines()[0])
    assert code == 0 and suggested[-1] == f"teacher={file}"
    code, said = ldrld(*suggested, "loss_args.depth=10", "recipe=onecycle", "lr=0.1", "epochs=1", out=out)
    assert code == 0 and records.records("try")[0].config.teacher.sha256 == sha256_of(file), said


def test_what_is_meant_by_a_teacher(tmp_path, monkeypatch):
    from ldrld.cli.run import is_file

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("resnet14", "ResNet-14", "resnt14", "WRN_16_1"):
        assert not is_file(name)
    checkpoint_at(tmp_path / "mine")
    for name in ("mine", "./mine", "~/mine", str(tmp_path / "mine"), "nowhere.ckpt", "folder/nowhere", "."):
        assert is_file(name)
    checkpoint_at(tmp_path / "resnet14")
    with pytest.raises(
        ValueError, match="teacher='resnet14' is a network and also a file here; for the file say teacher=./resnet14"
    ):
        is_file("resnet14")
    assert is_file("./resnet14")


@pytest.mark.parametrize(
    "given, why",
    [
        ("{tmp}", "a folder; name a file in it, such as a.pth"),
        ("{tmp}/nowhere.ckpt", "no such file"),
        ("resnt14", "did you mean"),
        ("{tmp}/other.ckpt", "a network that ldrld does not know .1 tensors: features"),
    ],
)
def test_a_teacher_that_is_none_is_reported_in_a_line(given, why, out, tmp_path):
    checkpoint_at(tmp_path / "a.pth")
    torch.save({"state_dict": {"features.0.weight": torch.zeros(4, 3, 7, 7)}}, tmp_path / "other.ckpt")
    code, said = ldrld(
        "run", "dataset=digits", "model=resnet8", "loss=kd", f"teacher={given.format(tmp=tmp_path)}", out=out
    )
    assert code == 2 and re.search(why, " ".join(said.split())), said
