"""``bench profile``: phases add up, amounts are right, results do not change."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import profile
from bench.__main__ import main
from bench.operations import OPERATIONS
from bench.operations.operation import OURS, Case, Contestant
from bench.profile import Rates

from throughtime import _ext
from throughtime.ops.precision import multiplies_bfloat16

if _ext.extension is None:
    pytest.skip("the compiled kernels are not in this installation", allow_module_level=True)
kernels: Any = _ext.extension

RATES = Rates(gflops=100.0, ticks=1e9)


@pytest.fixture(autouse=True)
def off_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    kernels.set_profile(False)
    torch.set_num_threads(threads)


LSTM, REL_LSTM, RELEVANCY = OPERATIONS.values()
ATTENTION = {"T": 60, "B": 2, "heads": 2, "D": 20, "window_size": 5, "top_k": 5}
CASES = [
    LSTM.case(T=40, B=6, I=70, H=50, p=0.5),
    LSTM.case(T=40, B=6, I=3, H=50, p=0.0),
    LSTM.case(T=40, B=6, I=70, H=50, p=0.5, dtype="bfloat16"),
    REL_LSTM.case(T=30, B=5, I=3, H=20, window_size=4, top_k=4, p=0.0),
    RELEVANCY.case(**ATTENTION),
    RELEVANCY.case(**ATTENTION, score="additive"),
]
EXPECTED = {
    "lstm": "forward: input recurrent pointwise gather pack; "
    "backward: recurrent pointwise weights gather finish",
    "rel-lstm": "forward: scores sums input; backward: scores sums weights recurrent",
    "relevancy": "forward: scores sums screening; backward: scores sums screening",
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_phases_are_the_whole_operator(case: Case, threads: int) -> None:
    torch.set_num_threads(threads)
    found = profile.profile(kernels, case, RATES, 3)
    iteration = found.loc[found["where"] == "iteration", "ms"].item()
    inside = 0.0
    for text in EXPECTED[case.op].split("; "):
        where, _, phases = text.partition(": ")
        parts = found[found["where"] == where].set_index("phase")["ms"]
        assert parts.sum() == pytest.approx(2 * parts["whole"])
        inside += parts["whole"]
        # Threads that begin late can only make this larger; a phase counted twice, negative.
        assert parts["start"] >= 0
        if case.I != 3 or case.op != "lstm":
            assert (parts[phases.split()] > 0).all()
    outside = found.loc[found["where"] == "Python, dispatch", "ms"].item()
    assert outside > 0 and outside + inside == pytest.approx(iteration)


def test_a_detached_step_costs_no_product() -> None:
    def recurrent(p: float) -> float:
        found = profile.profile(kernels, LSTM.case(T=60, B=20, I=3, H=128, p=p), RATES, 5)
        own = (found["where"] == "backward") & (found["phase"] == "recurrent")
        return float(found.loc[own, "ms"].item())

    assert recurrent(1.0) < 0.2 * recurrent(0.0)


def test_nothing_is_counted_while_profiling_is_off() -> None:
    work = LSTM.work(Contestant(OURS, "cpu"), CASES[0])
    kernels.set_profile(True)
    kernels.set_profile(False)
    work.iterate("forward+backward")
    assert set(kernels.profile("lstm_forward").values()) == {0}
    kernels.set_profile(True)
    work.iterate("forward+backward")
    assert kernels.profile("lstm_forward")["calls"] == 1
    kernels.set_profile(True)
    assert kernels.profile("lstm_forward")["calls"] == 0


def test_profiling_changes_no_bit() -> None:
    work = LSTM.work(Contestant(OURS, "cpu"), CASES[0])
    plain = work.iterate("forward+backward")
    kernels.set_profile(True)
    profiled = work.iterate("forward+backward")
    assert isinstance(plain, tuple) and isinstance(profiled, tuple)
    assert all(torch.equal(a, b) for a, b in zip(plain, profiled, strict=True))


def test_an_unknown_operator_is_an_error() -> None:
    with pytest.raises(ValueError, match="no operator is named 'gru'"):
        kernels.profile("gru")


def test_operations_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor([True, True, False, False, False])  # step 0 has no product to save
    monkeypatch.setattr(profile, "fixed_mask", lambda steps, p: mask)
    found = profile.operations(LSTM.case(T=5, B=3, I=2, H=7))
    step = 2 * 3 * 28 * 7  # one recurrent product
    assert found["forward", "recurrent"] == 5 * step
    assert found["backward", "recurrent"] == 3 * step
    assert found["forward", "input"] == 5 * 2 * 3 * 28 * 2
    assert found["backward", "weights"] == 5 * 2 * 3 * 28 * (7 + 2 + 1)


def test_rates_are_of_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "operations", lambda case: {("forward", "input"): 4e6})
    count = {"calls": 1, "workers": 2, "allocate": 0, "whole": 2_000_000}
    count |= {"input": 2_000_000, "pack": 1_000_000}
    found = profile.phases(CASES[0], {"forward": count}, 4_000_000, RATES)
    by_phase = found[found["where"] == "forward"].set_index("phase")
    assert by_phase.ms["input"] == pytest.approx(1.0)  # two workers, 1e9 ticks a second
    assert by_phase.gflops["input"] == pytest.approx(4.0)
    assert by_phase.of_multiply_adds["input"] == pytest.approx(0.04)
    assert by_phase.share["start"] == pytest.approx(0.125)


@pytest.mark.parametrize("parts", [0, 1, 3])
def test_rates_of_the_machine(parts: int) -> None:
    rates = profile.measure_rates(kernels, parts, repeats=1)
    assert rates.gflops > 0.5
    assert 1e6 < rates.ticks < 1e11


def test_bfloat16_has_tiles_of_its_own_where_the_kernels_multiply_it() -> None:
    """One turn of them has more to do."""
    one, other = (kernels.multiply_adds(1, parts) for parts in (0, 1))
    assert (other > one) == multiplies_bfloat16() and other >= one


@pytest.mark.parametrize(
    ("op", "score"),
    [("lstm", None), ("rel-lstm", None), ("relevancy", "dot"), ("relevancy", "additive")],
)
def test_rate_is_that_of_the_operands(op: str, score: str | None) -> None:
    """bfloat16's where kernels multiply it: the additive score is computed in float32."""
    sizes = ATTENTION if op == "relevancy" else {"T": 4, "B": 2, "H": 8}
    parts = [
        profile.parts_of(OPERATIONS[op].case(**sizes, score=score, dtype=dtype))
        for dtype in ("bfloat16", "float32")
    ]
    assert parts == [int(multiplies_bfloat16() and score != "additive"), 0]


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "deep" / "profile.csv"
    sizes = ["--T", "6", "9", "--B", "3", "--I", "2", "--H", "5", "--p", "0.5"]
    options = ["--dtype", "bfloat16", "--repeats", "1", "--csv", str(file)]
    assert main(["profile", "lstm", *sizes, *options]) == 0
    printed = capsys.readouterr().out
    assert "GFLOP/s" in printed and "| iteration" in printed
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["shape"] for row in rows} == {"6, 3, 2, 5, p 0.5", "9, 3, 2, 5, p 0.5"}
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert {row["phase"] for row in rows} >= {"input", "recurrent", "pointwise", "weights"}


def test_without_compiled_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_ext, "extension", None)
    monkeypatch.setattr(_ext, "why_missing", lambda: "they were left out; install a compiler")
    assert main(["profile", "lstm"]) == 2
    assert "they were left out; install a compiler" in capsys.readouterr().err
