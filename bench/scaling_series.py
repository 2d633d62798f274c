"""``bench scaling``: which sizes are measured, and the measuring of one series of sizes."""

from __future__ import annotations

import dataclasses
import datetime
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch

import throughtime
from bench import machine, measure, memory
from bench.cell import OURS, Cell, Contestant
from bench.rooms import OPERATIONS
from bench.rows import Row
from bench.scaling_fit import Fit, fit

AXES = ("T", "B", "H")
CONTROL = Contestant("full")  # full attention with its scores written out: quadratic in T
CONTROL_OP = "relevancy"
NOTE = "time on the processor, of one thread"


@dataclass(frozen=True)
class Range:
    """A size, the value at which next to nothing but the fixed cost is left, and those that count.

    ``others`` are the sizes that stay.
    """

    name: str
    smallest: int
    values: Sequence[int]
    others: Mapping[str, int]


def _range(name: str, values: Sequence[int], smallest: int = 1, /, **others: int) -> Range:
    return Range(name, smallest, values, MappingProxyType(others))


_FEW, _MANY = {"window_size": 8, "top_k": 8}, {"window_size": 16, "top_k": 16}
# Large enough for the fixed cost to vanish, small enough for all of it in a minute. T of relevancy
# begins long after the retained set is full: until then the keys per query grow.
RANGES: Mapping[str, Mapping[str, Range]] = MappingProxyType({
    "lstm": {
        "T": _range("T", (512, 1024, 2048, 4096, 8192), B=16, I=32, H=64),
        "B": _range("B", (32, 64, 128, 256, 512), T=64, I=32, H=64),
        "H": _range("H", (128, 256, 512, 768, 1024), T=32, B=16, I=32),
    },
    "rel-lstm": {
        "T": _range("T", (512, 1024, 2048, 4096, 8192), B=4, I=16, H=64, **_FEW),
        "B": _range("B", (32, 64, 128, 192, 256), T=64, I=16, H=64, **_FEW),
        "H": _range("H", (128, 256, 384, 512, 768), T=64, B=4, I=16, **_FEW),
    },
    "relevancy": {
        "T": _range("T", (1024, 2048, 4096, 8192, 16384), B=1, heads=2, D=32, **_MANY),
        "B": _range("B", (8, 16, 32, 48, 64), T=1024, heads=1, D=32, **_MANY),
        "H": _range("D", (256, 384, 512, 768, 1024), 16, T=1024, B=1, heads=1, **_MANY),
    },
})  # fmt: skip
CONTROL_RANGE = _range("T", (512, 768, 1024, 1536, 2048), B=1, heads=4, D=32, **_MANY)


@dataclass(frozen=True)
class Series:
    """What was measured along one axis, and how it grows; None where too few sizes tell."""

    op: str
    axis: str
    contestant: Contestant
    rows: Sequence[Row]
    time: Fit | None
    memory: Fit | None

    @property
    def name(self) -> str:
        """The size that grows: ``H`` stands for ``D`` in relevancy."""
        return RANGES[self.op][self.axis].name


def series(op: str, axis: str, contestant: Contestant, plan: measure.Plan, count: int) -> Series:
    """Measures one operation along one axis, on one thread.

    Time is taken in turns, so that a slow spell of the machine hits all sizes. It is the time on
    the processor, which leaves out what other programs take. More threads would add the power with
    which the work spreads over them. Peak memory is taken in a process of its own each.

    Args:
        op: key of ``rooms.OPERATIONS``.
        axis: of ``AXES``.
        contestant: ours or ``CONTROL``.
        plan: how long.
        count: how many of the range's values, the smallest first.
    """
    chosen = CONTROL_RANGE if contestant == CONTROL else RANGES[op][axis]
    cells = {
        value: Cell(OPERATIONS[op].from_columns({**chosen.others, chosen.name: value}))
        for value in (chosen.smallest, *chosen.values[:count])
    }
    works = {value: OPERATIONS[op].work(contestant, cell) for value, cell in cells.items()}
    runs = {value: partial(work.iterate, cells[value].mode) for value, work in works.items()}
    with _one_thread():
        samples = measure.alternate(runs, plan, timer=_processor_time)
    peaks = {value: _peak_mb(op, contestant, cell) for value, cell in cells.items()}
    rows = [_row(op, contestant, cells[value], samples[value], peaks[value]) for value in cells]
    times = {value: samples[value].quartiles_ms()[1] for value in cells}
    fits = [fit(dict(list(costs.items())[1:]), costs[chosen.smallest]) for costs in (times, peaks)]
    return Series(op, axis, contestant, rows, *fits)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _processor_time(run: measure.Run, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return time.process_time() - start


def _peak_mb(op: str, contestant: Contestant, cell: Cell) -> float:
    """As ``memory.peak_mb``, in a process forked from one that has torch loaded: much sooner."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(1) as pool:
        return pool.apply(_growth_mb, (op, contestant, cell))


def _growth_mb(op: str, contestant: Contestant, cell: Cell) -> float:
    torch.set_num_threads(1)
    operation = OPERATIONS[op]
    # What a first call allocates once and keeps belongs to no size.
    operation.work(contestant, dataclasses.replace(cell, case=cell.case.tiny())).iterate(cell.mode)
    work = operation.work(contestant, cell)
    return memory.growth_mb(lambda: work.iterate(cell.mode))


def _row(op: str, contestant: Contestant, cell: Cell, taken: measure.Samples, peak: float) -> Row:
    q1, median, q3 = taken.quartiles_ms()
    return Row(
        op=op,
        **cell.case.columns(),
        dtype=cell.dtype,
        p=cell.p if OPERATIONS[op].default_ps is not None else None,
        mode=cell.mode,
        device=cell.device,
        impl=contestant.impl,
        backend=contestant.backend,
        threads=1,
        median_ms=median,
        q1_ms=q1,
        q3_ms=q3,
        runs=len(taken.seconds),
        us_per_query=median * 1e3 / cell.case.queries,
        peak_mb=peak,
        note=NOTE,
        machine=machine.name(cell.device),
        torch=torch.__version__,
        version=throughtime.__version__,
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        command=machine.command_line(),
    )


def ours(op: str) -> Contestant:
    """This package with the backend that it chooses for the operation."""
    chosen = throughtime.explain(OPERATIONS[op].kernel, hidden_size=64).chosen
    return Contestant(OURS, chosen)
