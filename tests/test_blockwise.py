"""Block-wise logit distillation: stepping-stones that equal the teacher where they must, the parameters that their
gradients reach, a teacher that does not change, every pair of the tables, resuming, each option, error messages."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from commands import PAIRS

from ldrld import losses, models
from ldrld.core.validation import values_unseen
from ldrld.data.augmentation import Crops
from ldrld.experiments.catalog import EXPERIMENTS, batch, selected
from ldrld.experiments.methods import BLOCKWISE, method_name
from ldrld.experiments.profiles import PROFILES, Profile
from ldrld.experiments.config import name_of
from ldrld.losses.features.blockwise import batch_statistics, connector, cuts_between, step_macs, stone_weights
from ldrld.losses.ldrld.loss import relation_terms
from ldrld.losses.ldrld.weights import adw_weights
from ldrld.losses.relations import dway_kl
from ldrld.training.graphs import Task, called, imitated, why_eager
from ldrld.training.in_flight import InFlight, train_in_flight
from ldrld.training.loop import Student, train, train_together

NAMES = ("blockkd", "block_ldrld")
OTHER_COUNTS = (("resnet14", "vgg8"), ("vgg13", "resnet8"))  # three stages and four, in either order


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(student="resnet8", teacher="resnet14", batch=6):
    student, teacher = models.build(student, 10), models.build(teacher, 10).eval()
    return student, teacher, torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10


def seen(student, teacher, x, y):
    z_s, f_s = student(x, features=True)
    with torch.no_grad():
        z_t, f_t = teacher(x, features=True)
    return z_s, z_t, y, f_s, f_t


def prepared(name, student, teacher, x, **settings):
    """The loss, with the same connectors each time."""
    torch.manual_seed(3)
    return losses.build(name, **settings).prepare(student, teacher, x)


def kl(z, z_t):
    return 16 * dway_kl(z, z_t, 4.0).mean()


# ---- the wiring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.available())
def test_a_teacher_in_place_of_the_student_gives_its_own_logits(name):
    network = models.build(name, 10).eval()
    x = torch.randn(2, 3, 32, 32)
    loss = losses.build("blockkd", connector="identity").prepare(network, network, x)
    with torch.no_grad():
        logits, features = network(x, features=True)
        stones = [loss.stone(k, features.stages) for k in range(len(loss.cuts))]
    assert len(stones) == len(network.rows) and all(torch.equal(z, logits) for z in stones)


@pytest.mark.parametrize("name", models.available())
def test_networks_declare_what_their_blocks_take(name):
    network = models.build(name, 10).eval()
    with torch.no_grad():
        _, features = network(torch.randn(4, 3, 32, 32), features=True)
    assert all((m.min() >= 0) == network.rectified for m in features.stages[1:])
    assert network.pools_next == name.startswith("vgg")
    assert network.takes.startswith("rectified" if network.rectified else "raw")
    made = connector((8, 4, 4), (8, 4, 4), network.rectified)
    assert isinstance(made[-1], nn.ReLU) == network.rectified


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t, s", (*PAIRS, *OTHER_COUNTS), ids=lambda v: v)
def test_every_pair_of_the_tables(t, s, name):
    student, teacher, x, y = small(s, t, batch=2)
    loss = losses.build(name, gamma=0.5, **({"distance_args": {"depth": 5}} if name == "block_ldrld" else {}))
    loss.prepare(student, teacher, x)
    assert len(loss.cuts) == min(len(student.rows), len(teacher.rows))
    assert loss.cuts[-1][:2] == (len(student.rows), len(teacher.rows))
    parameters = [*student.parameters(), *loss.parameters()]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, 0.01)
    value, terms = loss.value_and_terms(*seen(student, teacher, x, y))
    assert value.isfinite() and set(terms) == {"ce", "distill", "blocks_ce", "blocks_distill", "cross"}
    assert all(term.isfinite() and term.ndim == 0 for term in terms.values())
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    assert all(p.grad is None for p in teacher.parameters())
    optimizer.step()
    assert not torch.equal(parameters[0], before[0]) and not torch.equal(parameters[-1], before[-1])


@pytest.mark.parametrize(
    "source, wanted",
    [
        ((8, 4, 4), (16, 4, 4)),
        ((8, 8, 8), (16, 4, 4)),
        ((8, 4, 4), (16, 8, 8)),
        ((8, 2, 2), (4, 8, 8)),
        ((8, 12, 12), (4, 4, 4)),
        ((8, 4, 4), (4, 12, 12)),
    ],
)
def test_connectors_of_any_whole_ratio(source, wanted):
    assert connector(source, wanted, rectified=False)(torch.randn(2, *source)).shape[1:] == wanted
    assert any(p.ndim == 4 for p in connector(source, wanted, rectified=True).parameters())


def test_the_last_stages_are_paired():
    shapes = [(1, 8, 8), (2, 4, 4), (3, 2, 2), (4, 1, 1)]
    assert [c[:2] for c in cuts_between(shapes, shapes[1:])] == [(2, 1), (3, 2), (4, 3)]
    assert [c[:2] for c in cuts_between(shapes[1:], shapes)] == [(1, 2), (2, 3), (3, 4)]
    assert all(c.source == c.wanted for c in cuts_between(shapes, shapes[1:]))


@pytest.mark.parametrize("teacher_norm", ["eval", "batch"])
def test_a_branch_reaches_its_own_part_of_the_student_only(teacher_norm):
    student, teacher, x, y = small()
    loss = prepared("blockkd", student, teacher, x, teacher_norm=teacher_norm)
    z_s, z_t, y, f_s, f_t = seen(student, teacher, x, y)
    parts = [student.conv1, *student.rows, student.fc]
    for k in range(3):
        value = kl(loss.stone(k, f_s.stages), z_t)
        wanted = [list(part.parameters()) for part in (*parts, *loss.connectors)]
        grads = [torch.autograd.grad(value, ps, retain_graph=True, allow_unused=True) for ps in wanted]
        reached = [all(g is not None for g in gs) and sum(g.abs().sum() for g in gs) > 0 for gs in grads]
        nothing = [all(g is None for g in gs) for gs in grads]
        of_student, of_connectors = reached[:5], reached[5:]
        assert of_student == [i <= k + 1 for i in range(5)] and of_connectors == [i == k for i in range(3)]
        assert nothing == [not r for r in reached]


@pytest.mark.parametrize("teacher_norm", ["eval", "batch"])
@pytest.mark.parametrize("t", ["resnet14", "wrn_16_1", "vgg8"])
def test_the_teacher_does_not_move(t, teacher_norm):
    student, teacher, x, y = small(teacher=t)
    loss = losses.build("blockkd", teacher_norm=teacher_norm).prepare(student, teacher, x)
    before = copy.deepcopy(teacher.state_dict())
    loss(*seen(student, teacher, x, y)).backward()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(m.training for m in teacher.modules())
    norms = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.track_running_stats for m in norms) and all(p.grad is None for p in teacher.parameters())


def test_batch_statistics_end_with_an_error_too():
    norm = nn.BatchNorm2d(2).eval()
    with pytest.raises(RuntimeError, match="stop"), batch_statistics(norm):
        raise RuntimeError("stop")
    assert norm.track_running_stats and not norm.training


def test_the_student_runs_once():
    student, teacher, x, y = small()
    loss = losses.build("blockkd", gamma=1.0).prepare(student, teacher, x)
    calls = {"student": 0, "stem of the teacher": 0}

    def count(who):
        def hook(*_):
            calls[who] += 1

        return hook

    for stage in student.rows:
        stage[0].register_forward_hook(count("student"))
    teacher.conv1.register_forward_hook(count("stem of the teacher"))
    loss(*seen(student, teacher, x, y))
    assert calls == {"student": 3, "stem of the teacher": 1}


def test_connectors_are_no_part_of_what_is_deployed(tmp_path):
    student, teacher, x, y = small()
    keys = list(student.state_dict())
    loss = losses.build("blockkd").prepare(student, teacher, x)
    assert loss.deployed(student) is student and list(student.state_dict()) == keys
    mine = {p.data_ptr() for p in loss.parameters()}
    assert mine and not mine & {p.data_ptr() for p in (*student.parameters(), *teacher.parameters())}
    models.save_weights(loss.deployed(student), tmp_path / "student.safetensors")
    fresh = models.load_weights(models.build("resnet8", 10), tmp_path / "student.safetensors").eval()
    assert torch.equal(fresh(x), student.eval()(x))


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["halving", "equal"])
@pytest.mark.parametrize("detach", [True, False])
def test_it_is_its_formula(weighting, detach):
    student, teacher, x, y = small("resnet8", "wrn_16_1")
    alpha, beta, gamma = 0.3, 1.7, 0.6
    loss = losses.build(
        "blockkd", alpha=alpha, beta=beta, gamma=gamma, weighting=weighting, detach_ensemble=detach
    ).prepare(student, teacher, x)
    z_s, z_t, y, f_s, f_t = given = seen(student, teacher, x, y)
    stones = [loss.stone(k, f_s.stages) for k in range(3)]
    w = [0.25, 0.5, 1.0] if weighting == "halving" else [1.0] * 3
    ens = sum(stones) / 3
    ens = ens.detach() if detach else ens
    expected = alpha * (F.cross_entropy(z_s, y) + sum(a * F.cross_entropy(z, y) for a, z in zip(w, stones)))
    expected = expected + beta * (kl(z_s, z_t) + sum(a * kl(z, z_t) for a, z in zip(w, stones)))
    expected = expected + gamma * (kl(z_s, ens) + sum(a * kl(z, ens) for a, z in zip(w, stones)))
    value = loss(*given)
    torch.testing.assert_close(value, expected)
    parameters = [*student.parameters(), *loss.parameters()]
    ours, theirs = (torch.autograd.grad(v, parameters, retain_graph=True) for v in (value, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "distance", [n for n in losses.available("logits") if losses.registry._losses[n].needs_teacher]
)
def test_any_distance(distance):
    """The student's own term is that loss without its cross-entropy."""
    student, teacher, x, y = small()
    args = losses.registry.loss_class(distance).alone or None
    loss = losses.build("blockkd", distance=distance, distance_args=args).prepare(student, teacher, x)
    alone = losses.build(distance, **{**loss.distance_args, "ce_weight": 0.0})
    for each in (loss, alone):
        each.at_epoch(7)
    given = seen(student, teacher, x, y)
    terms = loss.terms(*given)
    torch.testing.assert_close(terms["distill"], alone(*given[:3]))
    assert sum(terms.values()).isfinite() and loss.needs_target == alone.needs_target
    again = losses.build("blockkd", **json.loads(json.dumps(loss.hyperparameters)))
    assert again.hyperparameters == loss.hyperparameters


