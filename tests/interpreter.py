"""Triton kernels without a GPU: a test file in a process of its own, where every kernel runs as numpy.

Triton reads TRITON_INTERPRET once, when a kernel is made, and a kernel made so cannot be compiled: hence the process.
With another Triton than the installed one (3.6's interpreter needs a numpy before 2.4):

    pip install --no-deps --target OTHER triton==3.6.0 "numpy<2.4"
    PYTHONPATH=OTHER TRITON_INTERPRET=1 python -m pytest -n0 -m "" tests/interpreted/*.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent


def run(name, slow=False):
    """Run the tests of tests/interpreted/NAME, the slow ones or all others, under the interpreter.

    Raises: AssertionError with their report if one fails or none is there.
    """
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-m", "slow" if slow else "not slow",
         str(FOLDER / "interpreted" / name)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=FOLDER.parent, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
