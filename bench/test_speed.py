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

from bench.measure.engine import Bench, row
from bench.measure.verify import Verifier
from bench.operations import OPERATIONS
from bench.operations.operation import Case, Contestant


@functools.cache
def verifier(op: str) -> Verifier:
    """Its reference results serve every contestant of a case."""
    return Verifier(OPERATIONS[op])


def entries() -> Iterator[Any]:
    """One parameter per contestant and case; a peer without h-detach only at p = 0."""
    for op in OPERATIONS.values():
        bench = Bench(op, ("auto", "reference"), op.default_peers, ps=op.ps or (0.0,))
        for case in bench.cases(op.quick):
            for contestant, why_not in bench.contestants(case):
                if op.timed(contestant.impl, case) == case:
                    marks = [pytest.mark.skip(reason=why_not)] if why_not else []
                    words = f"{op.name}-{case}-p{case.p or 0:g}-{contestant}"
                    name = words.replace(", ", "x").replace(" ", "")
                    yield pytest.param(contestant, case, marks=marks, id=name)


@pytest.mark.filterwarnings("ignore:throughtime runs its slow:RuntimeWarning")
@pytest.mark.parametrize(("contestant", "case"), list(entries()))
def test_speed(benchmark: Any, contestant: Contestant, case: Case) -> None:
    operation = OPERATIONS[case.op]
    errors = verifier(operation.name).check(contestant, case)
    assert errors.passed, f"WRONG RESULTS, no speed reported: {errors}"
    benchmark.group = f"{operation.name}: {operation.heading} = {case}"
    benchmark.extra_info.update(row(contestant, case, error=errors.largest))
    work = operation.work(contestant, case)
    work.iterate(case.mode)  # what a first call allocates is not timed
    benchmark(work.iterate, case.mode)
