"""What to compile, and where the packages lie; everything declarative is in pyproject.toml.

THROUGHTIME_BUILD selects what is compiled:
    auto   (default) what this machine has compilers for; the rest is left out, the reason recorded
    none   nothing: a pure Python package
    cpu    the CPU kernels
    cuda   the CPU and CUDA kernels

What was asked for and cannot be compiled stops the installation, and so does a compiler that fails.

CUDA_HOME and TORCH_CUDA_ARCH_LIST say with what and for which GPUs (by default those of this
machine, without one 8.0, 9.0a and 10.0+PTX).
CXX, CPPFLAGS, CFLAGS, CXXFLAGS, LDFLAGS and MAX_JOBS are honoured.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "csrc"))

import ninja_file
import toolchain
from ninja_file import Module, Object
from toolchain import CannotBuild, Missing

PACKAGES = {
    "throughtime": "python/throughtime",
    "throughtime.triton_kernels": "triton_kernels",
    "throughtime_autoload": "python/throughtime_autoload",
}

# The kernels are compiled once per instruction set, and the running processor picks one of them.
# machine: (name that the kernels get as TT_ISA, flags), smallest first
INSTRUCTION_SETS: dict[str, list[tuple[str, list[str]]]] = {
    "x86_64": [
        ("sse2", ["-march=x86-64"]),
        ("avx2", ["-march=x86-64-v3"]),
        ("avx512", ["-march=x86-64-v4"]),
        ("avx512_bf16", ["-march=x86-64-v4", "-mavx512bf16"]),
        ("amx", ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DTT_AMX"]),
    ],
    "aarch64": [("neon", [])],
}
BASELINE_SOURCES = [  # for the smallest instruction set
    "csrc/binding.cpp",
    "csrc/common/cpu/call.cpp",
    "csrc/common/cpu/cpus.cpp",
    "csrc/common/cpu/isa.cpp",
    "csrc/common/cpu/pool.cpp",
    "csrc/common/cpu/pooled.cpp",
    "csrc/common/cpu/precision.cpp",
    "csrc/common/cpu/row_order.cpp",
    "csrc/common/tensors.cpp",
    "csrc/lstm/cpu/float32.cpp",
    "csrc/lstm/cpu/operators.cpp",
    "csrc/rel_lstm/cpu/operators.cpp",
    "csrc/relevancy/cpu/checks.cpp",
    "csrc/relevancy/cpu/operators.cpp",
]
KERNEL_SOURCES = [  # once per instruction set, without torch's headers
    "csrc/lstm/cpu/kernels.cpp",
    "csrc/rel_lstm/cpu/kernels.cpp",
    "csrc/relevancy/cpu/kernels.cpp",
]
CUDA_SOURCES = [  # of throughtime._C_cuda, by the C++ compiler
    "csrc/common/tensors.cpp",
    "csrc/lstm/cuda/operators.cpp",
    "csrc/lstm/cuda/gpu.cpp",
]
# For instruction sets that multiply bfloat16, which share all other kernels with AVX-512.
BFLOAT16_SETS = ["avx512_bf16", "amx"]
BFLOAT16_KERNEL_SOURCES = [
    "csrc/lstm/cpu/bfloat16_kernels.cpp",
    "csrc/rel_lstm/cpu/bfloat16_kernels.cpp",
    "csrc/relevancy/cpu/bfloat16_kernels.cpp",
]
# For those that have a matrix unit.
MATRIX_SETS = ["amx"]
MATRIX_KERNEL_SOURCES = ["csrc/lstm/cpu/split_kernels.cpp"]
# by nvcc, once per dtype, without torch's headers
CUDA_KERNEL_SOURCES = ["csrc/lstm/cuda/launch.cu"]
CUDA_SCALARS = ["float", "device::BFloat16", "device::Float16"]

FLAGS = [
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # wide vectors cross no public interface, so their changing ABI is no news
]
STANDARD = next(flag for flag in FLAGS if flag.startswith("-std="))
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "--expt-relaxed-constexpr",  # plan.h's pure functions, on both sides
    "-Werror=all-warnings",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]
INCLUDE = f"-I{HERE / 'csrc'}"
USER_FLAGS = ("CPPFLAGS", "CFLAGS", "CXXFLAGS")

SETUPTOOLS_AT_LEAST = 77  # the first that reads pyproject.toml's licence
PYTHON_ABI = (3, 10)
# A free-threaded Python has no limited API: there the module serves that one Python only.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")


@dataclass
class Plan:
    """What is compiled and what is not; ends up in throughtime/_build_info.py."""

    built: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    refusal: str = ""  # why nothing can be installed
    compiler: toolchain.Compiler | None = None
    instruction_sets: list[tuple[str, list[str]]] = field(default_factory=list)
    cuda: toolchain.Cuda | None = None

    def names(self, part: str) -> str:
        """What a part holds code for."""
        if part == "cuda":
            assert self.cuda is not None
            return ", ".join(f"sm_{name}" for name in self.cuda.architectures)
        return ", ".join(name for name, _ in self.instruction_sets)


def make_plan(mode: str) -> Plan:
    plan = Plan()
    if mode not in ("auto", "none", "cpu", "cuda"):
        stop(f"THROUGHTIME_BUILD must be auto, none, cpu or cuda, but is {mode!r}")
    for part, prepare, unasked in (
        ("cpu", plan_cpu, ["none"]),
        ("cuda", plan_cuda, ["none", "cpu"]),
    ):
        if mode in unasked:
            plan.left_out[part] = f"THROUGHTIME_BUILD={mode} was set"
        elif "cpu" in plan.left_out:  # nvcc needs a C++ compiler
            plan.left_out[part] = plan.left_out["cpu"]
        else:
            try:
                prepare(plan)
            except CannotBuild as error:
                if mode == "auto" and isinstance(error, Missing):
                    plan.left_out[part] = error.reason
                else:
                    plan.refusal = plan.refusal or refusal(part, error)
    return plan


def refusal(part: str, error: CannotBuild) -> str:
    """The sentence with which an installation stops."""
    if MODE != "auto":
        return f"THROUGHTIME_BUILD={MODE}: {error}"
    without = "a pure Python package" if part == "cpu" else "one without CUDA kernels"
    return f"{error}, or set THROUGHTIME_BUILD={'none' if part == 'cpu' else 'cpu'} for {without}"


def plan_cpu(plan: Plan) -> None:
    """Asks for all that ninja will need, so that a lack of it is known before the compiling."""
    machine = toolchain.machine()
    if machine not in INSTRUCTION_SETS:
        raise Missing(
            f"there are no kernels for {machine} processors, only for "
            f"{' and '.join(INSTRUCTION_SETS)}",
            "use such a machine",
        )
    plan.compiler = toolchain.find_compiler()
    toolchain.find_torch()
    toolchain.find_python_headers()
    toolchain.find_ninja()
    for name, flags in INSTRUCTION_SETS[machine]:
        if plan.compiler.takes([STANDARD, *flags]):
            plan.instruction_sets.append((name, flags))
        else:
            plan.left_out[name] = (
                f"{plan.compiler.name} does not take {shlex.join([STANDARD, *flags])}"
            )
    if not plan.instruction_sets:
        smallest = INSTRUCTION_SETS[machine][0][0]
        raise CannotBuild(plan.left_out[smallest], "use GCC 11 or Clang 12 or newer")


def plan_cuda(plan: Plan) -> None:
    plan.cuda = toolchain.find_cuda()


def stop(sentence: str) -> NoReturn:
    raise SystemExit(f"throughtime: {sentence}.")


def user_flags() -> list[str]:
    return [word for name in USER_FLAGS for word in shlex.split(os.environ.get(name, ""))]


def kernel_sources(name: str) -> list[str]:
    """What is compiled for an instruction set."""
    own = BFLOAT16_KERNEL_SOURCES if name in BFLOAT16_SETS else KERNEL_SOURCES
    return [*own, *(MATRIX_KERNEL_SOURCES if name in MATRIX_SETS else [])]


def cpu_module(plan: Plan) -> Module:
    """throughtime._C.

    The linker keeps the first of equal inline functions, so the smallest instruction set comes
    first: an inline function of the standard library must not be the AVX-512 one.
    """
    have = [f"-DTT_HAVE_{name.upper()}" for name, _ in plan.instruction_sets]
    baseline = [compiled(plan, source, "base", have) for source in BASELINE_SOURCES]
    kernels = [
        Object(HERE / source, name, (*FLAGS, *flags, f"-DTT_ISA={name}", INCLUDE, *user_flags()))
        for name, flags in plan.instruction_sets
        for source in kernel_sources(name)
    ]
    return Module("_C.so", (*baseline, *kernels), libraries("torch_cpu"))


def cuda_module(plan: Plan) -> Module:
    """throughtime._C_cuda: a module of its own, since a torch without CUDA cannot load it."""
    cuda = plan.cuda
    assert cuda is not None
    include = ["-DUSE_CUDA", "-isystem", str(cuda.root / "include")]  # of torch's headers too
    host = [compiled(plan, source, "cuda", include) for source in CUDA_SOURCES]
    names = f'-DTT_ARCHITECTURES="{", ".join(f"sm_{name}" for name in cuda.architectures)}"'
    kernels = []
    for source in CUDA_KERNEL_SOURCES:
        for k, scalar in enumerate(CUDA_SCALARS):
            first = ["-DTT_FIRST_SCALAR", names] if k == 0 else []
            flags = (*NVCC_FLAGS, *cuda.flags, f"-DTT_SCALAR={scalar}", *first, INCLUDE)
            kernels.append(Object(HERE / source, scalar.rpartition(":")[2], flags, "nvcc"))
    runtime = (f"-L{cuda.root / 'lib64'}", "-lcudart_static", "-ldl", "-lrt")
    return Module(
        "_C_cuda.so", (*host, *kernels), (*libraries("torch_cuda", "torch_cpu"), *runtime)
    )


def compiled(plan: Plan, source: str, name: str, flags: list[str]) -> Object:
    """A source that sees torch and Python, for the smallest instruction set."""
    major, minor = toolchain.TORCH_AT_LEAST
    binding = [
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        *(["-DPy_LIMITED_API=0x{:02x}{:02x}0000".format(*PYTHON_ABI)] if LIMITED_API else []),
        *("-isystem", str(toolchain.find_torch().root / "include")),
        *("-isystem", str(toolchain.find_python_headers())),
    ]
    smallest = plan.instruction_sets[0][1]
    return Object(
        HERE / source, name, (*FLAGS, *smallest, *flags, *binding, INCLUDE, *user_flags())
    )


def libraries(*names: str) -> tuple[str, ...]:
    folder = toolchain.find_torch().root / "lib"
    linked = [f"-l{name}" for name in names]
    return (f"-L{folder}", *linked, *shlex.split(os.environ.get("LDFLAGS", "")))


def compile_module(plan: Plan, module: Module) -> Path:
    """Compiles what changed since the last time; every kind of install shares the objects."""
    assert plan.compiler is not None
    folder = HERE / "build" / f"kernels-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = plan.cuda.nvcc if plan.cuda else "nvcc"
    file = f"{Path(module.file).stem}.ninja"
    text = ninja_file.text([module], HERE, plan.compiler.command, nvcc)
    (folder / file).write_text(text, encoding="utf-8")
    jobs = os.environ.get("MAX_JOBS")
    command = [toolchain.find_ninja(), "-C", str(folder), "-f", file]
    command += ["-j", jobs] if jobs else []
    print(f"throughtime: compiling {module.file} with {plan.compiler.name}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode != 0:
        wrong = r"^.*(?:error: |undefined reference|cannot find ).*$"
        error = re.search(wrong, done.stdout, re.MULTILINE)
        first = error[0] if error else done.stdout.splitlines()[-1]
        raise CannotBuild(
            f"{plan.compiler.name} could not compile {module.file} ({first.strip()})",
            "mend what its last lines above say",
        )
    return folder / module.file


def record(command: build_py, plan: Plan) -> None:
    """Writes throughtime/_build_info.py: pip hides what a build prints, so the package tells it."""
    in_source = command.get_package_dir("throughtime")
    folder = in_source if command.editable_mode else os.path.join(command.build_lib, "throughtime")
    compiler, flags, torch, nvcc = "", "", "", ""
    if plan.built:
        assert plan.compiler is not None
        compiler = plan.compiler.name
        flags = shlex.join([*FLAGS, *user_flags()])
        torch = toolchain.find_torch().version
    if "cuda" in plan.built and plan.cuda:
        nvcc = plan.cuda.version
    lines = [
        '"""What was compiled into this installation, and why the rest was not; by setup.py."""',
        "",
        "from __future__ import annotations",
        "",
        f"built: dict[str, str] = {plan.built!r}",
        f"left_out: dict[str, str] = {plan.left_out!r}",
        f"compiler: str = {compiler!r}",
        f"flags: str = {flags!r}",
        f"torch: str = {torch!r}",
        f"nvcc: str = {nvcc!r}",
    ]
    Path(folder, "_build_info.py").write_text("\n".join(lines) + "\n", encoding="utf-8")


class BuildPy(build_py):
    """Copies the Python files into an empty folder and records what is left out."""

    def run(self) -> None:
        if PLAN.refusal:  # here, so that metadata and sdists can be made anywhere
            stop(PLAN.refusal)
        # What an earlier build left would live on: a deleted module, a _C that none has asked for.
        if self.editable_mode:
            for stale in Path(self.get_package_dir("throughtime")).glob("_C*.so"):
                stale.unlink()
        else:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        record(self, PLAN)


class BuildExt(build_ext):
    """Compiles by ninja and records it."""

    def build_extension(self, ext: Extension) -> None:
        part = "cuda" if ext.name.endswith("_cuda") else "cpu"
        try:
            module = compile_module(PLAN, (cuda_module if part == "cuda" else cpu_module)(PLAN))
        except CannotBuild as error:
            stop(refusal(part, error))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, target)
        PLAN.built[part] = PLAN.names(part)
        record(self.get_finalized_command("build_py"), PLAN)


def packages() -> list[str]:
    return [
        ".".join([package, *init.parent.relative_to(HERE / folder).parts])
        for package, folder in PACKAGES.items()
        for init in sorted((HERE / folder).rglob("__init__.py"))
    ]


def extension(part: str, name: str, sources: list[str]) -> list[Extension]:
    """The extension that a part is built as, unless the plan leaves it out."""
    if part in PLAN.left_out:
        return []
    return [Extension(name, sources, py_limited_api=LIMITED_API)]


if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS_AT_LEAST:
    wanted = f"`pip install 'setuptools>={SETUPTOOLS_AT_LEAST}' ninja`"
    stop(
        f"setuptools {setuptools.__version__} is too old: {wanted}, then "
        f"`{toolchain.again()} --no-build-isolation`"
    )
MODE = os.environ.get("THROUGHTIME_BUILD", "auto")
PLAN = make_plan(MODE)
EXTENSIONS = [
    *extension("cpu", "throughtime._C", [*BASELINE_SOURCES, *KERNEL_SOURCES]),
    *extension("cuda", "throughtime._C_cuda", [*CUDA_SOURCES, *CUDA_KERNEL_SOURCES]),
]
# What a build leaves there names an entry point of torch's. In the root it would be found by every
# Python that runs there, and `import torch` fails in one that has not installed the package.
OPTIONS = {"egg_info": {"egg_base": "python"}}
if EXTENSIONS and LIMITED_API:
    OPTIONS["bdist_wheel"] = {"py_limited_api": "cp{}{}".format(*PYTHON_ABI)}

setup(
    packages=packages(),
    package_dir=PACKAGES,
    ext_modules=EXTENSIONS,
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    options=OPTIONS,
)
for part, reason in PLAN.left_out.items():
    print(f"throughtime: left out {part}: {reason}.", file=sys.stderr)
