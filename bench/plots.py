"""How all pictures look; dashes carry what colours do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.errors import require

# Okabe and Ito: distinct for most colour visions, and by lightness.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
DASHES = ("-", "--", "-.", ":", (0, (1, 1)))
HATCHES = ("", "//", "..", "xx", "\\\\")
LEAST_RANGE = 8.0  # of a logarithmic axis
MARKERS = ("o", "s", "^", "D", "v")


def figure(
    columns: int, heights: Sequence[float] = (3.6,), *, width: float = 4.6
) -> tuple[Any, list[Any]]:
    """A figure with rows of panels, drawn without a display; heights and width in inches."""
    require("matplotlib").use("Agg")
    canvas, axes = require("matplotlib.pyplot").subplots(
        len(heights), columns, figsize=(width * columns, sum(heights)),
        height_ratios=heights, squeeze=False, layout="constrained",
    )  # fmt: skip
    panels = list(axes.flat)
    for panel in panels:
        panel.grid(True, color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return canvas, panels


def save(canvas: Any, path: Path) -> None:
    """Writes the figure in the format of the file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=150)


def save_both(canvas: Any, stem: Path) -> list[Path]:
    """Writes the figure as svg and as png, closes it, and returns the files."""
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("svg", "png")]
    for path in paths:
        save(canvas, path)
    require("matplotlib.pyplot").close(canvas)
    return paths


def plain_log(panel: Any, axis: str = "y", *, scientific: bool = False) -> None:
    """A logarithmic axis with plain numbers, also where the values stay within one decade."""
    panel.set(**{f"{axis}scale": "log"})
    low, high = getattr(panel, f"get_{axis}lim")()
    if low <= 0:  # an empty panel
        low, high = 1.0, 1.0
    if high / low < LEAST_RANGE:  # or noise would look like a mountain
        middle = (low * high) ** 0.5
        low, high = middle / LEAST_RANGE**0.5, middle * LEAST_RANGE**0.5
        panel.set(**{f"{axis}lim": (low, high)})
    subs = (1, 2, 5) if high / low < 300 else (1,)
    ticker = require("matplotlib.ticker")
    own = getattr(panel, f"{axis}axis")
    own.set_major_locator(ticker.LogLocator(subs=subs))
    own.set_major_formatter("{x:.1e}" if scientific else "{x:g}")
    own.set_minor_formatter(ticker.NullFormatter())


def linear_guide(panel: Any) -> None:
    """A line of slope 1 below the lowest curve of a panel with logarithmic axes."""
    lines = [line.get_xydata() for line in panel.lines if len(line.get_xdata()) > 1]
    if not lines:
        return
    lowest = min(lines, key=lambda line: line[0, 1] / line[0, 0])
    start, end = lowest[0, 0], max(line[:, 0].max() for line in lines)
    below = lowest[0, 1] / 1.6
    panel.plot(
        [start, end], [below, below * end / start], color="0.5", linestyle=":", label="linear"
    )


def legend_below(canvas: Any, panel: Any, *, columns: int) -> None:
    """One legend for the whole figure, from the lines or bars of one panel."""
    canvas.legend(
        *panel.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize="small",
    )
