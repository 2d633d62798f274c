"""The one engine behind all benchmarks: gate, alternated timing, memory, rows of the one table."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

import throughtime
from bench import cuda, machine, measure, memory
from bench.cases import MODES
from bench.cell import DTYPES, OURS, Cell, Contestant
from bench.errors import require
from bench.gate import REFERENCE, Errors, Gate
from bench.operation import Operation
from bench.rows import Row
from throughtime.backends import BackendName
from throughtime.backends.selection import preferred

# What a peer may answer to a shape, a dtype or a device that it does not know.
CANNOT_RUN = (RuntimeError, ValueError, TypeError, AssertionError, ImportError, OSError)
NO_DETACH = "no h-detach: timed at p = 0"
OTHER_FUNCTION = "computes another function: a peer in speed only"
INPUT_GRAD = "with the gradient of the input"
Key = tuple[Contestant, Cell]


@dataclass(frozen=True)
class Entry:
    """A contestant of a cell.

    ``timed`` is what it runs there, the cell at p = 0 if it has no h-detach; ``why_not`` says why
    it is not measured.
    """

    contestant: Contestant
    cell: Cell
    timed: Cell
    why_not: str | None
    errors: Errors | None = None

    @property
    def key(self) -> Key:
        """Entries with the same key run the same."""
        return self.contestant, self.timed


@dataclass
class Bench:
    """Measures cells and remembers whether a contestant of ours went wrong.

    Args:
        operation: what is measured.
        backends: of ours; the first that can run is what the ratios are taken to.
        peers: keys of ``operation.labels``.
        modes: of ``cases.MODES``.
        ps: detached fractions 0 to 1; they matter only with a backward pass.
        dtypes: keys of ``cell.DTYPES``.
        devices: of ``cell.DEVICES``.
        input_grad: whether the input needs a gradient too.
        memory: whether to measure peak memory.
        plan: how long to measure a cell.

    After ``rows``, ``red`` says whether one of ours computed something wrong or broke down.
    """

    operation: Operation
    backends: Sequence[BackendName] = ("auto",)
    peers: Sequence[str] = ("torch",)
    modes: Sequence[str] = MODES[:1]
    ps: Sequence[float] = (0.0,)
    dtypes: Sequence[str] = ("float32",)
    devices: Sequence[str] = ("cpu",)
    input_grad: bool = False
    memory: bool = True
    plan: measure.Plan = field(default_factory=measure.Plan)
    red: bool = field(default=False, init=False)
    _rates: dict[tuple[str, str], Rates] = field(default_factory=dict, init=False)
    _gate: tuple[Cell, Gate] | None = field(default=None, init=False)

    def groups(self, cases: Sequence[Any]) -> list[list[list[Entry]]]:
        """Everybody in every cell, those that are not measured included.

        Returns:
            One list for each case, dtype and device (what is gated together), in it one for each
            mode (what is timed in turns: the cells of all p), in it the entries.
        """
        return [
            [self._entries(case, dtype, device, mode) for mode in self.modes]
            for case in cases
            for dtype in self.dtypes
            for device in self.devices
        ]

    def rows(self, cases: Sequence[Any]) -> list[Row]:
        """The measurements of all cells, with a progress bar on stderr."""
        groups = self.groups(cases)
        rows: list[Row] = []
        tqdm = require("tqdm").tqdm
        total = len(groups) * len(self.modes)
        with tqdm(total=total, unit="cell", file=sys.stderr, disable=None) as bar:
            for group in groups:
                verdicts: dict[Key, Errors | str] = {}
                for entries in group:
                    cell = entries[0].cell
                    bar.set_postfix_str(f"{cell.case}, {cell.dtype}, {cell.mode}")
                    rows += self._measure([self._gated(entry, verdicts) for entry in entries])
                    bar.update()
        return rows

    def _entries(self, case: Any, dtype: str, device: str, mode: str) -> list[Entry]:
        """h-detach changes the backward pass only, so other modes run once, at p = 0."""
        detached = mode == "forward+backward" and self.operation.default_ps is not None
        entries = []
        for p in self.ps if detached else [0.0]:
            cell = Cell(case, dtype, p, mode, device, self.input_grad)
            for contestant, reason in self._contestants(cell):
                knows = self.operation.detaches(contestant.impl)
                timed = cell if knows else replace(cell, p=0.0)
                why_not = self._why_not(contestant, cell, reason)
                entries.append(Entry(contestant, cell, timed, why_not))
        return entries

    def _contestants(self, cell: Cell) -> Iterable[tuple[Contestant, str | None]]:
        """Ours first; a backend once, though "auto" may choose one that is named too."""
        chosen: dict[str, str | None] = {}
        for name in self.backends:
            table = throughtime.explain(
                self.operation.kernel,
                hidden_size=self.operation.hidden_size(cell.case),
                dtype=DTYPES[cell.dtype],
                device=cell.device,
                backend=name,
            )
            backend = table.chosen or preferred(name)[0]
            chosen.setdefault(backend, table.reasons[backend])
        ours = [(Contestant(OURS, backend), reason) for backend, reason in chosen.items()]
        return [*ours, *((Contestant(peer), None) for peer in self.peers)]

    def _why_not(self, contestant: Contestant, cell: Cell, reason: str | None) -> str | None:
        if cell.device == "cuda":
            reason = cuda.why_not() or reason
        if reason is not None:
            return f"cannot run: {reason}"
        return self.operation.why_not(contestant, cell)

    def _gated(self, entry: Entry, verdicts: dict[Key, Errors | str]) -> Entry:
        """The entry with its errors, or with the reason why it gets no speed."""
        if entry.why_not is not None:
            return entry
        key = entry.contestant, replace(entry.timed, mode=MODES[0])  # the gate checks all modes
        if key not in verdicts:
            verdicts[key] = self._verdict(*key)
        verdict = verdicts[key]
        if isinstance(verdict, str):
            return replace(entry, why_not=verdict)
        return replace(entry, errors=verdict)

    def _verdict(self, contestant: Contestant, cell: Cell) -> Errors | str:
        if self._gate is None or self._gate[0] != cell:
            self._gate = cell, Gate(self.operation, cell)
        try:
            errors = self._gate[1].check(contestant)
        except CANNOT_RUN as error:
            self.red = self.red or contestant.ours
            return f"cannot run: {first_line(error)}"
        if errors.passed:
            return errors
        self.red = self.red or contestant.ours
        return f"WRONG RESULTS, no speed reported: {errors}"

    def _measure(self, entries: list[Entry]) -> list[Row]:
        """Times the contestants of all p in turns; one without h-detach is timed once for all."""
        runs: dict[Key, Callable[[], object]] = {}
        broken: dict[Key, str] = {}
        for entry in entries:
            if entry.why_not is None and entry.key not in runs.keys() | broken.keys():
                try:
                    runs[entry.key] = self._prepared(entry)
                except CANNOT_RUN as error:  # at this T, though it could at the gate's
                    broken[entry.key] = f"cannot run: {first_line(error)}"
                    self.red = self.red or entry.contestant.ours
        entries = [replace(e, why_not=e.why_not or broken.get(e.key)) for e in entries]
        if not runs:
            return [self._row(entry) for entry in entries]
        rates = self._rates_of(entries[0].cell)
        samples = measure.alternate(runs, self.plan, between=rates, timer=rates.timer)
        keys = list(runs)
        runs.clear()  # frees what they hold before other processes are asked for their memory
        peaks = {key: memory.peak_mb(self.operation, *key) for key in keys if self.memory}
        return [self._row(entry, entries, samples, peaks) for entry in entries]

    def _prepared(self, entry: Entry) -> Callable[[], object]:
        work = self.operation.work(*entry.key)
        work.iterate(entry.timed.mode)
        return partial(work.iterate, entry.timed.mode)

    def _rates_of(self, cell: Cell) -> Rates:
        # A CPU has no faster units for the 16-bit types: all arithmetic is float32 there.
        own = cell.dtype == "float64" or cell.device == "cuda"
        key = cell.device, cell.dtype if own else "float32"
        if key not in self._rates:
            self._rates[key] = Rates(*key)
        return self._rates[key]

    def _row(
        self,
        entry: Entry,
        entries: Sequence[Entry] = (),
        samples: Mapping[Key, measure.Samples] = MappingProxyType({}),
        peaks: Mapping[Key, float | None] = MappingProxyType({}),
    ) -> Row:
        cell, contestant = entry.cell, entry.contestant
        row = Row(
            op=self.operation.name,
            **cell.case.columns(),
            dtype=cell.dtype,
            p=None if self.operation.default_ps is None else cell.p,
            mode=cell.mode,
            device=cell.device,
            impl=contestant.impl,
            backend=contestant.backend,
            threads=torch.get_num_threads(),
            error=entry.errors.largest if entry.errors else None,
            note=entry.why_not or "; ".join(self._remarks(entry)),
            machine=machine.name(cell.device),
            torch=torch.__version__,
            version=throughtime.__version__,
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            command=machine.command_line(),
        )
        if entry.why_not is not None:
            return row
        beside = {
            other.contestant: samples[other.key]
            for other in entries
            if other.cell == cell and other.why_not is None
        }
        return replace(
            row,
            **_times(contestant, beside),
            **self._shares(entry, samples[entry.key]),
            peak_mb=peaks.get(entry.key),
        )

    def _shares(self, entry: Entry, taken: measure.Samples) -> dict[str, Any]:
        seconds = taken.quartiles_ms()[1] * 1e-3
        gflops = self.operation.gflop(entry.contestant.impl, entry.timed) / seconds
        gbs = self.operation.gbyte(entry.contestant.impl, entry.timed) / seconds
        rates = self._rates_of(entry.cell)
        return {
            "gflops": gflops,
            "share_of_matmul": gflops / rates.matmul.median(),
            "gbs": gbs,
            "share_of_bandwidth": gbs / rates.copy.median(),
            "us_per_query": seconds * 1e6 / entry.cell.case.queries,
        }

    def _remarks(self, entry: Entry) -> Iterable[str]:
        if entry.timed != entry.cell:
            yield NO_DETACH
        if entry.contestant.impl in self.operation.other_functions:
            yield OTHER_FUNCTION
        if self.input_grad:
            yield INPUT_GRAD


def _times(contestant: Contestant, beside: Mapping[Contestant, measure.Samples]) -> dict[str, Any]:
    """Columns of the time, from the samples of everybody in the cell, ours first."""
    taken = beside[contestant]
    q1, median, q3 = taken.quartiles_ms()
    ours = next((samples for other, samples in beside.items() if other.ours), None)
    ratio_q1, ratio, ratio_q3 = taken.ratio_to(ours) if ours else (None, None, None)
    reference = beside.get(REFERENCE)
    peers = [samples.ratio_to(taken)[1] for other, samples in beside.items() if not other.ours]
    return {
        "median_ms": median,
        "q1_ms": q1,
        "q3_ms": q3,
        "runs": len(taken.seconds),
        "ratio": ratio,
        "ratio_q1": ratio_q1,
        "ratio_q3": ratio_q3,
        "reference_ratio": reference.ratio_to(taken)[1] if reference else None,
        "best_peer_ratio": min(peers) if peers and contestant.ours else None,
    }


class Rates:
    """What the machine itself reaches on a device, sampled between the rounds."""

    def __init__(self, device: str, dtype: str) -> None:
        if device == "cuda":
            cuda.true_float32()
        self.timer = cuda.EventTimer() if device == "cuda" else None
        self.matmul = measure.GemmRate(DTYPES[dtype], device=device, timer=self.timer)
        self.copy = measure.CopyRate(device=device, timer=self.timer)

    def __call__(self) -> None:
        """Samples both, at most twice a second."""
        self.matmul()
        self.copy()


def first_line(error: BaseException) -> str:
    r"""The first line of what an error says, or its name if it says nothing.

    Example:
        >>> first_line(ValueError("no primitive\nfor this")), first_line(AssertionError())
        ('no primitive', 'AssertionError')
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
