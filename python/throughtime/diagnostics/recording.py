"""Records the calls of the LSTMs of a model, and what the backward pass brings to each step."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules.rnn import LSTM as TorchLSTM
from torch.utils.hooks import RemovableHandle

from throughtime.acceleration import Acceleration, accelerate
from throughtime.acceleration.handle import innermost
from throughtime.diagnostics.call import Call
from throughtime.nn import LSTM, LSTMCell, RelevancyAttention, RelLSTM
from throughtime.ops import watching
from throughtime.ops.lstm.arguments import LstmArguments
from throughtime.ops.lstm.cpu import lstm, lstm_backward_trace, lstm_cells

Update = list[Call]


def traced_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The LSTMs of a model by name; "" is the model itself.

    Raises:
        TypeError: if the model is no module.
        ValueError: if it has none, or layers that are not traced yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"gradient_flow: model should be a Module, got {type(model).__name__}")
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, (RelLSTM, RelevancyAttention)):
            raise ValueError(
                f"gradient_flow: {type(module).__name__} ({name or 'the model itself'}) is not "
                "traced yet; pass a part of the model that holds LSTMs only"
            )
        if isinstance(module, (LSTM, LSTMCell, TorchLSTM)):
            found[name] = module
    if not found:
        raise ValueError(
            f"gradient_flow: {type(model).__name__} has no throughtime.LSTM, LSTMCell or nn.LSTM; "
            "pass the model that holds one"
        )
    return found


class Recorder:
    """Watches the calls of some layers, update by update.

    An update is what lies between two backward passes: calls, then the backward pass through them.
    A call after a backward pass begins the next one.

    Args:
        layers: by name.
        scaler: whose scale the loss has, or None.
        ended: told of an update that another one follows.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        scaler: GradScaler | None,
        ended: Callable[[Update], None],
    ) -> None:
        self.layers, self.scaler, self._ended = layers, scaler, ended
        self.update: Update = []
        self._numbers: Counter[tuple[str, int]] = Counter()
        self._arrived = False
        self.accelerated: Acceleration | None = None
        self._own: Acceleration | None = None
        self._hooks: list[RemovableHandle] = []
        self._before: list[watching.Watcher | None] = []

    def start(self) -> None:
        """Watch from now on; plain ``nn.LSTM`` runs on our kernels."""
        if any(isinstance(x, TorchLSTM) for x in self.layers.values()):
            if innermost() is None:
                self._own = accelerate()
            self.accelerated = innermost()
        for name, layer in self.layers.items():
            self._hooks += [
                layer.register_forward_pre_hook(partial(self._enter, name)),
                layer.register_forward_hook(self._leave, always_call=True),
            ]

    def stop(self) -> None:
        """Watch no call from now on; backward passes through earlier ones are still recorded."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._own is not None:
            self._own.remove()

    def _enter(self, name: str, layer: nn.Module, args: Any) -> None:
        self._before.append(watching.watcher())
        if torch._C._current_graph_task_id() == -1:  # else a checkpoint that runs again
            watching.watch(_LayerCall(self, name, layer))

    def _leave(self, layer: nn.Module, args: Any, results: Any) -> None:
        watching.watch(self._before.pop())

    def begin(self, layer: str, direction: int) -> Call:
        """A call of a layer in one direction."""
        if self._arrived:
            self._ended(self.update)
            self.update, self._arrived = [], False
            self._numbers.clear()
        call = Call(layer, self._numbers[layer, direction], direction)
        self._numbers[layer, direction] += 1
        self.update.append(call)
        return call

    def arrive(self, call: Call, given: dict[str, Any]) -> None:
        """A backward pass comes to a call."""
        call.begin(given)
        call.scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        self._arrived = True


class _LayerCall:
    """The watcher of one call of a layer: its stacked layers and directions, in their order."""

    def __init__(self, recorder: Recorder, name: str, layer: nn.Module) -> None:
        self._recorder, self._name = recorder, name
        self._places = _places(name, layer)
        self._place = ("", 0)

    def call(self) -> None:
        self._place = next(self._places)

    def kernels(self, operation: Any, args: Any) -> Callable[..., tuple[Tensor, ...]]:
        if operation not in (lstm, lstm_cells):
            raise RuntimeError(
                f"gradient_flow: layer {self._name or 'the model itself'!r} runs on a GPU backend, "
                "and backends 'cpu' and 'reference' are traced; move the model to the CPU, or use "
                "throughtime.backend('reference')"
            )
        given = LstmArguments._make(args)
        biases = {"bias_ih": given.bias_ih, "bias_hh": given.bias_hh}
        return partial(self._trace, self._begin(given), operation, biases)

    def _trace(
        self, call: Call, operation: Any, biases: dict[str, Tensor | None], *args: Any
    ) -> tuple[Tensor, ...]:
        """The backward operator with its trace."""
        named = operation.backward_call._make(args)._asdict()
        named.setdefault("grad_cells", None)
        self._recorder.arrive(call, named | biases)
        call.grads(named)
        *gradients, call.dh, call.dc = lstm_backward_trace(*lstm_cells.backward_call(**named))
        return tuple(gradients)

    def definition(self, args: Any) -> _Definition:
        return _Definition(self._begin(args), args, self._recorder)

    def _begin(self, args: LstmArguments) -> Call:
        _check_memory(self._place[0], args)
        return self._recorder.begin(*self._place)


def _places(name: str, layer: nn.Module) -> Iterator[tuple[str, int]]:
    """Names of the stacked layers, each with its directions; after the last the first."""
    if isinstance(layer, LSTMCell):
        while True:
            yield name or "cell", 0
    assert isinstance(layer, nn.RNNBase)
    while True:
        for k in range(layer.num_layers):
            for direction in range(2 if layer.bidirectional else 1):
                yield f"{name}.l{k}" if name else f"l{k}", direction


class _Definition:
    """A call of the definition: hooks on the states of its steps."""

    def __init__(self, call: Call, args: LstmArguments, recorder: Recorder) -> None:
        self._call, self._args, self._recorder = call, args, recorder
        self._came: set[tuple[str, int]] = set()
        self._output: Tensor | None = None

    def observe(self, t: int, h_t: Tensor, c_t: Tensor) -> None:
        for name, x in (("dh", h_t), ("dc", c_t)):
            if x.requires_grad:
                x.register_hook(partial(self._take, name, t))  # type: ignore[no-untyped-call]

    def finish(self, results: watching.Results) -> watching.Results:
        states: Any = results
        # The last h_t and c_t are these very tensors, and get more than these bring.
        states = states._replace(h_n=states.h_n.clone(), c_n=states.c_n.clone())
        self._output = states.output
        for name, x in states._asdict().items():
            if x.requires_grad:
                x.register_hook(partial(self._take_result, f"grad_{name}"))
        found: watching.Results = states
        return found

    def _start(self) -> Call:
        call = self._call
        if not call.traced:
            assert self._output is not None
            self._recorder.arrive(call, self._args._asdict() | {"output": self._output})
            wide = torch.promote_types(self._output.dtype, torch.float32)
            units = self._args.c_0.size(1)
            call.dh = torch.zeros_like(self._output, dtype=wide)
            call.dc = call.dh.new_zeros(*self._output.shape[:2], units)
        return call

    def _take(self, name: str, t: int, grad: Tensor) -> None:
        call = self._start()
        if (name, t) in self._came:
            call.refuse()
        self._came.add((name, t))
        whole = call.dh if name == "dh" else call.dc
        assert whole is not None
        whole[t] = grad.detach()

    def _take_result(self, name: str, grad: Tensor) -> None:
        self._start().grads({name: grad})


def _check_memory(layer: str, args: LstmArguments) -> None:
    """Check that the trace of a call fits.

    Raises:
        RuntimeError: if it does not.
    """
    steps, batch, _ = args.input.shape
    size = max(4, args.input.element_size())
    wanted = steps * batch * (args.h_0.size(1) + args.c_0.size(1)) * size
    free = _free_memory()
    if free is not None and wanted > free:
        raise RuntimeError(
            f"gradient_flow: the trace of layer {layer!r} takes {wanted:,} bytes for {steps} steps "
            f"of {batch} samples, and {free:,} are free; take a smaller batch or fewer steps, or "
            "trace one layer alone: gradient_flow(model.layer)"
        )


def _free_memory() -> int | None:
    """Bytes that the system can give, where it says so."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
