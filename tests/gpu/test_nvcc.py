"""nvcc compiles the LSTM's kernels, without a GPU: registers, and nothing in local memory."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "90a", "100")
# Kernels of a dtype: tiles of samples and of held weights, forward and backward, and a step each.
# float: 1, 2 tiles, and 4 backward. 16 bits: 1, 2, and 4 forward; with held (1, 4), (1, 8), (2, 4).
INSTANCES = {"float": 2 + 3 + 2, "device::BFloat16": 6 + 5 + 2, "device::Float16": 6 + 5 + 2}
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_kernels(arch: str, scalar: str, folder: Path) -> str:
    """The output of ptxas for csrc/lstm/cuda/launch.cu."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings"]
    flags += [
        "-Xptxas",
        "-v",
        "-cubin",
        f"-arch=sm_{arch}",
        f"-DTT_SCALAR={scalar}",
        f"-I{ROOT / 'csrc'}",
    ]
    to = folder / f"{arch}-{scalar.rpartition(':')[2]}.cubin"
    command = [nvcc, *flags, str(ROOT / "csrc/lstm/cuda/launch.cu"), "-o", str(to)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """By architecture and dtype; compiled side by side."""
    folder = tmp_path_factory.mktemp("nvcc")
    pairs = list(itertools.product(ARCHITECTURES, INSTANCES))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = pool.map(lambda pair: compile_kernels(*pair, folder), pairs)
    return dict(zip(pairs, said, strict=True))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("scalar", INSTANCES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills(arch: str, scalar: str, compiled: dict[tuple[str, str], str]) -> None:
    kernels = [match.groupdict() for match in KERNEL.finditer(compiled[arch, scalar])]
    print(f"\nsm_{arch}, {scalar}: registers, stack, spilled bytes")
    for k in kernels:
        print(f"{k['registers']:>4} {k['stack']:>4} {k['stores']:>4}  {k['name']}")
    assert len(kernels) == INSTANCES[scalar]
    assert [k["name"] for k in kernels if k["stack"] + k["stores"] + k["loads"] != "000"] == []
