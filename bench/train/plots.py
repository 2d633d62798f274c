"""Plots of training runs, of what a trained RelLSTM attends, and of the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import LogNorm
from torch import Tensor

from bench.plots import COLOURS, DASHES, bars, figure, plain_log
from bench.train.trainer import Epoch, Trainer
from throughtime import reference


def curves(history: Sequence[Epoch], title: str) -> Any:
    """Loss, accuracy of all three sets and gradient norm of one run."""
    canvas, panels = figure(3)
    table = pd.DataFrame(map(asdict, history)).set_index("epoch")
    look: dict[str, Any] = {"color": COLOURS[:3], "style": list(DASHES[:3]), "grid": True}
    table["loss"].plot(ax=panels[0], color=COLOURS[0], grid=True)
    names = ["train_accuracy", "validation_accuracy", "test_accuracy"]
    table[names].plot(ax=panels[1], **look)
    table[["grad_norm_median", "grad_norm_max"]].plot(ax=panels[2], **look)
    _finish(*panels)
    panels[2].legend(frameon=False, fontsize="small")
    canvas.suptitle(title, fontsize="medium")
    return canvas


def demo(runs: Mapping[str, Sequence[Epoch]], speed: Path, title: str) -> Any:
    """Training runs above; below, the speed of each shape in the benchmark's CSV file."""
    canvas, panels = figure(3, [3.6, 3.2])
    look: dict[str, Any]
    for k, (name, history) in enumerate(runs.items()):
        look = {"color": COLOURS[k], "style": DASHES[k], "label": name}
        look |= {"linewidth": 3 - k, "grid": True}  # equal curves show behind each other
        table = pd.DataFrame(map(asdict, history)).set_index("epoch")
        table["loss"].plot(ax=panels[0], **look)
        table.set_index(table["seconds"].cumsum())["test_accuracy"].plot(ax=panels[1], **look)
        table["grad_norm_median"].plot(ax=panels[2], **look)
    _finish(*panels[:3])
    panels[1].set(xlabel="seconds of training", ylabel="test accuracy")

    shapes = pd.read_csv(speed).groupby(["T", "B", "I", "H"], sort=False)
    for panel, ((T, B, I, H), rows) in zip(panels[3:], shapes, strict=False):  # noqa: E741
        times = rows.pivot(index="impl", columns="p", values="median_ms").loc[rows["impl"].unique()]
        times.columns = [f"p = {p:g}" for p in times.columns]
        bars(panel, times)
        panel.set(xlabel="ms, forward + backward", title=f"T {T}, B {B}, I {I}, H {H}")
        panel.legend(frameon=False, fontsize="small", loc="upper right")
    canvas.suptitle(title, fontsize="medium")
    return canvas


def _finish(loss: Any, accuracy: Any, norm: Any) -> None:
    loss.set(ylabel="training loss", ylim=(0, None))
    accuracy.set(ylabel="accuracy", ylim=(0, 1))
    accuracy.legend(frameon=False, fontsize="small")
    norm.set_ylabel("gradient norm before clipping")
    plain_log(norm)
    for panel in (loss, accuracy, norm):
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)


def attention(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Attention of the layer over the first test sequence, by the reference.

    Returns:
        weights ``[T, T]``, query by key; retained bool ``[T, T]``, where the key was in the
        retained set of the query.
    """
    layer: Any = trainer.model.layer
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
    key = torch.arange(len(x))
    query = key.unsqueeze(1)
    retained = (key <= query - layer.window_size) & (query <= result.last[:, 0].cpu())
    return result.attention[0].cpu(), retained


def attended(weights: Tensor, retained: Tensor, title: str) -> Any:
    """Heat map of ``weights`` with the retained keys marked."""
    canvas, (panel,) = figure(1, [4.6])
    colours = LogNorm(vmin=1e-3, vmax=1, clip=True)
    shown = np.ma.masked_equal(weights.numpy(), 0)
    image = panel.imshow(shown, cmap="viridis_r", norm=colours, interpolation="none", aspect="auto")
    queries, keys = retained.numpy().nonzero()
    panel.plot(keys, queries, ".", color="#d55e00", markersize=1.5, label="retained")
    panel.set(xlabel="step attended (key)", ylabel="step (query)")
    panel.grid(False)
    panel.legend(frameon=False, fontsize="small", loc="upper right", markerscale=6)
    canvas.colorbar(image, ax=panel, label="attention")
    canvas.suptitle(title, fontsize="small")
    return canvas
