"""``pytest bench/``: the cases of ``bench OP`` for pytest-benchmark, which keeps and compares runs.

    pytest bench/ -m 'not slow' --benchmark-autosave     # the cases of --quick
    pytest bench/ -m 'not slow' --benchmark-compare      # again, beside the last run kept

A plain ``pytest`` does not collect them. Who computes something wrong fails instead of being timed.
To compare two revisions on a busy machine use ``bench compare``, which alternates them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch

from bench.cell import Cell
from bench.engine import Bench, Entry, Key
from bench.gate import Gate
from bench.operation import Operation
from bench.rooms import OPERATIONS

pytestmark = pytest.mark.filterwarnings("ignore:throughtime runs its slow:RuntimeWarning")


def entries(operation: Operation, cases: Sequence[Any]) -> list[Entry]:
    """What ``bench OP`` measures without options; a peer without h-detach once for all p."""
    bench = Bench(
        operation,
        backends=("auto", "reference"),
        peers=operation.default_peers,
        ps=operation.default_ps or (0.0,),
    )
    found: dict[Key, Entry] = {}
    for group in bench.groups(cases):
        for entry in itertools.chain.from_iterable(group):
            found.setdefault(entry.key, entry)
    return list(found.values())


def params() -> Iterable[Any]:
    """One of pytest's parameters for each entry; what ``--quick`` leaves out is marked slow."""
    for operation in OPERATIONS.values():
        quick = list(operation.quick())
        more = [case for case in operation.default() if case not in quick]
        for entry in entries(operation, [*quick, *more]):
            marks = [] if entry.cell.case in quick else [pytest.mark.slow]
            if entry.why_not is not None:
                marks.append(pytest.mark.skip(reason=entry.why_not))
            sizes = str(entry.cell.case).replace(", ", "x")
            p = f"-p{entry.timed.p:g}" if operation.default_ps else ""
            name = f"{operation.name}-{sizes}{p}-{entry.contestant}".replace(" ", "")
            yield pytest.param(operation, entry, marks=marks, id=name)


@functools.lru_cache(maxsize=1)
def gate(operation: Operation, cell: Cell) -> Gate:
    """Its reference results serve every contestant of a cell."""
    return Gate(operation, cell)


@pytest.mark.parametrize(("operation", "entry"), list(params()))
def test_speed(benchmark: Any, operation: Operation, entry: Entry) -> None:
    errors = gate(operation, entry.timed).check(entry.contestant)
    assert errors.passed, f"WRONG RESULTS, no speed reported: {errors}"
    cell = entry.timed
    benchmark.group = f"{operation.name}: {operation.heading} = {cell.case}"
    benchmark.extra_info.update(
        cell.case.columns(),
        op=operation.name,
        dtype=cell.dtype,
        p=cell.p if operation.default_ps else None,
        mode=cell.mode,
        device=cell.device,
        impl=entry.contestant.impl,
        backend=entry.contestant.backend,
        threads=torch.get_num_threads(),
        error=errors.largest,
    )
    work = operation.work(entry.contestant, cell)
    work.iterate(cell.mode)  # what a first call allocates is not timed
    benchmark(work.iterate, cell.mode)
