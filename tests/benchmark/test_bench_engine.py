"""The engine of all benchmarks: who takes part, what the rows say, peers that may be missing."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from bench import engine, gate, measure, memory, outside, peers
from bench.cases import Case
from bench.cell import OURS, Cell, Contestant
from bench.engine import Bench
from bench.gate import Gate
from bench.lstm import Lstm
from bench.measure import Plan, Samples
from bench.relevancy import Case as RelevancyCase
from bench.relevancy import Relevancy
from bench.rows import Row
from torch import Tensor, nn

import throughtime

TINY = Case(6, 3, 2, 5)
ONCE = Plan(1, exactly=True)


def make(**options: Any) -> Bench:
    return Bench(Lstm(), **{"memory": False, "plan": ONCE, **options})


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds of fixed seconds: ours 1 and 2, the reference 6, nn.LSTM 3, the loop 4."""
    seconds = {"cpu": (1.0, 2.0), "reference": (6.0, 6.0), "torch": (3.0, 3.0), "loop": (4.0, 4.0)}

    def alternate(runs: dict[engine.Key, Any], *rest: Any, **options: Any) -> Any:
        assert all(callable(run) for run in runs.values())
        return {
            key: Samples(dict(enumerate(seconds[key[0].backend or key[0].impl]))) for key in runs
        }

    class Rates:
        timer = None

        def __init__(self, device: str, dtype: str) -> None:
            self.matmul = self.copy = self

        def median(self) -> float:
            return 1e-6

    monkeypatch.setattr(measure, "alternate", alternate)
    monkeypatch.setattr(engine, "Rates", Rates)


def by_name(rows: list[Row], p: float = 0.0) -> dict[str, Row]:
    return {row.contestant: row for row in rows if row.p == p}


@pytest.mark.usefixtures("times")
def test_ratios_by_hand() -> None:
    bench = make(backends=["cpu", "reference"], peers=["torch", "loop"])
    rows = by_name(bench.rows([TINY]))
    ours, reference = rows["throughtime (cpu)"], rows["throughtime (reference)"]
    assert (ours.median_ms, ours.q1_ms, ours.q3_ms, ours.runs) == (1500, 1250, 1750, 2)
    assert (ours.ratio, ours.ratio_q1, ours.ratio_q3) == (1, 1, 1)
    assert ours.reference_ratio == 4.5  # 6 / 1 and 6 / 2
    assert ours.best_peer_ratio == 2.25  # nn.LSTM: 3 / 1 and 3 / 2
    assert (reference.ratio, reference.best_peer_ratio) == (4.5, 0.5)
    assert rows["torch"].ratio == 2.25 and rows["torch"].reference_ratio == 2
    assert rows["loop"].best_peer_ratio is None
    flop = 1e9 * Lstm().gflop(OURS, Cell(TINY))
    assert ours.gflops == pytest.approx(1e-9 * flop / 1.5)
    assert ours.share_of_matmul == pytest.approx(1e6 * ours.gflops)
    assert ours.gbs == pytest.approx(Lstm().gbyte(OURS, Cell(TINY)) / 1.5)
    assert ours.us_per_query == pytest.approx(1.5e6 / 18)


@pytest.mark.usefixtures("times")
def test_a_peer_without_h_detach_is_in_every_cell() -> None:
    rows = make(ps=[0.0, 0.5]).rows([TINY])
    assert [(row.contestant, row.p) for row in rows] == [
        ("throughtime (cpu)", 0.0),
        ("torch", 0.0),
        ("throughtime (cpu)", 0.5),
        ("torch", 0.5),
    ]
    one, other = (by_name(rows, p)["torch"] for p in (0.0, 0.5))
    assert (one.note, other.note) == ("", "no h-detach: timed at p = 0")
    assert (one.median_ms, one.gflops, one.ratio) == (other.median_ms, other.gflops, other.ratio)
    ours = [by_name(rows, p)["throughtime (cpu)"].gflops or 0 for p in (0.0, 0.5)]
    assert ours[1] < ours[0], "a detached step is spared a product"


