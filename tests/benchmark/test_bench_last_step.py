"""``bench last-step``: every operation and contestant, a loss where it says, flags as before."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from bench import last_step
from bench.__main__ import main
from bench.cell import Work

from throughtime import _ext


@pytest.mark.skipif(_ext.extension is None, reason="measures the compiled kernels")
def test_last_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "last-step.csv"
    assert main(["last-step", "--quick", "--repeats", "1", "--csv", str(file)]) == 0
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["op"] for row in rows] == [op for op in last_step.CASES for _ in range(3)]
    assert [float(row["over_ours"]) for row in rows[::3]] == [1, 1, 1]
    assert all(float(row["last_ms"]) > 0 for row in rows)
    assert all("set_flush_denormal" in row["contestant"] for row in rows[2::3])
    assert "last step, ms" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(4, 2, 3), (2, 2, 4, 3)], ids=["T-B-H", "B-heads-T-D"])
def test_only_the_last_step_has_a_loss(shape: tuple[int, ...]) -> None:
    x, seen = torch.ones(shape, requires_grad=True), []
    x.register_hook(seen.append)
    work = Work(lambda: {"output": x * 1}, {"x": x}, torch.ones(shape))
    last_step._milliseconds(work, True, True)
    assert torch.tensor(1e-39) * 0.5 != 0
    time = 0 if len(shape) == 3 else 2
    assert [step.any().item() for step in seen[0].unbind(time)] == [False, False, False, True]
