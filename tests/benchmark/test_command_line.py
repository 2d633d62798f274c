"""`python -m bench`: what it prints, its exit codes, one sentence per mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bench import table
from bench.__main__ import COMMANDS, main
from bench.measure import verify

from programs import Refusals
from throughtime import _install

ROOT = Path(__file__).parents[2]


def test_module_runs_as_a_program_and_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    """The command is a column that is committed with the results."""
    shape = ["--T", "2", "--B", "1", "--H", "2", "--repeats", "1"]
    words = ["lstm", *shape, "--backends", "auto", "--peers", "--csv"]
    command = ["bench", *words, str(tmp_path / "a.csv")]
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)
    written = table.read_csv(tmp_path / "a.csv")["command"].unique()
    assert list(written) == [f"python -m {' '.join(command)}"]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for name, (text, _) in COMMANDS.items():
        assert name in out and text.split()[0] in out
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0


def test_bench_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--T 5 6 --B 2 --H 4 --p 0 0.5 --modes forward+backward inference "
        "--backends cpu reference cuda --peers torch loop --dtype float32 bfloat16 autocast "
        "--repeats 2 --no-memory --threads 1 --csv new/rows.csv --plot plot.svg"
    )
    assert main(["lstm", *options.split()]) == 0
    rows = table.read_csv(tmp_path / "new" / "rows.csv")
    assert len(rows) == 2 * 3 * 3 * 5  # T, dtypes, (inference, both p), contestants
    assert {tuple(row) for row in rows[["T", "B", "I", "H"]].to_numpy()} == {
        (5, 2, 4, 4),
        (6, 2, 4, 4),
    }
    missing = rows["backend"] == "cuda"
    assert rows[missing]["median_ms"].isna().all() and (rows[missing]["note"] != "").all()
    measured = rows[~missing]
    assert (measured["runs"] == 2).all() and (measured["median_ms"] > 0).all()
    assert (measured[["share_of_matmul", "share_of_bandwidth"]] > 0).all(axis=None)
    limits = measured["dtype"].map({"float32": 1e-5, "bfloat16": 0.05, "autocast": 0.05})
    for errors in (measured["error"], measured["rms_error"]):
        assert (errors > limits / 1000).all() and (errors < limits).all()
    assert set(rows["threads"]) == {1} and set(rows["device"]) == {"cpu"} and rows["machine"].all()
    out = capsys.readouterr().out
    assert "| T, B, I, H" in out and "machine: " in out
    for name in ("plot.svg", "plot.png", "plot-roofline.svg", "plot-roofline.png"):
        assert (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("words", "contestants"),
    [
        (
            "rel-lstm --T 12 --B 2 --I 2 --H 5 --window-size 3 --top-k 2 --p 0 0.5",
            "throughtime (cpu), throughtime (reference), loop, torch",
        ),
        (
            "relevancy --T 16 --B 1 --heads 2 --D 8 --window-size 4 --top-k 3 --peers sdpa full",
            "throughtime (cpu), throughtime (reference), sdpa, full",
        ),
        (
            "relevancy --T 4 --B 1 --D 4 --score additive --peers",
            "throughtime (cpu), throughtime (reference)",
        ),
    ],
)
def test_other_operations(words: str, contestants: str) -> None:
    more = ["--repeats", "1", "--no-memory", "--csv", "r.csv"]
    more += ["--dtype", "float32", "bfloat16", "autocast"]
    assert main([*words.split(), *more]) == 0
    rows = table.read_csv(Path("r.csv"))
    named = ", ".join(dict.fromkeys(table.contestant(row) for row in rows.itertuples()))
    assert named == contestants
    assert (rows["median_ms"] > 0).all() and rows["error"].notna().all()
    assert ((rows["rms_error"] > 1e-4) == (rows["dtype"] != "float32")).all()


def test_nothing_of_ours_measured_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--T 2 --B 1 --H 2 --p 0 --backends cuda --repeats 1 --no-memory --csv rows.csv"
    assert main(["lstm", *options.split()]) == 1
    assert "error: nothing of ours was measured" in capsys.readouterr().err
    ours, torch_ = table.read_csv(Path("rows.csv")).itertuples()
    assert ours.note and torch_.median_ms > 0


def test_wrong_results_are_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify.ROUNDING_UNITS, "float32", -1e9)  # nothing can pass
    options = ["--T", "2", "--B", "1", "--H", "2", "--repeats", "1", "--no-memory"]
    assert main(["lstm", *options]) == 1


# Mistakes


def test_a_mistake_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    Refusals(main, capsys).of_command("plot nowhere.csv --out x", "cannot read nowhere.csv")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("lstm --p x", "--p: wanted a number from 0 to 1, got 'x'"),
        ("lstm --p 2", "--p: wanted a number from 0 to 1, got '2'"),
        ("lstm --T 0", "--T: wanted a whole number from 1 to 2147483647, got '0'"),
        ("gru", "invalid choice: 'gru'"),
        ("lstm --backends nonsense", "invalid choice: 'nonsense'"),
        ("relevancy --peers torch", "invalid choice: 'torch'"),
        (f"lstm --csv {__file__}/a.csv", f"--csv: cannot write {__file__}/a.csv: File exists"),
        ("plot a.csv", "required: --out"),
        ("", "required: COMMAND"),
    ],
)
def test_wrong_options_name_wanted_and_got(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Refusals(main, capsys).of_option(command, words)


@pytest.mark.parametrize(
    ("command", "module"),
    [("lstm", "pandas"), ("compare", "scipy"), ("train", "filelock")],
)
def test_missing_extras_are_one_sentence(command: str, module: str) -> None:
    program = (
        f"import sys; sys.modules[{module!r}] = None; from bench.__main__ import main; "
        f"sys.exit(main([{command!r}, '--help']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr == (
        f"error: this command needs {module}, which is not installed; "
        f"install it with: pip install {_install.source('[bench]')}\n"
    )


def test_pytest_benchmark_collects_the_quick_cases_and_verifies() -> None:
    """Ours, the reference and the default peers of each operation; one tiny run."""
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench"]
    done = subprocess.run(
        [*pytest_, "--collect-only"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for words in (
        "lstm-120x100x1x128-p0.5-throughtime(cpu)",
        "rel-lstm-120x10x10x128x10x15-p0-loop",
    ):
        assert f"test_speed[{words}]" in done.stdout
    for end in ("lstm-300x1x128x128-p0-torch]", "(reference)]", "-sdpa]"):
        assert f"{end}\n" in done.stdout
    one = ["--benchmark-disable", "-k", "lstm-300x1x128x128-p0.5 and cpu"]
    done = subprocess.run([*pytest_, *one], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