def test_block_ldrld_is_blockkd_with_another_distance():
    student, teacher, x, y = small()
    given = seen(student, teacher, x, y)
    a = prepared("block_ldrld", student, teacher, x)
    b = prepared("blockkd", student, teacher, x, distance="ldrld")
    assert a.hyperparameters == b.hyperparameters and torch.equal(a(*given), b(*given))


def test_the_ranking_of_branches():
    """Ranked by the student, LDRLD of a branch compares the student's classes; the student's own term is the same."""
    student, teacher, x, y = small()
    z_s, z_t, y, f_s, f_t = given = seen(student, teacher, x, y)
    args = {"distance_args": {"depth": 3}, "stones": "last"}
    branch, by_student = (
        prepared("block_ldrld", student, teacher, x, ranking=who, **args) for who in ("branch", "student")
    )
    a, b = branch.terms(*given), by_student.terms(*given)
    for name in ("ce", "distill", "blocks_ce"):
        torch.testing.assert_close(a[name], b[name])
    assert not torch.isclose(a["blocks_distill"], b["blocks_distill"], rtol=1e-3)
    z = by_student.stone(0, f_s.stages)
    top = z_s.argsort(1, descending=True)[:, :3]
    ldrld = losses.build("ldrld", depth=3)
    terms = relation_terms(z, z_t, adw_weights(3), 4.0, find=lambda *_: top)
    expected = sum(ldrld.factors[name] * term.mean() for name, term in terms.items())
    torch.testing.assert_close(b["blocks_distill"], expected)


