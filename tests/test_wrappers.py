"""Standardised logits and corrected teachers around every loss on logits: identities, the fast way, extremes,
refusals."""

import json

import pytest
import torch

from ldrld import losses
from ldrld.losses.ldrld import analytic
from ldrld.losses.logits.sld import swapped
from ldrld.losses.wrappers.standardized import Standardized, standardized

from still import inner, still

WRAPPED = sorted(set(losses.available("logits")) - {"ce", "standardized", "corrected"})
EVERY = [
    (name, inner(loss) | more)
    for loss in WRAPPED
    for name, more in (("standardized", {}), ("corrected", {"rule": "swap"}), ("corrected", {"rule": "skip"}))
]
named = lambda given: given if isinstance(given, str) else "-".join(map(str, given.values()))


def sample(batch=16, classes=20, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    z_s, z_t = (3 * torch.randn(batch, classes, generator=g, dtype=torch.float64) for _ in range(2))
    y = z_t.argmax(1)
    y[batch // 2 :] = torch.randint(
        classes, (batch - batch // 2,), generator=g
    )  # the teacher is right on half, at least
    return z_s.to(dtype), z_t.to(dtype), y


@pytest.mark.parametrize("name, given", EVERY, ids=named)
def test_around_every_loss(name, given):
    z_s, z_t, y = sample()
    loss = losses.build(name, **given)
    assert losses.build(name, **json.loads(json.dumps(loss.hyperparameters))).hyperparameters == loss.hyperparameters
    assert loss.ce_weight == losses.build(given["loss"]).ce_weight
    value, terms = loss.value_and_terms(z_s, z_t, y)
    torch.testing.assert_close(terms, loss.terms(z_s, z_t, y))
    torch.testing.assert_close(value, sum(terms.values()))
    plain = losses.build(given["loss"], **given.get("loss_args", {}), ce_weight=loss.ce_weight).terms(z_s, z_t, y)
    assert list(terms) == list(plain)
    torch.testing.assert_close(terms["ce"], plain["ce"])
    right = z_t.argmax(1)  # nothing to correct
    if name == "corrected":
        torch.testing.assert_close(loss(z_s, z_t, right), still(given["loss"])(z_s, z_t, right))
    else:  # the size of the logits does not matter
        unlike = lambda z: 0.3 * z + 2
        for name in set(terms) - {"ce"}:
            torch.testing.assert_close(loss.terms(unlike(z_s), 2 * z_t, y)[name], terms[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, given", EVERY, ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_and_padding(name, given, dtype):
    loss, g = losses.build(name, **given), torch.Generator().manual_seed(1)
    one, other = (1e4 * (2 * torch.rand(16, 10, generator=g) - 1) for _ in range(2))
    y = torch.randint(10, (16,), generator=g)
    y[3] = -100
    for z_s, z_t in ((one, -one), (one, other), (0 * one, 0 * one + 5), (1e-9 * one, other)):
        # logits of 1e-5: what divides by 1e-3 at least, and a correlation or a standardisation over it,
        # have a gradient of 7e4, beyond float16
        steep = given["loss"] in ("dist", "luminet", "lcka")
        if steep and (name, dtype) == ("standardized", torch.float16) and 0 < z_s.abs().max() < 1:
            continue
        z = z_s.to(dtype, copy=True)
        z[3] = torch.nan
        z.requires_grad_()
        value = loss(z, z_t.to(dtype), y)
        grad = torch.autograd.grad(value, z)[0]
        assert value.isfinite() and grad.isfinite().all() and grad.dtype == dtype and (grad[3] == 0).all()


def test_tied_logits_have_a_finite_gradient_in_float16():
    _, z_t, y = sample(classes=100)
    z = torch.zeros(16, 100, dtype=torch.float16, requires_grad=True)
    assert torch.autograd.grad(losses.build("standardized")(z, z_t.half(), y), z)[0].isfinite().all()


def test_standardised_kd_is_the_published_recipe():
    loss = losses.build("standardized")
    assert loss.hyperparameters == {
        "loss": "kd",
        "loss_args": {"temperature": 2.0, "kd_weight": 1.0},
        "distill_weight": 9.0,
        "ce_weight": 0.1,
    }
    z_s, z_t, y = sample()
    Z = [(z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True) for z in (z_s, z_t)]
    kd = losses.build("kd", temperature=2.0, kd_weight=9.0, ce_weight=0.1)
    torch.testing.assert_close(loss.terms(z_s, z_t, y)["kd"], kd.terms(*Z)["kd"], rtol=1e-6, atol=1e-6)
    assert standardized(z_s.half()).dtype == torch.float32


def test_skipping_divides_by_the_whole_batch():
    z_s, z_t, y = sample()
    right = z_t.argmax(1) == y
    y[0] = -100
    assert 8 <= right.sum() < 16
    loss, kept = losses.build("corrected", loss="ldrld", rule="skip"), right & (y >= 0)
    plain = losses.build("ldrld")
    wanted, terms = plain.terms(z_s[kept], z_t[kept], y[kept]), loss.terms(z_s, z_t, y)
    for name in ("pairs", "llki", "rntk"):
        torch.testing.assert_close(terms[name], wanted[name] * kept.sum() / 15)
    torch.testing.assert_close(terms["ce"], plain.terms(z_s, z_t, y)["ce"])
    wrong = (y + 1) % 20
    y = torch.where(z_t.argmax(1) == wrong, (wrong + 1) % 20, wrong)
    assert loss(z_s, z_t, y) == loss.terms(z_s, z_t, y)["ce"]  # all wrong: the cross-entropy is left


def test_swapping_is_a_corrected_teacher_and_commutes_with_standardising():
    z_s, z_t, y = sample()
    for loss in ("kd", "ldrld"):
        torch.testing.assert_close(
            losses.build("corrected", loss=loss)(z_s, z_t, y), losses.build(loss)(z_s, swapped(z_t, y[:, None]), y)
        )
        args = {"loss": loss}
        one, other = (
            losses.build("standardized", loss="corrected", loss_args=args),
            losses.build("corrected", loss="standardized", loss_args=args),
        )
        assert one.ce_weight == other.ce_weight == losses.build(loss).ce_weight
    torch.testing.assert_close(one(z_s, z_t, y), other(z_s, z_t, y))


@pytest.mark.parametrize("name", ["standardized", "corrected"])
def test_ldrld_goes_the_fast_way(name, monkeypatch):
    z_s, z_t, y = sample()
    calls, before = [], analytic.analytic
    monkeypatch.setattr(analytic, "analytic", lambda *a, **k: calls.append(1) or before(*a, **k))
    loss, z = losses.build(name, loss="ldrld"), z_s.requires_grad_()
    quick = torch.autograd.grad(loss(z, z_t, y), z)[0]
    assert calls
    loss.base.backend = "plain"
    torch.testing.assert_close(torch.autograd.grad(loss(z, z_t, y), z)[0], quick)
    assert len(calls) == 1


def test_warm_up_and_what_is_trained_are_passed_on():
    z_s, z_t, y = sample()
    loss, full = losses.build("standardized", loss="dkd"), losses.build("standardized", loss="dkd").terms(z_s, z_t, y)
    loss.at_epoch(1, 240)
    torch.testing.assert_close(loss.terms(z_s, z_t, y)["nckd"], full["nckd"] / 20)
    assert list(losses.build("corrected", loss="ctkd").state_dict()) == ["base.theta"]


def test_published_settings_build():
    assert (
        Standardized.pair_settings is Standardized.wrapped_pair_settings["kd"]
        and len(Standardized.wrapped_pair_settings) == 2
    )
    for loss, pairs in {"kd": 15, "dkd": 14}.items():
        table = Standardized.wrapped_pair_settings[loss]
        assert len(table) == pairs
        for given in table.values():
            built = losses.build("standardized", **given)
            assert built.ce_weight == given.get("ce_weight", losses.build(loss).ce_weight)
            assert given["loss_args"].items() <= built.loss_args.items()
    assert (
        losses.build("standardized", **Standardized.pair_settings["resnet110", "resnet20"]).loss_args["temperature"]
        == 4.0
    )


def test_published_settings_go_with_the_wrapped_loss():
    from ldrld.experiments.cells import method_config
    from ldrld.experiments.methods import METHODS, VARIANTS
    from ldrld.experiments.profiles import profile

    given = lambda method, *pair: method_config(profile("paper"), pair, method).loss_args
    kd, dkd = (given(METHODS[name], "vgg13", "vgg8") for name in ("KD+LS", "DKD+LS"))
    assert (kd["loss_args"]["temperature"], kd["distill_weight"]) == (3.0, 9.0)
    assert (dkd["loss_args"]["temperature"], dkd["distill_weight"], dkd["loss_args"]["beta"]) == (2.0, 15.0, 2.0)
    assert (
        given(VARIANTS["logits standardised"], "vgg13", "vgg8")
        == losses.build("standardized", loss="ldrld").hyperparameters
    )
    assert losses.published_settings("standardized", "vgg13", "vgg8") == Standardized.pair_settings["vgg13", "vgg8"]
    assert losses.published_settings("corrected", "vgg13", "vgg8", loss="dkd") == {}


@pytest.mark.parametrize("name", ["standardized", "corrected"])
@pytest.mark.parametrize(
    "arguments, parts",
    [
        ({"loss": "mlkd"}, ("loss", "'mlkd'", "training images")),
        ({"loss": "ce"}, ("loss", "'ce'", "teacher")),
        ({"loss": "mcmi"}, ("loss", "'mcmi'", "tunes a teacher")),
        ({"loss": "kdd"}, ("unknown loss", "'kd'")),
        ({"loss_args": {"depth": 3}}, ("'kd'", "'depth'")),
        ({"loss_args": {"ce_weight": 1.0}}, ("loss_args", "ce_weight")),
        ({"loss_args": 3}, ("loss_args", "3")),
        ({"ce_weight": -1}, ("ce_weight", "-1")),
    ],
)
def test_refusals(name, arguments, parts):
    with pytest.raises(ValueError) as error:
        losses.build(name, **arguments)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_loss_on_features_is_refused():
    from ldrld.losses.features.base import FeatureLoss

    try:
        losses.register("test-features")(type("TestFeatures", (FeatureLoss,), {}))
        with pytest.raises(
            ValueError, match="loss must be a loss on student and teacher logits.*'test-features' uses features"
        ):
            losses.build("standardized", loss="test-features")
    finally:
        losses.registry._losses.pop("test-features", None)


def test_other_refusals():
    z_s, z_t, _ = sample()
    with pytest.raises(ValueError, match="target must be given for 'corrected'"):
        losses.build("corrected")(z_s, z_t)
    with pytest.raises(ValueError, match="rule must be one of 'swap', 'skip', got 'drop'"):
        losses.build("corrected", rule="drop")
    with pytest.raises(ValueError, match="distill_weight .* got -1"):
        losses.build("standardized", distill_weight=-1)
