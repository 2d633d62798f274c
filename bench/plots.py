"""How all pictures look; dashes, markers and hatches carry what colours do."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib import ticker

from bench.table import digits

matplotlib.use("Agg")
plt.rcParams |= {"axes.grid": True, "axes.axisbelow": True, "grid.color": "0.9"}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
# Okabe and Ito: distinct for most colour visions, and by lightness.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
DASHES = ("-", "--", "-.", ":", (0, (1, 1)))
HATCHES = ("", "//", "..", "xx", "\\\\")
LEAST_RANGE = 8.0  # of a logarithmic axis
MARKERS = ("o", "s", "^", "D", "v")
CURVES = ("loss", "validation_accuracy", "grad_norm_median", "sequences_per_s")  # of a training run


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of a line; a second round of them has hollow markers."""
    k = number % len(COLOURS)
    fill = "full" if number < len(COLOURS) else "none"
    return {"color": COLOURS[k], "marker": MARKERS[k], "linestyle": DASHES[k], "fillstyle": fill}


def figure(
    columns: int, heights: Sequence[float] = (3.6,), *, width: float = 4.6
) -> tuple[Any, list[Any]]:
    """A figure with rows of panels, drawn without a display; heights and width in inches."""
    canvas, axes = plt.subplots(
        len(heights), columns, figsize=(width * columns, sum(heights)),
        height_ratios=heights, squeeze=False, layout="constrained",
    )  # fmt: skip
    return canvas, list(axes.flat)


def rendered(canvas: Any) -> dict[str, bytes]:
    """The figure as png and as svg, the same bytes for the same figure; closes it."""
    found = {}
    for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
        content = io.BytesIO()
        with plt.rc_context({"svg.hashsalt": "throughtime"}):
            canvas.savefig(content, format=suffix, dpi=150, metadata=metadata)
        found[suffix] = content.getvalue()
    plt.close(canvas)
    return found


def save_both(canvas: Any, stem: Path) -> list[Path]:
    """Writes the figure as png and as svg, and returns the files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, content in rendered(canvas).items():
        paths.append(stem.with_name(f"{stem.name}.{suffix}"))
        paths[-1].write_bytes(content)
    return paths


def plain_log(panel: Any, axis: str = "y") -> None:
    """A logarithmic axis with plain numbers, also where the values stay within one decade."""
    panel.set(**{f"{axis}scale": "log"})
    low, high = getattr(panel, f"get_{axis}lim")()
    if low <= 0:  # an empty panel
        low, high = 1.0, 1.0
    if high / low < LEAST_RANGE:  # or noise would look like a mountain
        middle = (low * high) ** 0.5
        low, high = middle / LEAST_RANGE**0.5, middle * LEAST_RANGE**0.5
        panel.set(**{f"{axis}lim": (low, high)})
    own = getattr(panel, f"{axis}axis")
    own.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    own.set_major_formatter("{x:g}")
    own.set_minor_formatter(ticker.NullFormatter())


def linear_guide(panel: Any) -> None:
    """A line of slope 1 below the lowest curve of a panel with logarithmic axes."""
    lines = [line.get_xydata() for line in panel.lines if len(line.get_xdata()) > 1]
    if not lines:
        return
    lowest = min(lines, key=lambda line: line[0, 1] / line[0, 0])
    start, end = lowest[0, 0], max(line[:, 0].max() for line in lines)
    below = lowest[0, 1] / 1.6
    powers = [below, below * end / start]
    panel.plot([start, end], powers, color="0.5", linestyle=":", label="linear")


def bars(panel: Any, values: pd.DataFrame, *, left: float = 0) -> None:
    """A group of bars for each row, one bar for each column, from ``left`` to the value."""
    (values - left).plot.barh(
        ax=panel, left=left, width=0.8, color=COLOURS, edgecolor="white", legend=False
    )
    looks = zip(panel.containers, values, cycle(HATCHES), strict=False)
    for group, name, hatch in looks:
        for bar in group:
            bar.set_hatch(hatch)
        texts = ["" if pd.isna(value) else digits(value) for value in values[name]]
        panel.bar_label(group, texts, padding=3, fontsize="x-small")
    panel.invert_yaxis()
    panel.margins(x=0.25)
    panel.set_ylabel("")


def curves(runs: Mapping[str, Sequence[Any]], title: str) -> Any:
    """Loss, accuracy, gradient norm and speed of each training run over its epochs."""
    canvas, panels = figure(len(CURVES))
    for k, (name, history) in enumerate(runs.items()):
        table = pd.DataFrame(map(asdict, history)).set_index("epoch")
        look: dict[str, Any] = {"color": COLOURS[k], "style": DASHES[k], "label": name}
        for panel, column in zip(panels, CURVES, strict=True):
            label = column.replace("_", " ")
            # Equal curves show behind each other.
            table[column].plot(ax=panel, ylabel=label, linewidth=3 - k, **look)
            panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in (panels[0], panels[3]):
        panel.set_ylim(0, None)
    panels[1].set_ylim(0, 1)
    panels[1].legend(frameon=False, fontsize="small")
    plain_log(panels[2])
    canvas.suptitle(title, fontsize="medium")
    return canvas


def spread(table: pd.DataFrame, varied: Sequence[str], title: str) -> Any:
    """Validation accuracy over updates: median and quartiles over seeds, a line per combination."""
    keys = [name for name in varied if name != "seed"] or ["task"]
    canvas, (panel,) = figure(1, width=6)
    for k, (values, rows) in enumerate(table.groupby(keys)):
        accuracy = rows.groupby("updates").validation_accuracy
        low, middle, high = (accuracy.quantile(q) for q in (0.25, 0.5, 0.75))
        words = [value if isinstance(value, str) else f"{key} {value:g}"
                 for key, value in zip(keys, values, strict=True)]  # fmt: skip
        label = ", ".join(words)
        panel.plot(middle.index, middle, label=label, **look(k) | {"marker": ""})
        panel.fill_between(middle.index, low, high, color=look(k)["color"], alpha=0.2)
    panel.set(xlabel="updates", ylabel="validation accuracy", ylim=(0, 1), title=title)
    panel.legend(frameon=False, fontsize="small")
    return canvas
