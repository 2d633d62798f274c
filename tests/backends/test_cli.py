"""The package's command line: what it prints, its exit codes, one sentence per mistake."""

from __future__ import annotations

import re

import pytest

import throughtime
from programs import Refusals, printed, run_python
from throughtime import _ext
from throughtime.__main__ import main


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"throughtime\s+{re.escape(throughtime.__version__)}", out)
    assert "reference" in out


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "--H 64 --T 100 --B 8 --dtype bfloat16 --device cuda --backend reference --gpu H100"
    assert main(["explain", *shape.split()]) == 0
    out = capsys.readouterr().out
    assert "hidden_size=64, torch.bfloat16 on cuda" in out
    assert "| reference | yes     | *" in out
    assert "CUDA kernels on H100, T=100, B=8, D=1, H=64, torch.bfloat16" in out


@pytest.mark.skipif(_ext.extension is None, reason="the compiled kernels are not here")
def test_explain_threads(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--I 5 --H 64 --T 100 --B 70 --threads 8"
    assert main(["explain", *sizes.split()]) == 0
    out = capsys.readouterr().out
    assert "CPU kernels on 8 threads, one direction of an LSTM, H=64, T=100, B=70, I=5" in out
    assert re.search(r"forward: workers: [4-8]\b.*; groups: 4 \(rows each: 17 to 18\)", out)
    assert "speed-up over one thread: predicted from" in out
    assert main(["explain"]) == 0
    assert "threads," not in capsys.readouterr().out.partition("CPU workers")[0]


def test_module_runs_as_a_program_and_imports_nothing_of_the_benchmarks() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['throughtime', 'env']\n"
        "try: runpy.run_module('throughtime', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "extra = {'bench', 'matplotlib', 'pandas', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "assert not extra, extra"
    )
    assert "reference" in printed(code)


def test_what_cannot_be_explained_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    Refusals(main, capsys).of_command("explain --device nonsense", "nonsense")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("explain --H 0", "--H: wanted a whole number of 1 or more, got '0'"),
        ("explain --proj -1", "--proj: wanted a whole number of 0 or more, got '-1'"),
        ("bench", "invalid choice: 'bench'"),
        ("", "required: COMMAND"),
    ],
)
def test_options(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Refusals(main, capsys).of_option(command, words)


@pytest.mark.skipif(_ext.extension is None, reason="the compiled kernels are not here")
def test_a_variable_chooses_the_instruction_set() -> None:
    code = "import throughtime; print(throughtime.explain('lstm', hidden_size=8))"
    smallest = _ext.extension.runnable_isas()[-1]
    assert f"instruction set: {smallest})" in printed(code, THROUGHTIME_CPU_ISA=smallest)
    failed = run_python(code, THROUGHTIME_CPU_ISA="mmx")
    assert f"should be one of {', '.join(_ext.extension.runnable_isas())}" in failed.stderr
    assert "got 'mmx'" in failed.stderr
