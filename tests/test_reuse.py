"""Losses that reuse a classifier: every pair of the tables, the identities that define them, gradients, resuming,
refusals."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from commands import PAIRS

from ldrld import losses, models
from ldrld.core.seeds import seeded
from ldrld.losses.features.bridges import bridge, finish, handed_on
from ldrld.losses.features.catkd import class_maps
from ldrld.losses.features.sdd import regional_logits
from ldrld.losses.relations import dway_kl
from ldrld.models.parts import classify

NAMES = ("sdd", "simkd", "catkd", "fcfd", "uskd", "dho")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(student="resnet8", teacher="resnet14", batch=6, dtype=torch.float32):
    student, teacher = models.build(student, 10).to(dtype), models.build(teacher, 10).to(dtype).eval()
    x, y = torch.randn(batch, 3, 32, 32, dtype=dtype), torch.arange(batch) % 10
    return student, teacher, x, y


def seen(student, teacher, x, y):
    z_s, f_s = student(x, features=True)
    with torch.no_grad():
        z_t, f_t = teacher(x, features=True)
    return z_s, z_t, y, f_s, f_t


@pytest.mark.parametrize("t, s", PAIRS, ids=lambda v: v)
def test_every_pair_of_the_tables(t, s):
    student, teacher, x, y = small(s, t, batch=2)
    given = seen(student, teacher, x, y)
    for name in NAMES:
        settings = losses.registry._losses[name].pair_settings.get((t, s), {})
        if name == "fcfd":
            settings = settings | {"hybrids": 9}  # all of them
        loss = losses.build(name, **settings).prepare(student, teacher, x)
        value, terms = loss.value_and_terms(*given)
        assert value.isfinite() and all(term.isfinite() and term.ndim == 0 for term in terms.values()), name
        wanted = [p for p in student.parameters()] + list(loss.parameters())
        grads = torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)
        assert all(g is not None for g in grads[len(list(student.parameters())) :]), (
            name
        )  # every part of the loss learns
        assert grads[0].abs().sum() > 0, name
        assert loss.deployed(student)(x).shape == (2, 10)
        assert (
            losses.build(name, **json.loads(json.dumps(loss.hyperparameters))).hyperparameters == loss.hyperparameters
        )


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_no_parts_of_the_loss(name):
    student, teacher, x, y = small()
    before = copy.deepcopy(student.state_dict())
    loss = losses.build(name).prepare(student, teacher, x)
    mine = {p.data_ptr() for p in loss.parameters()}
    assert not mine & {p.data_ptr() for p in (*student.parameters(), *teacher.parameters())}
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items()) and student.training
    twice = []
    for _ in range(2):
        torch.manual_seed(3)
        twice.append(losses.build(name).prepare(student, teacher, x).state_dict())
    assert twice[0].keys() == twice[1].keys() and all(torch.equal(v, twice[1][k]) for k, v in twice[0].items())
    loss.load_state_dict(twice[0])
    assert (name == "simkd" or name == "dho") == (loss.deployed(student) is not student)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_features_and_no_target(name):
    student, teacher, x, y = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses.build(name).prepare(student, teacher, x)
        value = loss(*seen(student, teacher, x, y))
        value.backward()
    assert value.dtype == torch.float32 and value.isfinite()
    z_s, z_t, _, f_s, f_t = seen(student, teacher, x, y)
    if name in ("sdd", "uskd"):
        with pytest.raises(ValueError, match="target must be given"):
            loss(z_s, z_t, None, f_s, f_t)
    else:
        assert "ce" not in loss.terms(z_s, z_t, None, f_s, f_t)
    with pytest.raises(ValueError, match="student_features must be the Features"):
        loss(z_s, z_t, y)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_do_not_count_in_the_logits(name):
    student, teacher, x, y = small()
    loss = losses.build(name).prepare(student, teacher, x)
    z_s, z_t, _, f_s, f_t = seen(student, teacher, x, y)
    y[2] = -100
    loss.at_epoch(240)
    terms = loss.terms(z_s, z_t, y, f_s, f_t)
    weight = loss.ce_weight
    if name != "simkd":
        torch.testing.assert_close(terms["ce"], weight * F.cross_entropy(z_s, y))
    assert sum(terms.values()).isfinite()


# ---- SDD --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distance", [n for n in losses.available("logits") if losses.registry._losses[n].needs_teacher]
)
def test_one_region_is_the_distance_itself(distance):
    student, teacher, x, y = small(dtype=torch.float64)
    given = seen(student, teacher, x, y)
    args = losses.registry.loss_class(distance).alone
    alone, sdd = (
        losses.build(distance, **args),
        losses.build("sdd", distance=distance, distance_args=args, regions=[1]).prepare(student, teacher, x),
    )
    for loss in (alone, sdd):
        loss.at_epoch(7)
    ours, theirs = sdd.terms(*given), alone.terms(*given[:3])
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("conflict_weight", [1.0, 2.0, 3.5])
def test_sdd_is_its_formula(conflict_weight):
    student, teacher, x, y = small("resnet8", "wrn_16_1", dtype=torch.float64)
    z_s, z_t, y, f_s, f_t = seen(student, teacher, x, y)
    with torch.no_grad():
        y = torch.where(torch.arange(6) < 3, teacher(x).argmax(1), y)  # right about some
    y[5] = -100
    sdd = losses.build("sdd", conflict_weight=conflict_weight).prepare(student, teacher, x)
    total, n, double = 0.0, 0, 0
    for b in range(5):
        for r in (1, 2, 4):
            for k in range(r * r):
                p, q = (F.adaptive_avg_pool2d(f.last[b], r).flatten(1)[:, k] for f in (f_s, f_t))
                p, q = student.head(p), teacher.head(q)
                differ = (q.argmax() == y[b]) != (z_t[b].argmax() == y[b])
                total, n, double = (
                    total + (conflict_weight if differ else 1.0) * dway_kl(p, q, 4.0),
                    n + 1,
                    double + int(differ),
                )
    assert n == 5 * 21 and double > 0
    torch.testing.assert_close(sdd.terms(z_s, z_t, y, f_s, f_t)["kd"], 0.9 * 16 * total / n)


def test_sdd_learns_nothing_about_the_teachers_head():
    student, teacher, x, y = small()
    losses.build("sdd").prepare(student, teacher, x)(*seen(student, teacher, x, y)).backward()
    assert all(p.grad is None for p in teacher.parameters()) and student.head.weight.grad.abs().sum() > 0


def test_regions_are_ordered_and_average_to_the_whole():
    student, _, x, _ = small(dtype=torch.float64)
    z, f = student.eval()(x, features=True)
    rows = regional_logits(z, f.last, student.head, [1, 2, 4]).view(21, 6, 10)
    for part in (rows[1:5], rows[5:]):
        torch.testing.assert_close(part.mean(0), z)
    torch.testing.assert_close(rows[2], student.head(f.last[:, :, :4, 4:].mean((2, 3))))  # upper right


def test_warm_up_and_weight_are_those_of_the_distance():
    @losses.register("test-warm")
    class Warm(losses.registry._losses["kd"]):
        def __init__(self, ce_weight: float = 0.7, warmup: float = 1 / 12):
            super().__init__(ce_weight=ce_weight)
            self.warmup = warmup

        def terms(self, *given, **more):
            return {n: v * (self.ramp if n == "kd" else 1) for n, v in super().terms(*given, **more).items()}

    try:
        student, teacher, x, y = small()
        given = seen(student, teacher, x, y)
        assert losses.build("sdd").warmup == 0.0 and losses.build("sdd").ce_weight == 0.1
        sdd, alone = (
            losses.build("sdd", distance="test-warm", regions=[1]).prepare(student, teacher, x),
            losses.build("test-warm"),
        )
        assert sdd.warmup == 1 / 12 and sdd.ce_weight == 0.7
        for epoch in (1, 7, 20, 100):
            for loss in (sdd, alone):
                loss.at_epoch(epoch)
            torch.testing.assert_close(sdd.terms(*given), alone.terms(*given[:3]))
        other = losses.build("sdd", distance="test-warm", warmup=0.5, ce_weight=2.0)
        other.at_epoch(30)
        assert other.ramp == 0.25 and other.ce_weight == 2.0
    finally:
        losses.registry._losses.pop("test-warm", None)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ({"distance": "fcfd"}, ("distance", "'fcfd'")),
        ({"distance": "ce"}, ("distance", "teacher", "'ce'")),
        ({"regions": []}, ("regions", "none")),
        ({"regions": [0]}, ("regions", "0")),
        ({"conflict_weight": 0.5}, ("conflict_weight", "0.5")),
        ({"distance_args": {"temperature": -1}}, ("temperature", "-1")),
    ],
)
def test_sdd_refuses(arguments, parts):
    with pytest.raises(ValueError) as error:
        losses.build("sdd", **arguments)
    assert all(part in str(error.value) for part in parts), error.value


# ---- SimKD ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s, t", [("resnet8", "wrn_16_1"), ("ShuffleV2", "resnet8"), ("resnet8", "vgg8")])
def test_the_combined_network_is_what_was_trained(s, t):
    student, teacher, x, y = small(s, t)
    loss = losses.build("simkd", ce_weight=1.0).prepare(student, teacher, x)
    student.eval(), loss.eval()
    z_s, z_t, y, f_s, f_t = seen(student, teacher, x, y)
    network = loss.deployed(student)
    assert not network.training
    torch.testing.assert_close(loss.terms(z_s, z_t, y, f_s, f_t)["ce"], F.cross_entropy(network(x), y))
    logits, features = network(x, features=True)
    wanted = F.adaptive_avg_pool2d(f_t.last, features.last.shape[-1])
    torch.testing.assert_close(loss.terms(z_s, z_t, None, f_s, f_t)["features"], F.mse_loss(features.last, wanted))
    assert min(f_s.last.shape[-1], f_t.last.shape[-1]) == features.last.shape[-1]


def test_simkd_trains_neither_head():
    student, teacher, x, y = small()
    losses.build("simkd", ce_weight=1.0).prepare(student, teacher, x)(*seen(student, teacher, x, y)).backward()
    assert (
        student.head.weight.grad is None
        and teacher.head.weight.grad is None
        and student.conv1.weight.grad.abs().sum() > 0
    )


# ---- CAT-KD -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_catkd_is_its_formula(normalize):
    student, teacher, x, y = small("resnet8", "wrn_16_1", dtype=torch.float64)
    z_s, z_t, y, f_s, f_t = seen(student, teacher, x, y)
    loss = losses.build("catkd", normalize=normalize, resolution=4, beta=3.0).prepare(student, teacher, x)
    maps = []
    for network, f in ((student, f_s), (teacher, f_t)):
        a = F.adaptive_avg_pool2d(F.conv2d(f.last, network.head.weight[:, :, None, None]), 4)
        torch.testing.assert_close(class_maps(f.last, network.head.weight, 4), a)
        if normalize:
            a = a / a.flatten(2).norm(dim=2)[..., None, None]
        maps.append(a)
    torch.testing.assert_close(loss.terms(z_s, z_t, y, f_s, f_t)["maps"], 3 * ((maps[0] - maps[1]) ** 2).mean())
    assert losses.build("catkd").prepare(student, student, x)(z_s, z_s, None, f_s, f_s) == 0


def test_catkd_refuses_maps_that_are_too_small():
    student, teacher, x, _ = small("MobileNetV2", "resnet8")
    with pytest.raises(ValueError, match="resolution must be at most 2, the side of the student's last map, got 4"):
        losses.build("catkd", resolution=4).prepare(student, teacher, x)


# ---- FCFD -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_without_bridges_a_network_finishes_itself(name):
    network, _, x, y = small(name, "resnet8")
    network.eval()
    loss = losses.build("fcfd", hybrids=9).prepare(network, network, x)
    loss.to_teacher = loss.to_student = nn.ModuleList(nn.Identity() for _ in loss.to_teacher)
    with torch.no_grad():
        z, f = network(x, features=True)
        maps = handed_on(network, f)
        for path in loss.paths:
            assert torch.equal(loss.hybrid(path, maps, maps), z), path
        assert len(loss.paths) == 2 * (len(f.stages) - 2) and finish(network, len(maps) - 1, maps[-2]).shape == z.shape
        terms = loss.terms(z, z, y, f, f)
    assert abs(terms["kd"]) < 1e-5 and abs(terms["hybrids"]) < 1e-5
    assert terms["features"] < (1e-3 if name in ("wrn_16_1", "vgg8", "ShuffleV1") else 1e-9)


def test_a_step_leaves_teacher_and_running_statistics_alone():
    student, teacher, x, y = small("wrn_16_1", "ShuffleV2")
    loss = losses.build("fcfd", hybrids=9).prepare(student, teacher, x)
    given = seen(student, teacher, x, y)
    before = [copy.deepcopy(network.state_dict()) for network in (student, teacher)]
    loss(*given).backward()
    for network, state in zip((student, teacher), before):
        assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is not None for p in loss.parameters())
    assert all(m.track_running_stats for m in student.modules() if isinstance(m, nn.BatchNorm2d))


def test_hybrids_resume():
    student, teacher, x, _ = small()
    loss = losses.build("fcfd").prepare(student, teacher, x)
    epochs = {}
    for epoch in (1, 2, 3):
        loss.at_epoch(epoch, seed=5)
        epochs[epoch] = [loss.draw(2) for _ in range(20)]
    again = copy.deepcopy(losses.build("fcfd").prepare(student, teacher, x))
    again.at_epoch(2, seed=5)
    assert [again.draw(2) for _ in range(20)] == epochs[2] != epochs[3]
    assert all(a != b for a, b in epochs[1]) and {p for step in epochs[1] for p in step} == set(loss.paths)
    assert seeded(0, 1, 2).initial_seed() != seeded(1, 0, 2).initial_seed() != seeded(0, 0, 2).initial_seed()


def test_fcfd_is_its_formula():
    student, teacher, x, y = small()
    loss, given = losses.build("fcfd", hybrids=9).prepare(student, teacher, x), seen(student, teacher, x, y)
    z_s, z_t, _, f_s, f_t = given
    kl = lambda z: 16 * F.kl_div((z / 4).log_softmax(1), (z_t / 4).softmax(1), reduction="batchmean")
    ours = [bridge(m) for bridge, m in zip(loss.to_teacher, f_s.stages[1:])]
    hybrids = [teacher.tail(i, ours[i - 1]) for i in (1, 2)] + [
        student.tail(i, loss.to_student[i - 1](f_t.stages[i])) for i in (1, 2)
    ]
    maps = sum(F.mse_loss(a, b) for a, b in zip(ours, f_t.stages[1:]))
    pooled = F.mse_loss(ours[-1].relu().mean((2, 3)), f_t.pooled)
    torch.testing.assert_close(
        loss.terms(*given),
        {
            "ce": F.cross_entropy(z_s, y),
            "kd": kl(z_s),
            "hybrids": sum(map(kl, hybrids)),
            "features": 5 * (maps + pooled),
        },
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_features_alone_ramp_up():
    student, teacher, x, y = small()
    loss, given = losses.build("fcfd", hybrids=9).prepare(student, teacher, x), seen(student, teacher, x, y)
    whole = loss.terms(*given)
    loss.at_epoch(5)
    for name, value in loss.terms(*given).items():
        torch.testing.assert_close(value, whole[name] * (0.25 if name == "features" else 1))


def test_bridges_meet_every_shape():
    for size, to in ((8, 8), (8, 4), (4, 8)):
        assert bridge((3, size, size), (5, to, to), True)(torch.rand(2, 3, size, size)).shape == (2, 5, to, to)
    assert isinstance(bridge((3, 8, 8), (5, 8, 8), True)[-1], nn.LeakyReLU) and isinstance(
        bridge((3, 8, 8), (5, 8, 8), False)[-1], nn.BatchNorm2d
    )
    with pytest.raises(ValueError, match=r"equal, half or twice the size.*\(3, 8, 8\) to \(5, 2, 2\)"):
        bridge((3, 8, 8), (5, 2, 2), True)


class Foreign(nn.Module):
    """A network of the reader's own: it shows features, and has nothing to go on from the middle with."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, classes)

    def forward(self, x, features=False):
        m = self.conv(x)
        return classify(self.head, m.relu(), [m, m.relu()], [m], features)


def test_networks_that_do_not_fit():
    student, teacher, x, _ = small()
    with pytest.raises(ValueError, match="student: Foreign has no `tail"):
        losses.build("fcfd").prepare(Foreign(), teacher, x)
    with pytest.raises(ValueError, match="3 .* 4; resnet"):
        losses.build("fcfd").prepare(student, models.build("vgg8", 10), x)
    for name in ("sdd", "simkd", "catkd", "fcfd", "dho"):
        with pytest.raises(ValueError, match="same classes, got 7 and 10"):
            losses.build(name).prepare(models.build("resnet8", 7), teacher, x)
    for name in ("sdd", "simkd", "catkd", "uskd", "dho"):
        losses.build(name).prepare(Foreign(), teacher, x)
    for name in NAMES:
        with pytest.raises(ValueError, match="no features|no linear layer"):
            losses.build(name).prepare(nn.Flatten(), teacher, x)
