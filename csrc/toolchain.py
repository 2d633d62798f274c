"""What this machine has to compile with; setup.py asks. Everything here ends in CannotBuild if not.

torch is read, never imported: LibTorch's stable ABI needs its headers and libtorch_cpu only, and a
build must not depend on the Python side of torch.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

TORCH_AT_LEAST = (2, 10)  # the first LibTorch whose stable ABI has all that the binding calls
ROOT = Path(__file__).resolve().parent.parent


class CannotBuild(Exception):
    """Why a part cannot be compiled here; ``str()`` is one sentence with the way out."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}: {remedy}, then `{again()}`")
        self.reason = reason


class Missing(CannotBuild):
    """There is nothing to compile with, or nothing to compile for."""


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str
    cuda: str | None


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    name: str

    def takes(self, flags: list[str]) -> bool:
        return output_of([*self.command, *flags, "-E", "-x", "c++", os.devnull]) is not None


def output_of(
    command: list[str], env: dict[str, str] | None = None, cwd: str | None = None
) -> str | None:
    """What a command prints, or None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    except OSError:
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None


def again() -> str:
    """The command that repeats this installation; what pip or build unpacked is gone by then."""
    source = shlex.quote(str(ROOT))
    made = ("pip-req-build-", "pip-install-", "build-via-sdist-")
    if any(part.startswith(made) for part in ROOT.parts):
        metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        address = re.search(r'^Repository = "(.+)"$', metadata, re.MULTILINE)
        assert address is not None
        source = f"git+{address[1]}"
    return f"pip install --force-reinstall --no-deps --no-cache-dir {source}"


def torch_folder() -> Path | None:
    """Where torch is installed.

    Under build isolation pip hides the target environment by PYTHONPATH and PYTHONNOUSERSITE, but
    the interpreter is still that of the environment: started without the two it sees torch again.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    hiding = ("PYTHONPATH", "PYTHONNOUSERSITE")
    question = (
        "from importlib.util import find_spec; "
        "print('torch:', getattr(find_spec('torch'), 'origin', None))"
    )
    answer = output_of(
        [sys.executable, "-c", question],
        env={name: value for name, value in os.environ.items() if name not in hiding},
        cwd=sys.prefix,
    )
    origin = re.search(r"^torch: (.+)$", answer or "", re.MULTILINE)
    return Path(origin[1]).parent if origin and Path(origin[1]).is_file() else None


