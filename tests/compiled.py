"""C++ that tests compile for themselves, once for all workers of pytest-xdist."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock


def find_compiler() -> str:
    """The compiler; skips the test where there is none."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def compile_once(
    factory: pytest.TempPathFactory, source: Path, flags: list[str], name: str
) -> Path:
    """The library or program that a source gives."""
    compiler = find_compiler()
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    path, unfinished = folder / name, folder / f"{name}.part"
    with FileLock(folder / f"{name}.lock"):
        if not path.exists():
            command = [compiler, *flags, str(source), "-o", str(unfinished)]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
            assert done.returncode == 0, done.stderr
            unfinished.rename(path)
    return path
