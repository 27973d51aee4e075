"""Records as they are found: edited, cut, renamed, copied, in the wrong place. The odd one is named, and the rest
goes on."""

import json
import shutil
import warnings
from pathlib import Path

import pandas as pd
import pytest

from commands import ldrld

from ldrld.core import paths
from ldrld.core.files import write_whole
from ldrld.experiments.catalog import EXPERIMENTS
from ldrld.experiments.profiles import Profile
from ldrld.experiments.config import name_of
from ldrld.experiments.records import OddRecord, load_record, odd_records, records
from ldrld.experiments.records import invented
from ldrld.results import claims, claims_report, claims_verification, statistics, tables, verification

ROOT = Path(__file__).parent.parent
SCHEDULE = dict(recipe="onecycle", epochs=2, lr=0.1)
TOY = Profile(
    name="toy", data="nothing", dataset="digits", pairs=(("resnet14", "resnet8"),), teacher=SCHEDULE, student=SCHEDULE
)
YAML = (
    "data: nothing\ndataset: digits\npairs: [[resnet14, resnet8]]\nteacher: "
    "{recipe: onecycle, epochs: 2, lr: 0.1}\nstudent: {recipe: onecycle, epochs: 2, lr: 0.1}\n"
)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Records of all runs of a table, and the table; their names."""
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    plan = EXPERIMENTS["same_architecture"].plan(TOY)
    for i, config in enumerate(plan["config"]):
        keep(invented(config, round(60 + 1.1 * i + i * i % 5 / 10, 2)))
    save()
    return plan["name"].tolist()


def keep(record):
    write_whole(paths.records("toy") / f"{record.name}.json", record.model_dump_json(indent=1))


def save():
    table = statistics.summarise(statistics.collect("same_architecture", TOY), "same_architecture")
    tables.save_table(table, "same_architecture", tables.caption(table, "Toy", TOY), TOY)


def change(name, how):
    """Edit a record's JSON; the path."""
    path = paths.records("toy") / f"{name}.json"
    given = json.loads(path.read_text())
    how(given)
    path.write_text(json.dumps(given))
    return path


def at(*keys, value):
    """An edit: the entry at these keys becomes `value`; without the value it is deleted."""

    def edit(given):
        for key in keys[:-1]:
            given = given[key]
        given[keys[-1]] = value

    return edit


def without(*keys):
    def edit(given):
        for key in keys[:-1]:
            given = given[key]
        del given[keys[-1]]

    return edit


EDITS = {
    "best_epoch": at("best_epoch", value=99),
    "best_epoch of an equal one": at("best_epoch", value=2),
    "together": at("together", value=-5),
    "batch alone": at("together", value=0),
    "a false teacher": at("teacher", value="digits-resnet14-ce-s0-0000000000"),
    "no teacher": at("teacher", value=None),
    "config": at("config", value=3),
    "config a list": at("config", value=[1]),
    "no test_accuracy": without("history", 1, "test_accuracy"),
    "no terms": without("history", 0, "terms"),
    "no epoch": without("history", 0, "epoch"),
    "epochs reordered": lambda r: r["history"].reverse(),
    "an epoch twice": at("history", 1, "epoch", value=1),
    "no epochs": at("history", value=[]),
    "an epoch more": lambda r: r["history"].append({**r["history"][-1], "epoch": 3}),
    "history of text": at("history", 0, value="epoch 1"),
    "seconds": at("seconds", value=2.0001),
    "negative seconds": at("history", 0, "seconds", value=-1.0),
    "no time at all": at("history", 0, "seconds", value=0),
    "images_per_second": at("images_per_second", value=1.0),
    "above 100": at("history", 0, "test_accuracy", value=100.5),
    "below 0": at("history", 0, "train_accuracy", value=-0.1),
    "half an image": at("history", 0, "train_accuracy", value=50.005),
    "an accuracy of text": at("history", 0, "test_accuracy", value="60"),
    "last_accuracy": at("last_accuracy", value=99.0),
    "best_accuracy": at("best_accuracy", value=99.0),
    "no fingerprint": without("data", "fingerprint"),
    "no images": at("data", "train", value=0),
    "data a list": at("data", value=[]),
    "seed": at("config", "seed", value=7),
    "another's name": at("name", value="digits-resnet8-ce-s1-0000000000"),
    "schema": at("schema_version", value="1b"),
    "an unknown field": at("mood", value="good"),
    "never finished": at("finished", value=""),
    "an infinite rate": at("history", 0, "lr", value=float("inf")),
    "a term that is none": at("history", 0, "terms", "ce", value=float("nan")),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_record_is_named_and_the_rest_continues(made, edit):
    name = made[3]  # KD, seed 0
    path = change(name, EDITS[edit])
    with pytest.raises(ValueError, match="move it away and run again") as error:
        load_record(name, "toy")
    said = str(error.value)
    assert said.startswith(str(path)) and "\n" not in said and len(said) < 1500, said
    assert list(odd_records("toy")) == [name]
    with pytest.warns(OddRecord, match=name):
        assert len(records("toy")) == len(made) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OddRecord)
        table = statistics.summarise(statistics.collect("same_architecture", TOY), "same_architecture")
        table = table.set_index("method")
        assert table["n"].to_dict() == {"CE": 3, "KD": 2, "LDRLD": 3} and table.loc["LDRLD", "pairs"] == 2
        wrong = verification.verify_table("same_architecture", TOY)
        assert any("KD: n is 3, the records give 2" in line for line in wrong)
        save()
        assert verification.verify_table("same_architecture", TOY) == [], "the table of what is left is right again"


