"""The `ldrld` command as people call it, in a process of its own; and the pairs of networks of the published tables."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAIRS = (  # (teacher, student)
    ("resnet56", "resnet20"),
    ("resnet32x4", "resnet8x4"),
    ("wrn_40_2", "wrn_16_2"),
    ("vgg13", "vgg8"),
    ("resnet32x4", "ShuffleV1"),
    ("resnet32x4", "ShuffleV2"),
    ("vgg13", "MobileNetV2"),
    ("ResNet50", "vgg8"),
)


def ldrld(*words, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    """Call `ldrld` on this checkout.

    words: of the command line.  cwd: folder.  env: environment variables beside those of this process; None removes
    one.
    """
    given = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **env}
    return subprocess.run(
        [sys.executable, "-c", "from ldrld.cli import main; main()", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={name: value for name, value in given.items() if value is not None},
    )
