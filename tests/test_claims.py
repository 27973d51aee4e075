"""Claims and the front page with records that the project does not have: a few of the `paper` profile, and none at
all."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient

from ldrld.batch.notebooks import with_kernel
from ldrld.core import paths
from ldrld.core.files import write_whole
from ldrld.experiments.catalog import EXPERIMENTS, batch, selected
from ldrld.experiments.profiles import profile
from ldrld.experiments.config import name_of
from ldrld.experiments.records import invented
from ldrld.results import claims, claims_report, claims_verification, tables, verification

ROOT = Path(__file__).parent.parent
MACHINE = {"gpu": "A GPU", "processor": "CPU", "threads": 1}


def invent(config, accuracy, folder="paper"):
    """A record that says what a run under `config` might say."""
    record = invented(config, accuracy, 3600.0 / config.epochs, machine=MACHINE)
    write_whole(paths.records(folder) / f"{record.name}.json", record.model_dump_json())


@pytest.fixture
def some_paper_records(tmp_path, monkeypatch):
    """On one pair KD is above LDRLD in all seeds, and DKD far below; on another there is one seed."""
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    accuracy, seeds = {"KD": (77.0, 0.3), "DKD": (70.0, 0.3), "LDRLD": (76.0, 0.1)}, {"resnet32x4": 3, "vgg13": 1}
    for line in EXPERIMENTS["same_architecture"].plan("paper").to_dict("records"):
        if line["method"] not in accuracy or line["seed"] >= seeds.get(line["teacher"], 0):
            continue
        first, step = accuracy[line["method"]]
        invent(line["config"], first + line["seed"] * step)


def front_page(folder):
    """The Markdown that the index and its page of results show where the records lie in `folder`."""
    shown = []
    for name in ("index", "pages/results"):
        path = ROOT / "nbs" / f"{name}.ipynb"
        notebook, place = nbformat.read(path, as_version=4), {"metadata": {"path": str(path.parent)}}
        client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place)
        with_kernel(client.execute)
        shown += [o["data"]["text/markdown"] for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    return "\n".join(shown)


def test_a_claim_can_fail_and_a_published_number_is_listed_next_to_it(some_paper_records):
    table = claims.judged("paper").set_index(["claim", "teacher", "theirs"])
    kd, dkd = table.loc[("kd", "resnet32x4", "KD")], table.loc[("rivals", "resnet32x4", "DKD")]
    assert (kd["verdict"], dkd["verdict"], kd["n"]) == ("refuted", "supported", 3)
    assert np.isclose(kd["difference"], -1.2) and np.isclose(kd["published"], 77.20 - 73.33)
    assert table.loc[("kd", "vgg13", "KD"), "verdict"] == "inconclusive"  # one seed
    said = claims_report.in_words(claims.judged("paper"), "paper")
    assert "LDRLD is outperformed by KD" in said and "`kd` (2 of 5 run)" in said


def test_published_marks_are_drawn_in_the_paper_profile_alone(some_paper_records):
    hollow = lambda fig: [line for ax in fig.axes for line in ax.lines if line.get_marker() == "D"]
    table = claims.judged("paper")
    assert len(hollow(claims_report.forest(table))) == int((table["n"].gt(0) & table["published"].notna()).sum()) == 4
    assert claims.judged("small")["published"].isna().all()
    plt.close("all")


@pytest.mark.parametrize(
    ("column", "row", "value"),
    [("published", 0, 3.0), ("p_holm", 1, 0.5), ("n", 1, 2), ("low", 1, 0.0), ("ours", 0, "KD")],
)
def test_a_forged_table_is_found(some_paper_records, column, row, value):
    table = claims.judged("paper")
    tables.save_table(table, "claims", claims_report.caption(table, "paper"), "paper", claims_report.shown(table))
    assert verification.verify_table("claims", "paper") == []
    csv = paths.tables("paper") / "claims.csv"
    forgery = pd.read_csv(csv)
    forgery.loc[row, column] = value
    forgery.to_csv(csv, index=False)
    assert verification.verify_table("claims", "paper")


def test_images_are_computed_again(tmp_path, monkeypatch):
    """The two claims about probabilities, on random logits."""
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    for i, config in enumerate(EXPERIMENTS["relation_maps"].plan("small").query("seed == 0")["config"]):
        for c in filter(None, (config, config.teacher)):
            file = paths.records("small") / "logits" / f"{name_of(c)}.npz"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(
                file,
                logits=np.random.default_rng(i).normal(size=(20, 12)).astype(np.float16) * 3,
                labels=np.zeros(20, int),
            )
    table = claims.judged("small")
    tables.save_table(table, "claims", claims_report.caption(table, "small"), "small", claims_report.shown(table))
    assert table.loc[table["of"] == "images", "n"].tolist() == [20, 0, 20]
    assert claims_verification.verify("small") == []


def test_claims_add_no_run_to_a_profile():
    for p in ("quick", "small", "paper"):
        others = tuple(name for name in selected(p) if name != "claims")
        assert "claims" in selected(p) and [name_of(c) for c, _ in batch(p)] == [
            name_of(c) for c, _ in batch(p, others)
        ]
        assert "claims" in tables.to_report(p)
    assert batch("quick", ("claims",)) == []


def test_front_page_with_a_few_paper_records(some_paper_records, tmp_path):
    text = front_page(tmp_path)
    line = next(line for line in text.splitlines() if "resnet32x4 → resnet8x4 | KD" in line)
    assert "77.30 ± 0.30 (3)" in line and "| 73.33 | +3.97 | LDRLD via Paper-Notes |" in line and "3.0 h, A GPU" in line
    links = re.findall(r"\[(\d)\]\(\.\./\.\./(data/runs/paper/[^)]+)\)", line)
    assert [seed for seed, _ in links] == ["0", "1", "2"]
    for seed, file in links:
        assert json.loads((tmp_path / file).read_text())["config"]["seed"] == int(seed)
    made, planned = len(list(paths.records("paper").glob("*.json"))), len(batch("paper"))
    assert "LDRLD is outperformed by KD" in text
    assert f"{made} of the {planned} runs of profile `paper` are finished" in text


def test_front_page_without_any_record(tmp_path, monkeypatch):
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    text = front_page(tmp_path)
    for p in ("quick", "small", "paper"):
        assert f"None of the {len(batch(p))} runs of profile `{profile(p).name}` has been made" in text
    assert "±" not in text and "supported |" not in text
