"""Losses at their edges: micro-batches, ruled-out classes, NaN where nothing counts, float16, rounding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldrld import LDRLD, losses
from ldrld.losses.base import LogitLoss
from ldrld.losses.features.ofd import margins_of
from ldrld.losses.features.sdd import regional_logits
from ldrld.losses.features.uskd import zipf_labels
from ldrld.losses.ldrld import analytic
from ldrld.losses.ldrld.linear import linear_loss
from ldrld.losses.logits.dist import correlation
from ldrld.losses.wrappers.standardized import standardized

from still import STILL, inner, still

INF, NAN, IGNORED = torch.inf, torch.nan, -100
LOGITS = losses.available("logits")
WRAPPED = [
    (name, inner(base) | more)
    for base in sorted(set(LOGITS) - {"ce", "standardized", "corrected", "entropy-weighted"})
    for name, more in (("standardized", {}), ("corrected", {"rule": "swap"}), ("corrected", {"rule": "skip"}))
]
EVERY = [(name, STILL.get(name, {})) for name in (*LOGITS, "sld", "mlkd")] + WRAPPED
named = lambda given: given if isinstance(given, str) else "-".join(map(str, given.values())) or "default"
build = lambda name, given: losses.build(name, **given).double()
ROW_WISE = [(name, given) for name, given in EVERY if losses.build(name, **given).row_wise]
BY_BATCH = [(name, given) for name, given in EVERY if not losses.build(name, **given).row_wise]


def sample(rows=12, classes=20, dtype=torch.float64, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    z_s, z_t = scale * torch.randn(2, rows, classes, generator=g, dtype=torch.float64)
    return z_s.to(dtype), z_t.to(dtype), torch.randint(classes, (rows,), generator=g)


def value_and_grad(loss, z_s, *arguments, above=1.0, **more):
    z = z_s.clone().requires_grad_()
    value = loss(z, *arguments, **more)
    return value.detach(), torch.autograd.grad(above * value, z)[0]


def test_which_losses_compare_over_the_batch():
    assert {given.get("loss", name) for name, given in BY_BATCH} == {
        "dist",
        "mlkd",
        "luminet",
        "lcka",
        "sinkd",
    }
    assert not losses.build("partial-mixup").row_wise and losses.build("mcmi").row_wise
    assert not any(losses.build(name).row_wise for name in losses.available("features"))


# ---- micro-batches ----------------------------------------------------------------------------------------------


def texts():
    """Four texts of seven tokens: 8 tokens of the first two count, 11 of the others."""
    z_s, z_t, target = (x.unflatten(0, (4, 7)) for x in sample(28))
    lengths = torch.tensor([3, 5, 7, 4])
    return z_s, z_t, target.where(torch.arange(7) < lengths[:, None], IGNORED)


@pytest.mark.parametrize("n", [19, torch.tensor(19), torch.tensor([19.0])], ids=["int", "tensor", "tensor of one"])
@pytest.mark.parametrize("name, given", ROW_WISE, ids=named)
def test_micro_batches_add_up(name, given, n):
    loss, (z_s, z_t, target) = build(name, given), texts()
    whole, gradient = value_and_grad(loss, z_s, z_t, target)
    parts = [value_and_grad(loss, z_s[k], z_t[k], target[k], normalizer=n) for k in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(value for value, _ in parts), whole)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), gradient)
    terms = loss.terms(z_s, z_t, target)
    in_parts = [loss.terms(z_s[k], z_t[k], target[k], normalizer=n) for k in (slice(0, 2), slice(2, 4))]
    for term in terms:
        torch.testing.assert_close(in_parts[0][term] + in_parts[1][term], terms[term])
    means = sum(loss(z_s[k], z_t[k], target[k]) for k in (slice(0, 2), slice(2, 4))) / 2
    assert abs(means / whole - 1) > 1e-4  # which is why there is a normalizer


@pytest.mark.parametrize("backend", ["plain", "analytic"])
def test_micro_batches_of_ldrld_by_every_way(backend):
    loss, (z_s, z_t, target) = LDRLD(), texts()
    loss.backend = backend
    whole, gradient = value_and_grad(loss, z_s, z_t, target)
    mask = target != IGNORED
    parts = [
        value_and_grad(loss, z_s[k], z_t[k], target[k].clamp(min=0), mask[k], normalizer=19)
        for k in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close((sum(v for v, _ in parts), torch.cat([g for _, g in parts])), (whole, gradient))
    compiled = torch.compile(LDRLD(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z_s[:2], z_t[:2], target[:2], normalizer=torch.tensor(19)), parts[0][0])
    torch._dynamo.reset()


def test_micro_batches_without_padding_and_of_two_versions():
    z_s, z_t, target = sample(12)
    kd = losses.build("kd")
    parts = [kd(z_s[k], z_t[k], target[k], normalizer=12) for k in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(sum(parts), kd(z_s, z_t, target))
    sld, strong = losses.build("sld"), sample(12, seed=1)
    two = lambda k: (torch.cat([z_s[k], strong[0][k]]), torch.cat([z_t[k], strong[1][k]]), target[k])
    whole = sld(*two(slice(None)))
    torch.testing.assert_close(sld(*two(slice(0, 5)), normalizer=12) + sld(*two(slice(5, 12)), normalizer=12), whole)
    torch.testing.assert_close(whole, sld(z_s, z_t, target) + sld(*strong[:2], target))


@pytest.mark.parametrize("name, given", [*BY_BATCH, ("partial-mixup", {})], ids=named)
def test_a_loss_over_the_batch_refuses_a_normalizer(name, given):
    loss, (z_s, z_t, target) = losses.build(name, **given), sample()
    for call in (loss, loss.terms, loss.value_and_terms):
        with pytest.raises(ValueError, match=f"normalizer must be None for {type(loss).__name__}, .* got 19"):
            call(z_s, z_t, target, normalizer=19)


@pytest.mark.parametrize(
    "wrong, part",
    [
        (-1, "-1"),
        (NAN, "nan"),
        (True, "True"),
        ("19", "'19'"),
        (INF, "inf"),
        (torch.tensor([3, 4]), r"\(2,\)"),
        (torch.tensor(True), "bool"),
        (torch.tensor(-2), "-2"),
        (torch.tensor(NAN), "nan"),
    ],
)
def test_wrong_normalizers(wrong, part):
    with pytest.raises(ValueError, match=f"normalizer must be .*{part}"):
        LDRLD()(*sample(), normalizer=wrong)


@pytest.mark.parametrize("nothing", [0, torch.tensor(0)])
def test_a_step_in_which_nothing_counts(nothing):
    z_s, z_t, target = sample()
    value, gradient = value_and_grad(LDRLD(), z_s, z_t, torch.full_like(target, IGNORED), normalizer=nothing)
    assert value == 0 and not gradient.any()


class Squares(LogitLoss):
    def row_terms(self, student, teacher, target):
        return {"mse": (student - teacher).square().mean(-1)}


class OldSquares(LogitLoss):
    def terms(self, student_logits, teacher_logits, target=None):
        return {"mse": F.mse_loss(student_logits, teacher_logits)}


def test_a_custom_loss_gets_everything_right():
    z_s, z_t, target = sample(dtype=torch.float16)
    target[3], mask = IGNORED, torch.arange(12) != 5
    kept = mask & (target != IGNORED)
    z_s[3], z_t[5] = NAN, INF
    value, gradient = value_and_grad(Squares(), z_s, z_t, target, mask)
    wanted, right = value_and_grad(Squares(), z_s[kept].float(), z_t[kept].float())
    assert value.dtype == torch.float32 and not gradient[~kept].any()
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradient[kept].float(), right, rtol=1e-3, atol=1e-6)
    assert Squares()(z_s.view(3, 4, 20), z_t.view(3, 4, 20), target.view(3, 4), mask.view(3, 4)) == value
    with pytest.raises(ValueError, match="teacher_logits must have the shape"):
        Squares()(z_s, z_t[:, :3])
    with pytest.raises(NotImplementedError, match=r"LogitLoss must define row_terms\(student, teacher, target\)"):
        LogitLoss()(z_s, z_t)


def test_a_loss_that_writes_terms_as_before():
    z_s, z_t, _ = sample()
    torch.testing.assert_close(OldSquares()(z_s, z_t), F.mse_loss(z_s, z_t))
    with pytest.raises(ValueError, match="loss must define row_terms"):
        linear_loss(OldSquares(), z_s, torch.zeros(20, 20), z_t, None)


# ---- classes that are ruled out ---------------------------------------------------------------------------------

ALLOWED = 15


def ruled_out(dtype=torch.float64, low=-INF):
    """Twenty classes, of which both networks rule out the last five; the labels are among the others."""
    z_s, z_t, target = sample(dtype=dtype)
    z_s[:, ALLOWED:] = z_t[:, ALLOWED:] = low
    return z_s, z_t, target % ALLOWED


@pytest.mark.parametrize("low", [-INF, -1e9, -1e30, torch.finfo(torch.float64).min])
@pytest.mark.parametrize("name, given", EVERY, ids=named)
def test_both_rule_out_the_same_classes(name, given, low):
    """As if they did not exist; DIST and MLKD, whose means and matrices are over all classes, as with probability 0."""
    loss, (z_s, z_t, target) = build(name, given), ruled_out(low=low)
    value, gradient = value_and_grad(loss, z_s, z_t, target)
    of_all = "dist" in (name, given.get("loss")) or name == "mlkd"
    if of_all and name == "standardized":
        wanted = None  # zeros among standardised logits: see below
    elif of_all:
        wanted = value_and_grad(loss, *ruled_out(low=-1e4)[:2], target)
    else:
        wanted = value_and_grad(loss, z_s[:, :ALLOWED], z_t[:, :ALLOWED], target)
    assert value.isfinite() and gradient.isfinite().all() and not gradient[:, ALLOWED:].any()
    if not wanted:
        return
    torch.testing.assert_close(value, wanted[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient[:, :ALLOWED], wanted[1][:, :ALLOWED], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name, given", EVERY, ids=named)
def test_the_lowest_number_of_a_type_rules_out(name, given, dtype):
    loss, (z_s, z_t, target) = losses.build(name, **given), ruled_out(dtype)
    value, gradient = value_and_grad(loss, z_s, z_t, target)
    z_s[:, ALLOWED:] = z_t[:, ALLOWED:] = torch.finfo(dtype).min
    lowest, its_gradient = value_and_grad(loss, z_s, z_t, target)
    assert value == lowest and value.isfinite() and gradient.equal(its_gradient)
    assert gradient.isfinite().all() and not gradient[:, ALLOWED:].any()


@pytest.mark.parametrize("name, given", EVERY, ids=named)
def test_the_teacher_alone_rules_out(name, given):
    """The student is told to give these classes nothing, and its gradient says so."""
    loss, (z_s, z_t, target) = build(name, given), sample()
    target = target % ALLOWED
    results = []
    for low in (-INF, -1e4):
        z_t = z_t.clone()
        z_t[:, ALLOWED:] = low
        results.append(value_and_grad(loss, z_s, z_t, target))
    (value, gradient), wanted = results
    assert value.isfinite() and gradient.isfinite().all()
    if {"csd", "lcka", "luminet"} & {name, given.get("loss")}:
        return  # they compare logits, of which −1e4 is an ordinary one: test_rivals.py says what holds instead
    if name == "standardized":  # −1e4 is an ordinary logit, to be standardised
        base = build(given["loss"] if given else "kd", loss.loss_args)
        shown = standardized(z_t.masked_fill(z_t == -1e4, -INF))
        terms = base.terms(standardized(z_s), shown.where(shown > -1e9, -1e4), target)
        if given.get("loss") not in ("corrected", "standardized"):
            distilled = sum(v for k, v in terms.items() if k != "ce")
            ce = loss.ce_weight * F.cross_entropy(z_s, target)
            torch.testing.assert_close(value, ce + loss.distill_weight * distilled)
    else:
        torch.testing.assert_close((value, gradient), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["plain", "analytic"])
@pytest.mark.parametrize("rank_by", ["student", "teacher"])
@pytest.mark.parametrize("allowed", [1, 3, 7, 8, 15])
def test_few_classes_are_left(allowed, rank_by, backend):
    """Fewer than the depth, exactly as many, one more: the ranks that are left, and nothing else, are compared."""
    loss, (z_s, z_t, target) = LDRLD(rank_by=rank_by), sample()
    loss.backend = backend
    z_s[:, allowed:] = z_t[:, allowed:] = -INF
    target = target % allowed
    value, gradient = value_and_grad(loss, z_s, z_t, target)
    assert value.isfinite() and gradient.isfinite().all() and not gradient[:, allowed:].any()
    terms = loss.terms(z_s, z_t, target)
    torch.testing.assert_close(sum(terms.values()), value)
    if allowed <= 7:
        assert terms["rntk"] == 0
    if allowed == 1:
        assert value.abs() < 1e-12
    if 2 <= allowed <= 7:
        full = LDRLD(rank_by=rank_by, depth=allowed, normalize=False, alpha=10.5 / 22)
        full = full.terms(z_s[:, :allowed], z_t[:, :allowed], target)
        for name in terms:
            torch.testing.assert_close(terms[name], full[name])


@pytest.mark.parametrize("name", ["ldrld", "dkd", "nkd", "rld"])
def test_a_teacher_cut_down_to_its_first_tokens_with_a_padded_vocabulary(name):
    """Nothing is asked of the padding, whatever group of classes the teacher allows nothing of."""
    z_s, z_t, _ = sample(classes=40)
    z_t = z_t.masked_fill(z_t < z_t.topk(2).values[:, -1:], -INF)
    first = z_t.argmax(1)
    z_s[:, 30:] = -INF
    z_s, z_t = z_s.scatter(1, first[:, None], 9.0), z_t.clone()
    z_s = z_s.where(z_t == -INF, z_s.clamp(min=0.0))  # the student allows both
    value, gradient = value_and_grad(losses.build(name), z_s, z_t, first)
    assert value < 1e4 and gradient.isfinite().all() and not gradient[z_s == -INF].any()
    if name != "ldrld":
        return
    plain = LDRLD()
    plain.backend = "plain"
    torch.testing.assert_close(value_and_grad(plain, z_s, z_t, first), (value, gradient))


@pytest.mark.parametrize("name, given", EVERY, ids=named)
def test_a_student_that_cannot_what_the_teacher_wants(name, given):
    loss, (z_s, z_t, target) = losses.build(name, **given), sample()
    target = target % ALLOWED
    z_s[4, 17] = -INF
    if name != "ce":
        with pytest.raises(ValueError, match="must allow what the teacher allows, got −inf for class 17 in row 4"):
            loss(z_s, z_t, target)
        out_of_reach = z_t.clone()
        out_of_reach[4, 17] = -6000.0  # a mask by a large number, and probability 0
        if name != "standardized":
            assert loss(z_s, out_of_reach, target).isfinite()
        mask = torch.arange(12) != 4
        assert loss(z_s, z_t, target, mask).isfinite()
    z_t[4, 17], target[4] = -INF, 17
    with pytest.raises(ValueError, match="student_logits must allow the label, got −inf for target 17 in row 4"):
        loss(z_s, z_t, target)


def test_the_row_of_a_mistake_is_reported_also_in_a_large_batch():
    z_s, z_t, _ = sample(600, 1000)
    z_s[555, 17] = -INF
    with pytest.raises(ValueError, match="class 17 in row 555"):
        LDRLD()(z_s, z_t)


def test_where_nothing_can_be_looked_up_the_loss_is_large_and_the_gradient_finite():
    z_s, z_t, target = sample(dtype=torch.float32)
    z_s[4, 17] = -INF
    for name in ("ldrld", "kd", "dkd"):
        compiled = torch.compile(losses.build(name), backend="eager", fullgraph=True)
        value, gradient = value_and_grad(compiled, z_s, z_t, target % ALLOWED)
        assert 1e3 < value < INF and gradient.isfinite().all() and gradient[4, 17] == 0
        torch._dynamo.reset()


@pytest.mark.parametrize("name", LOGITS)
def test_compiled_and_transformed(name):
    loss, (z_s, z_t, target) = still(name), ruled_out(torch.float32)
    wanted = value_and_grad(loss, z_s, z_t, target)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(value_and_grad(compiled, z_s, z_t, target), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.func.grad(loss)(z_s, z_t, target), wanted[1], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_second_derivatives_with_ruled_out_classes():
    z_s, z_t, target = ruled_out()
    second = []
    for backend in ("analytic", "plain"):
        loss, z = LDRLD(), z_s.clone().requires_grad_()
        loss.backend = backend
        first = torch.autograd.grad(loss(z, z_t, target), z, create_graph=True)[0]
        second.append(torch.autograd.grad(first.square().sum(), z)[0])
    assert second[0].isfinite().all() and not second[0][:, ALLOWED:].any()
    torch.testing.assert_close(*second)


def test_linear_loss_with_a_ruled_out_vocabulary():
    """By the bias, as padded vocabularies are."""
    g = torch.Generator().manual_seed(0)
    h_s, h_t, W_s, W_t = (torch.randn(n, 8, generator=g, dtype=torch.float64) for n in (12, 12, 20, 20))
    bias = torch.zeros(20, dtype=torch.float64).index_fill(0, torch.arange(ALLOWED, 20), -INF)
    W_s.requires_grad_()
    value, _ = linear_loss(LDRLD(), h_s, W_s, h_t, W_t, None, student_bias=bias, teacher_bias=bias, at_once=60)
    wanted = LDRLD()(h_s @ W_s[:ALLOWED].T, h_t @ W_t[:ALLOWED].T)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(torch.autograd.grad(value, W_s)[0], torch.autograd.grad(wanted, W_s)[0])


# ---- NaN --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("name, given", EVERY, ids=named)
def test_nan_in_a_row_that_counts_is_not_hidden(name, given, bad):
    loss, (z_s, z_t, target) = losses.build(name, **given), sample()
    z_s[4, 7] = bad
    assert not loss(z_s, z_t, target).isfinite() or (name == "corrected" and given["rule"] == "skip")


@pytest.mark.parametrize("name, given", EVERY, ids=named)
def test_rows_that_do_not_count_may_hold_anything(name, given):
    loss, (z_s, z_t, target) = build(name, given), sample()
    kept = torch.arange(12) % 3 != 1
    wanted = value_and_grad(loss, z_s[kept], z_t[kept], target[kept])
    z_s[1], z_s[4], z_s[7, 2], z_t[1], z_t[10], z_s[10, 4:] = NAN, INF, -INF, NAN, -INF, -INF
    for given in ({"target": target.where(kept, IGNORED)}, {"target": target, "mask": kept}):
        value, gradient = value_and_grad(loss, z_s, z_t, **given)
        torch.testing.assert_close((value, gradient[kept]), wanted)
        assert not gradient[~kept].any()


# ---- half precision ---------------------------------------------------------------------------------------------


def near(rows, classes, seed=0):
    """A student near its teacher in float16, without ties at the selection's end."""
    z_s, _, target = sample(rows, classes, torch.float32, seed, scale=2.0)
    z_t = z_s + 0.02 * sample(rows, classes, torch.float32, seed + 1, scale=1.0)[0]
    return z_s.half(), z_t.half(), target


