"""Losses on features: every published pair, mixed precision, extremes, literal formulas, and pairs that do not fit."""

import math
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import commands

from ldrld import losses, models
from ldrld.losses.features.at import attention
from ldrld.losses.features.fitnet import FitNet
from ldrld.losses.features.pkt import jump_log_probabilities
from ldrld.losses.features.rkd import distances_and_angles
from ldrld.losses.features.sp import similarities
from ldrld.losses.features.vid import normal_nll
from ldrld.models import Features

NAMES = ("fitnet", "at", "sp", "pkt", "rkd", "vid", "crd", "ofd", "reviewkd")
PAIRS = [("resnet14", "resnet8"), *commands.PAIRS]
DATA = SimpleNamespace(train_labels=torch.arange(300) % 20)
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGET, INDEX = torch.arange(4), torch.tensor([7, 100, 250, 31])


@lru_cache
def network(name):
    torch.manual_seed(0)
    model = models.build(name).eval()
    with torch.no_grad():
        return model, *model(X, features=True)


def leaves(features, change=lambda m: m):
    leaf = lambda m: change(m.detach().clone()).requires_grad_()
    return Features(tuple(map(leaf, features.stages)), tuple(map(leaf, features.preact)), leaf(features.pooled))


def tensors(features):
    return [*features.stages, *features.preact, features.pooled]


def prepared(name, pair=("resnet14", "resnet8"), seed=0, **options):
    student, teacher = network(pair[1])[0], network(pair[0])[0]  # before the seed: the first call builds them
    torch.manual_seed(seed)
    return losses.build(name, **options).prepare(student, teacher, X, DATA)


def step(loss, pair=("resnet14", "resnet8"), change=lambda m: m):
    (_, z_s, f_s), (_, z_t, f_t) = network(pair[1]), network(pair[0])
    z_s, f_s, f_t = z_s.clone().requires_grad_(), leaves(f_s, change), leaves(f_t, change)
    terms = loss.terms(z_s, z_t, TARGET, f_s, f_t, INDEX)
    sum(terms.values()).backward()
    return terms, z_s, f_s, f_t


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("name", NAMES)
def test_every_published_pair(name, pair):
    loss = prepared(name, pair)
    terms, z_s, f_s, f_t = step(loss, pair)
    assert all(t.isfinite() and t.ndim == 0 and t.dtype == torch.float32 for t in terms.values()) and "ce" in terms
    torch.testing.assert_close(terms["ce"], F.cross_entropy(z_s, TARGET))
    assert sum(m.grad is not None and m.grad.abs().sum() > 0 for m in tensors(f_s)) >= 1
    assert all(m.grad is None for m in tensors(f_t)), "the teacher is constant"
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters()), "all parts take part"
    assert loss.deployed(network(pair[1])[0]) is network(pair[1])[0]


