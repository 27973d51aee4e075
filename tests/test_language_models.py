"""Distilling language models: one loss by every way of computing it, heads that differ, and stored top logits."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from ldrld import LDRLD, adw_weights, losses
from ldrld.bench.timing import peak_bytes
from ldrld.losses.ldrld import linear
from ldrld.losses.ldrld.language_heads import final_logits, shared_vocabulary
from ldrld.losses.ldrld.linear import linear_loss
from ldrld.losses.ldrld.sharded import sharded_loss
from ldrld.losses.ldrld.top_k_teacher import bytes_per_token, keep_top_k, missed, top_k_loss, with_tail

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
INF, NAN = float("inf"), float("nan")
CLASSES = 130


# ---- one loss, one formula --------------------------------------------------------------------------------------


SETTINGS = {"temperature": 2.5, "ce_weight": 0.3, "alpha": 4.0, "beta": 1.5, "depth": 5}
HEADS = {"plain logits": (1.0, None), "scaled and capped": (0.5, 6.0)}
WAYS = ("plain", "analytic", "chunks, plain", "chunks, analytic", "slices", "kernel")
# relative differences of the value, and of the gradient's norm; bfloat16 rounds a gradient to 2^-9 of each number
DIGITS = {F64: (1e-13, 1e-13), F32: (2e-6, 2e-6), BF16: (2e-6, 2**-8)}


def problem(dtype):
    """Both networks' last layers' outputs, without ties in any type, and the other arguments."""
    g = torch.Generator().manual_seed(1)
    z_s, z_t = (torch.randn(3, 6, CLASSES, generator=g).argsort().to(dtype) / 16 for _ in range(2))
    target = torch.randint(CLASSES, (3, 6), generator=g)
    target[1, 4:] = -100
    return z_s, z_t, {"target": target, "mask": torch.arange(18).view(3, 6) % 5 != 1, "normalizer": 29}


def by_hand(z_s, z_t, head, target, mask, normalizer):
    """Value and gradient from the definition, one row and one pair at a time, with the library's pair weights only."""
    z = z_s.double().requires_grad_()
    scale, cap = head
    student, teacher = (x * scale if cap is None else cap * torch.tanh(x * scale / cap) for x in (z, z_t.double()))
    T, d = SETTINGS["temperature"], SETTINGS["depth"]
    omega, pairs = adw_weights(d, dtype=F64), list(itertools.combinations(range(d), 2))
    total = torch.zeros((), dtype=F64)

    def kl(row_t, row_s, classes):
        log_t, log_s = ((row[classes] / T).log_softmax(-1) for row in (row_t, row_s))
        return (log_t.exp() * (log_t - log_s)).sum()

    counts = mask & (target != -100)
    for s, t, y in zip(student[counts], teacher[counts], target[counts]):
        top = s.topk(d).indices
        rest = torch.ones(CLASSES, dtype=torch.bool).scatter(0, top, False)
        local = kl(t, s, top) + sum(omega[i, j] * kl(t, s, top[[i, j]]) for i, j in pairs)
        divergence = SETTINGS["alpha"] * local / (len(pairs) + 1) + SETTINGS["beta"] * kl(t, s, rest)
        total = total + SETTINGS["ce_weight"] * F.cross_entropy(s, y) + T**2 * divergence
    value = total / normalizer
    return value.detach(), torch.autograd.grad(value, z)[0]


def through_logits(backend, dtype, head):
    z_s, z_t, given = problem(dtype)
    loss = LDRLD(**SETTINGS)
    loss.backend = backend
    z = z_s.requires_grad_()
    value, _ = loss.value_and_terms(final_logits(z, *head), final_logits(z_t, *head), **given)
    return value.detach(), torch.autograd.grad(value, z)[0]


def in_chunks(backend, dtype, head):
    """With the identity as both heads, so that the gradient of the hidden states is that of the logits."""
    z_s, z_t, given = problem(dtype)
    loss, identity = LDRLD(**SETTINGS), torch.eye(CLASSES, dtype=dtype)
    loss.backend, (scale, cap) = backend, head
    more = {"student_scale": scale, "teacher_scale": scale, "student_cap": cap, "teacher_cap": cap}
    z = z_s.requires_grad_()
    value, _ = linear_loss(loss, z, identity, z_t, identity, at_once=4 * CLASSES, **given, **more)
    return value.detach(), torch.autograd.grad(value, z)[0]