def norms(loss, z_s, z_t, target, scale=None):
    """Gradient norms of the plain formulas in float32, and of the scaled loss on float16 logits, unscaled again.

    Without a scale it is as large as a GradScaler would make it: the largest entry is about 1,000.
    """
    found = []
    for z in (z_s.float(), z_s.clone()):
        one = copy.deepcopy(loss)
        if z.dtype == torch.float32:
            getattr(one, "base", one).backend = "plain"
        if scale is None:
            scale = 2.0 ** int(10 - value_and_grad(one, z, z_t.to(z.dtype), target)[1].abs().max().log2())
        z.requires_grad_()
        (one(z, z_t.to(z.dtype), target) * scale).backward()
        assert z.grad.dtype == z.dtype
        found.append(z.grad.double().norm().item() / scale)
    return found


@pytest.mark.parametrize("rows, classes", [(16, 100), (64, 1000), (8, 32000)])
@pytest.mark.parametrize("name, given", EVERY, ids=named)
def test_a_loss_scale_finds_the_gradient(name, given, rows, classes):
    if name == "mlkd" and classes > 1000:
        pytest.skip("a matrix of all classes by all classes")
    loss = losses.build(name, **given)
    base = getattr(loss, "base", loss)
    for part in (loss, base):  # the divergence alone, which is small
        if name != "ce":
            part.ce_weight = 0.0
    z_s, z_t, target = near(rows, classes)
    if name == "corrected":
        target[: rows // 2] = z_t.argmax(1)[: rows // 2]
    single, half = norms(loss, z_s, z_t, target)
    assert half == pytest.approx(single, rel=0.01) and single > 0


@pytest.mark.parametrize("rows, classes", [(64, 32000), (256, 5000)])
def test_a_loss_scale_finds_ldrlds_gradient_at_a_language_models_size(rows, classes):
    loss = LDRLD(ce_weight=0.0)
    single, half = norms(loss, *near(rows, classes)[:2], None, 2.0**16)
    assert half == pytest.approx(single, rel=0.01)
    z_s, z_t, _ = near(rows, classes)
    z = z_s.clone().requires_grad_()
    (loss(z, z_t) * 2.0**16 / 1000).backward()  # as of one of a thousand micro-batches
    assert z.grad.double().norm().item() * 1000 / 2**16 == pytest.approx(single, rel=0.01)


def test_backward_twice_in_float16():
    z_s, z_t, target = near(8, 300)
    z = z_s.requires_grad_()
    value = LDRLD()(z, z_t, target)
    first, second = (torch.autograd.grad(1000 * value, z, retain_graph=True)[0] for _ in range(2))
    assert first.equal(second) and first.dtype == torch.float16


@pytest.mark.parametrize("name", LOGITS)
def test_a_grad_scaler_of_the_cpu(name):
    """A layer in autocast to float16 and a scaled loss: its weights get the gradient that float32 gives."""
    torch.manual_seed(0)
    layer, loss = nn.Linear(16, 1000), still(name)
    x, target = torch.randn(32, 16), torch.randint(1000, (32,))
    teacher = (layer(x) + 0.02 * torch.randn(32, 1000)).detach()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    gradients = []
    for enabled in (True, False):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            value = loss(layer(x), teacher, target)
        if enabled:
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
        else:
            value.backward()
        gradients.append(layer.weight.grad.clone())
    half, single = gradients
    assert half.isfinite().all() and (half - single).norm() < 0.05 * single.norm()
    assert half.norm().item() == pytest.approx(single.norm().item(), rel=0.01)


@pytest.mark.parametrize("autocast", [False, True])
def test_linear_loss_in_float16_keeps_small_gradients(autocast):
    g = torch.Generator().manual_seed(0)
    h, W = torch.randn(64, 16, generator=g), torch.randn(4000, 16, generator=g) / 4
    z_t = h @ W.T + 0.02 * torch.randn(64, 4000, generator=g)
    half, single = [], []
    for found, dtype in ((half, torch.float16), (single, torch.float32)):
        a, b = (x.half().to(torch.float32 if autocast else dtype).requires_grad_() for x in (h, W))
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast and dtype == torch.float16):
            value, _ = linear_loss(LDRLD(ce_weight=0.0), a, b, z_t, None, at_once=40_000)
        found += [x.double() / 2**14 for x in torch.autograd.grad(2.0**14 * value, (a, b))]
    for x, y in zip(half, single):
        assert x.isfinite().all() and x.norm().item() == pytest.approx(y.norm().item(), rel=0.01)


