"""The methods of 2024 to 2026, and LDRLD's own switches: identities, slow references, derivatives, refusals."""

import pytest
import torch
import torch.nn.functional as F

from ldrld import LDRLD, losses
from ldrld.experiments.config import RunConfig, name_of
from ldrld.losses.groups import anchored, log_masses, mass_kl
from ldrld.losses.relations import dway_kl, remaining_kl

INF, IGNORED = torch.inf, -100


def sample(batch=16, classes=20, dtype=torch.float64, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    z_s, z_t = (scale * torch.randn(batch, classes, generator=g, dtype=torch.float64) for _ in range(2))
    return z_s.to(dtype), z_t.to(dtype), torch.randint(classes, (batch,), generator=g)


def value_and_gradient(loss, z_s, *rest):
    z = z_s.clone().requires_grad_()
    value = loss(z, *rest)
    return value.detach(), torch.autograd.grad(value, z)[0]


def assert_same(a, b, *given, rtol=1e-7, atol=1e-9):
    """Two losses have the same value and the same gradient."""
    torch.testing.assert_close(value_and_gradient(a, *given), value_and_gradient(b, *given), rtol=rtol, atol=atol)


KD = dict(kd_weight=1.0, ce_weight=0.0)
ONES = dict(mass_weight=1.0, top_weight=1.0, rest_weight=1.0, ce_weight=0.0)

# ---- groups -----------------------------------------------------------------------------------------------------


def test_masses_by_hand():
    z_s, z_t, _ = sample()
    groups = [z_t.topk(3).indices[:, :1], z_t.topk(3).indices[:, 1:]]
    p = (z_s / 4).softmax(1)
    a = torch.stack([p.gather(1, group).sum(1) for group in groups], 1)
    expected = torch.cat([a, 1 - a.sum(1, keepdim=True)], 1)
    torch.testing.assert_close(log_masses(z_s, groups, 4.0).softmax(1), expected)
    assert log_masses(z_s, [z_s.topk(20).indices], 4.0).shape == (16, 1)  # no class is left over
    assert not mass_kl(z_s, z_t, [z_s.topk(20).indices], 4.0).any()


@pytest.mark.parametrize("d", [1, 4, 19])
def test_the_three_parts_are_kd(d):
    z_s, z_t, _ = sample()
    G = z_s.topk(d).indices
    a = (z_t / 4).softmax(1).gather(1, G).sum(1)
    within = dway_kl(z_s.gather(1, G), z_t.gather(1, G))
    parts = mass_kl(z_s, z_t, [G]) + a * within + (1 - a) * remaining_kl(z_s, z_t, G)
    torch.testing.assert_close(parts, dway_kl(z_s, z_t))


# ---- GDKD -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["top", "worst"])
@pytest.mark.parametrize("name, k", [("gdkd", 1), ("gdkd", 5), ("gdkd", 19), ("gdkd3", 2), ("gdkd3", 4)])
def test_gdkd_with_the_weights_that_kd_gives(name, k, group):
    gdkd = losses.build(name, k=k, auto_weight=True, group=group, **ONES)
    assert_same(gdkd, losses.build("kd", **KD), *sample())


def test_gdkd_of_one_class_is_dkd_where_the_teacher_is_right():
    z_s, z_t, _ = sample()
    dkd = losses.build("dkd", alpha=0.7, beta=6.0)
    assert_same(losses.build("gdkd", k=1, mass_weight=0.7, rest_weight=6.0), dkd, z_s, z_t, z_t.argmax(1))


def test_gdkds_parts_see_one_thing_each():
    z_s, z_t, y = sample()
    G = z_t.topk(5).indices
    shifted = z_s.scatter_add(1, G, torch.full((16, 5), 2.0, dtype=z_s.dtype))
    before, after = (losses.build("gdkd").terms(z, z_t, y) for z in (z_s, shifted))
    for term in ("top", "rest"):
        torch.testing.assert_close(after[term], before[term])
    assert (after["mass"] - before["mass"]).abs() > 0.1
    z = z_s.clone().requires_grad_()
    for term in ("mass", "top", "rest"):
        gradient = torch.autograd.grad(losses.build("gdkd").terms(z, z_t)[term], z)[0]
        assert gradient.sum(1).abs().max() < 1e-12, term


def test_gdkd_in_both_directions():
    z_s, z_t, _ = sample()
    of = lambda divergence, a, b: losses.build("gdkd", divergence=divergence, **ONES).terms(a, b)
    forward, reverse, both = (of(d, z_s, z_t) for d in ("forward", "reverse", "symmetric"))
    G = z_t.topk(5).indices
    expected = 16 * dway_kl(z_t.gather(1, G), z_s.gather(1, G)).mean()
    torch.testing.assert_close(reverse["top"], expected)
    for term in forward:
        torch.testing.assert_close(both[term], (forward[term] + reverse[term]) / 2)


@pytest.mark.parametrize("options", [{}, {"divergence": "reverse"}, {"auto_weight": True}, {"group": "worst"}])
@pytest.mark.parametrize("name", ["gdkd", "gdkd3"])
def test_derivatives_of_gdkd(name, options):
    z_s, z_t, y = sample(3, 7)
    loss = losses.build(name, **options)
    assert torch.autograd.gradcheck(lambda z: loss(z, z_t, y), z_s.requires_grad_())


# ---- LDRLD's switches -------------------------------------------------------------------------------------------


def test_the_switches_off_change_nothing():
    z_s, z_t, y = sample(dtype=torch.float32)
    plain, off = LDRLD(), LDRLD(mass_weight=0.0, anchor=False)
    assert plain(z_s, z_t, y) == off(z_s, z_t, y) and list(plain.terms(z_s, z_t, y)) == ["ce", "pairs", "llki", "rntk"]
    assert "mass_weight" not in plain.hyperparameters and "anchor" not in plain.hyperparameters
    assert LDRLD(mass_weight=2).hyperparameters["mass_weight"] == 2.0 and LDRLD(anchor=True).hyperparameters["anchor"]


def test_the_switches_are_named_when_on():
    common = dict(dataset="digits", model="resnet8", loss="ldrld", teacher=RunConfig(dataset="digits", model="resnet14"))
    plain, same, mass, anchor = (
        RunConfig(loss_args=args, **common)
        for args in ({}, {"mass_weight": 0.0, "anchor": False}, {"mass_weight": 1.0}, {"anchor": True})
    )
    assert plain == same and name_of(plain) == name_of(same)
    assert len({name_of(c) for c in (plain, mass, anchor)}) == 3


@pytest.mark.parametrize("rank_by", ["student", "teacher", "label"])
def test_ldrld_with_mass_and_without_pairs_is_kd(rank_by):
    z_s, z_t, y = sample()
    for k in range(len(y)):
        one = z_s[k : k + 1], z_t[k : k + 1], y[k : k + 1]
        scores = {"student": one[0], "teacher": one[1], "label": one[0].scatter(1, one[2][:, None], INF)}[rank_by]
        a = (one[1] / 4).softmax(1).gather(1, scores.topk(7).indices).sum().item()
        parts = dict(mass_weight=1.0, alpha=a, beta=1 - a, pairs_weight=0.0, normalize=False, ce_weight=0.0)
        assert_same(LDRLD(rank_by=rank_by, **parts), losses.build("kd", **KD), *one)


def test_without_mass_nothing_sees_a_constant_on_the_group():
    z_s, z_t, y = sample()
    pi = z_s.topk(7).indices
    raised = z_s.scatter_add(1, pi, torch.full((16, 7), 3.0, dtype=z_s.dtype))
    plain, mass = LDRLD(ce_weight=0.0), LDRLD(ce_weight=0.0, mass_weight=1.0)
    torch.testing.assert_close(plain(raised, z_t, y), plain(z_s, z_t, y))
    assert (mass(raised, z_t, y) - mass(z_s, z_t, y)).abs() > 0.1


def test_an_anchor_replaces_the_last_class_only_where_it_is_missing():
    z_s, z_t, y = sample(64)
    pi, top = z_s.topk(7).indices, z_t.argmax(1)
    there = (pi == top[:, None]).any(1)
    found = anchored(pi, z_t)
    assert 0 < there.sum() < 64 and found[there].equal(pi[there])
    assert found[:, :-1].equal(pi[:, :-1]) and found[~there, -1].equal(top[~there])
    assert_same(LDRLD(anchor=True), LDRLD(), z_s[there], z_t[there], y[there])
    assert LDRLD(anchor=True)(z_s[~there], z_t[~there], y[~there]) != LDRLD()(z_s[~there], z_t[~there], y[~there])


@pytest.mark.parametrize("options", [{"mass_weight": 1.0}, {"anchor": True}, {"mass_weight": 0.5, "anchor": True}])
def test_derivatives_of_the_switches(options):
    z_s, z_t, y = sample(3, 12)
    loss = LDRLD(depth=4, **options)
    assert torch.autograd.gradcheck(lambda z: loss(z, z_t, y), z_s.requires_grad_())


@pytest.mark.parametrize("options", [{"mass_weight": 1.0}, {"anchor": True}])
def test_the_switches_with_ruled_out_classes_and_ignored_rows(options):
    z_s, z_t, y = sample()
    loss = LDRLD(**options)
    wanted = value_and_gradient(loss, z_s[:, :15], z_t[:, :15], y % 15)
    z_s[:, 15:] = z_t[:, 15:] = -INF
    value, gradient = value_and_gradient(loss, z_s, z_t, y % 15)
    torch.testing.assert_close((value, gradient[:, :15]), wanted)
    assert not gradient[:, 15:].any() and LDRLD(depth=20, **options)(z_s, z_t, y % 15).isfinite()
    kept = torch.arange(16) % 3 != 1
    wanted = value_and_gradient(loss, z_s[kept], z_t[kept], y[kept] % 15)
    z_s[1], z_t[4] = torch.nan, torch.nan
    value, gradient = value_and_gradient(loss, z_s, z_t, (y % 15).where(kept, IGNORED))
    torch.testing.assert_close((value, gradient[kept]), wanted)


# ---- all of them ------------------------------------------------------------------------------------------------

WRONG = [
    ("gdkd", {"k": 0}, "k must be an integer of at least 1"),
    ("gdkd3", {"k": 1}, "k must be an integer of at least 2"),
    ("gdkd", {"group": "best"}, "group must be one of 'top', 'worst'"),
    ("gdkd", {"divergence": "both"}, "divergence must be one of"),
    ("gdkd", {"mass_weight": -1.0}, "mass_weight must be a finite number of at least 0"),
    ("ldrld", {"mass_weight": -1.0}, "mass_weight must be a finite number of at least 0"),
    ("ldrld", {"anchor": 1}, "anchor must be True or False"),
]


@pytest.mark.parametrize("name, options, message", WRONG)
def test_wrong_hyperparameters(name, options, message):
    with pytest.raises(ValueError, match=message):
        losses.build(name, **options)


def test_a_group_of_all_classes_is_refused():
    with pytest.raises(ValueError, match="k must be below the number of classes, 20, got 20"):
        losses.build("gdkd", k=20)(*sample())
