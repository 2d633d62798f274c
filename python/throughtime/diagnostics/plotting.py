"""Pictures of a recorded gradient, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from torch import Tensor

_LINES = {
    "dc": "|dL/dc|", "dh": "|dL/dh|", "direct": "direct", "cell": "cell", "rest": "rest",
    "recurrent": "recurrent", "query": "query", "value": "value", "key": "key",
}  # fmt: skip


class Lines(NamedTuple):
    """A call's table: columns over the steps that it has."""

    steps: range
    columns: Mapping[str, Tensor]


def draw(
    path: str | PathLike[str],
    title: str,
    lines: Lines,
    history: Tensor | None,
    compared: Mapping[str, Lines],
    last: Tensor | None,
) -> None:
    """Write a picture.

    Args:
        path: of the picture.
        title: of the call.
        lines: of the call.
        history: medians of |dc| ``[updates, steps]``, or None.
        compared: lines of other flows by their names.
        last: the last step that attends each step of a sample ``[T]``, -1 if none does, or None.
    """
    updates = 0 if history is None else len(history)
    panels = 1 + (updates > 1) + bool(compared) + (last is not None)
    figure, axes = plt.subplots(
        1, panels, figsize=(6 * panels, 4), squeeze=False, layout="constrained"
    )
    try:
        rest = iter(axes[0])
        axis = next(rest)
        for name in (name for name in _LINES if name in lines.columns):
            line = _line(axis, lines, name, _LINES[name])
            low, high = (lines.columns[f"{name}_{q}"].cpu().numpy() for q in (10, 90))
            axis.fill_between(lines.steps, low, high, color=line.get_color(), alpha=0.15)
        _finish(axis, title)
        if history is not None and updates > 1:
            axis = next(rest)
            logs = torch.where(history > 0, history.log10(), torch.nan).cpu().numpy()
            half = lines.steps.step / 2
            extent = (lines.steps[0] - half, lines.steps[-1] + half, -0.5, updates - 0.5)
            image = axis.imshow(
                logs, aspect="auto", origin="lower", interpolation="nearest", extent=extent
            )
            figure.colorbar(image, ax=axis, label="log10 |dL/dc|")
            axis.set(xlabel="step", ylabel="update", title=title)
            axis.yaxis.get_major_locator().set_params(integer=True)
        if compared:
            axis, shown = next(rest), "dc" if "dc" in lines.columns else "value"
            for name, other in {"this": lines, **compared}.items():
                _line(axis, other, shown, name)
            _finish(axis, _LINES[shown])
        if last is not None:
            _attended(next(rest), last)
        figure.savefig(path)
    finally:
        plt.close(figure)


def _attended(axis: Any, last: Tensor) -> None:
    keys = (last >= 0).nonzero()[:, 0].cpu()
    axis.hlines(keys.numpy(), keys.numpy(), last.cpu()[keys].numpy(), linewidth=0.8)
    axis.set(xlabel="step that attends", ylabel="step attended", title="first sample")


def _line(axis: Any, lines: Lines, name: str, label: str) -> Any:
    norms = lines.columns[name]
    shown = torch.where(norms > 0, norms, torch.nan).cpu().numpy()
    (line,) = axis.plot(lines.steps, shown, marker="." * (len(shown) == 1), label=label)
    return line


def _finish(axis: Any, title: str) -> None:
    if any((line.get_ydata() > 0).any() for line in axis.lines):  # nor are all of them NaN
        axis.set_yscale("log")
    axis.set(xlabel="step", ylabel="norm over the units, median of the batch", title=title)
    axis.legend()
