"""The fused kernel against plain autograd in float64. Run natively by test_kernels.py where there is a CUDA device, and
otherwise in a process of its own with Triton's interpreter (TRITON_INTERPRET=1), which computes with NumPy on the
CPU."""

import os

import pytest
import torch
import torch.nn.functional as F

from ldrld import LDRLD, adw_weights
from ldrld.losses.ldrld import kernel_launch, triton_kernel
from ldrld.losses.ldrld.loss import relation_terms
from ldrld.losses.relations import dway_kl, held_type, pair_indices, pair_kl, remaining_kl
from ldrld.losses.ldrld.triton_kernel import fused, scale_

# NumPy warns where a GPU does not: of 2^x that overflows, or of the difference of two such, at selected classes in the
# second pass, before they are written over; and of NaN in the tests that have some.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
    for what in ("overflow encountered", "invalid value encountered", "All-NaN")
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TERMS = ("ce", "pairs", "llki", "rntk")
FACTORS = {"ce": 1.0, "pairs": 7.6, "llki": 7.6, "rntk": 112.0}  # about those of LDRLD's defaults
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# What storing the gradient costs, relative to a value: half a unit in the last place, 2^-9 in bfloat16, and as much
# again for a value near a boundary. The interpreter truncates to bfloat16, a whole unit, 2^-7. That of float16 logits
# is held in float32, until a loss scale has multiplied it.
STORED = {F32: 1e-5, BF16: 2**-7 if INTERPRETED else 2**-8, F16: 1e-5}


@pytest.fixture
def device():
    return "cpu" if INTERPRETED else "cuda"


