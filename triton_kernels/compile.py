"""``python -m throughtime.triton_kernels.compile``: every kernel for every GPU, without a GPU.

Prints a Markdown table of registers, shared memory and spills per kernel and target; returns 1 if a
kernel spills. For AMD, on which no kernel has run, one variant of each kernel shows that it uses
nothing of CUDA.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from throughtime.triton_kernels import lstm, rel_lstm, relevancy
from throughtime.triton_kernels.common import block
from throughtime.triton_kernels.scores import SCORES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_90": GPUTarget("cuda", 90, 32),  # H100 and H200
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}

# The types of pointers by name, where not float32.
_INTEGERS = {
    "first": "*i64",
    "ends": "*i64",
    "last": "*i64",
    "final_positions": "*i64",
    "kept_positions": "*i32",
    "kept": "*i32",
    "detached": "*i32",
    "reset": "*u8",
    "detach_mask": "*u8",
}
_SIZES = ("T", "S", "R", "W", "K", "CAPACITY", "HEADS", "D", "DV", "B", "H", "A", "t")
# Pointers of the LSTM's kernels at the dtype of sums; the others are at S, or integers.
_SUMS = ("projected", "c_0", "c_n", "cells", "grad_h", "grad_c")
_OPTIONAL = ("bias", "reset", "detach_mask", "grad_output")


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time sizes."""

    kernel: Any
    sizes: str
    constants: dict[str, Any]
    warps: int
    pointers: dict[str, str] = field(default_factory=dict)  # where not as in _INTEGERS, or float32
    aligned: bool = False  # pointers and H by 16, which the launcher tells the compiler
    odd: bool = False  # the LSTM where H is no multiple of 16

    @property
    def name(self) -> str:
        """Module and function."""
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"


@dataclass(frozen=True)
class Usage:
    """What a kernel needs on one target."""

    variant: Variant
    target: str
    registers: int
    shared_bytes: int
    local_bytes: int

    @property
    def spills(self) -> bool:
        """Whether local memory holds registers; for an odd H, more than 16 of them.

        There elements are loaded one by one, and their addresses do not all fit.
        """
        return self.local_bytes > (64 if self.variant.odd else 0)


def variants() -> list[Variant]:
    """The sizes of the benchmark (dot) and of the paper (additive)."""
    made = []
    for name, D, W, K in (("dot", 64, 64, 64), ("additive", 128, 10, 15)):
        sizes, score = f"D {D}, window {W}, top_k {K}, {name}", SCORES[name]
        common = {"SCORES": score["SCORES"], "BLOCK_D": block(D)}
        if name == "dot":
            common["weight"] = None
        parallel = {**common, "BLOCK_Q": relevancy.QUERIES}
        outputs = {"BLOCK_DV": block(D)}
        gradients = {**parallel, **score, **outputs}
        candidates = {"BLOCK_W": block(W), "BLOCK_K": block(K), "KEEP_FIRST": False}
        made += [
            Variant(kernel, sizes, constants, relevancy.warps(D))
            for kernel, constants in (
                (relevancy.window_scores, parallel),
                (relevancy.select, {**common, **candidates}),
                (relevancy.attend, {"BLOCK_Q": relevancy.QUERIES, **outputs}),
                (relevancy.query_gradient, gradients | {"BLOCK_S": relevancy.POSITIONS}),
                (relevancy.key_gradient, gradients),
            )
        ]
    for H in (128, 512):
        blocks = rel_lstm.blocks(H, H, 10, 15)
        sizes = f"H {H}, window 10, top_k 15"
        made += [
            Variant(rel_lstm.walk_forward, sizes, {**blocks, "KEEP_FIRST": False}, rel_lstm.WARPS),
            Variant(rel_lstm.walk_backward, sizes, blocks, rel_lstm.WARPS),
        ]
    return made


