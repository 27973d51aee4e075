"""OFA-KD: its target against the literal formula, its branches for every network, and who learns from which branch."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from ldrld import losses, models
from ldrld.losses.features.ofa import OFAKD, TokenBranch, ofa_terms, raised_target

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(4)


def literal(z, z_t, y, gamma, temperature):
    """ℓ as in the official code, sample by sample."""
    total = []
    for student, teacher, label in zip(z / temperature, z_t / temperature, y):
        p, o = teacher.softmax(0), F.one_hot(label, len(teacher))
        total.append(-(((p + o) ** gamma - o) * student.softmax(0).log()).sum())
    return torch.stack(total)


@pytest.mark.parametrize("gamma, temperature", [(1.0, 1.0), (1.5, 1.0), (0.8, 2.0)])
def test_the_formula(gamma, temperature):
    torch.manual_seed(0)
    z, z_t = (5 * torch.randn(6, 10, dtype=torch.float64) for _ in range(2))
    y = torch.arange(6)
    torch.testing.assert_close(ofa_terms(z, z_t, y, gamma, temperature), literal(z, z_t, y, gamma, temperature))


def test_gamma_1_is_kd_and_a_larger_gamma_favours_the_true_class():
    torch.manual_seed(0)
    z = torch.randn(6, 10, dtype=torch.float64, requires_grad=True)
    p, y = torch.randn(6, 10, dtype=torch.float64).softmax(1), torch.arange(6)
    kl = F.kl_div(F.log_softmax(z, 1), p, reduction="none").sum(1)
    ours = ofa_terms(z, p.log(), y)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), z, retain_graph=True)[0] for loss in (ours, kl)))
    share = lambda gamma, raised: (t := raised_target(p, y, gamma, raised)).gather(1, y[:, None])[:, 0] / t.sum(1)
    for raised in ("all", "target"):
        assert (share(1.5, raised) > share(1.0, raised)).all() and (share(0.7, raised) < share(1.0, raised)).all()
    others = ~F.one_hot(y, 10).bool()
    assert torch.equal(raised_target(p, y, 1.5, "target")[others], p[others])
    assert (raised_target(p, y, 1.5)[others] < p[others]).all()


@pytest.mark.parametrize("name", models.available())
def test_every_network_gets_a_branch_for_every_stage(name):
    with torch.device("meta"):
        student, teacher, x = models.build(name, 7), models.build("wrn_40_2", 7), torch.empty(2, 3, 32, 32)
        loss = OFAKD().prepare(student, teacher, x)
        maps = student(x, features=True)[1].stages[1:]
        assert len(loss.branches) == len(maps)
        assert all(branch(m).shape == (2, 7) for branch, m in zip(loss.branches, maps))
        widths = [branch[-1].in_features for branch in loss.branches]
    assert set(widths) == {max(student.head.in_features, teacher.head.in_features)}


def step(student, teacher, **settings):
    loss = OFAKD(**settings).prepare(student, teacher, X)
    z, seen = student(X, features=True)
    with torch.no_grad():
        z_t = teacher(X)
    return loss, z, seen, z_t


def test_terms_and_weights():
    torch.manual_seed(0)
    student, teacher = models.build("resnet8", 10), models.build("vgg8", 10).eval()
    loss, z, seen, z_t = step(student, teacher, gamma=1.5)
    terms = loss.terms(z, z_t, Y, seen)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(z, Y))
    torch.testing.assert_close(terms["kd"], ofa_terms(z, z_t, Y, 1.5).mean())
    branches = [branch(m) for branch, m in zip(loss.branches, seen.stages[1:])]
    expected = sum(ofa_terms(logits, z_t, Y, 1.5).mean() for logits in branches)
    torch.testing.assert_close(terms["branches"], expected, rtol=1e-4, atol=1e-4)
    loss.kd_weight, loss.branch_weight, loss.ce_weight = 2.0, 0.5, 0.0
    weighted = loss.terms(z, z_t, Y, seen)
    torch.testing.assert_close(weighted["kd"], 2 * terms["kd"])
    torch.testing.assert_close(weighted["branches"], 0.5 * terms["branches"], rtol=1e-3, atol=1e-3)
    assert weighted["ce"] == 0


def test_an_ignored_row_counts_nowhere():
    torch.manual_seed(0)
    student, teacher = models.build("resnet8", 10).eval(), models.build("vgg8", 10).eval()
    loss, z, seen, z_t = step(student, teacher)
    loss.eval()
    few = lambda f, n: type(f)(*(tuple(m[:n] for m in part) if isinstance(part, tuple) else part[:n] for part in f))
    ignored = loss.terms(z, z_t, torch.tensor([0, 1, 2, -100]), few(seen, 4))
    without = loss.terms(z[:3], z_t[:3], Y[:3], few(seen, 3))
    for name, value in without.items():
        torch.testing.assert_close(ignored[name], value, rtol=1e-4, atol=1e-5)


def test_branches_are_trained_and_thrown_away():
    torch.manual_seed(0)
    student, teacher = models.build("resnet8", 10), models.build("resnet14", 10).eval()
    loss, z, seen, z_t = step(student, teacher)
    loss(z, z_t, Y, seen).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*loss.parameters(), *student.parameters()])
    assert loss.deployed(student) is student and all(p.grad is None for p in teacher.parameters())
    assert not any(key.startswith("branches") for key in student.state_dict())


def test_extremes_stay_finite():
    z = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    for z_t in (torch.tensor([[300.0, 0.0, -300.0]]), torch.tensor([[-300.0, 0.0, 300.0]])):
        for gamma in (0.5, 1.0, 2.0):
            value = ofa_terms(z, z_t, torch.tensor([1]), gamma).sum()
            assert value.isfinite() and torch.autograd.grad(value, z)[0].isfinite().all()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"gamma": 0.0}, "gamma must be a finite number above 0"),
        ({"branch_weight": -1.0}, "branch_weight"),
        ({"raised": "none"}, "raised must be one of 'all', 'target'"),
        ({"gama": 1.0}, "gamma"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        losses.build("ofa", **settings)


def test_refusals():
    student, teacher = models.build("resnet8", 10), models.build("resnet14", 10).eval()
    loss, z, seen, z_t = step(student, teacher)
    with pytest.raises(ValueError, match="target must be given for 'ofa'"):
        loss.terms(z, z_t, None, seen)
    with pytest.raises(ValueError, match="student_features must be the Features"):
        loss.terms(z, z_t, Y)
    with pytest.raises(ValueError, match="same classes, got 10 and 7"):
        OFAKD().prepare(student, models.build("resnet14", 7), X)
    with pytest.raises(ValueError, match="width 6"):
        TokenBranch(6, 8, 1, 10)


def test_tokens_are_merged_as_at_224_pixels():
    torch.manual_seed(0)
    for side, merges in ((4, 0), (8, 0), (14, 1), (28, 2)):
        branch = TokenBranch(8, side, 2, 5)
        assert len(branch.merges) == merges and len(branch.blocks.layers) == 2
        assert branch(torch.randn(2, 8, side, side)).shape == (2, 5)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm not installed")
@pytest.mark.parametrize("name", ["vit_mini", "mixer_mini", "timm:resnet18"])
def test_students_from_timm(name):
    torch.manual_seed(0)
    student, teacher = models.build(name, 10), models.build("resnet8", 10).eval()
    loss, z, seen, z_t = step(student, teacher, gamma=1.5)
    kinds = {type(branch) for branch in loss.branches}
    assert kinds == ({torch.nn.Sequential} if name == "timm:resnet18" else {TokenBranch})
    loss(z, z_t, Y, seen).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*loss.parameters(), *student.parameters()])