def sample(rows, classes, dtype=F32, seed=0, scale=1.0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    common, *own = (scale * torch.randn(rows, classes, generator=g) for _ in range(3))
    student, teacher = ((2 * common + x).to(device, dtype) for x in own)
    return student, teacher, torch.randint(classes, (rows,), generator=g).to(device)


def equal_weights(rows, device):
    return torch.full((rows,), 1 / rows, device=device)


def selected(student, teacher, d, temperature, rank_by):
    """The classes that the kernel selected, (rows, d): those with a gradient from the d-way term alone. Checked to be
    the d largest, and put in the kernel's order: by value, equal ones by index."""
    only = {"ce": 0.0, "pairs": 0.0, "llki": 1.0, "rntk": 0.0}
    ones = torch.ones(len(student), device=student.device)
    _, grad = fused(
        student.float(), teacher.float(), None, ones, adw_weights(d, device=student.device), temperature, only, rank_by
    )
    judge = (student if rank_by == "student" else teacher).float()
    pi = torch.stack([row.nonzero()[:, 0] for row in grad])
    assert pi.shape == (len(student), d)
    pi = pi.gather(1, judge.gather(1, pi).argsort(dim=1, descending=True, stable=True))
    assert judge.gather(1, pi).equal(judge.topk(d).values)
    return pi


def reference(student, teacher, target, row_weights, weights, temperature, factors=FACTORS, rank_by="student", pi=None):
    """Terms and gradient in float64 by automatic differentiation; of the selection `pi`, if it is given."""
    z_s, z_t, weights = student.detach().double().requires_grad_(), teacher.double(), weights.double()
    if pi is None:
        terms = relation_terms(z_s, z_t, weights, temperature, rank_by)
    else:
        s, t = z_s.gather(1, pi), z_t.gather(1, pi)
        terms = {
            "pairs": (weights[pair_indices(len(weights))] * pair_kl(s, t, temperature)).sum(1),
            "llki": dway_kl(s, t, temperature),
            "rntk": remaining_kl(z_s, z_t, pi, temperature),
        }
    terms["ce"] = z_s.sum(1) * 0 if target is None else F.cross_entropy(z_s, target, reduction="none")
    terms = torch.stack([factors[name] * terms[name] for name in TERMS], 1) * row_weights.double()[:, None]
    return terms.detach(), torch.autograd.grad(terms.sum(), z_s)[0]


def agree(got, right, dtype=F32, rtol=1e-5, factors=FACTORS):
    """Terms: `rtol`, and 2e-6 of a nat before the factors, because a divergence is a difference of numbers near 10 with
    errors of 1e-7 of each. Gradient: the type's precision, and 2e-6 of the row's largest entry for differences of
    probabilities."""
    (terms, grad), (right_terms, right_grad) = got, right
    assert terms.dtype == F32 and grad.dtype == held_type(dtype) and grad.isfinite().all()
    row_weights = 1 / len(terms)
    for i, name in enumerate(TERMS):
        torch.testing.assert_close(
            terms[:, i].double(), right_terms[:, i], rtol=rtol, atol=2e-6 * row_weights * factors[name]
        )
    allowed = max(STORED[dtype], rtol) * right_grad.abs() + 2e-6 * right_grad.abs().amax(1, keepdim=True)
    worst = ((grad.double() - right_grad).abs() - allowed).max().item()
    assert worst <= 0, f"gradient off by {worst:.1e} more than allowed"


# ---- agreement --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "classes, d, T",
    [
        (10, 2, 4.0),
        (10, 7, 1.0),
        (10, 10, 4.0),
        (64, 64, 4.0),
        (100, 7, 4.0),
        (101, 7, 3.0),
        (100, 64, 2.0),
        (1000, 20, 2.0),
        (1000, 7, 0.5),
        (5000, 7, 4.0),
        (5000, 20, 4.0),
        (5000, 64, 1.0),
        (32768, 7, 4.0),
        (50257, 7, 4.0),
        (131072, 20, 6.0),
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda d: str(d)[6:])
def test_agrees_with_autograd(classes, d, T, dtype, device):
    rows = 2
    student, teacher, target = sample(rows, classes, dtype, device=device)
    row_weights, weights = equal_weights(rows, device), adw_weights(d, device=device)
    pi = selected(student, teacher, d, T, "student")  # rounding to 16 bits makes ties
    agree(
        fused(student, teacher, target, row_weights, weights, T, FACTORS),
        reference(student, teacher, target, row_weights, weights, T, pi=pi),
        dtype,
    )


@pytest.mark.parametrize("lanes, stack", [(8, 4), (16, 1), (16, 2), (64, 1)])
@pytest.mark.parametrize("classes", [33, 64, 100, 129])
def test_any_division_into_lanes_and_blocks(lanes, stack, classes, device, monkeypatch):
    """Whole blocks, blocks and a tail, a tail alone, lanes without a class: all with few classes, against plain
    top-d."""

    def options(*args):
        groups = kernel_launch.up(-(-classes // lanes))
        return given(*args) | {"L": lanes, "K": stack, "G": groups, "TAIL": classes % (lanes * stack) != 0}

    given = kernel_launch.options
    monkeypatch.setattr(triton_kernel, "options", options)
    student, teacher, target = sample(2, classes, device=device, seed=classes)
    row_weights, weights = equal_weights(2, device), adw_weights(7, device=device)
    for rank_by in ("student", "teacher"):
        agree(
            fused(student, teacher, target, row_weights, weights, 4.0, FACTORS, rank_by),
            reference(student, teacher, target, row_weights, weights, 4.0, rank_by=rank_by),
        )


@pytest.mark.parametrize("rank_by", ["student", "teacher"])
@pytest.mark.parametrize("with_target", [True, False])
@pytest.mark.parametrize("classes, d", [(100, 7), (2500, 12), (7, 7)])
def test_switches(rank_by, with_target, classes, d, device):
    student, teacher, target = sample(4, classes, device=device)
    row_weights, weights = torch.tensor([0.25, 0.5, 0.125, 0.125], device=device), adw_weights(d, device=device)
    target = target if with_target else None
    got = fused(student, teacher, target, row_weights, weights, 4.0, FACTORS, rank_by)
    agree(got, reference(student, teacher, target, row_weights, weights, 4.0, rank_by=rank_by))
    assert got[0][:, 0].any() == with_target
    terms, grad = fused(student, teacher, target, row_weights, weights, 4.0, FACTORS, rank_by, with_grad=False)
    assert grad is None and terms.equal(got[0])


@pytest.mark.parametrize("name", TERMS)
def test_each_term_alone(name, device):
    factors = dict.fromkeys(TERMS, 0.0) | {name: 3.0}
    student, teacher, target = sample(4, 300, device=device)
    row_weights, weights = equal_weights(4, device), adw_weights(9, device=device)
    got = fused(student, teacher, target, row_weights, weights, 4.0, factors)
    agree(got, reference(student, teacher, target, row_weights, weights, 4.0, factors), factors=factors)
    assert [bool(x) for x in got[0].any(0)] == [n == name for n in TERMS]


def test_only_the_upper_triangle_of_the_weights_counts(device):
    student, teacher, target = sample(2, 50, device=device)
    args = student, teacher, target, equal_weights(2, device)
    weights = adw_weights(5, device=device)
    full = weights + weights.T + torch.eye(5, device=device)
    for a, b in zip(fused(*args, weights, 4.0, FACTORS), fused(*args, full, 4.0, FACTORS)):
        assert a.equal(b)


@pytest.mark.parametrize("student_type, teacher_type", [(BF16, F32), (F32, F16)])
def test_student_and_teacher_of_different_types(student_type, teacher_type, device):
    student, teacher, target = sample(2, 200, device=device)
    student, teacher = student.to(student_type), teacher.to(teacher_type)
    row_weights, weights = equal_weights(2, device), adw_weights(4, device=device)
    pi = selected(student, teacher, 4, 4.0, "student")
    agree(
        fused(student, teacher, target, row_weights, weights, 4.0, FACTORS),
        reference(student, teacher, target, row_weights, weights, 4.0, pi=pi),
        student_type,
    )


# ---- ties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes, d", [(10, 4), (500, 7), (3000, 20)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=lambda d: str(d)[6:])
def test_many_equal_logits(classes, d, dtype, device):
    """Logits rounded to whole numbers: every selection has ties within it and at its end. `selected` checks that it
    is one of the right ones, each class once."""
    student, teacher, target = sample(4, classes, device=device)
    student, row_weights, weights = student.round().to(dtype), equal_weights(4, device), adw_weights(d, device=device)
    teacher = teacher.to(dtype)
    pi = selected(student, teacher, d, 4.0, "student")
    agree(
        fused(student, teacher, target, row_weights, weights, 4.0, FACTORS),
        reference(student, teacher, target, row_weights, weights, 4.0, pi=pi),
        dtype,
    )


@pytest.mark.parametrize("value", [0.0, -0.0, -7.5, 1e4])
def test_all_logits_equal(value, device):
    _, teacher, target = sample(2, 700, device=device)
    student = torch.full_like(teacher, value)
    row_weights, weights = equal_weights(2, device), adw_weights(7, device=device)
    pi = selected(student, teacher, 7, 4.0, "student")
    assert pi.tolist() == [list(range(7))] * 2  # the first lanes, and the lowest class of each
    agree(
        fused(student, teacher, target, row_weights, weights, 4.0, FACTORS),
        reference(student, teacher, target, row_weights, weights, 4.0, pi=pi),
    )


def test_zeros_of_both_signs_are_equal(device):
    student = torch.full((1, 40), -0.0, device=device)
    student[0, 20:] = 0.0
    teacher = sample(1, 40, device=device)[1]
    assert selected(student, teacher, 4, 4.0, "student").tolist() == [[0, 1, 2, 3]]


def test_ties_below_the_selection_leave_it_unique(device):
    student, teacher, target = sample(3, 1200, device=device)
    student = torch.zeros_like(student)
    student.scatter_(1, torch.randint(1200, (3, 400), generator=torch.Generator().manual_seed(1)).to(device), -2.0)
    for rank, c in enumerate((3, 259, 515, 1027, 770)):
        student[:, c] = 5.0 - rank / 2  # four of them in one lane
    row_weights, weights = equal_weights(3, device), adw_weights(5, device=device)
    agree(
        fused(student, teacher, target, row_weights, weights, 4.0, FACTORS),
        reference(student, teacher, target, row_weights, weights, 4.0),
    )


# ---- extreme logits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("classes", [100, 3000])
def test_logits_of_ten_thousand(dtype, classes, device):
    """2e-5 in place of 1e-5: differences of logits of up to 100, which e^(−100/T) lets count, divided by T and
    rounded."""
    g = torch.Generator().manual_seed(0)
    student, teacher = ((1e4 * (2 * torch.rand(4, classes, generator=g) - 1)).to(device, dtype) for _ in range(2))
    pi = torch.rand(4, classes, generator=g).topk(7).indices.to(device)
    student = (student / 2).scatter(1, pi, (9984 - 512 * torch.arange(7.0, device=device).expand(4, 7)).to(dtype))
    target = torch.arange(4, device=device)
    row_weights, weights = equal_weights(4, device), adw_weights(7, device=device)
    agree(
        fused(student, teacher, target, row_weights, weights, 4.0, FACTORS),
        reference(student, teacher, target, row_weights, weights, 4.0, pi=pi),
        dtype,
        rtol=2e-5,
    )


@pytest.mark.parametrize("lead", [60.0, 1e3, 1e4])
def test_the_rest_beside_a_dominating_class(lead, device):
    """Nothing of the rest may be lost in the sum over all: the remaining term to 2e-5 of itself, its gradient to
    1e-4."""
    student, teacher, _ = sample(4, 2000, device=device)
    student[:, 1234], teacher[:, 321] = lead, lead / 2
    row_weights, weights = equal_weights(4, device), adw_weights(2, device=device)
    factors = dict.fromkeys(TERMS, 0.0) | {"rntk": 1.0}
    for rank_by in ("student", "teacher"):
        teacher[:, 321] = -3.0 if rank_by == "student" else lead
        (terms, grad), (right, right_grad) = (
            f(student, teacher, None, row_weights, weights, 4.0, factors, rank_by) for f in (fused, reference)
        )
        torch.testing.assert_close(terms[:, 3].double(), right[:, 3], rtol=2e-5, atol=0)
        torch.testing.assert_close(grad.double(), right_grad, rtol=1e-4, atol=1e-6 * right_grad.abs().max().item())


def test_masked_classes_at_the_lowest_number_of_the_type(device):
    """A vocabulary padded with finfo.min in both networks."""
    for dtype in (F32, BF16, F16):
        student, teacher, target = sample(2, 400, dtype, device=device)
        student[:, 300:], teacher[:, 300:], target = torch.finfo(dtype).min, torch.finfo(dtype).min, target % 300
        row_weights, weights = equal_weights(2, device), adw_weights(7, device=device)
        terms, grad = fused(student, teacher, target, row_weights, weights, 4.0, FACTORS)
        few = [x[:, :300].contiguous() for x in (student, teacher)]
        pi = selected(*few, 7, 4.0, "student")
        right, right_grad = reference(*few, target, row_weights, weights, 4.0, pi=pi)
        agree((terms, grad[:, :300]), (right, right_grad), dtype)
        assert not grad[:, 300:].any()


@pytest.mark.parametrize("T", [4.0, 3.0])
@pytest.mark.parametrize("offset", [100.0, -1e4, 1e4])
def test_an_offset_of_all_logits_changes_little(offset, T, device):
    """Both networks' logits are multiples of 1/64, so that the offset itself is exact in float32."""
    student, teacher, target = sample(3, 2000, device=device)
    student, teacher = (student * 64).round() / 64, (teacher * 64).round() / 64
    row_weights, weights = equal_weights(3, device), adw_weights(7, device=device)
    pi = selected(student, teacher, 7, T, "student")
    right = reference(student, teacher, target, row_weights, weights, T, pi=pi)
    agree(fused(student + offset, teacher, target, row_weights, weights, T, FACTORS), right)
    agree(fused(student, teacher + offset, target, row_weights, weights, T, FACTORS), right)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("low", [-torch.inf, -1e9, -1e30])
@pytest.mark.parametrize("rank_by", ["student", "teacher"])
def test_classes_that_are_ruled_out(low, dtype, rank_by, device):
    """By both networks, whatever stands for −∞: the same as without these classes; the lowest class is one of them."""
    if dtype == F16 and low != -torch.inf:
        low = -65504.0
    student, teacher, target = sample(3, 400, dtype, device=device)
    out = torch.zeros(400, dtype=torch.bool, device=device)
    out[300:], out[0] = True, True
    student[:, out], teacher[:, out], target = low, low, target % 299
    row_weights, weights = equal_weights(3, device), adw_weights(7, device=device)
    few = [x[:, ~out].contiguous() for x in (student, teacher)]
    pi = selected(*few, 7, 4.0, rank_by)
    terms, grad = fused(student, teacher, target + 1, row_weights, weights, 4.0, FACTORS, rank_by)
    right, right_grad = reference(*few, target, row_weights, weights, 4.0, rank_by=rank_by, pi=pi)
    agree((terms, grad[:, ~out]), (right, right_grad), dtype)
    assert not grad[:, out].any()


def test_fewer_classes_than_the_depth_and_a_teacher_cut_down(device):
    """Four classes at depth 7; a teacher of three classes beside a padded vocabulary: as by the plain formulas."""
    student, teacher, _ = sample(4, 600, device=device)
    student[:, 500:] = teacher[:, 500:] = -torch.inf
    cut = teacher.masked_fill(teacher < teacher.topk(3).values[:, -1:], -torch.inf)
    few_s, few_t = (x.masked_fill(torch.arange(600, device=device) >= 4, -torch.inf) for x in (student, teacher))
    plain, quick = LDRLD(), LDRLD()
    plain.backend, quick.backend = "plain", "triton"
    for s, t in ((student, cut), (few_s, few_t), (student, teacher)):
        results = []
        for loss, z in ((plain, s.double()), (quick, s.clone())):
            z.requires_grad_()
            value = loss(z, t.to(z.dtype))
            results.append((value.item(), torch.autograd.grad(value, z)[0].double()))
        assert results[1][0] == pytest.approx(results[0][0], rel=1e-4, abs=1e-4) and results[0][0] < 1e4
        torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows, classes", [(4, 100), (8, 3000), (4, 32000)])
def test_a_loss_scale_finds_the_gradient_of_float16(rows, classes, device):
    student, _, target = sample(rows, classes, F16, device=device)
    student = student + torch.arange(classes, device=device) % 7 * 0.1
    teacher = student + 0.01 * sample(rows, classes, F16, 1, device=device)[0]
    loss = LDRLD(ce_weight=0.0)
    norms = {}
    for backend, z in (("triton", student.clone()), ("plain", student.float())):
        loss.backend = backend
        z.requires_grad_()
        (loss(z, teacher) / 64 * 2**16).backward()
        assert z.grad.dtype == z.dtype
        norms[backend] = z.grad.double().norm().item()
    assert norms["triton"] == pytest.approx(norms["plain"], rel=0.01)


def test_a_student_that_equals_its_teacher(device):
    student, _, target = sample(3, 900, scale=10.0, device=device)
    terms, grad = fused(student, student, None, equal_weights(3, device), adw_weights(7, device=device), 4.0, FACTORS)
    assert terms.abs().max() == 0 and grad.abs().max() == 0


def test_one_class_remains(device):
    student, teacher, target = sample(3, 8, device=device)
    row_weights, weights = equal_weights(3, device), adw_weights(7, device=device)
    agree(
        fused(student, teacher, target, row_weights, weights, 4.0, FACTORS),
        reference(student, teacher, target, row_weights, weights, 4.0),
    )


def test_nan_in_a_row_that_counts_is_seen(device):
    student, teacher, target = sample(2, 300, device=device)
    student[0, 5] = torch.nan
    terms, _ = fused(student, teacher, target, equal_weights(2, device), adw_weights(7, device=device), 4.0, FACTORS)
    assert terms[0].sum().isnan() and terms[1].isfinite().all()


# ---- rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("classes", [50, 3000])
def test_a_row_of_share_0_may_hold_anything(classes, dtype, device):
    student, teacher, target = sample(5, classes, dtype, device=device)
    weights = adw_weights(7, device=device)
    whole = fused(
        student[[0, 2, 4]],
        teacher[[0, 2, 4]],
        target[[0, 2, 4]],
        torch.full((3,), 1 / 3, device=device),
        weights,
        4.0,
        FACTORS,
    )
    student[1], student[3], teacher[1], target[1], target[3] = torch.nan, torch.inf, torch.nan, -100, 10**9
    row_weights = torch.tensor([1 / 3, 0, 1 / 3, 0, 1 / 3], device=device)
    terms, grad = fused(student, teacher, target, row_weights, weights, 4.0, FACTORS)
    assert not terms[[1, 3]].any() and not grad[[1, 3]].any()
    assert terms[[0, 2, 4]].equal(whole[0]) and grad[[0, 2, 4]].equal(whole[1])


def test_a_target_that_is_no_class_is_not_silent(device):
    student, teacher, target = sample(2, 50, device=device)
    target[0] = -100
    terms, _ = fused(student, teacher, target, equal_weights(2, device), adw_weights(7, device=device), 4.0, FACTORS)
    assert terms[0, 0].isnan() and terms[:, 1:].isfinite().all() and terms[1].isfinite().all()


@pytest.mark.parametrize("classes", [100, 128, 3000])
def test_rows_that_lie_apart_in_memory(classes, device):
    student, teacher, target = sample(2, classes, device=device)
    args = target, equal_weights(2, device), adw_weights(7, device=device), 4.0, FACTORS
    right = fused(student, teacher, *args)
    apart, turned = torch.full((4, classes + 13), torch.nan, device=device), teacher.T.contiguous().T
    apart[::2, 13:] = student
    for s, t in ((apart[::2, 13:], teacher), (student, turned), (apart[::2, 13:], turned)):
        for a, b in zip(fused(s, t, *args), right):
            assert a.equal(b)
    one = teacher[:1].expand(2, classes)
    for a, b in zip(fused(student, one, *args), fused(student, one.contiguous(), *args)):
        assert a.equal(b)


def test_inputs_that_need_gradients_stay_as_they_are(device):
    student, teacher, target = sample(2, 60, device=device)
    before = student.clone(), teacher.clone()
    weights = adw_weights(7, device=device)
    terms, grad = fused(
        student.requires_grad_(), teacher.requires_grad_(), target, equal_weights(2, device), weights, 4.0, FACTORS
    )
    assert not terms.requires_grad and not grad.requires_grad and student.grad is None
    assert student.detach().equal(before[0]) and teacher.detach().equal(before[1])


# ---- scale_ -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1,), (3, 100), (7, 5000)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda d: str(d)[6:])
def test_scale(size, dtype, device):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for factor in (1.0, 0.5, -4.0, 0.0):
        y = x.clone()
        assert scale_(y, torch.tensor(factor, device=device)) is y
        assert y.equal(x * factor)  # powers of two, so that there is nothing to round


def test_scale_with_many_turns(device):
    """More numbers than 1,024 programs take in one turn."""
    x = torch.ones(1024 * 4096 + 5, device=device)
    assert scale_(x, torch.tensor(2.0, dtype=BF16, device=device)).eq(2).all()


# ---- errors -----------------------------------------------------------------------------------------------------


def wrong(**changes):
    def case(device):
        student, teacher, target = sample(3, 20, device=device)
        args = {
            "student": student,
            "teacher": teacher,
            "target": target,
            "row_weights": equal_weights(3, device),
            "weights": adw_weights(4, device=device),
            "temperature": 4.0,
            "factors": FACTORS,
        }
        return args | {name: change(args.get(name)) for name, change in changes.items()}

    return case


@pytest.mark.parametrize(
    "case, match",
    [
        (wrong(student=lambda x: x.double()), "student must be float32, bfloat16 or float16, got torch.float64"),
        (wrong(teacher=lambda x: x.double()), "teacher must be float32"),
        (wrong(teacher=lambda x: x[:, :10]), "teacher_logits must have the shape"),
        (wrong(weights=lambda x: torch.ones(21, 21)), r"d from 2 to 20, got \(21, 21\)"),
        (wrong(weights=lambda x: torch.ones(1, 1)), "d from 2 to 20"),
        (wrong(weights=lambda x: torch.ones(4)), "d from 2 to 20"),
        (
            wrong(
                student=lambda x: torch.zeros(3, 99),
                teacher=lambda x: torch.zeros(3, 99),
                weights=lambda x: torch.ones(65, 65),
            ),
            "d from 2 to 64",
        ),
        (wrong(row_weights=lambda x: x[:2]), r"row_weights must be float32 of shape \(3,\)"),
        (wrong(row_weights=lambda x: x.double()), "row_weights must be float32"),
        (wrong(target=lambda x: x.int()), "target must be int64"),
        (wrong(target=lambda x: x[:2]), "target must be int64"),
        (wrong(temperature=lambda x: 0.0), "temperature must be a finite number above 0"),
        (wrong(rank_by=lambda x: "both"), "rank_by must be one of"),
    ],
)
def test_errors(case, match):
    with pytest.raises(ValueError, match=match):
        fused(**case("cpu" if INTERPRETED else "cuda"))


def test_errors_of_scale(device):
    x = torch.ones(4, 6, device=device)
    with pytest.raises(ValueError, match="grad must be contiguous"):
        scale_(x.T, torch.tensor(1.0, device=device))
    with pytest.raises(ValueError, match="grad_output must be one number"):
        scale_(x, x)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes any device")
def test_tensors_off_the_gpu_are_refused():
    with pytest.raises(ValueError, match="student must be on a CUDA device, got cpu"):
        fused(**wrong()("cpu"))


# ---- within LDRLD -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("above", [1.0, 3.0])
@pytest.mark.parametrize("options", [{}, {"depth": 3, "rank_by": "teacher", "temperature": 2.0}])
def test_ldrld_by_the_kernel(device, options, above):
    loss, plain = LDRLD(**options), LDRLD(**options)
    loss.backend, plain.backend = "triton", "plain"
    student, teacher, target = sample(6, 50, device=device)
    target[2] = -100
    got, right = [], []
    for module, results in ((loss, got), (plain, right)):
        z = student.clone().requires_grad_()
        value, terms = module.value_and_terms(z, teacher, target)
        results += [value.detach(), torch.stack(list(terms.values())), torch.autograd.grad(above * value, z)[0]]
    for a, b in zip(got, right):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_second_derivatives_and_a_second_backward(device):
    loss = LDRLD()
    loss.backend = "triton"
    student, teacher, target = sample(3, 20, device=device)
    z = student.clone().requires_grad_()
    first = torch.autograd.grad(loss(z, teacher, target), z, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), z)[0]
    loss.backend = "plain"
    right = torch.autograd.grad(loss(z, teacher, target), z, create_graph=True)[0]
    torch.testing.assert_close(second, torch.autograd.grad(right.square().sum(), z)[0], rtol=1e-4, atol=1e-5)
    loss.backend = "triton"
    value = loss(z, teacher, target)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="to call backward more than once, .* 'analytic'"):
        value.backward()
