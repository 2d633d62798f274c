"""The benchmark: what is counted, how time is taken, and that wrong results get no speed."""

from __future__ import annotations

import csv
import doctest
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from throughtime.bench import cases, gate, lstm, machine, measure, memory, peers, plots, report
from throughtime.bench.cases import Case
from throughtime.bench.measure import Plan, Samples
from torch import Tensor, nn

import throughtime
from throughtime import bench

TINY = Case(6, 3, 2, 5)
LABELS = {name: peer.label for name, peer in peers.PEERS.items()}


@pytest.mark.parametrize(
    "name", sorted(m.name for m in pkgutil.walk_packages(bench.__path__, "throughtime.bench."))
)
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


# Arithmetic and shapes


def test_gflop_by_hand() -> None:
    case = Case(steps=3, batch=5, input_size=2, hidden_size=7)
    product = 2e-9 * 5 * 28  # of one step and one input column
    forward = product * (3 * 2 + 2 * 7)  # step 0 has no state to multiply
    assert cases.gflop(case, "forward") == pytest.approx(forward)
    assert cases.gflop(case, "inference") == pytest.approx(forward)
    both = cases.gflop(case, "forward+backward")
    assert both == pytest.approx(2 * forward + product * 2 * 7)
    assert cases.gflop(case, "forward+backward", 1.0) == pytest.approx(2 * forward)
    with_input = cases.gflop(case, "forward+backward", input_grad=True)
    assert with_input == pytest.approx(both + product * 3 * 2)


def test_sweep_covers_every_size_within_its_limit() -> None:
    measured, left_out = cases.sweep()
    assert {c.steps for c in measured} == {10, 100, 500, 2000}
    assert {c.batch for c in measured} == {1, 8, 64, 256}
    assert {c.hidden_size for c in measured} == {8, 32, 128, 512, 2048}
    assert len(measured) + len(left_out) == 80
    assert max(cases.gflop(c, "forward+backward") for c in measured) <= cases.SWEEP_GFLOP


def test_default_table_is_that_of_the_targets() -> None:
    assert [str(case) for case in cases.DEFAULT] == [
        "784, 100, 1, 128",
        "120, 100, 1, 128",
        "100, 64, 256, 256",
        "100, 64, 512, 512",
        "100, 16, 1024, 1024",
        "300, 1, 128, 128",
    ]


# Timing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run take as many seconds as it returns."""

    def timed(run: Callable[[], Any], repeats: int) -> float:
        return sum(run() for _ in range(repeats))

    monkeypatch.setattr(measure, "_time", timed)


@pytest.mark.usefixtures("clock")
def test_contestants_alternate_and_rotate() -> None:
    order: list[str] = []

    def run(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    runs = {"a": lambda: run("a", 0.4), "b": lambda: run("b", 0.5)}
    pauses: list[int] = []
    plan = Plan(rounds=3, exactly=True)
    samples = measure.alternate(runs, plan, between=lambda: pauses.append(len(order)))
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"  # one warm-up, then three rounds
    assert pauses == [4, 6, 8]
    assert samples["a"].quartiles_ms() == (400, 400, 400)
    assert samples["b"].ratio_to(samples["a"]) == (1.25, 1.25, 1.25)


@pytest.mark.usefixtures("clock")
def test_rounds_go_on_until_there_are_enough_and_long_enough() -> None:
    samples = measure.alternate({"a": lambda: 0.1}, Plan(rounds=5, seconds=1.05))
    assert len(samples["a"].seconds) == 11
    samples = measure.alternate({"a": lambda: 0.5}, Plan(rounds=5, seconds=1.0))
    assert len(samples["a"].seconds) == 5


@pytest.mark.usefixtures("clock")
def test_short_runs_are_repeated_within_a_sample() -> None:
    count = 0

    def run() -> float:
        nonlocal count
        count += 1
        return 0.0005

    samples = measure.alternate({"a": run}, Plan(rounds=2, exactly=True))
    assert count == 4 + 2 * 40
    assert samples["a"].seconds == {0: pytest.approx(0.0005), 1: pytest.approx(0.0005)}


@pytest.mark.usefixtures("clock")
def test_slow_contestants_sit_out_and_ratios_use_common_rounds() -> None:
    samples = measure.alternate({"fast": lambda: 0.01, "slow": lambda: 0.3}, Plan(5, 1.0))
    assert len(samples["slow"].seconds) == 4
    assert len(samples["fast"].seconds) >= 5
    assert samples["slow"].ratio_to(samples["fast"])[1] == pytest.approx(30)
    later = Samples({0: 1.0, 1: 1.0, 2: 100.0})
    assert Samples({0: 2.0, 1: 4.0}).ratio_to(later) == (2.5, 3.0, 3.5)


def test_gemm_rate_is_sampled_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 1.0, 2.0])
    rate = measure.GemmRate(torch.float64, size=10, interval=5)
    seconds = iter([1e-6, 4e-6])
    monkeypatch.setattr(measure, "_time", lambda run, repeats: next(seconds))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(times))
    rate()
    rate()  # too soon
    assert rate.gflops() == pytest.approx(2.0)


