"""What setup.py builds, leaves out and refuses, in temporary copies of the checkout.

The kernels are replaced by a stub of the same file names, so that a build takes seconds; that the
real ones compile is shown by every other test.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import torch

from checkout import ROOT, constant

FOLDERS = (".ci", "bench", "csrc", "python", "tests", "triton_kernels")
NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py", "*.egg-info")
BASELINE, KERNEL = (constant(f"{kind}_SOURCES", "setup.py") for kind in ("BASELINE", "KERNEL"))
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])

BINDING = """
#include <Python.h>
#include <initializer_list>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
static torch::stable::Tensor same(const torch::stable::Tensor& x) { return x; }
STABLE_TORCH_LIBRARY(throughtime_stub, m) { m.def("same(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(throughtime_stub, CPU, m) { m.impl("same", TORCH_BOX(&same)); }
extern "C" __attribute__((weak)) int kernels_sse2(), kernels_avx2(), kernels_avx512(),
    kernels_neon();
static PyObject* count(PyObject*, PyObject*) {
  long found = 0;
  for (auto kernels : {kernels_sse2, kernels_avx2, kernels_avx512, kernels_neon})
    if (kernels) found += kernels();
  return PyLong_FromLong(found);
}
static PyMethodDef methods[] = {{"count", count, METH_NOARGS, nullptr}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""
KERNELS = """
#include "stub.h"
#define NAME2(isa) @##isa
#define NAME(isa) NAME2(isa)
extern "C" int NAME(TT_ISA)() { return VALUE; }
"""


@dataclass
class Built:
    """What one run of the build backend left."""

    returncode: int
    output: str
    file: Path | None

    def names(self) -> list[str]:
        assert self.file is not None, self.output
        if self.file.suffix == ".whl":
            return zipfile.ZipFile(self.file).namelist()
        return [name.partition("/")[2] for name in tarfile.open(self.file).getnames()]

    def info(self) -> dict[str, Any]:
        """The names in throughtime/_build_info.py of a wheel."""
        assert self.file is not None, self.output
        values: dict[str, Any] = {}
        exec(zipfile.ZipFile(self.file).read("throughtime/_build_info.py"), values)
        return values

    def left_out(self, part: str) -> str:
        return str(self.info()["left_out"][part])

    def sentence(self) -> str:
        """What a refused build says: one line, after which nothing follows."""
        assert self.returncode != 0, self.output
        assert "Traceback" not in self.output
        last = self.output.strip().splitlines()[-1]
        assert re.fullmatch(r"throughtime: .+\.", last), self.output
        return last


Build = Callable[..., Built]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the checkout with stub kernels."""
    copy = tmp_path / "a copy"
    copy.mkdir()
    for entry in ROOT.iterdir():
        if entry.is_file():
            shutil.copy(entry, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=NOT_SOURCE)
    for source in BASELINE:
        (copy / source).write_text(BINDING if source.endswith("binding.cpp") else "")
    for k, source in enumerate(KERNEL):  # the binding calls the first one's
        (copy / source).write_text(KERNELS.replace("@", f"more{k}_" if k else "kernels_"))
    (copy / "csrc" / "stub.h").write_text("#define VALUE 1\n")
    return copy


@pytest.fixture
def build(checkout: Path, tmp_path: Path) -> Build:
    """Runs the build backend as pip does, in a process of its own, with no network."""

    def run(
        mode: str | None = None,
        kind: str = "wheel",
        python: str = sys.executable,
        source: Path = checkout,
        **environment: str | None,
    ) -> Built:
        variables: dict[str, str | None] = {**os.environ, "THROUGHTIME_BUILD": mode}
        for name in ("CXX", "CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDA_HOME"):
            variables[name] = None
        variables.update(environment)
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
        done = subprocess.run(
            [python, "-c", code],
            cwd=source,
            env={name: value for name, value in variables.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        files = [path for path in out.iterdir() if path.is_file()] if out.is_dir() else []
        return Built(done.returncode, done.stdout, files[0] if done.returncode == 0 else None)

    return run


class TestRefusals:
    @pytest.mark.parametrize(
        ("mode", "environment", "words"),
        [
            ("gpu", {}, ["must be auto, none, cpu or cuda, but is 'gpu'"]),
            (
                "cuda",
                {"PATH": "/none", "CXX": shutil.which("c++")},
                ["THROUGHTIME_BUILD=cuda: ", "no CUDA toolkit was found", "name it by CUDA_HOME"],
            ),
            ("cpu", {"PATH": "/none"}, ["no C++ compiler (c++, g++ or clang++) was found on PATH"]),
            *(
                (mode, {"CXX": "/no/such/c++"}, ["'/no/such/c++' cannot be run: correct CXX"])
                for mode in ("cpu", "auto", None)
            ),
        ],
    )
    def test_what_is_missing(
        self, build: Build, mode: str | None, environment: dict[str, str], words: list[str]
    ) -> None:
        said = build(mode, **environment).sentence()
        assert all(part in said for part in words), said

    @pytest.mark.parametrize("mode", ["cpu", "auto", None])
    def test_kernels_that_do_not_compile(
        self, build: Build, checkout: Path, mode: str | None
    ) -> None:
        (checkout / "csrc" / "stub.h").write_text("#error out of order\n")
        refused = build(mode)
        said = refused.sentence()
        assert "could not compile _C.so (" in said and "#error out of order" in said
        assert f"pip install --force-reinstall --no-deps --no-cache-dir '{checkout}'" in said
        assert ("or set THROUGHTIME_BUILD=none" in said) == (mode != "cpu")
        assert "FAILED: " in refused.output  # what ninja and the compiler said stands above

    def test_a_compiler_that_takes_no_flag(self, build: Build, tmp_path: Path) -> None:
        said = build("auto", CXX=old_compiler(tmp_path, "-std=c++20")).sentence()
        assert "does not take -std=c++20" in said and "use GCC 11" in said

    @pytest.mark.parametrize("kind", ["wheel", "editable"])
    def test_auto_without_torch(self, build: Build, tmp_path: Path, kind: str) -> None:
        said = build("auto", kind, **without_torch(tmp_path)).sentence()
        assert f"no torch was found in {tmp_path / 'venv'}: `pip install 'torch>=2.10'`" in said

    def test_old_setuptools(self, build: Build, tmp_path: Path) -> None:
        # As beside --no-build-isolation: a setuptools that cannot read pyproject.toml's licence.
        folder = overlay(tmp_path)
        (folder / "sitecustomize.py").write_text(
            "import setuptools; setuptools.__version__ = '65.5.0'\n"
        )
        said = build("cpu", PYTHONPATH=str(folder)).sentence()
        assert "setuptools 65.5.0 is too old: `pip install 'setuptools>=77' ninja`" in said
        assert said.endswith(" --no-build-isolation`.")


class TestPureWheel:
    def test_has_every_module_and_nothing_else(self, build: Build, checkout: Path) -> None:
        (checkout / "bench" / "results").mkdir(exist_ok=True)
        (checkout / "bench" / "results" / "notes.csv").write_text("")
        built = build("none")
        assert built.file is not None, built.output
        assert built.file.name.endswith("-py3-none-any.whl")
        assert built.info()["built"] == {}
        assert "THROUGHTIME_BUILD=none was set" in built.left_out("cpu")
        names = set(built.names())
        for folder, package in (
            ("python/throughtime", "throughtime"),
            ("python/throughtime_autoload", "throughtime_autoload"),
            ("triton_kernels", "throughtime/triton_kernels"),
        ):
            modules = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")]
            assert modules and {f"{package}/{module}" for module in modules} <= names
        others = {n for n in names if not n.endswith(".py") and ".dist-info/" not in n}
        assert others == {"throughtime/py.typed"}
        assert {name.split("/")[0].split("-")[0] for name in names} == {
            "throughtime",
            "throughtime_autoload",
        }

    def test_leaves_no_distribution_in_the_root(self, build: Build, checkout: Path) -> None:
        """A Python that runs there, and has not installed the package, imports torch."""
        assert build("none").file is not None
        assert not list(distributions(path=[str(checkout)]))
        found = [one.metadata["Name"] for one in distributions(path=[str(checkout / "python")])]
        assert found == ["throughtime"]

    def test_forgets_what_was_deleted(self, build: Build, checkout: Path) -> None:
        module = checkout / "python" / "throughtime" / "short_lived.py"
        module.write_text("")
        assert "throughtime/short_lived.py" in build("none").names()
        module.unlink()
        assert "throughtime/short_lived.py" not in build("none").names()

    def test_auto_without_compiler(self, build: Build) -> None:
        built = build("auto", PATH="/none")
        assert built.file is not None, built.output
        assert built.file.name.endswith("-py3-none-any.whl")
        reason = built.left_out("cpu")
        assert reason == "no C++ compiler (c++, g++ or clang++) was found on PATH"
        assert f"throughtime: left out cpu: {reason}." in built.output
        assert built.left_out("cuda") == reason

    def test_sdist_without_torch(self, build: Build, tmp_path: Path) -> None:
        assert build("auto", "sdist", **without_torch(tmp_path)).file is not None


def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment without torch, the build requirements laid over it as pip does."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    return {"python": python, "PYTHONPATH": str(overlay(tmp_path))}


def old_compiler(tmp_path: Path, unknown: str) -> str:
    """A compiler that fails where its arguments hold ``unknown``."""
    old = tmp_path / "old-c++"
    old.write_text(
        f'#!/bin/sh\ncase "$*" in *{unknown}*) exit 1;; esac\nexec {shutil.which("c++")} "$@"\n'
    )
    old.chmod(0o755)
    return str(old)


def overlay(tmp_path: Path) -> Path:
    """A folder with the build requirements only, as pip makes one for an isolated build."""
    folder = tmp_path / "overlay"
    folder.mkdir()
    for pattern in ("setuptools*", "_distutils_hack", "ninja*"):
        for path in SITE_PACKAGES.glob(pattern):
            (folder / path.name).symlink_to(path)
    return folder


class TestCompiledWheel:
    def test_cpu(self, build: Build, tmp_path: Path) -> None:
        built = build("cpu", CFLAGS="-DUSER_FLAG")
        assert built.file is not None, built.output
        assert "-cp310-abi3-" in built.file.name
        assert [n for n in built.names() if n.endswith(".so")] == ["throughtime/_C.abi3.so"]
        info = built.info()
        assert info["flags"].endswith(" -DUSER_FLAG")
        assert info["compiler"]
        assert info["torch"] == torch.__version__
        assert "THROUGHTIME_BUILD=cpu was set" in built.left_out("cuda")
        sets = set(info["built"]["cpu"].split(", ")) - set(constant("BFLOAT16_SETS", "setup.py"))
        assert kernels_in(built, tmp_path) == len(sets)  # the stub has none for bfloat16

    def test_compiles_again_only_what_changed(self, build: Build, checkout: Path) -> None:
        objects = len(BASELINE)
        first = build("cpu").output
        assert len(re.findall(r"^\[\d+/\d+\]", first, re.MULTILINE)) > objects
        assert "ninja: no work to do." in build("cpu").output
        (checkout / "csrc" / "stub.h").write_text("#define VALUE 2\n")
        again = re.findall(r"^\[\d+/\d+\].* -c .*$", build("cpu").output, re.MULTILINE)
        assert again
        assert all("-DTT_ISA=" in line for line in again)

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 has several kernel sets")
    def test_leaves_out_an_instruction_set_that_the_compiler_lacks(
        self, build: Build, tmp_path: Path
    ) -> None:
        built = build("cpu", CXX=old_compiler(tmp_path, "x86-64-v4"))
        assert built.info()["built"] == {"cpu": "sse2, avx2"}
        assert "does not take -std=c++20 -march=x86-64-v4" in built.left_out("avx512")
        assert kernels_in(built, tmp_path) == 2

    def test_isolated_build_finds_the_environments_torch(
        self, build: Build, tmp_path: Path
    ) -> None:
        # pip hides the environment by PYTHONPATH and a sitecustomize that takes site-packages away.
        folder = overlay(tmp_path)
        (folder / "sitecustomize.py").write_text(
            f"import sys; sys.path[:] = [p for p in sys.path if p != {str(SITE_PACKAGES)!r}]\n"
        )
        built = build("cpu", PYTHONPATH=str(folder), PYTHONNOUSERSITE="1")
        assert "cpu" in built.info()["built"], built.output

    def test_editable(self, build: Build, checkout: Path) -> None:
        package = checkout / "python" / "throughtime"
        built = build("cpu", kind="editable")
        assert built.file is not None, built.output
        assert (package / "_C.abi3.so").is_file()
        assert "built: dict[str, str] = {'cpu'" in (package / "_build_info.py").read_text()
        assert build("none", kind="editable").file is not None
        assert not (package / "_C.abi3.so").exists()
        assert "built: dict[str, str] = {}" in (package / "_build_info.py").read_text()


def kernels_in(built: Built, tmp_path: Path) -> int:
    """Loads the module of a wheel, calls its operator, and counts its kernels."""
    assert built.file is not None, built.output
    with zipfile.ZipFile(built.file) as wheel:
        wheel.extractall(tmp_path / "unpacked")
    code = (
        "import torch, _C; x = torch.arange(3.0); "
        "assert torch.equal(torch.ops.throughtime_stub.same(x), x); print(_C.count())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "unpacked" / "throughtime")},
        capture_output=True,
        text=True,
    )
    return int(answer.stdout)


def test_sdist_has_all_that_a_build_needs(build: Build, checkout: Path, tmp_path: Path) -> None:
    assert build("none", kind="editable").file is not None  # leaves a _build_info.py to be left out
    (checkout / "python" / "throughtime" / "_C.abi3.so").write_text("")
    made = build("none", kind="sdist")
    names = set(made.names())
    assert {"Makefile", "LICENSE", "CHANGELOG.md", ".ci/run", "tests/build/test_build.py"} <= names
    assert {"csrc/toolchain.py", *BASELINE, *KERNEL} <= names
    assert not [n for n in names if n.endswith((".so", ".pyc", "_build_info.py"))]
    assert made.file is not None
    with tarfile.open(made.file) as archive:
        archive.extractall(tmp_path / "sdist")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    built = build("cpu", source=unpacked)
    assert "throughtime/_C.abi3.so" in built.names()
