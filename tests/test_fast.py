"""The fast ways to LDRLD against the plain formulas, and language-model use: padding, masks, logits never stored."""

import pytest
import torch
import torch.nn.functional as F

from still import still

from ldrld import LDRLD, losses
from ldrld.losses.base import rows_of
from ldrld.losses.ldrld import analytic
from ldrld.losses.ldrld.linear import linear_loss

OF_BATCHES = {"dist", "luminet", "lcka", "sinkd"}  # compare samples with each other, so they are no mean over samples


def sample(rows=16, classes=40, dtype=torch.float64, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    z_s, z_t = scale * torch.randn(2, rows, classes, generator=g, dtype=torch.float64)
    return z_s.to(dtype), z_t.to(dtype), torch.randint(classes, (rows,), generator=g)


def evaluate(backend, z_s, z_t, target=None, mask=None, above=1.0, **options):
    """Value, gradient and terms by one backend."""
    loss, z = LDRLD(**options), z_s.clone().requires_grad_()
    loss.backend = backend
    value, terms = loss.value_and_terms(z, z_t, target, mask)
    return value.detach(), torch.autograd.grad(above * value, z)[0], terms


def same(z_s, z_t, *args, rtol=1e-9, atol=1e-11, **options):
    a, b = (evaluate(backend, z_s, z_t, *args, **options) for backend in ("analytic", "plain"))
    torch.testing.assert_close(a[2], b[2], rtol=rtol, atol=atol)
    torch.testing.assert_close(a[:2], b[:2], rtol=rtol, atol=atol)


# ---- analytic against plain -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_by", ["student", "teacher"])
@pytest.mark.parametrize(
    "classes, depth", [(2, 2), (3, 2), (10, 10), (40, 7), (40, 40), (700, 20), (1003, 7), (3000, 64)]
)
def test_value_gradient_and_terms(classes, depth, rank_by):
    z_s, z_t, target = sample(classes=classes)
    for T in (0.7, 4.0):
        same(z_s, z_t, target, depth=depth, temperature=T, rank_by=rank_by)
        same(z_s, z_t, depth=depth, temperature=T, rank_by=rank_by)


@pytest.mark.parametrize(
    "options",
    [{"weighting": w} for w in ("none", "irw", "erd")]
    + [
        {"normalize": False},
        {"alpha": 0.0},
        {"beta": 0.0},
        {"ce_weight": 0.0},
        {"pairs_weight": 0.0},
        {"llki_weight": 2.0},
    ],
)
def test_every_switch(options):
    same(*sample(), **options)


def test_a_few_rows_at_a_time(monkeypatch):
    z_s, z_t, target = sample(rows=17)
    for rows_at_once in (1, 5, 16, 17, 30):
        monkeypatch.setitem(analytic.AT_ONCE, "cpu", 98 * rows_at_once)  # 2·d² where that is more than the classes
        same(z_s, z_t, target)
        target[3] = -100
        same(z_s, z_t, target)


def test_one_class_that_dominates_does_not_drown_the_remaining_term():
    z_s, z_t, _ = sample(dtype=torch.float32)
    z_s[:, 3] = z_t[:, 3] = 500.0
    exact = evaluate("plain", z_s.double(), z_t.double(), beta=1.0)[2]["rntk"]
    ours = evaluate("analytic", z_s, z_t, beta=1.0)[2]["rntk"]
    assert exact > 1 and abs(ours / exact - 1) < 1e-5


@pytest.mark.parametrize("dtype, gradient", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_logits(dtype, gradient):
    z_s, z_t, target = sample(classes=100)
    z_s = torch.stack([torch.randperm(100) for _ in range(16)]).to(dtype) / 8  # no ties, in any type
    a, b = (
        evaluate("analytic", z_s, z_t.to(dtype), target),
        evaluate("plain", z_s.double(), z_t.to(dtype).double(), target),
    )
    assert a[1].dtype == dtype and abs(a[0] / b[0] - 1) < 1e-5
    assert (a[1].double() - b[1]).norm() / b[1].norm() < gradient  # its own rounding, once


def test_logits_that_are_not_contiguous():
    z_s, z_t, target = sample(classes=80)
    torch.testing.assert_close(
        evaluate("analytic", z_s[:, ::2], z_t[:, ::2], target % 40)[:2],
        evaluate("plain", z_s[:, ::2].contiguous(), z_t[:, ::2].contiguous(), target % 40)[:2],
    )


# ---- selection --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [64, 224, 225, 1000, 1003, 10_007])
@pytest.mark.parametrize("d", [2, 7, 20])
def test_largest_is_topk(classes, d):
    z = torch.stack([torch.randperm(classes, generator=torch.Generator().manual_seed(k)) for k in range(8)]).float()
    for rows in (z, -z.sort().values, z.sort().values, z.sort(descending=True).values):
        assert torch.equal(analytic.largest(rows, d), rows.topk(d).indices)


def test_largest_of_equal_ones_are_different_classes():
    z = torch.zeros(4, 1000)
    z[1, 500:] = 1.0
    pi = analytic.largest(z, 7)
    assert all(len(set(row.tolist())) == 7 for row in pi) and (z.gather(1, pi)[1] == 1).all()


# ---- autograd ---------------------------------------------------------------------------------------------------


def test_gradcheck_of_first_and_second_derivatives():
    z_s, z_t, target = sample(rows=3, classes=9)
    loss = LDRLD(depth=4)
    assert torch.autograd.gradcheck(lambda z: loss(z, z_t, target), z_s.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda z: loss(z, z_t, target), z_s)


def test_whatever_comes_from_above_is_multiplied_in():
    z_s, z_t, target = sample()
    for above in (0.0, 1.0, 3.0, -2.5):
        torch.testing.assert_close(
            evaluate("analytic", z_s, z_t, target, above=above)[1], above * evaluate("plain", z_s, z_t, target)[1]
        )


def test_backward_may_be_called_twice():
    z_s, z_t, target = sample()
    z = z_s.requires_grad_()
    value = LDRLD()(z, z_t, target)
    first, second = (torch.autograd.grad(3 * value, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (value * 2).backward(retain_graph=True)
    value.backward()
    torch.testing.assert_close(z.grad, first)


def test_inputs_are_unchanged_and_no_gradient_is_made_without_need():
    z_s, z_t, target = sample()
    before = z_s.clone(), z_t.clone(), target.clone()
    value = LDRLD()(z_s, z_t, target)
    assert not value.requires_grad
    with torch.no_grad():
        LDRLD()(z_s.requires_grad_(), z_t, target)
    evaluate("analytic", z_s.detach(), z_t, target)
    for a, b in zip((z_s.detach(), z_t, target), before):
        assert torch.equal(a, b)


def test_weights_first_made_in_inference_mode_serve_training():
    z_s, z_t, target = sample()
    with torch.inference_mode():
        LDRLD(depth=6, epsilon=1.25)(z_s, z_t, target)
    same(z_s, z_t, target, depth=6, epsilon=1.25)
    assert torch.autograd.gradgradcheck(
        lambda z: LDRLD(depth=6, epsilon=1.25)(z, z_t[:2], target[:2]), z_s[:2].clone().requires_grad_()
    )


def test_a_teacher_queried_in_inference_mode():
    z_s, z_t, target = sample(rows=3, classes=9)
    with torch.inference_mode():
        z_i = z_t.clone()
    for a, b in zip(evaluate("analytic", z_s, z_i, target)[:2], evaluate("plain", z_s, z_t, target)[:2]):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradgradcheck(lambda z: LDRLD()(z, z_i, target), z_s.clone().requires_grad_())


def test_the_terms_that_are_logged_carry_no_gradient():
    z_s, z_t, target = sample()
    for name in losses.available("logits"):
        loss = still(name)
        value, terms = loss.value_and_terms(z_s.clone().requires_grad_(), z_t, target)
        assert value.requires_grad and not any(term.requires_grad for term in terms.values())
        torch.testing.assert_close(sum(terms.values()), value.detach())
        assert tuple(terms) == tuple(loss.terms(z_s, z_t, target))


def test_an_unknown_backend_is_refused():
    z_s, z_t, target = sample()
    loss = LDRLD()
    loss.backend = "cuda"
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'plain', 'analytic', 'triton', got 'cuda'"):
        loss(z_s, z_t, target)


# ---- compile, autocast, functional transforms --------------------------------------------------------------------


@pytest.mark.parametrize("name", losses.available("logits"))
def test_compiles_whole_also_under_autocast_and_with_padding(name):
    z_s, z_t, target = sample(dtype=torch.float32)
    target[2] = -100
    loss, z = still(name), z_s.clone().requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = compiled(z, z_t, target)
    torch.testing.assert_close(value, loss(z_s, z_t, target))
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], torch.autograd.grad(loss(z, z_t, target), z)[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("name", losses.available("logits"))
def test_functional_transforms(name):
    z_s, z_t, target = sample()
    loss = still(name)
    gradient = torch.autograd.grad(loss(z := z_s.clone().requires_grad_(), z_t, target), z)[0]
    torch.testing.assert_close(torch.func.grad(loss)(z_s, z_t, target), gradient)
    torch.testing.assert_close(
        torch.func.vmap(loss, (0, None, None))(z_s.expand(3, -1, -1), z_t, target), loss(z_s, z_t, target).expand(3)
    )
    if name in OF_BATCHES:
        return  # one sample by itself is another loss
    per_sample = torch.func.vmap(torch.func.grad(lambda s, t, y: loss(s[None], t[None], y[None])))(z_s, z_t, target)
    torch.testing.assert_close(per_sample / len(z_s), gradient)


# ---- texts ------------------------------------------------------------------------------------------------------


def text(name="ldrld", dtype=torch.float64):
    z_s, z_t, target = sample(rows=12, dtype=dtype)
    target = target.view(3, 4).clone()
    target[1, 2:], target[2, 0] = -100, -100
    return still(name), z_s.view(3, 4, 40), z_t.view(3, 4, 40), target


@pytest.mark.parametrize("name", losses.available("logits"))
def test_padding_counts_for_nothing(name):
    loss, z_s, z_t, target = text(name)
    counts = target != -100
    wanted = loss(z_s[counts], z_t[counts], target[counts])
    z = z_s.masked_fill(~counts[..., None], torch.nan).requires_grad_()
    teacher = z_t.masked_fill(~counts[..., None], torch.inf)
    for given in (
        {"target": target},
        {"target": target, "mask": counts},
        {"target": target.clamp(min=0), "mask": counts},
    ):
        value = loss(z, teacher, **given)
        gradient = torch.autograd.grad(value, z)[0]
        torch.testing.assert_close(value, wanted)
        assert (gradient[~counts] == 0).all() and (gradient[counts] != 0).any(-1).all()


@pytest.mark.parametrize("name", losses.available("logits"))
def test_nothing_that_counts_is_no_loss(name):
    loss, z_s, z_t, target = text(name)
    z = z_s.requires_grad_()
    value = loss(z, z_t, torch.full_like(target, -100))
    assert value == 0 and (torch.autograd.grad(value, z)[0] == 0).all()


def test_a_mask_without_targets():
    loss, z_s, z_t, target = text()
    mask = target != -100
    torch.testing.assert_close(loss(z_s, z_t, mask=mask), loss(z_s[mask], z_t[mask]))


def test_all_shares_are_one_over_the_rows_that_count():
    _, z_s, z_t, target = text()
    s, t, y, row_weights = rows_of(z_s, z_t, target)[:4]
    assert (
        s.shape == t.shape == (12, 40)
        and (row_weights[y == -100] == 0).all()
        and torch.allclose(row_weights[y != -100], torch.tensor(1 / 9, dtype=torch.float64))
    )
    assert rows_of(z_s, z_t, target.clamp(min=0)).row_weights is None


@pytest.mark.parametrize(
    "mask, parts",
    [
        (torch.ones(3, 4), ("mask", "bool", "float32")),
        (torch.ones(12, dtype=torch.bool), ("mask", "(3, 4)", "(12,)")),
        ([True], ("mask", "list")),
    ],
)
def test_wrong_masks(mask, parts):
    loss, z_s, z_t, target = text()
    with pytest.raises(ValueError) as error:
        loss(z_s, z_t, target, mask)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("wrong", [-1, -99, 40])
def test_targets_out_of_range_beside_padding(wrong):
    loss, z_s, z_t, target = text()
    target[0, 0] = wrong
    with pytest.raises(ValueError, match=f"from 0 to 39, or -100 .*{wrong}"):
        loss(z_s, z_t, target)


# ---- logits that are never stored --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(losses.available("logits")) - OF_BATCHES))
@pytest.mark.parametrize("at_once", [1, 100, 10**6])
def test_linear_loss(name, at_once):
    g = torch.Generator().manual_seed(0)
    h_s, h_t, W_s, W_t, b_s, b_t = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((3, 4, 8), (3, 4, 6), (40, 8), (40, 6), (40,), (40,))
    )
    leaves = [x.requires_grad_() for x in (h_s, W_s, b_s)]
    loss, _, _, target = text(name)
    value, terms = linear_loss(loss, h_s, W_s, h_t, W_t, target, student_bias=b_s, teacher_bias=b_t, at_once=at_once)
    stored = loss(F.linear(h_s, W_s, b_s), F.linear(h_t, W_t, b_t), target)
    torch.testing.assert_close(value, stored)
    torch.testing.assert_close(sum(terms.values()), stored.detach())
    for a, b in zip(torch.autograd.grad(2 * value, leaves), torch.autograd.grad(2 * stored, leaves)):
        torch.testing.assert_close(a, b)
    given = linear_loss(loss, h_s, W_s, F.linear(h_t, W_t, b_t), None, target, student_bias=b_s, at_once=at_once)[0]
    torch.testing.assert_close(given, stored)


def test_linear_loss_asks_only_for_the_gradients_that_are_wanted():
    h, W = torch.randn(5, 8), torch.randn(40, 8, requires_grad=True)
    value, _ = linear_loss(LDRLD(), h, W, torch.randn(5, 40), None)
    value.backward()
    assert h.grad is None and W.grad.abs().sum() > 0
    with torch.no_grad():
        assert not linear_loss(LDRLD(), h, W, torch.randn(5, 40), None)[0].requires_grad


def test_linear_loss_in_half_precision():
    g = torch.Generator().manual_seed(0)
    h, W, z_t = (torch.randn(*shape, generator=g) for shape in ((64, 16), (300, 16), (64, 300)))
    exact = linear_loss(LDRLD(), h.bfloat16().float(), W.bfloat16().float(), z_t, None)[0]
    w = W.bfloat16().requires_grad_()
    value = linear_loss(LDRLD(), h.bfloat16(), w, z_t, None, at_once=1000)[0]
    assert torch.autograd.grad(value, w)[0].dtype == torch.bfloat16 and abs(value / exact - 1) < 0.02