SWITCHES = {  # setting -> terms that it changes
    "alpha": ({"alpha": 2.0}, {"ce", "blocks_ce"}),
    "beta": ({"beta": 2.0}, {"distill", "blocks_distill"}),
    "gamma": ({"gamma": 1.0}, {"cross"}),
    "weighting": ({"weighting": "equal"}, {"blocks_ce", "blocks_distill"}),
    "stones": ({"stones": "last"}, {"blocks_ce", "blocks_distill"}),
    "drawn": ({"drawn": 1}, {"blocks_ce", "blocks_distill"}),
    "handover": ({"handover": 1.0}, {"blocks_ce", "blocks_distill"}),
    "connector": ({"connector": "1x1"}, {"blocks_ce", "blocks_distill"}),
    "teacher_norm": ({"teacher_norm": "batch"}, {"blocks_ce", "blocks_distill"}),
    "temperature": ({"distance_args": {"temperature": 2.0}}, {"distill", "blocks_distill"}),
    "distance": ({"distance": "standardized"}, {"distill", "blocks_distill"}),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_what_it_should_and_nothing_else(name):
    settings, changed = SWITCHES[name]
    student, teacher, x, y = small()
    given = seen(student, teacher, x, y)
    usual, other = (prepared("blockkd", student, teacher, x, **s) for s in ({}, settings))
    for loss in (usual, other):
        loss.at_epoch(80, 240)
    a, b = usual.terms(*given), other.terms(*given)
    assert set(a) <= set(b)
    assert {k for k in b if k not in a or not torch.equal(a[k], b[k])} == changed


def test_detaching_the_ensemble_changes_the_gradient_only():
    student, teacher, x, y = small()
    given = seen(student, teacher, x, y)
    values, grads = [], []
    for detach in (True, False):
        loss = prepared("blockkd", student, teacher, x, gamma=1.0, detach_ensemble=detach)
        values.append(loss(*given))
        grads.append(torch.autograd.grad(values[-1], student.conv1.weight, retain_graph=True)[0])
    torch.testing.assert_close(*values)
    assert not torch.allclose(*grads)


def test_the_hand_over():
    student, teacher, x, y = small()
    loss = losses.build("blockkd", handover=0.5).prepare(student, teacher, x)
    joined = []
    for epoch in (1, 10, 20, 21, 40, 60, 240):
        loss.at_epoch(epoch, 120)
        joined.append(loss.active())
    assert [len(j) for j in joined] == [1, 1, 1, 2, 2, 3, 3]
    assert joined[0] == {0: pytest.approx(0.25 / 20)} and joined[2] == {0: 0.25}
    assert joined[-1] == dict(enumerate(stone_weights(3)))


def test_the_light_form_is_the_full_loss_on_average():
    student, teacher, x, y = small()
    given = seen(student, teacher, x, y)
    full, light = (prepared("blockkd", student, teacher, x, drawn=k) for k in (None, 1))
    single = {}
    while len(single) < 3:
        (k,) = light.active()
        light._draws = (0, 0, light._draws[2] - 1)  # the same draw again
        single[k] = light.terms(*given)
    for name in ("blocks_ce", "blocks_distill"):
        torch.testing.assert_close(sum(terms[name] for terms in single.values()) / 3, full.terms(*given)[name])


def test_draws_depend_on_seed_epoch_and_step_alone():
    student, teacher, x, y = small()
    loss = losses.build("blockkd", drawn=2).prepare(student, teacher, x)
    drawn = {}
    for seed, epoch in ((0, 1), (0, 2), (1, 1), (0, 1)):
        loss.at_epoch(epoch, 240, seed)
        drawn.setdefault((seed, epoch), []).append([tuple(loss.active()) for _ in range(12)])
    assert drawn[0, 1][0] == drawn[0, 1][1]
    assert len({tuple(steps[0]) for steps in drawn.values()}) == 3
    assert {k for step in drawn[0, 1][0] for k in step} == {0, 1, 2}


# ---- rows, precision, no target -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_and_no_target(name):
    student, teacher, x, y = small()
    settings = {"distance_args": {"depth": 5}} if name == "block_ldrld" else {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses.build(name, gamma=1.0, **settings).prepare(student, teacher, x)
        value = loss(*seen(student, teacher, x, y))
        value.backward()
    assert value.dtype == torch.float32 and value.isfinite()
    z_s, z_t, _, f_s, f_t = seen(student, teacher, x, y)
    assert set(loss.terms(z_s, z_t, None, f_s, f_t)) == {"distill", "blocks_distill", "cross"}
    with pytest.raises(ValueError, match="student_features must be the Features"):
        loss(z_s, z_t, y)
    with pytest.raises(ValueError, match="normalizer"):
        loss.terms(z_s, z_t, y, f_s, f_t, normalizer=7)


@pytest.mark.parametrize("settings", [{}, {"distance": "ldrld", "distance_args": {"depth": 5}}, {"distance": "dkd"}])
@pytest.mark.parametrize("ranking", ["branch", "student"])
def test_rows_that_do_not_count(settings, ranking):
    """In evaluation mode, where rows do not see each other, ignoring a row is leaving it out."""
    if ranking == "student" and settings.get("distance") != "ldrld":
        return
    student, teacher, x, y = small()
    student.eval()
    loss = prepared("blockkd", student, teacher, x, gamma=1.0, ranking=ranking, **settings).eval()
    few = torch.tensor([0, 1, 3, 4, 5])
    expected = loss.terms(*seen(student, teacher, x[few], y[few]))
    y = y.clone()
    y[2] = -100
    z_s, z_t, y, f_s, f_t = seen(student, teacher, x, y)
    z_s, z_t = z_s.clone(), z_t.clone()
    z_s[2], z_t[2] = float("nan"), float("inf")
    terms = loss.terms(z_s, z_t, y, f_s, f_t)
    for name in expected:
        torch.testing.assert_close(terms[name], expected[name], rtol=1e-4, atol=1e-5)


# ---- training -------------------------------------------------------------------------------------------------------


def learner(name, settings, images, teacher, checkpoint=None):
    torch.manual_seed(0)
    model, first = models.build("resnet8", 10), torch.zeros(1, dtype=torch.int64)
    args = {"distance_args": {"depth": 5}} if name == "block_ldrld" else {}
    example = teacher.crops.at(first, first)
    return model, losses.build(name, **args, **settings).prepare(model, teacher.teacher, example, images)


@pytest.mark.parametrize("settings", [{}, {"drawn": 1}, {"handover": 0.7}, {"teacher_norm": "batch"}], ids=str)
def test_killed_and_resumed(settings, digits, teacher, tmp_path):
    def train_for(epochs, file):
        model, loss = learner("blockkd", settings, digits, teacher)
        rows = train(model, loss, digits, teacher, epochs=3, checkpoint=file)
        history = [next(rows) for _ in range(epochs)]
        return model, loss, history

    whole, parts, rows = train_for(3, str(tmp_path / "whole.pt"))
    train_for(2, str(tmp_path / "killed.pt"))
    again, parts_again, rows_again = train_for(3, str(tmp_path / "killed.pt"))
    assert [r["terms"] for r in rows] == [r["terms"] for r in rows_again]
    for a, b in ((whole, again), (parts, parts_again)):
        b = b.state_dict()
        assert a.state_dict() and all(torch.equal(v, b[k]) for k, v in a.state_dict().items())


RECORDED = (
    ("blockkd", {}),
    ("blockkd", {"gamma": 1.0, "teacher_norm": "batch"}),
    ("blockkd", {"distance": "standardized"}),
    ("block_ldrld", {}),
    ("block_ldrld", {"ranking": "student"}),
)


@pytest.mark.parametrize("recorder", [called, imitated])
@pytest.mark.parametrize("name, settings", RECORDED, ids=str)
def test_the_engine_equals_the_loop(name, settings, recorder, digits, teacher):
    assert not why_eager(name, settings)
    tests = Crops(digits.test_images, digits.mean, digits.std)
    task = Task(teacher.crops, digits.train_labels, tests, digits.test_labels, teacher, 2, 64, 0, torch.float32)
    usual, engine = (Student(*learner(name, settings, digits, teacher), lr=0.05) for _ in range(2))
    with values_unseen():
        rows = [row for (row,) in train_together([usual], digits, teacher, 2, 64, 0)]
    flown = [row for _, row in train_in_flight([InFlight(engine, task, recorder)])]
    for a, b in zip(rows, flown):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    for a, b in ((usual.model, engine.model), (usual.loss, engine.loss)):
        for (key, v), w in zip(a.state_dict().items(), b.state_dict().values()):
            assert torch.equal(v, w), key


def test_what_cannot_be_recorded_says_why():
    for name in NAMES:
        assert "draws" in why_eager(name, {"drawn": 1}) and "begin to learn" in why_eager(name, {"handover": 0.5})
        assert not why_eager(name, losses.build(name).hyperparameters)


def test_cost_is_counted():
    full = step_macs("resnet8x4", "resnet32x4")
    assert full["teacher"] == pytest.approx(1083.0, abs=0.1) and full["student"] == pytest.approx(177.1, abs=0.1)
    assert full["rest 1"] == pytest.approx(2 / 3 * full["teacher"], rel=0.02)  # a stage costs about the same as another
    assert full["connector 1"] == pytest.approx(9 * 64 * 64 * 32 * 32 / 1e6)
    light, last = step_macs("resnet8x4", "resnet32x4", drawn=1), step_macs("resnet8x4", "resnet32x4", stones="last")
    assert light["added"] == pytest.approx(full["added"] / 3) and last["added"] < 0.1 < full["added"]


@pytest.mark.parametrize("name", PROFILES)
def test_the_experiment_runs_only_by_name(name):
    p = PROFILES[name]
    named = {name_of(config) for config, _ in batch(p, ("blockwise",)) if config.loss in NAMES}
    assert "blockwise" not in selected(p) and len(named) == len(p.seeds) * len(BLOCKWISE)
    assert not named & {name_of(config) for config, _ in batch(p)}
    titles = {method_name(config) for config in EXPERIMENTS["blockwise"].plan(p)["config"] if config.loss == "blockkd"}
    assert titles == {"Block-KD, our settings", "Block-KD, logits standardised"}
    assert Profile(**{**p.model_dump(), "methods": ("KD", "blockkd")}).methods[1] == "blockkd"


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"distance": "kb"}, "unknown distance 'kb'. Did you mean 'kd'"),
        ({"distance": "ce"}, "distance must be a loss on logits with a teacher, got 'ce'"),
        ({"distance": "fitnet"}, "unknown distance 'fitnet'"),
        ({"distance_args": {"temprature": 2}}, "Did you mean 'temperature'"),
        ({"distance_args": {"ce_weight": 1.0}}, "use alpha"),
        ({"ranking": "teacher"}, "ranking must be one of"),
        ({"ranking": "student"}, "ranking='student' needs distance='ldrld'"),
        ({"ranking": "student", "distance": "ldrld", "distance_args": {"rank_by": "teacher"}}, "rank_by='teacher'"),
        ({"alpha": -1}, "alpha must be"),
        ({"beta": float("nan")}, "beta must be"),
        ({"gamma": "0"}, "gamma must be"),
        ({"detach_ensemble": 1}, "detach_ensemble must be"),
        ({"detach_ensemble": False, "distance": "ldrld"}, "leave it True"),
        ({"stones": "first"}, "stones must be one of"),
        ({"drawn": 0}, "drawn must be"),
        ({"drawn": 1, "handover": 0.5}, "exclude each other"),
        ({"weighting": "half"}, "weighting must be one of"),
        ({"handover": -0.1}, "handover must be"),
        ({"connector": "5x5"}, "connector must be one of"),
        ({"teacher_norm": "train"}, "teacher_norm must be one of"),
        ({"temperature": 4.0}, "hyper-parameter"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(ValueError) as told:
        losses.build("blockkd", **settings)
    assert said in str(told.value)


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, x, features=False):
        return self.head(x.mean((2, 3)))


def test_networks_that_cannot_be_joined_are_named():
    student, teacher, x, y = small()
    for given, said in (
        ((student, Foreign()), "teacher: Foreign has no 'tail'"),
        ((student, models.build("resnet14", 7)), "same classes, got 10 and 7"),
        ((nn.Linear(3, 10), teacher), "student: Linear returns no features"),
    ):
        with pytest.raises(ValueError) as told:
            losses.build("blockkd").prepare(*given, x)
        assert said in str(told.value)
    with pytest.raises(ValueError, match="drawn must be at most 3"):
        losses.build("blockkd", drawn=4).prepare(student, teacher, x)
    with pytest.raises(ValueError, match="drawn must be at most 1"):
        losses.build("blockkd", drawn=2, stones="last").prepare(student, teacher, x)
    with pytest.raises(ValueError, match="connector='identity' needs maps of the same shape"):
        losses.build("blockkd", connector="identity").prepare(models.build("resnet8x4", 10), teacher, x)
    with pytest.raises(ValueError, match="multiples of each other"):
        connector((8, 6, 6), (8, 4, 4), True)
