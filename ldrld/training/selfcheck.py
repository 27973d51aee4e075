"""Checks the engine on a GPU: what the tests verify on a CPU, and what only a GPU can show."""
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldrld import losses, models
from ldrld.data.augmentation import Crops
from ldrld.losses.ldrld.loss import LDRLD
from ldrld.models.evaluation import set_numerics
from ldrld.training.graphs import Recorder, Task, called, captured
from ldrld.training.in_flight import InFlight, train_in_flight
from ldrld.training.student import Student

__all__ = ["selfcheck", "CHECKS"]

CLASSES, IMAGES, BATCH = 100, 1616, 64  # 25 full batches, and one of 16
NETWORK = "resnet20"


def task_on(device: str, dtype: torch.dtype, teacher: bool = True, epochs: int = 2, seed: int = 0) -> Task:
    """Random images and labels, and a teacher with a table of random logits."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, 32, 32, 3), generator=g, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (IMAGES,), generator=g)
    table = (4 * torch.randn(IMAGES, CLASSES, generator=g)).to(device)
    crops = Crops(images, (0.5,) * 3, (0.25,) * 3, 4, True, device)
    tests = Crops(images[:600], (0.5,) * 3, (0.25,) * 3, device=device)
    logits = (lambda index, crop, x: table[index]) if teacher else None
    return Task(crops, labels.to(device), tests, labels[:600].to(device), logits, epochs, BATCH, seed, dtype)


def student_on(device: str, loss: str, seed: int = 0, checkpoint: Path | None = None) -> Student:
    """A student with initial weights, or resumed from a checkpoint."""
    torch.manual_seed(seed)
    network = models.build(NETWORK, CLASSES).to(device)
    made = losses.build(loss, **losses.registry.loss_class(loss).alone)
    return Student(network, made.to(device), "crd", 0.05, checkpoint=checkpoint)


def trained(device: str, recorder: Recorder, loss: str, dtype: torch.dtype, copies: int = 1) -> list[InFlight]:
    """Students trained for two epochs of 26 steps."""
    flights = []
    for k in range(copies):
        task = task_on(device, dtype, loss != "ce")
        flights.append(InFlight(student_on(device, loss, seed=k), task, recorder))
    kept = list(flights)
    for _ in train_in_flight(flights): pass
    return kept


def reported(student: Student) -> torch.Tensor:
    """The reported accuracies and terms of the loss, (epochs, 2 + terms)."""
    rows = [[row["train_accuracy"], row["test_accuracy"], *row["terms"].values()] for row in student.history]
    return torch.tensor(rows, dtype=torch.float64)


def distance(a: Student, b: Student) -> float:
    """Largest difference between the weights of two students, relative to the largest weight."""
    x, y = (torch.cat([p.detach().double().flatten().cpu() for p in s.model.parameters()]) for s in (a, b))
    return float((x - y).abs().max() / x.abs().max())


def recorded_equals_called(device: str) -> str:
    """52 recorded steps against the same steps without recording, in both precisions."""
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
    """The same training, run twice."""
    (one,), (other,) = (trained(device, captured, "ldrld", torch.bfloat16) for _ in range(2))
    if apart := distance(one.student, other.student):
        raise AssertionError(f"weights of a repeated training differ by {apart:.2g}")
    return "equal to the last bit"


def paused_and_resumed(device: str) -> str:
    """Two epochs in one go, against two epochs resumed from a checkpoint in between."""
    (whole,) = trained(device, captured, "ldrld", torch.bfloat16)
    task = task_on(device, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        paused = InFlight(student_on(device, "ldrld", checkpoint=path), task, captured)
        for _ in train_in_flight([paused], stop=lambda: paused.epoch == 1): pass
        flight = InFlight(student_on(device, "ldrld", checkpoint=path), task, captured)
        if flight.epoch != 1:
            raise AssertionError(f"expected a checkpoint after one epoch, found {flight.epoch} epochs")
        for _ in train_in_flight([flight]): pass
    if apart := distance(whole.student, flight.student):
        raise AssertionError(f"weights of a resumed training differ by {apart:.2g}")
    torch.testing.assert_close(reported(whole.student), reported(flight.student), rtol=0, atol=0)
    return "equal to the last bit"


def several_streams(device: str) -> str:
    """Eight students on eight streams against one alone, and the speed-up."""
    alone = [trained(device, captured, "ldrld", torch.bfloat16)[0]]
    torch.cuda.synchronize()
    together = trained(device, captured, "ldrld", torch.bfloat16, copies=8)
    if apart := distance(alone[0].student, together[0].student):
        raise AssertionError(f"weights of a student trained next to others differ by {apart:.2g}")
    seconds = {}
    for copies in (1, 8):
        flights = []
        for k in range(copies):
            task = task_on(device, torch.bfloat16, epochs=6)
            flights.append(InFlight(student_on(device, "ldrld", seed=k), task, captured))
        for flight in flights: flight.advance()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in train_in_flight(flights): pass
        seconds[copies] = (time.perf_counter() - began) / copies
    return f"equal; 6 small epochs take {seconds[1]:.2f} s alone and {seconds[8]:.2f} s per student as one of eight"


def losses_and_gradients(device: str) -> str:
    """The LDRLD kernel against the formulas in float64 on the CPU, at three sizes."""
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
    if worst > 1e-4: raise AssertionError(f"the loss or its gradient has a relative error of {worst:.2g}")
    return f"largest relative difference {worst:.1g}"


def every_loss(device: str) -> str:
    """Every recordable loss on logits trains for two epochs with finite values."""
    from ldrld.training.graphs import why_eager
    names = [n for n in losses.available("logits") if not why_eager(n)]
    for name in names: trained(device, captured, name, torch.bfloat16)
    return f"{len(names)} losses"


CHECKS = (recorded_equals_called, losses_and_gradients, repeats, paused_and_resumed, several_streams, every_loss)


def selfcheck(
    say: Callable[[str], Any] = print,  # called with each line
    seconds: float = 90.0,  # after which no further check starts
) -> bool:
    """Check the engine on this machine's GPU; reports each check and returns whether all completed checks passed."""
    if not torch.cuda.is_available():
        say("no GPU: nothing to check; the tests verify the engine on a CPU")
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
