"""``gradient_flow(model, stride=n)``: the same numbers of every n-th step, in less memory."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import throughtime
from cases import random, random_mask
from throughtime import LSTM, RelLSTM
from throughtime.diagnostics import GradientFlow, recording

T, B, I, H = 11, 3, 2, 4  # noqa: E741
X = random(T, B, I, seed=1)
LENGTHS = torch.tensor([7, 11, 4])
MASK = random_mask(T, B, p=0.4, seed=2)


def recorded(layer: nn.Module, stride: int, lengths: bool = False, **given: Any) -> GradientFlow:
    x = pack_padded_sequence(X, LENGTHS, enforce_sorted=False) if lengths else X
    with throughtime.gradient_flow(layer, stride=stride) as flow:
        output, state = layer(x, **given)
        output = output.data if lengths else output
        last = state.h if isinstance(layer, RelLSTM) else state[0]
        (output.square().sum() + last.sum()).backward()
    return flow


def lstm_of(backend: Any, **options: Any) -> LSTM:
    torch.manual_seed(1)
    return LSTM(I, H, backend=backend, **options).double()


def rel_lstm_of(backend: Any) -> RelLSTM:
    torch.manual_seed(1)
    return RelLSTM(I, H, window_size=2, top_k=2, backend=backend).double()


@pytest.mark.parametrize("stride", [3, 20, sys.maxsize])
@pytest.mark.parametrize(
    "given", [{}, {"detach_mask": MASK}, {"reset": MASK}, {"lengths": True}], ids=str
)
@pytest.mark.parametrize("kind", ["both-ways", "rel-lstm"])
def test_kept_steps_have_the_numbers_of_all_steps(
    backend: str, kind: str, given: dict[str, Any], stride: int
) -> None:
    layer = rel_lstm_of(backend) if kind == "rel-lstm" else lstm_of(backend, bidirectional=True)
    whole, flow = recorded(layer, 1, **given), recorded(layer, stride, **given)
    for direction in range(1 if kind == "rel-lstm" else 2):
        first = 0 if direction else (T - 1) % stride
        wanted, found = whole.gradients(0, direction), flow.gradients(0, direction)
        for name, x in wanted._asdict().items():
            assert torch.equal(getattr(found, name), x[first :: min(stride, T)]), name
        every = [row for row in whole.table() if row["direction"] == direction]
        rows = [row for row in flow.table() if row["direction"] == direction]
        assert [row["step"] for row in rows] == list(range(T))[first::stride]
        for row in rows:
            same = every[int(row["step"])]
            assert row.pop("layer") == same.pop("layer")
            if kind != "rel-lstm" and "detach_mask" in given:  # takes the step after
                assert math.isnan(row.pop("cut"))
                del same["cut"]
            assert row == pytest.approx(same, nan_ok=True, rel=1e-12, abs=0)
    hops = [flow.hops(2).spectrum for flow in (whole, flow)]
    assert torch.equal(*hops)


@pytest.mark.parametrize("kind", [lstm_of, rel_lstm_of])
def test_a_record_takes_an_nth_of_the_memory(backend: str, kind: Any) -> None:
    sizes = []
    for stride in (1, 4):
        (call,) = recorded(kind(backend), stride)._updates.recorder.update
        sizes.append([x.untyped_storage().nbytes() // (8 * B * H) for x in (call.dh, call.dc)])
    assert sizes == [[11, 11], [3, 3]]


def test_distances_are_in_steps(backend: str) -> None:
    flows, layer = [], lstm_of(backend)
    for stride in (1, 2):
        with throughtime.gradient_flow(layer, stride=stride) as flow:
            layer(X)[0][-1].sum().backward()
        flows.append(flow)
    every, other = (flow.horizon(0.1)[0] for flow in flows)
    for name in ("dh", "dc"):
        assert 0 < every[name] <= other[name] < math.inf and other[name] % 2 == 0
    assert other["decades"] == pytest.approx(every["decades"], rel=1e-12)  # step 0 is kept
    assert "over 10 steps" in str(flows[0]) and "over 10 steps" in str(flows[1])


def test_pictures_and_tables_have_the_kept_steps(backend: str, tmp_path: Path) -> None:
    layer = lstm_of(backend)
    with throughtime.gradient_flow(layer, stride=5) as flow:
        for _ in range(2):
            layer(X)[0].sum().backward()
    flow.to_csv(tmp_path / "flow.csv")
    lines = (tmp_path / "flow.csv").read_text().splitlines()[1:]
    assert [line.split(",")[3] for line in lines] == ["0", "5", "10"]
    pytest.importorskip("matplotlib")
    flow.plot(tmp_path / "flow.svg", others={"whole": recorded(layer, 1)})
    assert (tmp_path / "flow.svg").read_text().count('<g id="axes_') == 4


def test_what_takes_every_step_says_so(backend: str) -> None:
    flow = recorded(lstm_of(backend), 2)
    with pytest.raises(
        RuntimeError, match=r"parameters: .*one step in 2 was kept; record with stride=1"
    ):
        flow.parameters()
    one, two = (recorded(rel_lstm_of(backend), stride).parameters() for stride in (1, 2))
    assert one == two


@pytest.mark.parametrize(
    ("stride", "kind", "message"),
    [
        (0, ValueError, "gradient_flow: stride should be 1 or more, got 0"),
        (2.0, TypeError, "gradient_flow: stride should be of type int, got float"),
    ],
)
def test_strides_that_are_none(stride: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        throughtime.gradient_flow(lstm_of("cpu"), stride=stride)


@pytest.mark.parametrize("kind", [lstm_of, rel_lstm_of])
def test_a_trace_that_does_not_fit_offers_a_stride(
    monkeypatch: pytest.MonkeyPatch, backend: str, kind: Any
) -> None:
    layer, step = kind(backend), 2 * 8 * B * H
    monkeypatch.setattr(recording, "_free_memory", lambda: 4 * step + 1)
    words = r"takes 2,112 bytes for 11 steps of 3 samples, and 769 are free; keep every n-th step: "
    with throughtime.gradient_flow(layer), pytest.raises(RuntimeError, match=words + "stride=3, "):
        layer(X)
    with throughtime.gradient_flow(layer, stride=3) as flow:
        layer(X)[0].sum().backward()
    assert len(flow.table()) == 4
    monkeypatch.setattr(recording, "_free_memory", lambda: step - 1)
    with (
        throughtime.gradient_flow(layer, stride=3),
        pytest.raises(RuntimeError, match=r"768 bytes for 4 steps .*; take a smaller batch or"),
    ):
        layer(X)


def test_no_stride_is_offered_where_episodes_keep_every_step(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    layer = rel_lstm_of(backend)
    monkeypatch.setattr(recording, "_free_memory", lambda: 3000)
    words = r"and 3,000 are free; take a smaller batch or fewer steps, or trace one"
    with throughtime.gradient_flow(layer), pytest.raises(RuntimeError, match=words):
        layer(X, reset=MASK)
    with throughtime.gradient_flow(layer), pytest.raises(RuntimeError, match=r"keep every n-th"):
        layer(torch.cat([X] * 2, 1))


def test_the_heat_map_has_the_numbers_of_the_table(backend: str) -> None:
    for layer, given in (
        (lstm_of(backend, bidirectional=True), {"lengths": True}),
        (rel_lstm_of(backend), {"reset": MASK}),
    ):
        flow = recorded(layer, 3, **given)
        for call in flow._updates.calls():
            call.scale = 4.0
            rows = [row["dc"] for row in flow.table() if row["direction"] == call.direction]
            assert flow._updates.history(call).tolist() == [pytest.approx(rows, nan_ok=True)]


@pytest.mark.parametrize("stride", [1, 3])
def test_distances_of_the_other_direction(backend: str, stride: int) -> None:
    both, one = lstm_of(backend, bidirectional=True), lstm_of(backend)
    one.load_state_dict({name: getattr(both, f"{name}_reverse") for name in one.state_dict()})
    with throughtime.gradient_flow(both, stride=stride) as backward:
        both(X)[0][0, :, H:].sum().backward()
    with throughtime.gradient_flow(one, stride=stride) as forward:
        one(X.flip(0))[0][-1].sum().backward()
    (wanted,) = forward.horizon(0.3)
    (found,) = (row for row in backward.horizon(0.3) if row["direction"] == 1)
    assert found == pytest.approx(wanted | {"direction": 1}) and 0 < found["dc"] < math.inf
