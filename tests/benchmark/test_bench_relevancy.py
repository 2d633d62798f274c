"""Benchmarks and training tasks of relevancy screening."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import (
    command,
    gate,
    loop_rel_lstm,
    memory,
    plots,
    rel_lstm,
    relevancy,
    train,
)
from bench.cell import Cell, Contestant
from bench.engine import Bench
from bench.rows import SCHEMA
from bench.rows import read_csv as read_rows
from bench.tasks import attention, copying, denoise, transfer
from bench.tasks.config import Config
from bench.tasks.data import Stream
from bench.tasks.layers import LAYERS

import throughtime
from closeness import assert_close
from throughtime import functional
from throughtime.__main__ import main, make_parser

TINY = Config(
    "copying",
    layer="rel-lstm",
    T=3,
    hidden=8,
    batch=4,
    p=0.0,
    epochs=2,
    updates_per_epoch=3,
    threads=1,
    one_hot=True,
    window_size=2,
    top_k=3,
)
SHORT = ["--hidden", "8", "--batch", "4", "--updates-per-epoch", "3", "--T", "3", "--threads", "1"]


@pytest.fixture(autouse=True)
def _small_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for task in (copying, denoise):
        monkeypatch.setattr(task, "VALIDATION_SIZE", 30)
        monkeypatch.setattr(task, "TEST_SIZE", 40)
    monkeypatch.setattr(transfer, "SEQUENCES", 20)
    monkeypatch.chdir(tmp_path)


def read_csv(path: str) -> list[dict[str, str]]:
    with Path(path).open() as file:
        return list(csv.DictReader(file))


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


# Tasks


@pytest.mark.parametrize("delay", [1, 7, 60])
def test_denoise_layout(delay: int) -> None:
    task = denoise.make(delay, train_size=20, updates_per_epoch=1, seed=0)
    x, y = task.train.batch(torch.arange(20))
    assert x.shape == (delay + 20, 20, 11) and (x.sum(2) == 1).all()
    symbols = x.argmax(2)
    assert (symbols[delay + 9] == 10).all() and not symbols[delay + 10 :].any()
    for k in range(20):
        shown = symbols[: delay + 9, k]
        shown = shown[shown > 0]
        assert len(shown) == 10 and (shown <= 8).all() and torch.equal(shown, y[-10:, k])
        assert not y[:-10, k].any()
    places = task.train.places  # type: ignore[attr-defined]
    assert (places.diff(dim=1) > 0).all() and places.max() < delay + 9
    assert task.classes == 10 and task.target_steps == delay + 20


def test_the_first_steps_of_denoise_hold_few_symbols() -> None:
    """A policy that keeps the first 15 states must fail: they show 15 of 209 steps."""
    x, _ = denoise.make(200, train_size=200, updates_per_epoch=1, seed=0).train.batch(
        torch.arange(200)
    )
    shown = (x[:15].argmax(2) > 0).float().sum(0).mean()
    assert 0.3 < shown < 1.2


def test_one_hot_copying_shows_the_same_symbols() -> None:
    plain, hot = (
        copying.make(5, train_size=6, updates_per_epoch=1, seed=3, one_hot=one_hot)
        for one_hot in (False, True)
    )
    (x, y), (z, w) = (task.train.batch(torch.arange(6)) for task in (plain, hot))
    assert torch.equal(x[..., 0].long(), z.argmax(2)) and torch.equal(y, w)
    assert hot.input_size == 10 and z.shape[2] == 10


@pytest.mark.parametrize("task", [copying, denoise])
def test_a_stream_never_repeats_and_depends_on_its_indices_alone(task: Any) -> None:
    one, other = (task.make(4, train_size=0, updates_per_epoch=9, seed=s).train for s in (0, 1))
    assert isinstance(one, Stream)
    index = torch.tensor([7, 1])
    assert torch.equal(one.batch(index)[0], one.batch(index)[0])
    assert not torch.equal(one.batch(index)[1], other.batch(index)[1])
    for step in (1, 2**16, 2**32):
        assert not torch.equal(one.batch(index)[0], one.batch(index + step)[0])
    # Neighbouring indices give unrelated symbols: 1 of 8 agrees by chance.
    batches = [one.batch(torch.tensor([k] * 50))[1][-10:] for k in range(40)]
    agree = [(a == b).float().mean().item() for a, b in itertools.pairwise(batches)]
    assert abs(sum(agree) / len(agree) - 1 / 8) < 0.01


@pytest.mark.parametrize("layer", [name for name, layer in LAYERS.items() if layer.screens])
def test_every_screening_layer_trains(layer: str) -> None:
    config = Config(**{**TINY.__dict__, "layer": layer, "epochs": 3, "updates_per_epoch": 20})
    trainer = train.make_trainer(config)
    trainer.run(on_epoch=lambda epoch: None)
    losses = [epoch.loss for epoch in trainer.history]
    assert losses[-1] < losses[0]
    built = trainer.model.layer
    assert isinstance(built, throughtime.RelLSTM) and built.window_size == 2
    assert (built.top_k is None) == layer.startswith("mem")
    assert (built.retain == "first") == (layer == "rel-first")
    assert (built.cell == "tanh") == layer.endswith("rnn")


def test_a_stream_continues_bit_for_bit_after_resume() -> None:
    whole = train.make_trainer(Config(**{**TINY.__dict__, "epochs": 4}))
    whole.run(on_epoch=lambda epoch: None)
    first = train.make_trainer(TINY)
    first.run(on_epoch=lambda epoch: None)
    rest = train.make_trainer(Config(**{**TINY.__dict__, "epochs": 4}))
    rest.load_state_dict(first.state_dict())
    rest.run(on_epoch=lambda epoch: None)
    for one, other in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_training_ends_when_it_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = train.make_trainer(Config(**{**TINY.__dict__, "epochs": 9, "stop_at": 0.5}))
    accuracies = iter([0.6, 0.0, 0.4, 0.0, 0.5, 0.0, 0.5, 0.0, 1.0, 1.0])
    monkeypatch.setattr(trainer, "accuracy", lambda *a, **k: next(accuracies))
    trainer.run(on_epoch=lambda epoch: None)
    assert len(trainer.history) == 4  # validation 0.6, 0.4, 0.5, 0.5


def test_preset_transfer_and_picture(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "copying", "--layer", "rel-lstm", "--preset", "quick", *SHORT]
    words += ["--epochs", "1", "--transfer", "6", "9", "--plot", "attention", "--out", "run"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "accuracy at T = 9 without further training" in out
    rows = read_csv("run/transfer.csv")
    columns = ["task", "layer", "seed", "trained_T", "updates", "T", "accuracy", "count"]
    assert list(rows[0]) == columns
    assert [row["T"] for row in rows] == ["3", "6", "9"] and rows[0]["updates"] == "3"
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    for suffix in ("svg", "png"):
        assert Path(f"run/attention.{suffix}").stat().st_size > 1000


def test_the_preset_ends_with_transfer_to_500_and_5000() -> None:
    words = ["train", "denoise", "--layer", "rel-lstm", "--preset", "quick", *SHORT]
    assert main([*words, "--epochs", "1", "--out", "run"]) == 0
    assert [row["T"] for row in read_csv("run/transfer.csv")] == ["3", "500", "5000"]


def test_transfer_measures_the_test_set_of_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = train.make_trainer(TINY)
    seen = []

    def accuracy(sequences: Any, *, count: int, batch: int) -> float:
        seen.append((sequences.delay, count))
        return 0.5

    monkeypatch.setattr(trainer, "accuracy", accuracy)
    assert transfer.accuracies(trainer, [9, 3]) == {3: 0.5, 9: 0.5}
    assert seen == [(3, 20), (9, 20)]


@pytest.mark.parametrize(
    ("layer", "one_hot"), [("rel-rnn", True), ("mem-lstm", True), ("torch", False)]
)
def test_screening_layers_read_copying_one_hot(layer: str, one_hot: bool) -> None:
    words = ["train", "copying", "--layer", layer]
    assert train.make_config(make_parser().parse_args(words)).one_hot is one_hot


@pytest.mark.parametrize("layer", ["rel-lstm", "rel-first"])
def test_the_picture_retains_what_the_layer_retains(layer: str) -> None:
    trainer = train.make_trainer(Config(**{**TINY.__dict__, "layer": layer}))
    with torch.no_grad():  # so far from uniform that later keys win over the first ones
        trainer.model.layer.weight_score_l0.mul_(-30)  # type: ignore[operator,union-attr]
    drawn = attention.picture(trainer)
    assert drawn is not None
    x, _ = trainer.task.test.batch(torch.tensor([0]))
    with torch.no_grad():
        _, state = trainer.model.layer(x[:-1])
    kept = state.position[0, : state.retained, 0].tolist()
    assert drawn[1][-1].nonzero().flatten().tolist() == sorted(kept)
    assert (sorted(kept) == [0, 1, 2]) == (layer == "rel-first")


def test_the_picture_shows_attention_and_marks_what_is_retained() -> None:
    trainer = train.make_trainer(TINY)
    drawn = attention.picture(trainer)
    assert drawn is not None
    weights, retained = drawn
    assert weights.shape == retained.shape == (23, 23)
    assert_close(weights.sum(1), torch.ones(23))
    assert not weights.triu(1).any()
    layer = trainer.model.layer
    assert isinstance(layer, throughtime.RelLSTM) and layer.top_k is not None
    per_query = retained.sum(1)
    assert per_query.max() == layer.top_k and not retained[:2].any()
    assert (weights[retained] > 0).all()
    attended = (weights > 0).sum(1)
    window = torch.arange(1, 24).clamp(max=layer.window_size)
    assert torch.equal(attended, window + per_query)

    canvas = plots.attention(weights.numpy(), retained.numpy(), "a title")
    panel = canvas.axes[0]
    (marks,) = panel.lines
    drawn_marks = {(int(query), int(key)) for key, query in zip(*marks.get_data(), strict=True)}
    assert drawn_marks == {tuple(cell) for cell in retained.nonzero().tolist()} != set()
    assert panel.images[0].get_array().count() == (weights > 0).sum()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layer", "torch", "--plot", "attention"], "--layer torch has no attention; use one of"),
        (["--layer", "torch", "--p", "0.5"], "--layer torch has no h-detach"),
        (["--layer", "torch", "--top-k", "3"], "--top-k makes no difference to --layer torch"),
        (["--layer", "mem-rnn", "--window-size", "3"], "--window-size makes no difference"),
        (["--quick", "--preset", "quick"], "give one of them"),
        (["--layer", "rel-gru"], "invalid choice: 'rel-gru'"),
        (["--stop-at", "1.5"], "wanted a number from 0 to 1"),
        (["--transfer", "0"], "wanted a whole number of 1 or more"),
    ],
)
def test_options_that_contradict(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["train", "denoise", *SHORT, *words])
    except SystemExit as stop:  # argparse itself
        code = int(stop.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err


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
