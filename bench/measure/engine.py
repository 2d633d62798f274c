"""The engine of all benchmarks: verification, time in turns, memory, rows of the one table."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
from tqdm import tqdm

import throughtime
from bench import machine, table
from bench.measure import gpu, memory, timing
from bench.measure.verify import Errors, Verifier
from bench.operations.operation import DTYPES, MODES, OURS, REFERENCE, Case, Contestant, Operation
from throughtime.backends import BackendName
from throughtime.backends.selection import preferred

# What a peer may answer to a shape, a dtype or a device that it does not support.
CANNOT_RUN = (RuntimeError, ValueError, TypeError, AssertionError, ImportError, OSError)
OTHER_FUNCTION = "computes another function: a peer in speed only"
INPUT_GRAD = "with the gradient of the input"
Key = tuple[Contestant, Case]


@dataclass(frozen=True)
class Entry:
    """A contestant of a case.

    ``timed`` is what it runs: the case at p = 0 if it has no h-detach. ``why_not`` says why it is
    not measured.
    """

    contestant: Contestant
    case: Case
    timed: Case
    why_not: str | None
    errors: Errors | None = None

    @property
    def key(self) -> Key:
        """Entries with the same key run the same."""
        return self.contestant, self.timed


@dataclass
class Bench:
    """Measures cases of one operation.

    ``backends`` are of ours; ratios are to the first that can run. ``peers`` are keys of
    ``operation.peers``. After ``rows``, ``red`` says whether one of ours computed something wrong
    or failed.
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
    plan: timing.Plan = field(default_factory=timing.Plan)
    red: bool = field(default=False, init=False)
    _rates: dict[tuple[str, str], Rates] = field(default_factory=dict, init=False)
    _verdicts: dict[Key, Errors | str] = field(default_factory=dict, init=False)
    _verifier: tuple[Case, Verifier] | None = field(default=None, init=False)

    def turns(self, cases: Sequence[Case]) -> list[list[Entry]]:
        """All contestants of all cases, those that are not measured included.

        One list for each case, dtype, device and mode: what is timed in turns, the cases of all p.
        """
        return [
            self._entries(
                replace(case, dtype=dtype, device=device, mode=mode, input_grad=self.input_grad)
            )
            for case in cases
            for dtype in self.dtypes
            for device in self.devices
            for mode in self.modes
        ]

    def rows(self, cases: Sequence[Case]) -> pd.DataFrame:
        """The measurements of all cases, with a progress bar on stderr."""
        rows: list[dict[str, Any]] = []
        bar = tqdm(self.turns(cases), unit="case", file=sys.stderr, disable=None)
        for entries in bar:
            case = entries[0].case
            bar.set_postfix_str(f"{case}, {case.dtype}, {case.mode}")
            rows += self._measure([self._verified(entry) for entry in entries])
        return table.frame(rows)

    def _entries(self, case: Case) -> list[Entry]:
        """h-detach changes the backward pass only, so other modes run once, at p = 0."""
        entries = []
        operation, has_p = self.operation, self.operation.ps is not None
        for p in self.ps if case.trains and has_p else [0.0]:
            own = replace(case, p=p if has_p else None)
            for contestant, reason in self._contestants(own):
                detaches = operation.detaches(contestant.impl) or not has_p
                if case.device == "cuda":
                    reason = gpu.why_not() or reason
                reason = f"cannot run: {reason}" if reason else operation.why_not(contestant, own)
                timed = own if detaches else replace(own, p=0.0)
                entries.append(Entry(contestant, own, timed, reason))
        return entries

    def _contestants(self, case: Case) -> Iterable[tuple[Contestant, str | None]]:
        """Ours first; a backend once, though "auto" may choose one that is named too."""
        chosen: dict[str, str | None] = {}
        for name in self.backends:
            explained = throughtime.explain(
                self.operation.kernel, hidden_size=case.width,
                dtype=DTYPES[case.dtype], device=case.device, backend=name,
            )  # fmt: skip
            backend = explained.chosen or preferred(name)[0]
            chosen.setdefault(backend, explained.reasons[backend])
        ours = [(Contestant(OURS, backend), reason) for backend, reason in chosen.items()]
        return [*ours, *((Contestant(peer), None) for peer in self.peers)]

    def _verified(self, entry: Entry) -> Entry:
        """The entry with its errors, or with the reason why it gets no speed."""
        if entry.why_not is not None:
            return entry
        key = entry.contestant, replace(entry.timed, mode=MODES[0])  # all modes are verified
        if key not in self._verdicts:
            self._verdicts[key] = self._verdict(*key)
        verdict = self._verdicts[key]
        if isinstance(verdict, str):
            return replace(entry, why_not=verdict)
        return replace(entry, errors=verdict)

    def _verdict(self, contestant: Contestant, case: Case) -> Errors | str:
        if self._verifier is None or self._verifier[0] != case:
            self._verifier = case, Verifier(self.operation, case)
        try:
            errors = self._verifier[1].check(contestant)
        except CANNOT_RUN as error:
            return self._failed(contestant, error)
        if errors.passed:
            return errors
        self.red = self.red or contestant.ours
        return f"WRONG RESULTS, no speed reported: {errors}"

    def _failed(self, contestant: Contestant, error: BaseException) -> str:
        self.red = self.red or contestant.ours
        lines = str(error).strip().splitlines()
        return f"cannot run: {lines[0] if lines else type(error).__name__}"

    def _measure(self, entries: list[Entry]) -> list[dict[str, Any]]:
        """Time the contestants of all p in turns; one without h-detach is timed once for all."""
        runs: dict[Key, Callable[[], object]] = {}
        failed: dict[Key, str] = {}
        for entry in entries:
            if entry.why_not is None and entry.key not in runs.keys() | failed.keys():
                try:
                    iterate = self.operation.work(*entry.key).iterate
                    iterate(entry.timed.mode)
                    runs[entry.key] = partial(iterate, entry.timed.mode)
                except CANNOT_RUN as error:  # at this T, though it was verified at a shorter one
                    failed[entry.key] = self._failed(entry.contestant, error)
        entries = [replace(e, why_not=e.why_not or failed.get(e.key)) for e in entries]
        rows = [self._row(entry) for entry in entries]
        if not runs:
            return rows
        rates = self._rates_of(entries[0].case)
        samples = timing.alternate(runs, self.plan, between=rates, timer=rates.timer)
        keys = list(runs)
        runs.clear()  # frees what they hold before other processes are asked for their memory
        peaks = {key: memory.peak_mb(*key) for key in keys if self.memory}
        for entry, row in zip(entries, rows, strict=True):
            if entry.why_not is None:
                row |= self._costs(entry, entries, samples, rates)
                row["peak_mb"] = peaks.get(entry.key)
        return rows

    def _rates_of(self, case: Case) -> Rates:
        # A CPU has no faster units for the 16-bit types: all arithmetic is float32 there.
        own = case.dtype == "float64" or case.device == "cuda"
        key = case.device, case.dtype if own else "float32"
        if key not in self._rates:
            self._rates[key] = Rates(*key)
        return self._rates[key]

    def _row(self, entry: Entry) -> dict[str, Any]:
        remarks = {
            table.NO_DETACH: entry.timed != entry.case,
            OTHER_FUNCTION: not self.operation.same_function(entry.contestant.impl),
            INPUT_GRAD: self.input_grad,
        }
        note = entry.why_not or "; ".join(text for text, applies in remarks.items() if applies)
        error = entry.errors.largest if entry.errors and not entry.why_not else None
        return row(entry.contestant, entry.case, error=error, note=note)

    def _costs(
        self, entry: Entry, entries: Sequence[Entry], samples: Mapping[Key, pd.Series], rates: Rates
    ) -> dict[str, Any]:
        """Columns of time, ratios and rates."""
        beside = {
            other.contestant: samples[other.key]
            for other in entries
            if other.case == entry.case and other.why_not is None
        }
        taken, impl = samples[entry.key], entry.contestant.impl
        ours = next((own for other, own in beside.items() if other.ours), None)
        peers = [timing.ratios(own, taken).median() for c, own in beside.items() if not c.ours]
        found = times(taken, entry.case)
        if ours is not None:
            ratios = timing.quartiles(timing.ratios(taken, ours))
            found |= dict(zip(("ratio_q1", "ratio", "ratio_q3"), ratios, strict=True))
        if REFERENCE in beside:
            found["reference_ratio"] = timing.ratios(beside[REFERENCE], taken).median()
        if entry.contestant.ours and peers:
            found["best_peer_ratio"] = min(peers)
        found["gflops"] = self.operation.gflop(impl, entry.timed) / found["median_ms"] * 1e3
        found["gbs"] = self.operation.gbyte(impl, entry.timed) / found["median_ms"] * 1e3
        found["share_of_matmul"] = found["gflops"] / rates.matmul.median()
        found["share_of_bandwidth"] = found["gbs"] / rates.copy.median()
        return found


def row(contestant: Contestant, case: Case, **more: Any) -> dict[str, Any]:
    """The columns that say what was measured, where, when and by which command."""
    columns = {name: value for name, value in vars(case).items() if name != "input_grad"}
    return columns | {
        **vars(contestant),
        "version": throughtime.__version__,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        **machine.columns(case.device),
        **more,
    }


def times(taken: pd.Series, case: Case) -> dict[str, Any]:
    q1, median, q3 = timing.quartiles(taken * 1e3)
    found = {"median_ms": median, "q1_ms": q1, "q3_ms": q3, "runs": len(taken)}
    return found | {"us_per_query": median * 1e3 / case.queries}


class Rates:
    """What the machine itself reaches on a device, sampled between the rounds."""

    def __init__(self, device: str, dtype: str) -> None:
        self.timer = gpu.EventTimer() if device == "cuda" else None
        self.matmul = timing.matmul_rate(DTYPES[dtype], device=device, timer=self.timer)
        self.copy = timing.copy_rate(device=device, timer=self.timer)

    def __call__(self) -> None:
        self.matmul()
        self.copy()
