"""The methods of 2024 to 2026, and LDRLD's own switches: identities, slow references, derivatives, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F

from ldrld import LDRLD, data, losses, models
from ldrld.core.seeds import seeded
from ldrld.experiments.config import RunConfig, name_of
from ldrld.losses.features.dhkd import binary_kl_norm
from ldrld.losses.features.wkdf import gaussian
from ldrld.losses.groups import anchored, log_masses, mass_kl
from ldrld.losses.ldrld.varied_depth import entropy_depths
from ldrld.losses.logits.abkd import ab_divergence
from ldrld.losses.logits.luminet import by_class
from ldrld.losses.logits.pld import plackett_luce, ranking
from ldrld.losses.logits.sinkd import sinkhorn_plan, transport_costs
from ldrld.losses.logits.wkd import class_cka, transport
from ldrld.losses.relations import dway_kl, remaining_kl, top_d

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
    assert torch.equal(reverse["mass"], forward["mass"])  # as in the official code
    assert (reverse["rest"] - forward["rest"]).abs() > 1e-3
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
    plain, off = LDRLD(), LDRLD(mass_weight=0.0, anchor=False, depth_by="fixed")
    assert plain(z_s, z_t, y) == off(z_s, z_t, y) and list(plain.terms(z_s, z_t, y)) == ["ce", "pairs", "llki", "rntk"]
    assert not {"mass_weight", "anchor", "depth_by"} & plain.hyperparameters.keys()
    assert LDRLD(depth_by="entropy").hyperparameters["depth_by"] == "entropy"
    assert LDRLD(mass_weight=2).hyperparameters["mass_weight"] == 2.0 and LDRLD(anchor=True).hyperparameters["anchor"]


def test_the_switches_are_named_when_on():
    teacher = RunConfig(dataset="digits", model="resnet14")
    common = dict(dataset="digits", model="resnet8", loss="ldrld", teacher=teacher)
    off = {"mass_weight": 0.0, "anchor": False, "depth_by": "fixed"}
    plain, same, *on = (
        RunConfig(loss_args=args, **common)
        for args in ({}, off, {"mass_weight": 1.0}, {"anchor": True}, {"depth_by": "entropy"})
    )
    assert plain == same and name_of(plain) == name_of(same)
    assert len({name_of(c) for c in (plain, *on)}) == 4


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


BOTH = {"mass_weight": 0.5, "anchor": True}
VARIED = {"depth_by": "entropy"}


@pytest.mark.parametrize("options", [{"mass_weight": 1.0}, {"anchor": True}, BOTH, VARIED, {**BOTH, **VARIED}])
def test_derivatives_of_the_switches(options):
    z_s, z_t, y = sample(3, 12)
    loss = LDRLD(depth=4, **options)
    assert torch.autograd.gradcheck(lambda z: loss(z, z_t, y), z_s.requires_grad_())


@pytest.mark.parametrize("options", [{"mass_weight": 1.0}, {"anchor": True}, VARIED, {**BOTH, **VARIED}])
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


def varied(batch=48, classes=20):
    """A teacher whose entropy varies from sample to sample, and the depths that follow from it."""
    z_s, z_t, y = sample(batch, classes)
    z_t = z_t * torch.linspace(0.1, 8, batch, dtype=z_t.dtype)[:, None]
    return z_s, z_t, y, entropy_depths(top_d(z_s, z_t, 7)[2])


def test_depths_are_numbers_of_classes():
    equal = torch.zeros(3, 9).masked_fill(torch.arange(9) >= torch.tensor([[3], [1], [9]]), -500.0)
    assert entropy_depths(equal).tolist() == [3, 2, 9]  # as many as share the probability, and at least a pair
    assert entropy_depths(equal.half(), 0.5).tolist() == [3, 2, 9]
    *_, depths = varied()
    assert depths.min() == 2 and depths.max() == 7 and len(depths.unique()) >= 5


@pytest.mark.parametrize("rank_by", ["student", "teacher", "label"])
@pytest.mark.parametrize("options", [{}, BOTH, {"normalize": False}, {"pairs_weight": 0.0}, {"weighting": "none"}])
def test_a_batch_of_mixed_depths_is_its_samples_one_by_one(options, rank_by):
    z_s, z_t, y, _ = varied()
    depths = entropy_depths(top_d(z_s, z_t, 7, rank_by, y)[2])

    def one_by_one(z_s, z_t, y):
        fixed = (LDRLD(depth=int(d), rank_by=rank_by, **options) for d in depths)
        return sum(loss(z_s[k : k + 1], z_t[k : k + 1], y[k : k + 1]) for k, loss in enumerate(fixed)) / len(y)

    assert_same(LDRLD(depth_by="entropy", rank_by=rank_by, **options), one_by_one, z_s, z_t, y)


@pytest.mark.parametrize("d", [2, 4, 7])
def test_equal_entropies_give_a_fixed_depth(d):
    z_s, z_t, y = sample()
    pi = z_s.topk(7).indices
    logits = torch.zeros(16, 7, dtype=z_t.dtype).masked_fill(torch.arange(7) >= d, -300.0)
    z_t = z_t.scatter(1, pi, logits)
    assert entropy_depths(z_t.gather(1, pi)).eq(d).all()
    assert_same(LDRLD(depth_by="entropy", **BOTH), LDRLD(depth=d, **BOTH), z_s, z_t, y)


def test_depth_by_entropy_up_to_all_classes():
    z_s, _, y = sample(classes=7)
    z_t = torch.zeros_like(z_s)
    loss, fixed = LDRLD(beta=0.0, depth_by="entropy", mass_weight=1.0), LDRLD(beta=0.0, mass_weight=1.0)
    assert_same(loss, fixed, z_s, z_t, y)
    assert value_and_gradient(loss, z_s, 9 * sample(classes=7, seed=1)[1], y)[1].isfinite().all()


def test_micro_batches_of_mixed_depths_add_up():
    z_s, z_t, y, _ = varied()
    loss = LDRLD(depth_by="entropy")
    parts = sum(loss(z_s[k : k + 16], z_t[k : k + 16], y[k : k + 16], normalizer=48) for k in (0, 16, 32))
    torch.testing.assert_close(parts, loss(z_s, z_t, y))


# ---- TeKAP ------------------------------------------------------------------------------------------------------


def test_tekap_without_noise_is_kd():
    still, control = losses.build("tekap", noise=0.0, factor=1.0), losses.build("kd", kd_weight=3.06)
    assert_same(still, control, *sample())
    assert_same(losses.build("tekap", copies=0), losses.build("kd"), *sample())


def test_tekap_by_hand():
    z_s, z_t, y = sample()
    loss = losses.build("tekap")
    loss.at_epoch(2, seed=5)
    value = loss(z_s, z_t, y)
    xi = torch.randn(3, 16, 20, generator=seeded(5, 2, 0))
    kd = lambda x: 16 * dway_kl(z_s, x).mean()
    expected = 0.9 * (kd(z_t) + 0.8 * sum(kd(0.9 * z_t + 0.1 * n) for n in xi))
    torch.testing.assert_close(value, 0.1 * F.cross_entropy(z_s, y) + expected)


def test_tekaps_noise_is_new_in_each_call_and_resumes():
    z_s, z_t, _ = sample()
    of = lambda loss: loss(z_s, z_t).item()
    loss, resumed = losses.build("tekap"), losses.build("tekap")
    drawn = []
    for epoch in (1, 2):
        loss.at_epoch(epoch, seed=3)
        drawn.append([of(loss) for _ in range(3)])
    resumed.at_epoch(2, seed=3)
    assert [of(resumed) for _ in range(3)] == drawn[1]
    assert len({*drawn[0], *drawn[1]}) == 6
    resumed.at_epoch(2, seed=4)
    assert of(resumed) != drawn[1][0]


def test_tekap_is_kd_in_direction():
    z_s, z_t, _ = sample(64, 100)
    tekap, kd = (value_and_gradient(losses.build(name, ce_weight=0.0), z_s, z_t)[1] for name in ("tekap", "kd"))
    assert F.cosine_similarity(tekap.flatten(), kd.flatten(), dim=0) > 0.998
    assert (tekap.norm() / kd.norm()).item() == pytest.approx(3.26, abs=0.05)


# ---- PLD --------------------------------------------------------------------------------------------------------


def test_pld_by_hand():
    z_s, z_t, y = sample(classes=7)
    expected = []
    for s, t, k in zip(z_s, z_t, y.tolist()):
        order = [k] + [c for c in t.argsort(descending=True).tolist() if c != k]
        q = (t / 4).softmax(0)
        expected.append(sum(q[c] * (s[order[i:]].logsumexp(0) - s[c]) for i, c in enumerate(order)))
    torch.testing.assert_close(losses.build("pld")(z_s, z_t, y), torch.stack(expected).mean())


def test_pld_with_all_weight_on_the_label_is_ce():
    z_s, z_t, y = sample()
    first = torch.zeros_like(z_s).scatter(1, y[:, None], 1.0)
    value = plackett_luce(z_s, ranking(z_t, y), first)
    torch.testing.assert_close(value, F.cross_entropy(z_s, y, reduction="none"))


def test_pld_is_convex_and_sees_no_shift():
    z_s, z_t, y = sample(4, 6)
    loss = losses.build("pld")
    for row in range(4):
        one = lambda z, k=row: loss(z[None], z_t[k : k + 1], y[k : k + 1])
        hessian = torch.autograd.functional.hessian(one, z_s[row])
        assert torch.linalg.eigvalsh(hessian).min() > -1e-9
    torch.testing.assert_close(loss(z_s + 3, z_t, y), loss(z_s, z_t, y))
    assert value_and_gradient(loss, z_s, z_t, y)[1].sum(1).abs().max() < 1e-12


# ---- ABKD -------------------------------------------------------------------------------------------------------


def test_abkd_has_known_members_and_limits():
    z_s, z_t, _ = sample()
    log_q, log_p = z_s.log_softmax(1), z_t.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    for exponents, expected in {
        (1, 0): dway_kl(z_s, z_t, 1.0),
        (0, 1): dway_kl(z_t, z_s, 1.0),
        (0.5, 0.5): 2 * (p.sqrt() - q.sqrt()).square().sum(1),
        (1, 1): (p - q).square().sum(1) / 2,
        (0.7, 0): ab_divergence(log_p, log_q, 0.7, 1e-7),
        (0, 2): ab_divergence(log_p, log_q, 1e-7, 2),
    }.items():
        torch.testing.assert_close(ab_divergence(log_p, log_q, *exponents), expected, rtol=1e-5, atol=1e-6)
        assert ab_divergence(log_p, log_p, *exponents).abs().max() < 1e-12 and (expected > 0).all()


def test_abkd_at_one_and_zero_is_kd_without_the_square_of_the_temperature():
    abkd = losses.build("abkd", alpha=1.0, beta=0.0, ab_weight=16.0, ce_weight=0.0)
    assert_same(abkd, losses.build("kd", **KD), *sample())


# ---- CSD --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["student", "teacher", "uniform"])
@pytest.mark.parametrize("second", ["student", "teacher", "uniform"])
def test_csd_is_its_double_sum(first, second):
    z_s, z_t, _ = sample()
    w = {"student": (z_s / 4).softmax(1), "teacher": (z_t / 4).softmax(1), "uniform": torch.full_like(z_s, 1 / 20)}
    d = z_s - z_t
    squares = (d[:, None, :] - d[:, :, None]).square()
    slow = (w[first][:, :, None] * w[second][:, None, :] * squares).sum((1, 2)).mean() / 2
    csd = losses.build("csd", first=first, second=second, ce_weight=0.0, score_weight=1.0)
    torch.testing.assert_close(csd(z_s, z_t), slow)
    value, gradient = value_and_gradient(csd, z_s, z_t)
    mean = {who: (weights * d).sum(1, keepdim=True) for who, weights in w.items()}
    expected = w[first] * (d - mean[second]) + w[second] * (d - mean[first])
    torch.testing.assert_close(16 * gradient, expected)
    torch.testing.assert_close(csd(z_s + 3, z_t), value)
    assert csd(z_t + 3, z_t).abs() < 1e-12


def test_csd_is_twice_the_kl_near_the_teacher():
    _, z_t, _ = sample()
    near = z_t + 1e-3 * sample(seed=1)[0]
    csd = losses.build("csd", temperature=1.0, ce_weight=0.0, score_weight=1.0)
    assert (csd(near, z_t) / dway_kl(near, z_t, 1.0).mean()).item() == pytest.approx(2.0, abs=0.01)


# ---- LumiNet, LCKA, SinKD: over the batch -----------------------------------------------------------------------


def test_luminet_sees_no_affine_map_of_a_column():
    z_s, z_t, _ = sample(64)
    scale, shift = torch.linspace(0.5, 2, 20, dtype=z_s.dtype), torch.linspace(-9, 9, 20, dtype=z_s.dtype)
    loss = losses.build("luminet", ce_weight=0.0)
    torch.testing.assert_close(loss(scale * z_s + shift, z_t), loss(z_s, z_t), rtol=1e-4, atol=1e-4)
    assert loss(z_s[:1], z_t[:1]) == 0 and loss(z_t, z_t).abs() < 1e-9


def test_luminet_by_hand_and_its_warm_up():
    z_s, z_t, y = sample()
    h = lambda z: (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
    expected = 31**2 * dway_kl(h(z_s), h(z_t)).mean()
    loss = losses.build("luminet")
    torch.testing.assert_close(loss(z_s, z_t, y), 2 * F.cross_entropy(z_s, y) + expected)
    loss.at_epoch(5, 240)
    torch.testing.assert_close(loss(z_s, z_t), expected / 4)


def test_lcka_sees_no_rotation():
    z_s, z_t, _ = sample()
    Q = torch.linalg.qr(sample(20, 20, seed=1)[0])[0]
    for options in ({}, {"scale_rows": False}, {"centre": True}):
        loss = losses.build("lcka", ce_weight=0.0, **options)
        torch.testing.assert_close(loss(2 * z_s @ Q, z_t), loss(z_s, z_t))
        assert loss(z_t, z_t).abs() < 1e-9 < loss(z_s, z_t)
    centred = losses.build("lcka", centre=True, scale_rows=False)
    torch.testing.assert_close(centred(z_s + 3, z_t), centred(z_s, z_t))


@pytest.mark.parametrize("options", [{"centre": True}, {"class_weight": 5.0}, {"centre": True, "scale_rows": False}])
def test_rows_that_do_not_count_in_lcka(options):
    z_s, z_t, y = sample()
    loss, kept = losses.build("lcka", **options), torch.arange(16) % 3 != 1
    wanted = value_and_gradient(loss, z_s[kept], z_t[kept], y[kept])
    z_s[1] = torch.nan
    value, gradient = value_and_gradient(loss, z_s, z_t, y.where(kept, IGNORED))
    torch.testing.assert_close((value, gradient[kept]), wanted)


def test_sinkds_plan():
    P_s, P_t = (z.softmax(1) for z in sample()[:2])
    W = transport_costs(P_s, P_t)
    torch.testing.assert_close(W, (P_s[:, None] - P_t).abs().sum(2))
    plan = sinkhorn_plan(W, 0.1, 20)
    torch.testing.assert_close(plan.sum(0), torch.ones(16, dtype=W.dtype))
    assert (plan.sum(1) - 1).abs().max() < 0.1
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sinkhorn_plan(W[order][:, order], 0.1, 20), plan[order][:, order])
    loss = losses.build("sinkd", epsilon=0.01, ce_weight=0.0, kd_weight=0.0)
    assert loss(sample()[0], sample()[0]) < 1e-6


# ---- what −∞ in the teacher alone means to a loss on logits ------------------------------------------------------


@pytest.mark.parametrize("name", ["csd", "lcka"])
def test_a_class_without_a_logit_is_left_out(name):
    z_s, z_t, y = sample()
    cut = z_s[:, :15], z_t[:, :15]
    z_t[:, 15:] = -INF
    distilled = lambda *z: sum(v for k, v in losses.build(name).terms(*z, y % 15).items() if k != "ce")
    torch.testing.assert_close(distilled(z_s, z_t), distilled(*cut))


def test_a_class_that_luminets_teacher_rules_out_gets_probability_zero():
    z_s, z_t, _ = sample()
    z_t[:, 15:] = -INF
    far = by_class(z_t).where(z_t > -INF, -1e5)
    expected = 31**2 * dway_kl(by_class(z_s), far).mean()
    torch.testing.assert_close(losses.build("luminet")(z_s, z_t), expected)


# ---- EA-KD ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["kd", "dkd", "ldrld"])
@pytest.mark.parametrize("scale, divisor", [("ln C", math.log(20)), ("100", 100.0)])
def test_ea_kd_by_hand(base, scale, divisor):
    z_s, z_t, y = sample()
    H_s, H_t = (torch.distributions.Categorical(logits=z / 3).entropy() for z in (z_s, z_t))
    w = H_t / 2 * (1 + H_s / divisor)
    assert (w >= 0).all() and (w <= math.log(20)).all()
    loss = losses.build("entropy-weighted", loss=base, entropy_scale=scale, ce_weight=0.0)
    single = losses.build(base, ce_weight=0.0)
    one = lambda z, k: w[k] * single(z[k : k + 1], z_t[k : k + 1], y[k : k + 1])
    assert_same(loss, lambda z, *_: torch.stack([one(z, k) for k in range(16)]).mean(), z_s, z_t, y)


def test_ea_kd_keeps_the_cross_entropy_and_ignores_rows():
    z_s, z_t, y = sample()
    loss, kept = losses.build("entropy-weighted"), torch.arange(16) % 3 != 1
    torch.testing.assert_close(loss.terms(z_s, z_t, y)["ce"], 0.1 * F.cross_entropy(z_s, y))
    wanted = value_and_gradient(loss, z_s[kept], z_t[kept], y[kept])
    z_s[1] = torch.nan
    value, gradient = value_and_gradient(loss, z_s, z_t, y.where(kept, IGNORED))
    torch.testing.assert_close((value, gradient[kept]), wanted)


# ---- WKD-L ------------------------------------------------------------------------------------------------------


def costs_of(classes=20, seed=2):
    c = 0.49 + 0.05 * sample(classes, classes, seed=seed, scale=1.0)[0]
    return ((c + c.T) / 2).fill_diagonal_(1e-8)


def test_the_transport_by_hand():
    q_s, q_t = (z.softmax(1) for z in sample(4, 6)[:2])
    c = costs_of(6)
    for k in range(4):
        K, u = (-c / 0.05).exp(), torch.full((6,), 1 / 6, dtype=c.dtype)
        for _ in range(10):
            v = q_t[k] / (K.T @ u + 1e-8)
            u = q_s[k] / (K @ v + 1e-8)
        plan = u[:, None] * K * v
        torch.testing.assert_close(plan.sum(1), q_s[k], rtol=1e-5, atol=1e-7)
        start = torch.full((1, 6), 1 / 6, dtype=c.dtype)
        torch.testing.assert_close(transport(q_s[k : k + 1], q_t[k : k + 1], c, start)[0], (plan * c).sum())


def test_a_constant_cost_is_the_matrix_with_that_constant():
    z_s, z_t, y = sample()
    constant, matrix = losses.build("wkd", distance="constant"), losses.build("wkd")
    matrix.costs = torch.full((20, 20), 0.49, dtype=z_s.dtype).fill_diagonal_(0.0)
    assert_same(constant, matrix, z_s, z_t, y)


def test_wkd_sees_neither_a_shift_of_the_others_nor_the_order():
    z_s, z_t, y = sample()
    loss = losses.build("wkd", target_weight=0.0, ce_weight=0.0)
    loss.costs = costs_of()
    shifted = (z_s + 2).scatter(1, y[:, None], z_s.gather(1, y[:, None]))
    torch.testing.assert_close(loss(shifted, z_t, y), loss(z_s, z_t, y))
    assert not value_and_gradient(loss, z_s, z_t, y)[1].gather(1, y[:, None]).any()
    order, before = torch.randperm(20, generator=torch.Generator().manual_seed(0)), loss(z_s, z_t, y)
    loss.costs = loss.costs[order][:, order]
    torch.testing.assert_close(loss(z_s[:, order], z_t[:, order], order.argsort()[y]), before)


def test_wkds_schedule_and_its_distances():
    loss = losses.build("wkd")
    ramps = []
    for epoch in (1, 150, 195, 240):
        loss.at_epoch(epoch, 240)
        ramps.append(loss.ramp)
    assert ramps == pytest.approx([1.0, 1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="'wkd' has no distances yet"):
        loss(*sample())
    digits, teacher = data.load("digits"), models.build("resnet8", 10)
    state = {k: v.clone() for k, v in teacher.state_dict().items()}
    loss.prepare(None, teacher, torch.zeros(1), digits)
    assert loss.costs.shape == (10, 10) and loss.costs.isfinite().all() and teacher.training
    assert loss.costs.diagonal().abs().max() < 1e-5 and ((loss.costs > 1e-3) | torch.eye(10, dtype=torch.bool)).all()
    assert all(v.equal(state[k]) for k, v in teacher.state_dict().items())
    with pytest.raises(ValueError, match="data must be given for 'wkd'"):
        losses.build("wkd").prepare(None, teacher, torch.zeros(1))


def test_class_cka_by_hand():
    X = sample(3 * 50, 4)[0].reshape(3, 50, 4)
    centred = X - X.mean(1, keepdim=True)
    norm = lambda i, j: torch.linalg.matrix_norm(centred[j].T @ centred[i])
    expected = norm(0, 1) ** 2 / (norm(0, 0) * norm(1, 1))
    torch.testing.assert_close(class_cka(X)[0, 1], expected)


# ---- all of them ------------------------------------------------------------------------------------------------

DERIVATIVES = [
    ("tekap", {"noise": 0.0}),
    ("pld", {}),
    ("abkd", {}),
    ("abkd", {"alpha": 0.0, "beta": 0.5}),
    ("csd", {"detach": False}),
    ("csd", {"first": "teacher", "second": "uniform"}),
    ("luminet", {}),
    ("lcka", {}),
    ("lcka", {"centre": True, "class_weight": 2.0}),
    ("sinkd", {}),
    ("wkd", {"distance": "constant"}),
]


@pytest.mark.parametrize("name, options", DERIVATIVES)
def test_derivatives(name, options):
    z_s, z_t, y = sample(4, 6, scale=1.0)
    loss = losses.build(name, **options)
    assert torch.autograd.gradcheck(lambda z: loss(z, z_t, y), z_s.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name, options", DERIVATIVES)
def test_half_precision_is_computed_in_single(name, options, dtype):
    z_s, z_t, y = sample(dtype=dtype)
    loss = losses.build(name, **options)
    value, gradient = value_and_gradient(loss, z_s, z_t, y)
    single = value_and_gradient(loss, z_s.float(), z_t.float(), y)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value, single[0])
    torch.testing.assert_close(gradient.float(), single[1], rtol=0.02, atol=1e-4)


WRONG = [
    ("tekap", {"copies": -1}, "copies must be an integer of at least 0"),
    ("tekap", {"noise": -0.1}, "noise must be a finite number of at least 0"),
    ("pld", {"temperature": 0}, "temperature must be a finite number above 0"),
    ("abkd", {"alpha": 0.0, "beta": 0.0}, "alpha or beta must be above 0"),
    ("abkd", {"alpha": -1.0}, "alpha must be a finite number of at least 0"),
    ("csd", {"first": "label"}, "first must be one of"),
    ("csd", {"detach": 1}, "detach must be True or False"),
    ("luminet", {"alpha": -1}, "alpha must be a finite number of at least 0"),
    ("lcka", {"centre": "yes"}, "centre must be True or False"),
    ("sinkd", {"rounds": 0}, "rounds must be an integer of at least 1"),
    ("sinkd", {"epsilon": 0}, "epsilon must be a finite number above 0"),
    ("entropy-weighted", {"entropy_scale": "C"}, "entropy_scale must be one of 'ln C', '100'"),
    ("entropy-weighted", {"loss": "dist"}, "loss must have one value per sample to be weighted, but 'dist'"),
    ("wkd", {"distance": "cosine"}, "distance must be one of 'cka', 'constant'"),
    ("wkd", {"decay_from": 2}, "decay_from must be a number from 0 to 1"),
    ("gdkd", {"k": 0}, "k must be an integer of at least 1"),
    ("gdkd3", {"k": 1}, "k must be an integer of at least 2"),
    ("gdkd", {"group": "best"}, "group must be one of 'top', 'worst'"),
    ("gdkd", {"divergence": "both"}, "divergence must be one of"),
    ("gdkd", {"mass_weight": -1.0}, "mass_weight must be a finite number of at least 0"),
    ("ldrld", {"mass_weight": -1.0}, "mass_weight must be a finite number of at least 0"),
    ("ldrld", {"anchor": 1}, "anchor must be True or False"),
    ("ldrld", {"depth_by": "entrpy"}, "depth_by must be one of"),
]


@pytest.mark.parametrize("name, options, message", WRONG)
def test_wrong_hyperparameters(name, options, message):
    with pytest.raises(ValueError, match=message):
        losses.build(name, **options)


def test_a_group_of_all_classes_is_refused():
    with pytest.raises(ValueError, match="k must be below the number of classes, 20, got 20"):
        losses.build("gdkd", k=20)(*sample())


# ---- two heads, and a detached classifier -----------------------------------------------------------------------


def networks():
    torch.manual_seed(0)
    student, teacher = models.build("resnet8", 10), models.build("resnet14", 10).eval()
    x, y = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    with torch.no_grad():
        z_t, theirs = teacher(x, features=True)
    return student, teacher, x, y, z_t, theirs


def reaches(term, *parameters):
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return [d is not None and bool(d.any()) for d in found]


def test_binary_kl_norm_is_a_fair_coins_divergence():
    z_s, z_t, _ = sample()
    x = (z_s - z_t) / 2
    coin = torch.distributions.Bernoulli(logits=torch.zeros_like(x))
    expected = torch.distributions.kl_divergence(coin, torch.distributions.Bernoulli(logits=x)).sum(1)
    torch.testing.assert_close(binary_kl_norm(z_s, z_t, 2.0), expected)
    assert binary_kl_norm(1e4 * z_s.float(), z_t.float(), 2.0).isfinite().all()
    z_t[:, 15:] = -INF
    z_t = z_t.clamp(min=-1e9)
    torch.testing.assert_close(binary_kl_norm(z_s, z_t, 2.0), binary_kl_norm(z_s[:, :15], z_t[:, :15], 2.0))


@pytest.mark.parametrize("hidden", [0, 20])
def test_dhkds_heads_have_one_term_each(hidden):
    student, teacher, x, y, z_t, _ = networks()
    loss = losses.build("dhkd", hidden=hidden).prepare(student, teacher, x)
    z, seen = student(x, features=True)
    terms = loss.terms(z, z_t, y, seen)
    second = loss.second.first.weight if hidden else loss.second.last.weight
    parts = student.head.weight, second, student.conv1.weight
    assert reaches(terms["ce"], *parts) == [True, False, True] and reaches(terms["kd"], *parts) == [False, True, True]
    torch.testing.assert_close(terms["ce"], F.cross_entropy(z, y))
    if not hidden:
        expected = 4 * binary_kl_norm(loss.second(seen.pooled), z_t, 2.0).mean()
        torch.testing.assert_close(terms["kd"], expected)
    assert loss.deployed(student) is student


@pytest.mark.parametrize("kd_weight, conflicts", [(1.0, False), (3.0, True)])
def test_alignment_is_a_projection_of_all_gradients_together(kd_weight, conflicts):
    """As in the released optimizer: flattened, over all parameters, the KD gradient loses what opposes the CE's."""
    student, teacher, x, y, *_ = networks()
    z_t = (-9.0 if conflicts else 9.0) * torch.eye(10)[y]
    loss = losses.build("dhkd", align=True, kd_weight=kd_weight).prepare(student, teacher, x)
    z, seen = student(x, features=True)
    with torch.no_grad():
        loss.second.last.load_state_dict(student.head.state_dict())
    parameters = [*student.parameters(), *loss.parameters()]
    terms = loss.terms(z, z_t, y, seen)
    gradient = lambda term: torch.cat(
        [d.flatten() for d in torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)]
    )
    g_ce, g_kd = gradient(terms["ce"]), gradient(terms["kd"])
    assert (g_ce @ g_kd < 0) == conflicts
    expected = g_ce + g_kd - min((g_ce @ g_kd).item(), 0.0) / g_ce.norm() ** 2 * g_ce
    torch.testing.assert_close(gradient(loss(z, z_t, y, seen)), expected, rtol=1e-4, atol=1e-6)
    assert bool(terms["alignment"]) == conflicts
    with torch.no_grad():
        assert loss.terms(z, z_t, y, seen)["alignment"] == 0


