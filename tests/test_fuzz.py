"""Nothing that reaches the package through Python or ``torch.ops`` ends the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="processes are limited as Linux does it")
def test_thousands_of_calls_end_in_results_or_in_sentences() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", "--calls", "2000", "--seed", "0"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
