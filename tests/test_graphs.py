"""The GPU's engine on a CPU: its step, called or replayed from an imitated recording, equals the training loop to the
last bit."""

import pytest
import torch

from ldrld import losses, models
from ldrld.core.validation import values_unseen
from ldrld.data.augmentation import Crops
from ldrld.experiments.methods import METHODS, RIVALS, SWITCHES, VARIANTS
from ldrld.models.evaluation import precision_used
from ldrld.training import selfcheck
from ldrld.training.capture import Address, CaptureError, Imitation, Produced
from ldrld.training.divergence import Diverged
from ldrld.training.graphs import Task, called, imitated, why_eager
from ldrld.training.in_flight import InFlight, train_in_flight
from ldrld.training.loop import Student, train_together

ALL = {**METHODS, **{f"LDRLD, {name}": method for name, method in VARIANTS.items()}, **RIVALS, **SWITCHES}
CAPTURED = [name for name, m in ALL.items() if not why_eager(m.loss, m.args) and m.teacher == "plain"]
BATCH, EPOCHS = 64, 3


def crops_of(images):
    return Crops(images.train_images, images.mean, images.std, images.padding, images.flip)


def student_of(method, images, teacher, recipe="crd", checkpoint=None, lr=0.05):
    """A student with its loss, ready to be trained."""
    torch.manual_seed(0)
    model = models.build("resnet8", 10)
    zeros = torch.zeros(1, dtype=torch.int64)
    args = {"depth": 5} if method.loss == "ldrld" else {}
    loss = losses.build(method.loss, **{**args, **method.args}).prepare(
        model, teacher.teacher, crops_of(images).at(zeros, zeros), images
    )
    return Student(model, loss, recipe, lr, checkpoint=checkpoint)


def task_of(images, teacher, dtype=torch.float32, epochs=EPOCHS):
    tests = Crops(images.test_images, images.mean, images.std)
    return Task(crops_of(images), images.train_labels, tests, images.test_labels, teacher, epochs, BATCH, 0, dtype)


def without_seconds(row):
    return {k: v for k, v in row.items() if k != "seconds"}


def assert_same(a, b):
    """Weights, statistics, momentum and trained parts of two students are equal to the last bit."""
    for one, other in ((a.model, b.model), (a.loss, b.loss)):
        for (name, x), y in zip(one.state_dict().items(), other.state_dict().values()):
            assert x.equal(y), name
    x, y = (s.optimizer.state_dict()["state"] for s in (a, b))
    x, y = ({k: v for k, v in s.items() if v.get("momentum_buffer") is not None} for s in (x, y))
    assert x.keys() == y.keys() and all(v["momentum_buffer"].equal(y[k]["momentum_buffer"]) for k, v in x.items())


def compare(method, images, teacher, recorder, recipe="crd", dtype=torch.float32):
    """Train by the loop and by the engine; both must end at the same bits."""
    usual, engine = (student_of(method, images, teacher, recipe) for _ in range(2))
    if recorder is imitated:
        with values_unseen():
            rows = [row for (row,) in train_together([usual], images, teacher, EPOCHS, BATCH, 0, dtype)]
    else:
        rows = [row for (row,) in train_together([usual], images, teacher, EPOCHS, BATCH, 0, dtype)]
    flown = [row for _, row in train_in_flight([InFlight(engine, task_of(images, teacher, dtype), recorder)])]
    if (method.loss, recorder) == ("reviewkd", imitated):
        # autograd adds up the gradients of one map in another memory format while an imitation watches: equal to
        # rounding
        for a, b in zip(flown, rows):
            assert a["terms"] == pytest.approx(b["terms"], rel=1e-4)
        return
    assert list(map(without_seconds, flown)) == list(map(without_seconds, rows))
    assert_same(usual, engine)


@pytest.mark.parametrize("recorder", [called, imitated])
@pytest.mark.parametrize("name", CAPTURED)
def test_every_method(name, recorder, digits, teacher):
    compare(ALL[name], digits, teacher, recorder)


