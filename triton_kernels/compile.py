"""``python -m throughtime.triton_kernels.compile``: every kernel for every GPU, without a GPU.

Triton compiles what the launchers launch in ``sample_calls.py``, by its own launcher and so as on a
GPU; nothing runs. Prints a Markdown table of registers, shared memory and spills per kernel and
target; returns 1 if a kernel spills. For AMD, on which no kernel has run, one launch of each kernel
shows that it uses nothing of CUDA.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from throughtime.triton_kernels.common import LEAST_DEPTH
from throughtime.triton_kernels.sample_calls import sample_calls
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_90": GPUTarget("cuda", 90, 32),  # H100 and H200
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}

# Bytes of local memory per thread, by what the name of a sample holds whose sizes are no multiples
# of 16: elements are loaded one by one there, and their addresses do not all fit.
ODD = {"no option": 64, "A 25": 120, "H 19": 16}


def most_spilled(sample: str) -> int:
    """Bytes that a launch of a sample may spill; Triton before 3.8 takes no shorter products."""
    known = max((most for name, most in ODD.items() if name in sample), default=0)
    if LEAST_DEPTH == 8:
        return known
    return 288 if known else 40


class NoGpu(NamedTuple):
    """In the place of Triton's driver: a GPU that is not here."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> GPUTarget:
        """The key of what has been compiled for it."""
        return self.target

    def get_current_stream(self, device: GPUTarget) -> int:
        """Not used: nothing runs."""
        return 0


class Launch(NamedTuple):
    """One kernel, and how a launcher launches it."""

    sample: str
    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Module and function."""
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"


class Usage(NamedTuple):
    """What a kernel needs on one target."""

    launch: Launch
    target: str
    registers: int
    shared_bytes: int
    local_bytes: int

    @property
    def spills(self) -> bool:
        """Whether local memory holds more registers than known."""
        return self.local_bytes > most_spilled(self.launch.sample)


def launches() -> list[Launch]:
    """What the sample calls launch; of the steps of one call the first."""
    found: dict[tuple[str, str], Launch] = {}
    for sample, call in sample_calls(torch.device("cpu")):
        launched: list[Launch] = []

        def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
            launched.append(Launch(sample, kernel, arguments, options))  # noqa: B023

        with mock.patch.object(JITFunction, "run", run):
            call()
        for launch in launched:
            found.setdefault((sample, launch.name), launch)
    return list(found.values())


def compile_all(
    targets: Iterable[str] = tuple(TARGETS), folder: Path | None = None
) -> Iterator[Usage]:
    """Compiles every launch for every target, several at once; ptxas is a process of its own.

    ``folder`` gets Triton's GPU IR of each.
    """
    wanted = launches()
    for target in targets:
        triton.runtime.driver.set_active(NoGpu(TARGETS[target]))
        if TARGETS[target].backend == "hip":  # the first launch of each kernel
            wanted = list({launch.name: launch for launch in reversed(wanted)}.values())
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            yield from pool.map(partial(_compile, target=target, folder=folder), wanted)


def _compile(launch: Launch, target: str, folder: Path | None) -> Usage:
    try:
        compiled = launch.kernel.run(*launch.arguments, grid=None, warmup=True, **launch.options)
    except Exception as error:
        raise RuntimeError(f"{launch.name} of {launch.sample} for {target}") from error
    if folder is not None:
        name = f"{launch.name} of {launch.sample} for {target}.ttgir"
        (folder / name).write_text(compiled.asm["ttgir"], encoding="utf-8")
    resources = _of_amdgcn if TARGETS[target].backend == "hip" else _of_cubin
    registers, local = resources(compiled.asm)
    return Usage(launch, target, registers, compiled.metadata.shared, local)


def _of_amdgcn(asm: dict[str, Any]) -> tuple[int, int]:
    """Vector registers per thread, and bytes of its memory for spills and stack."""
    kinds = ("vgpr_count", "private_segment_fixed_size")
    registers, local = (re.findall(rf"\.{kind}: +(\d+)", asm["amdgcn"]) for kind in kinds)
    return int(registers[0]), int(local[0])


def _of_cubin(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers per thread, and bytes of local memory (spills, stack) of the kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if command is None:
        raise FileNotFoundError("cuobjdump is neither in Triton's package nor on PATH")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(asm["cubin"])
        text = subprocess.run(
            [command, "-res-usage", str(path)], check=True, capture_output=True, text=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        "python -m throughtime.triton_kernels.compile", description=__doc__
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--any-spills", action="store_true", help="return 0 whatever spills")
    parser.add_argument("--ir", type=Path, help="a folder that gets Triton's GPU IR of each")
    args = parser.parse_args(arguments)
    print("| kernel | sample | target | registers | shared bytes | spilled bytes |")
    print("| --- | --- | --- | --- | --- | --- |")
    spilled = []
    for usage in compile_all(args.targets, args.ir):
        cells = (usage.launch.name, usage.launch.sample, usage.target, usage.registers)
        print("|", *(f"{x} |" for x in (*cells, usage.shared_bytes, usage.local_bytes)), flush=True)
        spilled += [usage] if usage.spills else []
    for launch, target, _, _, local in spilled:
        known = most_spilled(launch.sample)
        print(f"{launch.name}, {launch.sample}, {target}: spills {local} bytes, known are {known}")
    return 1 if spilled and not args.any_spills else 0


if __name__ == "__main__":
    sys.exit(main())