def slices_of(rank, folder):
    """A process with one of two slices, of 50 and of 80 classes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mine, found = (slice(0, 50), slice(50, CLASSES))[rank], {}
    for dtype, (name, head) in itertools.product((F64, BF16), HEADS.items()):
        z_s, z_t, given = problem(dtype)
        z = z_s[..., mine].clone().requires_grad_()
        student, teacher = final_logits(z, *head), final_logits(z_t[..., mine], *head)
        value, _ = sharded_loss(LDRLD(**SETTINGS), student, teacher, mine.start, **given)
        value.backward()
        found[dtype, name] = value.detach(), z.grad
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def in_slices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    mp.start_processes(slices_of, (str(folder),), nprocs=2, start_method="spawn")
    first, second = (torch.load(folder / str(rank)) for rank in range(2))
    return {case: (first[case][0], torch.cat([first[case][1], second[case][1]], -1)) for case in first}


@pytest.fixture(scope="module")
def by_kernel(tmp_path_factory):
    """In a process of its own, since Triton decides on its first import whether it interprets."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    file = tmp_path_factory.mktemp("kernel") / "found"
    code = f"""if True:
        import torch
        from test_language_models import BF16, F32, HEADS, through_logits
        cases = [(dtype, name) for dtype in (F32, BF16) for name in HEADS]
        torch.save({{case: through_logits("triton", case[0], HEADS[case[1]]) for case in cases}}, {str(file)!r})"""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return torch.load(file)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_loss_of_its_definition(way, dtype, name, request):
    """With a temperature, a mask, ignored tokens, a normaliser, a weight of the cross-entropy and a capped head."""
    head = HEADS[name]
    if way == "kernel" and dtype == F64 or way == "slices" and dtype == F32:
        pytest.skip("the kernel computes in float32" if way == "kernel" else "as in bfloat16: computed in float32")
    if way == "slices":
        value, gradient = request.getfixturevalue("in_slices")[dtype, name]
    elif way == "kernel":
        value, gradient = request.getfixturevalue("by_kernel")[dtype, name]
    else:
        compute = in_chunks if way.startswith("chunks") else through_logits
        value, gradient = compute(way.removeprefix("chunks, "), dtype, head)
    z_s, z_t, given = problem(dtype)
    wanted, right = by_hand(z_s, z_t, head, **given)
    of_value, of_gradient = DIGITS[dtype]
    if way == "kernel" and dtype == BF16:
        of_gradient = 2**-7  # the interpreter truncates
    assert gradient.dtype == dtype
    assert abs(value.double() / wanted - 1) < of_value
    assert (gradient.double() - right).norm() < of_gradient * right.norm()
    counts = given["mask"] & (given["target"] != -100)
    assert not gradient[~counts].any() and gradient[counts].any(-1).all()


# ---- heads that differ ------------------------------------------------------------------------------------------


def hidden(dtype=F64, vocabulary=40, teachers=40):
    """Hidden states, weights and biases of student and teacher, and targets."""
    g = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 8), (vocabulary, 8), (vocabulary,), (3, 4, 6), (teachers, 6), (teachers,))
    made = [torch.randn(*shape, generator=g, dtype=F64).to(dtype) for shape in shapes]
    return *made, torch.randint(min(vocabulary, teachers), (3, 4), generator=g)


@pytest.mark.parametrize("at_once", [1, 100, 10**6])
@pytest.mark.parametrize("name", ["ldrld", "kd", "ce", "dkd", "ctkd"])
def test_scale_and_cap_as_autograd_on_stored_logits(name, at_once):
    h_s, W_s, b_s, h_t, W_t, b_t, target = hidden()
    loss, leaves = losses.build(name).double(), [x.requires_grad_() for x in (h_s, W_s, b_s)]
    z_s, z_t = F.linear(h_s, W_s, b_s), F.linear(h_t, W_t, b_t)
    wanted = loss(3.0 * torch.tanh(0.7 * z_s / 3.0), 2.0 * torch.tanh(1.5 * z_t / 2.0), target)
    value, _ = linear_loss(
        loss, h_s, W_s, h_t, W_t, target, student_bias=b_s, teacher_bias=b_t, at_once=at_once,
        student_scale=0.7, student_cap=3.0, teacher_scale=1.5, teacher_cap=2.0,
    )  # fmt: skip
    torch.testing.assert_close(value, wanted)
    leaves += loss.parameters()
    for found, right in zip(torch.autograd.grad(3 * value, leaves), torch.autograd.grad(3 * wanted, leaves)):
        torch.testing.assert_close(found, right)


