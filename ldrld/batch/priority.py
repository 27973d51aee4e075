"""Which runs of a batch can be finished in a given time, by measurements on the machine itself."""
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ldrld import models
from ldrld.batch.archives import MIB, Limits
from ldrld.core import paths
from ldrld.core.provenance import default_device
from ldrld.experiments.config import RunConfig, name_of
from ldrld.experiments.in_flight import SharedInputs, why_run_eager
from ldrld.experiments.students import begin_on, start
from ldrld.models.evaluation import precision_used
from ldrld.training.in_flight import InFlight
from ldrld.training.checkpoint import epochs_trained
from ldrld.training.teacher import TeacherLogits

__all__ = ["Cost", "measured_costs", "plan_by_worth", "fitting"]

MEASURING = 20.0  # seconds for all networks together
SAFETY = 1.15  # allowed factor over the measured time
CHECKPOINT = 2.2  # bytes of a checkpoint per byte of float32 parameters: weights, momentum and history


@dataclass(frozen=True)
class Cost:
    """The cost of a kind of run on this machine."""
    begin: float  # seconds before its first step
    epoch: float  # seconds per epoch, with the planned number of concurrent students
    table: float = 0.0  # seconds for its teacher's logits, paid by the teacher's first student


def kind_of(config: RunConfig) -> tuple:
    """What determines a run's cost: network, teacher, data, batch size, and the loss if it cannot be captured."""
    loss = config.loss if why_run_eager(config) else ""
    return config.model, config.teacher and name_of(config.teacher), config.dataset, config.batch_size, loss


def measured_costs(
    runs: list[tuple[RunConfig, tuple[str, ...]]],
    profile: str,  # folder of the records
    at_once: int,
    seconds: float = MEASURING,  # length of the measurement, all kinds together
) -> dict[tuple, Cost]:  # by kind of run, see `kind_of`
    """The cost of every kind of run, from some steps of concurrent students trained with cross-entropy.

    The loss is a small part of a step and a teacher's table is computed once, so students without a teacher suffice.
    """
    device = default_device()
    costs: dict[tuple, Cost] = {}
    tables: dict[str, float] = {}
    begin_on(device)
    inputs = SharedInputs(profile, device)
    kinds: dict[tuple, RunConfig] = {}
    for config, _ in runs: kinds.setdefault((config.model, config.dataset, config.batch_size), config)
    for key, config in kinds.items():
        costs[key] = _measured(config, inputs, at_once if device == "cuda" else 1, seconds / len(kinds))
    for config, _ in runs:
        if not config.teacher or name_of(config.teacher) in tables: continue
        tables[name_of(config.teacher)] = _table_seconds(config, inputs)
    of = lambda c: costs[c.model, c.dataset, c.batch_size]
    table = lambda c: tables[name_of(c.teacher)] if c.teacher else 0.0
    return {kind_of(c): Cost(of(c).begin, of(c).epoch, table(c)) for c, _ in runs}


def _measured(config: RunConfig, inputs: SharedInputs, at_once: int, seconds: float) -> Cost:
    """The cost of one network's runs, from some steps of concurrent students."""
    device, began = inputs.device, time.perf_counter()
    alone = RunConfig(**{**config.model_dump(), "loss": "ce", "loss_args": {}, "teacher": None})
    task, images, _ = inputs.task_for(alone)
    flights = []
    for _ in range(at_once):
        student = start(alone, images, device)
        student.checkpoint = None  # a trial without output
        flights.append(InFlight(student, task))
    for flight in flights: flight.advance()
    _settle(device)
    begin, handed_out, started = time.perf_counter() - began, 0, time.perf_counter()
    while time.perf_counter() - started < seconds and not flights[0].between_epochs:
        for flight in flights: flight.advance()
        handed_out += InFlight.CHUNK
        _settle(device)
    taken = time.perf_counter() - started if handed_out else begin
    step = taken / max(handed_out, InFlight.CHUNK) / at_once
    return Cost(begin / at_once, step * flights[0].steps)


