"""torchvision imports beside a torch that its extension was not built for, and only that error is handled."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python(code, *folders):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": ":".join(map(str, (*folders, ROOT)))},
    )


def test_what_the_project_uses_works():
    got = python(
        "from ldrld.core.torchvision import torchvision as t; t.transforms.RandomCrop(4); t.datasets.CIFAR100; "
        "t.utils.make_grid; print(t.__version__)"
    )
    assert got.returncode == 0, got.stderr


def test_another_error_passes_through(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('something else is wrong')")
    got = python("import ldrld.core.torchvision", tmp_path)
    assert "something else is wrong" in got.stderr


def test_a_matching_torchvision_is_unchanged(tmp_path):
    (tmp_path / "torchvision.py").write_text("__version__ = 'stand-in'")
    got = python(
        "import ldrld.core.torchvision as v; assert v.torchvision.__version__ == 'stand-in' and v._schemas is None",
        tmp_path,
    )
    assert got.returncode == 0, got.stderr
