"""What is trained: one layer, named by ``--layer``, and a linear head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

import throughtime
from bench.operations.lstm_peers import LoopLSTM
from bench.train.attention import Transformer

if TYPE_CHECKING:
    from bench.train.config import Config
    from bench.train.task import Task


@dataclass(frozen=True)
class Layer:
    """One kind of layer; it maps ``[T, B, features]`` to ``(output [T, B, H], states)``.

    ``make`` takes the number of features and the configuration; ``options`` are those of the
    command line that make a difference to this layer and not to each one.
    """

    label: str
    make: Callable[[int, Config], nn.Module]
    options: tuple[str, ...]
    screens: bool = False  # attends, and so wants one-hot symbols


def _lstm(kind: type[throughtime.LSTM]) -> Callable[[int, Config], nn.Module]:
    return lambda n, c: kind(n, c.hidden, detach_prob=c.p, backend=c.backend)  # type: ignore[arg-type]


def _screening(label: str, **options: Any) -> Layer:
    def make(features: int, config: Config) -> nn.Module:
        given: dict[str, Any] = {"detach_prob": config.p, "backend": config.backend}
        given |= {"window_size": config.window_size, "top_k": config.top_k}
        return throughtime.RelLSTM(features, config.hidden, **(given | options))

    # With top_k=None everything that leaves the window is kept: no option decides.
    names = ("p",) if "top_k" in options else ("p", "window_size", "top_k")
    return Layer(label, make, names, screens=True)


def _attention(features: int, config: Config) -> nn.Module:
    names = ("window_size", "top_k", "screen_every", "normalize", "backend")
    return Transformer(features, config.hidden, **{name: getattr(config, name) for name in names})


def _full_attention(features: int, config: Config) -> nn.Module:
    return Transformer(features, config.hidden, window_size=2**40, top_k=0, backend=config.backend)


LAYERS = {
    "throughtime": Layer("throughtime", _lstm(throughtime.LSTM), ("p",)),
    "torch": Layer("nn.LSTM", lambda n, config: nn.LSTM(n, config.hidden), ()),
    "loop": Layer("Python loop", _lstm(LoopLSTM), ("p",)),
    "rel-lstm": _screening("RelLSTM"),
    "mem-lstm": _screening("MemLSTM", top_k=None),
    "rel-first": _screening("RelLSTM, first states kept", retain="first"),
    "rel-rnn": _screening("RelRNN", cell="tanh"),
    "mem-rnn": _screening("MemRNN", cell="tanh", top_k=None),
    "rel-attention": Layer(
        "Transformer with relevancy attention", _attention,
        ("window_size", "top_k", "screen_every", "normalize"), screens=True,
    ),
    "attention": Layer("Transformer with full attention", _full_attention, (), screens=True),
}  # fmt: skip


class SequenceClassifier(nn.Module):
    """Classifies the last ``task.target_steps`` steps of a sequence from a layer's output.

    Of packed sequences it classifies each one's last step.
    """

    def __init__(self, layer: nn.Module, hidden_size: int, task: Task) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(hidden_size, task.classes)
        self.target_steps = task.target_steps

    def forward(self, input: Tensor | PackedSequence) -> Tensor:
        """Input ``[T, B, features]`` or packed -> logits ``[S, B, classes]``."""
        output, _ = self.layer(input)
        if isinstance(output, PackedSequence):
            padded, lengths = pad_packed_sequence(output)
            last = padded[lengths - 1, torch.arange(len(lengths))].unsqueeze(0)
        else:
            last = output[-self.target_steps :]
        logits: Tensor = self.head(last)
        return logits
