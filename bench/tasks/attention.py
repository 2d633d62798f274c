"""What a trained RelLSTM attends, as a picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import throughtime
from bench.tasks.trainer import Trainer
from throughtime import reference


def attention_weights(layer: throughtime.RelLSTM, input: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the first layer over the steps of one sequence, by the reference.

    Args:
        layer: its first layer is run, from a zero state.
        input: ``[T, 1, I]``.

    Returns:
        weights ``[T, T]``, query by key; retained bool ``[T, T]``, where the key was in the
        retained set of the query.
    """
    zeros = input.new_zeros(1, layer.hidden_size)
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    names += ["weight_query", "weight_key", "weight_score"]
    weights: list[Any] = [getattr(layer, f"{name}_l0", None) for name in names]
    with torch.no_grad():
        result = reference.rel_lstm(
            input,
            zeros,
            zeros,
            zeros,
            None,
            None,
            *weights,
            window_size=layer.window_size,
            top_k=layer.top_k,
            keep_first=layer.retain == "first",
            cell=layer.cell,
            need_weights=True,
        )
    assert result.attention is not None
    step = torch.arange(len(input))
    query, key = step.unsqueeze(1), step
    retained = (key <= query - layer.window_size) & (query <= result.last[:, 0])
    return result.attention[0], retained


def picture(trainer: Trainer) -> tuple[Tensor, Tensor] | None:
    """``attention_weights`` on the first test sequence; None if the layer does not screen."""
    layer = trainer.model.layer
    if not isinstance(layer, throughtime.RelLSTM):
        return None
    x, _ = trainer.task.test.batch(torch.tensor([0]))
    return attention_weights(layer, x.to(trainer.config.device))
