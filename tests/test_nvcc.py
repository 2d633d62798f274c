"""What nvcc makes of the LSTM's kernels, without a GPU: registers, and nothing in local memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "90a", "100")
# Tiles of samples and of held weights. float: 1, 2, 4, none held. 16 bits, twice: forward the same
# and (1, 4), (1, 8), (2, 4); backward those but for 4. A step kernel for each pass and dtype.
INSTANCES = (3 + 3) + 2 * (6 + 5) + 3 * 2
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What ptxas says, by architecture; all compiled at once."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("nvcc")
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings"]
    running = {
        arch: subprocess.Popen(
            [nvcc, *flags, "-Xptxas", "-v", "-cubin", f"-arch=sm_{arch}", "-o",
             str(folder / f"{arch}.cubin"), str(ROOT / "csrc/lstm/kernels.cu")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for arch in ARCHITECTURES
    }  # fmt: skip
    said = {}
    for arch, compiler in running.items():
        said[arch], _ = compiler.communicate()
        assert compiler.returncode == 0, said[arch]
    return said


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills(arch: str, compiled: dict[str, str]) -> None:
    kernels = [match.groupdict() for match in KERNEL.finditer(compiled[arch])]
    print(f"\nsm_{arch}: registers, stack, spilled bytes")
    for k in kernels:
        print(f"{k['registers']:>4} {k['stack']:>4} {k['stores']:>4}  {k['name']}")
    assert len(kernels) == INSTANCES
    assert [k["name"] for k in kernels if k["stack"] + k["stores"] + k["loads"] != "000"] == []
