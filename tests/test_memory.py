"""CRD's draws and banks, OFD's margins and cases, ReviewKD's levels: against literal formulas, and resumed from a
checkpoint."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldrld import losses, models
from ldrld.losses.features.crd import nce
from ldrld.losses.features.memory_bank import Memory, by_class, draw_others, generator_on
from ldrld.losses.features.ofd import margins_of, norms_before_activation, partial_square
from ldrld.losses.features.reviewkd import AttentionFusion, hierarchical_context
from ldrld.models import Features

LABELS = torch.tensor([3, 0, 0, 1, 3, 1, 0, 0, 2, 0, 3, 1])


def small_crd(seed=0, **options):
    torch.manual_seed(seed)
    loss = losses.build("crd", **{"negatives": 5, "width": 8} | options)
    loss.embed_s, loss.embed_t, loss.memory = nn.Linear(3, 8), nn.Linear(4, 8), Memory(LABELS, 8, loss.negatives)
    return loss


DRAWN = torch.tensor([2, 8, 11])


def crd_step(loss, index=DRAWN, seed=0):
    g = torch.Generator().manual_seed(seed)
    f_s, f_t = torch.randn(len(index), 3, generator=g).requires_grad_(), torch.randn(len(index), 4, generator=g)
    value = loss(torch.zeros(len(index), 2), None, None, Features((), (), f_s), Features((), (), f_t), index)
    value.backward()
    return value.item(), f_s, f_t


# ---- CRD ----------------------------------------------------------------------------------------------------------


def test_classes_are_stretches_of_the_order():
    order, start, count = by_class(LABELS)
    for c in range(4):
        assert set(order[start[c] : start[c] + count[c]].tolist()) == set((LABELS == c).nonzero().flatten().tolist())


@pytest.mark.parametrize("k", [1, 3, 7])
def test_others_are_of_other_classes_all_equally_likely_and_none_twice(k):
    g, own = torch.Generator().manual_seed(0), torch.arange(4).repeat(50)
    draws = torch.stack([draw_others(own, k, *by_class(LABELS), 7, g) for _ in range(100)])
    assert (LABELS[draws] != own[:, None]).all()
    ordered = draws.sort(-1).values
    assert (ordered[..., 1:] != ordered[..., :-1]).all()
    for c in range(4):
        share = draws[:, own == c].flatten().bincount(minlength=12) / 5000
        assert (share[LABELS != c] - k / (LABELS != c).sum()).abs().max() < 0.04


def test_a_class_without_images_does_no_harm():
    labels = torch.tensor([5, 5, 0, 0, 0, 5])
    draws = draw_others(torch.tensor([0, 5]), 3, *by_class(labels), 3, torch.Generator().manual_seed(0))
    assert set(draws[0].tolist()) == {0, 1, 5} and set(draws[1].tolist()) == {2, 3, 4}


def test_more_negatives_than_there_are():
    assert Memory(LABELS, 8, 16384).k == 7 and Memory(LABELS, 8, 2).k == 2
    with pytest.raises(ValueError, match="two or more classes"):
        Memory(torch.ones(4, dtype=torch.int64), 8, 2)


def test_crd_literally():
    loss, index = small_crd(), torch.tensor([2, 8, 11])
    loss.at_epoch(1, seed=4)
    memory = copy.deepcopy(loss.memory)
    value, f_s, f_t = crd_step(loss, index)
    g = torch.Generator().manual_seed(loss.generator.initial_seed())
    others = draw_others(LABELS[index], 5, memory.order, memory.start, memory.count, memory.fewest, g)
    u, v = (e / e.norm(dim=1, keepdim=True) for e in (loss.embed_s(f_s), loss.embed_t(f_t)))
    expected = 0.0
    for own, bank, log_Z in ((u, memory.bank_t, loss.memory.log_Z[0]), (v, memory.bank_s, loss.memory.log_Z[1])):
        scores = torch.stack(
            [(bank[torch.cat([i[None], row])] @ e / 0.07).exp() for i, row, e in zip(index, others, own)]
        )
        Z = scores.mean() * 12
        torch.testing.assert_close(log_Z.exp(), Z)
        p = (scores / Z) / (scores / Z + 5 / 12)
        expected = expected - 0.8 * (p[:, 0].log() + (1 - p[:, 1:]).log().sum(1)).mean()
    assert value == pytest.approx(expected.item(), rel=1e-4)
    rows = 0.5 * memory.bank_s[index] + 0.5 * u
    torch.testing.assert_close(loss.memory.bank_s[index], rows / rows.norm(dim=1, keepdim=True))
    untouched = torch.ones(12, dtype=torch.bool).index_fill(0, index, False)
    assert torch.equal(loss.memory.bank_t[untouched], memory.bank_t[untouched]) and not torch.equal(
        loss.memory.bank_t, memory.bank_t
    )


def test_Z_is_fixed_at_the_first_batch_also_after_a_checkpoint():
    loss = small_crd()
    assert loss.memory.log_Z.isinf().all()
    crd_step(loss)
    fixed = loss.memory.log_Z.clone()
    other = small_crd(seed=1)
    other.load_state_dict(loss.state_dict())
    for one in (loss, other):
        for seed in (1, 2):
            crd_step(one, seed=seed)
        assert torch.equal(one.memory.log_Z, fixed)


def test_draws_depend_on_seed_and_epoch_alone():
    def value(epoch, seed, before=0):
        loss = small_crd()
        crd_step(loss)
        for _ in range(before):
            loss.memory.cosines(torch.zeros(1, 8), torch.zeros(1, 8), torch.tensor([0]), loss.generator)
        loss.at_epoch(epoch, 10, seed)
        return crd_step(loss)[0]

    assert value(2, 0) == value(2, 0, before=3) and len({value(2, 0), value(3, 0), value(2, 1)}) == 3


def test_in_evaluation_nothing_is_remembered():
    loss = small_crd()
    crd_step(loss)
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    crd_step(loss.eval())
    assert all(torch.equal(before[k], v) for k, v in loss.state_dict().items())


class Replaced(Memory):
    """The banks as they were kept before: a new one at every step."""

    def remember(self, u, v, index, momentum):
        for name, new in (("bank_s", u), ("bank_t", v)):
            bank = getattr(self, name)
            rows = F.normalize(momentum * bank[index] + (1 - momentum) * new.detach(), dim=1)
            setattr(self, name, bank.index_copy(0, index, rows))


def trained_crd(kind, epochs=2):
    loss = small_crd()
    loss.memory.__class__ = kind
    optimizer, values = torch.optim.SGD(loss.parameters(), 0.1, 0.9), []
    for epoch in range(1, epochs + 1):
        loss.at_epoch(epoch, epochs, seed=3)
        for step, index in enumerate(torch.arange(12).split(5)):  # the last batch holds two images
            optimizer.zero_grad()
            values.append(crd_step(loss, index, seed=10 * epoch + step)[0])
            optimizer.step()
    return values, loss


def test_banks_in_place_give_the_same_bits():
    values, loss = trained_crd(Memory)
    expected, other = trained_crd(Replaced)
    assert values == expected
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in loss.state_dict().items())


def test_nothing_that_a_step_reads_moves():
    loss = small_crd()
    generator, before = loss.generator, {name: b.data_ptr() for name, b in loss.named_buffers()}
    for epoch in (1, 2):
        loss.at_epoch(epoch, 10)
        for seed in range(2):
            crd_step(loss, seed=seed)
    assert loss.generator is generator and before == {name: b.data_ptr() for name, b in loss.named_buffers()}


def test_two_steps_forward_before_they_go_back():
    """As with gradient accumulation: the second step has written to the banks when the first goes back."""
    sums = []
    for together in (True, False):
        loss, values = small_crd(), []
        for seed in (1, 2):
            g = torch.Generator().manual_seed(seed)
            f_s, f_t = (
                Features((), (), torch.randn(3, 3, generator=g)),
                Features((), (), torch.randn(3, 4, generator=g)),
            )
            values.append(loss(torch.zeros(3, 2), None, None, f_s, f_t, DRAWN))
            if not together:
                values[-1].backward()
        if together:
            sum(values).backward()
        sums.append([p.grad for p in loss.parameters()])
    for a, b in zip(*sums):
        torch.testing.assert_close(a, b)


def test_gradients_are_of_the_banks_before_the_visit():
    loss = small_crd().double()
    g = torch.Generator().manual_seed(0)
    f_s, f_t = torch.randn(3, 3, generator=g).double().requires_grad_(), torch.randn(3, 4, generator=g).double()
    loss.memory.log_Z.copy_(torch.tensor([2.0, 3.0]))

    def value(f):
        twin = copy.deepcopy(loss)  # whose banks are still unvisited
        return twin(torch.zeros(3, 2), None, None, Features((), (), f), Features((), (), f_t), DRAWN)

    assert torch.autograd.gradcheck(value, f_s, atol=1e-3, rtol=1e-2, eps=1e-3)  # scores are float32


def test_log_Z_is_looked_at_once_an_epoch():
    loss = small_crd()
    loss.at_epoch(1, 10)
    assert not loss.memory.begun
    crd_step(loss)
    first = loss.memory.log_Z.clone()
    crd_step(loss, seed=5)
    assert torch.equal(loss.memory.log_Z, first) and not loss.memory.begun  # a recording of this epoch holds
    loss.at_epoch(2, 10)
    assert loss.memory.begun
    resumed = small_crd(seed=1)
    resumed.load_state_dict(loss.state_dict())
    resumed.at_epoch(3, 10)
    assert resumed.memory.begun


def test_an_unprepared_loss_may_be_told_the_epoch_and_a_used_one_copied():
    losses.build("crd").at_epoch(3, 240, seed=1)
    loss = small_crd()
    loss.at_epoch(4, 240)
    crd_step(loss)
    twin = copy.deepcopy(loss)
    assert crd_step(loss, seed=2)[0] == crd_step(twin, seed=2)[0]


def test_where_draws_are_made():
    loss = small_crd()
    loss.at_epoch(2, 240, seed=1)
    assert loss.generator.initial_seed() == 2**40 + 2 * 1_000_003 + 2
    for device in ("cpu", "meta"):
        assert generator_on(loss.generator, torch.device(device)) is loss.generator


@pytest.mark.parametrize("index", [None, torch.tensor([1, 2])])
def test_crd_needs_the_numbers_of_the_images(index):
    f = [Features((), (), torch.randn(3, d)) for d in (3, 4)]
    with pytest.raises(ValueError, match="index must hold the training-set index of each of the 3 images"):
        small_crd()(torch.zeros(3, 2), None, None, *f, index)


def test_crd_needs_data_and_a_momentum_up_to_one():
    pair, x = (models.build("resnet8"), models.build("resnet14")), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="data must be given: .* data.train_labels"):
        losses.build("crd").prepare(*pair, x)
    with pytest.raises(ValueError, match="momentum must be at most 1, got 1.5"):
        losses.build("crd", momentum=1.5)
    loss = losses.build("crd").prepare(*pair, x, SimpleNamespace(train_labels=LABELS))
    assert {"memory.bank_s", "memory.bank_t", "memory.log_Z"} <= set(loss.state_dict())
    assert not any("memory" in name for name, _ in loss.named_parameters())
    copy.deepcopy(loss)


def test_nce_at_the_extremes():
    scores = torch.tensor([[1e4, -1e4, 1e4], [-1e4, 0.0, 1e4]], requires_grad=True)
    value = nce(scores, torch.tensor(3.0), 50_000)
    assert value.isfinite() and torch.autograd.grad(value, scores)[0].isfinite().all()


# ---- OFD ----------------------------------------------------------------------------------------------------------


def test_the_four_cases():
    m = -0.5
    for a in torch.linspace(-2, 2, 41).tolist():
        for b in (-1.0, -0.5, -0.2, 0.0, 0.3):
            expected = (
                (a - b) ** 2
                if b > 0
                else (a - b) ** 2
                if m < b and a > b
                else (a - m) ** 2
                if b <= m and a > m
                else 0.0
            )
            assert partial_square(*torch.tensor([[a], [b], [m]], dtype=torch.float64)).item() == pytest.approx(expected)


def test_margins_are_means_of_truncated_normals():
    stats = pytest.importorskip("scipy.stats")
    norm = nn.BatchNorm2d(6)
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5, 0.3, 0.0, 1.0])
    norm.bias.data = torch.tensor([0.0, 1.0, -3.0, 4.0, 0.0, -40.0])
    margins = margins_of(norm)
    for k in (0, 1, 2):
        s, mu = norm.weight[k].abs().item(), norm.bias[k].item()
        assert margins[k].item() == pytest.approx(stats.truncnorm.mean(-math.inf, -mu / s, mu, s), rel=1e-5)
    torch.testing.assert_close(margins[3:], torch.tensor([-0.9, 0.0, -40.0]))
    assert not margins.requires_grad


@pytest.mark.parametrize("name", models.available())
def test_norms_before_activations_fit_or_are_refused(name):
    with torch.device("meta"):
        teacher = models.build(name)
    if name.startswith(("MobileNetV2", "Shuffle")):
        with pytest.raises(ValueError, match="no known batch norm right before"):
            norms_before_activation(teacher)
        return
    with torch.device("meta"):
        preact = teacher.eval()(torch.empty(1, 3, 32, 32), features=True)[1].preact
    assert [norm.num_features for norm in norms_before_activation(teacher)] == [m.shape[1] for m in preact]


def test_a_positive_teacher_is_plain_squared_distance():
    a, b = torch.randn(2, 3, 4, 2, 2), torch.rand(2, 3, 4, 2, 2)
    torch.testing.assert_close(partial_square(a, b, torch.full((4, 1, 1), -1.0)), (a - b).square())


def test_the_deepest_stage_counts_most():
    x = torch.randn(4, 3, 32, 32)
    student, teacher = models.build("resnet8"), models.build("resnet14").eval()
    loss = losses.build("ofd").prepare(student, teacher, x)
    (z_s, f_s), (z_t, f_t) = student(x, features=True), teacher(x, features=True)
    margins = loss.margins.split([16, 32, 64])
    stages = [
        partial_square(c(s), t, m[:, None, None]).sum((1, 2, 3)).mean()
        for c, s, t, m in zip(loss.connectors, f_s.preact, f_t.preact, margins)
    ]
    torch.testing.assert_close(
        loss.terms(z_s, z_t, None, f_s, f_t)["partial"], 1e-3 * (stages[0] / 4 + stages[1] / 2 + stages[2])
    )


# ---- ReviewKD -----------------------------------------------------------------------------------------------------


def test_hierarchical_context_literally():
    u, v = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pooled = [F.mse_loss(F.avg_pool2d(u, 8 // p), F.avg_pool2d(v, 8 // p)) for p in (4, 2, 1)]
    torch.testing.assert_close(
        hierarchical_context(u, v), (F.mse_loss(u, v) + pooled[0] / 2 + pooled[1] / 4 + pooled[2] / 8) / 1.875
    )
    u, v = u[..., :2, :2], v[..., :2, :2]
    torch.testing.assert_close(
        hierarchical_context(u, v), (F.mse_loss(u, v) + F.mse_loss(u.mean((2, 3)), v.mean((2, 3))) / 2) / 1.5
    )
    assert hierarchical_context(u[..., :1, :1], v[..., :1, :1]) == F.mse_loss(u[..., :1, :1], v[..., :1, :1])


def test_fusion_literally():
    torch.manual_seed(0)
    fusion, x, deeper = AttentionFusion(3, 5, 7).eval(), torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)
    out, R = fusion(x, deeper, (8, 8))
    narrow, large = fusion.narrow(x), deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
    a = fusion.attention[0](torch.cat([narrow, large], 1)).sigmoid()
    expected = (narrow * a[:, :1] + large * a[:, 1:]).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(R, expected)
    torch.testing.assert_close(out, fusion.widen(expected))


def test_review_levels_and_warmup():
    x = torch.randn(2, 3, 32, 32)
    student, teacher = models.build("MobileNetV2"), models.build("vgg8").eval()
    loss = losses.build("reviewkd").prepare(student, teacher, x)
    # widths as in the official lists for this pair: 12, 16, 48, 160, 1280 in, 128, 256, 512, 512, 512 out, 512 inside
    assert [f.narrow[0].in_channels for f in loss.fusions] == [1280, 160, 48, 16, 12]
    assert [f.widen[0].out_channels for f in loss.fusions] == [512, 512, 512, 256, 128]
    assert {f.narrow[0].out_channels for f in loss.fusions} == {512} and loss.fusions[0].attention is None
    seen = [net(x, features=True) for net in (student, teacher)]
    value = lambda: loss.terms(seen[0][0], None, None, seen[0][1], seen[1][1])["review"].item()
    full = value()
    for epoch, share in ((1, 1 / 20), (10, 0.5), (20, 1.0), (200, 1.0)):
        loss.at_epoch(epoch, 240)
        assert value() == pytest.approx(share * full, rel=1e-4)
    losses.build("reviewkd", student_preact=True).prepare(student, teacher, x)
    with pytest.raises(ValueError, match="warmup must be a fraction of the training, at most 1, got 20"):
        losses.build("reviewkd", warmup=20)


def test_review_of_a_single_image():
    """The last batch of an epoch may hold one: its pooled vector is one value a channel, which has no variance."""
    x = torch.randn(4, 3, 32, 32)
    student, teacher = models.build("resnet8"), models.build("resnet14").eval()
    loss = losses.build("reviewkd").prepare(student, teacher, x)
    for _ in range(3):
        loss.fusions[0](student(x, features=True)[1].pooled[..., None, None], None, (1, 1))
    state = {name: value.clone() for name, value in loss.fusions[0].state_dict().items()}
    seen = [net(x[:1], features=True) for net in (student.eval(), teacher)]
    value = loss.terms(seen[0][0], None, None, seen[0][1], seen[1][1])["review"]
    grads = torch.autograd.grad(value, list(loss.parameters()))
    assert value.isfinite() and all(g.isfinite().all() for g in grads)
    assert all(torch.equal(value, state[name]) for name, value in loss.fusions[0].state_dict().items())
    alone = loss.pick(seen[0][1], seen[1][1])[0][0]
    torch.testing.assert_close(alone, loss.eval().pick(seen[0][1], seen[1][1])[0][0])
