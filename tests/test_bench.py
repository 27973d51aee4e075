"""Benchmarks: they run, their files are sound, what they compare is equal, and images follow from files. No timing
is asserted."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

from commands import ldrld

from ldrld import LDRLD, data
from ldrld.bench import graphs, losses, measurements, methods, registered, stopwatch, training
from ldrld.data.augmentation import Crops
from ldrld.training.in_flight import InFlight
from ldrld.training.loop import Student, train_together

ROOT = Path(__file__).parent.parent
COMMITTED = sorted((ROOT / "data" / "bench").glob("*/*.json"))
pytestmark = pytest.mark.xdist_group("bench")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    got = ldrld("bench", "--small", "--out", out, LDRLD_DEVICE="cpu")
    assert got.returncode == 0, got.stdout + got.stderr
    return out, got


def test_small_benchmarks_leave_files_tables_and_figures(made):
    out, got = made
    files = list((out / "data" / "bench-small").glob("*/*.json"))
    assert {f.stem for f in files} == set(registered()) and not (out / "data" / "bench").exists()
    for file in files:
        m = measurements.load_measurement(file)
        assert m.scale == "small" and m.points and m.libraries["torch"] == torch.__version__
        assert all(p.q1 <= p.median <= p.q3 and min(p.values) > 0 for p in m.points if p.unit != "B")
    assert {"loss_targets.csv", "loss_memory.csv", "training_speed.csv", "method_cost.csv", "graphs.csv"} <= {
        p.name for p in (out / "data" / "tables" / "bench-small").iterdir()
    }
    assert {"loss_depth.svg", "memory.svg", "training_parts.svg", "graphs.svg", "method_cost.svg"} <= {
        p.name for p in (out / "figures" / "bench-small").iterdir()
    }
    assert "measurements: " in got.stdout and "figures: " in got.stdout
    assert "profiler_start" not in got.stderr


def test_a_measurement_is_kept_until_repeated(made):
    out, _ = made
    (file,) = (out / "data" / "bench-small").glob("*/loss-memory.json")
    before = file.read_bytes()
    assert (
        "measured before" in ldrld("bench", "loss-memory", "--small", "--out", out, LDRLD_DEVICE="cpu").stdout
        and file.read_bytes() == before
    )
    assert (
        ldrld("bench", "loss-memory", "--small", "--again", "--out", out, LDRLD_DEVICE="cpu").returncode == 0
        and file.read_bytes() != before
    )


@pytest.mark.parametrize(
    ("words", "says"), [(("loss-dept",), "Did you mean 'loss-depth'"), (("--small", "--full"), "exclude each other")]
)
def test_a_mistake_is_reported(words, says, tmp_path):
    got = ldrld("bench", *words, "--out", tmp_path)
    assert (
        got.returncode == 2
        and says in got.stderr
        and "Traceback" not in got.stderr
        and not list(tmp_path.rglob("*.json"))
    )


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("depth", [2, 7, 30])
def test_the_reference_is_the_loss(depth, labels):
    generator = torch.Generator().manual_seed(depth)
    z_s, z_t = (3 * torch.randn(16, 30, dtype=torch.float64, generator=generator) for _ in range(2))
    y = torch.randint(30, (16,), generator=generator) if labels else None
    z_s.requires_grad_()
    values = [loss(z_s, z_t, y) for loss in (LDRLD(depth=depth), partial(losses.reference_ldrld, depth=depth))]
    gradients = [torch.autograd.grad(v, z_s)[0] for v in values]
    # the reference multiplies by weights in single precision
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("implementation", ["KD", "LDRLD, plain"])
def test_bytes_agree_with_what_the_system_sees(implementation):
    """In a process of its own, where the C library gives freed memory back at once, the peak of the resident set says
    the same."""
    code = f"""
