"""`train` and `demo`: what they print and keep, their exit codes, one sentence per mistake."""

from __future__ import annotations

import csv
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.__main__ import main
from bench.train import command, config, demo
from bench.train.folder import RunFolder
from bench.train.trainer import Evaluation

import throughtime

ROOT = Path(__file__).parents[2]
TIMES = ("seconds", "cpu_seconds", "sequences_per_s")
SHORT = ["--T", "3", "--hidden", "8", "--batch", "4", "--updates-per-epoch", "3", "--threads", "1"]
COPYING = ["train", "copying", *SHORT, "--train-size", "20", "--anneal", "0", "--out", "run"]
ONE = [*COPYING, "--epochs", "1"]


def read_csv(path: Path | str) -> list[dict[str, str]]:
    with Path(path).open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def files(folder: Path | str) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def refused(words: list[str], capsys: pytest.CaptureFixture[str], *, code: int = 2) -> str:
    """The one sentence of a command that fails."""
    capsys.readouterr()
    try:
        found = main(words)
    except SystemExit as stop:  # argparse itself
        found = int(stop.code or 0)
    error = capsys.readouterr().err
    assert found == code and "error: " in error and "Traceback" not in error
    assert code == 1 or "usage: " in error or error.count("\n") == 1
    return error


# What is printed and kept


def test_train_copying_keeps_its_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COPYING, "--epochs", "3", "--anneal", "1"]) == 0
    rows = read_csv("run/log.csv")
    assert [row["p"] for row in rows] == ["0.5", "0.5", "0"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["updates"] for row in rows] == ["3", "6", "9"]
    stored = json.loads(Path("run/config.json").read_text())
    assert (stored["T"], stored["hidden"], stored["lr"]) == (3, 8, 1e-3)
    assert stored["versions"]["throughtime"] == throughtime.__version__
    assert Path("run/curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("run/curves.svg").read_text()
    out = capsys.readouterr().out
    assert sum(line.startswith("epoch ") for line in out.splitlines()) == 3
    assert "best validation accuracy" in out


def test_the_best_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.1, 0.0, 0.5, 0.0, 0.5, 0.0])  # validation and test, in turn
    monkeypatch.setattr(
        command.Trainer, "evaluate", lambda *a, **k: Evaluation(0.0, next(accuracies))
    )
    assert main([*COPYING, "--epochs", "2"]) == 0
    last = torch.load("run/checkpoint.pt", weights_only=True)["model"]
    assert main([*COPYING, "--epochs", "3", "--resume"]) == 0
    best = torch.load("run/best.pt", weights_only=True)
    assert best["epoch"] == 2 and best["config"]["hidden"] == 8
    assert all(torch.equal(value, last[name]) for name, value in best["model"].items())


