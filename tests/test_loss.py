"""What a notebook should not carry: extreme logits, a slow literal reference, invariances, every error, what an
import costs."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import ldrld
from ldrld import LDRLD, adw_weights, losses
from ldrld.core import paths, validation
from ldrld.losses.base import LogitLoss
from ldrld.losses.ldrld.loss import relation_terms
from ldrld.losses.relations import dway_kl, pair_indices, pair_kl, remaining_kl, top_d, two_way_kl

from still import still

VECTORS = json.loads((paths.published() / "ldrld_test_vectors.json").read_text(encoding="utf-8"))
TERMS = ("ce", "pairs", "llki", "rntk")


def vectors():
    return (torch.tensor(VECTORS[f"{who}_logits"], dtype=torch.float64) for who in ("student", "teacher"))


def sample(batch=16, classes=20, scale=3.0, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    z_s, z_t = (scale * torch.randn(batch, classes, generator=g, dtype=torch.float64) for _ in range(2))
    return z_s.to(dtype), z_t.to(dtype), torch.randint(classes, (batch,), generator=g)


def value_and_grad(loss, z_s, z_t, target=None):
    z_s = z_s.clone().requires_grad_()
    value = loss(z_s, z_t, target)
    return value.detach(), torch.autograd.grad(value, z_s)[0]


# ---- golden values ----------------------------------------------------------------------------------------------


def test_the_vectors_are_the_formulas():
    b, c = torch.arange(2.0, dtype=torch.float64)[:, None], torch.arange(10.0, dtype=torch.float64)[None, :]
    z_s, z_t = vectors()
    torch.testing.assert_close(z_s, ((3 * b + 7 * c**2 + c) % 11) / 2 - 1 + 0.01 * c, rtol=0, atol=1e-12)
    torch.testing.assert_close(z_t, ((5 * b + 4 * c**2 + 3 * c) % 13) / 2 - 2 + 0.02 * c, rtol=0, atol=1e-12)


@pytest.mark.parametrize("row", VECTORS["rows"], ids=lambda r: f"T{r['temperature']:g}-d{r['depth']}")
def test_agrees_with_the_official_implementation(row):
    options = {"depth": row["depth"], "temperature": row["temperature"], "alpha": 1.0, "beta": 1.0}
    terms, plain = (LDRLD(**options, normalize=n).terms(*vectors()) for n in (True, False))
    assert (terms["pairs"] + terms["llki"]).item() == pytest.approx(row["local"], abs=1e-9)
    assert terms["rntk"].item() == pytest.approx(row["rntk"], abs=1e-9)
    assert plain["pairs"].item() == pytest.approx(row["pairs"], abs=1e-9)
    assert plain["llki"].item() == pytest.approx(row["llki"], abs=1e-9)


def test_the_total_agrees_with_the_official_implementation():
    total = dict(VECTORS["total"])
    target, ce, value = torch.tensor(total.pop("target")), total.pop("ce"), total.pop("total")
    loss = LDRLD(**total)
    assert loss(*vectors(), target).item() == pytest.approx(value, abs=1e-9)
    assert loss.terms(*vectors(), target)["ce"].item() == pytest.approx(ce, abs=1e-9)
    assert LDRLD().hyperparameters == loss.hyperparameters  # they are the defaults


def test_depth_equals_classes_differs_from_the_official_code_only_in_the_remaining_term():
    edge = VECTORS["depth_equals_classes"]
    terms = LDRLD(depth=edge["depth"], temperature=edge["temperature"], alpha=1.0, beta=1.0).terms(*vectors())
    assert (terms["pairs"] + terms["llki"]).item() == pytest.approx(edge["local"], abs=1e-9)
    assert terms["rntk"].item() == 0.0
    assert edge["temperature"] ** 2 * dway_kl(*vectors(), edge["temperature"]).mean().item() == pytest.approx(
        edge["rntk"], abs=1e-9
    )


# ---- a slow literal reference -----------------------------------------------------------------------------------


def literal(z_s, z_t, d, T, weights, rank_by="student"):
    """The paper's recursion, sample by sample and pair by pair, with −inf masks and plain softmaxes; no closed form."""
    pairs, llki, rntk = [], [], []
    for s, t in zip(z_s, z_t):
        scores, taken, total = (s if rank_by == "student" else t).clone(), [], 0.0
        for new_rank in range(d):
            new = scores.argmax().item()
            for old_rank, old in enumerate(taken):
                p_s, p_t = ((z[[old, new]] / T).softmax(0) for z in (s, t))
                total = total + weights[old_rank, new_rank] * (p_t * (p_t / p_s).log()).sum()
            taken.append(new)
            scores[new] = -torch.inf
        rest = [c for c in range(len(s)) if c not in taken]
        for group, terms in ((taken, llki), (rest, rntk)):
            p_s, p_t = ((z[group] / T).softmax(0) for z in (s, t))
            terms.append((p_t * (p_t / p_s).log()).sum())
        pairs.append(total)
    return {name: T**2 * torch.stack(v).mean() for name, v in (("pairs", pairs), ("llki", llki), ("rntk", rntk))}


