"""What people write by hand: YAML files, `name=value` words, and settings from Python. Every error is one line that
helps."""

import time

import pytest
from pydantic import ValidationError

from ldrld.core.settings import assigned, read
from ldrld.experiments.profiles import profile
from ldrld.experiments.config import RunConfig, explain

GOOD = """
data: handwritten digits
dataset: digits
pairs: [[resnet14, resnet8]]
teacher: {recipe: onecycle, epochs: 2, lr: 0.1}
student: {recipe: onecycle, epochs: 1, lr: 5e-2}
"""
BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)


def told(error) -> str:
    """The message, which must be one line of a length that one reads."""
    said = str(error.value)
    assert "\n" not in said and len(said) < 1200, said
    return said


# ---- YAML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("7", 7),
        ("-3", -3),
        ("012", 12),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("true", True),
        ("yes", "yes"),
        ("on", "on"),
        ("null", None),
        ("None", None),
        ("", None),
        ("nan", "nan"),
        ("resnet8", "resnet8"),
        ("2026-01-01", "2026-01-01"),
        ("{depth: 3}", {"depth": 3}),
        ("[1, 2e0]", [1, 2.0]),
        ("'5'", "5"),
        ("10**400", "10**400"),
        ("9" * 400, int("9" * 400)),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    got = read(text, "here")
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seeds: [0, 1", "line 1"),
        ("a: {b: 3", "line 1"),
        ("a: @x", "'@'"),
        ("\ta: 1", "line 1"),
        ("a: 1\na: 2", "'a' is given twice (line 1"),
        ("a: {b: 1, b: 2}", "'b' is given twice"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: *nowhere", "undefined alias"),
        ("a: &a [*a]", "an alias contains itself"),
        ("[" * 3000 + "]" * 3000, "too deeply nested"),
        ("? {a: 1}\n: 2", "unhashable"),
        ("a: 1\n---\nb: 2", "expected"),
        ("\x00", "expected"),
        ("!!int x", "expected"),
        ("9" * 5000, "expected"),
        ("!!timestamp 2026-99-99", "expected"),
        ("<<: 3", "expected"),
    ],
)
def test_a_mistake_in_yaml_says_where(text, says):
    with pytest.raises(ValueError) as error:
        read(text, "mine.yaml", "the fields data, dataset")
    said = told(error)
    assert said.startswith("mine.yaml: ") and says in said and said.endswith("expected the fields data, dataset")


def test_a_merge_is_no_key_given_twice():
    assert read("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", "here") == {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}


def test_an_anchor_bomb_is_refused_before_it_is_expanded():
    started = time.perf_counter()
    with pytest.raises(ValueError) as error:
        read(BOMB, "bomb.yaml")
    assert len(BOMB) < 400 and "values with aliases expanded" in told(error) and time.perf_counter() - started < 2
    assert read("a: &x {b: 1}\nc: *x", "fine") == {"a": {"b": 1}, "c": {"b": 1}}, "an honest alias is read"


# ---- profiles -------------------------------------------------------------------------------------------------------


def test_a_profile_may_write_numbers_as_people_do(tmp_path):
    (tmp_path / "mine.yaml").write_text("\ufeff" + GOOD, encoding="utf-8")
    assert profile(str(tmp_path / "mine.yaml")).student["lr"] == 0.05


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("seeds: [0, 1", "line"),
        ("seeds: [0, 0]", "give each only once"),
        ("seeds: [-1]", "expected whole numbers from 0"),
        ("seeds: 3", "seeds=3"),
        ("seeds: [0.5]", "seeds.0=0.5"),
        ("depths: [1]", "depth must be"),
        ("temperatures: [0]", "temperature must be"),
        ("temperatures: [.inf]", "temperature must be"),
        ("dataset: digits", "given twice"),
        ("name: mine", "omit `name`"),
        ("1: 2", "1 is not a field name"),
        ("sedes: [1]", "sedes"),
        ("methods: [LDRD]", "LDRD"),
        ("student: {recipe: onecycle}", "given twice"),
        (BOMB, "aliases expanded"),
        ("methods: *x", "undefined alias"),
    ],
)
def test_a_mistake_in_a_profile_names_the_file(tmp_path, change, says):
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD + change + "\n")
    with pytest.raises(ValueError) as error:
        profile(str(file))
    said = told(error)
    assert said.startswith(str(file)) and says in said


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("epochs: 2, lr: 0.1", "epochs: two, lr: 0.1", "teacher: epochs='two'"),
        ("lr: 5e-2", "lr: fast", "student: lr='fast'"),
        ("lr: 5e-2", "model: resnet8", "student: model given"),
        ("lr: 5e-2", "seed: 1", "student: seed given"),
        ("lr: 5e-2", "lr: .nan", "student: lr=nan"),
        ("{recipe: onecycle, epochs: 2, lr: 0.1}", "[1]", "teacher=[1]"),
        ("[[resnet14, resnet8]]", "[[resnet14]]", "pairs.0.1"),
        ("[[resnet14, resnet8]]", "[[resnet14, resnet9]]", "resnet9"),
        ("digits\npairs", "digit\npairs", "Did you mean 'digits'"),
    ],
)
def test_a_wrong_value_in_a_profile_is_named_with_its_field(tmp_path, old, new, says):
    file = tmp_path / "mine.yaml"
    assert old in GOOD
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError) as error:
        profile(str(file))
    said = told(error)
    assert said.startswith(str(file)) and says in said