def test_a_masked_class_stays_masked_under_a_cap():
    h_s, W_s, b_s, h_t, W_t, b_t, target = hidden()
    b_s[30:], b_t[30:] = -INF, -INF
    given = {"student_bias": b_s, "teacher_bias": b_t, "student_cap": 5.0, "teacher_cap": 5.0}
    value, _ = linear_loss(LDRLD(), h_s, W_s.requires_grad_(), h_t, W_t, target.clamp(max=29), **given)
    cut = given | {"student_bias": b_s[:30], "teacher_bias": b_t[:30]}
    wanted, _ = linear_loss(LDRLD(), h_s, W_s[:30], h_t, W_t[:30], target.clamp(max=29), **cut)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(v, W_s)[0] for v in (value, wanted)))


def test_the_slope_of_a_cap_in_bfloat16():
    """1 - tanh² close to the cap, from logits of eight bits: as float32 has it, up to rounding once."""
    z = torch.linspace(20, 100, 50).to(BF16).requires_grad_()
    slope = torch.autograd.grad(final_logits(z, cap=30.0).sum(), z)[0].double()
    exact = 1 - (z.detach().double() / 30).tanh().square()
    assert ((slope / exact - 1).abs() < 2**-8).all()


@pytest.mark.parametrize("name, value", [("scale", 0.0), ("scale", NAN), ("cap", 0.0), ("cap", -30.0), ("cap", "30")])
def test_scales_and_caps_are_above_zero(name, value):
    h_s, W_s, _, h_t, W_t, _, target = hidden()
    for who in ("student", "teacher"):
        with pytest.raises(ValueError, match=f"{name} must be a finite number above 0"):
            linear_loss(LDRLD(), h_s, W_s, h_t, W_t, target, **{f"{who}_{name}": value})


@pytest.mark.parametrize("student, teacher", [(40, 48), (48, 40), (40, 40)])
def test_vocabularies_are_cut_by_name_only(student, teacher):
    h_s, W_s, b_s, h_t, W_t, b_t, target = hidden(vocabulary=student, teachers=teacher)
    given = {"target": target.clamp(max=35), "student_bias": b_s.requires_grad_(), "teacher_bias": b_t, "at_once": 80}
    if student != teacher:
        with pytest.raises(ValueError, match=f"got {student} and {teacher} classes.*pass vocabulary=40"):
            linear_loss(LDRLD(), h_s, W_s, h_t, W_t, **given)
    leaves = [x.requires_grad_() for x in (h_s, W_s, b_s)]
    value, _ = linear_loss(LDRLD(), h_s, W_s, h_t, W_t, vocabulary=36, **given)
    z_t = F.linear(h_t, W_t, b_t)
    wanted = LDRLD()(F.linear(h_s, W_s, b_s)[..., :36], z_t[..., :36], given["target"])
    torch.testing.assert_close(value, wanted)
    found = torch.autograd.grad(value, leaves)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, leaves))
    assert not found[1][36:].any() and not found[2][36:].any()
    given.pop("teacher_bias")
    torch.testing.assert_close(linear_loss(LDRLD(), h_s, W_s, z_t, None, vocabulary=36, **given)[0], wanted)


@pytest.mark.parametrize("vocabulary", [49, 1, 36.0, True])
def test_a_vocabulary_that_does_not_fit(vocabulary):
    h_s, W_s, _, h_t, W_t, *_ = hidden(vocabulary=48, teachers=48)
    with pytest.raises(ValueError, match="vocabulary must be"):
        linear_loss(LDRLD(), h_s, W_s, h_t, W_t, vocabulary=vocabulary)


def test_a_target_beyond_the_shared_vocabulary():
    h_s, W_s, _, h_t, W_t, *_ = hidden(vocabulary=48, teachers=40)
    with pytest.raises(ValueError, match="target must hold classes from 0 to 39"):
        linear_loss(LDRLD(), h_s, W_s, h_t, W_t, torch.full((3, 4), 44), vocabulary=40)