@pytest.mark.parametrize("d", [2, 3, 7, 12, 100])
@pytest.mark.parametrize("rank_by", ["student", "teacher"])
def test_agrees_with_the_literal_recursion(d, rank_by):
    batch = 2 if d == 100 else 64  # 4,950 pairs, one by one
    z_s, z_t, _ = sample(batch, classes=100, seed=d)
    z_s.requires_grad_()
    ours = LDRLD(alpha=1.0, beta=1.0, depth=d, rank_by=rank_by, normalize=False).terms(z_s, z_t)
    slow = literal(z_s, z_t, d, 4.0, adw_weights(d, dtype=torch.float64), rank_by)
    for name in ours:
        torch.testing.assert_close(ours[name], slow[name], rtol=1e-11, atol=1e-12)
        if name == "rntk" and d == 100:
            continue  # nothing remains: no gradient to compare
        ours_grad, slow_grad = (torch.autograd.grad(x[name], z_s, retain_graph=True)[0] for x in (ours, slow))
        torch.testing.assert_close(ours_grad, slow_grad, rtol=1e-9, atol=1e-12)


def test_ranking_by_the_label_is_ranking_by_a_student_sure_of_it():
    z_s, z_t, target = sample(8, 12)
    target[3] = -100
    sure = z_s.scatter(1, target.clamp(min=0)[:, None], 1e6)
    pi = top_d(z_s, z_t, 5, "label", target)[0]
    assert pi.equal(top_d(sure, z_t, 5)[0])
    ours = LDRLD(depth=5, rank_by="label")
    kept = target >= 0
    expected = LDRLD(depth=5, rank_by="label")(z_s[kept], z_t[kept], target[kept])
    torch.testing.assert_close(ours(z_s, z_t, target), expected)
    with pytest.raises(ValueError, match="target must be given for rank_by='label'"):
        ours(z_s, z_t)


@pytest.mark.parametrize("weighting", ["adw", "irw", "erd", "none"])
def test_every_weighting_against_the_literal_recursion(weighting):
    z_s, z_t, _ = sample(8, 12)
    loss = LDRLD(alpha=2.0, beta=3.0, depth=5, temperature=2.0, weighting=weighting, pairs_weight=0.5, llki_weight=4.0)
    slow = literal(z_s, z_t, 5, 2.0, adw_weights(5, weighting=weighting, dtype=torch.float64))
    expected = {"pairs": 2 * 0.5 / 11 * slow["pairs"], "llki": 2 * 4 / 11 * slow["llki"], "rntk": 3 * slow["rntk"]}
    torch.testing.assert_close(loss.terms(z_s, z_t), expected, rtol=1e-11, atol=1e-12)


# ---- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 3, 5, 6])
@pytest.mark.parametrize("name", ["ldrld", "kd", "ce"])
def test_gradcheck(name, d):
    z_s, z_t, target = sample(3, 6)
    z_s = torch.arange(6.0, dtype=torch.float64).expand(3, 6) + 0.2 * z_s.tanh()  # ranks stay put under a small step
    loss = losses.build(name, **({"depth": d} if name == "ldrld" else {}))
    assert torch.autograd.gradcheck(lambda z: loss(z, z_t, target), z_s.clone().requires_grad_())


