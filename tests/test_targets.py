"""DKD, NKD, WSLD, RLD, SLD: identities on random logits, slow references, extremes, refusals; and the two views'
images."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ldrld import losses
from ldrld.losses.logits.log_odds import log_odds
from ldrld.losses.logits.rld import kl_within
from ldrld.losses.logits.sld import swapped
from ldrld.losses.logits.strong_view import operations, strong_view
from ldrld.losses.logits.two_views import TwoViews
from ldrld.losses.relations import dway_kl

WITH_VIEWS = [name for name in losses.available("images") if issubclass(losses.registry._losses[name], TwoViews)]
DATA = SimpleNamespace(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def sample(batch=16, classes=20, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    z_s, z_t = (3 * torch.randn(batch, classes, generator=g, dtype=torch.float64) for _ in range(2))
    return z_s.to(dtype), z_t.to(dtype), torch.randint(classes, (batch,), generator=g)


def gradient(loss, z_s, *rest):
    z = z_s.clone().requires_grad_()
    return torch.autograd.grad(loss(z, *rest), z)[0]


# ---- identities and slow references ------------------------------------------------------------------------------


def test_log_odds_are_the_logarithm_of_the_odds():
    z, _, y = sample()
    p = (z / 3).softmax(1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(log_odds(z, y[:, None], 3.0), (p / (1 - p)).log())
    assert log_odds(torch.tensor([[1e4, -1e4]]).half(), torch.tensor([[0]])).item() == pytest.approx(2e4, rel=1e-3)


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_dkd_is_kd_with_the_weight_that_kd_gives_the_others(classes):
    z_s, z_t, y = sample(classes=classes)
    for k in range(len(y)):
        one = z_s[k : k + 1], z_t[k : k + 1], y[k : k + 1]
        dkd = losses.build("dkd", ce_weight=0.0, beta=1 - (z_t[k] / 4).softmax(0)[y[k]].item())
        kd = losses.build("kd", ce_weight=0.0, kd_weight=1.0)
        torch.testing.assert_close(dkd(*one), kd(*one), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(gradient(dkd, *one), gradient(kd, *one), rtol=1e-7, atol=1e-9)


def test_nkd_is_its_formula():
    z_s, z_t, y = sample()
    p_s, p_t = (z.softmax(1)[torch.arange(16), y] for z in (z_s, z_t))
    others = lambda z: torch.stack([torch.cat([r[:k], r[k + 1 :]]) for r, k in zip(z, y)]) / 3
    expected = (
        F.cross_entropy(z_s, y)
        - (p_t * p_s.log()).mean()
        - 3.5 * 9 * (others(z_t).softmax(1) * others(z_s).log_softmax(1)).sum(1).mean()
    )
    torch.testing.assert_close(losses.build("nkd")(z_s, z_t, y), expected)


def test_wsld_is_its_formula_and_its_weights_are_constants():
    z_s, z_t, y = sample()
    ell_s, ell_t = (F.cross_entropy(z, y, reduction="none") for z in (z_s, z_t))
    w = 1 - torch.exp(-ell_s / (ell_t + 1e-7))
    formula = lambda z, *_: 2.25 * 16 * -(w * ((z_t / 4).softmax(1) * (z / 4).log_softmax(1)).sum(1)).mean()
    wsld = losses.build("wsld", ce_weight=0.0)
    torch.testing.assert_close(wsld(z_s, z_t, y), formula(z_s))
    torch.testing.assert_close(gradient(wsld, z_s, z_t, y), gradient(formula, z_s))


def test_rld_is_dkd_where_the_teacher_is_right():
    z_s, z_t, _ = sample()
    right = z_t.argmax(1)
    rld, dkd = losses.build("rld", scd_temperature=4.0), losses.build("dkd")
    torch.testing.assert_close(rld(z_s, z_t, right), dkd(z_s, z_t, right))
    torch.testing.assert_close(gradient(rld, z_s, z_t, right), gradient(dkd, z_s, z_t, right))


def test_rld_is_its_formula_where_the_teacher_is_wrong():
    z_s, z_t, y = sample()
    scd, mcd = [], []
    for s, t, k in zip(z_s, z_t, y):
        a, b = t.softmax(0).max(), s.softmax(0)[k]
        scd.append(a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log())
        below = t < t[k]
        p_t, p_s = (t[below] / 4).softmax(0), (s[below] / 4).softmax(0)
        mcd.append((p_t * (p_t / p_s).log()).sum())
    terms = losses.build("rld").terms(z_s, z_t, y)
    torch.testing.assert_close(terms["scd"], torch.stack(scd).mean())
    torch.testing.assert_close(terms["mcd"], 8 * 16 * torch.stack(mcd).mean())


def test_rld_with_the_true_class_last_has_no_masked_correlation():
    z_s, z_t, _ = sample()
    last, loss = z_t.argmin(1), losses.build("rld")
    assert loss.terms(z_s, z_t, last)["mcd"] == 0 and gradient(loss, z_s, z_t, last).isfinite().all()


def test_kl_within_by_rows():
    z_s, z_t, _ = sample()
    keep = torch.rand(16, 20, generator=torch.Generator().manual_seed(1)) < 0.3
    keep[3], keep[4] = False, False
    keep[4, 7] = True
    for k, kl in enumerate(kl_within(z_s, z_t, keep, 2.0)):
        torch.testing.assert_close(
            kl, dway_kl(z_s[k, keep[k]], z_t[k, keep[k]], 2.0) if keep[k].any() else torch.zeros_like(kl)
        )


def test_swapping_puts_the_true_class_first_and_back():
    _, z, y = sample()
    there = swapped(z, y[:, None])
    assert torch.equal(there.argmax(1), y) and torch.equal(there.sort(1).values, z.sort(1).values)
    assert torch.equal(swapped(there, z.argmax(1, keepdim=True)), z)
    assert torch.equal(swapped(z, z.argmax(1, keepdim=True)), z)


@pytest.mark.parametrize("name", ["dkd", "nkd", "rld"])  # not WSLD, whose weights are constants to autograd alone
def test_derivatives(name):
    z_s, z_t, y = sample(3, 6)
    loss = losses.build(name)
    assert torch.autograd.gradcheck(lambda z: loss(z, z_t, y), z_s.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda z: loss(z, z_t, y), z_s)


@pytest.mark.parametrize("name", ["dkd", "rld"])
def test_warm_up(name):
    z_s, z_t, y = sample()
    loss, full = losses.build(name), losses.build(name).terms(z_s, z_t, y)
    for epoch, epochs, ramp in ((1, 240, 0.05), (20, 240, 1.0), (240, 240, 1.0), (1, 24, 0.5)):
        loss.at_epoch(epoch, epochs)
        for term, value in loss.terms(z_s, z_t, y).items():
            torch.testing.assert_close(value, full[term] * (1 if term == "ce" else ramp))


@pytest.mark.parametrize("name", ["dkd", "nkd", "wsld", "rld", "sld"])
def test_labels_are_required(name):
    z_s, z_t, _ = sample()
    with pytest.raises(ValueError, match=f"target must be given for '{name}'.* got None"):
        losses.build(name)(z_s, z_t)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("dkd", {"temperature": 0}),
        ("dkd", {"warmup": -1}),
        ("nkd", {"gamma": -1}),
        ("wsld", {"alpha": -1}),
        ("rld", {"scd_temperature": 0}),
        ("sld", {"temperatures": 4.0}),
        ("sld", {"temperatures": []}),
        ("sld", {"temperatures": [1, 0]}),
        ("sld", {"student_from": -1}),
    ],
)
def test_wrong_hyperparameters(name, arguments):
    ((argument, value),) = arguments.items()
    with pytest.raises(ValueError, match=argument):
        losses.build(name, **arguments)


# ---- two views --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["opposite", "ties", "wide"])
def test_extremes(name, dtype, kind):
    g = torch.Generator().manual_seed(1)
    one, other = (1e4 * (2 * torch.rand(32, 10, generator=g) - 1) for _ in range(2))
    z_s, z_t = {"opposite": (one, -one), "ties": (0 * one, one), "wide": (one, other)}[kind]
    y = torch.randint(10, (16,), generator=g)
    z = z_s.to(dtype).requires_grad_()
    for target in (y, torch.cat([y, y])):
        value = losses.build(name)(z, z_t.to(dtype), target)
        grad = torch.autograd.grad(value, z)[0]
        assert value.isfinite() and value.dtype == torch.float32 and grad.isfinite().all() and grad.dtype == dtype


@pytest.mark.parametrize("name", WITH_VIEWS)
def test_views_padding_compile_and_hyperparameters(name):
    z_s, z_t, y = sample(32, dtype=torch.float32)
    loss, y = losses.build(name), y[:16].clone()
    assert losses.build(name, **json.loads(json.dumps(loss.hyperparameters))).hyperparameters == loss.hyperparameters
    torch.testing.assert_close(torch.compile(loss, backend="eager", fullgraph=True)(z_s, z_t, y), loss(z_s, z_t, y))
    torch._dynamo.reset()
    y[[2, 5]] = -100
    counts = (y != -100).repeat(2)
    wanted = loss(z_s[counts], z_t[counts], y[y != -100])
    z = z_s.masked_fill(~counts[:, None], torch.nan).requires_grad_()
    value = loss(z, z_t.masked_fill(~counts[:, None], torch.inf), y)
    torch.testing.assert_close(value, wanted)
    assert (torch.autograd.grad(value, z)[0][~counts] == 0).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(z_s, z_t, y), value)
    assert loss(z_s, z_t, torch.full_like(y, -100)) == 0
    with pytest.raises(ValueError, match="target must have shape"):
        loss(z_s, z_t, y[:7])


def test_sld_swaps_the_student_late():
    z_s, z_t, y = sample(32)
    loss = losses.build("sld")
    assert set(loss.terms(z_s, z_t, y[:16])) == {"ce", "teacher", "student"}
    loss.at_epoch(62, 100)
    assert set(loss.terms(z_s, z_t, y[:16])) == {"ce", "teacher"}
    loss.at_epoch(63, 100)
    expected = 0.9 * sum(T**2 * dway_kl(z_s, swapped(z_s, y[:, None]), T).mean() for T in range(1, 7))
    torch.testing.assert_close(loss.terms(z_s, z_t, y)["student"], expected)
    late = {}
    for epoch in (150, 151):  # the official code compares with > 150, epochs counted from 1
        loss.at_epoch(epoch, 240)
        late[epoch] = loss.late
    assert late == {150: False, 151: True}


def test_slds_swapped_student_is_a_constant():
    z_s, z_t, y = sample(32)
    term = lambda z: losses.build("sld").terms(z, z_t, y)["student"]
    constant = swapped(z_s, y[:, None])
    by_hand = lambda z: 0.9 * sum(T**2 * dway_kl(z, constant, T).mean() for T in range(1, 7))
    torch.testing.assert_close(gradient(term, z_s), gradient(by_hand, z_s))


@pytest.mark.parametrize("name", WITH_VIEWS)
def test_images_depend_on_seed_epoch_and_call_alone(name):
    x, loss = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), losses.build(name)
    with pytest.raises(ValueError, match="data must be given to prepare"):
        loss.images(x)
    assert loss.prepare(None, None, x, DATA) is loss
    before, made = torch.get_rng_state(), {}
    for seed, epoch in ((0, 1), (0, 2), (1, 1)):
        loss.at_epoch(epoch, 240, seed)
        made[seed, epoch] = [loss.images(x) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    flat = [p for pair in made.values() for p in pair]
    assert all(not torch.equal(a, b) for k, a in enumerate(flat) for b in flat[:k])
    torch.manual_seed(99)
    other = losses.build(name).prepare(None, None, x, DATA)
    other.at_epoch(2, 240, 0)
    assert all(torch.equal(a, other.images(x)) for a in made[0, 2])
    assert all(p.shape == (16, 3, 16, 16) and torch.equal(p[:8], x) for p in flat)


def test_images_keep_type_memory_format_and_range():
    loss = losses.build("mlkd").prepare(None, None, None, DATA)
    for x in (torch.randn(4, 3, 12, 10).bfloat16(), torch.randn(4, 3, 12, 10).to(memory_format=torch.channels_last)):
        made = loss.images(x)
        assert made.dtype == x.dtype and made.is_contiguous(memory_format=torch.channels_last) == x.is_contiguous(
            memory_format=torch.channels_last
        )
        back = made[4:].float() * torch.tensor(DATA.std).view(3, 1, 1) + torch.tensor(DATA.mean).view(3, 1, 1)
        assert back.min() > -0.01 and back.max() < 1.01


def test_every_operation_keeps_a_image_a_image():
    x = torch.randint(256, (3, 16, 12), dtype=torch.uint8)
    for low, high, alter in operations().values():
        for v in (low, (low + high) / 2, high):
            assert alter(x, v).shape == x.shape and alter(x, v).dtype == torch.uint8
    assert torch.equal(operations()["Identity"][2](x, 0), x)
    many = strong_view(x.expand(64, -1, -1, -1), torch.Generator().manual_seed(0))
    assert len({p.numpy().tobytes() for p in many}) > 60  # drawn for each image
