"""DIST, TTM, WTTM, CTKD, MLKD: identities on random logits, slow references, what is trained and checkpointed,
refusals."""

import pytest
import torch
import torch.nn.functional as F

from ldrld import losses
from ldrld.losses.logits.dist import correlation
from ldrld.losses.logits.ttm import power_transform
from ldrld.losses.relations import dway_kl


def sample(batch=16, classes=20, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    z_s, z_t = (3 * torch.randn(batch, classes, generator=g, dtype=torch.float64) for _ in range(2))
    return z_s.to(dtype), z_t.to(dtype), torch.randint(classes, (batch,), generator=g)


def test_dist_is_pearsons_correlation():
    z_s, z_t, y = sample()
    P_s, P_t = (z_s / 2).softmax(1), (z_t / 2).softmax(1)
    rho = lambda A, B: torch.stack([torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(A, B)]).mean()
    expected = F.cross_entropy(z_s, y) + 3 * 4 * (1 - rho(P_s, P_t)) + 5 * 4 * (1 - rho(P_s.T, P_t.T))
    torch.testing.assert_close(
        losses.build("dist", temperature=2, beta=3, gamma=5)(z_s, z_t, y), expected, rtol=1e-5, atol=1e-5
    )


def test_dist_does_not_see_scale_and_shift():
    z_s, z_t, _ = sample()
    u, v, a, b = (
        z_s.softmax(1),
        z_t.softmax(1),
        torch.rand(16, 1, dtype=torch.float64) + 0.5,
        torch.randn(16, 1, dtype=torch.float64),
    )
    torch.testing.assert_close(correlation(a * u + b, v, -1), correlation(u, v, -1), rtol=1e-5, atol=1e-5)
    a, b = torch.rand(1, 20, dtype=torch.float64) + 0.5, torch.randn(1, 20, dtype=torch.float64)
    torch.testing.assert_close(correlation(a * u + b, v, 0), correlation(u, v, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dist", "ttm", "wttm", "ctkd"])
def test_derivatives(name):
    z_s, z_t, y = sample(3, 6)
    loss = losses.build(name)
    assert torch.autograd.gradcheck(lambda z: loss(z, z_t, y), z_s.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda z: loss(z, z_t, y), z_s)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
def test_the_power_transform_is_a_temperature(gamma):
    z_s, z_t, _ = sample()
    log_q, log_U = power_transform(z_t, gamma)
    torch.testing.assert_close(log_q, (z_t * gamma).log_softmax(1))
    torch.testing.assert_close(log_U.exp(), (z_t.softmax(1) ** gamma).sum(1))
    kl = F.kl_div(z_s.log_softmax(1), log_q, reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(losses.build("ttm", gamma=gamma, beta=3.0)(z_s, z_t), 3 * kl.mean())
    torch.testing.assert_close(losses.build("wttm", gamma=gamma, beta=3.0)(z_s, z_t), 3 * (log_U.exp() * kl).mean())


def test_ttm_at_gamma_one_is_kd_at_temperature_one():
    z_s, z_t, y = sample()
    kd = losses.build("kd", temperature=1.0, kd_weight=2.0, ce_weight=1.0)(z_s, z_t, y)
    for name in ("ttm", "wttm"):
        torch.testing.assert_close(losses.build(name, gamma=1.0, beta=2.0)(z_s, z_t, y), kd)


def test_ctkd_climbs_and_the_curriculum_scales_its_gradient():
    z_s, z_t, y = sample()
    loss = losses.build("ctkd").double()
    theta = loss.theta.detach().clone().requires_grad_()
    T = 1 + 20 * theta.sigmoid()
    kd = lambda T: 0.1 * F.cross_entropy(z_s, y) + 0.9 * T**2 * dway_kl(z_s, z_t, T).mean()
    slope = torch.autograd.grad(kd(T), theta)[0]
    for epoch, strength in ((None, -1.0), (1, -0.0244717), (5, -0.5), (10, -1.0), (240, -1.0)):
        if epoch:
            loss.at_epoch(epoch, 240)
        value = loss(z_s, z_t, y)
        torch.testing.assert_close(value, kd(T))
        torch.testing.assert_close(torch.autograd.grad(value, loss.theta)[0], strength * slope, rtol=1e-5, atol=1e-9)
    loss.at_epoch(1, 24)
    assert loss.strength == -1.0  # the same fraction of a training ten times shorter


def test_ctkd_is_trained_saved_and_resumed():
    z_s, z_t, y = sample(dtype=torch.float32)
    loss = losses.build("ctkd")
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    loss(z_s, z_t, y).backward()
    optimizer.step()
    assert loss.theta != 1 and list(loss.state_dict()) == ["theta"] and "theta" not in loss.hyperparameters
    other = losses.build("ctkd")
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(z_s, z_t, y), loss(z_s, z_t, y))


def test_ctkd_compiled_follows_the_curriculum():
    z_s, z_t, y = sample(dtype=torch.float32)
    loss = losses.build("ctkd")
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for epoch in range(1, 13):
        loss.at_epoch(epoch, 240)
        torch.testing.assert_close(*(torch.autograd.grad(f(z_s, z_t, y), loss.theta)[0] for f in (compiled, loss)))
    torch._dynamo.reset()


def test_mlkd_is_its_formulas():
    z_s, z_t, y = sample(32)
    expected = {
        "ce": 0.1 * (F.cross_entropy(z_s[:16], y[:16]) + F.cross_entropy(z_s[16:], y[:16])),
        "instance": 0,
        "batch": 0,
        "class": 0,
    }
    for T in (2, 3, 4, 5, 6):
        P_s, P_t = ((z[:16] / T).softmax(1) for z in (z_s, z_t))
        expected["instance"] += 0.9 * 2 * T**2 * dway_kl(z_s, z_t, T).mean()
        expected["batch"] += 0.9 * (P_t @ P_t.T - P_s @ P_s.T).norm() ** 2 / 16
        expected["class"] += 0.9 * (P_t.T @ P_t - P_s.T @ P_s).norm() ** 2 / 20
    torch.testing.assert_close(losses.build("mlkd").terms(z_s, z_t, y[:16]), expected)


def test_mlkd_of_equal_networks_is_nothing_and_needs_no_labels():
    z_s, z_t, _ = sample()
    assert losses.build("mlkd")(z_t, z_t).abs() < 1e-12
    assert set(losses.build("mlkd").terms(z_s, z_t)) == {"instance", "batch", "class"}


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("dist", {"temperature": 0}),
        ("dist", {"gamma": -1}),
        ("ttm", {"gamma": 0}),
        ("wttm", {"beta": -1}),
        ("ctkd", {"lowest": 0}),
        ("ctkd", {"span": 0}),
        ("ctkd", {"curriculum": -1}),
        ("mlkd", {"temperatures": "4"}),
        ("mlkd", {"class_weight": -1}),
    ],
)
def test_wrong_hyperparameters(name, arguments):
    ((argument, value),) = arguments.items()
    with pytest.raises(ValueError, match=argument):
        losses.build(name, **arguments)
