"""The fused kernel: its cases natively on a GPU or in the interpreter, what the compiler makes of it, and doing
without it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

if torch.cuda.is_available() or INTERPRETED:
    pytest.register_assert_rewrite("kernel_cases")
    from kernel_cases import *  # noqa: F403


def python(*arguments, **variables):
    """A process of its own with the package on its path; TRITON_INTERPRET as given here, whatever it is in this one."""
    env = (
        {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(TESTS.parent)} | variables
    )
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=env, cwd=TESTS.parent, capture_output=True, text=True
    )


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="the cases ran in this process")
def test_all_cases_in_the_interpreter():
    """Triton decides when it is first imported whether it interprets, so this must not happen in the process of other
    tests."""
    ran = python(
        "-m",
        "pytest",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        TESTS / "kernel_cases.py",
        TRITON_INTERPRET="1",
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


@needs_triton
def test_compiles_for_nvidia_without_spilling(tmp_path):
    """Registers only: local memory would mean that lanes go to memory and back. The large vocabulary at small depth
    fits twice on a multiprocessor (128 registers for 2 × 256 threads), and a row whose length is a multiple of 16 is
    loaded in
    pieces of 16 bytes."""
    ran = python(TESTS / "kernel_compile.py", TRITON_CACHE_DIR=str(tmp_path))
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(ran.stdout)
    for case in (*found["loss"], found["scale"]):
        assert case["local"] == 0, case
    for case in found["loss"]:
        if case["classes"] % 4096 == 0:
            assert case["wide_loads"] > 0, case
        if case["classes"] == 131072 and case["depth"] == 7:
            assert case["registers"] <= 128, case


def test_without_triton_the_module_says_what_to_do():
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch, ldrld.losses.ldrld.triton_kernel as kernels
        assert not kernels.available()
        z = torch.zeros(1, 4)
        fuse = lambda: kernels.fused(z, z, None, torch.ones(1), torch.ones(2, 2), 4.0, {})
        for call in (fuse, lambda: kernels.scale_(z, z)):
            try: call()
            except ImportError as error: assert "pip install triton" in str(error)
            else: raise AssertionError("no error")
    """
    ran = python("-c", code)
    assert ran.returncode == 0, ran.stderr


def test_importing_ldrld_does_not_import_triton():
    ran = python(
        "-c",
        "import sys, ldrld; ldrld.LDRLD(); assert not {'triton', 'ldrld.losses.ldrld.triton_kernel'} & "
        "set(sys.modules)",
    )
    assert ran.returncode == 0, ran.stderr


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_kernel_refuses_tensors_of_the_cpu():
    code = """if True:
        import torch, ldrld.losses.ldrld.triton_kernel as kernels
        assert kernels.available()
        z = torch.zeros(1, 4)
        fuse = lambda: kernels.fused(z, z, None, torch.ones(1), torch.ones(2, 2), 4.0, {})
        for call in (fuse, lambda: kernels.scale_(z, z)):
            try: call()
            except ValueError as error: assert "must be on a CUDA device, got cpu" in str(error)
            else: raise AssertionError("no error")
    """
    ran = python("-c", code)
    assert ran.returncode == 0, ran.stderr
