"""What tables say is unequal follows from the classes of the losses and the configurations of the runs."""

import pandas as pd
import pytest

from ldrld import losses
from ldrld.experiments.catalog import EXPERIMENTS
from ldrld.experiments.cells import method_config
from ldrld.experiments.methods import method_of
from ldrld.experiments.profiles import profile
from ldrld.losses.base import LogitLoss
from ldrld.results.marks import EXPLAINED, marked, unequal
from ldrld.results.tables import told


@pytest.mark.parametrize("name", losses.available())
def test_every_loss_says_what_it_needs(name):
    loss = losses.build(name)
    assert ("features" in loss.unequal) == loss.needs_features
    assert any(mark in loss.unequal for mark in ("two views", "images of its own")) == loss.alters_images
    assert ("warm-up" in loss.unequal) == (getattr(loss, "warmup", 0) > 0)
    assert all(isinstance(mark, str) and mark and "|" not in mark for mark in (*loss.unequal, loss.own_recipe or "–"))


@pytest.mark.parametrize(
    "name, options, marks",
    [
        ("kd", {"ce_weight": 1.0}, []),
        ("kd", {"ce_weight": 0.0}, ["no separate CE"]),
        ("standardized", {"loss": "dkd"}, ["warm-up"]),
        ("dho", {"loss": "ldrld"}, ["features", "CE × 0.5"]),
        ("wkd", {"distance": "constant", "decay_from": 1.0}, []),
        ("dhkd", {"align": True}, ["features", "two further backward passes"]),
        ("blockkd", {"handover": 0.5}, ["features", "stepping-stones join one by one"]),
        ("blockkd", {"distance": "dkd", "distance_args": {"warmup": 0.1}}, ["features", "warm-up"]),
    ],
)
def test_hyperparameters_count(name, options, marks):
    assert losses.build(name, **options).unequal == marks


def test_a_loss_from_outside_has_no_marks_of_its_own():
    class Theirs(LogitLoss):
        pass

    assert Theirs().unequal == [] and Theirs().own_recipe == ""


def test_teacher_and_schedule_are_read_from_the_run():
    p = profile("quick")
    config = method_config(p, p.pairs[0], method_of("KD, MCMI teacher"))
    assert unequal(config, p) == ["CE × 0.1", "own teacher"]
    longer = config.model_copy(update={"epochs": 12, "teacher": config.teacher.teacher})
    assert unequal(longer, p) == ["CE × 0.1", "epochs 12"]


def test_a_table_of_equals_has_no_column():
    def table(name):
        column = EXPERIMENTS[name].by[-1]
        return pd.DataFrame({column: EXPERIMENTS[name].plan("quick")[column].unique()})

    plain, methods = table("adw"), table("newer_methods")
    same, nothing = marked(plain, EXPERIMENTS["adw"], "quick")
    assert same is plain and nothing == ""
    shown, explained = marked(methods, EXPERIMENTS["newer_methods"], "quick")
    assert explained == EXPLAINED and list(shown["method"]) == list(methods["method"])
    assert shown.set_index("method")["unequal"]["FitNet"] == "features"


def test_disputed_numbers_say_so():
    nan = float("nan")
    assert [told(75.43, 0.94), told(71.97, 0.3), told(71.97, nan), told(nan, nan)] == [
        "75.43 (disputed by 0.94)",
        "71.97",
        "71.97",
        "not found",
    ]