# Correctness gate


@pytest.mark.parametrize("impl", peers.PEERS)
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_gate_lets_right_results_pass(impl: str, p: float) -> None:
    errors = gate.check(impl, TINY, p, torch.float32)
    assert errors.passed
    assert set(errors.relative) == {
        "output",
        "h_n",
        "c_n",
        "inference",
        "d input",
        "d weight_ih",
        "d weight_hh",
        "d bias_ih",
        "d bias_hh",
    }
    assert 0 < errors.largest < errors.limit < 1e-4


def test_gate_in_float64_is_strict() -> None:
    assert gate.check("throughtime", TINY, 0.5, torch.float64).limit < 1e-13


class SlightlyWrong(throughtime.LSTM):
    """Off by 0.1 % in one of its results."""

    fault = "output"

    def forward(self, input: Tensor, *, detach_mask: Tensor | None = None) -> Any:  # type: ignore[override]
        if self.fault == "mask":
            detach_mask = None
        output, (h_n, c_n) = super().forward(input, detach_mask=detach_mask)
        if self.fault == "output":
            output = output * 1.001
        elif self.fault == "c_n":
            c_n = c_n * 1.001
        elif self.fault == "gradient":
            output = output * 1.001 - (output * 0.001).detach()
        elif self.fault == "inference" and not torch.is_grad_enabled():
            output = output * 1.001
        elif self.fault == "nan":
            output = output * float("nan")
        return output, (h_n, c_n)


