"""What to compile, and where the packages lie; everything declarative is in pyproject.toml.

THROUGHTIME_BUILD selects what is compiled:
    auto   (default) whatever this machine can compile; the rest is left out and the reason recorded
    none   nothing: a pure Python package
    cpu    the CPU kernels, or stop with the reason
    cuda   the CPU and CUDA kernels, or stop with the reason

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

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "csrc"))

import toolchain
from toolchain import CannotBuild

PACKAGES = {
    "throughtime": "python/throughtime",
    "throughtime.bench": "bench",
    "throughtime.triton_kernels": "triton_kernels",
}

# The kernels are compiled once per instruction set, and the running processor picks one of them.
# machine: (name that the kernels get as TT_ISA, flags), smallest first
INSTRUCTION_SETS: dict[str, list[tuple[str, list[str]]]] = {
    "x86_64": [
        ("sse2", ["-march=x86-64"]),
        ("avx2", ["-march=x86-64-v3"]),
        ("avx512", ["-march=x86-64-v4"]),
    ],
    "aarch64": [("neon", [])],
}
BASELINE_SOURCES = [  # for the smallest instruction set
    "csrc/binding.cpp",
    "csrc/common/cpu.cpp",
    "csrc/common/pool.cpp",
    "csrc/common/row_order.cpp",
    "csrc/common/tensors.cpp",
    "csrc/lstm/cpu.cpp",
    "csrc/rel_lstm/cpu.cpp",
    "csrc/relevancy/cpu.cpp",
]
KERNEL_SOURCES = [  # once per instruction set, without torch's headers
    "csrc/lstm/cpu_kernels.cpp",
    "csrc/rel_lstm/cpu_kernels.cpp",
    "csrc/relevancy/cpu_kernels.cpp",
]

FLAGS = [
    "-O3",
    "-std=c++17",
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
USER_FLAGS = ("CPPFLAGS", "CFLAGS", "CXXFLAGS")

PYTHON_ABI = (3, 10)
# A free-threaded Python has no limited API: there the module serves that one Python only.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")


@dataclass
class Plan:
    """What is compiled and what is not; ends up in throughtime/_build_info.py."""

    built: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    compiler: toolchain.Compiler | None = None
    instruction_sets: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def names(self) -> str:
        return ", ".join(name for name, _ in self.instruction_sets)


def make_plan(mode: str) -> Plan:
    plan = Plan()
    if mode not in ("auto", "none", "cpu", "cuda"):
        stop(f"THROUGHTIME_BUILD must be auto, none, cpu or cuda, but is {mode!r}")
    if mode == "none":
        reason = f"THROUGHTIME_BUILD=none was set: unset it, then `{toolchain.again()}`"
        plan.left_out = {"cpu": reason, "cuda": reason}
        return plan
    if mode == "cuda":
        stop(f"THROUGHTIME_BUILD=cuda: {toolchain.why_no_cuda()}: use auto or cpu")
    plan.left_out["cuda"] = toolchain.why_no_cuda()
    try:
        plan_cpu(plan)
    except CannotBuild as reason:
        if mode == "cpu":
            stop(f"THROUGHTIME_BUILD=cpu: {reason}")
        plan.left_out["cpu"] = str(reason)
    return plan


def plan_cpu(plan: Plan) -> None:
    """Asks for all that ninja will need, so that a lack of it is known before the compiling."""
    plan.compiler = toolchain.find_compiler()
    toolchain.find_torch()
    toolchain.find_python_headers()
    toolchain.find_ninja()
    machine = toolchain.machine()
    if machine not in INSTRUCTION_SETS:
        raise CannotBuild(
            f"there are no kernels for {machine} processors, only for "
            f"{' and '.join(INSTRUCTION_SETS)}: backend='reference' runs everywhere"
        )
    for name, flags in INSTRUCTION_SETS[machine]:
        if plan.compiler.takes(["-std=c++17", *flags]):
            plan.instruction_sets.append((name, flags))
        else:
            plan.left_out[name] = (
                f"{plan.compiler.name} does not take {shlex.join(['-std=c++17', *flags])}: "
                f"use GCC 11 or Clang 12 or newer, then `{toolchain.again()}`"
            )
    if not plan.instruction_sets:
        raise CannotBuild(plan.left_out[INSTRUCTION_SETS[machine][0][0]])


def stop(sentence: str) -> None:
    raise SystemExit(f"throughtime: {sentence}.")


def user_flags() -> list[str]:
    return [word for name in USER_FLAGS for word in shlex.split(os.environ.get(name, ""))]


def objects(plan: Plan) -> list[tuple[str, str, list[str]]]:
    """(source, name, flags) of every object, in the order in which they are linked.

    The linker keeps the first of equal inline functions, so the smallest instruction set comes
    first: an inline function of the standard library must not be the AVX-512 one.
    """
    major, minor = toolchain.TORCH_AT_LEAST
    binding = [
        *(f"-DTT_HAVE_{name.upper()}" for name, _ in plan.instruction_sets),
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        *(["-DPy_LIMITED_API=0x{:02x}{:02x}0000".format(*PYTHON_ABI)] if LIMITED_API else []),
        *("-isystem", str(toolchain.find_torch().root / "include")),
        *("-isystem", str(toolchain.find_python_headers())),
    ]
    smallest = plan.instruction_sets[0][1]
    baseline = [(source, "base", [*smallest, *binding]) for source in BASELINE_SOURCES]
    kernels = [
        (source, name, [*flags, f"-DTT_ISA={name}"])
        for name, flags in plan.instruction_sets
        for source in KERNEL_SOURCES
    ]
    return baseline + kernels


def build_ninja(plan: Plan, module: str) -> str:
    """The text of build.ninja."""
    assert plan.compiler is not None

    def words(*parts: str) -> str:
        return shlex.join(parts).replace("$", "$$")

    def path(name: str | Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(name))

    bundle = ["-bundle", "-undefined", "dynamic_lookup"]
    link = [*(bundle if sys.platform == "darwin" else ["-shared"]), "-pthread"]
    libraries = [f"-L{toolchain.find_torch().root / 'lib'}", "-ltorch_cpu"]
    libraries += shlex.split(os.environ.get("LDFLAGS", ""))
    compiler = words(*plan.compiler.command)
    lines = [
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} {words(*link)} $in -o $out {words(*libraries)}",
    ]
    include = f"-I{HERE / 'csrc'}"
    outputs: list[str] = []
    # Ninja starts in this order: the widest vectors take longest, so no core waits for them.
    for source, name, flags in reversed(objects(plan)):
        outputs.insert(0, f"{Path(source).with_suffix('')}.{name}.o")
        lines += [
            f"build {outputs[0]}: compile {path(HERE / source)}",
            f"  flags = {words(*FLAGS, *flags, include, *user_flags())}",
        ]
    lines.append(f"build {module}: link {' '.join(outputs)}")
    return "\n".join(lines) + "\n"


def compile_kernels(plan: Plan) -> Path:
    """Compiles what changed since the last time; every kind of install shares the objects."""
    assert plan.compiler is not None
    folder = HERE / "build" / f"kernels-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(build_ninja(plan, "_C.so"), encoding="utf-8")
    jobs = os.environ.get("MAX_JOBS")
    command = [toolchain.find_ninja(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
    print(f"throughtime: compiling for {plan.names} with {plan.compiler.name}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode != 0:
        error = re.search(r"^.*(?:error|undefined reference).*$", done.stdout, re.MULTILINE)
        first = error[0] if error else done.stdout.splitlines()[-1]
        raise CannotBuild(
            f"{plan.compiler.name} could not compile the kernels ({first.strip()}): see all of it "
            f"by `THROUGHTIME_BUILD=cpu {toolchain.again()} --verbose`"
        )
    return folder / "_C.so"


def record(command: build_py, plan: Plan) -> None:
    """Writes throughtime/_build_info.py: pip hides what a build prints, so the package tells it."""
    in_source = command.get_package_dir("throughtime")
    folder = in_source if command.editable_mode else os.path.join(command.build_lib, "throughtime")
    compiler, flags, torch = "", "", ""
    if plan.built:
        assert plan.compiler is not None
        compiler = plan.compiler.name
        flags = shlex.join([*FLAGS, *user_flags()])
        torch = toolchain.find_torch().version
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
    ]
    Path(folder, "_build_info.py").write_text("\n".join(lines) + "\n", encoding="utf-8")


class BuildPy(build_py):
    """Copies the Python files into an empty folder and records what is left out."""

    def run(self) -> None:
        # What an earlier build left would live on: a deleted module, a _C that none has asked for.
        if self.editable_mode:
            for stale in Path(self.get_package_dir("throughtime")).glob("_C.*"):
                stale.unlink()
        else:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        record(self, PLAN)


class BuildExt(build_ext):
    """Compiles by ninja and records what came of it."""

    def build_extension(self, ext: Extension) -> None:
        try:
            module = compile_kernels(PLAN)
        except CannotBuild as reason:
            if not ext.optional:
                stop(f"THROUGHTIME_BUILD=cpu: {reason}")
            self.leave_out(str(reason))
            raise CompileError(str(reason)) from None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, target)
        PLAN.built["cpu"] = PLAN.names
        record(self.get_finalized_command("build_py"), PLAN)

    def leave_out(self, reason: str) -> None:
        """Makes the wheel, which was to hold a module, a pure one."""
        PLAN.left_out["cpu"] = reason
        record(self.get_finalized_command("build_py"), PLAN)
        self.distribution.ext_modules = []
        wheel = self.distribution.command_obj.get("bdist_wheel")
        if wheel is not None:
            wheel.root_is_pure = True


def packages() -> list[str]:
    return [
        ".".join([package, *init.parent.relative_to(HERE / folder).parts])
        for package, folder in PACKAGES.items()
        for init in sorted((HERE / folder).rglob("__init__.py"))
    ]


MODE = os.environ.get("THROUGHTIME_BUILD", "auto")
PLAN = make_plan(MODE)
KERNELS = Extension(
    "throughtime._C",
    sources=[*BASELINE_SOURCES, *KERNEL_SOURCES],
    py_limited_api=LIMITED_API,
    optional=MODE == "auto",
)
COMPILED = "cpu" not in PLAN.left_out

setup(
    packages=packages(),
    package_dir=PACKAGES,
    ext_modules=[KERNELS] if COMPILED else [],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp{}{}".format(*PYTHON_ABI)}}
    if COMPILED and LIMITED_API
    else {},
)
for part, reason in PLAN.left_out.items():
    print(f"throughtime: left out {part}: {reason}.", file=sys.stderr)
