"""What a trained RelLSTM attends, as a picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import throughtime
from bench.errors import require
from bench.plots import figure
from bench.train.trainer import Trainer
from throughtime import reference


def weights(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Attention of the layer over the first test sequence, by the reference.

    Returns:
        weights ``[T, T]``, query by key; retained bool ``[T, T]``, where the key was in the
        retained set of the query.
    """
    layer: Any = trainer.model.layer
    assert isinstance(layer, throughtime.RelLSTM), "the options were checked"
    x = trainer.task.test.batch(torch.tensor([0]))[0].to(trainer.config.device)
    zeros = x.new_zeros(1, layer.hidden_size)
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    names += ["weight_query", "weight_key", "weight_score"]
    with torch.no_grad():
        result = reference.rel_lstm(
            *(x, zeros, zeros, zeros, None, None),
            **{name: getattr(layer, f"{name}_l0") for name in names},
            window_size=layer.window_size,
            top_k=layer.top_k,
            keep_first=layer.retain == "first",
            cell=layer.cell,
            need_weights=True,
        )
    assert result.attention is not None
    key = torch.arange(len(x))
    query = key.unsqueeze(1)
    retained = (key <= query - layer.window_size) & (query <= result.last[:, 0].cpu())
    return result.attention[0].cpu(), retained


def picture(weights: Tensor, retained: Tensor, title: str) -> Any:
    """Heat map of ``weights`` with the retained keys marked."""
    canvas, (panel,) = figure(1, [4.6])
    colours = require("matplotlib.colors").LogNorm(vmin=1e-3, vmax=1, clip=True)
    shown = require("numpy").ma.masked_equal(weights.numpy(), 0)
    image = panel.imshow(shown, cmap="viridis_r", norm=colours, interpolation="none", aspect="auto")
    queries, keys = retained.numpy().nonzero()
    panel.plot(keys, queries, ".", color="#d55e00", markersize=1.5, label="retained")
    panel.set(xlabel="step attended (key)", ylabel="step (query)")
    panel.grid(False)
    panel.legend(frameon=False, fontsize="small", loc="upper right", markerscale=6)
    canvas.colorbar(image, ax=panel, label="attention")
    canvas.suptitle(title, fontsize="small")
    return canvas
