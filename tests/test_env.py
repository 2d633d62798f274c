"""``throughtime.env.report``, and what an import does without torch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import throughtime
from throughtime import _ext, env
from throughtime.backends import ORDER


def row(text: str, name: str) -> str:
    """What the report says in the line of that name."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"  {name}  ")]
    return line.split(name, 1)[1].strip()


def test_versions_and_machine() -> None:
    text = env.report()
    assert row(text, "python") == platform.python_version()
    assert row(text, "torch") == torch.__version__
    assert row(text, "throughtime") == throughtime.__version__
    assert row(text, "torch threads") == str(torch.get_num_threads())
    assert row(text, "CPU capability") == torch.backends.cpu.get_cpu_capability()


def test_backends_with_the_reason() -> None:
    text = env.report()
    assert row(text, "reference") == "can run"
    assert row(text, "cuda") == f"cannot run: {_ext.why_missing('cuda')}"
    assert row(text, "cpu").startswith("can" if _ext.why_missing() is None else "cannot run: ")
    assert [line.split()[0] for line in text.split("Backends\n")[1].splitlines()[:4]] == list(ORDER)


def test_missing_kernels_are_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, part in (("_missing", "cpu"), ("_missing_cuda", "cuda")):
        monkeypatch.setattr(_ext, name, "no kernels; `pip install .`")
        assert row(env.report(), part) == "cannot run: no kernels; `pip install .`"


def test_what_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    info = ModuleType("throughtime._build_info")
    info.built, info.left_out = {"cpu": "sse2, avx2"}, {"cuda": "no toolkit"}
    info.compiler, info.flags, info.torch = "g++ 13", "-O3", "2.13.0"
    monkeypatch.setitem(sys.modules, "throughtime._build_info", info)
    text = env.report()
    assert row(text, "built cpu") == "sse2, avx2"
    assert row(text, "left out cuda") == "no toolkit"
    assert row(text, "compiler") == "g++ 13" and row(text, "flags") == "-O3"
    monkeypatch.setitem(sys.modules, "throughtime._build_info", None)
    assert row(env.report(), "record").startswith("none: this is a source tree")


def test_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THROUGHTIME_BACKEND", "reference")
    monkeypatch.delenv("MAX_JOBS", raising=False)
    text = env.report()
    assert row(text, "THROUGHTIME_BACKEND") == "reference"
    assert row(text, "MAX_JOBS") == "not set (default: one per core)"


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
    )


def test_import_without_torch_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None\nimport throughtime"
    done = run_python(code)
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: throughtime needs PyTorch 2.10 or newer; install it with: pip install torch"
    )
    version = "from importlib.metadata import version; print(version('throughtime'))"
    assert run_python(version).stdout.strip() == throughtime.__version__


def test_import_with_a_broken_torch_shows_its_own_error() -> None:
    code = (
        "import sys, importlib.abc\n"
        "class Broken(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch': raise ModuleNotFoundError('no libc10', name='torch._C')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "import throughtime"
    )
    assert "ModuleNotFoundError: no libc10" in run_python(code).stderr