@pytest.mark.parametrize("name", NAMES)
def test_no_network_becomes_a_part(name):
    loss, (student, _, _), (teacher, _, _) = prepared(name), network("resnet8"), network("resnet14")
    inside = {id(m) for m in loss.modules()}
    assert not inside & {id(m) for net in (student, teacher) for m in net.modules()}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_makes_the_same_parts(name):
    a, b, c = prepared(name), prepared(name), prepared(name, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    if list(a.parameters()):
        assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_resumed_from_a_checkpoint_the_next_steps_are_the_same(name):
    loss, again = prepared(name), prepared(name, seed=1)
    for epoch in (1, 2):
        loss.at_epoch(epoch, 24, seed=3)
        step(loss)
    again.load_state_dict(loss.state_dict())
    for one in (loss, again):
        one.at_epoch(3, 24, seed=3)
    for _ in range(2):
        a, b = step(loss)[0], step(again)[0]
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(x, y) for x, y in zip(loss.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision(name):
    loss = prepared(name)
    exact = step(loss)[0]
    for autocast in (True, False):
        loss = prepared(name)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            terms, _, f_s, _ = step(loss, change=lambda m: m.bfloat16())
        assert all(t.dtype == torch.float32 for t in terms.values())
        for k in exact:
            torch.testing.assert_close(terms[k], exact[k], rtol=0.05, atol=0.05)
        assert all(m.grad is None or m.grad.isfinite().all() for m in tensors(f_s))


@pytest.mark.parametrize("name", ["at", "sp", "pkt", "rkd"])
def test_autocast_changes_nothing_where_nothing_is_trained(name):
    plain = step(prepared(name))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = step(prepared(name))[0]
    assert all(torch.equal(plain[k], cast[k]) for k in plain)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["zero", "large", "tiny", "equal"])
def test_extreme_features(name, kind):
    change = {
        "zero": lambda m: 0 * m,
        "large": lambda m: (1e4 * m).clamp(-3e4, 3e4).half(),
        "tiny": lambda m: 1e-12 * m,
        "equal": lambda m: m[:1].expand_as(m).contiguous(),
    }[kind]
    terms, _, f_s, _ = step(prepared(name), change=change)
    assert all(t.isfinite() for t in terms.values())
    if kind == "large":
        return  # gradients in half precision may be beyond its range, as those of any loss
    assert all(m.grad is None or m.grad.isfinite().all() for m in tensors(f_s))


@pytest.mark.parametrize("name", NAMES)
def test_hyperparameters_rebuild_it(name):
    loss = losses.build(name)
    assert losses.build(name, **loss.hyperparameters).hyperparameters == loss.hyperparameters and loss.ce_weight == 1.0
    for teacher, student in loss.pair_settings:
        assert {teacher, student} <= set(models.available())
        losses.build(name, **loss.pair_settings[teacher, student])
    for argument, value in loss.hyperparameters.items():
        wrong = "yes" if isinstance(value, bool) else -1
        with pytest.raises(ValueError, match=argument):
            losses.build(name, **{argument: wrong})


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_acts_on_all_but_the_cross_entropy(name):
    weights = [k for k in losses.build(name).hyperparameters if k.endswith("weight") and k != "ce_weight"]
    once, off = step(prepared(name))[0], step(prepared(name, ce_weight=0.0, **dict.fromkeys(weights, 0.0)))[0]
    assert all(v == 0 for v in off.values())
    twice = step(prepared(name, **{k: 2 * getattr(losses.build(name), k) for k in weights}))[0]
    for k in once:
        torch.testing.assert_close(twice[k], once[k] if k == "ce" else 2 * once[k])


@pytest.mark.parametrize("name", NAMES)
def test_without_a_target_there_is_no_cross_entropy(name):
    loss, (_, z_s, f_s), (_, z_t, f_t) = prepared(name), network("resnet8"), network("resnet14")
    assert "ce" not in loss.terms(z_s, z_t, None, f_s, f_t, INDEX)
    value, terms = loss.value_and_terms(z_s, z_t, TARGET, f_s, f_t, INDEX)
    assert value.requires_grad == bool(list(loss.parameters())) and not any(t.requires_grad for t in terms.values())


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fitnet", "vid", "crd", "ofd", "reviewkd"])
def test_before_prepare(name):
    (_, z_s, f_s), (_, z_t, f_t) = network("resnet8"), network("resnet14")
    with pytest.raises(ValueError, match=r"call prepare\(student, teacher, example, data\) first"):
        losses.build(name)(z_s, z_t, TARGET, f_s, f_t, INDEX)


@pytest.mark.parametrize("name", NAMES)
def test_features_and_a_teacher_are_needed(name):
    loss, (student, z_s, f_s), (_, z_t, _) = prepared(name), network("resnet8"), network("resnet14")
    with pytest.raises(ValueError, match="teacher_features"):
        loss(z_s, z_t, TARGET, f_s, None, INDEX)
    with pytest.raises(ValueError, match="student_features"):
        loss(z_s, z_t, TARGET)
    if name not in ("sp", "pkt", "rkd"):
        with pytest.raises(ValueError, match="teacher must be"):
            losses.build(name).prepare(student, None, X, DATA)
        with pytest.raises(ValueError, match="Linear returns no features"):
            losses.build(name).prepare(torch.nn.Linear(2, 2), student, X, DATA)


@pytest.mark.parametrize("name", ["at", "vid", "ofd", "reviewkd"])
def test_stages_that_do_not_fit(name):
    with pytest.raises(ValueError, match=f"'{name}' .* student has 4 .* teacher 3.* 'crd' fit any pair"):
        prepared(name, ("resnet14", "vgg8"))


def test_fitnet_sizes():
    for pair, kernel in (
        (("resnet14", "resnet8"), 1),
        (("resnet32x4", "ShuffleV1"), 4),
        (("MobileNetV2", "vgg8"), 1),
        (("ShuffleV1", "resnet8"), 3),
    ):
        assert prepared("fitnet", pair).regressor[0].kernel_size == (kernel, kernel), pair
    with pytest.raises(ValueError, match="stage must be at most 3"):
        prepared("fitnet", stage=4)
    with pytest.raises(ValueError, match="4×4 to the teacher's 16×16"):
        FitNet(stage=3).prepare(network("MobileNetV2")[0], resized(), X)


class resized(torch.nn.Module):
    """A teacher whose third stage is four times as large as the student's."""

    def forward(self, x, features=False):
        m = x.mean(1, keepdim=True)
        maps = tuple(F.adaptive_avg_pool2d(m, 16) for _ in range(5))
        return x, Features(maps, maps[1:], m.mean((2, 3)))


# ---- formulas -----------------------------------------------------------------------------------------------------


def test_fitnet_rectifies_only_what_is_rectified():
    assert isinstance(prepared("fitnet").regressor[-1], torch.nn.ReLU)
    assert isinstance(prepared("fitnet", ("wrn_40_2", "wrn_16_2")).regressor[-1], torch.nn.BatchNorm2d)


@pytest.mark.parametrize("name", ["at", "sp", "pkt", "rkd"])
def test_a_student_that_equals_its_teacher_has_no_loss(name):
    _, z, f = network("resnet8")
    f = leaves(f)
    value = losses.build(name)(z, z, None, f, f)
    value.backward()
    assert value.abs() < 1e-6 and all(m.grad is None or m.grad.abs().max() < 1e-4 for m in tensors(f))


def test_at_literally():
    _, z, f_s = network("resnet8")
    f_t = network("wrn_40_2")[2]
    value = 0.0
    for s, t in zip(f_s.stages[1:], f_t.stages[1:]):
        a, b = (m.square().mean(1).flatten(1) for m in (s, t))
        value = value + 1000 * ((a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)) ** 2).mean()
    torch.testing.assert_close(losses.build("at")(z, z, None, f_s, f_t), value)
    torch.testing.assert_close(attention(f_s.stages[1], p=4.0), F.normalize(f_s.stages[1].pow(4).mean(1).flatten(1)))


