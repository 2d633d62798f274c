"""Nothing that reaches the package through Python or ``torch.ops`` ends the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="processes are limited as Linux does it")
def test_thousands_of_calls_end_in_results_or_in_sentences() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", "--calls", "2000", "--seed", "0"],
        cwd=Path(__file__).parents[1],
        # Triton's interpreter, which other tests run on, takes seconds for a call.
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
