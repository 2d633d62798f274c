"""What csrc/lstm/cuda/launch.cu asks of CUDA, and what follows a no: on a runtime of numbers."""

from __future__ import annotations

import subprocess
from pathlib import Path

from host_kernels import SOURCES, compile_program


def test_limits_are_asked_for_once_and_what_finds_no_room_is_planned_again(tmp_path: Path) -> None:
    flags = [f"-I{SOURCES / 'runtime'}", "-x", "c++", "-Wno-unused-function"]
    program = compile_program(flags, "launching.cpp", tmp_path / "launching")
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
