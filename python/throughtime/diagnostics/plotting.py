"""Pictures of a recorded gradient, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor

Columns = Mapping[str, Tensor]

_LINES = {"dc": "|dL/dc|", "dh": "|dL/dh|", "direct": "|Y|", "cell": "cell part", "rest": "rest"}


def draw(
    path: str | PathLike[str],
    title: str,
    columns: Columns,
    history: Tensor,
    compared: Mapping[str, Columns],
) -> None:
    """Write a picture.

    Args:
        path: of the picture.
        title: of the call.
        columns: of the call's table, each ``[T]``.
        history: medians of |dc| ``[updates, T]``.
        compared: columns of other flows by their names.
    """
    panels = 1 + (len(history) > 1) + bool(compared)
    figure, axes = plt.subplots(
        1, panels, figsize=(6 * panels, 4), squeeze=False, layout="constrained"
    )
    try:
        rest = iter(axes[0])
        axis = next(rest)
        for name, label in _LINES.items():
            line = _line(axis, columns[name], label)
            low, high = (columns[f"{name}_{q}"].cpu().numpy() for q in (10, 90))
            axis.fill_between(range(len(low)), low, high, color=line.get_color(), alpha=0.15)
        _finish(axis, title)
        if len(history) > 1:
            axis = next(rest)
            logs = torch.where(history > 0, history.log10(), torch.nan).cpu().numpy()
            image = axis.imshow(logs, aspect="auto", origin="lower", interpolation="nearest")
            figure.colorbar(image, ax=axis, label="log10 |dL/dc|")
            axis.set(xlabel="step", ylabel="update", title=title)
        if compared:
            axis = next(rest)
            for name, other in {"this": columns, **compared}.items():
                _line(axis, other["dc"], name)
            _finish(axis, "|dL/dc|")
        figure.savefig(path)
    finally:
        plt.close(figure)


def _line(axis: Any, norms: Tensor, label: str) -> Any:
    (line,) = axis.plot(torch.where(norms > 0, norms, torch.nan).cpu().numpy(), label=label)
    return line


def _finish(axis: Any, title: str) -> None:
    axis.set_yscale("log")
    axis.set(xlabel="step", ylabel="norm over the units, median of the batch", title=title)
    axis.legend()
