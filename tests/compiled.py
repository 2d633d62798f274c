"""C++ of tests, compiled in the background, once for all workers of pytest-xdist."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

_pool = ThreadPoolExecutor(os.cpu_count())
_started: dict[str, Future[Path]] = {}


def find_compiler() -> str:
    """The compiler; skips the test where there is none."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def compiled(config: Any, name: str, source: Path, flags: list[str]) -> Future[Path]:
    """The library or program of that name, which the first call begins to compile."""
    if name not in _started:
        folder = config._tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            folder = folder.parent  # of all workers
        _started[name] = _pool.submit(_compile, folder / name, source, flags)
        config.add_cleanup(lambda: _pool.shutdown(wait=False, cancel_futures=True))
    return _started[name]


def wait() -> None:
    """Until no compiler runs, for tests of how busy the machine is."""
    for each in _started.values():
        each.exception()


def _compile(path: Path, source: Path, flags: list[str]) -> Path:
    from filelock import FileLock  # a machine with a GPU may be without

    unfinished = f"{path}.part"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            # The tests that run meanwhile come first.
            command = ["nice", find_compiler(), *flags, str(source), "-o", unfinished]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
            assert done.returncode == 0, done.stderr
            os.rename(unfinished, path)
    return path