@pytest.mark.parametrize("name", losses.available("logits"))
def test_the_teacher_gets_no_gradient(name):
    z_s, z_t, target = sample()
    z_s.requires_grad_(), z_t.requires_grad_()
    still(name)(z_s, z_t, target).backward()
    assert z_t.grad is None and z_s.grad.abs().sum() > 0


def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient():
    z_s, _, _ = sample(dtype=torch.float32, scale=30)
    value, grad = value_and_grad(LDRLD(), z_s, z_s.clone())
    assert value.abs() < 1e-4 and grad.abs().max() < 1e-5


# ---- extreme logits ---------------------------------------------------------------------------------------------


def extreme(kind, batch, classes, dtype):
    g = torch.Generator().manual_seed(1)
    corner = lambda: torch.tensor([-1e4, 0.0, 1e4])[torch.randint(3, (batch, classes), generator=g)]
    wide = lambda: 1e4 * (2 * torch.rand(batch, classes, generator=g) - 1)
    one = wide()
    z_s, z_t = {
        "corners": (corner(), corner()),
        "wide": (one, wide()),
        "opposite": (one, -one),
        "ties": (0 * one, one),
        "all ties": (0 * one + 1e4, 0 * one - 1e4),
        "shifted": (1e4 + 1e-4 * one, -1e4 + 1e-4 * wide()),
        "tiny": (1e-9 * one, 1e-9 * wide()),
    }[kind]
    return z_s.to(dtype), z_t.to(dtype), torch.randint(classes, (batch,), generator=g)


