"""Benchmarks and training tasks of relevancy screening."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench import (
    command,
    gate,
    loop_rel_lstm,
    memory,
    rel_lstm,
    relevancy,
)
from bench.cell import Cell, Contestant
from bench.engine import Bench
from bench.rows import SCHEMA
from bench.rows import read_csv as read_rows

import throughtime
from closeness import assert_close
from throughtime import functional
from throughtime.__main__ import main


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("window_size", "top_k"), [(2, 2), (3, 0), (30, 2), (1, 1)])
def test_the_authors_loop_computes_the_same(window_size: int, top_k: int) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"window_size": window_size, "top_k": top_k, "dtype": torch.float64}
    loop = loop_rel_lstm.LoopRelLSTM(3, 5, **sizes)
    ours = throughtime.RelLSTM(3, 5, **sizes, backend="reference")
    ours.load_state_dict(loop.state_dict())
    x = torch.randn(14, 3, 3, dtype=torch.float64)
    found, expected = loop(x)[0], ours(x)[0]
    assert_close(found, expected)
    grads = [
        torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        for y, layer in ((found, loop), (expected, ours))
    ]
    for one, other in zip(*grads, strict=True):
        assert_close(one, other)


def test_the_authors_loop_detaches_what_ours_does() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"window_size": 2, "top_k": 2, "dtype": torch.float64}
    loop = loop_rel_lstm.LoopRelLSTM(3, 5, **sizes)
    ours = throughtime.RelLSTM(3, 5, **sizes, backend="reference")
    ours.load_state_dict(loop.state_dict())
    x, mask = torch.randn(14, 3, 3, dtype=torch.float64), torch.rand(14) < 0.5
    grads = [
        torch.autograd.grad(layer(x, detach_mask=m)[0].square().sum(), list(layer.parameters()))
        for layer, m in ((loop, mask), (ours, mask), (ours, None))
    ]
    for found, expected, whole in zip(*grads, strict=True):
        assert_close(found, expected)
        assert not torch.allclose(found, whole)


def test_bench_relevancy_writes_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench relevancy --T 16 40 --B 1 --heads 2 --D 8 --window-size 4 --top-k 3"
    words += " --peers sdpa full --modes forward+backward inference --repeats 1 --no-memory"
    assert main([*words.split(), "--csv", "r.csv", "--plot", "r.svg"]) == 0
    out = capsys.readouterr().out
    assert "| 16, 1, 2, 8, 4, 3" in out and "relevancy, float32, cpu" in out
    rows = read_rows(Path("r.csv"))
    wanted = ["throughtime (cpu)", "throughtime (reference)", "sdpa", "full"]
    assert [row.contestant for row in rows[:4]] == wanted
    assert len(rows) == 2 * 2 * 4 and all(row.median_ms for row in rows)
    assert all(row.error is not None and row.error < 1e-4 for row in rows)
    assert rows[0].ratio == 1 and rows[0].p is None
    assert rows[2].note == "computes another function: a peer in speed only" != rows[1].note
    assert rows[0].median_ms is not None
    assert rows[0].us_per_query == pytest.approx(rows[0].median_ms * 1e3 / (16 * 2), rel=1e-4)
    assert Path("r.svg").read_text().startswith("<?xml")


def test_bench_rel_lstm(capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench rel-lstm --T 12 --B 2 --I 2 --H 5 --window-size 3 --top-k 2 --repeats 1"
    words += " --p 0 0.5 --dtype float32 bfloat16"
    assert main([*words.split(), "--no-memory", "--csv", "l.csv"]) == 0
    rows = read_rows(Path("l.csv"))
    per_cell = ["throughtime (cpu)", "throughtime (reference)", "loop", "torch"]
    assert [row.contestant for row in rows] == 4 * per_cell
    assert {(row.p, row.dtype) for row in rows} == {
        (p, dtype) for p in (0.0, 0.5) for dtype in ("float32", "bfloat16")
    }
    assert all(row.median_ms and row.error is not None for row in rows)


@pytest.mark.parametrize("name", ["output", "last"])
def test_wrong_results_get_no_speed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = relevancy._call

    def wrong(contestant: Any, *rest: Any) -> dict[str, torch.Tensor]:
        found = right(contestant, *rest)
        if contestant.backend == "cpu":
            largest = found[name].abs().max().detach()
            found[name] = found[name] + (largest if name == "last" else largest * 0.01)
        return found

    monkeypatch.setattr(relevancy, "_call", wrong)
    words = "bench relevancy --T 12 --D 4 --window-size 3 --top-k 2 --repeats 1"
    assert main([*words.split(), "--no-memory", "--csv", "w.csv"]) == 1
    ours, reference, sdpa = read_rows(Path("w.csv"))
    assert ours.note.startswith(f"WRONG RESULTS, no speed reported: error of {name}")
    assert ours.median_ms is None and ours.ratio is None and ours.error is None
    assert ours.note in capsys.readouterr().out
    assert reference.ratio == 1 and sdpa.median_ms is not None, "the first that can run"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_loop_fails_and_widens_no_limit(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its retained set is left empty: only steps after the window show that."""
    cell = Cell(rel_lstm.Case(9, 2, 2, 5, window_size=3, top_k=2), dtype)
    right = gate.Gate(rel_lstm.RelLstm(), cell).check(Contestant("loop"))
    assert right.passed
    monkeypatch.setattr(loop_rel_lstm.LoopRelLSTM, "_retain", lambda *arguments: None)
    wrong = gate.Gate(rel_lstm.RelLstm(), cell).check(Contestant("loop"))
    assert not wrong.passed and wrong.limit <= right.limit


