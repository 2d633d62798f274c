"""csrc/lstm/cuda/launch.cu on a fake CUDA runtime: limits that it sets, launches refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

from host_kernels import SOURCES, compile_program


def test_limits_are_set_once_and_plans_without_room_are_made_smaller(tmp_path: Path) -> None:
    flags = [f"-I{SOURCES / 'runtime'}", "-x", "c++", "-Wno-unused-function"]
    program = compile_program(flags, "launching.cpp", tmp_path / "launching")
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
