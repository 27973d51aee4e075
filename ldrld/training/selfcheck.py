"""Checks the engine on a GPU in one go: what the tests show on a CPU, and what only a GPU can show."""
import tempfile
import time
import traceback
from pathlib import Path

import torch

from ldrld import losses, models
from ldrld.data.augmentation import Crops
from ldrld.losses.ldrld.loss import LDRLD
from ldrld.models.evaluation import set_numerics
from ldrld.training.graphs import InFlight, Task, called, captured, train_in_flight
from ldrld.training.loop import Student

__all__ = ["selfcheck", "CHECKS"]

CLASSES, IMAGES, BATCH = 100, 1616, 64  # 25 full batches, and one of 16
NETWORK = "resnet20"


def task_on(device: str, dtype: torch.dtype, teacher=True, epochs: int = 2, seed: int = 0) -> Task:
    """Random images and labels, and a teacher that is a table of random logits."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, 32, 32, 3), generator=g, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (IMAGES,), generator=g)
    table = (4 * torch.randn(IMAGES, CLASSES, generator=g)).to(device)
    crops = Crops(images, (0.5,) * 3, (0.25,) * 3, 4, True, device)
    tests = Crops(images[:600], (0.5,) * 3, (0.25,) * 3, device=device)
    answer = (lambda index, view, x: table[index]) if teacher else None
    return Task(crops, labels.to(device), tests, labels[:600].to(device), answer, epochs, BATCH, seed, dtype)


def student_on(device: str, loss: str, seed: int = 0, checkpoint: Path | None = None) -> Student:
    """A student with its initial weights, or as it was left in a checkpoint."""
    torch.manual_seed(seed)
    network = models.build(NETWORK, CLASSES).to(device)
    return Student(network, losses.build(loss).to(device), "crd", 0.05, checkpoint=checkpoint)


def trained(device: str, recorder, loss: str, dtype: torch.dtype, copies: int = 1) -> list[InFlight]:
    """Students after two epochs of 26 steps."""
    flights = []
    for k in range(copies):
        task = task_on(device, dtype, loss != "ce")
        flights.append(InFlight(student_on(device, loss, seed=k), task, recorder))
    kept = list(flights)
    for _ in train_in_flight(flights): pass
    return kept


def reported(student: Student) -> torch.Tensor:
    """(epochs, 2 + terms) what a training reported: accuracies and the terms of the loss."""
    rows = [[row["train_accuracy"], row["test_accuracy"], *row["terms"].values()] for row in student.history]
    return torch.tensor(rows, dtype=torch.float64)


def distance(a: Student, b: Student) -> float:
    """Largest difference of two students' weights, relative to the largest weight."""
    x, y = (torch.cat([p.detach().double().flatten().cpu() for p in s.model.parameters()]) for s in (a, b))
    return float((x - y).abs().max() / x.abs().max())


def recorded_equals_called(device: str) -> str:
    """52 recorded steps against the same steps called one by one, in both precisions."""
    said = []
    for dtype in (torch.float32, torch.bfloat16):
        for loss in ("ce", "kd", "dkd", "ldrld"):
            (one,), (other,) = (trained(device, recorder, loss, dtype) for recorder in (captured, called))
            apart = distance(one.student, other.student)
            if apart > 1e-6: raise AssertionError(f"{loss} in {dtype}: recorded and called steps differ by {apart:.2g}")
            torch.testing.assert_close(reported(one.student), reported(other.student), rtol=1e-5, atol=1e-5)
            said.append(apart == 0)
    return f"{sum(said)} of {len(said)} equal to the last bit"


def repeats(device: str) -> str:
    """The same training twice."""
    (one,), (other,) = (trained(device, captured, "ldrld", torch.bfloat16) for _ in range(2))
    if apart := distance(one.student, other.student): raise AssertionError(f"a second training ends {apart:.2g} elsewhere")
    return "equal to the last bit"


