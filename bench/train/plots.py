"""Plots of training runs; lines differ in dashes as well as in colour."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from bench.errors import require
from bench.train.trainer import Epoch

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")  # Okabe and Ito's palette
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx")
LEAST_RANGE = 8.0  # of a logarithmic axis, or noise would look like a mountain


def figure(rows: Sequence[Sequence[str]], *, height: float = 3.6) -> tuple[Any, list[Any]]:
    """A figure with the named panels; a name that fills a row makes one wide panel."""
    canvas = require("matplotlib.figure").Figure(
        figsize=(4.6 * len(rows[0]), height * len(rows)), layout="constrained"
    )
    panels = list(canvas.subplot_mosaic([list(row) for row in rows]).values())
    for panel in panels:
        panel.grid(True, color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return canvas, panels


def curves(history: Sequence[Epoch], title: str) -> Any:
    """Loss, accuracy of all three sets and gradient norm of one run."""
    canvas, panels = figure([["loss", "accuracy", "norm"]])
    loss, accuracy, norm = panels
    epochs = [epoch.epoch for epoch in history]
    loss.plot(epochs, [epoch.loss for epoch in history], color=COLOURS[0])
    for k, part in enumerate(("train", "validation", "test")):
        values = [getattr(epoch, f"{part}_accuracy") for epoch in history]
        accuracy.plot(epochs, values, label=part, color=COLOURS[k], linestyle=DASHES[k])
    norm.plot(epochs, [epoch.grad_norm_median for epoch in history], label="median", color="black")
    highest = [epoch.grad_norm_max for epoch in history]
    norm.plot(epochs, highest, label="maximum", color=COLOURS[1], linestyle="--")
    _finish(*panels)
    norm.legend(frameon=False, fontsize="small")
    canvas.suptitle(title, fontsize="medium")
    return canvas


def demo(
    runs: Mapping[str, Sequence[Epoch]], times: Mapping[str, Mapping[str, float]], title: str
) -> Any:
    """Training runs side by side, above milliseconds by contestant and shape."""
    canvas, (*panels, bars) = figure([["loss", "accuracy", "norm"], ["time"] * 3])
    loss, accuracy, norm = panels
    for k, (name, history) in enumerate(runs.items()):
        style = {"color": COLOURS[k], "linestyle": DASHES[k], "label": name, "linewidth": 3 - k}
        epochs = [epoch.epoch for epoch in history]
        seconds = list(itertools.accumulate(epoch.seconds for epoch in history))
        loss.plot(epochs, [epoch.loss for epoch in history], **style)
        accuracy.plot(seconds, [epoch.test_accuracy for epoch in history], **style)
        norm.plot(epochs, [epoch.grad_norm_median for epoch in history], **style)
    _finish(*panels)
    accuracy.set(xlabel="seconds of training", ylabel="test accuracy")

    width = 0.8 / len(times)
    for k, (name, by_shape) in enumerate(times.items()):
        places = [shape + k * width for shape in range(len(by_shape))]
        style = {"color": COLOURS[k], "hatch": HATCHES[k], "edgecolor": "white", "label": name}
        drawn = bars.bar(places, by_shape.values(), width, **style)
        labels = [f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}" for ms in by_shape.values()]
        bars.bar_label(drawn, labels, fontsize="small")
    shapes = list(next(iter(times.values())))
    bars.set_xticks([shape + 0.4 - width / 2 for shape in range(len(shapes))], shapes)
    plain_log(bars)
    bars.set_ylabel("ms, forward + backward (less is better)")
    bars.legend(frameon=False, fontsize="small", ncols=len(times), loc=(0, 1.02))
    canvas.suptitle(title, fontsize="medium")
    return canvas


def _finish(loss: Any, accuracy: Any, norm: Any) -> None:
    loss.set(ylabel="training loss", ylim=(0, None))
    accuracy.set(ylabel="accuracy", ylim=(0, 1))
    accuracy.legend(frameon=False, fontsize="small")
    norm.set_ylabel("gradient norm before clipping, median")
    plain_log(norm)
    for panel in (loss, accuracy, norm):
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)


def plain_log(panel: Any) -> None:
    """A logarithmic y axis with plain numbers, also where the values stay within one decade."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    if high / low < LEAST_RANGE:
        middle = (low * high) ** 0.5
        low, high = middle / LEAST_RANGE**0.5, middle * LEAST_RANGE**0.5
        panel.set_ylim(low, high)
    ticker = require("matplotlib.ticker")
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(ticker.NullFormatter())