@pytest.mark.parametrize("content", [b"", b"- 1\n", b"just words", b"\xff\xfe\x00\x01", b"\x89PNG\r\n\x1a\n\x00"])
def test_a_file_that_holds_no_fields_is_named(tmp_path, content):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        profile(str(file))
    assert told(error).startswith(str(file)) and "expected the fields data, dataset, pairs" in told(error)


# ---- words ----------------------------------------------------------------------------------------------------------


def test_words_add_up():
    assert assigned(["epochs=5", "lr=5e-4", "loss_args.depth=3", "loss_args.temperature=2"]) == {
        "epochs": 5,
        "lr": 5e-4,
        "loss_args": {"depth": 3, "temperature": 2},
    }
    assert assigned(["loss_args={depth: 3}", "loss_args.temperature=2"]) == {
        "loss_args": {"depth": 3, "temperature": 2}
    }
    either = [
        assigned(words)
        for words in (["teacher=resnet14", "teacher.epochs=5"], ["teacher.epochs=5", "teacher=resnet14"])
    ]
    assert either[0] == either[1] == {"teacher": {"model": "resnet14", "epochs": 5}}
    assert (
        assigned(["epochs=5", "epochs=6"]) == {"epochs": 6}
        and assigned(["a=b=c"]) == {"a": "b=c"}
        and assigned(["teacher=None"]) == {"teacher": None}
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["loss_args={depth: 3"], "'loss_args={depth: 3': "),
        (["teacher.lr=@x"], "'teacher.lr=@x': "),
        (["epochs"], "expected name=value"),
        (["=3"], "expected name=value"),
        (["a..b=3"], "expected name=value"),
        ([".a=3"], "expected name=value"),
        (["a.=3"], "expected name=value"),
        (["epochs=3", "epochs.x=4"], "epochs was already set to 3"),
        (["loss=kd", "loss.temperature=3"], "loss was already set to 'kd'"),
        (["a=&x [1]", "b=*x"], "undefined alias"),
        (["a=[*x]"], "undefined alias"),
        (["a={b: 1, b: 2}"], "'b' is given twice"),
    ],
)
def test_a_mistake_in_a_word_names_it(words, says):
    with pytest.raises(ValueError) as error:
        assigned(words)
    assert says in told(error)


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"teacher": 0.1}, "teacher=0.1: expected the name of a network"),
        ({"teacher": [1]}, "teacher=[1]"),
        ({"teacher": True}, "teacher=True"),
        ({"lr": 10**400}, "lr=1000"),
        ({"lr": "10**400"}, "lr='10**400'"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
        ({"seed": 10**30}, "seed=1000"),
        ({"batch_size": 2**40}, "batch_size="),
        ({"loss": "kd", "teacher": "resnet8", "loss_args": {"temperature": 10**400}}, "loss_args={'temperature': 1000"),
        ({"loss": "sdd", "teacher": "resnet8", "loss_args": {"regions": float("nan")}}, "regions"),
        ({"loss": "sdd", "teacher": "resnet8", "loss_args": {"regions": "many"}}, "regions"),
        ({"loss": "corrected", "teacher": "resnet8", "loss_args": {"loss": {}}}, "loss_args={'loss': {}}"),
        ({"loss": "corrected", "teacher": "resnet8", "loss_args": {"loss": ["kd"]}}, "loss_args={'loss': ['kd']}"),
        ({"loss": "kd", "teacher": "resnet8", "loss_args": {1: 2}}, "1 is not the name of a hyper-parameter"),
        ({"loss_args": [1]}, "loss_args=[1]"),
        ({"loss_args": "depth"}, "loss_args='depth'"),
        ({"loss": ["kd"]}, "loss=['kd']"),
        ({"model": 3}, "model=3"),
        ({"dataset": 3}, "dataset=3"),
        ({"loss": "kd", "teacher": {1: 2}}, "teacher: unknown setting 1"),
        ({"loss": "kd", "teacher": {"model": "resnet8", "epochs": "x"}}, "teacher: epochs='x'"),
        ({"loss": "kd", "teacher": {"model": "resnet8", "sha256": 1}}, "teacher: sha256=1"),
        ({"model": "x" * 10**6}, "expected one of "),
        ({"lr": "x" * 10**6}, "lr='xxx"),
        ({"loss_args": {"x" * 10**6: 1}}, "unknown hyper-parameter"),
    ],
)
def test_a_wrong_setting_is_reported_in_one_line(settings, says):
    with pytest.raises(ValidationError) as error:
        RunConfig(**settings)
    said = explain(error.value)
    assert says in said and "\n" not in said and len(said) < 1200, said


def test_of_many_mistakes_the_first_few_are_reported():
    with pytest.raises(ValidationError) as error:
        RunConfig(epochs=0, batch_size=0, lr=0.0, momentum=2.0, weight_decay=-1.0, seed=-1, holdout=2.0)
    assert explain(error.value).endswith("; and 2 more")


def test_the_losses_accept_what_they_accepted():
    with pytest.raises(ValidationError, match="depth must be an integer of at least 2"):
        RunConfig(loss="ldrld", teacher="resnet8", loss_args={"depth": 1})
    with pytest.raises(ValidationError, match="Did you mean 'depth'"):
        RunConfig(loss="ldrld", teacher="resnet8", loss_args={"dept": 1})