@pytest.mark.parametrize("recipe", ["crd", "crd-warmup", "onecycle"])
@pytest.mark.parametrize("name", ["CE", "KD", "DKD", "LDRLD", "RKD"])
@pytest.mark.parametrize("recorder", [called, imitated])
def test_low_precision_and_schedules(name, recipe, recorder, digits, teacher):
    dtype = precision_used("fast")
    if dtype == torch.float32:
        dtype = torch.bfloat16  # emulated here: slow, and right all the same
    compare(ALL[name], digits, teacher, recorder, recipe, dtype)


def test_what_cannot_be_recorded_is_listed(digits, teacher):
    """The list of eager losses holds what fails, and only that."""
    for m in ALL.values():
        if not why_eager(m.loss, m.args):
            continue
        flight = InFlight(student_of(m, digits, teacher), task_of(digits, teacher), imitated)
        with pytest.raises((CaptureError, AssertionError, TypeError, ValueError)):
            rows = [row for _, row in train_in_flight([flight])]
            usual = student_of(m, digits, teacher)
            expected = [row for (row,) in train_together([usual], digits, teacher, EPOCHS, BATCH)]
            assert list(map(without_seconds, rows)) == list(map(without_seconds, expected))


def test_a_ramp_is_recorded_anew(digits, teacher):
    student = student_of(ALL["DKD"], digits, teacher)
    flight, keys = InFlight(student, task_of(digits, teacher), imitated), set()
    for _ in train_in_flight([flight]):
        keys.add(flight.key)
    assert len(keys) == 1  # a twelfth of three epochs is no ramp at all
    student.loss.ramp = 0.5
    flight.k.zero_()
    flight.record()
    assert flight.key not in keys


@pytest.mark.parametrize("name", ["CE", "LDRLD", "VID", "CRD"])
def test_stopped_and_resumed(name, digits, teacher, tmp_path):
    """By the engine, by the loop, and from one to the other."""
    whole = student_of(ALL[name], digits, teacher)
    expected = [row for (row,) in train_together([whole], digits, teacher, EPOCHS, BATCH)]
    for first, second in (("engine", "engine"), ("engine", "loop"), ("loop", "engine")):
        file = str(tmp_path / f"{first}-{second}.pt")
        begun = student_of(ALL[name], digits, teacher, checkpoint=file)
        if first == "loop":
            next(train_together([begun], digits, teacher, EPOCHS, BATCH))
        else:
            flights = [InFlight(begun, task_of(digits, teacher), called, checkpoint_every=1e9)]
            done = [row for _, row in train_in_flight(flights, stop=lambda begun=begun: len(begun.history) > 0)]
            assert done[-1] is None and len(begun.history) == 1
        resumed = student_of(ALL[name], digits, teacher, checkpoint=file)
        if second == "loop":
            *_, (last,) = train_together([resumed], digits, teacher, EPOCHS, BATCH)
        else:
            last = [row for _, row in train_in_flight([InFlight(resumed, task_of(digits, teacher), called)])][-1]
        assert without_seconds(last) == without_seconds(expected[-1])
        assert_same(whole, resumed)


@pytest.mark.parametrize("recorder", [called, imitated])
def test_draws_of_a_loss_are_made_anew_in_every_replay(recorder, digits, teacher):
    """CRD draws in the step: trial and recording must take nothing from the epoch's draws, nor a resumed training."""
    assert not why_eager("crd") and "CRD" in CAPTURED
    student = student_of(ALL["CRD"], digits, teacher)
    flight, keys = InFlight(student, task_of(digits, teacher), recorder), []
    flights = [flight]
    for _ in train_in_flight(flights):
        keys.append(flight.key)
    assert keys[0] != keys[1] == keys[2]  # log Z was fixed in the first epoch: recorded anew once
    usual = student_of(ALL["CRD"], digits, teacher)
    for _ in train_together([usual], digits, teacher, EPOCHS, BATCH):
        pass
    assert torch.equal(usual.loss.generator.get_state(), student.loss.generator.get_state())