def _table_seconds(config: RunConfig, inputs: SharedInputs) -> float:
    """Estimated seconds for a teacher's logits of every crop; 0 if they are computed lazily."""
    if inputs.device != "cuda" or config.teacher is None: return 0.0
    alone = RunConfig(**{**config.model_dump(), "loss": "ce", "loss_args": {}, "teacher": None})
    task, images, _ = inputs.task_for(alone)
    network = models.build(config.teacher.model, len(images.classes)).to(inputs.device)
    dtype = precision_used(config.precision, inputs.device)
    table = TeacherLogits(network, task.crops, len(images.classes), None, dtype, 4096)
    index = torch.arange(16384, device=inputs.device) % task.crops.n
    table.compute(index[:4096], torch.zeros_like(index[:4096]))  # warm-up
    _settle(inputs.device)
    started = time.perf_counter()
    table.compute(index, torch.zeros_like(index))
    _settle(inputs.device)
    return (time.perf_counter() - started) / len(index) * task.crops.n * task.crops.per_image


def _settle(device: str) -> None:
    if device == "cuda": torch.cuda.synchronize()


def checkpoint_bytes(config: RunConfig) -> float:
    """The approximate size of a run's checkpoint."""
    with torch.device("meta"): size = sum(p.numel() for p in models.build(config.model, 100).parameters())
    return 4 * size * CHECKPOINT


def fitting(
    runs: list[tuple[RunConfig, tuple[str, ...]]],  # most valuable first, teachers before their students
    seconds: float,  # time left
    costs: dict[tuple, Cost],  # by kind of run, from `measured_costs`
    done: dict[str, int],  # name -> epochs trained so far
    largest: float,  # bytes of the largest checkpoint that can be collected
) -> tuple[list, list[str]]:  # the chosen part of `runs`, one reason per run
    """The runs to start, in order, and the reasons for not starting or not finishing others.

    A run that fits is started. One that does not fit is started with the remaining time if its checkpoint can be
    collected.
    """
    chosen, reasons, left, names = [], [], seconds, {name_of(c) for c, _ in runs}
    finished: set[str] = set()
    tables: set[str] = set()
    for run in runs:
        config, name = run[0], name_of(run[0])
        if config.teacher and name_of(config.teacher) in names - finished:
            reasons.append(f"{name}: its teacher will not be finished")
            continue
        cost = costs[kind_of(config)]
        table = cost.table if config.teacher and name_of(config.teacher) not in tables else 0.0
        need = SAFETY * (cost.begin + table + cost.epoch * (config.epochs - done.get(name, 0)))
        if need <= left:
            chosen.append(run)
            finished.add(name)
            if config.teacher: tables.add(name_of(config.teacher))
            left -= need
            continue
        home = checkpoint_bytes(config) <= largest
        if home and left > table + 10 * cost.epoch and not why_run_eager(config):
            chosen.append(run)  # the remaining time goes into a checkpoint
            reasons.append(f"{name}: needs {need:.0f} s, {max(left, 0):.0f} s are left; its checkpoint is collected")
            left = 0.0
        else:
            size = checkpoint_bytes(config) / MIB
            why = "" if home else f", and its checkpoint, {size:.0f} MiB, is too large to be collected"
            reasons.append(f"{name}: needs {need:.0f} s, {max(left, 0):.0f} s are left{why}")
    return chosen, reasons


def plan_by_worth(
    runs: list[tuple[RunConfig, tuple[str, ...]]],  # most valuable first, teachers before their students
    profile: str,  # folder of the records
    seconds: float,  # time left, including measurements; infinite: all runs, and nothing is measured
    at_once: int,
    limits: Limits,  # of what can be collected
    say: Callable[[str], object],
) -> list[tuple[RunConfig, tuple[str, ...]]]:
    """The runs to start in the remaining time; reports which are not started, and why."""
    if seconds == float("inf"): return runs
    began = time.monotonic()
    costs = measured_costs(runs, profile, at_once, min(MEASURING, seconds / 10))
    for network, epoch in {(kind[0], cost.epoch): None for kind, cost in costs.items()}:
        say(f"measured: {network}, {epoch:.2f} s per epoch")
    done = {name_of(c): epochs_trained(paths.work(name_of(c)) / "checkpoint.pt") for c, _ in runs}
    room = limits.file * max(limits.files - 3, 1)
    chosen, reasons = fitting(runs, seconds - (time.monotonic() - began), costs, done, room)
    say(f"{len(chosen)} of {len(runs)} runs are begun")
    for reason in reasons: say(f"not finished here: {reason}")
    return chosen