def test_alignment_and_dropout_are_recorded_only_when_on():
    plain = losses.build("dhkd")
    assert not {"align", "dropout"} & plain.hyperparameters.keys() and not plain.why_eager(plain.hyperparameters)
    assert not plain.why_eager({"align": True}) and "dropout" in plain.why_eager({"dropout": 0.1})
    with pytest.raises(ValueError, match="dropout must be a number from 0 to below 1"):
        losses.build("dhkd", dropout=1.0)


def test_dropout_is_a_function_of_seed_epoch_and_call():
    student, teacher, x, y, z_t, _ = networks()
    loss = losses.build("dhkd", hidden=50, dropout=0.5).prepare(student, teacher, x)
    with torch.no_grad():
        z, seen = student.eval()(x, features=True)
        values = []
        for epoch in (1, 2, 1):
            loss.at_epoch(epoch, 3, seed=7)
            values.append([loss(z, z_t, y, seen).item() for _ in range(2)])
    assert values[0] == values[2] and len({*values[0], *values[1]}) == 4
    first = loss.second.first(seen.pooled)
    kept = torch.rand(first.shape, generator=seeded(7, 1, 2)) >= 0.5
    expected = loss.second.last(F.relu(loss.second.norm(2 * first * kept)))
    torch.testing.assert_close(loss.second(seen.pooled), expected)


