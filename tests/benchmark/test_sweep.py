"""`sweep`: one run per combination, resumable; and what it makes of its rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from bench.__main__ import main
from bench.train import sweep
from bench.train.config import Config
from bench.train.trainer import Trainer, TrainingError

SHORT = ["--T", "3", "--hidden", "8", "--batch", "4", "--updates-per-epoch", "3", "--epochs", "2"]
GRID = ["sweep", "copying", *SHORT, "--train-size", "20", "--anneal", "0", "--jobs", "1"]
TINY = Config("copying", T=3, hidden=8, batch=4, p=0.0, epochs=2, updates_per_epoch=3)


def test_each_combination_is_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GRID, "--p", "0", "0.5", "--seed", "4", "5", "--out", "all"]) == 0
    rows = pd.read_csv("all/epochs.csv")
    assert len(rows) == 2 * 2 * 2
    assert set(zip(rows.p, rows.seed, rows.epoch, strict=True)) == {
        (p, seed, epoch) for p in (0, 0.5) for seed in (4, 5) for epoch in (1, 2)
    }
    assert list(dict.fromkeys(rows.seed)) == [4, 5]  # seeds change slowest
    assert rows.stopped.isna().all() and (rows.threads == 1).all()
    assert Path("all/sweep.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "median" in out and "25 %" in out

    alone = Trainer(
        Config("copying", T=3, hidden=8, batch=4, lr=1e-3, p=0.5, epochs=2, updates_per_epoch=3,
               train_size=20, seed=5, threads=1)
    )  # fmt: skip
    alone.run(lambda _: None)
    found = rows[(rows.p == 0.5) & (rows.seed == 5)].loss
    assert found.tolist() == pytest.approx([one.loss for one in alone.history], rel=1e-5)


def test_a_second_call_runs_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*GRID, "--lr", "1e-3", "1e-2", "--out", "all"]
    assert main(words) == 0
    before = pd.read_csv("all/epochs.csv")
    monkeypatch.setattr(Trainer, "_epoch", lambda self: pytest.fail("trained again"))
    assert main(words) == 0
    pd.testing.assert_frame_equal(pd.read_csv("all/epochs.csv"), before)


def test_a_killed_sweep_continues_its_unfinished_run(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {"a": TINY, "b": TINY}
    epochs: list[int] = []
    one = Trainer._epoch

    def killed(self: Trainer) -> object:
        epochs.append(len(self.history) + 1)
        if len(epochs) == 4:
            raise KeyboardInterrupt
        return one(self)

    monkeypatch.setattr(Trainer, "_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_all(runs, Path("all"), jobs=1)
    assert sweep.collect(runs, Path("all")).groupby("run").size().to_dict() == {"a": 2, "b": 1}
    table = sweep.run_all(runs, Path("all"), jobs=1)
    assert epochs == [1, 2, 1, 2, 2]
    a, b = (table[table.run == name].loss.tolist() for name in "ab")
    assert a == b  # the run that was cut short is the same to the last stored digit


def test_what_diverged_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(self: Trainer, *_: object) -> object:
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(Trainer, "_update", diverges)
    for _ in range(2):
        table = sweep.run_all({"a": TINY}, Path("all"), jobs=1)
        assert table.stopped.tolist() == ["the loss is nan"] and table.run.tolist() == ["a"]
        monkeypatch.setattr(Trainer, "_update", lambda *_: pytest.fail("ran again"))


def test_other_lengths_are_columns() -> None:
    table = sweep.run_all({"a": TINY}, Path("all"), jobs=1, delays=(6, 9))
    assert table.accuracy_3.isna().tolist() == [True, False]
    assert table[["accuracy_6", "accuracy_9"]].iloc[-1].between(0, 1).all()


def test_summary_has_quartiles_over_seeds() -> None:
    rows = [
        {"lr": lr, "seed": seed, "validation_accuracy": accuracy, "stopped": reason}
        for lr, seed, accuracy, reason in (
            (1, 0, 0.0, ""), (1, 0, 0.2, ""), (1, 1, 0.4, ""), (1, 2, 0.6, "nan"), (2, 0, 0.9, "")
        )
    ]  # fmt: skip
    lines = sweep.summary(pd.DataFrame(rows), ["lr", "seed"]).splitlines()
    assert lines[-2].split() == ["1", "0.3000", "0.4000", "0.5000", "3", "1"]
    assert lines[-1].split() == ["2", "0.9000", "0.9000", "0.9000", "1", "0"]


def test_a_wrong_combination_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*GRID, "--layer", "throughtime", "torch", "--p", "0", "0.5", "--out", "all"]
    assert main(words) == 2
    assert "--p makes no difference to --layer torch" in capsys.readouterr().err
    assert not Path("all").exists()