def test_the_gradient_of_bfloat16_waits_in_bfloat16():
    assert analytic.held_type(torch.bfloat16) == torch.bfloat16 and analytic.held_type(torch.float16) == torch.float32
    z_s, z_t, target = sample(dtype=torch.bfloat16)
    _, gradient = analytic.analytic(z_s, z_t, target, None, torch.ones(7, 7), 4.0, LDRLD().factors)
    assert gradient.dtype == torch.bfloat16


# ---- logits that are never stored -------------------------------------------------------------------------------


def hidden(rows=(3, 4), width=8, vocabulary=40):
    g = torch.Generator().manual_seed(0)
    shapes = ((*rows, width), (*rows, 6), (vocabulary, width), (vocabulary, 6))
    made = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]
    return *made, torch.randint(vocabulary, rows, generator=g)


class Seen(LDRLD):
    rows = 0

    def evaluated(self, rows):
        self.rows += len(rows.student)
        return super().evaluated(rows)


@pytest.mark.parametrize("at_once", [40, 100, 10**6])
@pytest.mark.parametrize("name", ["ldrld", "kd", "ce", "dkd"])
def test_padded_hidden_states_may_be_nan(name, at_once):
    h_s, h_t, W_s, W_t, target = hidden()
    target[0, 1:], target[2, 3] = IGNORED, IGNORED
    kept, loss = target != IGNORED, losses.build(name)
    W_s.requires_grad_()
    bias = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    wanted = loss(F.linear(h_s[kept], W_s, bias), h_t[kept] @ W_t.T, target[kept])
    right = torch.autograd.grad(wanted, (W_s, bias))
    h = h_s.masked_fill(~kept[..., None], NAN).requires_grad_()
    for other in (h_t.masked_fill(~kept[..., None], INF), h_t):
        value, _ = linear_loss(loss, h, W_s, other, W_t, target, student_bias=bias, at_once=at_once)
        torch.testing.assert_close(value, wanted)
        d_h, *found = torch.autograd.grad(value, (h, W_s, bias))
        torch.testing.assert_close(tuple(found), right)
        assert d_h.isfinite().all() and not d_h[~kept].any() and d_h[kept].any(-1).all()