@pytest.mark.parametrize("base, cut, last_stage", [("fitnet", None, True), ("at", None, False), ("at", 1, True)])
def test_the_label_reaches_nothing_before_the_cut(base, cut, last_stage):
    student, teacher, x, y, z_t, theirs = networks()
    loss = losses.build("detached", loss=base, cut=cut).prepare(student, teacher, x)
    z, seen = student(x, features=True)
    statistics = [b.clone() for b in student.buffers()]
    terms = loss.terms(z, z_t, y, seen, theirs)
    assert all(b.equal(before) for b, before in zip(student.buffers(), statistics)), "counted twice"
    parts = student.conv1.weight, student.layer3[0].conv1.weight, student.head.weight
    assert reaches(terms.pop("ce"), *parts) == [False, last_stage, True]
    (hint,) = terms.values()
    assert reaches(hint, *parts)[0] and not reaches(hint, *parts)[2]


def test_without_a_feature_loss_the_backbone_does_not_move():
    student, teacher, x, y, z_t, theirs = networks()
    loss = losses.build("detached", loss_args={"weight": 0.0}).prepare(student, teacher, x)
    z, seen = student(x, features=True)
    value = loss(z, z_t, y, seen, theirs)
    assert reaches(value, student.conv1.weight, student.head.weight) == [False, True]