def test_given_logits_are_final():
    h_s, W_s, *_ = hidden()
    for more in ({"teacher_scale": 2.0}, {"teacher_cap": 30.0}, {"teacher_bias": torch.zeros(40)}):
        with pytest.raises(ValueError, match="teacher_hidden holds logits, since these are final"):
            linear_loss(LDRLD(), h_s, W_s, torch.zeros(3, 4, 40), None, **more)


def test_shared_vocabulary():
    ours = {token: c for c, token in enumerate("abcdef")}
    assert shared_vocabulary(ours, ours) == shared_vocabulary(ours, ours | {"g": 6, "h": 9}) == 6
    assert shared_vocabulary(ours | {"g": 6}, ours) == 6
    holes = {"a": 0, "c": 2}
    assert shared_vocabulary(holes, holes) == 3
    with pytest.raises(ValueError, match="class 1 is 'b' in the student's vocabulary and None in the teacher's"):
        shared_vocabulary(ours, holes)
    with pytest.raises(ValueError, match="class 2 is 'c' in the student's vocabulary and 'd' in the teacher's"):
        shared_vocabulary(ours, {"a": 0, "b": 1, "d": 2, "c": 3})
    with pytest.raises(ValueError, match="must hold tokens, got 0 and 6"):
        shared_vocabulary({}, ours)


# ---- the gradient in blocks, and memory -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, bound", [(F64, 1e-12), (F32, 1e-5), (BF16, 2**-7), (torch.float16, 2**-10)], ids=str)
def test_blocks_of_the_gradient(dtype, bound, monkeypatch):
    """As many as one pleases; 7 rows at a time of 40, so that the last is smaller."""
    h_s, W_s, b_s, h_t, W_t, b_t, target = hidden(dtype)
    leaves = [x.requires_grad_() for x in (h_s, W_s, b_s)]
    given = {"student_bias": b_s, "teacher_bias": b_t, "at_once": 100}
    whole = torch.autograd.grad(linear_loss(LDRLD(), h_s, W_s, h_t, W_t, target, **given)[0], leaves)
    monkeypatch.setattr(linear, "BLOCK", 7 * 8)
    value, _ = linear_loss(LDRLD(), h_s, W_s, h_t, W_t, target, **given)
    for _ in range(2):
        for found, right in zip(torch.autograd.grad(value, leaves, retain_graph=True), whole):
            assert found.dtype == dtype and found.shape == right.shape
            assert (found.double() - right.double()).norm() <= bound * right.double().norm()


@pytest.mark.parametrize("head_trains", [True, False])
def test_memory_is_that_of_the_formula(head_trains):
    """Beyond inputs and returned gradients, of bfloat16 inputs: 2·V·H bytes for a head that is trained, since its sum
    is in float32, 6 bytes for each number of a block of its gradient, 6 for each logit at once, and about 9 MB. The
    number of tokens does not matter."""
    width, classes, at_once = 256, 20_000, 2**21
    g = torch.Generator().manual_seed(0)
    for rows in (300, 900):
        h_s, h_t = (torch.randn(rows, width, generator=g).to(BF16) for _ in range(2))
        W_s, W_t = (torch.randn(classes, width, generator=g).to(BF16) / 16 for _ in range(2))
        h_s.requires_grad_(), W_s.requires_grad_(head_trains)
        leaves = [x for x in (h_s, W_s) if x.requires_grad]
        value = lambda h_s=h_s, h_t=h_t, W_s=W_s, W_t=W_t: linear_loss(LDRLD(), h_s, W_s, h_t, W_t, at_once=at_once)[0]
        peak = peak_bytes(lambda value=value, leaves=leaves: torch.autograd.grad(value(), leaves))
        beyond = peak - sum(2 * x.numel() for x in leaves)
        of_head = 8 * W_s.numel() if head_trains else 0  # its gradient is one block
        assert beyond < 6 * at_once + 9.5e6 + of_head


# ---- a teacher stored as its top logits -------------------------------------------------------------------------


def stored_problem():
    g = torch.Generator().manual_seed(0)
    z_s = torch.randn(3, 4, 60, generator=g, dtype=F64) * 2
    z_t = 0.7 * z_s + torch.randn(3, 4, 60, generator=g, dtype=F64)
    target = torch.randint(60, (3, 4), generator=g)
    target[0, 2:] = -100
    given = {"target": target, "mask": torch.arange(12).view(3, 4) % 4 != 1, "normalizer": 20}
    return z_s.requires_grad_(), z_t, given