@pytest.mark.parametrize("kind", ["corners", "wide", "opposite", "ties", "all ties", "shifted", "tiny"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_give_finite_values_and_gradients(kind, dtype):
    for classes, depths in ((2, (2,)), (3, (2, 3)), (10, (2, 7, 9, 10))):
        for d in depths:
            for T in (0.5, 1.0, 4.0, 20.0):
                z_s, z_t, target = extreme(kind, 32, classes, dtype)
                for rank_by in ("student", "teacher"):
                    loss = LDRLD(depth=d, temperature=T, rank_by=rank_by)
                    terms = loss.terms(z_s, z_t, target)
                    value, grad = value_and_grad(loss, z_s, z_t, target)
                    where = f"{classes=} {d=} {T=} {rank_by=} {terms=}"
                    # one rounding of z/T in float32, times the weights of the terms
                    rounding = (loss.alpha + loss.beta) * T**2 * 2**-23 * (1 + z_s.abs().max().item() / T)
                    assert value.isfinite() and grad.isfinite().all(), where
                    assert all(term.item() >= -rounding for term in terms.values()), where
                    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                    assert grad.dtype == dtype
                    sixty_four, _ = value_and_grad(loss, z_s.double(), z_t.double(), target)
                    torch.testing.assert_close(value.double(), sixty_four, rtol=1e-5, atol=rounding, msg=where)


@pytest.mark.parametrize("name", losses.available("logits"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_loss_is_finite_at_the_extremes(name, dtype):
    for kind in ("corners", "wide", "opposite", "all ties"):
        value, grad = value_and_grad(still(name), *extreme(kind, 32, 10, dtype))
        assert value.isfinite() and grad.isfinite().all()


def test_the_pair_divergence_keeps_its_digits_where_plain_float32_loses_them():
    a = torch.linspace(-2e4, 2e4, 40001)
    b = a + torch.linspace(-3, 3, 40001)
    exact = two_way_kl(b.double(), a.double())
    assert (two_way_kl(b, a).double() - exact).abs().max() < 2e-7
    assert two_way_kl(b, a).min() > -2e-7


@pytest.mark.parametrize("name", losses.available("logits"))
def test_autocast_changes_nothing(name):
    z_s, z_t, target = sample(dtype=torch.float32)
    loss = still(name)
    plain, plain_grad = value_and_grad(loss, z_s, z_t, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grad = value_and_grad(loss, z_s, z_t, target)
    assert value.dtype == torch.float32 and torch.equal(value, plain) and torch.equal(grad, plain_grad)


def test_mixed_types_take_the_wider():
    z_s, z_t, target = sample(dtype=torch.float32)
    assert LDRLD()(z_s.half(), z_t, target).dtype == torch.float32
    assert LDRLD()(z_s.bfloat16(), z_t.half(), target).dtype == torch.float32
    assert LDRLD()(z_s, z_t.double(), target).dtype == torch.float64


# ---- invariances ------------------------------------------------------------------------------------------------


# a constant in one row changes the means of LumiNet's columns, and LCKA's similarities of raw logits
@pytest.mark.parametrize("name", sorted(set(losses.available("logits")) - {"luminet", "lcka"}))
def test_a_constant_per_sample_changes_nothing(name):
    z_s, z_t, target = sample()
    loss, shift = still(name), 50 * torch.randn(len(z_s), 1, dtype=torch.float64)
    for shifted in ((z_s + shift, z_t), (z_s, z_t + shift)):
        torch.testing.assert_close(loss(*shifted, target), loss(z_s, z_t, target), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", losses.available("logits"))
def test_the_order_of_classes_and_samples_does_not_matter(name):
    z_s, z_t, target = sample()
    loss = still(name)
    g = torch.Generator().manual_seed(3)
    columns, rows = torch.randperm(z_s.shape[1], generator=g), torch.randperm(len(z_s), generator=g)
    permuted = loss(z_s[:, columns][rows], z_t[:, columns][rows], columns.argsort()[target][rows])
    torch.testing.assert_close(permuted, loss(z_s, z_t, target), rtol=1e-10, atol=1e-10)


OF_BATCHES = {"dist", "luminet", "lcka", "sinkd"}  # compare samples with each other, so they are no mean over samples


@pytest.mark.parametrize("name", sorted(set(losses.available("logits")) - OF_BATCHES))
def test_the_loss_is_the_mean_over_samples(name):
    z_s, z_t, target = sample()
    loss = still(name)
    singles = torch.stack([loss(z_s[k : k + 1], z_t[k : k + 1], target[k : k + 1]) for k in range(len(z_s))])
    torch.testing.assert_close(singles.mean(), loss(z_s, z_t, target), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", losses.available("logits"))
def test_terms_add_up(name):
    z_s, z_t, target = sample()
    loss = still(name)
    torch.testing.assert_close(sum(loss.terms(z_s, z_t, target).values()), loss(z_s, z_t, target))


def test_what_the_terms_are_called():
    z_s, z_t, target = sample()
    assert tuple(LDRLD().terms(z_s, z_t, target)) == TERMS
    assert tuple(LDRLD().terms(z_s, z_t)) == TERMS[1:]
    assert tuple(losses.build("kd").terms(z_s, z_t, target)) == ("ce", "kd")
    assert tuple(losses.build("kd").terms(z_s, z_t)) == ("kd",)
    assert tuple(losses.build("ce").terms(z_s, None, target)) == ("ce",)


def test_every_weight_acts_on_its_own_term():
    z_s, z_t, target = sample()
    base = LDRLD().terms(z_s, z_t, target)
    for argument, touched in {
        "alpha": ("pairs", "llki"),
        "beta": ("rntk",),
        "ce_weight": ("ce",),
        "pairs_weight": ("pairs",),
        "llki_weight": ("llki",),
    }.items():
        doubled = LDRLD(**{argument: 2 * getattr(LDRLD(), argument)}).terms(z_s, z_t, target)
        for name in TERMS:
            torch.testing.assert_close(doubled[name], base[name] * (2 if name in touched else 1))


def test_non_contiguous_and_strided_input():
    z_s, z_t, target = sample()
    wide_s, wide_t = z_s.T.contiguous().T, torch.stack([z_t, z_t], dim=-1)[..., 0]
    torch.testing.assert_close(LDRLD()(wide_s, wide_t, target), LDRLD()(z_s, z_t, target))


def test_kd_is_hintons_formula():
    z_s, z_t, target = sample()
    expected = 0.1 * F.cross_entropy(z_s, target) + 0.9 * 16 * F.kl_div(
        (z_s / 4).log_softmax(1), (z_t / 4).softmax(1), reduction="batchmean"
    )
    torch.testing.assert_close(losses.build("kd")(z_s, z_t, target), expected)


# ---- the parts --------------------------------------------------------------------------------------------------


def test_relations_work_on_any_leading_shape():
    z_s, z_t, _ = sample(12, 9)
    pi, top_s, top_t = top_d(z_s, z_t, 4)
    shaped = [x.view(3, 4, -1) for x in (z_s, z_t, pi, top_s, top_t)]
    assert torch.equal(top_d(*shaped[:2], 4)[0], shaped[2])
    assert torch.equal(pair_kl(*shaped[3:]).flatten(0, 1), pair_kl(top_s, top_t))
    assert torch.equal(remaining_kl(*shaped[:3]).flatten(), remaining_kl(z_s, z_t, pi))


def test_pairs_and_weights_have_one_order():
    i, j = pair_indices(5)
    z = torch.tensor([[5.0, 4.0, 2.0, -1.0, -5.0]])
    two_way = two_way_kl((z[:, i] - z[:, j]) / 4, 0 * z[:, i])
    assert (i < j).all() and torch.equal(pair_kl(z, 0 * z), two_way)
    ours = relation_terms(z, 0 * z, adw_weights(5))["pairs"]
    torch.testing.assert_close(ours, (adw_weights(5)[i, j] * two_way).sum(-1))


@pytest.mark.parametrize("depth", [2, 3, 7, 20])
@pytest.mark.parametrize("weighting", ["adw", "irw", "erd", "none"])
def test_weights_follow_the_formula(depth, weighting):
    from math import exp

    W = adw_weights(depth, epsilon=0.7, delta=3.0, decay=0.2, weighting=weighting, dtype=torch.float64)
    for i in range(1, depth + 1):
        for j in range(1, depth + 1):
            irw, erd = 1 / (abs(i - j) + 0.7), 3 * exp(-0.2 * (i + j))
            expected = {"adw": irw * erd, "irw": irw, "erd": erd, "none": 1.0}[weighting] if i < j else 0.0
            assert W[i - 1, j - 1].item() == pytest.approx(expected, rel=1e-12)


def test_weights_take_type_and_device():
    assert adw_weights(3).dtype == torch.get_default_dtype()
    assert adw_weights(3, dtype=torch.float16).dtype == torch.float16
    assert adw_weights(3, device="meta").device.type == "meta"


# ---- the registry -----------------------------------------------------------------------------------------------


def test_every_loss_knows_its_hyperparameters():
    for name in losses.available("logits"):
        loss = losses.build(name)
        assert json.loads(json.dumps(loss.hyperparameters)) == loss.hyperparameters
        assert losses.build(name, **loss.hyperparameters).hyperparameters == loss.hyperparameters
        assert loss.needs_teacher == (name != "ce")
        assert list(loss.state_dict()) == (["theta"] if name == "ctkd" else [])  # CTKD trains its temperature
    assert losses.build("ldrld", alpha=3).hyperparameters == losses.build("ldrld", alpha=3.0).hyperparameters
    assert {"ce", "kd", "ldrld"} <= set(losses.available("logits"))


def test_a_new_loss_is_one_decorator():
    try:

        @losses.register("test-mse")
        class MSE(LogitLoss):
            def __init__(self, weight: float = 2.0):
                super().__init__()
                self.weight = validation.number("weight", weight, at_least=0.0)

            def terms(self, student_logits, teacher_logits, target=None):
                return {"mse": self.weight * F.mse_loss(student_logits, teacher_logits.detach())}

        z_s, z_t, _ = sample()
        loss = losses.build("test-mse", weight=3)
        torch.testing.assert_close(loss(z_s, z_t), 3 * ((z_s - z_t) ** 2).mean())
        assert loss.hyperparameters == {"weight": 3.0} and "test-mse" in losses.available("logits")
        with pytest.raises(ValueError, match="'ldrld' is taken by LDRLD"):
            losses.register("ldrld")(MSE)
    finally:
        losses.registry._losses.pop("test-mse", None)


# ---- errors -----------------------------------------------------------------------------------------------------

X, Y = torch.zeros(4, 10), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ({"depth": 1}, ("depth", "1", "at least 2")),
        ({"depth": 2.0}, ("depth", "2.0", "integer")),
        ({"depth": "7"}, ("depth", "'7'", "integer")),
        ({"depth": True}, ("depth", "True")),
        ({"temperature": 0}, ("temperature", "0", "above 0")),
        ({"temperature": -4.0}, ("temperature", "-4.0")),
        ({"temperature": float("inf")}, ("temperature", "inf", "finite")),
        ({"temperature": float("nan")}, ("temperature", "nan")),
        ({"temperature": "4"}, ("temperature", "'4'")),
        ({"temperature": None}, ("temperature", "None")),
        ({"alpha": -1.0}, ("alpha", "-1.0", "at least 0")),
        ({"beta": -0.1}, ("beta", "-0.1")),
        ({"ce_weight": -1}, ("ce_weight", "-1")),
        ({"pairs_weight": -1}, ("pairs_weight", "-1")),
        ({"llki_weight": float("nan")}, ("llki_weight", "nan")),
        ({"epsilon": -1.0}, ("epsilon", "-1.0", "above -1")),
        ({"epsilon": -2}, ("epsilon", "-2")),
        ({"delta": -0.5}, ("delta", "-0.5")),
        ({"decay": float("inf")}, ("decay", "inf")),
        ({"weighting": "adv"}, ("weighting", "'adv'", "'adw'", "'none'")),
        ({"weighting": None}, ("weighting", "None")),
        ({"weighting": ["adw"]}, ("weighting", "['adw']")),
        ({"rank_by": "labels"}, ("rank_by", "'labels'", "'student'", "'teacher'", "'label'")),
        ({"normalize": "yes"}, ("normalize", "'yes'", "True")),
        ({"normalize": 1}, ("normalize", "1", "True")),
    ],
)
def test_wrong_hyperparameters(arguments, parts):
    with pytest.raises(ValueError) as error:
        LDRLD(**arguments)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    "call, parts",
    [
        ((X[0], X[0]), ("student_logits", "(batch, classes)", "(10,)")),
        ((X[:, :, None], X[:, :, None]), ("student_logits", "(4, 10, 1)", "two classes")),
        ((X, X[:3]), ("teacher_logits", "(3, 10)", "(4, 10)")),
        ((X, X[:, :9]), ("teacher_logits", "(4, 9)", "(4, 10)")),
        ((X, X[0]), ("teacher_logits", "(10,)")),
        ((X[:, :1], X[:, :1]), ("student_logits", "two classes", "(4, 1)")),
        ((X[:0], X[:0]), ("student_logits", "(0, 10)")),
        ((X[:, :5], X[:, :5]), ("depth", "7", "5")),
        ((X.long(), X), ("student_logits", "torch.int64", "floating")),
        ((X, X.long()), ("teacher_logits", "torch.int64", "floating")),
        ((X.numpy(), X), ("student_logits", "ndarray")),
        ((X, None), ("teacher_logits", "NoneType")),
        ((X, X.to("meta")), ("teacher_logits", "cpu", "meta")),
        ((X, X, Y.int()), ("target", "torch.int32", "int64", ".long()")),
        ((X, X, Y.float()), ("target", "torch.float32")),
        ((X, X, [0, 1, 2, 3]), ("target", "list")),
        ((X, X, Y[:3]), ("target", "(3,)", "(4,)")),
        ((X, X, F.one_hot(Y, 10)), ("target", "(4, 10)", "(4,)")),
        ((X, X, Y + 10), ("target", "0 to 9", "10")),
        ((X, X, Y - 1), ("target", "0 to 9", "-1")),
    ],
)
def test_wrong_calls(call, parts):
    with pytest.raises(ValueError) as error:
        LDRLD()(*call)
    assert all(part in str(error.value) for part in parts), error.value


def test_wrong_calls_of_the_parts():
    with pytest.raises(ValueError, match="depth must be at most the number of classes, 10, got 11"):
        top_d(X, X, 11)
    with pytest.raises(ValueError, match="rank_by .* got 'both'"):
        top_d(X, X, 3, rank_by="both")
    with pytest.raises(ValueError, match="depth .* got 1"):
        adw_weights(1)
    with pytest.raises(ValueError, match="weighting .* got 'x'"):
        adw_weights(3, weighting="x")
    with pytest.raises(ValueError, match="target must be given .* got None"):
        losses.build("ce")(X, None)
    with pytest.raises(ValueError, match="teacher_logits .* got a NoneType"):
        losses.build("kd")(X, None, Y)
    for name, argument in (("kd", "temperature"), ("kd", "kd_weight"), ("kd", "ce_weight"), ("ce", "ce_weight")):
        with pytest.raises(ValueError, match=f"{argument} .* got -1"):
            losses.build(name, **{argument: -1})


def test_unknown_names_are_met_with_near_ones():
    with pytest.raises(ValueError, match=r"unknown loss 'LDRLD'\. Did you mean 'ldrld'.*\? Known: .*ce, .*kd, .*ldrld"):
        losses.build("LDRLD")
    with pytest.raises(ValueError, match=r"'temprature'\. Did you mean 'temperature'\?"):
        losses.build("kd", temprature=2)
    with pytest.raises(ValueError, match=r"hyper-parameter of 'kd' 'depth'.*Known: ce_weight, kd_weight, temperature"):
        losses.build("kd", depth=2)


# ---- use --------------------------------------------------------------------------------------------------------


def test_compiles_without_a_graph_break():
    z_s, z_t, target = sample(dtype=torch.float32)
    for name in losses.available("logits"):
        loss = still(name)
        compiled = torch.compile(loss, backend="eager", fullgraph=True)
        plain, fast = (value_and_grad(f, z_s, z_t, target) for f in (loss, compiled))
        torch.testing.assert_close(fast, plain)
        torch._dynamo.reset()  # they share `forward`, and dynamo keeps only so many versions of it


def test_may_be_copied_pickled_and_moved(tmp_path):
    import copy

    loss = LDRLD(depth=5).to("cpu").half()  # no state to move or to round
    z_s, z_t, target = sample()
    torch.save(loss, tmp_path / "loss.pt")
    for other in (copy.deepcopy(loss), torch.load(tmp_path / "loss.pt", weights_only=False)):
        assert torch.equal(other(z_s, z_t, target), LDRLD(depth=5)(z_s, z_t, target))


def test_inference_mode_does_not_spoil_a_later_step():
    z_s, z_t, target = sample()
    loss = LDRLD()
    with torch.inference_mode():
        before = loss(z_s, z_t, target)
    value, grad = value_and_grad(loss, z_s, z_t, target)
    assert torch.equal(before.clone(), value) and grad.isfinite().all()


def test_a_large_vocabulary():
    z_s, z_t, target = sample(16, 32000, dtype=torch.bfloat16)
    value, grad = value_and_grad(LDRLD(depth=20), z_s, z_t, target)
    exact, _ = value_and_grad(LDRLD(depth=20), z_s.double(), z_t.double(), target)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    assert grad.isfinite().all()


def test_importing_ldrld_takes_torch_alone():
    code = (
        "import sys, ldrld; ldrld.LDRLD, ldrld.adw_weights, ldrld.losses.build; "
        "print([m for m in ('torch', 'torchvision', 'pandas', 'matplotlib', 'scipy', 'sklearn', 'pydantic', 'PIL', "
        "'safetensors', 'papermill', 'nbdev', 'fastcore') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['torch']"
    assert set(ldrld.__all__) >= {"LDRLD", "adw_weights", "losses"}
