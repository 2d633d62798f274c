"""``DetachSchedule``."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from throughtime import LSTM, DetachSchedule


def values(schedule: DetachSchedule, layer: LSTM, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        assert schedule.get_last_value() == [layer.detach_prob]
        seen.append(layer.detach_prob)
        schedule.step()
    return seen


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"total_steps": 6, "final_steps": 2}, [0.25] * 4 + [0.0] * 4),
        ({"total_steps": 3}, [0.25] * 3 + [0.0]),
        (
            {"total_steps": 6, "kind": "linear", "final_steps": 2, "detach_prob": 0.5},
            [0.5, 0.375, 0.25, 0.125, 0.0, 0.0, 0.0],
        ),
    ],
    ids=["constant then zero", "constant to the end", "linear"],
)
def test_values(options: dict[str, Any], expected: list[float]) -> None:
    layer = LSTM(2, 3, detach_prob=0.25)
    assert values(DetachSchedule(layer, **options), layer, len(expected)) == pytest.approx(expected)


def test_each_layer_falls_from_its_own_value() -> None:
    model = nn.ModuleList([LSTM(2, 3, detach_prob=0.5), nn.LSTM(2, 3), LSTM(2, 3, detach_prob=1.0)])
    schedule = DetachSchedule(model, 2, kind="linear")
    schedule.step()
    assert [model[0].detach_prob, model[2].detach_prob] == [0.25, 0.5]
    assert schedule.get_last_value() == [0.25, 0.5]


@pytest.mark.parametrize("kind", ["constant", "linear"])
def test_resume_is_exact(kind: str) -> None:
    def make(p: float) -> tuple[LSTM, DetachSchedule]:
        layer = LSTM(2, 3, detach_prob=p)
        return layer, DetachSchedule(layer, 7, kind=kind, final_steps=1)

    layer, schedule = make(0.3)
    values(schedule, layer, 3)
    saved = json.loads(json.dumps(schedule.state_dict()))
    resumed_layer, resumed = make(0.9)
    resumed.load_state_dict(saved)
    assert resumed_layer.detach_prob == layer.detach_prob
    saved["base_values"][0] = 1.0
    assert values(resumed, resumed_layer, 5) == values(schedule, layer, 5)


def test_survives_a_copy_together_with_its_model() -> None:
    layer = LSTM(2, 3, detach_prob=0.5)
    copied_layer, copied = copy.deepcopy((layer, DetachSchedule(layer, 1)))
    copied.step()
    assert copied_layer.detach_prob == 0.0 and layer.detach_prob == 0.5


def test_steps_along_a_learning_rate_scheduler() -> None:
    layer = LSTM(2, 3, detach_prob=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4)
    schedule = DetachSchedule(layer, 4, kind="linear")
    for _ in range(4):
        optimizer.step()
        rate.step()
        schedule.step()
        assert layer.detach_prob == pytest.approx(0.5 * rate.get_last_lr()[0])