@pytest.mark.parametrize("layer", ["throughtime", "torch"])
def test_train_pixels(layer: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"--layer {layer} --epochs 1 --hidden 8 --batch 600 --permute --threads 1"
    assert main(["train", "pixels", *options.split()]) == 0
    p = "0.25" if layer == "throughtime" else "0"
    (row,) = read_csv(f"runs/pixels-permuted-{layer}-p{p}-seed0/log.csv")
    assert (row["p"], row["updates"]) == (p, "2")
    told = "nn.LSTM has no h-detach: training with p = 0" in capsys.readouterr().out
    assert told == (layer == "torch")


@pytest.mark.parametrize("lengths", [["500", "5000"], ["6", "9"]])
def test_preset_and_transfer(lengths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "denoise", "--layer", "rel-lstm", "--preset", "quick", *SHORT]
    given = [] if lengths == ["500", "5000"] else ["--transfer", *lengths]  # or by the preset
    assert main([*words, *given, "--epochs", "1", "--out", "run"]) == 0
    assert f"accuracy at T = {lengths[1]} without further training" in capsys.readouterr().out
    rows = read_csv("run/transfer.csv")
    columns = ["task", "layer", "seed", "trained_T", "updates", "T", "accuracy", "count"]
    assert list(rows[0]) == columns
    assert [row["T"] for row in rows] == ["3", *lengths] and rows[0]["updates"] == "3"
    assert all(0 <= float(row["accuracy"]) <= 1 and row["count"] == "20" for row in rows)


@pytest.mark.parametrize(("layer", "one_hot"), [("rel-rnn", True), ("torch", False)])
def test_screening_layers_read_copying_one_hot(layer: str, one_hot: bool) -> None:
    assert main([*ONE, "--layer", layer]) == 0
    assert json.loads(Path("run/config.json").read_text())["one_hot"] is one_hot


def test_demo(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    small = "lstm --T 5 --B 2 --I 1 --H 4 --p 0 0.5 --peers torch --backends auto --repeats 1"
    monkeypatch.setattr(demo, "ODD", f"{small} --no-memory")
    monkeypatch.setattr(demo, "SPEED", f"{small} --no-memory")
    monkeypatch.setattr(demo, "QUICK_EPOCHS", 1)
    assert main(["demo", "--quick", "--out", "shown"]) == 0
    assert Path("shown/demo.png").read_bytes().startswith(b"\x89PNG")
    out, err = capfd.readouterr()
    assert err.count("measuring 5, 2, 1, 4, float32, ") == 4  # what takes long says so
    assert "plots: shown/demo.svg, shown/gradient-flow.svg" in out.replace(os.sep, "/")
    assert "try detach_prob 0.25" in out and "throughtime.init.chrono_" in out
    assert "<svg" in Path("shown/gradient-flow.svg").read_text()
    ours, theirs = (
        next(words[1] for words in map(str.split, out.splitlines()) if words[:1] == [name])
        for name in ("throughtime", "nn.LSTM")
    )
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    monkeypatch.setattr(demo, "_bench", lambda words: 1)  # a check of the benchmark is red
    assert main(["demo", "--quick", "--out", "shown"]) == 1


# Stop and continue


def test_ctrl_c_then_resume_equals_an_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the program below knows nothing of smaller sets
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    words = [*COPYING[:-4], "--epochs", "100", "--anneal", "2", "--out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", *words, str(stopped)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert len(read_csv(stopped / "log.csv")) < 100 and (stopped / "curves.svg").exists()
    assert f" finished epochs are kept in {stopped}" in errors
    (told,) = (line for line in errors.splitlines() if line.startswith("continue with: "))
    told_words = shlex.split(told.removeprefix("continue with: "))
    assert told_words[:3] == ["python", "-m", "bench"]

    assert main(told_words[3:]) == 0
    assert main([*words, str(whole)]) == 0
    assert read_csv(stopped / "log.csv") == read_csv(whole / "log.csv")
    assert len(read_csv(whole / "log.csv")) == 100
    one, other = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (stopped, whole))
    assert all(torch.equal(value, one["model"][name]) for name, value in other["model"].items())


def test_resume_without_a_finished_epoch_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ONE, "--resume"]) == 0
    assert "run holds no finished epoch yet" in capsys.readouterr().out


def test_a_run_is_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ONE) == 0
    before = files("run")
    assert "run already holds a run; add --resume" in refused(ONE, capsys)
    assert files("run") == before


def test_resume_names_every_other_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COPYING, "--epochs", "2"]) == 0
    before = files("run")
    other = [*COPYING, "--epochs", "1", "--resume", "--lr", "0.5", "--layer", "rel-lstm"]
    error = refused(other, capsys)
    for words in ("--lr is 0.5, was 0.001", "--epochs is 1, was 2", "--layer is 'rel-lstm', was"):
        assert words in error
    assert "--seed" not in error and "start anew with another --out" in error
    error = refused([*COPYING, "--epochs", "3", "--anneal", "1", "--resume"], capsys)
    assert "--epochs is 3, was 2" in error, "p would have become 0 earlier"
    denoise = ["train", "denoise", *SHORT, "--out", "run", "--resume"]
    assert "--task is 'denoise', was 'copying'" in refused(denoise, capsys)
    assert files("run") == before
    assert main([*COPYING, "--epochs", "3", "--resume"]) == 0
    assert len(read_csv("run/log.csv")) == 3