def test_padding_is_not_worked_on():
    h_s, h_t, W_s, W_t, target = hidden()
    target[0, 1:] = IGNORED
    loss = Seen()
    linear_loss(loss, h_s, W_s, h_t, W_t, target, at_once=80)
    assert loss.rows == 9
    loss = Seen()
    linear_loss(loss, h_s, W_s, h_t, W_t, mask=target != IGNORED)
    assert loss.rows == 9


def test_nothing_counts_and_all_is_nan():
    h_s, h_t, W_s, W_t, target = hidden()
    h, W = torch.full_like(h_s, NAN).requires_grad_(), W_s.requires_grad_()
    value, terms = linear_loss(LDRLD(), h, W, h_t, W_t, torch.full_like(target, IGNORED))
    assert value == 0 and list(terms) == ["ce", "pairs", "llki", "rntk"] and not any(terms.values())
    for gradient in torch.autograd.grad(value, (h, W)):
        assert not gradient.any()


@pytest.mark.parametrize("name, given", [(n, g) for n, g in ROW_WISE if n != "sld"], ids=named)
def test_linear_loss_of_micro_batches(name, given):
    h_s, h_t, W_s, W_t, target = hidden((4, 7))
    target = target.where(torch.arange(7) < torch.tensor([3, 5, 7, 4])[:, None], IGNORED)
    loss = build(name, given)
    W_s.requires_grad_()
    wanted = loss(h_s @ W_s.T, h_t @ W_t.T, target)
    parts = [
        linear_loss(loss, h_s[k], W_s, h_t[k], W_t, target[k], normalizer=torch.tensor(19), at_once=120)[0]
        for k in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(parts), wanted)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), W_s)[0], torch.autograd.grad(wanted, W_s)[0])


