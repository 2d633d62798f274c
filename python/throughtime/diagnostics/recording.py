"""Records the calls of the layers of a model, and what the backward pass brings to each step."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules.rnn import LSTM as TorchLSTM
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from throughtime.acceleration import Acceleration, accelerate
from throughtime.acceleration.handle import innermost
from throughtime.diagnostics.attention import AttentionCall, AttentionDefinition
from throughtime.diagnostics.call import AnyCall, Call, detached
from throughtime.functional.split import Split
from throughtime.nn import LSTM, LSTMCell, RelevancyAttention, RelLSTM
from throughtime.ops import watching
from throughtime.ops.lstm import LstmArguments
from throughtime.ops.lstm import cpu as lstm_on_cpu
from throughtime.ops.operation import Operation
from throughtime.ops.rel_lstm import RelLstmArguments
from throughtime.ops.rel_lstm import compiled as rel_lstm_compiled
from throughtime.ops.relevancy import RelevancyArguments
from throughtime.ops.relevancy import compiled as relevancy_compiled
from throughtime.ops.trace import Trace

Update = list[Call]

_TRACES: dict[Operation[Any, Any], Trace] = {
    lstm_on_cpu.lstm: lstm_on_cpu.trace,
    lstm_on_cpu.lstm_cells: lstm_on_cpu.trace,
    rel_lstm_compiled.rel_lstm: rel_lstm_compiled.trace,
}
REPLACE = "throughtime.replace(model) makes it a throughtime.LSTM, which is recorded"
_recorded: WeakSet[nn.Module] = WeakSet()  # the layers of all recordings that go on
# Of the arguments, what a backward operator may not get and questions read.
_HELD = ("bias_ih", "bias_hh", "h_0", "context_0", "memory")


def traced_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that are recorded by name; "" is the model itself.

    Raises:
        TypeError: if the model is no module.
        ValueError: if it has none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"gradient_flow: model should be a Module, got {type(model).__name__}")
    kinds = (LSTM, LSTMCell, RelLSTM, RelevancyAttention, TorchLSTM)
    found: dict[str, nn.Module] = {
        name: x for name, x in model.named_modules() if isinstance(x, kinds)
    }
    if not found:
        raise ValueError(
            f"gradient_flow: {type(model).__name__} has no throughtime.LSTM, throughtime.LSTMCell, "
            "throughtime.RelLSTM, throughtime.RelevancyAttention or nn.LSTM; pass the model that "
            "holds one, and take throughtime.LSTMCell for an nn.LSTMCell, whose state_dict fits it"
        )
    return found


class Recorder:
    """Watches the calls of some layers, update by update.

    An update is what lies between two backward passes: calls, then the backward pass through them.
    A call after a backward pass begins the next one.

    Args:
        layers: by name.
        scaler: whose scale the loss has, or None.
        stride: of the steps whose gradients are kept.
        ended: told of an update that another one follows.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        scaler: GradScaler | None,
        stride: int,
        ended: Callable[[Update], None],
    ) -> None:
        self.layers, self.scaler, self.stride, self._ended = layers, scaler, stride, ended
        self.update: Update = []
        self._numbers: Counter[tuple[str, int]] = Counter()
        self._arrived = False
        self.accelerated: Acceleration | None = None
        self._own: Acceleration | None = None
        self._hooks: list[RemovableHandle] = []
        # The call of a cell that gave a tensor, its place there, and its version.
        self.gave: MutableMapping[Tensor, tuple[Call, int, int]] = WeakTensorKeyDictionary()

    def start(self) -> None:
        """Watch from now on; plain ``nn.LSTM`` runs on our kernels.

        Raises:
            RuntimeError: if a layer is watched already, or ours cannot run an ``nn.LSTM``.
        """
        for name, layer in self.layers.items():
            if layer in _recorded:
                raise RuntimeError(
                    f"gradient_flow: layer {name or 'the model itself'!r} is recorded by another "
                    "gradient_flow, whose block should end before this one begins"
                )
        if any(isinstance(x, TorchLSTM) for x in self.layers.values()):
            if innermost() is None:
                try:
                    self._own = accelerate()
                except RuntimeError as error:
                    raise RuntimeError(
                        f"gradient_flow: our kernels record an nn.LSTM, and {error}; {REPLACE}"
                    ) from error
            self.accelerated = innermost()
        _recorded.update(self.layers.values())
        for name, layer in self.layers.items():
            self._hooks += [
                layer.register_forward_pre_hook(
                    _Hook(partial(self._enter, name)), with_kwargs=True
                ),
                layer.register_forward_hook(_Hook(self._leave), always_call=True),
            ]

    def stop(self) -> None:
        """Watch no call from now on; backward passes through earlier ones are still recorded."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        _recorded.difference_update(self.layers.values())
        if self._own is not None:
            self._own.remove()
        # torch runs no hook behind a KeyboardInterrupt.
        while isinstance(call := watching.watcher(), _LayerCall) and call.recorder is self:
            watching.watch(call.before)

    def _enter(self, name: str, layer: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        # Not what a compiler traces, nor a checkpoint that runs again.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return None
        call = _LayerCall(self, name, layer, watching.watcher())
        watching.watch(call)
        return call.take_state(args, given) if isinstance(layer, LSTMCell) else None

    def _leave(self, layer: nn.Module, args: Any, results: Any) -> None:
        call = watching.watcher()
        if isinstance(call, _LayerCall) and call.layer is layer:
            watching.watch(call.before)
            if call.begun is not None and isinstance(layer, LSTMCell):
                for k, x in enumerate(results if isinstance(results, tuple) else ()):
                    if isinstance(x, Tensor):
                        self.gave[x] = call.begun, k, x._version

    def follow(self) -> None:
        """Begin the next update, if a backward pass has come to this one."""
        if self._arrived:
            self._ended(self.update)
            self.update, self._arrived = [], False
            self._numbers.clear()
            self.gave.clear()

    def begin(
        self, kind: type[AnyCall], layer: str, direction: int, split: Split | None
    ) -> AnyCall:
        """A call of a layer in one direction, its batch divided by ``split``."""
        self.follow()
        call = kind(layer, self._numbers[layer, direction], direction, self.stride, split)
        self._numbers[layer, direction] += 1
        self.update.append(call)
        return call

    def arrive(self, call: Call, given: dict[str, Any]) -> None:
        """A backward pass comes to a call."""
        call.begin(given)
        call.scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        self._arrived = True


class _Hook:
    """A hook of a layer. In a copy of the layer, and in what is saved of it, it does nothing."""

    def __init__(self, run: Callable[..., Any] | None = None) -> None:
        self._run = run

    def __call__(self, *args: Any) -> Any:
        return None if self._run is None else self._run(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class _LayerCall:
    """The watcher of one call of a layer: its stacked layers and directions, in their order.

    Args:
        recorder: whose layer it is.
        name: of the layer.
        layer: the layer.
        before: the watcher to go back to.
    """

    def __init__(
        self, recorder: Recorder, name: str, layer: nn.Module, before: watching.Watcher | None
    ) -> None:
        self.recorder, self.layer, self.before = recorder, layer, before
        self._name = name
        self._places = _places(name, layer)
        self._place = ("", 0)
        self._split: Split | None = None
        self.begun: Call | None = None
        self._before: Call | None = None
        self._entering: dict[int, Tensor] = {}

    def take_state(self, args: Any, given: dict[str, Any]) -> Any:
        """Arguments of a cell, with hooks on a state as the cell gave it."""
        hx = args[1] if len(args) > 1 else given.get("hx")
        if not (torch.is_grad_enabled() and isinstance(hx, (tuple, list)) and len(hx) == 2):
            return None
        gave = [self.recorder.gave.get(x) if isinstance(x, Tensor) else None for x in hx]
        before = gave[0][0] if gave[0] is not None else None
        if before is None or gave != [(before, k, x._version) for k, x in enumerate(hx)]:
            return None  # a state from elsewhere, or one that was changed
        self._before = before
        views = tuple(x.view_as(x) for x in hx)  # a state may have other users
        for k, x in enumerate(views):
            x.register_hook(partial(self._entering.__setitem__, k))
        if len(args) > 1:
            return (args[0], views, *args[2:]), given
        return args, given | {"hx": views}

    def call(self, split: Split | None, gradient: bool) -> None:
        self._place, self._split = next(self._places), split
        if gradient:
            self.recorder.follow()  # before the forward pass: it takes the memory that this frees

    def kernels(
        self, operation: Any, args: Any, results: tuple[Tensor, ...]
    ) -> Callable[..., tuple[Tensor, ...]]:
        trace = _TRACES.get(operation)
        if trace is None and operation is not relevancy_compiled.relevancy:
            raise RuntimeError(
                f"gradient_flow: layer {self._name or 'the model itself'!r} runs on a GPU backend, "
                "and backends 'cpu' and 'reference' are traced; move the model to the CPU, or use "
                "throughtime.backend('reference')"
            )
        given = operation.arguments._make(args)
        if trace is None:
            return partial(self._keys, self._begin_attention(given), operation)
        call = self._begin(given)
        held = {name: x for name, x in given._asdict().items() if name in _HELD}
        if isinstance(given, RelLstmArguments):
            held["output"] = results[0]
        call.hold(held)
        return partial(self._trace, call, operation, trace)

    def _trace(self, call: Call, operation: Any, trace: Trace, *args: Any) -> tuple[Tensor, ...]:
        """The backward operator with its trace."""
        named = operation.backward_call._make(args)._asdict()
        self.recorder.arrive(call, named)
        call.grads(named)
        gradients, call.dh, call.dc = trace(named, call.trace_stride)
        return gradients

    def _keys(self, call: AttentionCall, operation: Any, *args: Any) -> tuple[Tensor, ...]:
        """The backward operator of attention, whose gradients are kept."""
        self.recorder.arrive(call, operation.backward_call._make(args)._asdict())
        found: tuple[Tensor, ...] = operation.backward_op(*args)
        names = [field.name for field in operation.backward_gives]
        call.keep(dict(zip(names, found, strict=True)))
        return found

    def definition(self, args: Any) -> watching.Steps:
        if isinstance(args, RelevancyArguments):
            return AttentionDefinition(self._begin_attention(args), args, self.recorder.arrive)
        return _Definition(self._begin(args), args, self.recorder)

    def _begin(self, args: LstmArguments | RelLstmArguments) -> Call:
        call = self.recorder.begin(Call, *self._place, self._split)
        call.module, call.of_cell = self._name, isinstance(self.layer, LSTMCell)
        call.before, call.entering, self.begun = self._before, self._entering, call
        steps, batch, _ = args.input.shape
        _check_memory(call, steps, batch, args.h_0.size(1) + args.c_0.size(1), args.input)
        return call

    def _begin_attention(self, args: RelevancyArguments) -> AttentionCall:
        call = self.recorder.begin(AttentionCall, *self._place, None)
        (batch, heads, steps, size), of_keys = args.query.shape, args.key.size(1)
        width = heads * size + of_keys * (size + args.value.size(3))
        _check_memory(call, steps, batch, width, args.query)
        return call


def _places(name: str, layer: nn.Module) -> Iterator[tuple[str, int]]:
    """Names of the stacked layers, each with its directions; after the last the first."""
    if isinstance(layer, (LSTMCell, RelevancyAttention)):
        while True:
            yield name or ("cell" if isinstance(layer, LSTMCell) else "attention"), 0
    assert isinstance(layer, (nn.RNNBase, RelLSTM))
    directions = 2 if isinstance(layer, nn.RNNBase) and layer.bidirectional else 1
    while True:
        for k in range(layer.num_layers):
            for direction in range(directions):
                yield f"{name}.l{k}" if name else f"l{k}", direction


class _Definition:
    """A call of the definition: hooks on the states of its steps."""

    def __init__(
        self, call: Call, args: LstmArguments | RelLstmArguments, recorder: Recorder
    ) -> None:
        self._call, self.args, self._recorder = call, args, recorder
        self._came: set[tuple[str, int]] = set()
        self._given: dict[str, Any] = {}

    def observe(self, t: int, h_t: Tensor, c_t: Tensor) -> None:
        for name, x in (("dh", h_t), ("dc", c_t)):
            if x.requires_grad:
                x.register_hook(partial(self._take, name, t))  # type: ignore[no-untyped-call]

    def finish(self, results: watching.Results) -> watching.Results:
        states: Any = results
        # The last h_t and c_t are these very tensors, and get more than these bring.
        states = states._replace(h_n=states.h_n.clone(), c_n=states.c_n.clone())
        named: dict[str, Any] = states._asdict()
        self._given = detached(self.args._asdict() | named)
        del self.args
        for name, x in named.items():
            if x.requires_grad:
                x.register_hook(partial(self._take_result, f"grad_{name}"))
        found: watching.Results = states
        return found

    def _start(self) -> Call:
        call = self._call
        if not call.traced:
            self._recorder.arrive(call, self._given)
            output, units = self._given["output"], self._given["c_0"].size(1)
            wide = torch.promote_types(output.dtype, torch.float32)
            steps = -(-len(output) // call.trace_stride)
            call.dh = torch.zeros_like(output[:steps], dtype=wide)
            call.dc = call.dh.new_zeros(*call.dh.shape[:2], units)
        return call

    def _take(self, name: str, t: int, grad: Tensor) -> None:
        call = self._start()
        if (name, t) in self._came:
            call.refuse()
        self._came.add((name, t))
        whole, every = call.dh if name == "dh" else call.dc, call.trace_stride
        assert whole is not None
        later = t if call.reverse else len(self._given["output"]) - 1 - t
        if later % every == 0:
            whole[t // every] = grad.detach()

    def _take_result(self, name: str, grad: Tensor) -> None:
        self._start().grads({name: grad})


def _check_memory(call: Call, steps: int, batch: int, width: int, like: Tensor) -> None:
    """Check that the trace of a call fits: ``width`` numbers for each step and sample.

    Raises:
        RuntimeError: if it does not.
    """
    kept = -(-steps // call.trace_stride)
    step = batch * width * max(4, like.element_size())
    free = _free_memory()
    if free is not None and kept * step > free:
        way = "take a smaller batch or fewer steps"
        if call.split is None and step <= free:
            way = f"keep every n-th step: stride={-(-steps // (free // step))}"
        raise RuntimeError(
            f"gradient_flow: the trace of layer {call.layer!r} takes {kept * step:,} bytes for "
            f"{kept} steps of {batch} samples, and {free:,} are free; {way}, or trace one layer "
            "alone: gradient_flow(model.layer)"
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
