"""Blocks of ``gradient_flow`` that go wrong or hold little: interrupts, copies, threads, NaN."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import throughtime
from cases import random
from throughtime import LSTM, RelevancyAttention, RelLSTM
from throughtime.ops import watching

T, B = 6, 3
X = random(T, B, 4, seed=1, dtype=torch.float32)
LAYERS = {
    "LSTM": lambda backend: LSTM(4, 5, backend=backend),
    "RelLSTM": lambda backend: RelLSTM(4, 5, backend=backend),
    "RelevancyAttention": lambda backend: RelevancyAttention(4, 2, 2, 2, backend=backend),
}


class Last(nn.Module):
    """The last output."""

    def __init__(self, kind: Any = LSTM, num_layers: int = 1) -> None:
        super().__init__()
        self.rnn = kind(4, 5, num_layers)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.rnn(x)[0][-1]
        return found


class Interrupted(LSTM):
    def forward(self, *args: Any, **given: Any) -> Any:
        super().forward(*args, **given)
        raise KeyboardInterrupt


def test_an_interrupted_call_is_watched_no_more() -> None:
    net = Last(Interrupted)
    with pytest.raises(KeyboardInterrupt), throughtime.gradient_flow(net):
        net(X)
    assert watching.watcher() is None


@pytest.mark.filterwarnings("error")
def test_another_hook_that_fails_leaves_the_watch_of_an_outer_layer() -> None:
    def fail(module: nn.Module, args: Any) -> None:
        raise ValueError("of another hook")

    net = Last()
    net.rnn.register_forward_pre_hook(fail)
    with throughtime.gradient_flow(net), pytest.raises(ValueError, match="of another hook"):
        net(X)
    assert watching.watcher() is None


def test_a_layer_is_recorded_by_one_block_at_a_time() -> None:
    net = Last()
    outer = throughtime.gradient_flow(net)
    for other in (outer, throughtime.gradient_flow(net.rnn)):
        with outer:
            words = "layer .* is recorded by another gradient_flow, whose block should end"
            with pytest.raises(RuntimeError, match=words):
                other.__enter__()
            net(X).sum().backward()
        with other:
            net(X).sum().backward()
        assert watching.watcher() is None and not net.rnn._forward_hooks
    assert outer.updates == 3 and other.updates == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_of_the_model_is_not_recorded(copied: Any) -> None:
    net = Last()
    size = len(pickle.dumps(net))
    with throughtime.gradient_flow(net) as flow:
        net(X).sum().backward()
        twin = copied(net)
        twin(X).sum().backward()
        assert len(pickle.dumps(net)) < size + 1000  # no record is in it
    twin(X).sum().backward()
    assert flow.updates == 1 and flow.layers == ["rnn.l0"]
    (hook,) = twin.rnn._forward_pre_hooks.values()
    assert vars(hook) == {"_run": None}


def test_a_call_of_another_thread_while_a_backward_pass_goes_on() -> None:
    net, failed = Last(LSTM, 2), []

    class Scaler(torch.amp.GradScaler):
        def get_scale(self) -> float:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            return 1.0

    def run() -> None:
        try:
            net(X)
        except AssertionError as error:
            failed.append(error)

    with throughtime.gradient_flow(net, scaler=Scaler("cpu")) as flow:
        net(X).sum().backward()
    assert not failed and flow.updates == 1 and watching.watcher() is None


def compiled(net: nn.Module) -> None:
    torch.compile(net, backend="aot_eager")(X).sum().backward()


def reentrant(net: nn.Module) -> None:
    checkpoint(net, X.clone().requires_grad_(), use_reentrant=True).sum().backward()


@pytest.mark.parametrize("run", [compiled, reentrant])
def test_what_is_not_recorded_names_the_way_out(run: Any) -> None:
    net = Last()
    with throughtime.gradient_flow(net) as flow:
        run(net)
    words = "call the model itself, not what torch.compile .* checkpoint with use_reentrant=False"
    with pytest.raises(RuntimeError, match=words):
        flow.table()
    assert watching.watcher() is None


@pytest.mark.parametrize("kind", ["LSTM", "RelLSTM", "RelevancyAttention"])
@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite(
    backend: str, kind: str, number: float, tmp_path: Path
) -> None:
    """One sample of three: no median tells it."""
    net, attends = nn.ModuleList([LAYERS[kind](backend), LSTM(4, 5)]), kind == "RelevancyAttention"
    with throughtime.gradient_flow(net) as flow:
        output = net[0](X.transpose(0, 1))[1, 4] if attends else net[0](X)[0][4, 1]
        (output.sum() * number + net[1](X)[0][-1].sum()).backward()
    name = "0" if attends else "0.l0"
    assert str(flow).startswith(f"{name}, direction 0: the gradient is infinite or NaN at ")
    assert "of 6 steps, and on the way back first at step 4: look" in str(flow)
    pytest.importorskip("matplotlib")
    flow.plot(tmp_path / "flow.svg")


@pytest.mark.parametrize("kind", ["LSTM", "RelLSTM", "RelevancyAttention"])
def test_a_batch_without_samples(backend: str, kind: str, tmp_path: Path) -> None:
    layer = LAYERS[kind](backend)
    batch = X[:0] if kind == "RelevancyAttention" else X[:, :0]
    with throughtime.gradient_flow(layer) as flow:
        output = layer(batch)
        (output if isinstance(output, Tensor) else output[0]).sum().backward()
    assert len(flow.table()) == (B if kind == "RelevancyAttention" else T)
    assert str(flow).startswith("the loss asks for nothing")
    pytest.importorskip("matplotlib")
    flow.plot(tmp_path / "flow.svg")


def test_one_step_shows_no_way_back() -> None:
    lstm, cell = LSTM(4, 5), throughtime.LSTMCell(4, 5)
    with throughtime.gradient_flow(lstm, stride=T) as flow:
        lstm(X)[0].sum().backward()
    with throughtime.gradient_flow(cell) as steps:
        state = None
        for x in X:
            state = cell(x, None if state is None else (state[0] * 1, state[1]))
        state[0].sum().backward()
    for each in (flow, steps):
        assert str(each).startswith("one step of each call is kept, and so no way back")
        assert "or a cell that gets the very (h, c) it gave" in str(each)


def test_a_picture_of_one_step_has_points() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from throughtime.diagnostics import plotting

    figure, axis = pyplot.subplots()
    for steps, marker in ((1, "."), (2, "")):
        lines = plotting.Lines(range(steps), {"dc": torch.ones(steps)})
        assert plotting._line(axis, lines, "dc", "dc").get_marker() == marker
    pyplot.close(figure)
