"""A test that ends its process ends `make test`, which names that test."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from checkout import ROOT

pytest.importorskip("xdist")

CRASHES = """
import os

def test_crash():
    os._exit(3)

def test_after():
    pass
"""
PASSES = "def test_passes(): pass"


@pytest.mark.slow
def test_a_test_that_ends_its_process_is_named(tmp_path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    line = re.search(r"\$\(BIN\)/pytest (.*) \$\(PYTEST_ARGS\)", makefile)
    assert line is not None
    (tmp_path / "pytest.ini").write_text("[pytest]")
    for k, text in enumerate((CRASHES, *[PASSES] * 4)):
        (tmp_path / f"test_{k}.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *line[1].split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "crashed while running 'test_0.py::test_crash'" in done.stdout
