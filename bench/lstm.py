"""``bench lstm``: correctness first, then speed and memory beside nn.LSTM and a Python loop."""

from __future__ import annotations

import argparse
import datetime
import functools
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from throughtime.bench import arguments, cases, gate, machine, measure, memory, report
from throughtime.bench.cases import MODES, Case
from throughtime.bench.errors import UsageError, require
from throughtime.bench.peers import PEERS
from throughtime.bench.workload import Workload

import throughtime
from throughtime.backends import BackendName
from throughtime.backends.selection import preferred

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DEFAULT_SIZES = {"T": [100], "B": [64], "H": [256]}


@dataclass(frozen=True)
class Entry:
    """One contestant of a cell: an implementation at one detach probability."""

    impl: str
    p: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench lstm``."""
    add = parser.add_argument_group("shapes (all combinations)").add_argument
    add("--T", type=arguments.positive, nargs="+", help="steps (100)")
    add("--B", type=arguments.positive, nargs="+", help="batch (64)")
    add("--I", type=arguments.positive, nargs="+", help="features per step (same as H)")
    add("--H", type=arguments.positive, nargs="+", help="units (256)")
    add("--sweep", action="store_true", help="a grid over T 10-2000, B 1-256, H 8-2048")
    add("--list", action="store_true", help="print the shapes without options and stop")

    add = parser.add_argument_group("what is measured").add_argument
    peers = [name for name in PEERS if name != "throughtime"]
    add("--p", type=arguments.probability, nargs="+", default=[0.0, 0.5], help="detached (0 0.5)")
    add("--dtype", choices=DTYPES, nargs="+", default=["float32"], help="(float32)")
    add("--modes", choices=MODES, nargs="+", default=MODES[:1], help="(forward+backward)")
    add("--peers", choices=peers, nargs="*", default=["torch"], help="compare with (torch)")
    add("--backend", default="auto", help="which kernels throughtime uses (auto)")
    add("--threads", type=arguments.positive, help="threads of each (as torch has them)")
    add("--input-grad", action="store_true", help="the input needs a gradient too")
    add("--no-memory", action="store_true", help="leave out peak memory")
    add("--repeats", type=arguments.positive, help="number of rounds (at least 5 and 1.5 s)")
    add("--quick", action="store_true", help="fewer shapes, shorter, no memory: under 30 s")

    add = parser.add_argument_group("files").add_argument
    add("--csv", type=Path, metavar="FILE", help="write every measurement")
    add("--plot", type=Path, metavar="FILE", help="draw them (svg, png, pdf)")
    parser.set_defaults(run=run)


def _choose_cases(args: argparse.Namespace) -> tuple[Case, ...]:
    """The shapes that the options ask for, small ones first in a sweep."""
    given: dict[str, list[int] | None] = {n: getattr(args, n) for n in ("T", "B", "I", "H")}
    if args.sweep:
        if any(given.values()):
            raise UsageError("--sweep has its own shapes: leave out --T, --B, --I and --H")
        return cases.sweep()[0]
    if any(given.values()):
        steps, batch, hidden = (given[name] or DEFAULT_SIZES[name] for name in ("T", "B", "H"))
        return cases.product(steps, batch, given["I"], hidden)
    return cases.QUICK if args.quick else cases.DEFAULT


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; returns 1 if an implementation of ours failed its correctness gate."""
    if args.list:
        _print_cases()
        return 0
    chosen = _choose_cases(args)
    if args.plot is not None:
        require("matplotlib")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    require("tqdm")
    bench = _make_bench(args)
    backends = {dtype: _backend(bench, chosen[0], dtype) for dtype in bench.dtypes}
    for line in machine.header():
        print(line)
    for dtype, name in backends.items():
        print(f"throughtime runs in {dtype}: {name}")
    if args.sweep:
        print(f"sweep: {len(chosen)} shapes; {len(cases.sweep()[1])} left out for their size")
    print(flush=True)
    warning = machine.busy()
    if warning:
        print(f"warning: {warning}", file=sys.stderr)

    rows = bench.rows(chosen)
    print(report.table(rows, bench.labels))
    for note in bench.notes:
        print(f"\n{note}")
    if args.csv is not None:
        report.write_csv(args.csv, rows)
        print(f"\nmeasurements: {args.csv}")
    if args.plot is not None:
        from throughtime.bench import plots

        plots.save(plots.bench(rows, bench.labels), args.plot)
        print(f"plot: {args.plot}")
    return 1 if bench.red else 0