def test_it_is_timed_once_for_all_p(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    right = measure.alternate

    def alternate(runs: dict[engine.Key, Any], *rest: Any, **options: Any) -> Any:
        timed.extend(f"{contestant}, {cell.p:g}, {cell.mode}" for contestant, cell in runs)
        return right(runs, *rest, **options)

    monkeypatch.setattr(measure, "alternate", alternate)
    make(ps=[0.0, 0.5], modes=["forward+backward", "inference"]).rows([TINY])
    assert timed == [
        "throughtime (cpu), 0, forward+backward",
        "torch, 0, forward+backward",
        "throughtime (cpu), 0.5, forward+backward",
        "throughtime (cpu), 0, inference",
        "torch, 0, inference",
    ]


@pytest.mark.usefixtures("times")
def test_what_auto_chooses_takes_part_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make(backends=["auto", "cpu", "reference"], peers=[]).rows([TINY])
    assert [row.backend for row in rows] == ["cpu", "reference"]
    monkeypatch.setenv("THROUGHTIME_BACKEND", "reference")
    (row,) = make(peers=[]).rows([TINY])
    assert row.backend == "reference"


@pytest.mark.usefixtures("times")
def test_a_backend_that_cannot_run_is_a_row_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    bench = make(backends=["triton", "cpu"])
    triton, cpu, torch_ = bench.rows([TINY])
    assert triton.median_ms is None and "Triton needs a GPU" in triton.note
    assert (cpu.ratio, torch_.ratio) == (1, 2.25), "ours is the first that can run"
    assert not bench.red


def test_a_missing_device_is_a_row_with_the_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    rows = make(devices=["cuda"]).rows([TINY])
    assert all(row.device == "cuda" and row.note.startswith("cannot run: torch ") for row in rows)


@pytest.mark.parametrize("where", ["gate", "full size"])
def test_a_peer_that_breaks_down_is_a_row_with_the_reason(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, input: Tensor, **options: Any) -> Any:
        if where == "gate" or input.size(0) == 40:
            raise RuntimeError("no primitive\nfor this")
        return right(self, input, **options)

    right = peers.LoopLSTM.forward
    monkeypatch.setattr(peers.LoopLSTM, "forward", forward)
    bench = make(peers=["loop", "torch"])
    ours, loop, torch_ = bench.rows([Case(40, 3, 2, 5)])
    assert (loop.note, loop.median_ms) == ("cannot run: no primitive", None)
    assert ours.median_ms and torch_.ratio
    assert not bench.red


def test_no_speed_on_a_red_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_mask(self: Any, input: Tensor, *, detach_mask: Tensor | None = None) -> Any:
        return right(self, input, detach_mask=None if self.backend == "cpu" else detach_mask)

    right = throughtime.LSTM.forward
    monkeypatch.setattr("throughtime.LSTM.forward", without_mask)  # right at p = 0
    bench = make(ps=[0.0, 0.5])
    rows = bench.rows([TINY])
    assert bench.red
    assert by_name(rows)["throughtime (cpu)"].median_ms
    wrong, torch_ = by_name(rows, 0.5).values()
    assert wrong.median_ms is None and wrong.error is None
    assert wrong.note.startswith("WRONG RESULTS, no speed reported: error of d ")
    assert "against the float64 reference, allowed" in wrong.note
    assert torch_.median_ms and torch_.ratio is None, "there is nothing of ours to compare with"


def test_ours_that_breaks_down_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("a bug")

    right = Lstm.work

    def work(self: Lstm, contestant: Contestant, cell: Cell, *, exact: bool = False) -> Any:
        return fail() if contestant.backend == "cpu" else right(self, contestant, cell, exact=exact)

    monkeypatch.setattr(Lstm, "work", work)
    bench = make()
    ours, _ = bench.rows([TINY])
    assert ours.note == "cannot run: a bug" and bench.red


@pytest.mark.usefixtures("times")
def test_memory_is_measured_once_for_what_runs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def peak_mb(operation: Any, contestant: Contestant, cell: Cell) -> float:
        asked.append(f"{contestant}, {cell.p:g}, {cell.mode}")
        return float(len(asked))

    monkeypatch.setattr(memory, "peak_mb", peak_mb)
    rows = make(memory=True, ps=[0.0, 0.5]).rows([TINY])
    assert asked == [
        f"{name}, forward+backward"
        for name in ("throughtime (cpu), 0", "torch, 0", "throughtime (cpu), 0.5")
    ]
    assert [row.peak_mb for row in rows] == [1, 2, 3, 2]


@pytest.mark.usefixtures("times")
def test_a_row_tells_of_the_gradient_of_the_input() -> None:
    ours, _ = make(input_grad=True).rows([TINY])
    assert ours.note == "with the gradient of the input"


def test_relevancy_has_no_p() -> None:
    case = RelevancyCase(9, 1, 1, 4, window_size=3, top_k=2)
    rows = Bench(Relevancy(), peers=["sdpa"], ps=[0.0, 0.5], memory=False, plan=ONCE).rows([case])
    assert [(row.impl, row.p) for row in rows] == [(OURS, None), ("sdpa", None)]


# Peers that a machine may lack


def test_peers_that_are_not_installed_say_so() -> None:
    entries = make(peers=["haste", "flashrnn"]).groups([TINY])[0][0]
    reasons = {entry.contestant.impl: entry.why_not for entry in entries}
    assert reasons == {
        OURS: None,
        "haste": "not installed: there is no module haste_pytorch",
        "flashrnn": "not installed: there is no module flashrnn",
    }


def installed(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def reordered_lstm(kernel: Tensor, recurrent: Tensor, bias: Tensor, x: Tensor) -> Any:
    """An LSTM with the gates i, g, f, o, as Haste has them."""
    h = c = x.new_zeros(x.size(1), recurrent.size(0))
    outputs = []
    for x_t in x:
        i, g, f, o = (x_t @ kernel + h @ recurrent + bias).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), (h[None], c[None])


class FakeHaste(nn.Module):
    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(input_size, 4 * hidden_size))
        self.recurrent_kernel = nn.Parameter(torch.empty(hidden_size, 4 * hidden_size))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))

    def forward(self, input: Tensor) -> Any:
        return reordered_lstm(self.kernel, self.recurrent_kernel, self.bias, input)