@pytest.mark.parametrize("name, given", [*BY_BATCH, ("partial-mixup", {})], ids=named)
def test_linear_loss_refuses_what_compares_over_the_batch(name, given):
    h_s, h_t, W_s, W_t, target = hidden()
    loss = losses.build(name, **given)
    with pytest.raises(ValueError, match=f"loss must be row-wise, but {type(loss).__name__} "):
        linear_loss(loss, h_s, W_s, h_t, W_t, target)


@pytest.mark.parametrize("other", [losses.build("at"), nn.MSELoss(), "kd"], ids=["features", "module", "name"])
def test_linear_loss_refuses_what_is_no_loss_on_logits(other):
    h_s, h_t, W_s, W_t, target = hidden()
    with pytest.raises(ValueError, match="loss must be a loss on logits"):
        linear_loss(other, h_s, W_s, h_t, W_t, target)


@pytest.mark.parametrize("at_once", [40, 200, 10**6])
@pytest.mark.parametrize(
    "name, given",
    [("ctkd", {}), ("standardized", {"loss": "ctkd"}), ("corrected", {"loss": "ctkd", "rule": "skip"})],
    ids=named,
)
def test_linear_loss_trains_the_temperature(name, given, at_once):
    h_s, h_t, W_s, W_t, target = hidden()
    target[0, 2:] = IGNORED
    loss = build(name, given)
    (theta,) = loss.parameters()
    wanted = torch.autograd.grad(3 * loss(h_s @ W_s.T, h_t @ W_t.T, target), theta)[0]
    for h in (h_s, h_s.clone().requires_grad_()):
        value, _ = linear_loss(loss, h, W_s, h_t, W_t, target, at_once=at_once)
        torch.testing.assert_close(torch.autograd.grad(3 * value, theta)[0], wanted)
    theta.requires_grad_(False)
    assert not linear_loss(loss, h_s, W_s, h_t, W_t, target)[0].requires_grad