def _make_bench(args: argparse.Namespace) -> LstmBench:
    short = args.quick or args.sweep
    plan = measure.Plan(seconds=0.5 if short else 1.5)
    if args.repeats is not None:
        plan = measure.Plan(rounds=args.repeats, exactly=True)
    return LstmBench(
        peers=args.peers,
        modes=args.modes,
        ps=sorted(set(args.p)),
        dtypes=args.dtype,
        backend=args.backend,
        input_grad=args.input_grad,
        memory=not (args.no_memory or short),
        plan=plan,
    )


def _backend(bench: LstmBench, case: Case, dtype: str) -> str:
    """The backend that will run; explicit choices raise here if they cannot."""
    try:
        table = throughtime.explain(
            "lstm",
            hidden_size=case.hidden_size,
            dtype=DTYPES[dtype],
            backend=bench.backend,
        )
    except ValueError as error:
        raise UsageError(f"--backend: {error}") from error
    if table.chosen is None:
        name, _ = preferred(bench.backend)
        raise UsageError(f"backend {name!r} cannot run lstm in {dtype}: {table.reasons[name]}")
    return table.chosen


def _print_cases() -> None:
    measured, left_out = cases.sweep()
    groups = {"default": cases.DEFAULT, "--quick": cases.QUICK, "--sweep": measured}
    for title, group in groups.items():
        print(f"{title}: T, B, I, H")
        for case in group:
            print(f"  {case}")
    print(f"left out of --sweep ({len(left_out)}): more than {cases.SWEEP_GFLOP:g} GFLOP each")