def test_sp_and_pkt_literally():
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(6, 5, generator=g, dtype=torch.float64) for _ in range(2))
    G = lambda q: torch.stack([row / row.norm() for row in q @ q.T])
    torch.testing.assert_close(similarities(s), G(s))
    closeness = lambda f: (torch.cosine_similarity(f[:, None], f[None], dim=2) + 1) / 2
    p, q = (closeness(f) / closeness(f).sum(1, keepdim=True) for f in (t, s))
    ours = (jump_log_probabilities(t).exp() * (jump_log_probabilities(t) - jump_log_probabilities(s))).mean()
    torch.testing.assert_close(ours, (p * (p / q).log()).sum() / 36)
    assert ours > 0


def test_rkd_literally():
    f = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d, cos = distances_and_angles(f)
    pairs = torch.stack([torch.stack([(f[i] - f[j]).norm() for j in range(5)]) for i in range(5)])
    torch.testing.assert_close(d, pairs / pairs[pairs > 0].mean())
    for i, j, k in ((0, 1, 2), (3, 0, 4), (1, 4, 1)):
        torch.testing.assert_close(cos[j, i, k], torch.cosine_similarity(f[i] - f[j], f[k] - f[j], dim=0))
    assert (cos[2, 2] == 0).all() and torch.autograd.gradcheck(lambda x: distances_and_angles(x), f.requires_grad_())


def test_vid_is_the_gaussian_likelihood():
    g = torch.Generator().manual_seed(0)
    mean, value = torch.randn(2, 4, 3, 2, 2, generator=g)
    rho = torch.tensor([-20.0, 0.0, 50.0])
    variance = (F.softplus(rho) + 1e-5)[:, None, None].expand_as(mean)
    torch.testing.assert_close(normal_nll(mean, value, rho), F.gaussian_nll_loss(mean, value, variance, eps=1e-12))


def test_terms_are_weights_times_means():
    """What the table's weights belong to: a sum in place of a mean would change the loss by orders of magnitude."""
    x = torch.randn(6, 3, 32, 32)
    student, teacher = models.build("resnet8"), models.build("resnet14").eval()
    (z_s, f_s), (z_t, f_t) = student(x, features=True), teacher(x, features=True)
    term = lambda loss, name: loss.terms(z_s, z_t, None, f_s, f_t)[name]
    G_s, G_t = (similarities(f.stages[-1]) for f in (f_s, f_t))
    torch.testing.assert_close(term(losses.build("sp"), "similarity"), 3000 * (G_s - G_t).square().sum() / 36)
    p_t, p_s = (jump_log_probabilities(f.pooled).exp() for f in (f_t, f_s))
    torch.testing.assert_close(
        term(losses.build("pkt"), "probabilities"), 30000 * (p_t * (p_t / p_s).log()).sum() / 36, rtol=1e-3, atol=1e-4
    )
    (d_s, cos_s), (d_t, cos_t) = (distances_and_angles(f.pooled) for f in (f_s, f_t))
    huber = lambda a, b: torch.where((a - b).abs() < 1, (a - b).square() / 2, (a - b).abs() - 0.5).sum()
    torch.testing.assert_close(term(losses.build("rkd"), "distance"), 25 * huber(d_s, d_t) / 36)
    torch.testing.assert_close(term(losses.build("rkd"), "angle"), 50 * huber(cos_s, cos_t) / 216)
    vid = losses.build("vid").prepare(student, teacher, x)
    stages = [
        ((mean(s) - t).square() / 5 + math.log(5)).sum() / 2 / t.numel()
        for mean, s, t in zip(vid.means, f_s.stages[1:], f_t.stages[1:])
    ]
    torch.testing.assert_close(term(vid, "information"), sum(stages), rtol=1e-4, atol=1e-5)
