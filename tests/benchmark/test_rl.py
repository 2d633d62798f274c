"""``bench rl`` and the example beside it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from bench import cartpole, rl
from bench.__main__ import main

import throughtime


def test_every_part_has_rows_that_are_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rl.csv"
    assert main(["rl", "--quick", "--repeats", "1", "--csv", str(path)]) == 0
    found = pd.read_csv(path)
    assert list(found.columns) == rl.COLUMNS and set(found["part"]) == set(rl.PARTS)
    timed = found[found["median_ms"].notna()]
    same = timed[timed["note"].isna()]
    assert (same["error"] <= rl.TOLERANCE).all()
    bound = timed[timed["impl"] == rl.WRONG]
    assert len(bound) and (bound["error"] > rl.TOLERANCE).all()
    assert "throughtime.LSTMCell" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_torchrl_s_triton_kernels_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    contest = rl.rows(rl.QUICK_ROWS[0], "cpu")
    assert contest.missing[rl.TRITON] == "needs a GPU"
    assert main(["rl", "--device", "cuda"]) == 2
    assert "CUDA" in capsys.readouterr().err


def test_what_is_wrong_gets_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = throughtime.LSTMCell.forward

    def wrong(self: throughtime.LSTMCell, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h, c = right(self, *args)
        return h + 0.01, c

    monkeypatch.setattr(throughtime.LSTMCell, "forward", wrong)
    assert main(["rl", "--quick", "--parts", "rollout"]) == 1
    lines = [x for x in capsys.readouterr().out.splitlines() if "throughtime.LSTMCell" in x]
    assert lines and all("wrong" in line and "0.0" not in line for line in lines)


def test_the_example_plays_whole_episodes() -> None:
    """A hand-written policy with the true velocities holds the pole; without any it falls."""
    torch.manual_seed(0)
    lengths = []
    for weights in ((0.1, 0.5, 3.0, 1.0), (0.0, 0.0, 0.0, 0.0)):
        game = cartpole.CartPole(20)
        for _ in range(500):
            push = game.state @ torch.tensor(weights) > 0
            game.step(push.long())
        lengths.append(torch.tensor(game.finished[:20]).float().mean().item())
    assert lengths[0] > 400 and lengths[1] < 30


def test_the_example_learns() -> None:
    torch.manual_seed(0)
    returns = cartpole.train(updates=6, games=16, report=lambda *_: None)
    assert returns > 15