def lstm_variants() -> list[Variant]:
    """What ``lstm.options`` chooses: with every option, and with none for odd sizes."""
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    largest = [(half, 128), (single, 128), (double, 64), (torch.float16, 128)]
    others = [(half, 64), (half, 16), (single, 64), (double, 16)]
    stepwise = [(half, 512), (single, 512), (double, 512)]
    made = []
    for dtype, H in (*others, *largest, *stepwise):
        chosen = lstm.options(64, H, dtype, torch.device("cpu"))
        made += _lstm_passes(dtype, H, chosen, bare=False)
        if (dtype, H) in largest[:3]:
            made += _lstm_passes(dtype, H, chosen, bare=True)
    # Of a GPU whose shared memory does not hold the weights.
    chosen = lstm.options(64, 128, half, torch.device("cpu")) | {"HELD": False}
    return made + _lstm_passes(half, 128, chosen, bare=False)


def _lstm_passes(dtype: torch.dtype, H: int, chosen: dict[str, int], bare: bool) -> list[Variant]:
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, "fp64")
    way = ("held" if chosen["HELD"] else "streamed") if "HELD" in chosen else "stepwise"
    sizes = f"{name}, H {f'{H - 1} of ' if bare else ''}{H}, {way}{', no options' if bare else ''}"
    blocks: dict[str, Any] = {key: n for key, n in chosen.items() if key != "num_warps"}
    made = []
    for kernel in (
        (lstm.one_step_forward, lstm.one_step_backward)
        if way == "stepwise"
        else (lstm.walk_forward, lstm.walk_backward)
    ):
        names = kernel.arg_names
        constants = blocks | {"REVERSE": bare} | ({"SAVE": not bare} if "SAVE" in names else {})
        if bare:
            constants |= {key: None for key in _OPTIONAL if key in names}
        pointers = {key: f"*{name}" for key in names if key not in _INTEGERS}
        pointers |= dict.fromkeys(_SUMS, "*fp64" if name == "fp64" else "*fp32")
        if name == "fp64":
            pointers |= {key: "*i32" for key in ("reset", "detach_mask") if key in names}
        if dtype.itemsize == 2:
            pointers["gates"] = "*fp16"
        made.append(
            Variant(kernel, sizes, constants, chosen["num_warps"], pointers, not bare, bare)
        )
    return made


def compile_all(targets: Iterable[str] = tuple(TARGETS)) -> Iterator[Usage]:
    """Compiles every variant for every target, several at once; ptxas is a process of its own."""
    work = []
    for target in targets:
        wanted = variants() + lstm_variants()
        if TARGETS[target].backend == "hip":  # the first variant of each kernel
            wanted = list({variant.name: variant for variant in reversed(wanted)}.values())
        work += [(variant, target) for variant in wanted]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(_compile, *zip(*work, strict=True))


def _compile(variant: Variant, target: str) -> Usage:
    names = list(variant.kernel.arg_names)
    signature = _signature(variant)
    aligned = [n for n in names if signature[n].startswith("*") or n == "H"]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in variant.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned if variant.aligned},
    )
    gpu = TARGETS[target]
    compiled = triton.compile(source, target=gpu, options={"num_warps": variant.warps})
    resources = _of_amdgcn if gpu.backend == "hip" else _of_cubin
    registers, local = resources(compiled.asm)
    return Usage(variant, target, registers, compiled.metadata.shared, local)


def _signature(variant: Variant) -> dict[str, str]:
    """Types of all arguments: constants, sizes, or pointers."""

    def kind(name: str) -> str:
        if name in variant.constants:
            return "constexpr"
        if name in _SIZES:
            return "i32"
        return variant.pointers.get(name) or _INTEGERS.get(name, "*fp32")

    return {name: kind(name) for name in variant.kernel.arg_names}


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
    args = parser.parse_args(arguments)
    print("| kernel | sizes | target | registers | shared bytes | spilled bytes |")
    print("| --- | --- | --- | --- | --- | --- |")
    spilled = False
    for usage in compile_all(args.targets):
        cells = (usage.variant.name, usage.variant.sizes, usage.target, usage.registers)
        print("|", *(f"{x} |" for x in (*cells, usage.shared_bytes, usage.local_bytes)), flush=True)
        spilled = spilled or usage.spills
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
