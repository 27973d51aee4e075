"""Self-distillation, tuned teachers, mixed images, two heads: their formulas row by row, extremes, resuming,
refusals."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldrld import losses, models
from ldrld.losses.features.dho import log_mixture
from ldrld.losses.features.uskd import log_ratios, zipf_labels
from ldrld.losses.logits.mcmi import class_centroids, divergence_from_centroids
from ldrld.models.evaluation import logits_of


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(batch=6, dtype=torch.float32):
    student, teacher = models.build("resnet8", 10).to(dtype), models.build("resnet8", 10).to(dtype).eval()
    return student, teacher, torch.randn(batch, 3, 32, 32, dtype=dtype), torch.arange(batch) % 10


def extreme(dtype, batch=32, classes=10):
    corner = lambda: torch.tensor([-1e4, 0.0, 1e4])[torch.randint(3, (batch, classes))].to(dtype)
    flat = torch.full((batch, classes), 1e4).to(dtype)
    return [(corner(), corner()), (flat, corner()), (corner(), flat), (flat, flat)], torch.randint(classes, (batch,))


def test_kinds():
    assert "mcmi" in losses.available("teachers") and "partial-mixup" in losses.available("images")
    assert {"uskd", "dho"} <= set(losses.available("features"))
    assert not {"mcmi", "partial-mixup", "uskd", "dho"} & set(losses.available("logits"))
    assert losses.registry._losses["mcmi"].needs_teacher and not losses.registry._losses["uskd"].needs_teacher
    with pytest.raises(ValueError, match="kind must be 'logits', 'features', 'images' or 'teachers'"):
        losses.available("x")
    for name in ("mcmi", "partial-mixup", "uskd", "dho"):
        known = losses.build(name).hyperparameters
        assert losses.build(name, **json.loads(json.dumps(known))).hyperparameters == known


# ---- USKD -------------------------------------------------------------------------------------------------------


def test_uskd_is_its_formula():
    student, _, x, y = small(dtype=torch.float64)
    uskd = losses.build("uskd", alpha=0.3, beta=0.7, mu=0.2, ce_weight=0.9).double().prepare(student, None, x).double()
    z, f = student(x, features=True)
    weak = uskd.weak_head(f.stages[-2].mean((2, 3)))
    s, w = z.softmax(1), weak.softmax(1)
    r = (s[torch.arange(6), y] ** 2).detach()
    target = others = of_weak = 0.0
    for b in range(6):
        t = y[b]
        target = target - (r[b] + 1 - r.mean()) * s[b, t].log() / 6
        order = (w[b] / (1 - w[b, t]) + s[b] / (1 - s[b, t])).argsort(descending=True).tolist()
        mass = torch.tensor([0.0 if c == t else 1 / (order.index(c) + 1) for c in range(10)], dtype=torch.float64)
        zeta, rest = mass / mass.sum(), [c for c in range(10) if c != t]
        torch.testing.assert_close(zipf_labels(weak[b : b + 1], z[b : b + 1], y[b : b + 1])[0], zeta)
        others = others - (zeta[rest] * z[b, rest].log_softmax(0)).sum() / 6
        smooth = torch.full((10,), 0.01, dtype=torch.float64)
        smooth[t] += 0.9
        of_weak = of_weak - (smooth * w[b].log()).sum() / 6
    expected = {
        "ce": 0.9 * F.cross_entropy(z, y),
        "target": 0.3 * target,
        "others": 0.7 * others,
        "weak": 0.2 * of_weak,
    }
    ours = uskd.terms(z, None, y, f)
    torch.testing.assert_close(ours, expected)
    parameters = [*student.parameters(), *uskd.parameters()]
    for a, b in zip(
        *(torch.autograd.grad(sum(terms.values()), parameters, retain_graph=True) for terms in (ours, expected))
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_uskd_at_the_extremes(dtype):
    student, _, x, _ = small(32)
    uskd = losses.build("uskd").prepare(student, None, x)
    with torch.no_grad():
        f = student(x, features=True)[1]
    cases, y = extreme(dtype)
    for z, _ in cases:
        z = z.requires_grad_()
        value = uskd(z, None, y, f)
        assert value.isfinite() and torch.autograd.grad(value, z)[0].isfinite().all()
        weak = z.detach().flip(0).float()
        zeta = zipf_labels(weak, z.detach().float(), y)
        torch.testing.assert_close(zeta.sum(1), torch.ones(32))
    assert log_ratios(torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([0])).isfinite().all()


def test_uskd_needs_labels_alone():
    student, _, x, y = small()
    uskd = losses.build("uskd").prepare(student, None, x)
    z, f = student(x, features=True)
    assert torch.equal(uskd(z, None, y, f), uskd(z, None, y, f, None, torch.arange(6)))
    with pytest.raises(ValueError, match="target must be given for 'uskd'"):
        uskd(z, None, None, f)
    y[1] = -100
    kept = torch.arange(6) != 1
    for name, value in uskd.terms(z, None, y, f).items():
        if name == "ce":
            torch.testing.assert_close(value, F.cross_entropy(z[kept], y[kept]))
        assert value.isfinite()


# ---- MCMI -------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, classes)

    def forward(self, x):
        return self.head(self.norm(x.mean((2, 3))))


def colours(n=40, classes=4):
    images, labels = torch.randint(256, (n, 2, 2, 3), dtype=torch.uint8), torch.arange(n) % classes
    return SimpleNamespace(train_images=images, train_labels=labels, mean=(0.5,) * 3, std=(0.25,) * 3)


def prepared(weight=-0.15):
    student, teacher, data = Linear(), Linear(), colours()
    return student, teacher, data, losses.build("mcmi", cmi_weight=weight).prepare(student, teacher, None, data)


def test_mcmi_is_its_formula():
    student, teacher, data, loss = prepared(-0.2)
    teacher.train()
    z = logits_of(teacher, data.train_images, data.mean, data.std)
    assert teacher.training and teacher.norm.num_batches_tracked == 0  # looked at in evaluation mode
    Q = torch.stack([z[data.train_labels == c].softmax(1).mean(0) for c in range(4)])
    torch.testing.assert_close(loss.centroids, Q)
    torch.testing.assert_close(loss.centroids.sum(1), torch.ones(4))
    p, y = torch.randn(9, 4), torch.arange(9) % 4
    expected = torch.stack([(q.softmax(0) * (q.softmax(0) / Q[t]).log()).sum() for q, t in zip(p, y)]).mean()
    terms = loss.terms(p, None, y)
    torch.testing.assert_close(terms, {"ce": F.cross_entropy(p, y), "cmi": -0.2 * expected})
    assert expected > 0 and torch.equal(loss(p, torch.randn(9, 4), y), sum(terms.values()))


def test_mcmi_starts_from_the_teacher():
    student, teacher, data, loss = prepared()
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), teacher.state_dict().values()))
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    assert list(loss.state_dict()) == ["centroids"] and not list(loss.parameters()) and not loss.centroids.requires_grad
    again = copy.deepcopy(loss)
    again.load_state_dict(loss.state_dict())
    value = loss(student(torch.randn(5, 3, 2, 2)), None, torch.arange(5) % 4)
    value.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_information_is_zero_for_outputs_that_do_not_vary():
    y = torch.arange(12) % 3
    z = torch.randn(3, 3, dtype=torch.float64)[y]
    Q = class_centroids(z, y)
    assert divergence_from_centroids(z, y, Q).abs().max() < 1e-12
    varied = z + torch.randn(12, 3)
    assert divergence_from_centroids(varied, y, class_centroids(varied, y)).mean() > 0
    assert (class_centroids(z, torch.zeros(12, dtype=torch.long))[1:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mcmi_at_the_extremes_and_with_rows_that_do_not_count(dtype):
    loss = losses.build("mcmi")
    cases, y = extreme(dtype)
    for z, t in cases:
        loss.centroids = class_centroids(t, y)
        z = z.requires_grad_()
        value = loss(z, None, y)
        assert value.isfinite() and torch.autograd.grad(value, z)[0].isfinite().all()
    z, mask = torch.randn(32, 10), torch.arange(32) % 3 > 0
    wanted = loss(z[mask], None, y[mask])
    torch.testing.assert_close(loss(z.masked_fill(~mask[:, None], torch.nan), None, y, mask), wanted)
    torch.testing.assert_close(loss(z.masked_fill(~mask[:, None], torch.nan), None, y.where(mask, -100)), wanted)


def test_mcmi_refuses():
    student, teacher, data, loss = prepared()
    with pytest.raises(ValueError, match="prepare"):
        losses.build("mcmi")(torch.zeros(2, 4), None, torch.zeros(2).long())
    with pytest.raises(ValueError, match="target must be given"):
        loss(torch.zeros(2, 4), None)
    with pytest.raises(ValueError, match="data must be given"):
        losses.build("mcmi").prepare(student, teacher, None)
    with pytest.raises(ValueError, match="student must be the same network"):
        losses.build("mcmi").prepare(Linear(5), teacher, None, data)
    with pytest.raises(ValueError, match="cmi_weight"):
        losses.build("mcmi", cmi_weight="x")


# ---- partial mixup ----------------------------------------------------------------------------------------------


def test_what_is_mixed():
    x = torch.rand(64, 3, 4, 4)
    for share, mixed in ((0.0, 0), (0.1, 6), (0.5, 32), (1.0, 64)):
        loss = losses.build("partial-mixup", share=share)
        got, (partner, own) = loss.images(x), loss._mixture
        assert (own < 1).sum() == mixed and own.min() >= 0 and partner.sort().values.equal(torch.arange(64))
        assert torch.equal(got[own == 1], x[own == 1])
        torch.testing.assert_close(got, own[:, None, None, None] * x + (1 - own)[:, None, None, None] * x[partner])


def test_partial_mixup_is_its_formula():
    x, z_s, z_t, y = torch.rand(10, 3, 2, 2), torch.randn(10, 5), torch.randn(10, 5), torch.arange(10) % 5
    loss = losses.build("partial-mixup", share=0.7)
    loss.images(x)
    partner, own = loss._mixture
    soft = own[:, None] * F.one_hot(y, 5) + (1 - own)[:, None] * F.one_hot(y[partner], 5)
    s, t = (z / z.std(1, keepdim=True) for z in (z_s, z_t))
    torch.testing.assert_close(
        loss.terms(z_s, z_t, y),
        {
            "ce": 0.1 * F.cross_entropy(s, soft),
            "kd": 0.9 * F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean"),
        },
    )
    assert list(loss.terms(z_s, z_t)) == ["kd"]
    torch.testing.assert_close(loss(7 * z_s - 2, 0.1 * z_t + 4, y), loss(z_s, z_t, y))
    mask = torch.arange(10) != 4
    holes = z_s.masked_fill(~mask[:, None], torch.nan).requires_grad_()
    value = loss(holes, z_t, y, mask)
    assert value.isfinite() and (torch.autograd.grad(value, holes)[0][4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_partial_mixup_at_the_extremes(dtype):
    loss = losses.build("partial-mixup", share=0.5)
    loss.images(torch.rand(32, 3, 2, 2))
    cases, y = extreme(dtype)
    for z, t in cases:
        z = z.requires_grad_()
        value = loss(z, t, y)
        assert value.isfinite() and torch.autograd.grad(value, z)[0].isfinite().all()


def test_mixtures_resume():
    x, seen = torch.rand(64, 3, 2, 2), {}
    loss = losses.build("partial-mixup", share=0.5)
    for epoch in (1, 2):
        loss.at_epoch(epoch, seed=3)
        seen[epoch] = [loss.images(x) for _ in range(3)]
    again = losses.build("partial-mixup", share=0.5)
    again.at_epoch(2, seed=3)
    assert all(torch.equal(again.images(x), other) for other in seen[2])
    assert not torch.equal(seen[1][0], seen[2][0]) and not torch.equal(seen[1][0], seen[1][1])
    state = torch.get_rng_state()
    again.images(x)
    assert torch.equal(state, torch.get_rng_state())


def test_partial_mixup_refuses():
    loss = losses.build("partial-mixup")
    with pytest.raises(ValueError, match="call x = loss.images"):
        loss(torch.zeros(4, 5), torch.zeros(4, 5))
    loss.images(torch.rand(3, 3, 2, 2))
    with pytest.raises(ValueError, match="got logits of 4 other images"):
        loss(torch.zeros(4, 5), torch.zeros(4, 5))
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"share .*{share}"):
            losses.build("partial-mixup", share=share)


# ---- DHO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [n for n in losses.available("logits") if losses.registry._losses[n].needs_teacher])
def test_the_second_head_learns_by_the_inner_loss_and_the_first_by_labels(inner):
    student, teacher, x, y = small(dtype=torch.float64)
    args = losses.registry.loss_class(inner).alone
    dho = losses.build("dho", loss=inner, loss_args=args).prepare(student, teacher, x).double()
    z_s, f_s = student(x, features=True)
    with torch.no_grad():
        z_t = teacher(x)
    terms = dho.terms(z_s, z_t, y, f_s)
    alone = losses.build(inner, **args).terms(dho.second(f_s.pooled), z_t, y)
    torch.testing.assert_close(
        terms, {"ce": 0.5 * F.cross_entropy(z_s, y)} | {n: v for n, v in alone.items() if n != "ce"}
    )
    inside = sum(v for n, v in terms.items() if n != "ce")
    first, second = (
        torch.autograd.grad(
            v, [*student.head.parameters(), *dho.second.parameters()], retain_graph=True, allow_unused=True
        )
        for v in (terms["ce"], inside)
    )
    assert all(g is not None for g in first[:2]) and first[2:] == (None, None)
    assert second[:2] == (None, None) and all(g is not None for g in second[2:])


def test_the_second_heads_loss_warms_up():
    student, teacher, x, y = small()
    dho = losses.build("dho", loss="dkd").prepare(student, teacher, x)
    z_s, f_s = student(x, features=True)
    with torch.no_grad():
        z_t = teacher(x)
    whole = dho.terms(z_s, z_t, y, f_s)
    dho.at_epoch(1, 240)
    for name, value in dho.terms(z_s, z_t, y, f_s).items():
        torch.testing.assert_close(value, whole[name] / (1 if name == "ce" else 20))


def test_dho_defaults_are_the_papers():
    dho = losses.build("dho")
    assert dho.hyperparameters == {
        "loss": "kd",
        "loss_args": {"temperature": 2.0, "kd_weight": 0.5},
        "alpha": 0.5,
        "beta": 1.0,
        "ce_weight": 0.5,
    }
    assert losses.build("dho", loss="ldrld").loss_args == {}


@pytest.mark.parametrize("alpha, beta", [(0.0, 0.5), (0.4, 0.5), (1.0, 2.0)])
def test_the_mixture(alpha, beta):
    student, teacher, x, _ = small()
    dho = losses.build("dho", alpha=alpha, beta=beta).prepare(student, teacher, x)
    network = dho.deployed(student.eval())
    z, f = student(x, features=True)
    expected = alpha * z.softmax(1) + (1 - alpha) * (dho.second(f.pooled) / beta).softmax(1)
    torch.testing.assert_close(network(x).softmax(1), expected)
    torch.testing.assert_close(network(x, features=True)[0].exp(), expected)
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in student.parameters()) + 650
    far = log_mixture(torch.tensor([[2e4, 0.0]]), torch.tensor([[0.0, 2e4]]), 0.5, 1.0)
    torch.testing.assert_close(far.exp(), torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ({"loss": "ce"}, ("loss", "teacher", "'ce'")),
        ({"loss": "dho"}, ("loss", "'dho'")),
        ({"alpha": 1.5}, ("alpha", "1.5")),
        ({"alpha": -0.5}, ("alpha", "-0.5")),
        ({"beta": 0}, ("beta", "0")),
        ({"ce_weight": -1}, ("ce_weight", "-1")),
        ({"loss_args": {"tau": 1}}, ("'tau'",)),
    ],
)
def test_dho_refuses(arguments, parts):
    with pytest.raises(ValueError) as error:
        losses.build("dho", **arguments)
    assert all(part in str(error.value) for part in parts), error.value
