"""Few classes: the default depth is said to be too deep once, where it is, and the recorded runs say where that is."""

import re
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch

from ldrld import LDRLD, losses
from ldrld.core import validation

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def not_yet_said():
    validation._few_remain.cache_clear()
    torch.manual_seed(0)


def said(loss, classes, calls=1):
    """The warnings of a loss on logits of so many classes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            loss(torch.randn(4, classes, requires_grad=True), torch.randn(4, classes), torch.arange(4))
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("classes", [9, 10, 11, 12, 13])
def test_one_warning_says_what_to_set(classes):
    (told,) = said(LDRLD(), classes, calls=3)
    assert (
        told.startswith(f"depth=7 leaves only {classes - 7} of {classes} classes") and f"set depth={classes};" in told
    )
    assert said(LDRLD(depth=classes), classes) == [] and said(LDRLD(), classes) == []


@pytest.mark.parametrize(
    "options, classes",
    [
        ({}, 7),
        ({}, 8),
        ({}, 14),
        ({}, 20),
        ({}, 100),
        ({"depth": 5}, 10),
        ({"depth": 9}, 10),
        ({"depth": 2}, 4),
        ({"beta": 0.0}, 10),
    ],
)
def test_no_warning_where_nothing_is_lost(options, classes):
    """All are compared, or all but one, whose term is zero; as many remain as are compared; or what remains does not
    count."""
    assert said(LDRLD(**options), classes) == []


def test_another_number_of_classes_is_reported_again():
    loss = LDRLD()
    assert len(said(loss, 10)) == len(said(loss, 12)) == 1 and said(loss, 10) == said(loss, 12) == []


@pytest.mark.parametrize("name, options", [("standardized", {"loss": "ldrld"}), ("corrected", {"loss": "ldrld"})])
def test_wrappers_tell_it_too(name, options):
    assert len(said(losses.build(name, **options), 10)) == 1


def test_the_warning_leaves_the_value_alone_and_is_not_part_of_a_compiled_graph():
    s, t, y = torch.randn(4, 10), torch.randn(4, 10), torch.arange(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="set depth=10"):
            LDRLD()(s, t, y)
        compiled = torch.compile(LDRLD(), backend="eager", fullgraph=True)(s, t, y)
    with pytest.warns(UserWarning, match="set depth=10"):
        torch.testing.assert_close(LDRLD()(s, t, y), compiled)


def test_what_the_warning_claims_is_on_record():
    """At ten classes depth 10 is above depth 7, on both sets; from twenty on, nothing is shown to be above 7."""
    table = pd.read_csv(ROOT / "data" / "tables" / "quick" / "classes.csv", dtype={"depth": str}).query(
        "method == 'LDRLD'"
    )
    assert set(table["classes"]) == {10, 20, 50, 100, 200} and table["n"].eq(3).all()
    mean = table.set_index(["data", "depth"])["mean"]
    ten = table.loc[table["classes"] == 10, "data"].unique()
    assert len(ten) == 2 and all(mean[name, "10"] > mean[name, "7"] for name in ten)
    assert not table.query("classes > 10")["low"].gt(0).any()


def test_the_front_page_says_it():
    assert re.search(
        r"up to a dozen classes: depth=<number of classes>", (ROOT / "README.md").read_text(encoding="utf-8")
    )