def test_what_cannot_be_detached():
    for base in ("simkd", "dho", "uskd", "kd"):
        with pytest.raises(ValueError, match=f"does not train the classifier.*{base}"):
            losses.build("detached", loss=base)
    student, teacher, x, *_ = networks()
    with pytest.raises(ValueError, match="cut must be at most 3, the student's last stage, got 4"):
        losses.build("detached", cut=4).prepare(student, teacher, x)


# ---- WKD-F ------------------------------------------------------------------------------------------------------


def test_wkdf_by_hand_and_its_decay():
    student, teacher, x, y, z_t, theirs = networks()
    loss = losses.build("wkdf").prepare(student, teacher, x)
    z, seen = student(x, features=True)
    ours = loss.regressor(seen.stages[-1]).flatten(2)
    target = theirs.stages[-1].flatten(2)
    means = (ours.mean(2) - target.mean(2)).square().sum() / 16
    deviations = ((ours.var(2) + 1e-5).sqrt() - (target.var(2) + 1e-5).sqrt()).square().sum() / 16
    terms = loss.terms(z, z_t, y, seen, theirs)
    torch.testing.assert_close(terms["means"], 0.006 * 4 * means)
    torch.testing.assert_close(terms["deviations"], 0.006 * deviations)
    for epoch, share in ((150, 1.0), (195, 0.5), (240, 0.0)):
        loss.at_epoch(epoch, 240)
        later = loss.terms(z, z_t, y, seen, theirs)["means"]
        torch.testing.assert_close(later, share * terms["means"], atol=1e-9, rtol=1e-5)


