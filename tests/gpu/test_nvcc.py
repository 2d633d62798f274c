"""nvcc compiles the LSTM's kernels and bench/gpu/latency.cu, without a GPU; nothing is spilled."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.timeout(900)  # the first test waits for the compiler

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "90a", "100")
# Kernels of a dtype: tiles of samples and of held weights, forward and backward, each in a cluster
# and in a grid; and a step each. float: 1, 2, with held (1, 4). 16 bits: 1, 2, and 4 forward; with
# held (1, 4), (1, 8), (2, 4). Without a dtype: latency.cu.
OF_16_BITS = 2 * (6 + 5) + 2
INSTANCES = {
    "float": 2 * (3 + 3) + 2,
    "device::BFloat16": OF_16_BITS,
    "device::Float16": OF_16_BITS,
    "": 10,
}
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


Cubins = dict[tuple[str, str], tuple[Path, str]]


def nvcc(scalar: str, to: Path, *flags: str) -> str:
    """What nvcc says to csrc/lstm/cuda/launch.cu with that dtype, without one to latency.cu."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    source = ROOT / ("csrc/lstm/cuda/launch.cu" if scalar else "bench/gpu/latency.cu")
    command = ["nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings"]
    command += [*flags, *([f"-DTT_SCALAR={scalar}"] if scalar else []), f"-I{ROOT / 'csrc'}"]
    command += [str(source), "-o", str(to)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Cubins:
    """By architecture and dtype the cubin and the output of ptxas; compiled side by side."""
    folder = tmp_path_factory.mktemp("nvcc")

    def compile_kernels(pair: tuple[str, str]) -> tuple[Path, str]:
        arch, scalar = pair
        to = folder / f"{arch}-{scalar.rpartition(':')[2]}.cubin"
        return to, nvcc(scalar, to, "-Xptxas", "-v", "-cubin", f"-arch=sm_{arch}")

    pairs = list(itertools.product(ARCHITECTURES, INSTANCES))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(pairs, pool.map(compile_kernels, pairs), strict=True))