import gc
from ldrld.bench.losses import task
from ldrld.bench.timing import peak_bytes
def status(key): return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
run = task({implementation!r}, 64, 65536)
counted = peak_bytes(run)
run(); gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
run()
print(counted, status("VmHWM") - before)
"""
    got = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    counted, seen = map(int, got.stdout.split())
    assert abs(counted - seen) < 0.05 * counted + 2**20


def test_the_stopwatch_leaves_nothing_behind():
    before, watch = len(hooks), stopwatch.Stopwatch()
    with pytest.raises(KeyError), watch.running():
        raise KeyError
    assert len(hooks) == before and watch.last is None


@pytest.mark.parametrize(
    "name", ["CE", "KD", "CTKD", "LDRLD", "USKD", "FitNet", "CRD", "FCFD", "KD, two heads", "MLKD", "partial mixup"]
)
def test_a_lesson_is_a_step_of_training(name, monkeypatch):
    """The terms that `train_together` reports for an epoch of one batch are those of the step that is timed."""
    monkeypatch.setattr(methods, "EPOCHS", 1)
    s = training.Setting(methods.random_images(16, 16, 10), "resnet14", "resnet8", batch_size=16)
    teacher, method = methods.teacher_of(s, "float32"), methods.IMPLEMENTATIONS[name]
    lesson = methods.lesson(method, s, teacher)
    lesson.step_live()
    (network, _), loss = s.networks(), methods.losses.build(method.loss, **method.args)
    member = Student(network, loss.prepare(network, teacher.teacher, lesson.batch.x[:1], s.images), lr=0.0)
    ((row,),) = train_together([member], s.images, teacher, epochs=1, batch_size=16)
    assert {term: total.item() / 16 for term, total in lesson.student.sums.items()} == row["terms"]


def test_small_methods_are_all_there_and_add_up(made):
    out, _ = made
    (file,) = (out / "data" / "bench-small").glob("*/methods.json")
    points = measurements.frame(measurements.load_measurement(file))
    table = methods.costs(points).set_index("method")
    assert set(table.index) == set(methods.IMPLEMENTATIONS)
    assert (
        table.loc[["KD", "LDRLD", "RLD", "USKD"], "whole_times median"]
        == table.loc[["KD", "LDRLD", "RLD", "USKD"], "times median"]
    ).all()
    assert (
        table.loc[table["asks"] == "live", "whole median"] > table.loc[table["asks"] == "live", "step median"]
    ).all()
    assert table.loc["MLKD", "kind"] == "images" and set(points.loc[points["implementation"] == "MLKD", "asked"]) == {
        32
    }
    assert (table.loc[["KD", "LDRLD", "AT"], "extra"] == 0).all() and (
        table.loc[["CRD", "FitNet", "FCFD"], "extra"] > 0
    ).all()


@pytest.fixture
def setting():
    return training.Setting(
        data.load("digits"), "resnet8", "resnet8", loss="kd", batch_size=16, steps=3, rounds=2, cores=1
    )


def test_a_table_in_memory_equals_one_in_a_file(setting, tmp_path):
    """What training on a GPU reads: made before the slices, nothing queried or written in them."""
    s, (_, teacher) = setting, setting.networks()
    images = training.shortened(s.images, s.steps * s.batch_size)
    crops = Crops(images.train_images, images.mean, images.std, images.padding, images.flip)
    held, filed = (
        training.teacher_table(s, teacher, crops, torch.float32, str(tmp_path), resident) for resident in (True, False)
    )
    for table in (held, filed):
        training.compute_ahead(table, 2, s.batch_size)
    queried = held.computed
    assert held.rows is None and filed.held is None and queried > 0
    index, crop = training.draw(0, 2, crops.n, crops.per_image)
    torch.testing.assert_close(held(index, crop), filed(index, crop), rtol=1e-3, atol=1e-3)
    assert held.computed == queried


def test_ours_measures_training_with_a_table_in_memory(setting, monkeypatch):
    """As on a GPU: the slices of `ours` neither compute logits nor touch a file."""
    tables, teacher_table = [], training.teacher_table

    def resident(*arguments, resident):
        tables.append(teacher_table(*arguments, resident=True))
        return tables[-1]

    monkeypatch.setattr(training, "teacher_table", resident)
    measure = training.ours(setting, "a folder that is not there")
    queried = tables[0].computed
    assert measure() > 0 and tables[0].computed == queried


@pytest.mark.parametrize("deterministic", [True, False])
def test_numerics_are_put_back(deterministic, monkeypatch):
    """What training allows a GPU's libraries holds inside, also where that stops with an error."""
    flags = lambda: (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    before = flags()
    with pytest.raises(KeyError), training.numerics("cuda", deterministic):
        assert flags() == (False, False, deterministic, not deterministic)
        raise KeyError
    assert flags() == before
    with training.numerics("cpu"):
        assert flags() == before


def test_what_is_measured_in_flight_is_training(setting):
    """After the same number of epochs, the rows are those of the loop."""
    s, task = setting, graphs.task_of(setting)
    flights = [InFlight(Student(s.networks()[0], training.losses.build(s.loss)), task) for _ in range(3)]
    students = [flight.student for flight in flights]
    for epoch in (1, 2):
        graphs.one_epoch(flights)
        assert all(f.epoch == epoch and f.between_epochs and not f.landings for f in flights)
        assert [len(student.history) for student in students] == [epoch] * 3
    images = training.shortened(s.images, s.steps * s.batch_size)
    loop = Student(s.networks()[0], training.losses.build(s.loss))
    rows = train_together([loop], images, task.teacher, task.epochs, s.batch_size, dtype=task.dtype)
    (first,), (second,) = next(rows), next(rows)
    for student in students:
        assert [row["terms"] for row in student.history] == [first["terms"], second["terms"]]


def test_operands_are_counted_once_each():
    x, y = torch.ones(8, 4), torch.ones(8, 4)
    cases = {
        "x + y": (lambda: x + y, 3),
        "in place": (lambda: x.mul_(2), 2),
        "a view": (lambda: x.T[1:], 0),
        "an expanded row": (lambda: x[:1].expand(8, 4) + y, 2 + 1 / 8),
        "a number": (lambda: x.add(1), 2),
        "a list in place": (lambda: torch._foreach_add_([x, y], 1), 4),
        "nothing": (lambda: x[:0] + y[:0], 0),
        "a list": (lambda: torch._foreach_add([x, y], [y, x]), 6),
        "fewer rows": (lambda: x[:4] + y[:4], 1.5),
    }
    for name, (function, matrices) in cases.items():
        with graphs.Operands() as counted:
            function()
        assert counted.bytes == matrices * 4 * 32, name


def test_the_work_of_a_step_is_of_the_network_alone(setting):
    """Twice the batch is twice the arithmetic; a deeper network works more; the teacher is not counted."""
    task = graphs.task_of(setting)
    one = graphs.work_of_a_step(setting, task)
    half = graphs.work_of_a_step(training.replace(setting, batch_size=8), task)
    deeper = graphs.work_of_a_step(training.replace(setting, student="resnet14"), task)
    taught = graphs.work_of_a_step(training.replace(setting, teacher="resnet56"), task)
    assert one.flops == 2 * half.flops and one == taught
    assert deeper.flops > 1.5 * one.flops and deeper.operations > one.operations and deeper.bytes > one.bytes


def test_runs_per_hour():
    assert graphs.runs_per_hour(3600 / 187_680) == pytest.approx(1)
    lines = {
        ("usual loop", 1): (4.0, 8.0),
        ("in flight", 2): (1.0, 1.0),
        (graphs.FLOOR[0], 1): (0.5, 0.5),
        (graphs.FLOOR[1], 1): (0.25, 0.25),
    }
    pair = {"teacher": "a", "student": "b", "unit": "s/step"}
    table = graphs.compared_runs(
        pd.DataFrame([{"implementation": c, "students": n, "values": v, **pair} for (c, n), v in lines.items()])
    )
    assert table["times median"].tolist() == [1, 6, 12, 24] and table["share"].tolist() == [
        pytest.approx(1 / 12),
        0.5,
        1,
        2,
    ]
    assert table["runs median"].iloc[1] == pytest.approx(3600 / 187_680)


@pytest.mark.parametrize("file", COMMITTED, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_committed_measurements_are_sound(file):
    m = measurements.load_measurement(file)
    assert (
        m.name == file.stem
        and file.parent.name == measurements.machine_key(m.machine)
        and m.scale != "small"
        and m.name in registered()
    )


def test_tables_and_figures_follow_from_the_measurements(tmp_path, monkeypatch):
    """Made again from the committed files alone, in the same words and digits."""
    if not COMMITTED:
        pytest.skip("nothing measured yet")
    from ldrld.batch import notebooks

    shutil.copytree(ROOT / "data" / "bench", tmp_path / "data" / "bench")
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    outcomes = [
        notebooks.execute(f"paper/{n}.ipynb", n, {"profile": "bench"}, "bench")
        for n in dict.fromkeys(b.notebook for b in registered().values())
    ]
    assert [o.status for o in outcomes] == ["done"] * len(outcomes), outcomes
    for folder in (Path("data/tables/bench"), Path("figures/bench")):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == sorted(
            p.name for p in (ROOT / folder).iterdir()
        )
        for file in (f for f in (tmp_path / folder).iterdir() if f.suffix in (".csv", ".md", ".tex", ".svg")):
            assert file.read_text() == (ROOT / folder / file.name).read_text(), (
                f"{folder / file.name}: run `ldrld bench`, which draws anew"
            )


def test_ratios_of_a_table_follow_from_the_values():
    for file in COMMITTED:
        if file.stem != "loss-targets":
            continue
        points = measurements.frame(measurements.load_measurement(file))
        theirs = measurements.compared(points, "KD").set_index(["implementation", "batch", "threads", "labels"])[
            "median"
        ]
        for p in points[points["implementation"] == "LDRLD"].to_dict("records"):
            kd = points[
                (points["implementation"] == "KD")
                & (
                    points[["batch", "threads", "labels"]]
                    == pd.Series({k: p[k] for k in ("batch", "threads", "labels")})
                ).all(axis=1)
            ]
            expected = pd.Series(p["values"]) / pd.Series(kd["values"].iloc[0])
            assert theirs[("LDRLD", p["batch"], p["threads"], p["labels"])] == pytest.approx(expected.median())