def break_kernel(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Lets every backend but the reference compute something else."""
    right = peers.PEERS["throughtime"]

    def make(input_size: int, hidden_size: int, detach_prob: float, backend: str) -> nn.Module:
        if backend == "reference":
            return right.make(input_size, hidden_size, detach_prob, backend)
        layer = SlightlyWrong(input_size, hidden_size, detach_prob=detach_prob)
        layer.fault = fault
        return layer

    wrong = peers.Peer(right.name, right.label, make, right.detaches)
    monkeypatch.setitem(peers.PEERS, "throughtime", wrong)


@pytest.mark.parametrize("fault", ["output", "c_n", "gradient", "inference", "nan", "mask"])
def test_gate_goes_red(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    break_kernel(monkeypatch, fault)
    assert not gate.check("throughtime", TINY, 0.5, torch.float32).passed


def test_no_speed_on_a_red_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernel(monkeypatch, "mask")  # right at p = 0
    measured = lstm.LstmBench(memory=False, plan=Plan(1, exactly=True))
    rows = measured.rows([TINY])
    assert measured.red
    assert {(row.impl, row.p) for row in rows} == {("throughtime", 0.0), ("torch", 0.0)}
    (note,) = measured.notes
    assert note.startswith("WRONG RESULTS, no speed reported: throughtime, float32, p = 0.5")
    assert "against the float64 reference, allowed" in note


def test_a_peer_that_cannot_run_leaves_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> nn.Module:
        raise RuntimeError("no primitive\nfor this")

    broken = peers.Peer("loop", "Python loop", fail, detaches=True)
    check = gate.check

    def check_with_broken_loop(impl: str, *args: Any, **kwargs: Any) -> gate.Errors:
        return fail() if impl == "loop" else check(impl, *args, **kwargs)  # type: ignore[return-value]

    monkeypatch.setattr(gate, "check", check_with_broken_loop)
    measured = lstm.LstmBench(peers=["loop"], ps=[0.0], memory=False, plan=Plan(1, exactly=True))
    rows = measured.rows([TINY])
    assert broken.label in measured.notes[0]
    assert measured.notes[0].endswith("no primitive")
    assert [row.impl for row in rows] == ["throughtime"]
    assert not measured.red


# Peers


def test_peers_start_alike() -> None:
    layers = [peers.build(name, 3, 4, seed=0) for name in peers.PEERS]
    for layer in layers[1:]:
        for (name, one), (other_name, other) in zip(
            layers[0].named_parameters(), layer.named_parameters(), strict=True
        ):
            assert name == other_name
            assert torch.equal(one, other)
    after = []
    for name in peers.PEERS:
        peers.build(name, 3, 4, seed=0)
        after.append(torch.rand(1).item())
    assert after[0] == after[1] == after[2]


def test_torch_peer_refuses_h_detach() -> None:
    with pytest.raises(
        ValueError, match=r"nn.LSTM has no h-detach: detach_prob must be 0, got 0.5"
    ):
        peers.build("torch", 3, 4, detach_prob=0.5)


@pytest.mark.parametrize("input_grad", [False, True])
@pytest.mark.parametrize("impl", peers.PEERS)
def test_gradients_reach_the_same_tensors(impl: str, input_grad: bool) -> None:
    work = lstm.Workload.make(impl, TINY, 0.5, torch.float32, input_grad=input_grad)
    work.iterate("forward+backward")
    assert (work.input.grad is not None) == input_grad
    first = [parameter.grad.clone() for parameter in work.layer.parameters()]
    work.iterate("forward+backward")
    for before, parameter in zip(first, work.layer.parameters(), strict=True):
        assert before.abs().max() > 0
        assert torch.equal(before, parameter.grad)  # not the sum of two iterations
    for mode in ("forward", "inference"):
        work.iterate(mode)


# Memory and machine


def test_peak_memory_sees_what_is_saved_for_backward() -> None:
    case = Case(200, 64, 64, 128)
    outputs_mb = 200 * 64 * 128 * 4 / 2**20
    peak = memory.peak_mb("torch", case, 0.0, torch.float32)
    assert peak is not None
    assert 4 * outputs_mb < peak < 60 * outputs_mb


def test_failed_memory_process_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "executable", "false")
    assert memory.peak_mb("nothing", TINY, 0.0, torch.float32) is None


def test_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.9, 0.0, 0.0))
    assert machine.busy() is None
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    assert "load average 1.5 on 2 cores" in str(machine.busy())


def test_header_names_what_a_reader_needs() -> None:
    text = "\n".join(machine.header())
    for word in (machine.cpu_model(), f"torch {torch.__version__}", throughtime.__version__):
        assert word in text


# Report


def make_row(**changes: Any) -> report.Row:
    values: dict[str, Any] = {
        "op": "lstm",
        "T": 5,
        "B": 3,
        "I": 2,
        "H": 4,
        "dtype": "float32",
        "p": 0.0,
        "mode": "forward+backward",
        "impl": "throughtime",
        "threads": 1,
        "median_ms": 2.0,
        "q1_ms": 1.5,
        "q3_ms": 2.5,
        "runs": 7,
        "ratio_to_torch": 3.0,
        "ratio_q1": 2.9,
        "ratio_q3": 3.1,
        "gflops": 50.0,
        "share_of_sgemm": 0.7,
        "peak_mb": None,
        "error": 1e-7,
        "machine": "a machine, 2 cores",
        "torch": "2.13",
        "version": "0.1.0",
        "date": "2026-01-01T00:00:00+00:00",
        "command": "throughtime bench lstm",
    }
    return report.Row(**(values | changes))


def test_csv_schema(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    report.write_csv(path, [make_row(), make_row(impl="torch", peak_mb=12.5)])
    with path.open() as file:
        first, second = csv.DictReader(file)
    assert ",".join(first) == (
        "op,T,B,I,H,dtype,p,mode,impl,threads,median_ms,q1_ms,q3_ms,runs,"
        "ratio_to_torch,ratio_q1,ratio_q3,gflops,share_of_sgemm,peak_mb,error,"
        "machine,torch,version,date,command"
    )
    assert (first["impl"], first["peak_mb"], first["machine"]) == (
        "throughtime",
        "",
        "a machine, 2 cores",
    )
    assert (second["peak_mb"], second["error"]) == ("12.5", "1e-07")


def test_table_puts_peers_beside_ours() -> None:
    rows = [
        make_row(),
        make_row(p=0.5, median_ms=1.0, ratio_to_torch=6.0),
        make_row(impl="torch", median_ms=6.0, ratio_to_torch=1.0, peak_mb=9.0),
        make_row(impl="loop", p=0.5, median_ms=8.0, ratio_to_torch=0.7),
    ]
    lines = report.table(rows, LABELS).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2][2:7] == ["0", "2 (1.5-2.5; 7)", "6", "-", "3.00 (2.90-3.10)"]
    assert cells[3][2:7] == ["0.5", "1 (1.5-2.5; 7)", "6", "8", "6.00 (2.90-3.10)"]
    assert cells[2][7:] == ["50", "70%", "-, 9", "1.0e-07"]
    assert len(lines) == 4


# Plots


def test_bars_show_the_measured_values(tmp_path: Path) -> None:
    rows = [make_row(), make_row(impl="torch", median_ms=6.0, ratio_to_torch=1.0)]
    canvas = plots.bench(rows, {"throughtime": "throughtime", "torch": "nn.LSTM"})
    time, ratio, error = canvas.axes
    assert [patch.get_width() for patch in time.patches] == [2.0, 6.0]
    assert [patch.get_width() for patch in ratio.patches] == [3.0, 1.0]
    assert [patch.get_width() for patch in error.patches] == [1e-7, 1e-7]
    assert len({patch.get_hatch() for patch in time.patches}) == 2
    for suffix in ("svg", "png"):
        plots.save(canvas, tmp_path / "new" / f"plot.{suffix}")
    assert "<svg" in (tmp_path / "new" / "plot.svg").read_text()
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_shows_every_shape() -> None:
    rows = [make_row(T=t, B=b, H=h) for t in (10, 100) for b in (1, 8) for h in (8, 64, 512, 999)]
    canvas = plots.bench(rows, {"throughtime": "throughtime", "torch": "nn.LSTM"})
    (panel,) = canvas.axes
    assert sum(len(points.get_offsets()) for points in panel.collections) == len(rows)
