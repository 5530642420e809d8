"""What runs on the CPU runs on another device, with its backward in a thread and its random numbers drawn there.

Where there is no GPU, it is the accelerator of `accelerator.cpp`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.accelerator.device import COMPILER

HERE = Path(__file__).parent
# that make their tensors by torch's default device
ELSEWHERE = ("training/test_traps.py", "training/test_backward.py")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    return tmp_path_factory.mktemp("library") / "accelerator.so"  # which the first run builds


def run(library, tests, **environment):
    command = [sys.executable, "-m", "pytest", "-p", "tests.accelerator.device", "-p", "no:cacheprovider", *tests]
    given = {**os.environ, "ACCELERATOR_LIBRARY": str(library), **environment}
    done = subprocess.run(command, env=given, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_parts_of_the_library_work_on_a_device_without_float64(library):
    run(library, [str(HERE / "on_the_accelerator.py")])


def test_tests_of_other_parts_pass_on_it(library):
    run(library, [f"tests/{name}" for name in ELSEWHERE], ACCELERATOR="default")
