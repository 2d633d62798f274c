"""`python -m bench`: what it prints, its exit codes, one sentence per mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bench import gate
from bench.__main__ import main
from bench.rooms import OPERATIONS
from bench.rows import SCHEMA, read_csv

from throughtime import _install

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_module_runs_as_a_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bench", "lstm", "--list"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert "784, 100, 1, 128" in result.stdout


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


# Mistakes


@pytest.mark.parametrize(
    ("command", "words"),
    [
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


@pytest.mark.parametrize(
    ("command", "module", "distribution"),
    [
        ("lstm --quick", "tqdm", "tqdm"),
        ("lstm --quick --plot x.svg", "matplotlib", "matplotlib"),
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