@pytest.mark.parametrize("scalar", INSTANCES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills(arch: str, scalar: str, compiled: Cubins) -> None:
    kernels = [match.groupdict() for match in KERNEL.finditer(compiled[arch, scalar][1])]
    print(f"\nsm_{arch}, {scalar}: registers, stack, spilled bytes")
    for k in kernels:
        print(f"{k['registers']:>4} {k['stack']:>4} {k['stores']:>4}  {k['name']}")
    assert len(kernels) == INSTANCES[scalar]
    assert [k["name"] for k in kernels if k["stack"] + k["stores"] + k["loads"] != "000"] == []


# Kernel, instruction, how many at least: what is measured has to be left by the compiler.
MEASURED = (
    ("latency3fma", "FFMA", 64),
    ("latency3mmaILi4E", "HMMA", 4),
    ("latency3mmaILi1E", "HMMA", 1),
    ("latency4readILb0E", "LDG.E.128", 8),
    ("latency4readILb1E", "LDS.128", 8),
    ("latency5chase", "LDG.E", 1),
    ("latency9pointwise", "MUFU.TANH", 4),
    ("latency8exchangeINS_6device5Words", "STAS", 1),
    ("latency8exchangeINS_6device5Words", "SYNCS.PHASECHK", 1),
    ("latency8exchangeINS_6device5Words", "REDG", 1),
    ("latency8exchangeINS_6device5Words", "BAR.SYNC", 3),
)


@pytest.fixture(scope="module")
def disassembled(compiled: Cubins, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a dtype and an architecture, the instructions of each kernel by their addresses."""
    triton = find_spec("triton")
    beside = Path(triton.origin).parent if triton and triton.origin else Path()
    cuobjdump = shutil.which("cuobjdump", path=str(beside / "backends/nvidia/bin"))
    cuobjdump = shutil.which("cuobjdump") or cuobjdump
    if cuobjdump is None:
        pytest.skip("cuobjdump is not installed, nor Triton, which has one")

    @functools.cache
    def of(scalar: str, arch: str = "90a") -> dict[str, dict[int, str]]:
        command = [cuobjdump, "-sass", str(compiled[arch, scalar][0])]
        functions = subprocess.check_output(command, text=True).split("Function : ")[1:]
        line = re.compile(r"/\*([0-9a-f]+)\*/ +(?:@!?U?P\w+ +)?([^;]+);")
        return {
            body.split("\n")[0].strip(): {int(at, 16): x for at, x in line.findall(body)}
            for body in functions
        }

    return of


def test_latency_measures_what_it_names(disassembled: Any) -> None:
    for kernel, instruction, least in MEASURED:
        (code,) = [code for name, code in disassembled("").items() if kernel in name]
        found = sum(x.startswith(instruction) for x in code.values())
        assert found >= least, (kernel, instruction)


def loops(code: dict[int, str]) -> list[range]:
    """The addresses of each loop, the longest first."""
    found = []
    for at, instruction in code.items():
        back = re.match(r"BRA.* 0x([0-9a-f]+)", instruction)
        if back and int(back[1], 16) < at:
            found.append(range(int(back[1], 16), at + 1))
    return sorted(found, key=len, reverse=True)


LOADS = ("LDG", "LD.E")  # of global memory, known as such to the compiler or not
POLL = "LDG.E.STRONG.GPU"  # of the grid's counter; what a grid exchanges is loaded by 8 or 16 bytes


@pytest.mark.parametrize("scalar", [scalar for scalar in INSTANCES if scalar])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_step_waits_for_nothing_that_it_could_have_before(
    arch: str, scalar: str, disassembled: Any
) -> None:
    """What was once in the machine code, and slow on a GPU, does not come back."""
    code_of = disassembled(scalar, arch)
    walks = {name: code for name, code in code_of.items() if "lstm_walk" in name}
    assert len(walks) == INSTANCES[scalar] - 2
    for name, code in walks.items():
        step, within = step_of(code)
        assert not any(x.startswith("MEMBAR.SC") for x in code.values()), f"{name}: a fence"
        assert not any(x.startswith("I2F") for x in step), f"{name}: a division in each step"
        emptied = any(x.startswith("CCTL.IVALL") for x in step)
        assert not emptied or "ELb1E" in name, f"{name}: L1 is emptied without a grid"
        if "forward" in name:
            product = max(k for k, x in enumerate(step) if x.startswith("HMMA"))
            cell = next(k for k, x in enumerate(step) if k > product and x.startswith("MUFU"))
            loads = [x for x in step[product:cell] if x.startswith(LOADS)]
            assert not loads, f"{name}: the nonlinearity waits for {loads}"
        for loop in within:
            loads = [x for x in loop if x.startswith(LOADS) and x.split()[0] != POLL]
            assert len(loads) not in (1, 2, 3), f"{name}: {len(loads)} loads in flight"


def step_of(code: dict[int, str]) -> tuple[list[str], list[list[str]]]:
    """The instructions of a step of a walk, and of each loop within."""
    everywhere = loops(code)
    step = next(x for x in everywhere if any("HMMA" in code.get(at, "") for at in x))
    inner = [x for x in everywhere if x[0] > step[0] and x[-1] < step[-1]]
    step_code, *of_inner = ([code[at] for at in x if at in code] for x in (step, *inner))
    return step_code, of_inner


def walk_of(name: str) -> tuple[bool, int, int, bool]:
    """Whether it goes backward, tiles of samples and of weights in registers, whether by a grid."""
    found = re.search(r"Li(\d)ELi(\d)ELb(\d)", name)
    assert found is not None, name
    return "backward" in name, int(found[1]), int(found[2]), found[3] == "1"


@pytest.mark.parametrize("scalar", [scalar for scalar in INSTANCES if scalar])
def test_a_product_takes_what_the_plan_counts(
    scalar: str, disassembled: Any, kernels: ModuleType
) -> None:
    """mma and bytes of shared memory, in the loop over the tiles of weights that lie there."""
    size, seen = 4 if scalar == "float" else 2, 0
    for name, code in disassembled(scalar).items():
        if "walk_forward" not in name:
            continue
        _, samples, _, _ = walk_of(name)
        bytes_of_tile = kernels.tile_weight_bytes(size) + samples * kernels.tile_sample_bytes(size)
        for loop in step_of(code)[1]:
            products = sum(x.startswith("HMMA") for x in loop)
            if not products:
                continue
            tiles, rest = divmod(512 * sum(x.startswith("LDS.128") for x in loop), bytes_of_tile)
            counted = [kernels.tile_mma(size, split) * samples * tiles for split in (False, True)]
            assert tiles > 0 and rest == 0 and products in counted, (name, tiles, rest, products)
            seen += 1
    assert seen >= INSTANCES[scalar] // 4


# csrc/lstm/README.md; another nvcc may make some more or fewer of them.
INSTRUCTIONS_MARGIN = 0.15


def test_the_readme_counts_the_instructions_of_a_step(disassembled: Any) -> None:
    counted = []
    for scalar in ("device::BFloat16", "device::Float16", "float"):
        of: dict[tuple[bool, bool], int] = {}
        for name, code in disassembled(scalar).items():
            if "lstm_walk" in name:
                backward, samples, held, grid = walk_of(name)
                if samples == 1 and held == 4:
                    of[backward, grid] = len(step_of(code)[0])
        counted.append([of[False, False], of[False, True], of[True, False], of[True, True]])
    print(counted)
    text = (ROOT / "csrc/lstm/README.md").read_text("utf-8")
    table = text.partition("| instructions of a step")[2].partition("\n\n")[0].splitlines()[2:]
    told = [[int(x.replace(",", "")) for x in row.split("|")[2:-1]] for row in table]
    assert [len(row) for row in told] == [4, 4, 4]
    for found, written in zip(counted, told, strict=True):
        for now, then in zip(found, written, strict=True):
            assert abs(now - then) <= INSTRUCTIONS_MARGIN * then, (counted, told)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_latency_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    program = tmp_path / "latency"
    nvcc("", program, "-arch=sm_80")
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode == 1 and not ran.stdout
    assert ran.stderr.startswith("latency: needs an NVIDIA GPU, and there is none")