FILES = {
    "empty": b"",
    "cut": None,
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "not text": b"\x80\xff\x00",
    "UTF-16": '{"name": 1}'.encode("utf-16"),
    "no JSON": b"name: x",
    "deep": b"[" * 100_000,
    "NaN": b'{"last_accuracy": NaN}',
    "huge number": b'{"seconds": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", FILES)
def test_a_damaged_file_is_named(made, content):
    path = paths.records("toy") / f"{made[0]}.json"
    path.write_bytes(path.read_bytes()[:500] if content == "cut" else FILES[content])
    with pytest.raises(ValueError, match="move it away and run again") as error:
        load_record(made[0], "toy")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert list(odd_records("toy")) == [made[0]]


@pytest.mark.parametrize("key", ["last_accuracy", "seed", "ce"])
def test_a_key_given_twice_is_refused(made, key):
    path = paths.records("toy") / f"{made[0]}.json"
    text = path.read_text()
    value = text.split(f'"{key}": ')[1].split(",")[0].split("\n")[0]
    path.write_text(text.replace(f'"{key}": {value}', f'"{key}": {value}, "{key}": {value}', 1))
    with pytest.raises(ValueError, match=f"'{key}' is given twice"):
        load_record(made[0], "toy")


def test_a_folder_in_its_place_a_foreign_file_and_hidden_ones(made):
    path = paths.records("toy") / f"{made[0]}.json"
    path.unlink()
    path.mkdir()
    (paths.records("toy") / "notes.json").write_text('{"remember": "milk"}')
    (paths.records("toy") / "._notes.json").write_bytes(b"\x00\x05\x16\x07")
    odd = odd_records("toy")
    assert list(odd) == [made[0], "notes"] and "is a folder" in odd[made[0]]


def test_a_copy_under_another_seeds_name_is_found(made):
    config = load_record(made[3], "toy").config
    other = config.model_copy(update={"seed": 1})
    path = paths.records("toy") / f"{name_of(config)}.json"
    forged = json.loads(path.read_text())
    forged["name"], forged["config"]["seed"] = name_of(other), 1
    (path.with_name(f"{name_of(other)}.json")).write_text(json.dumps(forged))
    odd = odd_records("toy")
    assert set(odd) == {name_of(config), name_of(other)} and all("a copy" in why for why in odd.values())
    shutil.copy(path, path.with_name(f"{name_of(config.model_copy(update={'seed': 2}))}.json"))
    assert "edited or renamed" in odd_records("toy")[name_of(config.model_copy(update={"seed": 2}))]


def test_a_record_of_a_later_schema_requires_an_update(made):
    change(made[0], at("schema_version", value=99))
    with pytest.raises(ValueError, match="a newer ldrld wrote; update ldrld"):
        load_record(made[0], "toy")


def test_committed_records_are_sound():
    for profile in ("quick", "small", "quick-tune"):
        assert records(profile) and odd_records(profile) == {}
    assert sum(len(records(p.name)) for p in (ROOT / "data" / "runs").iterdir() if p.is_dir()) >= 456


def test_the_commands_name_the_odd_one_and_continue(made, tmp_path):
    (tmp_path / "toy.yaml").write_text(YAML)
    for name, edit in ((made[0], "config"), (made[4], "no test_accuracy")):
        change(name, EDITS[edit])
    status = ldrld("status", "--profile", tmp_path / "toy.yaml", LDRLD_OUT=str(tmp_path))
    assert (
        status.returncode == 0
        and all(made[i] in status.stdout for i in (0, 4))
        and "Traceback" not in status.stderr + status.stdout
    ), status.stdout + status.stderr
    verify = ldrld("verify", "--profile", tmp_path / "toy.yaml", LDRLD_OUT=str(tmp_path))
    assert (
        verify.returncode == 1
        and all(made[i] in verify.stdout for i in (0, 4))
        and "1 tables checked" in verify.stdout
        and "Traceback" not in verify.stderr
    ), verify.stdout + verify.stderr
    assert "OddRecord" not in status.stderr + verify.stderr
    listed = ldrld("status", "--profile", "toy", LDRLD_OUT=str(tmp_path))
    assert (
        listed.returncode == 0 and made[1] in listed.stdout and all(f"{made[i]}.json" in listed.stdout for i in (0, 4))
    )


# ---- statistics at their edges --------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def of(*values):
    return pd.Series(values, dtype=float)


@pytest.mark.parametrize(
    ("ours", "theirs", "pairs", "interval"),
    [
        (of(), of(), 0, False),
        (of(1), of(0), 1, False),
        (of(1, 1.5), of(0, 0), 2, True),
        (of(1, 1), of(0, 0), 2, False),
        (of(1, 2, 3), of(0, 1, 2), 3, False),
        (of(5, 5, 5), of(5, 5, 5), 3, False),
        (of(1, NAN, 2), of(0, 0, 0), 2, True),
        (of(1, INF, 2), of(0, 0, 0), 2, True),
        (of(1, INF), of(0, INF), 1, False),
        (of(NAN, NAN), of(1, 2), 0, False),
        (of(), of(1, 2), 0, False),
        (of(1, 2, 3), of(), 0, False),
        (of(1, 1 + 1e-12, 1), of(0, 0, 0), 3, False),
        (of(1, 2, 4), of(0, 0, 0), 3, True),
        (of(0.3, 0.3, 0.3), of(0.1, 0.1, 0.1), 3, False),
    ],
)
def test_no_interval_and_no_p_without_a_spread(ours, theirs, pairs, interval):
    """And the check by hand says the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = statistics.paired(ours, theirs)
        both = [(a, b) for a, b in zip(ours, theirs)]
        again = verification.expected_line([], [], both)
    assert got["pairs"] == pairs and [got[k] == got[k] for k in ("low", "high", "p")] == [interval] * 3
    for k in got:
        assert verification.same(got[k], again[k]), k


def test_a_seed_given_twice_is_refused():
    with pytest.raises(ValueError, match="seed 1 is given twice"):
        statistics.paired(pd.Series([1.0, 2.0], index=[1, 1]), of(0, 0))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([], "not run"),
        ([5.0], "inconclusive"),
        ([5.0, 5.1], "inconclusive"),
        ([5.0, 5.0], "inconclusive"),
        ([5.0, 5.0, 5.0], "inconclusive"),
        ([0.0, 0.0, 0.0], "inconclusive"),
        ([5.0, 5.1, NAN], "inconclusive"),
        ([NAN, NAN], "not run"),
        ([5.0, 5.1, 5.2], "supported"),
        ([-5.0, -5.1, -5.2], "refuted"),
        ([5.0, -5.0, 0.1], "inconclusive"),
        ([5.0, 5.1, 5.2, INF], "supported"),
    ],
)
def test_no_verdict_is_stronger_than_the_data(tmp_path, monkeypatch, values, verdict):
    """Judged, written, and reckoned again by `verify`."""
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    line = {
        "claim": "kd",
        "teacher": "resnet14",
        "student": "resnet8",
        "ours": "LDRLD",
        "theirs": "KD",
        "unit": "points",
        "of": "seeds",
        "values": values,
        "runs": ["a"],
        "published": NAN,
    }
    for module in (claims, claims_verification):
        monkeypatch.setattr(module, "compared", lambda p: [dict(line)])
    monkeypatch.setattr(claims_verification, "_seeds_again", lambda *given: (values, ["a"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        table = claims.judged(TOY)
        assert table["verdict"].tolist() == [verdict]
        tables.save_table(table, "claims", claims_report.caption(table, TOY), TOY, claims_report.shown(table))
        assert claims_verification.verify(TOY) == []
    claims_report.forest(table)
    csv = paths.tables("toy") / "claims.csv"
    forged = pd.read_csv(csv)
    forged["verdict"] = "supported" if verdict != "supported" else "inconclusive"
    forged.to_csv(csv, index=False)
    assert any("verdict is" in found for found in claims_verification.verify(TOY))


def test_the_detectable_difference_at_the_edges():
    found = [
        claims.detectable(values)
        for values in ([], [1.0], [1.0, 1.0], [1.0, NAN], [1.0, 1.0 + 1e-12], [1.0, 2.0], [1.0, 2.0, NAN])
    ]
    assert [value == value for value in found] == [False] * 5 + [True] * 2 and found[5] == found[6]
    for n in (2, 3, 4, 7, 30, 1000, 20_000):
        values = [float(i % 2) for i in range(n)]
        assert abs(claims_verification._power(claims.detectable(values), values) - 0.8) < 1e-4, n


def test_one_arm_missing(tmp_path, monkeypatch):
    """Of a table's baseline there is nothing: no difference, no p, and the check agrees; what there is of one arm is
    shown."""
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    plan = EXPERIMENTS["same_architecture"].plan(TOY)
    for i, config in enumerate(plan[plan["method"] == "LDRLD"]["config"]):
        keep(invented(config, 60.0 + i))
    save()
    table = statistics.summarise(statistics.collect("same_architecture", TOY), "same_architecture").set_index("method")
    assert (
        table["n"].to_dict() == {"CE": 0, "KD": 0, "LDRLD": 3}
        and table["pairs"].sum() == 0
        and table[["difference", "low", "high", "p_holm"]].isna().all(axis=None)
    )
    assert verification.verify_table("same_architecture", TOY) == []
    assert (
        tables.said(table.loc["LDRLD"], "LDRLD", "KD") == "LDRLD vs. KD: not both run."
        and claims.judged(TOY)["verdict"].eq("not run").all()
    )
    two_pairs = TOY.model_copy(update={"pairs": (("resnet14", "resnet8"), ("resnet20", "resnet8"))})
    runs_of = statistics.collect("same_architecture", two_pairs)
    partly = statistics.summarise(
        runs_of[~((runs_of["teacher"] == "resnet20") & (runs_of["method"] == "KD"))], "same_architecture"
    )
    assert partly["pairs"].dtype.kind == "i" and tables.said(partly.iloc[-1], "LDRLD", "KD").endswith("not both run.")


def test_lost_or_damaged_logits_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    shutil.copytree(ROOT / "data" / "runs" / "quick", tmp_path / "data" / "runs" / "quick")
    shutil.copytree(ROOT / "data" / "tables" / "quick", tmp_path / "data" / "tables" / "quick")
    kept = paths.records("quick") / "logits" / "glyphs-resnet8-kd-s0-432a51ffea.npz"
    content = kept.read_bytes()
    kept.unlink()
    wrong = claims_verification.verify("quick")
    assert len(wrong) == 1 and kept.stem in wrong[0] and "are missing" in wrong[0]
    kept.write_bytes(content[:5000])
    with pytest.raises(ValueError, match=f"{kept.name} is damaged"):
        claims_verification.verify("quick")
