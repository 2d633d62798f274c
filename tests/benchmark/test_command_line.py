"""`python -m bench`: what it prints, its exit codes, one sentence per mistake."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bench import cases, demo, gate
from bench.__main__ import main
from bench.cases import Case
from bench.rooms import OPERATIONS
from bench.rows import SCHEMA, read_csv
from bench.tasks import copying

import throughtime
from throughtime import _install

ROOT = Path(__file__).parents[2]

COPYING = ["train", "copying", "--T", "3", "--hidden", "8", "--batch", "4"]
COPYING += ["--updates-per-epoch", "3", "--train-size", "20", "--threads", "1"]
TIMES = {"seconds", "sequences_per_s"}


@pytest.fixture(autouse=True)
def _small_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(copying, "VALIDATION_SIZE", 30)
    monkeypatch.setattr(copying, "TEST_SIZE", 40)
    monkeypatch.chdir(tmp_path)


def read_log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def test_module_runs_as_a_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bench", "lstm", "--list"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert "784, 100, 1, 128" in result.stdout


# Training


def test_train_copying_writes_its_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COPYING, "--epochs", "3", "--anneal", "1", "--out", "run"]) == 0
    folder = tmp_path / "run"
    assert [row["p"] for row in read_log(folder)] == ["0.5", "0.5", "0"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["T"], config["hidden"], config["lr"]) == (3, 8, 1e-3)
    assert config["versions"]["throughtime"] == throughtime.__version__
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "curves.svg").read_text()
    out = capsys.readouterr().out
    assert sum(line.startswith("epoch ") for line in out.splitlines()) == 3
    assert "best validation accuracy" in out


@pytest.mark.parametrize("layer", ["throughtime", "torch"])
def test_train_digits(layer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"--layer {layer} --epochs 1 --hidden 8 --batch 600 --permute --threads 1"
    assert main(["train", "digits", *options.split()]) == 0
    p = "0.25" if layer == "throughtime" else "0"
    (row,) = read_log(tmp_path / "runs" / f"digits-permuted-{layer}-p{p}-seed0")
    assert (row["p"], row["updates"]) == (p, "2")
    told = "nn.LSTM has no h-detach: training with p = 0" in capsys.readouterr().out
    assert told == (layer == "torch")


def test_quick_fills_only_what_is_not_given(tmp_path: Path) -> None:
    options = "--quick --updates-per-epoch 2 --hidden 8 --T 3 --threads 1 --out run"
    assert main(["train", "copying", *options.split()]) == 0
    assert [row["updates"] for row in read_log(tmp_path / "run")] == ["2", "4", "6"]


def test_ctrl_c_then_resume_equals_an_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the program below knows nothing of smaller sets
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [*COPYING, "--epochs", "20", "--anneal", "2", "--out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", *command, str(stopped)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch  2/"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    kept = len(read_log(stopped))
    assert 2 <= kept < 20
    assert (stopped / "curves.svg").exists()
    assert f"{kept} finished epochs are kept in {stopped}" in errors
    (told,) = (line for line in errors.splitlines() if line.startswith("continue with: "))
    words = shlex.split(told.removeprefix("continue with: "))
    assert words[:3] == ["python", "-m", "bench"]

    assert main(words[3:]) == 0
    assert main([*command, str(whole)]) == 0
    assert read_log(stopped) == read_log(whole)
    assert len(read_log(whole)) == 20


def test_resume_without_a_finished_epoch_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COPYING, "--epochs", "1", "--anneal", "0", "--out", "new", "--resume"]) == 0
    assert "new holds no finished epoch yet" in capsys.readouterr().out


def test_non_finite_loss_ends_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--epochs 2 --anneal 0 --lr 1e37 --clip 1e38"
    assert main([*COPYING, *options.split()]) == 1
    error = capsys.readouterr().err
    assert "error: the loss is " in error
    assert "at update 2 (epoch 1); try a smaller --lr" in error


# Benchmark


def test_bench_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--T 5 6 --B 2 --H 4 --p 0 0.5 --modes forward forward+backward inference "
        "--backends cpu reference cuda --peers torch loop haste --dtype float32 bfloat16 "
        "--repeats 2 --no-memory --threads 1 --csv new/rows.csv --plot plot.svg"
    )
    assert main(["lstm", *options.split()]) == 0
    rows = read_csv(tmp_path / "new" / "rows.csv")
    assert len(rows) == 2 * 2 * 4 * 6  # T, dtypes, (forward, inference, both p), contestants
    assert {(row.T, row.B, row.I, row.H) for row in rows} == {(5, 2, 4, 4), (6, 2, 4, 4)}
    for row in rows:
        if row.backend == "cuda" or row.impl == "haste":
            assert row.median_ms is None and row.note
            continue
        assert row.runs == 2 and row.median_ms and row.share_of_matmul and row.share_of_bandwidth
        assert row.error is not None and row.error < (1e-5 if row.dtype == "float32" else 0.05)
        assert row.threads == 1 and row.device == "cpu" and row.machine
    out = capsys.readouterr().out
    assert "| T, B, I, H" in out and "not installed: there is no module haste_pytorch" in out
    assert "machine: " in out
    for name in ("plot.svg", "plot.png", "plot-roofline.svg", "plot-roofline.png"):
        assert (tmp_path / name).exists()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_bench_list(operation: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([operation, "--list"]) == 0
    out = capsys.readouterr().out
    room = OPERATIONS[operation]
    for group in (room.default(), room.quick(), room.sweep()[0]):
        assert all(f"  {case}\n" in out for case in group)
    assert ("left out of --sweep (" in out) == (operation == "lstm")
    for peer, label in room.labels.items():
        assert f"  {peer}: {label}; " in out
    assert "  throughtime (reference): throughtime; can run" in out


def test_bench_dry_run_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.engine.Bench.rows", None)
    words = "--T 5 --B 2 --H 4 --p 0 0.5 --backends cpu cuda --peers torch haste --dry-run"
    assert main(["lstm", *words.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:10]]
    assert [cell[:6] for cell in cells] == [
        ["5, 2, 4, 4", "float32", "cpu", "forward+backward", p, name]
        for p in ("0", "0.5")
        for name in ("throughtime (cpu)", "throughtime (cuda)", "torch", "haste")
    ]
    assert cells[0][6] == cells[2][6] == "run"
    assert cells[1][6].startswith("cannot run: ") and cells[3][6].startswith("not installed: ")
    assert lines[-1] == "4 of 8 would run"


def test_bench_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SCHEMA)
    assert all(line.endswith(text) for line, text in zip(lines, SCHEMA.values(), strict=True))


def test_nothing_of_ours_measured_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--T 2 --B 1 --H 2 --p 0 --backends cuda --repeats 1 --no-memory --csv rows.csv"
    assert main(["lstm", *options.split()]) == 1
    assert "error: nothing of ours was measured" in capsys.readouterr().err
    ours, torch_ = read_csv(Path("rows.csv"))
    assert ours.note and torch_.median_ms


def test_red_gate_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gate.ROUNDING_UNITS, "float32", -1e9)  # nothing can pass
    options = ["--T", "2", "--B", "1", "--H", "2", "--repeats", "1", "--no-memory"]
    assert main(["lstm", *options]) == 1


def test_demo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "QUICK", (Case(5, 2, 1, 4),))
    monkeypatch.setattr(demo, "QUICK_EPOCHS", 1)
    assert main(["demo", "--quick", "--out", "shown"]) == 0
    assert (tmp_path / "shown" / "demo.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "plot: shown/demo.png" in out.replace(os.sep, "/")
    lines = out.splitlines()
    assert sum(line.endswith("| right |") for line in lines) == 2 * len(demo.CHECKED)
    ours, theirs = (
        next(line.split("|")[2] for line in lines if line.startswith(f"| {name} "))
        for name in ("throughtime", "nn.LSTM")
    )
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


# Mistakes


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train copying --layer torch --p 0.5", "no h-detach, so --p must be 0, got 0.5"),
        ("train copying --epochs 3 --anneal 4", "--anneal must be at most --epochs (3), got 4"),
        ("train digits --mnist nowhere", "--mnist: there is no folder nowhere"),
        ("train digits --device cuda:99", "--device cuda:99"),
        ("train digits --device nonsense", "--device nonsense"),
        ("train digits --backend cuda", "backend='cuda' cannot run"),
        ("train digits --backend nonsense", "nonsense"),
        ("lstm --sweep --T 5", "--sweep has its own shapes"),
        ("plot nowhere.csv --out x", "cannot read nowhere.csv"),
    ],
)
def test_mistakes_are_one_sentence(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train digits --p 1.5", "--p: wanted a number from 0 to 1, got '1.5'"),
        ("train digits --lr 0", "--lr: wanted a number above 0, got '0'"),
        ("train digits --epochs none", "--epochs: wanted a whole number of 1 or more, got 'none'"),
        ("train digits --anneal -1", "--anneal: wanted a whole number of 0 or more, got '-1'"),
        ("lstm --p x", "--p: wanted a number, got 'x'"),
        ("gru", "invalid choice: 'gru'"),
        ("lstm --backends nonsense", "invalid choice: 'nonsense'"),
        ("relevancy --peers torch", "invalid choice: 'torch'"),
        ("plot a.csv", "required: --out"),
        ("", "required: COMMAND"),
    ],
)
def test_wrong_options_name_wanted_and_got(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_out_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([*COPYING, "--epochs", "50", "--out", "file/run"]) == 2
    assert "--out: cannot make file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "module", "distribution"),
    [
        ("train digits", "tqdm", "tqdm"),
        ("train digits", "matplotlib", "matplotlib"),
        ("train digits", "sklearn.datasets", "scikit-learn"),
        ("lstm --quick", "tqdm", "tqdm"),
        ("lstm --quick --plot x.svg", "matplotlib", "matplotlib"),
        ("demo", "matplotlib", "matplotlib"),
    ],
)
def test_missing_extras_are_one_sentence(
    command: str,
    module: str,
    distribution: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(command.split()) == 2
    assert capsys.readouterr().err == (
        f"error: this command needs {distribution}, which is not installed; "
        f"install it with: pip install {_install.source('[bench]')}\n"
    )
