"""What is kept of a recording: the calls of the last update, and norms of earlier ones."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from throughtime.diagnostics import statistics
from throughtime.diagnostics.attention import KeyParts
from throughtime.diagnostics.call import Call
from throughtime.diagnostics.loop import end_to_end
from throughtime.diagnostics.parts import Parts
from throughtime.diagnostics.recording import REPLACE, Recorder, traced_layers
from throughtime.diagnostics.rel_parts import RelParts

Kind = TypeVar("Kind", bound=Parts | KeyParts)

# What a question that reads one kind says of a call that has another.
_OTHERWISE: dict[type, str] = {
    Parts: "is one of a RelevancyAttention, which has no recurrence in time; take flow.keys() or "
    "flow.table()",
    RelParts: "is not one of a RelLSTM; take flow.gradients() of an LSTM, or flow.keys() of a "
    "RelevancyAttention, or name another layer of {layers}",
    KeyParts: "is not one of a RelevancyAttention; take flow.gradients(), or flow.attention() of a "
    "RelLSTM, or name another layer of {layers}",
}


class Updates:
    """The updates of a recording.

    Args:
        model: whose layers are recorded.
        scaler: whose scale the loss has, or None.
        stride: of the steps whose gradients are kept.
    """

    def __init__(self, model: nn.Module, scaler: GradScaler | None, stride: int) -> None:
        self.recorder = Recorder(traced_layers(model), scaler, stride, self._summarise)
        self._earlier: list[dict[tuple[str, int, int], Tensor]] = []
        self._parts: Parts | KeyParts | None = None  # those asked for last
        self._traced: list[Call] = []
        self._calls: list[Call] = []  # the same, loops over a cell end to end

    def count(self) -> int:
        """Backward passes that were recorded."""
        return len(self._earlier) + any(call.traced for call in self.recorder.update)

    def layers(self) -> list[str]:
        """Names of the layers of the last update."""
        return list(dict.fromkeys(call.layer for call in self.calls()))

    def calls(self) -> list[Call]:
        """The calls of the last update.

        Raises:
            RuntimeError: if there are none.
        """
        found = [call for call in self.recorder.update if call.traced]
        if found != self._traced:
            self._traced, self._calls = found, end_to_end(found)
        if found:
            return self._calls
        handle = self.recorder.accelerated
        kinds = [] if handle is None else [kind.partition("original: ")[2] for kind in handle.calls]
        reasons = "; ".join(filter(None, kinds))
        text = (
            "gradient_flow: "
            + (f"torch ran an nn.LSTM, not ours: {reasons}; {REPLACE}; " if reasons else "")
            + "no backward pass reached a recorded layer; compute the loss from its "
            "output inside the with block, and call backward() without create_graph; call the "
            "model itself, not what torch.compile or torch.func makes of it, and checkpoint with "
            "use_reentrant=False"
        )
        raise RuntimeError(text if handle is None else f"{text}; nn.LSTM ran so:\n{handle}")

    def call(self, layer: str | int, direction: int, number: int) -> Call:
        """One of them.

        Raises:
            ValueError: if there is no such call.
        """
        calls, names = self.calls(), self.layers()
        name = layer
        if isinstance(layer, int) and -len(names) <= layer < len(names):
            name = names[layer]
        for call in calls:
            if (call.layer, call.direction, call.number) == (name, direction, number):
                return call
        raise ValueError(
            f"gradient_flow: no backward pass reached layer {layer!r}, direction {direction}, call "
            f"{number}; recorded are {', '.join(f'{c.name}' for c in calls[:8])}"
        )

    def recurrent(self, question: str) -> list[Call]:
        """The calls of recurrent layers.

        Raises:
            ValueError: if there are none.
        """
        calls = self.calls()
        found = [call for call in calls if call.recurrent]
        if not found:
            raise self._refusal(question, Parts, calls[0])
        return found

    def parts(self, call: Call) -> Parts | KeyParts:
        """What follows from a call; of the one that was asked for last it is kept."""
        if self._parts is None or self._parts.call is not call:
            self._parts = _kind(call)(call)
        return self._parts

    def ask(
        self, question: str, kind: type[Kind], layer: str | int, direction: int, number: int
    ) -> Kind:
        """The parts of one call, of the kind that a question reads.

        Raises:
            ValueError: if there is no such call, or it has parts of another kind.
        """
        call = self.call(layer, direction, number)
        if not issubclass(_kind(call), kind):
            raise self._refusal(question, kind, call)
        return cast(Kind, self.parts(call))

    def _refusal(self, question: str, kind: type, call: Call) -> ValueError:
        return ValueError(
            f"{question}: {call.name} {_OTHERWISE[kind].format(layers=self.layers())}"
        )

    def history(self, call: Call) -> Tensor:
        """|dc| ``[updates, steps]`` of a call, as far as its number of steps is the same."""
        key, own = (call.layer, call.number, call.direction), statistics.history(call)
        kept = [update[key] for update in self._earlier if key in update]
        rows = [norms for norms in (*kept, own) if len(norms) == len(own)]
        return torch.stack([statistics.median(norms) for norms in rows])

    def _summarise(self, update: list[Call]) -> None:
        """Keep the norms of an update that another one follows."""
        self._earlier.append({
            (call.layer, call.number, call.direction): statistics.history(call)
            for call in end_to_end([x for x in update if x.traced]) if call.recurrent
        })  # fmt: skip
        self._parts, self._traced, self._calls = None, [], []


def _kind(call: Call) -> type[Any]:
    if not call.recurrent:
        return KeyParts
    return Parts if call.window_size is None else RelParts