STORED = [LDRLD(rank_by="teacher"), LDRLD(), LDRLD(depth=60, beta=0.0), losses.build("kd", temperature=2.0)]


@pytest.mark.filterwarnings("ignore:depth=")
@pytest.mark.parametrize("loss", STORED, ids=["teacher", "student", "all selected", "kd"])
def test_all_classes_stored_is_exact(loss):
    z_s, z_t, given = stored_problem()
    value, terms = top_k_loss(loss, z_s, keep_top_k(z_t, 60, loss.temperature, F64), **given)
    wanted, right = loss.value_and_terms(z_s, z_t, **given)
    torch.testing.assert_close(value, wanted)
    for name in terms:
        torch.testing.assert_close(terms[name], right[name])
    torch.testing.assert_close(*(torch.autograd.grad(v, z_s)[0] for v in (value, wanted)))


@pytest.mark.parametrize("k", [7, 8, 20, 59])
def test_the_teachers_ranking_is_exact_but_for_the_tail(k):
    """What RNTK lacks is the divergence within the tail, times the tail's probability among the classes that remain."""
    z_s, z_t, given = stored_problem()
    loss = LDRLD(rank_by="teacher")
    _, terms = top_k_loss(loss, z_s, keep_top_k(z_t, k, 4.0, F64), **given)
    _, full = loss.value_and_terms(z_s, z_t, **given)
    for name in ("ce", "pairs", "llki"):
        torch.testing.assert_close(terms[name], full[name])
    order = z_t.argsort(-1, descending=True)
    s, t = ((z / 4).gather(-1, order) for z in (z_s.detach(), z_t))
    p_tail = t[..., 7:].softmax(-1)[..., k - 7 :].sum(-1)
    log_s, log_t = (u[..., k:].log_softmax(-1) for u in (s, t))
    counts = given["mask"] & (given["target"] != -100)
    lacking = (p_tail * (log_t.exp() * (log_t - log_s)).sum(-1))[counts].sum() / 20
    torch.testing.assert_close(full["rntk"] - terms["rntk"], loss.factors["rntk"] * lacking)
    assert terms["rntk"] <= full["rntk"]


def test_kd_is_a_bound_too_and_grows_with_k():
    z_s, z_t, given = stored_problem()
    loss = losses.build("kd", temperature=2.0)
    values = [top_k_loss(loss, z_s, keep_top_k(z_t, k, 2.0, F64), **given)[0] for k in (2, 4, 8, 16, 32, 60)]
    assert values == sorted(values)
    torch.testing.assert_close(values[-1], loss(z_s, z_t, **given))


def test_stored_in_bfloat16():
    """The tail's probability is as exact as before: the rounded logits and the log-sum-exp belong together."""
    z_s, z_t, _ = stored_problem()
    z_t = 3 * z_t  # tails of 1 % and less, beside logits whose rounding changes their probability by as much
    rough, exact = (keep_top_k(z_t, 12, 1.0, dtype).flat() for dtype in (BF16, F64))
    (_, t_rough), (_, t_exact) = (with_tail(z_s.detach().reshape(-1, 60), x) for x in (rough, exact))
    tails = (t_exact[:, -1] > t_exact.amax(-1) - 14).nonzero()[:, 0]
    assert len(tails) > 6 and (t_rough[tails, -1] - t_exact[tails, -1]).abs().max() < 0.05
    assert rough.indices.equal(exact.indices) and rough.logits.dtype == BF16


def test_misses_are_raised_or_avoided():
    z_s, z_t, given = stored_problem()
    stored = keep_top_k(z_t, 9, 4.0, F64)
    lacking = missed(z_s.detach().reshape(-1, 60), stored.flat(), 7).view(3, 4)
    top = z_s.topk(7).indices
    assert lacking.equal(~(top[..., None] == stored.indices[..., None, :]).any(-1).all(-1))
    counts = given["mask"] & (given["target"] != -100)
    assert lacking[counts].any()
    with pytest.raises(ValueError, match=f"7 best classes, which {int(lacking[counts].sum())} of 12 rows lack"):
        top_k_loss(LDRLD(), z_s, stored, **given)
    value, _ = top_k_loss(LDRLD(), z_s, stored, **given, misses="stored")
    assert value.isfinite()
    given["mask"] = given["mask"] & ~lacking  # then nothing is missed, and pairs and LLKI are exact
    if given["mask"].any():
        _, terms = top_k_loss(LDRLD(), z_s, stored, **given)
        _, full = LDRLD().value_and_terms(z_s, z_t, **given)
        torch.testing.assert_close([terms["pairs"], terms["llki"]], [full["pairs"], full["llki"]])


