"""The benchmark: what is counted, how time is taken, and that wrong results get no speed."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import bench
import pytest
import torch
from bench import cases, cuda, gate, machine, measure, memory, peers
from bench.cases import Case
from bench.cell import OURS, Cell, Contestant
from bench.gate import Errors, Gate
from bench.lstm import Lstm
from bench.measure import Plan, Samples
from bench.rel_lstm import Case as RelCase
from bench.rel_lstm import RelLstm
from bench.relevancy import Case as RelevancyCase
from bench.relevancy import Relevancy
from torch import Tensor, nn

import throughtime

TINY = Case(6, 3, 2, 5)
OUR_CPU = Contestant(OURS, "cpu")


@pytest.mark.parametrize(
    "name", sorted(m.name for m in pkgutil.walk_packages(bench.__path__, "bench."))
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


def test_gbyte_by_hand() -> None:
    case = Case(steps=3, batch=5, input_size=2, hidden_size=7)
    x, weights, output = 3 * 5 * 2, 28 * (2 + 7 + 2), 3 * 5 * 7
    forward = x + weights + output
    assert cases.gbyte(case, "forward", 4) == pytest.approx(4e-9 * forward)
    both = forward + x + weights + 2 * output + weights
    assert cases.gbyte(case, "forward+backward", 2) == pytest.approx(2e-9 * both)
    assert cases.gbyte(case, "forward+backward", 2, input_grad=True) == pytest.approx(
        2e-9 * (both + x)
    )


def test_work_of_relevancy_by_hand() -> None:
    # Window 2, one retained key: queries attend 1, 2, 3, 3 keys; all of them without screening.
    case = RelevancyCase(4, B=3, heads=2, D=5, window_size=2, top_k=1)
    cell = Cell(case, mode="forward", dtype="bfloat16")
    assert Relevancy().gflop(OURS, cell) == pytest.approx(1e-9 * 6 * 9 * 4 * 5)
    assert Relevancy().gflop("sdpa", cell) == pytest.approx(1e-9 * 6 * 10 * 4 * 5)
    assert Relevancy().gbyte(OURS, cell) == pytest.approx(2e-9 * 4 * 6 * 4 * 5)
    training = replace(cell, mode="forward+backward")
    assert Relevancy().gflop(OURS, training) == pytest.approx(3 * Relevancy().gflop(OURS, cell))
    assert Relevancy().gbyte(OURS, training) == pytest.approx(2e-9 * 11 * 6 * 4 * 5)


def test_work_of_rel_lstm_by_hand() -> None:
    # Steps 1 to 3 attend 1, 2 and 3 earlier states.
    cell = Cell(RelCase(4, 3, 2, 5, window_size=2, top_k=1), mode="forward")
    gates = cases.gflop(Case(4, 3, 2, 5), "forward")
    attention = 1e-9 * 3 * (2 * 2 * 25 * 3 + 6 * 4 * 5)
    assert RelLstm().gflop(OURS, cell) == pytest.approx(gates + attention)
    assert RelLstm().gflop("torch", cell) == pytest.approx(gates)
    weights = 2 * 25 + 5
    more = RelLstm().gbyte(OURS, cell) - RelLstm().gbyte("torch", cell)
    assert more == pytest.approx(4e-9 * weights)


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
    times = iter([0.0, 1.0, 1.0, 2.0, 2.0])
    rate = measure.GemmRate(torch.float64, size=10, interval=5)
    copy = measure.CopyRate(mb=1, timer=lambda run, repeats: 2e-3)
    seconds = iter([1e-6, 4e-6])
    monkeypatch.setattr(measure, "_time", lambda run, repeats: next(seconds))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(times))
    rate()
    rate()  # too soon
    assert rate.median() == pytest.approx(2.0)
    assert copy.median() == pytest.approx(1.048576)  # GB/s: 1 MB read and written in 2 ms


# Correctness gate


def check(impl: Contestant, p: float, dtype: str = "float32") -> Errors:
    return Gate(Lstm(), Cell(TINY, dtype, p)).check(impl)


@pytest.mark.parametrize("impl", [OUR_CPU, Contestant(OURS, "reference"), Contestant("loop")])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_gate_lets_right_results_pass(impl: Contestant, p: float) -> None:
    errors = check(impl, p)
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
    assert check(OUR_CPU, 0.5, "float64").limit < 1e-13


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gate_sees_a_missing_mask_in_16_bits(dtype: str) -> None:
    """nn.LSTM has none: its gradients of p = 0.5 are wrong by 9 %."""
    assert check(OUR_CPU, 0.5, dtype).passed
    assert check(Contestant("torch"), 0.0, dtype).passed
    assert not check(Contestant("torch"), 0.5, dtype).passed


def test_a_single_step_has_gradients_of_zero() -> None:
    """That of the recurrent weights; 0 / 0 is no error."""
    assert Gate(Lstm(), Cell(Case(1, 3, 2, 5))).check(OUR_CPU).passed
    assert gate.relative_errors({"x": torch.ones(1)}, {"x": torch.zeros(1)}) == {"x": torch.inf}


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


@pytest.mark.parametrize("fault", ["output", "c_n", "gradient", "inference", "nan", "mask"])
def test_gate_goes_red(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    right = peers.PEERS["throughtime"]

    def make(input_size: int, hidden_size: int, detach_prob: float, backend: str) -> nn.Module:
        if backend == "reference":
            return right.make(input_size, hidden_size, detach_prob, backend)
        layer = SlightlyWrong(input_size, hidden_size, detach_prob=detach_prob)
        layer.fault = fault
        return layer

    wrong = peers.Peer(right.name, right.label, make, right.detaches)
    monkeypatch.setitem(peers.PEERS, "throughtime", wrong)
    assert not check(OUR_CPU, 0.5).passed


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
    cell = Cell(TINY, p=0.5, input_grad=input_grad)
    work = Lstm().work(Contestant(impl), cell)
    assert ("input" in work.leaves) == input_grad
    grads: Any = work.iterate("forward+backward")
    assert len(grads) == len(work.leaves) == 4 + input_grad
    again: Any = work.iterate("forward+backward")
    for before, after in zip(grads, again, strict=True):
        assert before.abs().max() > 0
        assert torch.equal(before, after)  # not the sum of two iterations
    kept: Any = work.iterate("forward")
    inferred: Any = work.iterate("inference")
    assert kept["output"].requires_grad and not inferred["output"].requires_grad


# Memory and machine


def test_peak_memory_sees_what_is_saved_for_backward() -> None:
    case = Case(200, 64, 64, 128)
    outputs_mb = 200 * 64 * 128 * 4 / 2**20
    peaks = {
        mode: memory.peak_mb(Lstm(), Contestant("torch"), Cell(case, mode=mode))
        for mode in ("forward+backward", "inference")
    }
    training, inference = peaks["forward+backward"], peaks["inference"]
    assert training is not None and inference is not None
    assert outputs_mb < inference < training
    assert 4 * outputs_mb < training < 60 * outputs_mb


def test_failed_memory_process_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "executable", "false")
    assert memory.peak_mb(Lstm(), OUR_CPU, Cell(TINY)) is None


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


def test_slug_is_the_name_of_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 96)
    monkeypatch.setattr(machine, "cpu_model", lambda: "(R) Xeon(R) @ 2.1GHz")
    assert machine.slug() == "r-xeon-r-2-1ghz-96core"


# What can be tested of a GPU without one


class FakeEvent:
    """Counts milliseconds: every recorded event is 3 later than the one before."""

    now = 0.0

    def __init__(self, device: str, enable_timing: bool) -> None:
        assert device == "cuda" and enable_timing

    def record(self) -> None:
        FakeEvent.now += 3
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_every_run_on_a_gpu_is_timed_after_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Buffer:
        def zero_(self) -> None:
            order.append("flush")

    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: Buffer())
    monkeypatch.setattr(torch, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    seconds = cuda.EventTimer()(lambda: order.append("run"), 3)
    assert order == ["flush", "run"] * 3 + ["wait"]
    assert seconds == pytest.approx(3 * 3e-3)


def test_a_gpu_is_named_with_its_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        stdout = "A GPU, 580.1, 1410 MHz, 1980 MHz, 2619 MHz, 2619 MHz, 41\n"

    monkeypatch.setattr(cuda, "why_not", lambda: None)
    monkeypatch.setattr(cuda.subprocess, "run", lambda command, **options: Answer())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    *_, last = machine.header(["cpu", "cuda"])
    assert "name, driver_version, sm, max.sm, mem, max.mem" in last and "1410 MHz" in last
    assert machine.name("cuda").startswith("A GPU; ")
    assert machine.name("cpu") == machine.name() in machine.name("cuda")

    def missing(command: list[str], **options: Any) -> Answer:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(cuda.subprocess, "run", missing)
    assert cuda.header() == ["gpu: A GPU; clocks unknown (nvidia-smi)"]
