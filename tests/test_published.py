"""Published numbers: every row has a source, look-ups invent nothing, and our columns stay ours."""

import math

import pandas as pd
import pytest

from ldrld import models
from ldrld.core import paths
from ldrld.experiments.published import beside, disagreements, load, lookup, sources


def test_files_are_whole():
    numbers, documents = load(), sources()
    assert len(numbers) == 1730 and not numbers.duplicated().any()
    key = ["source", "table", "dataset", "teacher", "student", "method", "metric"]
    assert not numbers.duplicated(key).any()
    assert set(numbers.source) == set(documents.index) and documents.index.is_unique
    assert numbers.drop(columns="std").notna().all().all()
    assert documents[["kind", "protocol", "document"]].notna().all().all()
    accuracy = numbers[numbers.metric.str.endswith("_acc")]
    assert accuracy.value.between(20, 100).all()


def test_text_of_the_files_is_fit_to_publish():
    for path in paths.published().glob("*.csv"):
        text = path.read_text(encoding="utf-8")
        assert text.endswith("\n") and "\r" not in text and "  " not in text


@pytest.mark.parametrize(
    "teacher, student, method, value, source",
    [
        ("resnet56", "resnet20", "kd", 70.66, "CRD README"),
        ("resnet56", "resnet20", "KD", 70.66, "CRD README"),
        ("ResNet56", "ResNet20", "ldrld", 72.20, "LDRLD via Paper-Notes"),
        ("wrn_40_2", "wrn_16_2", "crd", 75.48, "CRD README"),
        ("WRN-40-2", "wrn_40_1", "dist", 74.43, "DIST README"),
        ("resnet32x4", "ShuffleV1", "cat_kd", 78.26, "LDRLD via Paper-Notes"),
        ("resnet32x4", "ShuffleV2", "catkd", 78.41, "LSKD paper"),
        ("vgg13", "MobileNetV2", "lskd", 68.61, "LSKD paper"),
        ("ResNet50", "vgg8", "sdd", 74.89, "SDD paper"),
        (None, "resnet8x4", "ce", 72.50, "CRD README"),
        ("wrn_40_2", "resnet8x4", "ce", 72.50, "CRD README"),
        ("vgg13", None, "teacher", 74.64, "CRD README"),
        (None, "wrn_40_2", "ce", 75.61, "LSKD paper"),
    ],
)
def test_lookup_finds(teacher, student, method, value, source):
    found = lookup(teacher, student, method)
    assert (found.value[0], found.source[0]) == (value, source)


def test_lookup_on_other_data_sets_and_metrics():
    assert lookup("ResNet34", "ResNet18", "ldrld", "imagenet").value.tolist() == [71.88]
    assert set(lookup("ResNet34", "ResNet18", "kd", "ImageNet-1K").value) == {70.66, 70.68, 70.83, 71.03}
    assert lookup("ResNet18", "MobileNetV2", "kd", "tiny-imagenet").value.tolist() == [58.35]
    assert lookup("ResNet34", "ResNet18", "ctkd", "imagenet", "top5_acc").value[0] > 90


def test_preference():
    ranked = lookup("resnet110", "resnet20", "dkd", prefer="LDRLD via Paper-Notes")
    assert ranked.value[0] == 70.91 and 71.06 in set(ranked.value)
    several = lookup("resnet110", "resnet20", "dkd", prefer=["CRD README", "RLD via Paper-Notes"])
    assert several.source[0] == "RLD via Paper-Notes"  # CRD's README has no DKD
    assert lookup("resnet110", "resnet20", "dkd").value[0] == 71.06