# ---- rounding ---------------------------------------------------------------------------------------------------


def test_shares_are_as_exact_as_the_logits():
    """One of three, in float64: of linear_loss without targets, of USKD's labels; and OFD's margins."""
    h_s, h_t, W_s, W_t, _ = hidden((3, 1))
    value, _ = linear_loss(losses.build("kd"), h_s, W_s, h_t, W_t)
    assert abs(value / losses.build("kd")(h_s @ W_s.T, h_t @ W_t.T) - 1) < 1e-14
    weak, strong, target = sample()
    zeta = zipf_labels(weak, strong, target)
    for row, y in zip(zeta, target):
        mass = row[torch.arange(20) != y].sort(descending=True).values
        ranks = torch.tensor([1 / r for r in range(1, 21)], dtype=torch.float64)
        without_one = [torch.cat([ranks[:k], ranks[k + 1 :]]) / (ranks.sum() - ranks[k]) for k in range(20)]
        assert min((mass - wanted).abs().max() for wanted in without_one) < 1e-15
    norm = nn.BatchNorm2d(5).double()
    nn.init.uniform_(norm.bias, -1, 1)
    assert margins_of(norm).dtype == torch.float64 and margins_of(nn.BatchNorm2d(5).half()).dtype == torch.float32


def test_sdds_share_of_samples_is_exact():
    """A loss that gives every row the same value: what SDD weighs is 1 + (ω − 1)·(share in conflict), in float64."""
    from ldrld.models.parts import Features

    g = torch.Generator().manual_seed(0)
    head = nn.Linear(4, 6).double()
    last_s, last_t = torch.randn(2, 3, 4, 2, 2, generator=g, dtype=torch.float64)
    z_s, z_t = (head(x.mean((2, 3))).detach() for x in (last_s, last_t))
    f_s, f_t = (Features((), (), x.mean((2, 3)), x) for x in (last_s, last_t))
    sdd = losses.build("sdd", regions=[1, 2], conflict_weight=2.0, distance="kd", distance_args={"kd_weight": 1.0})
    sdd._heads = head, head
    target = torch.tensor([1, 2, 3])
    rows_s, rows_t = (regional_logits(z, x, head, [1, 2]) for z, x in ((z_s, last_s), (z_t, last_t)))
    weight = 1.0 + ((rows_t.argmax(1) == target.repeat(5)) != (z_t.argmax(1) == target).repeat(5)).double()
    log_q, log_p = (rows_s / 4).log_softmax(1), (rows_t / 4).log_softmax(1)
    kl = 16 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    ours = sdd.terms(z_s, z_t, target, f_s, f_t)["kd"]
    assert weight.mean() not in (1, 2) and abs(ours.item() / (weight * kl).mean().item() - 1) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name, given",
    [("dist", {}), ("dist", {"temperature": 4.0}), *[(n, g) for n, g in BY_BATCH if g.get("loss") == "dist"]],
    ids=named,
)
def test_a_student_without_an_opinion_does_not_explode(name, given, dtype):
    """Constant rows, rows constant to rounding, and constant columns: gradients of the size of ordinary ones."""
    loss, (z_s, z_t, target) = losses.build(name, **given), sample(dtype=dtype)
    ordinary = value_and_grad(loss, z_s, z_t, target)[1].norm()
    one_row = torch.zeros(12, 20).index_fill(0, torch.tensor([3]), 1.0)
    for rows in (torch.zeros(12, 20), torch.full((12, 20), 7.0), torch.ones(12, 1) * torch.arange(20) / 10, one_row):
        value, gradient = value_and_grad(loss, rows.to(dtype), z_t, target)
        assert value.isfinite() and gradient.isfinite().all() and gradient.norm() < 10 * ordinary
    for spread in (1e-1, 1e-2, 1e-3, 1e-4, 1e-6):  # one over the spread, of 1e-3 at least
        value, gradient = value_and_grad(loss, (spread * z_s.double()).float(), z_t.float(), target)
        assert value.isfinite() and gradient.norm() < (1e6 if name == "standardized" else 2e3) * ordinary


