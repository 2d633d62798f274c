"""The model of every task: one recurrent layer and a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.tasks.layers import LAYERS


class SequenceClassifier(nn.Module):
    """Reads a sequence and classifies its last steps.

    Args:
        layer: maps ``[T, B, features]`` to ``(output [T, B, H], states)``.
        hidden_size: H.
        classes: number of classes.
        target_steps: S, how many of the last steps are classified.

    Example:
        >>> model = SequenceClassifier(nn.LSTM(1, 8), 8, classes=3, target_steps=2)
        >>> model(torch.zeros(5, 4, 1)).shape
        torch.Size([2, 4, 3])
    """

    def __init__(
        self, layer: nn.Module, hidden_size: int, *, classes: int, target_steps: int
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(hidden_size, classes)
        self.target_steps = target_steps

    def forward(self, input: Tensor) -> Tensor:
        """Input ``[T, B, features]`` -> logits ``[S, B, classes]``."""
        output, _ = self.layer(input)
        logits: Tensor = self.head(output[-self.target_steps :])
        return logits


def build(
    layer: str,
    *,
    input_size: int,
    hidden_size: int,
    classes: int,
    target_steps: int,
    p: float,
    window_size: int,
    top_k: int,
    backend: str,
    seed: int,
) -> SequenceClassifier:
    """The model on a named layer; one seed gives the same weights to every layer.

    Args:
        layer: a key of ``layers.LAYERS``.
        input_size: features per step.
        hidden_size: units H.
        classes: number of classes.
        target_steps: S, how many of the last steps are classified.
        p: detach probability 0 to 1.
        window_size, top_k: of relevancy screening.
        backend: which kernels ``throughtime`` uses.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    recurrent = LAYERS[layer].make(
        input_size,
        hidden_size,
        detach_prob=p,
        window_size=window_size,
        top_k=top_k,
        backend=backend,
    )
    return SequenceClassifier(recurrent, hidden_size, classes=classes, target_steps=target_steps)