def test_a_run_older_than_an_option_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ONE) == 0
    state = torch.load("run/checkpoint.pt", weights_only=True)
    del state["config"]["normalize"]
    torch.save(state, "run/checkpoint.pt")
    stored = json.loads(Path("run/config.json").read_text())
    del stored["normalize"]
    Path("run/config.json").write_text(json.dumps(stored))
    again = [*COPYING, "--epochs", "2", "--resume"]
    attention = [*again, "--layer", "rel-attention", "--normalize"]
    assert "--normalize is True, was False" in refused(attention, capsys)
    assert main(again) == 0 and len(read_csv("run/log.csv")) == 2


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _change(**changes: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        torch.save(torch.load(path, weights_only=True) | changes, path)

    return change


CONFIG = "wanted the options of a training run, got a file of another kind"
DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": ("checkpoint.pt", _truncate, "got a damaged file"),
    "a list": ("checkpoint.pt", lambda path: torch.save([1], path), "got a file of another kind"),
    "no history": ("checkpoint.pt", _change(history=[{}]), "got another state ("),
    "best.pt": (
        "checkpoint.pt",
        lambda path: path.with_name("best.pt").replace(path),
        "got another state ('optimizer')",
    ),
    "other options": ("checkpoint.pt", _change(config={"lr": 1}), "--lr is 0.001, was 1"),
    "config.json of a package": (
        "config.json",
        lambda path: path.write_text('{"name": 1}'),
        CONFIG,
    ),
    "config.json of text": ("config.json", lambda path: path.write_text("no"), CONFIG),
    "config.json of another run": (
        "config.json",
        lambda path: path.write_text(path.read_text().replace("copying", "denoise")),
        "--task is 'copying', was 'denoise'",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_files_of_another_kind_are_one_sentence(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(ONE) == 0
    file, damage, words = DAMAGE[name]
    damage(Path("run", file))
    before = files("run")
    error = refused([*COPYING, "--epochs", "2", "--resume"], capsys)
    assert words in error and str(Path("run", file)) in error and "another" in error
    assert files("run") == before


def test_a_config_json_of_another_program_is_left_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("run").mkdir()
    Path("run/config.json").write_text('{"name": "mine"}')
    error = refused(ONE, capsys)
    assert CONFIG in error and "move it away" in error
    assert list(files("run")) == ["config.json"]
    assert Path("run/config.json").read_text() == '{"name": "mine"}'


# Folders that cannot be written


@pytest.mark.parametrize("words", [ONE, ["demo", "--quick", "--out", "run"]])
def test_out_that_is_a_file(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").write_text("mine")
    assert "--out: wanted a folder, got the file run" in refused(words, capsys)
    assert Path("run").read_text() == "mine"
    words = [*words[:-1], "run/below"] if words[0] == "demo" else [*words, "--out", "run/below"]
    assert "--out: cannot write run/below: Not a directory; name another" in refused(words, capsys)


def _fail(monkeypatch: pytest.MonkeyPatch, number: int, *, after: int = 0) -> None:
    """Files can no longer be written to the disk, from the given one on."""
    right, calls = os.fsync, []

    def fsync(file: int) -> None:
        calls.append(file)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        right(file)

    monkeypatch.setattr(os, "fsync", fsync)


def test_no_space_for_the_first_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fail(monkeypatch, errno.ENOSPC)
    wanted = "--out: cannot write run/config.json: No space left on device; free some space, or"
    assert wanted in refused(ONE, capsys)
    assert files("run") == {}


# The files in order: config.json; best.pt, checkpoint.pt, log.csv; checkpoint.pt, log.csv; curves.
@pytest.mark.parametrize(
    ("after", "file", "kept"),
    [
        (1, "best.pt", 0),
        (2, "checkpoint.pt", 0),
        (3, "log.csv", 1),
        (4, "checkpoint.pt", 1),
        (5, "log.csv", 2),
        (6, "curves.png", 2),
    ],
)
def test_no_space_during_the_run_keeps_it_continuable(
    after: int,
    file: str,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*COPYING, "--epochs", "2"]
    with monkeypatch.context() as patch:
        _fail(patch, errno.ENOSPC, after=after)
        error = refused(words, capsys, code=1)
    assert f"--out: cannot write run/{file}: No space left on device; free some space" in error
    assert f"\n{kept} finished epochs are kept in run\n" in error
    assert not list(Path("run").glob("*.tmp"))
    assert main(shlex.split(error.partition("continue with: python -m bench ")[2])) == 0
    assert len(read_csv("run/log.csv")) == 2
    assert main([*words, "--out", "whole"]) == 0
    assert read_csv("run/log.csv") == read_csv("whole/log.csv")
    one, other = (torch.load(f"{f}/best.pt", weights_only=True) for f in ("run", "whole"))
    assert one["epoch"] == other["epoch"]


@pytest.mark.parametrize("call", ["open", "mkdir"])
def test_a_folder_without_the_right_to_write(
    call: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, call, refuse)  # root may write everywhere
    assert "--out: cannot write run: Permission denied; name another" in refused(ONE, capsys)
    monkeypatch.undo()


def test_a_second_run_in_the_folder_is_refused_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(ONE) == 0
    before = files("run")
    with RunFolder(Path("run")):
        error = refused([*COPYING, "--epochs", "2", "--resume", "--lr", "1"], capsys)
    assert "--out: wanted a folder of its own, got run, where another run is writing" in error
    assert files("run") == before
    assert main([*COPYING, "--epochs", "2", "--resume"]) == 0, "the lock is released"


# Wrong options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--hidden 1000000000", "error: wanted a run that fits into"),
        ("--T 1000000000", "smaller numbers: --hidden, --batch, --T, --transfer, --train-size"),
        ("--transfer 5 1000000000", "wanted a run that fits into"),
        ("--train-size 1000000000000", "--train-size: wanted a whole number from 0 to 2147"),
        ("--updates-per-epoch 2000000000", "wanted a run that fits into"),
        ("--threads 257", "--threads: wanted a whole number from 1 to 256, got"),
        ("--layer torch --p 0.5", "--p makes no difference to --layer torch, got 0.5: leave it"),
        ("--layer torch --top-k 3", "--top-k makes no difference to --layer torch"),
        ("--layer mem-rnn --window-size 3", "got 3: leave it out, or use one of rel-lstm,"),
        ("--anneal 4 --epochs 3", "--anneal must be at most --epochs (3), got 4"),
        ("--device cuda:99", "--device cuda:99"),
        ("--backend nonsense", "--backend nonsense"),
        ("--backend cuda", "backend='cuda' cannot run"),
        ("--lr nan", "--lr: wanted a number above 0, got 'nan'"),
        ("--seed 2147483648", "from 0 to 2147483647, got '2147483648'"),
    ],
)
def test_wrong_options_are_one_sentence_and_leave_nothing(
    options: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused([*COPYING, *options.split()], capsys)
    assert not Path("run").exists()


def test_the_container_limits_the_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "memory.max").write_text(f"{3 * 2**20}\n")
    (tmp_path / "memory.current").write_text(f"{2**20}\n")
    monkeypatch.setattr(config, "CGROUP", tmp_path)
    assert config.free_memory() == 2 * 2**20
    error = refused([*COPYING, "--hidden", "1000"], capsys)
    assert "error: wanted a run that fits into 0.00195 GiB" in error
    (tmp_path / "memory.max").write_text("max\n")
    assert config.free_memory() > 2**27


def test_non_finite_loss_ends_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(
        [*COPYING, *["--epochs", "2", "--lr", "1e37", "--clip", "1e38"]], capsys, code=1
    )
    assert "the loss is " in error and "update 2 (epoch 1); try a smaller --lr" in error
    assert list(files("run")) == ["config.json"]