@functools.cache
def find_torch() -> Torch:
    root = torch_folder()
    wanted = ".".join(map(str, TORCH_AT_LEAST))
    if root is None:
        raise CannotBuild(
            f"no torch was found in {sys.prefix}",
            f"`pip install 'torch>={wanted}'` (an installer that builds elsewhere needs "
            "--no-build-isolation to see it)",
        )
    text = (root / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", text, re.MULTILINE)
    if version is None:
        raise CannotBuild(f"{root}/version.py names no version", "reinstall torch")
    if (int(version[2]), int(version[3])) < TORCH_AT_LEAST:
        raise CannotBuild(
            f"torch {version[1]} in {root} is older than {wanted}",
            f"`pip install 'torch>={wanted}'`",
        )
    if not (root / "include/torch/csrc/stable/library.h").is_file():
        raise CannotBuild(f"torch in {root} has no C++ headers", "reinstall torch")
    cuda = re.search(r"^cuda(?::[^=]*)? = ['\"]([^'\"]+)", text, re.MULTILINE)
    return Torch(root, version[1], cuda[1] if cuda else None)


def find_compiler() -> Compiler:
    if sys.platform == "win32":
        raise Missing(
            "the kernels use vector extensions of GCC and Clang that MSVC does not have",
            "use Linux, macOS or WSL",
        )
    command = shlex.split(os.environ.get("CXX", ""))
    if not command:
        found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        if found is None:
            raise Missing(
                "no C++ compiler (c++, g++ or clang++) was found on PATH",
                "install one or name it by CXX",
            )
        command = [found]
    greeting = output_of([*command, "--version"])
    if not greeting:
        raise CannotBuild(
            f"the C++ compiler {shlex.join(command)!r} cannot be run", "correct CXX or PATH"
        )
    return Compiler(tuple(command), greeting.splitlines()[0].strip())


def find_python_headers() -> Path:
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").is_file():
        raise CannotBuild(
            f"Python's C headers are missing ({folder / 'Python.h'})",
            "install them (the system's package python3-dev or python3-devel)",
        )
    return folder


def find_ninja() -> str:
    """The ninja of the build requirements, which need not be on PATH, else the system's."""
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja

        beside = Path(ninja.BIN_DIR, "ninja")
        if beside.is_file():
            return str(beside)
    found = shutil.which("ninja")
    if found is None:
        raise CannotBuild("ninja is missing", "`pip install ninja`")
    return found


def machine() -> str:
    """The processor family, by one name on every system."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


@dataclass(frozen=True)
class Cuda:
    """A toolkit and what it compiles for."""

    root: Path
    version: str
    architectures: tuple[str, ...]  # "90a": code for that GPU; "100+PTX": for later ones too

    @property
    def nvcc(self) -> str:
        return str(self.root / "bin" / "nvcc")

    @property
    def flags(self) -> list[str]:
        """Of nvcc, for all architectures."""
        flags = []
        for name in self.architectures:
            number = name.removesuffix("+PTX")
            kinds = ["sm", "compute"] if name.endswith("+PTX") else ["sm"]
            codes = ",".join(f"{kind}_{number}" for kind in kinds)
            flags.append(f"-gencode=arch=compute_{number},code=[{codes}]")
        return flags


def cuda_toolkit() -> Path | None:
    """The toolkit that nvcc really runs: the nvcc on PATH may be a script in another folder."""
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home, "bin", "nvcc")) if home else "nvcc"
    told = output_of([nvcc, "--dryrun", "none.cu"])
    folder = re.search(r"^#\$ _HERE_=(.+)$", told or "", re.MULTILINE)
    if folder is None:
        return None
    toolkit = Path(folder[1].strip()).resolve().parent
    return toolkit if any(toolkit.glob("lib64/libcudart*")) else None


def find_cuda() -> Cuda:
    """The CUDA toolkit, a torch with CUDA beside it, and the architectures to compile for."""
    toolkit = cuda_toolkit()
    if toolkit is None:
        raise Missing(
            "no CUDA toolkit was found (by CUDA_HOME or nvcc on PATH)",
            "install one or name it by CUDA_HOME",
        )
    torch = find_torch()
    if torch.cuda is None:
        raise Missing(
            f"torch {torch.version} was without CUDA (toolkit: {toolkit})",
            "install a torch for CUDA",
        )
    if not any((toolkit / "lib64").glob("libcudart_static*")):
        raise CannotBuild(
            f"the CUDA toolkit in {toolkit} has no libcudart_static",
            "install its development files",
        )
    nvcc = str(toolkit / "bin" / "nvcc")
    version = re.search(r"release ([\d.]+)", output_of([nvcc, "--version"]) or "")
    known = re.findall(r"compute_(\d+)", output_of([nvcc, "--list-gpu-arch"]) or "")
    if version is None or not known:
        raise CannotBuild(f"{nvcc} cannot be run", "mend the CUDA toolkit")
    return Cuda(toolkit, version[1], architectures(known))


def architectures(known: list[str]) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST, or that of the GPUs here, or all that the kernels are made for.

    Args:
        known: what the toolkit can compile for, as in ``["80", "90", "100"]``.
    """
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if named:
        return tuple(_architecture(name, known) for name in named)
    told = output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]) or ""
    present = {number.replace(".", "") for number in re.findall(r"^\s*(\d+\.\d)\s*$", told, re.M)}
    if present and all(int(number) >= 80 and number in known for number in present):
        return tuple(sorted(("90a" if number == "90" else number for number in present), key=len))
    made_for = [number for number in ("80", "90", "100") if number in known]
    if not made_for:
        raise CannotBuild(
            f"this CUDA toolkit compiles for {', '.join(known)}, not for 80, 90 or 100",
            "install CUDA 12 or later",
        )
    names = ["90a" if number == "90" else number for number in made_for]
    return (*names[:-1], f"{made_for[-1]}+PTX")


def _architecture(name: str, known: list[str]) -> str:
    found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
    if found is None or found[1] + found[2] not in known or int(found[1]) < 8:
        raise CannotBuild(
            "TORCH_CUDA_ARCH_LIST should name architectures from 8.0 on that this toolkit knows "
            f"({', '.join(known)}), as in '8.0;9.0a;10.0+PTX', got {name!r}",
            "correct it",
        )
    return found[1] + found[2] + found[3] + (found[4] or "")
