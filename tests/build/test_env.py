"""``throughtime.env.report``, how to install again, and what an import does without torch."""

from __future__ import annotations

import json
import platform
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import throughtime
from checkout import ROOT
from programs import run_python
from throughtime import _ext, _install, env
from throughtime.backends import ORDER


def row(text: str, name: str) -> str:
    """What the report says in the line of that name."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"  {name}  ")]
    return line.split(name, 1)[1].strip()


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THROUGHTIME_BACKEND", "reference")
    monkeypatch.delenv("MAX_JOBS", raising=False)
    text = env.report()
    for name, value in {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "throughtime": throughtime.__version__,
        "torch threads": str(torch.get_num_threads()),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "reference": "can run",
        "cuda": f"cannot run: {_ext.why_missing('cuda')}",
        "THROUGHTIME_BACKEND": "reference",
        "MAX_JOBS": "not set (default: one per core)",
    }.items():
        assert row(text, name) == value
    assert row(text, "cpu").startswith("can" if _ext.why_missing() is None else "cannot run: ")
    assert [line.split()[0] for line in text.split("Backends\n")[1].splitlines()[:4]] == list(ORDER)


def test_missing_kernels_are_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, part in (("_missing", "cpu"), ("_missing_cuda", "cuda")):
        monkeypatch.setattr(_ext, name, "no kernels; `pip install .`")
        assert row(env.report(), part) == "cannot run: no kernels; `pip install .`"


def build_info(monkeypatch: pytest.MonkeyPatch, **names: object) -> None:
    """Let an installation record other things of its build."""
    info = ModuleType("throughtime._build_info")
    vars(info).update(names)
    monkeypatch.setitem(sys.modules, "throughtime._build_info", info)


def test_what_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"compiler": "g++ 13", "flags": "-O3", "torch": "2.13.0"}
    parts = {"built": {"cpu": "sse2, avx2"}, "left_out": {"cuda": "no toolkit"}}
    build_info(monkeypatch, **made, **parts)
    text = env.report()
    assert row(text, "built cpu") == "sse2, avx2"
    assert row(text, "left out cuda") == "no toolkit"
    assert row(text, "compiler") == "g++ 13" and row(text, "flags") == "-O3"
    monkeypatch.setitem(sys.modules, "throughtime._build_info", None)
    assert row(env.report(), "record").startswith("none: this is a source tree")


def pure_installation(monkeypatch: pytest.MonkeyPatch, **left_out: str) -> None:
    build_info(monkeypatch, left_out=left_out)
    monkeypatch.setattr(_ext, "importlib", SimpleNamespace(import_module=find_all_but_extensions))


def find_all_but_extensions(name: str) -> ModuleType:
    if "._C" in name:
        raise ModuleNotFoundError(name)
    return sys.modules[name]


def test_the_reason_for_missing_cuda_kernels_is_of_the_torch_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pure_installation(monkeypatch, cuda="torch 2.13.0+cpu was without CUDA (toolkit: /opt/cuda)")
    run = f"run {_install.again('cuda')}"
    needs = f"where there are a torch for CUDA, the CUDA toolkit and a C++ compiler, {run}"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    assert _ext._load("cuda", "throughtime._C_cuda")[1] == (
        f"torch 2.12.1+cpu is without CUDA; {needs}"
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _ext._load("cuda", "throughtime._C_cuda")[1] == (
        "the CUDA kernels are not in this installation (when it was built: torch 2.13.0+cpu was "
        f"without CUDA (toolkit: /opt/cuda)); {needs}"
    )


def test_the_reason_for_missing_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pure_installation(monkeypatch, cpu="THROUGHTIME_BUILD=none was set")
    assert _ext._load("cpu", "throughtime._C")[1] == (
        "the compiled CPU kernels are not in this installation (when it was built: "
        "THROUGHTIME_BUILD=none was set); where there are torch >= 2.10 and a C++ compiler, run "
        f"{_install.again('cpu')}"
    )


@pytest.mark.parametrize(
    "origin", ["folder", "egg-info", "folder that is gone", "git", "wheel", "index"]
)
def test_what_to_install_again(origin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = {
        "folder": {"dir_info": {}, "url": ROOT.as_uri()},
        "folder that is gone": {"dir_info": {}, "url": "file:///no/such/folder"},
        "git": {"vcs_info": {"vcs": "git"}, "url": "https://example.org/throughtime"},
        "wheel": {"archive_info": {}, "url": "file:///somewhere/throughtime-0.1.0.whl"},
    }.get(origin)
    lines = ["Changelog, https://example.org/log", "Repository, https://example.org/throughtime"]
    installed = SimpleNamespace(
        locate_file=lambda path: ROOT / "python" if origin == "egg-info" else "/site-packages",
        read_text=lambda name: json.dumps(url) if url and name == "direct_url.json" else None,
        metadata=SimpleNamespace(get_all=lambda name: lines if name == "Project-URL" else None),
    )
    monkeypatch.setattr(_install, "distribution", lambda name: installed)
    if origin in ("folder", "egg-info"):
        assert _install.source() == str(ROOT)
        assert _install.source("[bench]") == f"'{ROOT}[bench]'"
    else:
        assert _install.source() == "git+https://example.org/throughtime"
        assert _install.source("[a]") == "'throughtime[a] @ git+https://example.org/throughtime'"


def test_no_message_installs_a_name_that_no_index_has() -> None:
    files = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*"), *(ROOT / "bench").rglob("*.py")]
    files += [*(ROOT / "python").rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix != ".so"}
    wrong = r"pip install [^`\n]*\bthroughtime\b"
    assert texts and not [path for path, text in texts.items() if re.search(wrong, text)]


def test_import_without_torch_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None\nimport throughtime"
    done = run_python(code)
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: throughtime needs PyTorch 2.10 or newer; install it with: pip install torch"
    )


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
