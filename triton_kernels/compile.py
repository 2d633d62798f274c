"""``python -m throughtime.triton_kernels.compile``: every kernel as a cubin, without a GPU.

Prints a Markdown table of registers, shared memory and spills per kernel and target; returns 1 if a
kernel spills registers to memory.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from throughtime.triton_kernels import rel_lstm, relevancy
from throughtime.triton_kernels.common import block
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = (80, 90, 100)  # compute capability of A100, H100 and H200, B200

# What a pointer of that name points at, where it is no float32.
_INTEGERS = {
    "first": "*i64",
    "ends": "*i64",
    "last": "*i64",
    "final_positions": "*i64",
    "kept_positions": "*i32",
    "kept": "*i32",
    "cuts": "*i32",
}
_SIZES = ("T", "S", "R", "W", "K", "CAPACITY", "HEADS", "D", "DV", "B", "H", "A")


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time sizes."""

    kernel: Any
    sizes: str
    constants: dict[str, Any]
    warps: int

    @property
    def name(self) -> str:
        """Module and function."""
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"


@dataclass(frozen=True)
class Usage:
    """What a kernel needs on one target; ``local_bytes`` above 0 means spilled registers."""

    variant: Variant
    target: int
    registers: int
    shared_bytes: int
    local_bytes: int


def variants() -> list[Variant]:
    """The sizes of the benchmark (dot) and of the paper (additive)."""
    made = []
    for additive, D, W, K in ((False, 64, 64, 64), (True, 128, 10, 15)):
        sizes = f"D {D}, window {W}, top_k {K}, {'additive' if additive else 'dot'}"
        common = {"ADDITIVE": additive, "BLOCK_D": block(D)}
        parallel = {**common, "BLOCK_Q": relevancy.QUERIES}
        outputs = {"BLOCK_DV": block(D)}
        candidates = {"BLOCK_W": block(W), "BLOCK_K": block(K), "KEEP_FIRST": False}
        made += [
            Variant(kernel, sizes, constants, relevancy.warps(D))
            for kernel, constants in (
                (relevancy.window_scores, parallel),
                (relevancy.select, {**common, **candidates}),
                (relevancy.attend, {"BLOCK_Q": relevancy.QUERIES, **outputs}),
                (relevancy.query_gradient, {**parallel, **outputs}),
                (relevancy.key_gradient, {**parallel, **outputs}),
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


def compile_all(targets: tuple[int, ...] = TARGETS) -> Iterator[Usage]:
    """Compiles every variant for every target."""
    for variant in variants():
        for target in targets:
            source = ASTSource(
                fn=variant.kernel,
                signature=_signature(variant),
                constexprs={(_position(variant, k),): v for k, v in variant.constants.items()},
            )
            gpu = GPUTarget("cuda", target, 32)
            compiled = triton.compile(source, target=gpu, options={"num_warps": variant.warps})
            registers, local = _resources(compiled.asm["cubin"])
            yield Usage(variant, target, registers, compiled.metadata.shared, local)


def _position(variant: Variant, name: str) -> int:
    return list(variant.kernel.arg_names).index(name)


def _signature(variant: Variant) -> dict[str, str]:
    """Types of all arguments: constants, sizes, or pointers."""

    def kind(name: str) -> str:
        if name in variant.constants:
            return "constexpr"
        if name in _SIZES:
            return "i32"
        return _INTEGERS.get(name, "*fp32")

    return {name: kind(name) for name in variant.kernel.arg_names}


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of local memory (spills, stack) of the kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if command is None:
        raise FileNotFoundError("cuobjdump is neither in Triton's package nor on PATH")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
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
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, metavar="SM")
    args = parser.parse_args(arguments)
    print("| kernel | sizes | target | registers | shared bytes | spilled bytes |")
    print("| --- | --- | --- | --- | --- | --- |")
    spilled = False
    for usage in compile_all(tuple(args.targets)):
        cells = (usage.variant.name, usage.variant.sizes, f"sm_{usage.target}", usage.registers)
        print("|", *(f"{x} |" for x in (*cells, usage.shared_bytes, usage.local_bytes)), flush=True)
        spilled = spilled or usage.local_bytes > 0
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
