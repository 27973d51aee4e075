"""LDRLD where every process holds a slice of the classes: as one process with all of them."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ldrld import LDRLD, losses
from ldrld.losses.ldrld.sharded import sharded_loss

BOUNDS = {2: (0, 60, 130), 3: (0, 70, 127, 130)}  # the last slice of three has fewer classes than d
LOSSES = {
    "default": {},
    "ranked by the teacher": {"rank_by": "teacher"},
    "deep, cold": {"depth": 20, "temperature": 1.0, "weighting": "irw"},
    "all classes": {"depth": 130},
    "without normalisation": {"normalize": False, "alpha": 1.0, "ce_weight": 0.1},
}
ROWS = ("all rows", "ignored and masked rows", "micro-batch", "padded vocabulary", "no target", "extreme logits")


def problem(rows, dtype=torch.float64):
    """Student's and teacher's logits, and the other arguments, of 3 × 4 tokens and 130 classes."""
    generator = torch.Generator().manual_seed(ROWS.index(rows))
    student, teacher = (k * torch.randn(3, 4, 130, dtype=torch.float64, generator=generator) for k in (2, 4))
    if dtype != torch.float64:  # without ties, which are selected arbitrarily
        student, teacher = (z.argsort().to(dtype) / 16 for z in (student, teacher))
    given = {"target": torch.randint(120, (3, 4), generator=generator)}
    if rows == "ignored and masked rows":
        given["target"][0, 2:] = -100
        given["mask"] = torch.arange(12).view(3, 4) % 3 > 0
        student[0, 2:], teacher[0, 3] = torch.nan, torch.inf
    if rows == "micro-batch":
        given["normalizer"] = 40
    if rows == "padded vocabulary":
        student[..., 124:] = teacher[..., 122:] = -torch.inf
    if rows == "no target":
        given = {}
    if rows == "extreme logits":
        student, teacher = student * 1e3, teacher * 1e3
    return student, teacher, given


def cases():
    return [(name, rows) for name in LOSSES for rows in ROWS if (name, rows) != ("all classes", "padded vocabulary")]


def sliced(loss, rank, bounds, student, teacher, given):
    """Value, terms and gradient of a process."""
    mine = slice(*bounds[rank : rank + 2])
    z = student[..., mine].clone().requires_grad_()
    value, terms = sharded_loss(loss, z, teacher[..., mine], bounds[rank], **given)
    (2**10 * value).backward()
    return value.detach(), terms, z.grad / 2**10


def told(rank, bounds, loss, **changed):
    """What a process raises."""
    student, teacher, given = problem("all rows")
    try:
        sliced(loss, rank, bounds, student, teacher, given | changed)
    except ValueError as error:
        return str(error)


def work(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    bounds = BOUNDS[world]
    found = {case: sliced(LDRLD(**LOSSES[case[0]]), rank, bounds, *problem(case[1])) for case in cases()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found[dtype] = sliced(LDRLD(), rank, bounds, *problem("all rows", dtype))
    found["label"] = told(rank, bounds, LDRLD(), target=torch.full((3, 4), 130))
    found["first"] = told(rank, (0, *bounds[:-1]) if rank else bounds, LDRLD())
    found["depth"] = told(rank, bounds, LDRLD(depth=131, beta=0.0))
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=BOUNDS, ids="{} processes".format)
def found(request, tmp_path_factory):
    """What every process found."""
    folder = tmp_path_factory.mktemp("processes")
    mp.start_processes(work, (request.param, str(folder)), nprocs=request.param, start_method="spawn")
    return [torch.load(folder / str(rank)) for rank in range(request.param)]


def whole(loss, student, teacher, given):
    """Value, terms and gradient of one process with all classes."""
    z = student.clone().requires_grad_()
    value, terms = loss.value_and_terms(z, teacher, **given)
    return value.detach(), terms, torch.autograd.grad(2**10 * value, z)[0] / 2**10


@pytest.mark.filterwarnings("ignore:depth=")
@pytest.mark.parametrize("case", cases(), ids=", ".join)
def test_slices_give_what_the_whole_gives(found, case):
    value, terms, gradient = whole(LDRLD(**LOSSES[case[0]]), *problem(case[1]))
    assert value.isfinite()
    for v, of_slice, _ in found_of(found, case):
        torch.testing.assert_close(v, value, rtol=1e-12, atol=1e-12)
        assert of_slice.keys() == terms.keys()
        for name in terms:
            torch.testing.assert_close(of_slice[name], terms[name], rtol=1e-11, atol=1e-11)
    joined = torch.cat([g for *_, g in found_of(found, case)], -1)
    torch.testing.assert_close(joined, gradient, rtol=1e-9, atol=1e-14 * max(1.0, value.item()))


def found_of(found, case):
    return [of_process[case] for of_process in found]


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)], ids=str
)
def test_lower_precision(found, dtype, bound):
    """Values in float32; gradients in the type of the logits."""
    value, _, gradient = whole(LDRLD(), *problem("all rows", dtype))
    joined = torch.cat([g for *_, g in found_of(found, dtype)], -1)
    assert joined.dtype == dtype and found[0][dtype][0].dtype == torch.float32
    torch.testing.assert_close(found[0][dtype][0], value, rtol=1e-6, atol=0.0)
    assert (joined - gradient).float().norm() <= bound * gradient.float().norm()


@pytest.mark.parametrize(
    "name, message",
    [
        ("label", "target must be in exactly one slice, got class 130 in row 0, which 0 processes have"),
        ("first", "target must be in exactly one slice"),
        ("depth", "depth=131: expected at most the number of classes in all slices together"),
    ],
)
def test_every_process_raises_the_same_error(found, name, message):
    """One that went on alone would wait for ever."""
    messages = {of_process[name] for of_process in found}
    assert len(messages) == 1 and message in messages.pop()


@pytest.mark.parametrize(
    "loss, changed, message",
    [
        (losses.build("kd"), {}, "loss must be LDRLD or one of its variants, got a KD"),
        (LDRLD(rank_by="label"), {}, "must rank by student or teacher"),
        (LDRLD(anchor=True), {}, "must rank by student or teacher"),
        (LDRLD(mass_weight=1.0), {}, "must rank by student or teacher"),
        (LDRLD(depth_by="entropy"), {}, "must rank by student or teacher"),
        (LDRLD(), {"first": -1}, "first must"),
        (LDRLD(), {"target": torch.zeros(12, dtype=torch.int64)}, r"target must have shape \(3, 4\), got \(12,\)"),
    ],
)
def test_what_cannot_be_sliced(loss, changed, message):
    """Told before the first message."""
    student, teacher, given = problem("all rows")
    with pytest.raises(ValueError, match=message):
        sharded_loss(loss, student, teacher, **({"first": 0} | given | changed))