def test_correlation_is_what_it_was_where_there_is_a_spread():
    z_s, z_t, _ = sample(40, 100)
    u, v = z_s.softmax(1), z_t.softmax(1)
    for dim in (0, -1):
        a, b = u - u.mean(dim, keepdim=True), v - v.mean(dim, keepdim=True)
        wanted = (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)
        torch.testing.assert_close(correlation(u, v, dim), wanted, rtol=1e-14, atol=0)
    near_constant = torch.full((1, 100), 0.01, dtype=torch.float64) + 1e-7 * z_s[:1]
    assert 0 < correlation(near_constant, near_constant, -1).item() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes, depth", [(1000, 7), (32000, 7), (5000, 20)])
@pytest.mark.parametrize("rank_by", ["student", "teacher"])
def test_plain_and_analytic_choose_the_same_of_equal_logits(classes, depth, dtype, rank_by):
    z_s, z_t, target = sample(16, classes, dtype)
    z_s, z_t = z_s.round(), z_t.round()  # many are equal, and at the selection's end
    found = {}
    for backend in ("plain", "analytic"):
        loss = LDRLD(depth=depth, rank_by=rank_by)
        loss.backend = backend
        value, gradient = value_and_grad(loss, z_s, z_t, target)
        found[backend] = value.item(), gradient.double()
    assert found["plain"][0] == pytest.approx(found["analytic"][0], rel=1e-5)
    assert (found["plain"][1] - found["analytic"][1]).norm() < 0.01 * found["plain"][1].norm()