@dataclass
class LstmBench:
    """Measures cells (shape, dtype, mode) and remembers what the reader must be told.

    Args:
        peers: keys of ``peers.PEERS`` to compare with.
        modes: of ``cases.MODES``.
        ps: detached fractions 0 to 1; they matter only with a backward pass.
        dtypes: keys of ``DTYPES``.
        backend: which kernels ``throughtime`` uses.
        input_grad: whether the input needs a gradient.
        memory: whether to measure peak memory.
        plan: how long to measure a cell.

    After ``rows``, ``red`` says whether ``throughtime`` computed something wrong, and
    ``notes`` names what failed or could not run.
    """

    peers: Sequence[str] = ("torch",)
    modes: Sequence[str] = ("forward+backward",)
    ps: Sequence[float] = (0.0, 0.5)
    dtypes: Sequence[str] = ("float32",)
    backend: BackendName = "auto"
    input_grad: bool = False
    memory: bool = True
    plan: measure.Plan = field(default_factory=measure.Plan)
    red: bool = field(default=False, init=False)
    notes: list[str] = field(default_factory=list, init=False)
    _gemm: dict[torch.dtype, measure.GemmRate] = field(default_factory=dict, init=False)

    @property
    def labels(self) -> dict[str, str]:
        """Implementation -> name for people, ours first."""
        return {name: PEERS[name].label for name in ("throughtime", *self.peers)}

    def rows(self, chosen: Sequence[Case]) -> list[report.Row]:
        """The measurements of all cells, with a progress bar on stderr."""
        cells = len(chosen) * len(self.dtypes) * len(self.modes)
        rows: list[report.Row] = []
        tqdm = require("tqdm").tqdm
        with tqdm(total=cells, unit="cell", file=sys.stderr, disable=None) as bar:
            for case in chosen:
                for dtype in self.dtypes:
                    bar.set_postfix_str(f"{case}, {dtype}")
                    errors = self._gate(case, dtype)
                    for mode in self.modes:
                        rows += self._cell(case, dtype, mode, errors)
                        bar.update()
        return rows

    def _entries(self, mode: str) -> list[Entry]:
        """h-detach changes the backward pass only, so other modes run once, at p = 0."""
        ps = self.ps if mode == "forward+backward" else [0.0]
        return [
            Entry(name, p)
            for name in ("throughtime", *self.peers)
            for p in (ps if PEERS[name].detaches else [0.0])
        ]

    def _gate(self, case: Case, dtype: str) -> dict[Entry, gate.Errors]:
        """Errors of the entries that may be timed; the others leave a note."""
        passed = {}
        for entry in {e: None for mode in self.modes for e in self._entries(mode)}:
            label = f"{PEERS[entry.impl].label}, {dtype}, p = {entry.p:g}, T, B, I, H = {case}"
            ours = entry.impl == "throughtime"
            backend = self.backend if ours else "auto"
            try:
                errors = gate.check(entry.impl, case, entry.p, DTYPES[dtype], backend=backend)
            except RuntimeError as error:
                if ours:
                    raise UsageError(f"{label}: {error}") from error
                self.notes.append(f"cannot run: {label}: {str(error).splitlines()[0]}")
                continue
            if errors.passed:
                passed[entry] = errors
                continue
            self.red = self.red or ours
            self.notes.append(
                f"WRONG RESULTS, no speed reported: {label}: error of {errors.worst} is "
                f"{errors.largest:.1e} against the float64 reference, allowed {errors.limit:.1e}"
            )
        return passed

    def _cell(
        self, case: Case, dtype: str, mode: str, errors: dict[Entry, gate.Errors]
    ) -> list[report.Row]:
        entries = [entry for entry in self._entries(mode) if entry in errors]
        if not entries:
            return []
        works = {entry: self._workload(entry, case, dtype) for entry in entries}
        gemm = self._gemm_rate(DTYPES[dtype])
        samples = measure.alternate(
            {str(e): functools.partial(work.iterate, mode) for e, work in works.items()},
            self.plan,
            between=gemm,
        )
        by_entry = {entry: samples[str(entry)] for entry in entries}
        del works
        baseline = by_entry.get(Entry("torch", 0.0))
        return [
            self._row(entry, case, dtype, mode, taken, baseline, errors[entry])
            for entry, taken in by_entry.items()
        ]

    def _workload(self, entry: Entry, case: Case, dtype: str) -> Workload:
        return Workload.make(
            entry.impl,
            case,
            entry.p,
            DTYPES[dtype],
            backend=self.backend,
            input_grad=self.input_grad,
        )

    def _gemm_rate(self, dtype: torch.dtype) -> measure.GemmRate:
        computed_in = torch.float64 if dtype == torch.float64 else torch.float32
        if computed_in not in self._gemm:
            self._gemm[computed_in] = measure.GemmRate(computed_in)
        return self._gemm[computed_in]

    def _row(
        self,
        entry: Entry,
        case: Case,
        dtype: str,
        mode: str,
        taken: measure.Samples,
        baseline: measure.Samples | None,
        errors: gate.Errors,
    ) -> report.Row:
        q1, median, q3 = taken.quartiles_ms()
        ratio_q1, ratio, ratio_q3 = baseline.ratio_to(taken) if baseline else (None, None, None)
        work = cases.gflop(case, mode, entry.p, input_grad=self.input_grad)
        gflops = work / (median * 1e-3)
        peak = None
        if self.memory and mode == "forward+backward":
            peak = memory.peak_mb(entry.impl, case, entry.p, DTYPES[dtype], backend=self.backend)
        return report.Row(
            op="lstm",
            T=case.steps,
            B=case.batch,
            I=case.input_size,
            H=case.hidden_size,
            dtype=dtype,
            p=entry.p,
            mode=mode,
            impl=entry.impl,
            threads=torch.get_num_threads(),
            median_ms=median,
            q1_ms=q1,
            q3_ms=q3,
            runs=len(taken.seconds),
            ratio_to_torch=ratio,
            ratio_q1=ratio_q1,
            ratio_q3=ratio_q3,
            gflops=gflops,
            share_of_sgemm=gflops / self._gemm_rate(DTYPES[dtype]).gflops(),
            peak_mb=peak,
            error=errors.largest,
            machine=machine.name(),
            torch=torch.__version__,
            version=throughtime.__version__,
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            command=shlex.join(sys.argv),
        )
