"""Pictures of the claims, from their stored rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from bench import plots


def distance(rows: pd.DataFrame) -> Any:
    """The gradient of h_t over t: the median over seeds, a line per layer."""
    canvas, (panel,) = plots.figure(1, width=6)
    for k, name in enumerate(dict.fromkeys(rows.layer)):
        size = rows[rows.layer == name].groupby("step").gradient.median()
        panel.plot(size.index, size, label=name, **plots.look(k) | {"marker": ""})
    panel.set(
        yscale="log", ylim=(1e-20, None), xlabel="step t; the answers are the last ten",
        ylabel="|dL/dh_t|", title="New layers, denoise, T 200: what reaches step t",
    )  # fmt: skip
    panel.legend(frameon=False, fontsize="small")
    return canvas


def weight_scale(rows: pd.DataFrame) -> Any:
    """The gradient 95 steps before the loss over p, a line per size of the weights."""
    canvas, (panel,) = plots.figure(1, width=6)
    for k, ((scale, bias), part) in enumerate(rows.groupby(["scale", "forget_bias"])):
        label = f"W_hh times {scale:g}, forget bias {bias:g}"
        panel.plot(part.p, part.gradient, label=label, **plots.look(k))
    panel.set(
        yscale="log", xlabel="p; 1 is the path through the cell alone", ylabel="|dL/dc|",
        title="95 steps before the loss",
    )  # fmt: skip
    panel.legend(frameon=False, fontsize="small")
    return canvas


def learning(title: str) -> Callable[[pd.DataFrame], Any]:
    return lambda rows: plots.spread(rows, ["kind"], title)


PICTURES: Mapping[str, Callable[[pd.DataFrame], Any]] = {
    "weight-scale": weight_scale,
    "copying-100": learning("Copying, T 100, chrono initialisation: median and quartiles"),
    "distance": distance,
    "recall-copying": learning("Copying, T 50, five seeds: median and quartiles"),
    "recall-denoise": learning("Denoise, T 50, five seeds: median and quartiles"),
    "screening-denoise": learning("Denoise, T 100, screening every m-th query"),
}