def test_students_in_parallel(digits, teacher):
    flights, alone = [], []
    for lr in (0.05, 0.1):
        flights.append(InFlight(student_of(ALL["KD"], digits, teacher, lr=lr), task_of(digits, teacher), called))
        alone.append(student_of(ALL["KD"], digits, teacher, lr=lr))
    together = [flight.student for flight in flights]
    flown = list(train_in_flight(flights))
    assert [flight.student for flight, _ in flown[:2]] == together and not flights
    for student, same in zip(alone, together):
        list(train_together([student], digits, teacher, EPOCHS, BATCH))
        assert_same(student, same)


def test_students_in_parallel_share_the_time(digits, teacher, monkeypatch):
    """Time stands still but for one second a landing: it is charged to all, not to the one that lands second."""
    flights = [InFlight(student_of(ALL["CE"], digits, teacher), task_of(digits, teacher), called) for _ in range(2)]
    now = iter(range(1, 1000))
    monkeypatch.setattr("ldrld.training.in_flight.time.perf_counter", lambda: float(next(now)))
    for flight in flights:
        flight.landed_at = 0.0
    rows = [row for _, row in train_in_flight(flights)]
    both_train = [row["seconds"] for row in rows if row["epoch"] < EPOCHS]
    assert both_train[2:] == [1.0] * (len(both_train) - 2) and sum(both_train[:2]) == 1.5


def test_a_diverged_student_does_not_stop_the_others(digits, teacher):
    good, bad = student_of(ALL["CE"], digits, teacher), student_of(ALL["CE"], digits, teacher, lr=1e8)
    flights = [InFlight(s, task_of(digits, teacher), called) for s in (bad, good)]
    rows = [(flight.student, row) for flight, row in train_in_flight(flights)]
    assert isinstance(bad.diverged, Diverged) and bad.diverged.term in ("ce", "logits") and bad.diverged.epoch == 1
    assert sum(s is good for s, _ in rows) == EPOCHS and good.diverged is None
    loop = student_of(ALL["CE"], digits, teacher, lr=1e8)
    list(train_together([loop], digits, teacher, EPOCHS, BATCH))
    assert (loop.diverged.epoch, loop.diverged.step) == (bad.diverged.epoch, bad.diverged.step)


def test_an_imitation_reads_what_lies_at_an_address():
    x = torch.ones(2)
    graph = Imitation().record(lambda: x.mul_(2))
    x.fill_(5)
    graph.replay()
    assert x.tolist() == [10, 10]
    (_, (operands, _), _) = Imitation().record(lambda: torch.zeros(2).add_(x)).calls[-1]
    assert isinstance(operands[0], Produced) and isinstance(
        operands[1], Address
    )  # x was there before, the zeros were not


@pytest.mark.parametrize("check", selfcheck.CHECKS, ids=lambda check: check.__name__)
def test_the_check_of_a_gpu_in_imitation(check, monkeypatch):
    """What `python run.py --check` does on a GPU, with small networks and imitated recordings."""
    monkeypatch.setattr(selfcheck, "IMAGES", 80)
    monkeypatch.setattr(selfcheck, "captured", imitated)
    monkeypatch.setattr(selfcheck, "NETWORK", "resnet8")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: None)
    assert check("cpu")


def test_a_check_that_fails_is_reported(monkeypatch):
    """Recordings that forget a step must not pass."""
    said = []
    monkeypatch.setattr(selfcheck, "IMAGES", 80)
    monkeypatch.setattr(selfcheck, "NETWORK", "resnet8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(selfcheck, "set_numerics", lambda device: None)
    monkeypatch.setattr(selfcheck, "captured", lambda function, *more: lambda: None)
    wrong = lambda device: selfcheck.recorded_equals_called("cpu")
    wrong.__name__ = "recorded_equals_called"
    monkeypatch.setattr(selfcheck, "CHECKS", (wrong,))
    assert not selfcheck.selfcheck(said.append) and "FAILED, AssertionError" in said[-1]
