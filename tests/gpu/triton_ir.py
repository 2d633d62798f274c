"""Which loads of a Triton kernel, in its GPU IR, may miss what the same program stored before.

A program's threads see each other's stores to global memory only behind a barrier. So on every way
through the kernel a barrier has to stand between a store to a tensor and a later load from it, be
it an asynchronous copy; and a load that a loop needs must not stand before the loop if the loop
stores to the tensor, as where Triton's pipeliner fetches the operands of the next round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest

BARRIERS = ("gpu.barrier", "ttg.barrier all", "ttg.barrier global")
LOADS = ("tt.load", "ttg.async_copy_global_to_local")
# Results that point where their first operand points.
MOVES = ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "ttg.convert_layout")
VALUE = re.compile(r"%[\w#]+")


@dataclass
class Op:
    """One operation; ``regions`` are the bodies of a loop, or of a branch and its else."""

    text: str
    regions: list[list[Op]] = field(default_factory=list)

    def __post_init__(self) -> None:
        result, equal, rest = self.text.partition(" = ")
        self.result = VALUE.match(result)[0] if equal and result.startswith("%") else ""  # type: ignore[index]
        self.text = rest if self.result else self.text
        self.name = self.text.lstrip('"').split("(")[0].split('"')[0].split()[0]

    @property
    def is_barrier(self) -> bool:
        """For what lies in global memory."""
        return self.text.startswith(BARRIERS)

    @property
    def values(self) -> list[str]:
        """Those that it takes, in order."""
        return VALUE.findall(self.text)


def parse(text: str) -> Op:
    """The function of a kernel."""
    place = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)")
    lines = [place.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("#", "^", "module"))]
    start = next(k for k, line in enumerate(lines) if line.startswith("tt.func"))
    (function,), _ = region(iter(lines[start:-1]))  # without the brace of the module
    return function


def region(lines: Iterator[str]) -> tuple[list[Op], str]:
    """The operations up to the brace that closes the region, and what follows the brace."""
    ops: list[Op] = []
    for line in lines:
        if line.startswith("}"):
            return ops, line[1:].strip()
        ops.append(Op(line))
        more = line.endswith("{")
        while more:
            body, after = region(lines)
            ops[-1].regions.append(body)
            more = after.endswith("{")
    return ops, ""


def rounds_apart(body: list[Op]) -> bool:
    """Whether rounds of a loop change elements of their own: it has no barrier, at any depth.

    Such a loop takes one block of units or one key after the other, adds to it, and comes back to
    none. The rule is for loads and stores in the loop itself, not in a loop within.
    """
    return all(not op.is_barrier and all(map(rounds_apart, op.regions)) for op in body)


Store = tuple[str, str, int]  # the tensor, the pointer, and the id of the region
NONE: frozenset[str] = frozenset()


class Walk:
    """Goes through a kernel in the order of its steps, twice through every loop.

    A pointer is known by the tensors, arguments of the kernel, that it may point into.
    """

    def __init__(self, function: Op) -> None:
        self.faults: dict[str, None] = {}
        self.stored: set[Store] = set()  # since the last barrier
        self.before: set[Store] | None = None  # as it was before the outermost loop of rounds apart
        arguments = re.findall(r"%(\w+): !tt.ptr", function.text)
        self.into = {f"%{name}": frozenset([name]) for name in arguments}
        self.read: set[str] = set()
        self.written = self.go(function.regions[0])

    def go(self, ops: list[Op]) -> set[str]:
        """The tensors that are written."""
        written: set[str] = set()
        loaded: set[str] = set()  # directly here
        here: set[Store] = set()
        for op in ops:
            tensors = self.into.get(op.values[0], NONE) if op.values else NONE
            if op.name == "scf.for":
                inner = self.loop(op)
                for tensor in inner & loaded:
                    self.faults[f"a load from {tensor} stands before the loop that stores it"] = (
                        None
                    )
                written |= inner
            elif op.name == "scf.if":
                written |= self.branch(op)
            elif op.is_barrier:
                self.stored.clear()
            elif op.name == "tt.store":
                made = {(tensor, op.values[0], id(ops)) for tensor in tensors}
                self.stored |= made
                here |= made
                written |= tensors
            elif op.name in LOADS:
                loaded |= tensors
                self.read |= tensors
                for store in self.stored:
                    apart = self.before is not None and store not in self.before | here
                    # By the same pointer a thread finds what it stored itself.
                    known = store[1] == op.values[0] or (apart and store[2] == id(ops))
                    if store[0] in tensors and not known:
                        fault = f"no barrier between a store to {store[0]} and a load"
                        self.faults[fault] = None
            elif op.name in MOVES:
                self.into[op.result] = tensors
            elif op.name == "arith.select":
                self.into[op.result] = self.any_of(op.values[1:])
            else:  # no other operation of memory, and no other loop
                assert not re.search("atomic|tma|descriptor|while|call", op.name), op.text
        return written

    def any_of(self, values: Iterable[str]) -> frozenset[str]:
        return NONE.union(*(self.into.get(value, NONE) for value in values))

    def loop(self, op: Op) -> set[str]:
        start = op.text.partition("iter_args(")[2].partition(")")[0]
        carried = re.findall(r"(%[\w#]+) = (%[\w#]+)", start)
        self.into |= {name: self.any_of([value]) for name, value in carried}
        outermost = self.before is None and rounds_apart(op.regions[0])
        if outermost:
            self.before = set(self.stored)
        self.go(op.regions[0])
        written = self.go(op.regions[0])
        if outermost:
            self.before = None
        self.give(op, [self.any_of([name]) for name, _ in carried])
        return written

    def branch(self, op: Op) -> set[str]:
        written: set[str] = set()
        before, after = self.stored, set[Store]()
        results: list[frozenset[str]] = []
        for k in range(2):
            self.stored = set(before)
            ops = op.regions[k] if k < len(op.regions) else []
            written |= self.go(ops)
            after |= self.stored
            yielded = [self.any_of([x]) for x in ops[-1].values] if ops else []
            results = [x | y for x, y in zip_longest(results, yielded, fillvalue=NONE)]
        self.stored = after
        self.give(op, results)
        return written

    def give(self, op: Op, results: list[frozenset[str]]) -> None:
        self.into |= {f"{op.result}#{k}": into for k, into in enumerate(results)}
        if results:
            self.into[op.result] = results[0]
