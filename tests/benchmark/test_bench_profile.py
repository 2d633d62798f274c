"""``bench profile``: phases add up, amounts are those of the shape, profiling changes no result."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import profile, profile_gpu, profile_work
from bench.__main__ import main
from bench.profile import Rates
from bench.profile_work import Job

from throughtime import _ext

if _ext.extension is None:
    pytest.skip("the compiled kernels are not in this installation", allow_module_level=True)
kernels: Any = _ext.extension

RATES = Rates(gflops=100.0, gbytes=10.0, ticks=1e9)
FORWARD_AND_BACKWARD = {"forward", "backward"}


@pytest.fixture(autouse=True)
def off_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    kernels.set_profile(False)
    torch.set_num_threads(threads)


def jobs() -> list[Job]:
    return [
        profile_work.lstm(40, 6, 70, 50, p=0.5),
        profile_work.lstm(40, 6, 3, 50, p=0.0),
        profile_work.rel_lstm(30, 5, 3, 20, 4, 4),
        profile_work.relevancy(60, 2, 2, 20, 5, 5),
        profile_work.relevancy(60, 2, 2, 20, 5, 5, score="additive"),
    ]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("job", jobs(), ids=lambda job: f"{job.op} {job.shape}")
def test_phases_are_the_whole_operator(job: Job, threads: int) -> None:
    torch.set_num_threads(threads)
    rows = profile.profile(kernels, job, RATES, 3)
    iteration = next(row.ms for row in rows if row.where == "iteration")
    inside = 0.0
    for where in job.passes.values():
        parts = {row.phase: row.ms for row in rows if row.where == where}
        whole = parts.pop("whole")
        inside += whole
        assert sum(parts.values()) == pytest.approx(whole)
        # Threads that begin late can only make this larger; a phase counted twice, negative.
        assert parts["start"] >= 0
    outside = next(row.ms for row in rows if row.where.startswith("Python"))
    assert outside > 0 and outside + inside == pytest.approx(iteration)


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (
            profile_work.lstm(40, 6, 70, 50, p=0.0),
            {
                ("forward", "input"),
                ("forward", "recurrent"),
                ("forward", "pointwise"),
                ("forward", "gather"),
                ("forward", "pack"),
                ("backward", "recurrent"),
                ("backward", "pointwise"),
                ("backward", "weights"),
                ("backward", "gather"),
                ("backward", "finish"),
            },
        ),
        (
            profile_work.rel_lstm(30, 5, 3, 20, 4, 4),
            {(pass_, phase) for pass_ in FORWARD_AND_BACKWARD for phase in ("scores", "sums")}
            | {("forward", "input"), ("backward", "weights"), ("backward", "recurrent")},
        ),
        (
            profile_work.relevancy(60, 2, 2, 20, 5, 5),
            {
                (pass_, phase)
                for pass_ in FORWARD_AND_BACKWARD
                for phase in ("scores", "sums", "screening")
            },
        ),
    ],
    ids=["lstm", "rel-lstm", "relevancy"],
)
def test_each_phase_takes_time(job: Job, expected: set[tuple[str, str]]) -> None:
    rows = profile.profile(kernels, job, RATES, 1)
    assert expected <= {(row.where, row.phase) for row in rows if row.ms > 0}


def test_a_detached_step_costs_no_product() -> None:
    def recurrent(p: float) -> float:
        rows = profile.profile(kernels, profile_work.lstm(60, 20, 3, 128, p=p), RATES, 5)
        return next(r.ms for r in rows if (r.where, r.phase) == ("backward", "recurrent"))

    assert recurrent(1.0) < 0.2 * recurrent(0.0)


def test_nothing_is_counted_while_profiling_is_off() -> None:
    job = profile_work.lstm(5, 2, 3, 4, p=0.0)
    kernels.set_profile(True)
    kernels.set_profile(False)
    job.iterate()
    assert set(kernels.profile("lstm_forward").values()) == {0}
    kernels.set_profile(True)
    job.iterate()
    assert kernels.profile("lstm_forward")["calls"] == 1
    kernels.set_profile(True)
    assert kernels.profile("lstm_forward")["calls"] == 0


def test_profiling_changes_no_bit() -> None:
    job = profile_work.lstm(20, 6, 3, 50, p=0.5)
    torch.manual_seed(0)
    plain = job.iterate()
    kernels.set_profile(True)
    profiled = job.iterate()
    assert isinstance(plain, tuple) and isinstance(profiled, tuple)
    assert all(torch.equal(a, b) for a, b in zip(plain, profiled, strict=True))


def test_an_unknown_operator_is_an_error() -> None:
    with pytest.raises(ValueError, match="no operator is named 'gru'"):
        kernels.profile("gru")


def test_amounts_by_hand() -> None:
    mask = torch.tensor([True, True, False, False, False])  # the cut at step 0 saves no product
    amounts = profile_work.lstm_amounts(5, 3, 2, 7, mask)
    step = 2 * 3 * 28 * 7  # one recurrent product
    assert amounts["forward", "recurrent"].operations == 5 * step
    assert amounts["backward", "recurrent"].operations == 3 * step
    assert amounts["forward", "input"].operations == 5 * 2 * 3 * 28 * 2
    assert amounts["backward", "weights"].operations == 5 * 2 * 3 * 28 * (7 + 2 + 1)
    assert amounts["forward", "pointwise"].bytes == 4 * 5 * 3 * (5 * 16 + 7)
    assert amounts["backward", "finish"].bytes == 2 * 4 * 28 * (7 + 2)


def test_rates_are_of_work_over_time() -> None:
    amounts = {
        ("forward", "input"): profile_work.Amount(4e6, 0),
        ("forward", "pack"): profile_work.Amount(0, 3e6),
    }
    job = Job("lstm", "shape", lambda: None, {"op": "forward"}, amounts)
    count = {"calls": 1, "workers": 2, "allocate": 0, "whole": 2_000_000}
    rows = profile._rows(
        job, {"op": count | {"input": 2_000_000, "pack": 1_000_000}}, 4_000_000, RATES
    )
    by_phase = {row.phase: row for row in rows if row.where == "forward"}
    assert by_phase["input"].ms == pytest.approx(1.0)  # two workers, 1e9 ticks a second
    assert by_phase["input"].gflops == pytest.approx(4.0)
    assert by_phase["input"].of_multiply_adds == pytest.approx(0.04)
    assert by_phase["pack"].gbytes == pytest.approx(6.0)
    assert by_phase["pack"].of_copying == pytest.approx(0.6)
    assert by_phase["start"].share == pytest.approx(0.125)


def test_rates_of_the_machine() -> None:
    rates = profile.measure_rates(kernels, repeats=1)
    assert rates.gflops > 0.5 and rates.gbytes > 0.1
    assert 1e6 < rates.ticks < 1e11


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "deep" / "profile.csv"
    sizes = ["--T", "6", "9", "--B", "3", "--I", "2", "--H", "5", "--p", "0.5"]
    assert main(["profile", "lstm", *sizes, "--repeats", "1", "--csv", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "GFLOP/s" in printed and "| iteration" in printed
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["shape"] for row in rows} == {"6, 3, 2, 5, p 0.5", "9, 3, 2, 5, p 0.5"}
    assert {row["phase"] for row in rows} >= {"input", "recurrent", "pointwise", "weights"}


@pytest.mark.parametrize(
    ("operation", "sizes"),
    [("rel-lstm", ["--T", "6", "--B", "2", "--H", "8"]), ("relevancy", ["--T", "20", "--D", "8"])],
)
def test_other_operations(
    operation: str, sizes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", operation, *sizes, "--repeats", "1"]) == 0
    assert "scores" in capsys.readouterr().out


def test_without_compiled_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_ext, "extension", None)
    monkeypatch.setattr(_ext, "why_missing", lambda: "they were left out; install a compiler")
    assert main(["profile", "lstm"]) == 2
    assert "they were left out; install a compiler" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_parts_of_a_gpu_iteration_are_timed_one_by_one() -> None:
    """In Triton's interpreter: the clock is this process's, the parts are those of a GPU."""

    def timer(run: Callable[[], object], repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return time.perf_counter() - begin

    shape = (4, 3, 2, 8)
    made = profile_gpu.parts(shape, 1.0, torch.float32, "triton", "cpu")
    rows = profile.gpu_rows(made, shape, timer, 1, "triton")
    assert [(row.where, row.phase) for row in rows] == [
        ("forward", "input"), ("forward", "recurrence"), ("backward", "recurrence"),
        ("backward", "weights"), ("iteration", "whole"),
    ]  # fmt: skip
    assert all(row.ms > 0 for row in rows) and rows[-1].share == 1
    assert sum(row.ms for row in rows[:-1]) < 3 * rows[-1].ms
    assert [part.operations for part in made] == [
        8 * 4 * 3 * 8 * 2, 8 * 4 * 3 * 8 * 8, 0, 8 * 4 * 3 * 8 * 10, None,
    ]  # fmt: skip
    lines = profile.table(rows).splitlines()
    assert "4, 3, 2, 8 (triton)" in lines[2] and lines[-1].count("|") == lines[0].count("|")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "lstm", "--device", "cuda"]) == 2
    assert "error: --device cuda: torch" in capsys.readouterr().err


def test_another_dtype_is_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "lstm", "--dtype", "bfloat16"]) == 2
    assert "error: --dtype bfloat16: the CPU kernels" in capsys.readouterr().err