@pytest.mark.parametrize("misses", ["raise", "stored"])
@pytest.mark.parametrize("loss", STORED[:2] + STORED[3:], ids=["teacher", "student", "kd"])
def test_rows_that_do_not_count_may_hold_anything(loss, misses):
    z_s, z_t, given = stored_problem()
    counts = given["mask"] & (given["target"] != -100)
    stored = keep_top_k(z_t, 60, loss.temperature, F64)
    wanted, _ = top_k_loss(loss, z_s, stored, **given, misses=misses)
    broken = stored._replace(
        indices=stored.indices.where(counts[..., None], 10**6),
        logits=stored.logits.where(counts[..., None], NAN),
        log_sum_exp=stored.log_sum_exp.where(counts, INF),
    )
    z = z_s.detach().where(counts[..., None], NAN).requires_grad_()
    value, _ = top_k_loss(loss, z, broken, **given, misses=misses)
    torch.testing.assert_close(value, wanted)
    gradient = torch.autograd.grad(value, z)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, z_s)[0])
    nothing, _ = top_k_loss(loss, z, broken, mask=counts & False, misses=misses)
    assert nothing == 0


@pytest.mark.parametrize("loss", STORED[:2] + STORED[3:], ids=["teacher", "student", "kd"])
def test_linear_loss_from_stored_logits(loss):
    h_s, W_s, b_s, h_t, W_t, b_t, target = hidden()
    target[0, 1:] = -100
    stored = keep_top_k(F.linear(h_t, W_t, b_t), 12, loss.temperature)
    given = {"student_bias": b_s, "at_once": 80, "misses": "stored"}
    value, terms = linear_loss(loss, h_s, W_s.requires_grad_(), stored, None, target, student_cap=4.0, **given)
    wanted, right = top_k_loss(loss, final_logits(F.linear(h_s, W_s, b_s), cap=4.0), stored, target, misses="stored")
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(terms, right)
    torch.testing.assert_close(*(torch.autograd.grad(v, W_s)[0] for v in (value, wanted)))
    nothing, _ = linear_loss(loss, h_s, W_s, stored, None, torch.full_like(target, -100), **given)
    assert nothing == 0


def test_what_a_record_does_not_say_is_raised():
    z_s, z_t, _ = stored_problem()
    stored, loss = keep_top_k(z_t, 12, 4.0), LDRLD(rank_by="teacher")
    cases = {
        "must be KD, or LDRLD ranked": (losses.build("dkd"), stored),
        "must be KD, or LDRLD ranked by": (LDRLD(anchor=True), stored),
        "must have the temperature for which the teacher was stored, 4, got 2": (LDRLD(temperature=2.0), stored),
        "must hold at least depth=13 classes": (LDRLD(depth=13), stored),
        "must have the student's 60 classes, got 61": (loss, stored._replace(classes=61)),
        "must have rows": (loss, stored.at(slice(2))),
        "must have logits and log_sum_exp": (loss, stored._replace(log_sum_exp=torch.zeros(3))),
        "from the largest to the smallest": (loss, stored._replace(logits=stored.logits.flip(-1))),
        "the stored ones alone exceed it": (loss, stored._replace(log_sum_exp=stored.log_sum_exp - 4)),
    }
    for message, (of, record) in cases.items():
        with pytest.raises(ValueError, match=message):
            top_k_loss(of, z_s, record, misses="stored")
    with pytest.raises(ValueError, match="misses must be one of 'raise', 'stored', got 'guess'"):
        top_k_loss(loss, z_s, stored, misses="guess")
    cold = LDRLD(rank_by="teacher", temperature=2.0, beta=0.0)  # without RNTK no temperature matters
    assert list(top_k_loss(cold, z_s, stored)[1]) == ["pairs", "llki"]
    for k in (1, 61, 2.5):
        with pytest.raises(ValueError, match="k must be"):
            keep_top_k(z_t, k)


def test_bytes_per_token():
    stored = keep_top_k(torch.randn(5, 100), 16)
    assert sum(x.numel() * x.element_size() for x in stored[:3]) == 5 * bytes_per_token(16)
    assert bytes_per_token(64, 17) == 64 * (17 + 16) / 8 + 4