def test_wkdf_sees_a_gaussian_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(4, 3, 5, 5, generator=g, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: gaussian(m), maps)
    assert torch.autograd.gradcheck(gaussian, torch.zeros_like(maps).requires_grad_())  # no spread at all
    moved = maps.flatten(2)[:, :, torch.randperm(25, generator=g)].reshape_as(maps)
    torch.testing.assert_close(gaussian(moved), gaussian(maps))
    mu, sigma = gaussian(3 * maps + 2, 0.0)
    torch.testing.assert_close((mu, sigma), (3 * gaussian(maps, 0.0)[0] + 2, 3 * gaussian(maps, 0.0)[1]))


def test_wkdf_refuses_what_does_not_fit():
    student, teacher, *_ = networks()
    with pytest.raises(ValueError, match="teacher: its last map has one position"):
        losses.build("wkdf").prepare(student, teacher, torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match="decay_from must be a number from 0 to 1"):
        losses.build("wkdf", decay_from=2)
    with pytest.raises(ValueError, match="'wkdf' cannot bring the student's map of 2×2 to the teacher's 8×8"):
        student, teacher = models.build("MobileNetV2", 10), models.build("resnet14", 10)
        losses.build("wkdf").prepare(student, teacher, torch.randn(2, 3, 32, 32))
