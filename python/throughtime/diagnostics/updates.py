"""What is kept of a recording: the calls of the last update, and norms of earlier ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from throughtime.diagnostics import statistics
from throughtime.diagnostics.attention import AttentionCall, KeyParts
from throughtime.diagnostics.call import AnyCall, Call
from throughtime.diagnostics.parts import Parts
from throughtime.diagnostics.recording import Recorder, traced_layers
from throughtime.diagnostics.rel_parts import RelParts

Found = TypeVar("Found", Parts, KeyParts)


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
        self._parts: tuple[Call, Any] | None = None  # those asked for last

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
        if found:
            return found
        text = (
            "gradient_flow: no backward pass reached a recorded layer; compute the loss from its "
            "output inside the with block, and call backward() without create_graph; call the "
            "model itself, not what torch.compile or torch.func makes of it, and checkpoint with "
            "use_reentrant=False"
        )
        handle = self.recorder.accelerated
        raise RuntimeError(text if handle is None else f"{text}; nn.LSTM ran so:\n{handle}")

    def call(
        self, layer: str | int, direction: int, number: int, recurrent_for: str | None = None
    ) -> Call:
        """One of them; ``recurrent_for`` is the question that a layer without recurrence has not.

        Raises:
            ValueError: if there is no such call.
        """
        calls, names = self.calls(), self.layers()
        name = layer
        if isinstance(layer, int) and -len(names) <= layer < len(names):
            name = names[layer]
        for call in calls:
            if (call.layer, call.direction, call.number) == (name, direction, number):
                return call if recurrent_for is None else _recurrent(call, recurrent_for)
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
        return found or [_recurrent(calls[0], question)]

    def parts(self, call: Call) -> Parts | KeyParts:
        """What follows from a call; of the one that was asked for last it is kept."""
        if isinstance(call, AttentionCall):
            return self._made(call, KeyParts)
        return self.recurrent_parts(call)

    def recurrent_parts(self, call: Call) -> Parts:
        """The same of a call of a recurrent layer."""
        return self._made(call, Parts if call.window_size is None else RelParts)

    def _made(self, call: AnyCall, make: Callable[[AnyCall], Found]) -> Found:
        if self._parts is None or self._parts[0] is not call:
            self._parts = call, make(call)
        found: Found = self._parts[1]
        return found

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
            for call in update if call.traced and call.recurrent
        })  # fmt: skip
        self._parts = None


def _recurrent(call: Call, question: str) -> Call:
    """A call of a recurrent layer.

    Raises:
        ValueError: if it is none.
    """
    if call.recurrent:
        return call
    raise ValueError(
        f"{question}: {call.name} is one of a RelevancyAttention, which has no recurrence in time; "
        "take flow.keys() or flow.table()"
    )