def test_among_equals_the_loop_drops_the_newest() -> None:
    layer = loop_rel_lstm.LoopRelLSTM(1, 1, window_size=1, top_k=2)
    kept: list[list[torch.Tensor]] = [[]]
    relevances: list[list[float]] = [[]]
    for step, relevance in enumerate([1.0, 1.0, 1.0, 2.0]):
        state = torch.full((1, 1), float(step))
        layer._retain(state, torch.tensor([relevance]), kept, relevances)
    assert [int(state) for state in kept[0]] == [0, 3] and relevances == [[1.0, 2.0]]


@pytest.mark.parametrize("name", ["relevancy", "rel-lstm"])
def test_the_gate_checks_inference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small: Any = {"window_size": 3, "top_k": 2}
    operation: Any = relevancy.Relevancy()
    case: Any = relevancy.Case(9, 1, 1, 4, **small)
    module, function = functional, "relevancy_attention"
    if name == "rel-lstm":
        operation, case = rel_lstm.RelLstm(), rel_lstm.Case(9, 2, 2, 5, **small)
        module, function = throughtime.RelLSTM, "forward"
    ours = Contestant("throughtime", "cpu")
    right_gate = gate.Gate(operation, Cell(case))
    assert right_gate.check(ours).passed
    right = getattr(module, function)

    def wrong(*arguments: Any, **options: Any) -> Any:
        output, rest = right(*arguments, **options)
        return output * (1.01 if torch.is_inference_mode_enabled() else 1), rest

    monkeypatch.setattr(module, function, wrong)
    errors = right_gate.check(ours)
    assert errors.worst == "inference" and errors.largest > 0.005 and not errors.passed


def test_the_gate_is_long_enough_that_keys_are_replaced() -> None:
    """The first keys have an advantage: the softmax of their queries has few terms."""
    sizes: dict[str, Any] = {"B": 1, "heads": 2, "D": 64, "window_size": 16, "top_k": 16}
    case = relevancy.Relevancy().shortened(relevancy.Case(4096, **sizes))
    work = relevancy.Relevancy().work(gate.REFERENCE, Cell(case), exact=True)
    found = work.call()["last"]
    old = torch.arange(case.T) <= case.T - 1 - 16
    kept = old & (found[0] == case.T - 1)
    assert (kept.sum(1) == 16).all() and kept[:, 16:].any(1).all()


def test_a_peer_that_would_take_too_long_is_a_row_with_the_reason() -> None:
    operation = relevancy.Relevancy()
    ours, reference = (Contestant("throughtime", name) for name in ("cpu", "reference"))
    large = Cell(relevancy.Case(131072))
    for contestant in (Contestant("sdpa"), Contestant("full"), reference):
        reason = operation.why_not(contestant, large)
        assert reason is not None and reason.startswith("not measured: ")
    assert operation.why_not(ours, large) is None
    assert operation.why_not(Contestant("sdpa"), Cell(relevancy.Case(16384))) is None
    slow = rel_lstm.RelLstm().why_not(Contestant("loop"), Cell(rel_lstm.Case(784, 100, 1)))
    assert slow is not None and "a Python loop" in slow


def test_memory_of_relevancy_is_linear() -> None:
    """Quadratic attention at T = 4096 would hold 64 MB of weights per head."""
    case = relevancy.Case(16384, B=1, heads=1, D=32, window_size=16, top_k=16)
    peak = memory.peak_mb(relevancy.Relevancy(), Contestant("throughtime", "cpu"), Cell(case))
    assert peak is not None
    assert 0 < peak < 40  # inputs, outputs and gradients are about 18 MB


def test_additive_score_has_no_full_attention_peer() -> None:
    words = "bench relevancy --score additive --T 4 --B 1 --D 4 --repeats 1 --no-memory --csv a.csv"
    assert main(words.split()) == 0
    *ours, sdpa = read_rows(Path("a.csv"))
    assert all(row.median_ms and row.score == "additive" for row in ours)
    assert sdpa.note == "cannot run: full attention has no additive score"


@pytest.mark.parametrize(
    ("words", "cases"),
    [
        (
            "rel-lstm",
            "320, 10, 10, 128, 10, 15 | 120, 64, 10, 128, 10, 15 | 784, 100, 1, 128, 10, 15",
        ),
        ("rel-lstm --quick --H 64 --window-size 4", "120, 10, 10, 64, 4, 15"),
        (
            "rel-lstm --T 30 40 --B 3 --I 2 --top-k 0",
            "30, 3, 2, 128, 10, 0 | 40, 3, 2, 128, 10, 0",
        ),
        ("relevancy --quick --B 1", "512, 1, 4, 64, 64, 64 | 2048, 1, 4, 64, 64, 64"),
        ("relevancy --T 9 --D 8 16", "9, 2, 4, 8, 64, 64 | 9, 2, 4, 16, 64, 64"),
        ("lstm --T 5 --H 8 9", "5, 64, 8, 8 | 5, 64, 9, 9"),
        ("lstm --T 5 --I 3", "5, 64, 3, 256"),
    ],
)
def test_shapes_that_options_ask_for(
    words: str, cases: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []

    def record(bench: Bench, measured: Any) -> str:
        chosen.extend(str(case) for case in measured)
        return ""

    monkeypatch.setattr(command, "dry_run", record)
    assert main(["bench", *words.split(), "--dry-run"]) == 0
    assert " | ".join(chosen) == cases


def test_every_size_of_a_case_is_a_column_of_the_csv() -> None:
    for case in (relevancy.Case(3), rel_lstm.Case(3, 1, 1)):
        assert SCHEMA.keys() >= set(case.columns())