def fake_flashrnn(
    Wx: Tensor, R: Tensor, b: Tensor, *, function: str, backend: str, dtype: str
) -> tuple[Tensor, Tensor]:
    """Wx ``[B, T, gate, head, D]``, R ``[gate, head, D, previous D]``, all states out."""
    assert (function, backend, dtype) == ("lstm", "cuda_fused", "float32")
    h = c = Wx.new_zeros(Wx.size(0), *Wx.shape[3:])
    states = []
    for gates_x in Wx.unbind(1):
        recurrent = torch.einsum("bhp,ghdp->bghd", h, R)
        i, f, g, o = (gates_x + recurrent + b).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(torch.stack([h, c]))
    return torch.stack(states, 2), states[-1].unsqueeze(2)


@pytest.mark.parametrize("name", ["haste", "flashrnn"])
def test_outside_peers_pass_the_gate_with_our_weights(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written from their sources: stand-ins with their interface, layouts and order of gates."""
    installed(monkeypatch, "haste_pytorch", LSTM=FakeHaste)
    installed(monkeypatch, "flashrnn")
    installed(monkeypatch, "flashrnn.flashrnn", flashrnn=fake_flashrnn)
    errors = Gate(Lstm(), Cell(TINY)).check(Contestant(name))
    assert errors.passed and len(errors.relative) == 9
    peer = outside.PEERS[name]
    assert peer.why_not("float32", "cuda") is None
    assert peer.why_not("float32", "cpu") == "runs on cuda only, not on cpu"
    wrong = {"haste": "bfloat16", "flashrnn": "float64"}[name]
    assert str(peer.why_not(wrong, "cuda")).endswith(f"only, not in {wrong}")


def test_the_compiled_loop_compiles_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def fake_compile(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", fake_compile)
    monkeypatch.setattr(outside, "_compiled_step", outside._compiled_step.__wrapped__)
    assert Gate(Lstm(), Cell(TINY, p=0.5)).check(Contestant("compiled-loop")).passed
    assert set(compiled) == {peers.lstm_step}


def test_a_compiler_that_is_missing_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside.shutil, "which", lambda name: None)
    reason = Lstm().why_not(Contestant("compiled-loop"), Cell(TINY))
    assert reason == "torch.compile needs a C++ compiler, and there is no c++ here"
    assert Lstm().why_not(Contestant("loop"), Cell(TINY)) is None


def test_a_peer_in_speed_only_is_judged_by_itself() -> None:
    cell = Cell(RelevancyCase(9, 1, 1, 4, window_size=3, top_k=2))
    errors = Gate(Relevancy(), cell).check(Contestant("sdpa"))
    assert 0 < errors.largest < 1e-5 and errors.limit == torch.inf
    assert Contestant(OURS, "reference") == gate.REFERENCE
