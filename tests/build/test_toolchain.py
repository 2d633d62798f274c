"""How csrc/toolchain.py finds torch, the compiler and the CUDA toolkit, and what it says if not."""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

from checkout import ROOT

REPOSITORY = "https://github.com/throughtime/throughtime"


@pytest.fixture
def toolchain() -> ModuleType:
    """csrc/toolchain.py, freshly imported."""
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "csrc" / "toolchain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toolchain"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    del sys.modules["toolchain"]
    return module


@pytest.mark.parametrize(
    ("folder", "gone"),
    [
        ("pip-req-build-a1b2", True),
        ("pip-install-a1b2/throughtime_c3", True),
        ("build-via-sdist-a1b2/throughtime-0.2.0", True),
        ("work/throughtime", False),
    ],
)
def test_what_to_install_again(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: str, gone: bool
) -> None:
    """A checkout is named, also in a temporary folder; what an installer unpacked is not."""
    root = Path(tempfile.gettempdir()) / folder
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    monkeypatch.setattr(toolchain, "ROOT", root)
    monkeypatch.setattr(Path, "read_text", lambda *args, **options: text)
    assert toolchain.again().endswith(f"git+{REPOSITORY}" if gone else str(root))


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("version", "headers", "wanted"),
    [
        ("__version__ = '2.9.1+cu128'", True, r"torch 2\.9\.1\+cu128 in .* is older than 2.10"),
        ("__version__ = '2.10.0'", False, r"has no C\+\+ headers"),
        ("git_version = 'abc'", True, "names no version"),
        ("__version__ = '2.13.0'\ncuda: Optional[str] = None", True, ("2.13.0", None)),
        ("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'", True, ("2.13.0", "13.0")),
    ],
)
def test_torch_is_read_without_an_import(
    toolchain: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    version: str,
    headers: bool,
    wanted: str | tuple[str, str | None],
) -> None:
    header = tmp_path / "include" / "torch" / "csrc" / "stable" / "library.h"
    header.parent.mkdir(parents=True)
    if headers:
        header.touch()
    (tmp_path / "version.py").write_text(f"{version}\nhip: Optional[str] = '7'\n")
    monkeypatch.setattr(toolchain, "torch_folder", lambda: tmp_path)
    if isinstance(wanted, tuple):
        assert toolchain.find_torch() == toolchain.Torch(tmp_path, *wanted)
        return
    with pytest.raises(toolchain.CannotBuild, match=wanted):
        toolchain.find_torch()


def test_cuda_toolkit_behind_a_wrapper(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = script(
        tmp_path / "cuda-13.0" / "bin" / "nvcc",
        f"echo '#$ _HERE_={tmp_path}/cuda-13.0/bin' >&2",
    )
    script(tmp_path / "bin" / "nvcc", f'exec {real} "$@"')
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert toolchain.cuda_toolkit() is None  # no runtime library beside it yet
    (tmp_path / "cuda-13.0" / "lib64").mkdir()
    (tmp_path / "cuda-13.0" / "lib64" / "libcudart.so").touch()
    assert toolchain.cuda_toolkit() == tmp_path / "cuda-13.0"
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda-13.0"))
    assert toolchain.cuda_toolkit() == tmp_path / "cuda-13.0"


def test_missing_python_headers(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(toolchain.CannotBuild, match="Python's C headers are missing"):
        toolchain.find_python_headers()


def test_macros_of_torch_are_those_of_the_oldest() -> None:
    # Newer headers hide functions that TORCH_TARGET_VERSION does not have, but no macros.
    oldest = {"STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK", "TORCH_ABI_VERSION", "TORCH_BOX"}
    oldest |= {"TORCH_ERROR_CODE_CHECK", "TORCH_SUCCESS"}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu")]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    used = set(re.findall(r"\b(?:[A-Z]+_)?TORCH_[A-Z_]+\b", text)) - {"TORCH_CUDA_ARCH_LIST"}
    assert "STABLE_TORCH_LIBRARY_IMPL" in used
    assert used <= oldest  # one more? see that torch 2.10 has it: make test-versions


def test_windows(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.sys, "platform", "win32")
    with pytest.raises(toolchain.CannotBuild, match="MSVC does not have"):
        toolchain.find_compiler()
