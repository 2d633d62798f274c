"""``bench scaling``: its picture, every size and cost with the fitted power."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import plots
from bench.scaling_series import Series

COSTS = (("time", "median_ms", "ms per iteration"), ("memory", "peak_mb", "peak memory, MB"))


def draw(found: Sequence[Series], path: Path) -> list[Path]:
    """Writes the picture: one column of panels per size, time above and memory below.

    Points are measurements; a line is a fit and runs over the sizes that it is taken from.

    Args:
        found: at least one series.
        path: the file; written as svg and as png whatever it ends with.

    Returns:
        The files.
    """
    axes = list(dict.fromkeys(one.axis for one in found))
    canvas, panels = plots.figure(len(axes), [3.6, 3.6])
    for row, (cost, column, label) in enumerate(COSTS):
        for place, axis in enumerate(axes):
            panel = panels[row * len(axes) + place]
            for k, one in enumerate(one for one in found if one.axis == axis):
                colour = plots.COLOURS[k % len(plots.COLOURS)]
                points = [(getattr(r, one.name), getattr(r, column)) for r in one.rows]
                points = [(x, y) for x, y in points[1:] if y]  # the first is the fixed cost
                fitted = one.time if cost == "time" else one.memory
                name = one.op if one.contestant.ours else str(one.contestant)
                panel.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    color=colour,
                    marker=plots.MARKERS[k % len(plots.MARKERS)],
                    linestyle="none",
                    label=name if fitted is None else f"{name}: {fitted}",
                )
                if fitted is not None:
                    ends = [fitted.low, fitted.high]
                    panel.plot(ends, [fitted.at(x) for x in ends], color=colour, linewidth=1)
            panel.set(xlabel=_label(found, axis), ylabel=label)
            plots.plain_log(panel, "x")
            plots.plain_log(panel, "y")
            panel.legend(frameon=False, fontsize="x-small", title="exponent", title_fontsize=7)
    first = found[0].rows[0]
    canvas.suptitle(f"{first.machine}, 1 thread, torch {first.torch}", fontsize=8)
    return plots.save_both(canvas, path.with_suffix(""))


def _label(found: Sequence[Series], axis: str) -> str:
    return " or ".join(dict.fromkeys(one.name for one in found if one.axis == axis))
