"""``pytest bench/``: the cases of ``bench OP --quick`` for pytest-benchmark, which keeps runs.

    pytest bench/ --benchmark-autosave     # measure
    pytest bench/ --benchmark-compare      # again, beside the last run kept

What computes something wrong fails instead of being timed. To compare two revisions on a busy
machine use ``bench compare``, which alternates them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest

from bench.measure.engine import Bench, Entry, row
from bench.measure.verify import Verifier
from bench.operations import OPERATIONS
from bench.operations.operation import Case


@functools.lru_cache(maxsize=1)
def verifier(op: str, case: Case) -> Verifier:
    """Its reference results serve every contestant of a case."""
    return Verifier(OPERATIONS[op], case)


def entries() -> Iterator[Any]:
    """One parameter per contestant and case; a peer without h-detach only at the first p."""
    for op in OPERATIONS.values():
        bench = Bench(op, ("auto", "reference"), op.default_peers, ps=op.ps or (0.0,))
        for entry in (entry for turn in bench.turns(op.quick) for entry in turn):
            if entry.timed == entry.case:
                marks = [pytest.mark.skip(reason=entry.why_not)] if entry.why_not else []
                words = [op.name, str(entry.case), f"p{entry.case.p or 0:g}", str(entry.contestant)]
                name = "-".join(words).replace(", ", "x").replace(" ", "")
                yield pytest.param(entry, marks=marks, id=name)


@pytest.mark.filterwarnings("ignore:throughtime runs its slow:RuntimeWarning")
@pytest.mark.parametrize("entry", list(entries()))
def test_speed(benchmark: Any, entry: Entry) -> None:
    operation, case = OPERATIONS[entry.case.op], entry.case
    errors = verifier(operation.name, case).check(entry.contestant)
    assert errors.passed, f"WRONG RESULTS, no speed reported: {errors}"
    benchmark.group = f"{operation.name}: {operation.heading} = {case}"
    benchmark.extra_info.update(row(entry.contestant, case, error=errors.largest))
    work = operation.work(entry.contestant, case)
    work.iterate(case.mode)  # what a first call allocates is not timed
    benchmark(work.iterate, case.mode)
