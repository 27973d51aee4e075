"""Every method of the tables is trained for a moment, interrupted, and taken up again: parts, memories and all."""

import pytest
import torch

from ldrld import losses
from ldrld.experiments import runner
from ldrld.experiments.cells import method_config
from ldrld.experiments.methods import BLOCKWISE, METHODS, RIVALS, SWITCHES, VARIANTS
from ldrld.experiments.profiles import Profile
from ldrld.experiments.config import name_of
from ldrld.experiments.records import load_record

ALL = {**METHODS, **{f"LDRLD, {name}": m for name, m in VARIANTS.items() if name != "LDRLD"}, **BLOCKWISE}
ALL |= {**RIVALS, **SWITCHES}
SHORT = dict(recipe="onecycle", epochs=2, lr=0.02)
P = Profile(
    name="t",
    data="digits",
    dataset="digits",
    pairs=(("resnet14", "resnet8"),),
    teacher=dict(SHORT, epochs=3),
    student=SHORT,
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder for all, so that the teacher is trained once."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("methods")
        patch.setenv("LDRLD_OUT", str(folder))
        yield folder


def test_every_loss_stands_in_some_table():
    shown = {m.loss for m in (*METHODS.values(), *VARIANTS.values(), *BLOCKWISE.values(), *RIVALS.values())} | {"mcmi"}
    assert {name for name in losses.available() if not name.startswith(("my-", "test-"))} == shown


@pytest.mark.xdist_group("methods")
@pytest.mark.parametrize("name", ALL)
def test_a_method_trains_and_resumes(out, name, monkeypatch):
    config = method_config(P, P.pairs[0], ALL[name])
    monkeypatch.setenv("LDRLD_DEADLINE", "1")  # long past: paused after every epoch
    stops = 0
    while load_record(name_of(config), "t") is None and stops < 9:
        try:
            record = runner.run(config, "t", keep=("logits", "weights", "insight"), report=None)
        except runner.Paused:
            stops += 1
    assert 1 <= stops < 9
    assert all(torch.tensor(list(row["terms"].values())).isfinite().all() for row in record.history)
    loss = losses.build(config.loss, **config.loss_args)
    if config.loss in losses.available("logits") and not list(loss.parameters()):
        return  # it remembers nothing: test_runs.py covers that
    monkeypatch.delenv("LDRLD_DEADLINE")
    whole = runner.run(config, "whole", report=None)
    strip = lambda r: [{k: v for k, v in row.items() if k != "seconds"} for row in r.history]
    assert strip(whole) == strip(record), "an interruption changed the result"
    assert whole.measures == record.measures


def test_some_methods_keep_a_part_and_most_do_not(out):
    record = lambda name: (
        load_record(name_of(method_config(P, P.pairs[0], METHODS[name])), "whole")
        or runner.run(method_config(P, P.pairs[0], METHODS[name]), "whole", report=None)
    )
    plain, simkd, fitnet = (record(name).measures for name in ("KD", "SimKD", "FitNet"))
    assert plain["extra_parameters"] == 0 and fitnet["extra_parameters"] > 0 and simkd["extra_parameters"] > 0
    assert simkd["used_parameters"] > simkd["parameters"] == fitnet["used_parameters"] == plain["used_parameters"]


def test_a_pair_that_does_not_fit_is_reported_on_the_command_line(out):
    from typer.testing import CliRunner

    from ldrld.cli import app

    said = CliRunner().invoke(
        app,
        ["run", "dataset=digits", "model=vgg8", "loss=at", "teacher=resnet8", "epochs=1", "recipe=onecycle", "lr=0.05"],
    )
    assert said.exit_code == 2 and "stage" in said.output
    said = CliRunner().invoke(app, ["run", "dataset=digits", "loss=fitnett", "teacher=resnet8", "epochs=1"])
    assert said.exit_code == 2 and "fitnet" in said.output


@pytest.mark.xdist_group("methods")
@pytest.mark.parametrize("names", [("FCFD", "SimKD", "CRD", "USKD"), ("MLKD", "SLD", "partial mixup")], ids=", ".join)
def test_in_a_cohort_each_learns_what_it_learns_alone(out, names):
    """They share a batch, and what the teacher says and shows: none may alter what the next one sees."""
    configs = [method_config(P, P.pairs[0], METHODS[name]) for name in names]
    alone, together = (
        [runner.run(c, "whole", report=None) for c in configs],
        runner.run_together([(c, ()) for c in configs], "together", report=None),
    )
    strip = lambda r: [{k: v for k, v in row.items() if k != "seconds"} for row in r.history]
    assert [strip(r) for r in together] == [strip(r) for r in alone]
