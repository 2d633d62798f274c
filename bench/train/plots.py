"""Plots of training runs and of the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from bench.plots import COLOURS, DASHES, bars, figure, plain_log
from bench.train.trainer import Epoch


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
