"""Benchmarks: they run, their files are sound, what they compare is equal, and pictures follow from files. No timing is asserted."""
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

from ldrld import LDRLD, bench, bench_methods, bench_training
from ldrld.train import Student, train_together

ROOT = Path(__file__).parent.parent
COMMITTED = sorted((ROOT / "data" / "bench").glob("*/*.json"))
pytestmark = pytest.mark.xdist_group("bench")


def ldrld(*words, **env):
    return subprocess.run([sys.executable, "-c", "from ldrld.cli import main; main()", *map(str, words)], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **env})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    got = ldrld("bench", "--small", "--out", out, LDRLD_DEVICE="cpu")
    assert got.returncode == 0, got.stdout + got.stderr
    return out, got


def test_small_benchmarks_leave_files_tables_and_figures(made):
    out, got = made
    files = list((out / "data" / "bench-small").glob("*/*.json"))
    assert {f.stem for f in files} == set(bench.BENCHMARKS) and not (out / "data" / "bench").exists()
    for file in files:
        m = bench.load_measurement(file)
        assert m.scale == "small" and m.points and m.libraries["torch"] == torch.__version__
        assert all(p.q1 <= p.median <= p.q3 and min(p.values) > 0 for p in m.points if p.unit != "B")
    assert {"loss_targets.csv", "loss_memory.csv", "training_speed.csv", "method_cost.csv"} <= {p.name for p in (out / "data" / "tables" / "bench-small").iterdir()}
    assert {"92_loss_depth.svg", "94_memory.svg", "96_training_parts.svg", "98_method_cost.svg"} <= {p.name for p in (out / "figures" / "bench-small").iterdir()}
    assert "measurements: " in got.stdout and "figures: " in got.stdout
    assert "profiler_start" not in got.stderr


def test_a_measurement_is_kept_until_asked_for_again(made):
    out, _ = made
    file, = (out / "data" / "bench-small").glob("*/loss-memory.json")
    before = file.read_bytes()
    assert "measured before" in ldrld("bench", "loss-memory", "--small", "--out", out, LDRLD_DEVICE="cpu").stdout and file.read_bytes() == before
    assert ldrld("bench", "loss-memory", "--small", "--again", "--out", out, LDRLD_DEVICE="cpu").returncode == 0 and file.read_bytes() != before


@pytest.mark.parametrize(("words", "says"), [(("loss-dept",), "Did you mean 'loss-depth'"), (("--small", "--full"), "exclude each other")])
def test_a_slip_is_told(words, says, tmp_path):
    got = ldrld("bench", *words, "--out", tmp_path)
    assert got.returncode == 2 and says in got.stderr and "Traceback" not in got.stderr and not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("depth", [2, 7, 30])
def test_the_reference_is_the_loss(depth, labels):
    generator = torch.Generator().manual_seed(depth)
    z_s, z_t = (3 * torch.randn(16, 30, dtype=torch.float64, generator=generator) for _ in range(2))
    y = torch.randint(30, (16,), generator=generator) if labels else None
    z_s.requires_grad_()
    values = [loss(z_s, z_t, y) for loss in (LDRLD(depth=depth), partial(bench.reference_ldrld, depth=depth))]
    gradients = [torch.autograd.grad(v, z_s)[0] for v in values]
    # the reference multiplies by weights in single precision
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("contender", ["KD", "LDRLD, plain"])
def test_bytes_agree_with_what_the_system_sees(contender):
    """In a process of its own, where the C library gives freed memory back at once, the peak of the resident set says the same."""
    code = f"""
import gc
from ldrld.bench import peak_bytes, task
def status(key): return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
run = task({contender!r}, 64, 65536)
counted = peak_bytes(run)
run(); gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
run()
print(counted, status("VmHWM") - before)
"""
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"})
    counted, seen = map(int, got.stdout.split())
    assert abs(counted - seen) < 0.05 * counted + 2**20


def test_the_stopwatch_leaves_nothing_behind():
    before, watch = len(hooks), bench_training.Stopwatch()
    with pytest.raises(KeyError), watch.running(): raise KeyError
    assert len(hooks) == before and watch.last is None