@pytest.mark.parametrize(
    "question",
    [
        ("wrn_40_2", "wrn_40_1", "ldrld"),
        ("resnet110", "resnet32", "ldrld"),
        ("resnet14", "resnet8", "kd"),
        ("resnet56", "resnet20", "ldrld-without-adw"),
        ("resnet56", "resnet20", "kd", "glyphs"),
        ("resnet56", "resnet20", "kd", "digits"),
        (None, "resnet8", "ce"),
    ],
)
def test_not_found_is_said_and_never_guessed(question):
    found = lookup(*question)
    assert len(found) == 1 and math.isnan(found.value[0]) and found.source[0] == "not found"


def test_wrong_questions_are_refused():
    pair = ("resnet56", "resnet20", "kd")
    with pytest.raises(ValueError, match="resnet5'.*nearest: .*ResNet56"):
        lookup("resnet5", *pair[1:])
    with pytest.raises(ValueError, match="teacher=None: expected a network"):
        lookup(None, "resnet20", "kd")
    with pytest.raises(ValueError, match="metric='accuracy'.*top1_acc"):
        lookup(*pair, metric="accuracy")
    with pytest.raises(ValueError, match="prefer=.*'CRD'.*CRD README"):
        lookup(*pair, prefer="CRD")


@pytest.mark.parametrize("name", models.available())
def test_every_network_of_ours_is_understood(name):
    lookup(name, name, "kd")


def test_beside_adds_columns_and_touches_none():
    ours = pd.DataFrame(
        {
            "teacher": [None, "resnet56", "resnet56", "wrn_40_2", float("nan")],
            "student": ["resnet20", "resnet20", "resnet20", "wrn_40_1", "vgg8"],
            "method": ["ce", "kd", "ldrld", "ldrld", "ce"],
            "top1": [1.0, 2.0, 3.0, 4.0, 5.0],
        },
        index=[7, 3, 3, 9, 1],
    )
    kept = ours.copy()
    both = beside(ours)
    pd.testing.assert_frame_equal(ours, kept)
    pd.testing.assert_frame_equal(both[list(ours)], kept)
    assert list(both)[4:] == ["published", "published_std", "published_source", "published_spread"]
    assert both.published.fillna(0).tolist() == [69.06, 70.66, 72.20, 0, 70.36]
    assert both.published_source.tolist()[3] == "not found"


def test_beside_withholds_what_cannot_be_compared():
    ours = pd.DataFrame(
        {"teacher": "resnet56", "student": "resnet20", "method": "kd", "profile": ["quick", "small", "paper"]}
    )
    both = beside(ours)
    assert both.published.isna().tolist() == [True, True, False]
    assert both.published_source[0] == "not comparable (quick profile)"
    assert beside(ours.drop(columns="profile"), profile="small").published.isna().all()
    assert beside(ours.assign(dataset="glyphs", profile="paper")).published_source.eq("not found").all()


def test_beside_refuses_other_tables():
    with pytest.raises(ValueError, match="no column 'student'"):
        beside(pd.DataFrame({"method": ["kd"]}))
    ours = pd.DataFrame({"student": ["resnet20"], "method": ["ce"]})
    with pytest.raises(ValueError, match="'published'"):
        beside(beside(ours))
    assert list(beside(ours[:0]))[2:] == ["published", "published_std", "published_source", "published_spread"]


def test_known_disagreements_are_found():
    table = disagreements().set_index(["dataset", "teacher", "student", "method", "metric"])
    row = table.loc["ImageNet-1K", "ResNet34", "ResNet18", "KD", "top1_acc"]
    assert (row.lowest, row.highest, row.spread) == (70.66, 71.03, 0.37) and "70.83: CTKD README" in row.who
    assert table.loc["CIFAR-100", "ResNet110", "ResNet20", "AT", "top1_acc"].spread == 0.43
    assert table.loc["CIFAR-100", "WRN-40-2", "WRN-40-1", "DIST", "top1_acc"].spread == 0.3
    assert len(disagreements(load().query("source == 'CRD README'"))) == 0


def test_missing_files_are_explained(monkeypatch, tmp_path):
    monkeypatch.setenv("LDRLD_ROOT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="LDRLD_ROOT"):
        load()