def paused_and_resumed(device: str) -> str:
    """Two epochs in one go, and with a checkpoint between them that a new student takes up."""
    (whole,) = trained(device, captured, "ldrld", torch.bfloat16)
    task = task_on(device, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        paused = InFlight(student_on(device, "ldrld", checkpoint=path), task, captured)
        for _ in train_in_flight([paused], stop=lambda: paused.epoch == 1): pass
        flight = InFlight(student_on(device, "ldrld", checkpoint=path), task, captured)
        if flight.epoch != 1: raise AssertionError(f"a checkpoint after one epoch was expected, and {flight.epoch} epochs found")
        for _ in train_in_flight([flight]): pass
    if apart := distance(whole.student, flight.student): raise AssertionError(f"resumed, a student ends {apart:.2g} elsewhere")
    torch.testing.assert_close(reported(whole.student), reported(flight.student), rtol=0, atol=0)
    return "equal to the last bit"


def several_streams(device: str) -> str:
    """Eight students on eight streams against each alone, and how much quicker that is."""
    alone = [trained(device, captured, "ldrld", torch.bfloat16)[0]]
    torch.cuda.synchronize()
    together = trained(device, captured, "ldrld", torch.bfloat16, copies=8)
    if apart := distance(alone[0].student, together[0].student): raise AssertionError(f"beside others a student ends {apart:.2g} elsewhere")
    seconds = {}
    for copies in (1, 8):
        flights = [InFlight(student_on(device, "ldrld", seed=k), task_on(device, torch.bfloat16, epochs=6), captured) for k in range(copies)]
        for flight in flights: flight.advance()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in train_in_flight(flights): pass
        seconds[copies] = (time.perf_counter() - began) / copies
    return f"equal; a student's 6 small epochs take {seconds[1]:.2f} s alone and {seconds[8]:.2f} s as one of eight"


def losses_and_gradients(device: str) -> str:
    """LDRLD by its kernel against its formulas in float64 on the CPU, at three sizes."""
    worst = 0.0
    for rows, classes in ((64, 100), (256, 1000), (64, 32_000)):
        g = torch.Generator().manual_seed(rows)
        s, t = (4 * torch.randn(rows, classes, generator=g, dtype=torch.float64) for _ in range(2))
        y = torch.randint(classes, (rows,), generator=g)
        results = []
        for place, dtype, backend in (("cpu", torch.float64, "plain"), (device, torch.float32, "auto")):
            loss, z = LDRLD(), s.to(place, dtype).requires_grad_()
            loss.backend = backend
            value = loss(z, t.to(place, dtype), y.to(place))
            results.append((value.item(), torch.autograd.grad(value, z)[0].double().cpu()))
        (exact, slope), (value, gradient) = results
        worst = max(worst, abs(value / exact - 1), float((gradient - slope).norm() / slope.norm()))
    if worst > 1e-4: raise AssertionError(f"the loss or its gradient is off by {worst:.2g}")
    return f"largest relative difference {worst:.1g}"


def every_loss(device: str) -> str:
    """Every loss on logits that is recorded learns for two epochs without a number that is not finite."""
    from ldrld.training.graphs import why_eager
    names = [n for n in losses.available("logits") if not why_eager(n)]
    for name in names: trained(device, captured, name, torch.bfloat16)
    return f"{len(names)} losses"


CHECKS = (recorded_equals_called, losses_and_gradients, repeats, paused_and_resumed, several_streams, every_loss)


def selfcheck(say=print, seconds: float = 90.0) -> bool:
    """Check the engine on this machine's GPU; says what came of each check, and returns whether all that were made passed.

    say: called with each line.  seconds: after which no further check begins.
    """
    if not torch.cuda.is_available():
        say("no GPU: nothing to check here; the tests show the same on a CPU")
        return True
    began, passed = time.monotonic(), True
    set_numerics("cuda")
    for check in CHECKS:
        if time.monotonic() - began > seconds:
            say(f"check {check.__name__}: no time left")
            continue
        started = time.monotonic()
        try: result = check("cuda")
        except Exception as error:
            say(traceback.format_exc())
            result, passed = f"FAILED, {type(error).__name__}: {error}", False
        say(f"check {check.__name__}: {result} ({time.monotonic() - started:.1f} s)")
    return passed