@pytest.mark.parametrize("name", ["CE", "KD", "CTKD", "LDRLD", "USKD", "FitNet", "CRD", "FCFD", "KD, two heads", "MLKD", "partial mixup"])
def test_a_lesson_is_a_step_of_training(name, monkeypatch):
    """The terms that `train_together` reports for an epoch of one batch are those of the step that is timed."""
    monkeypatch.setattr(bench_methods, "EPOCHS", 1)
    s = bench_training.Setting(bench_methods.random_pictures(16, 16, 10), "resnet14", "resnet8", batch_size=16)
    teacher, method = bench_methods.teacher_of(s, "float32"), bench_methods.CONTENDERS[name]
    lesson = bench_methods.lesson(method, s, teacher)
    lesson.step_live()
    (network, _), loss = s.networks(), bench_methods.losses.build(method.loss, **method.args)
    member = Student(network, loss.prepare(network, teacher.teacher, lesson.batch.x[:1], s.images), lr=0.0)
    (row,), = train_together([member], s.images, teacher, epochs=1, batch_size=16)
    assert {term: total.item() / 16 for term, total in lesson.student.sums.items()} == row["terms"]


def test_small_methods_are_all_there_and_add_up(made):
    out, _ = made
    file, = (out / "data" / "bench-small").glob("*/methods.json")
    points = bench.frame(bench.load_measurement(file))
    table = bench_methods.costs(points).set_index("method")
    assert set(table.index) == set(bench_methods.CONTENDERS)
    assert (table.loc[["KD", "LDRLD", "RLD", "USKD"], "whole_times median"] == table.loc[["KD", "LDRLD", "RLD", "USKD"], "times median"]).all()
    assert (table.loc[table["asks"] == "live", "whole median"] > table.loc[table["asks"] == "live", "step median"]).all()
    assert table.loc["MLKD", "kind"] == "pictures" and set(points.loc[points["contender"] == "MLKD", "asked"]) == {32}
    assert (table.loc[["KD", "LDRLD", "AT"], "extra"] == 0).all() and (table.loc[["CRD", "FitNet", "FCFD"], "extra"] > 0).all()


@pytest.mark.parametrize("file", COMMITTED, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_committed_measurements_are_sound(file):
    m = bench.load_measurement(file)
    assert m.name == file.stem and file.parent.name == bench.machine_key(m.machine) and m.scale != "small" and m.name in bench.BENCHMARKS


def test_tables_and_figures_follow_from_the_measurements(tmp_path, monkeypatch):
    """Made again from the committed files alone, in the same words and digits."""
    if not COMMITTED: pytest.skip("nothing measured yet")
    from ldrld import batch

    shutil.copytree(ROOT / "data" / "bench", tmp_path / "data" / "bench")
    monkeypatch.setenv("LDRLD_OUT", str(tmp_path))
    outcomes = [batch.execute(f"paper/{n}.ipynb", n, {"profile": "bench"}, "bench") for n in dict.fromkeys(b.notebook for b in bench.BENCHMARKS.values())]
    assert [o.status for o in outcomes] == ["done"] * len(outcomes), outcomes
    for folder in (Path("data/tables/bench"), Path("figures/bench")):
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == sorted(p.name for p in (ROOT / folder).iterdir())
        for file in (f for f in (tmp_path / folder).iterdir() if f.suffix in (".csv", ".md", ".tex", ".svg")):
            assert file.read_text() == (ROOT / folder / file.name).read_text(), f"{folder / file.name}: run `ldrld bench`, which draws anew"


def test_ratios_of_a_table_follow_from_the_values():
    for file in COMMITTED:
        if file.stem != "loss-targets": continue
        points = bench.frame(bench.load_measurement(file))
        theirs = bench.compared(points, "KD").set_index(["contender", "batch", "threads", "labels"])["median"]
        for p in points[points["contender"] == "LDRLD"].to_dict("records"):
            kd = points[(points["contender"] == "KD") & (points[["batch", "threads", "labels"]] == pd.Series({k: p[k] for k in ("batch", "threads", "labels")})).all(axis=1)]
            expected = pd.Series(p["values"]) / pd.Series(kd["values"].iloc[0])
            assert theirs[("LDRLD", p["batch"], p["threads"], p["labels"])] == pytest.approx(expected.median())
