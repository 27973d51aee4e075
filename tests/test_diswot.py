"""DisWOT's training-free score: both distances against their definitions, and what the weights are drawn from."""

import math

import pytest
import torch
import torch.nn.functional as F

from ldrld import models
from ldrld.models.diswot import diswot_score, draw_weights, relation_distance, seen_untrained, semantic_distance


def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(12, 3, 16, 16, generator=g), torch.arange(12) % 10


@pytest.mark.parametrize("scale", [1.0, 1e-3, -2.0])
def test_semantic_distance_is_that_of_the_gram_matrices(scale):
    g = torch.Generator().manual_seed(0)
    g_t, g_s = torch.randn(2, 5, 7, generator=g, dtype=torch.float64)
    g_s = scale * g_s
    gram = lambda v: F.normalize(v[:, :, None] * v[:, None, :], dim=2)
    expected = (gram(g_t) - gram(g_s)).square().sum() / (7 * 5)
    torch.testing.assert_close(semantic_distance(g_t, g_s), expected)
    assert semantic_distance(g_t, scale * g_t).abs() < 1e-12


def test_relation_distance_is_sps_term():
    from ldrld.losses.features.sp import similarities

    g = torch.Generator().manual_seed(0)
    maps_t, maps_s = torch.randn(6, 4, 3, 3, generator=g), torch.randn(6, 9, 5, 5, generator=g)
    expected = (similarities(maps_t) - similarities(maps_s)).square().sum() / 36
    torch.testing.assert_close(relation_distance(maps_t, maps_s), expected)
    torch.testing.assert_close(relation_distance(maps_t, 3 * maps_t), torch.zeros(()))


def test_weights_are_drawn_anew_and_depend_on_the_seed_alone():
    a, b = models.build("resnet8", 10), models.build("resnet8", 10)
    with torch.no_grad():
        for p in b.parameters():
            p.add_(1)
    b(torch.randn(4, 3, 16, 16))  # moves the statistics
    for x, y in zip(draw_weights(a, 3).state_dict().values(), draw_weights(b, 3).state_dict().values()):
        torch.testing.assert_close(x, y)
    drawn = torch.cat([m.weight.flatten() for m in a.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))])
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02
    assert not a.head.bias.any() and not torch.equal(draw_weights(b, 4).head.weight, a.head.weight)


def test_the_score_of_a_network_with_itself_and_with_others():
    x, y = batch()
    teacher = seen_untrained(models.build("resnet14", 10), x, y, 0)
    assert diswot_score(teacher, seen_untrained(models.build("resnet14", 10), x, y, 0))["score"] > -1e-6
    other = diswot_score(teacher, seen_untrained(models.build("resnet8", 10), x, y, 1))
    assert other["score"] == -(other["relation"] + other["semantics"]) < -0.1
    wider = diswot_score(teacher, seen_untrained(models.build("wrn_16_2", 10), x, y, 1))
    assert wider["relation"] > 0 and math.isnan(wider["semantics"]) and math.isnan(wider["score"])


def test_widths_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"g_s must have the shape of g_t, \(10, 64\), got \(10, 128\)"):
        semantic_distance(torch.ones(10, 64), torch.ones(10, 128))
