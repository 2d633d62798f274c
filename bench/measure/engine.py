"""The engine of all benchmarks: verification, time in turns, memory, rows of the one table."""

from __future__ import annotations

import datetime
import itertools
import sys
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
from tqdm import tqdm

import throughtime
from bench import machine, table
from bench.measure import gpu, memory, timing
from bench.measure.verify import Verifier
from bench.operations.operation import DTYPES, MODES, OURS, REFERENCE, Case, Contestant, Operation
from throughtime.backends import BackendName
from throughtime.backends.selection import preferred

# What a peer may answer to a shape, a dtype or a device that it does not support.
CANNOT_RUN = (RuntimeError, ValueError, TypeError, AssertionError, ImportError, OSError)
OTHER_FUNCTION = "computes another function: a peer in speed only"
INPUT_GRAD = "with the gradient of the input"


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

    def __post_init__(self) -> None:
        self._verifier = Verifier(self.operation)

    def rows(self, chosen: Sequence[Case]) -> pd.DataFrame:
        """The measurements of all cases, with a progress bar, or lines in a log, on stderr."""
        rows: list[dict[str, Any]] = []
        bar = tqdm(list(self.cases(chosen)), unit="case", file=sys.stderr, disable=None)
        for case in bar:
            what = f"{case}, {case.dtype}, {case.mode}"
            bar.set_postfix_str(what)
            if bar.disable:  # stderr is no terminal
                print(f"measuring {what}", file=sys.stderr, flush=True)
            with case.precision():
                rows += self._measure(case)
        return table.frame(rows)

    def cases(self, chosen: Sequence[Case]) -> Iterator[Case]:
        """Each case in each dtype, mode and so on. h-detach changes the backward pass only."""
        for case, dtype, device, mode in itertools.product(
            chosen, self.dtypes, self.devices, self.modes
        ):
            own = replace(
                case, dtype=dtype, device=device, mode=mode, input_grad=self.input_grad, p=0.0
            )
            for p in (0.0,) if not own.trains else self.ps:
                yield replace(own, p=None if self.operation.ps is None else p)

    def contestants(self, case: Case) -> Iterator[tuple[Contestant, str | None]]:
        """Ours first, and why one is not measured.

        A backend comes once, though "auto" may choose one that is named too.
        """
        chosen: dict[str, str | None] = {}
        for name in self.backends:
            explained = throughtime.explain(
                self.operation.kernel, hidden_size=case.width,
                dtype=DTYPES[case.dtype], device=case.device, backend=name,
            )  # fmt: skip
            backend = explained.chosen or preferred(name)[0]
            chosen.setdefault(backend, explained.reasons[backend])
        ours = [(Contestant(OURS, backend), reason) for backend, reason in chosen.items()]
        no_gpu = gpu.why_not() if case.device == "cuda" else None
        for contestant, reason in [*ours, *((Contestant(peer), None) for peer in self.peers)]:
            reason = no_gpu or reason
            reason = f"cannot run: {reason}" if reason else self.operation.why_not(contestant, case)
            yield contestant, reason

    def _measure(self, case: Case) -> list[dict[str, Any]]:
        """A row for every contestant: verified first, then timed in turns."""
        rows: dict[Contestant, dict[str, Any]] = {}
        runs: dict[Hashable, timing.Run] = {}
        for contestant, reason in self.contestants(case):
            found = {"note": reason} if reason else self._prepare(contestant, case, runs)
            rows[contestant] = row(contestant, case, **found)
        if runs:
            costs = self._costs(case, runs)
            for contestant in costs:
                rows[contestant] |= costs[contestant]
        return list(rows.values())

    def _prepare(
        self, contestant: Contestant, case: Case, runs: dict[Hashable, timing.Run]
    ) -> dict[str, Any]:
        """Adds what to time, if its results are right; note and error of the row."""
        timed = self.operation.timed(contestant.impl, case)
        try:
            errors = self._verifier.check(contestant, timed)
            if not errors.passed:
                self.red = self.red or contestant.ours
                return {"note": f"WRONG RESULTS, no speed reported: {errors}"}
            iterate = self.operation.work(contestant, timed).iterate
            iterate(case.mode)  # may fail at this T, though it was verified at a shorter one
        except CANNOT_RUN as error:
            self.red = self.red or contestant.ours
            lines = str(error).strip().splitlines()
            return {"note": f"cannot run: {lines[0] if lines else type(error).__name__}"}
        runs[contestant] = partial(iterate, case.mode)
        remarks = {
            table.NO_DETACH: timed != case,
            OTHER_FUNCTION: not self.operation.same_function(contestant.impl),
            INPUT_GRAD: self.input_grad,
        }
        note = "; ".join(text for text, applies in remarks.items() if applies)
        return {"error": errors.largest, "rms_error": errors.largest_rms, "note": note}

    def _costs(
        self, case: Case, runs: dict[Hashable, timing.Run]
    ) -> dict[Contestant, dict[str, Any]]:
        """Columns of time, ratios, rates and memory."""
        roofs = timing.roofs(case.operands, case.device)
        timer = gpu.EventTimer() if case.device == "cuda" else None
        beside = {name: run for name, (run, _) in roofs.items()}
        samples = timing.alternate(runs | beside, self.plan, timer)
        contestants = [name for name in runs if isinstance(name, Contestant)]
        runs.clear()  # frees what they hold before other processes are asked for their memory
        rates = {name: 1e-9 * work / samples[name].median() for name, (_, work) in roofs.items()}
        found = {}
        for contestant in contestants:
            timed = self.operation.timed(contestant.impl, case)
            found[contestant] = own = times(samples[contestant], case)
            own |= _ratios(samples[contestants], contestant)
            own["gflops"] = self.operation.gflop(contestant.impl, timed) / own["median_ms"] * 1e3
            own["gbs"] = self.operation.gbyte(contestant.impl, timed) / own["median_ms"] * 1e3
            own["share_of_matmul"] = own["gflops"] / rates["matmul"]
            own["share_of_bandwidth"] = own["gbs"] / rates["copy"]
            own["peak_mb"] = memory.peak_mb(contestant, timed) if self.memory else None
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
    q1, median, q3 = (1e3 * taken).quantile([0.25, 0.5, 0.75])
    found = {"median_ms": median, "q1_ms": q1, "q3_ms": q3, "runs": taken.count()}
    return found | {"us_per_query": median * 1e3 / case.queries}


def _ratios(samples: pd.DataFrame, contestant: Contestant) -> dict[str, Any]:
    """Medians over the rounds in which both took part."""
    own, found = samples[contestant], {}
    ours = [other for other in samples if other.ours]
    peers = [(samples[other] / own).median() for other in samples if not other.ours]
    if ours:
        ratio = (own / samples[ours[0]]).quantile([0.25, 0.5, 0.75])
        found = dict(zip(("ratio_q1", "ratio", "ratio_q3"), ratio, strict=True))
    if REFERENCE in ours:
        found["reference_ratio"] = (samples[REFERENCE] / own).median()
    if contestant.ours and peers:
        found["best_peer_ratio"] = min(peers)
    return found
