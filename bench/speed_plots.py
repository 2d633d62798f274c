"""Pictures of benchmarks: lines over a size, bars per shape, a sweep, a roofline.

Readable without colours: contestants differ in marker and hatch, modes in the line: solid is
forward and backward, dashed the forward pass, dotted inference.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bench.cell import OURS
from bench.engine import NO_DETACH
from bench.errors import require
from bench.plots import COLOURS, HATCHES, MARKERS, figure, legend_below, plain_log
from bench.report import ms, sizes
from bench.rooms import OPERATIONS
from bench.rows import Row

SIZES = ("T", "H", "B", "I", "heads", "D", "window_size", "top_k")
LINES = {"forward+backward": "-", "forward": "--", "inference": ":"}
MOST_VIEWS = 4
MOST_BARS = 12
FILLS = ("full", "none", "left", "top", "bottom", "right")
TIME = "ms per iteration (less is better)"
RATIO = "time / ours (above 1: ours is faster)"
ERROR = "largest relative error against float64"
COLUMNS = {"median_ms": TIME, "ratio": RATIO, "error": ERROR}
View = tuple[str, str, list[Row]]


def speed(rows: Sequence[Row]) -> Any:
    """Time, ratio and error of the rows of one operation, as lines, bars or a scatter plot.

    Args:
        rows: of one operation; those without a time are left out.

    Returns:
        The figure: lines over every size that varies while the others stay, if these are few
        lines; else bars for at most ``MOST_BARS`` shapes; else a point per shape.
    """
    measured = [row for row in rows if row.median_ms is not None]
    found = views(measured)
    cells = {_cell(row) for row in measured}
    if found:
        canvas = over_sizes(found)
    elif len(cells) <= MOST_BARS:
        canvas, panels = figure(3, [bars_height(measured)])
        draw_bars(canvas, panels, measured)
    else:
        canvas = sweep(measured)
    canvas.suptitle(title(measured), fontsize="small")
    return canvas


def title(rows: Sequence[Row]) -> str:
    """Operation, machine, threads and versions; of several machines all."""
    machines = " / ".join(dict.fromkeys(row.machine for row in rows))
    first = rows[0]
    threads = f"{first.threads} thread" + ("s" if first.threads > 1 else "")
    return f"{first.op}; {machines}\n{threads}, torch {first.torch}, throughtime {first.version}"


def views(rows: Sequence[Row]) -> list[View]:
    """(size across, what stays, rows) of every line plot; none if they would be too many.

    Example:
        >>> from dataclasses import replace
        >>> row = Row(op="lstm", T=5, B=3, dtype="float32", mode="forward", device="cpu",
        ...           impl="torch", threads=1)
        >>> [(across, stays) for across, stays, _ in views([row, replace(row, T=9)])]
        [('T', 'B = 3')]
    """
    found = []
    for across in SIZES:
        # The input is as wide as the state where they vary together.
        follows = {"I"} if across == "H" and all(row.I == row.H for row in rows) else set()
        kept = [name for name in SIZES if name != across and name not in follows]
        groups: dict[str, list[Row]] = {}
        for row in rows:
            fixed = ((name, getattr(row, name)) for name in kept)
            text = ", ".join(f"{name} = {size}" for name, size in fixed if size is not None)
            groups.setdefault(text, []).append(row)
        lines = all(len({getattr(row, across) for row in group}) > 1 for group in groups.values())
        if lines and not (across == "I" and all(row.I == row.H for row in rows)):
            found += [(across, text, group) for text, group in groups.items()]
    return found if len(found) <= MOST_VIEWS else []


def over_sizes(found: Sequence[View]) -> Any:
    """A row of panels for every view: time, ratio and error, all axes logarithmic."""
    looks = Looks([row for _, _, group in found for row in group])
    canvas, panels = figure(3, [3.6] * len(found))
    for k, (across, stays, group) in enumerate(found):
        own = panels[3 * k : 3 * k + 3]
        for panel, (column, text) in zip(own, COLUMNS.items(), strict=True):
            _draw_lines(panel, group, across, column, looks)
            ticks = sorted({getattr(row, across) for row in group})
            panel.set(xscale="log", xlabel=across)
            panel.set_title(text, fontsize="small")
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.minorticks_off()
            plain_log(panel, scientific=column == "error")
        own[0].set_ylabel(stays, fontsize="small")
        own[1].axhline(1, color="black", linewidth=0.8)
    looks.draw_legend(canvas, columns=5)
    return canvas


class Looks:
    """How the line of a row looks: contestant by colour and marker, p by filling, mode by dashes.

    What differs besides, dtype or device, makes another contestant.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._differs = [
            name for name in ("dtype", "device") if len({getattr(r, name) for r in rows}) > 1
        ]
        self.names = list(dict.fromkeys(self.name(row) for row in rows))
        self._modes = [mode for mode in LINES if any(row.mode == mode for row in rows)]
        self._ps = sorted({row.p for row in rows if row.p is not None})

    def name(self, row: Row) -> str:
        """The contestant."""
        return ", ".join([label(row), *(getattr(row, name) for name in self._differs)])

    def style(self, name: str, p: float | None, mode: str) -> dict[str, Any]:
        """Arguments of ``plot``."""
        k = self.names.index(name)
        return {
            "color": COLOURS[k % len(COLOURS)],
            "marker": MARKERS[k % len(MARKERS)],
            "fillstyle": FILLS[self._ps.index(p) % len(FILLS)] if p is not None else "full",
            "markerfacecoloralt": "white",
            "markersize": 6,
            "linestyle": LINES[mode],
        }

    def draw_legend(self, canvas: Any, *, columns: int, lines: bool = True) -> None:
        """A sign for every contestant, and one for every p and mode where they differ."""
        line = require("matplotlib.lines").Line2D
        p = self._ps[0] if self._ps else None
        mode = self._modes[0]
        bare = {} if lines else {"linestyle": "none"}
        handles = [line([], [], label=n, **(self.style(n, p, mode) | bare)) for n in self.names]
        grey = {"color": "0.3"}
        if len(self._ps) > 1:
            for other in self._ps:
                look = {**self.style(self.names[0], other, mode), **grey, "linestyle": "none"}
                handles.append(line([], [], label=f"p = {other:g}", **look))
        if lines and len(self._modes) > 1:
            handles += [line([], [], linestyle=LINES[m], label=m, **grey) for m in self._modes]
        place = {"loc": "outside lower center", "ncols": columns}
        canvas.legend(handles=handles, frameon=False, fontsize="small", **place)


def _draw_lines(panel: Any, rows: Sequence[Row], across: str, column: str, looks: Looks) -> None:
    series: dict[tuple[str, float | None, str], list[tuple[float, float]]] = {}
    for row in rows:
        known = getattr(row, column)
        # Without h-detach its time and error are those at p = 0, which are drawn already.
        if known and (column == "ratio" or NO_DETACH not in row.note):
            series.setdefault((looks.name(row), row.p, row.mode), []).append(
                (getattr(row, across), known)
            )
    for kind, points in series.items():
        if column == "ratio" and all(y == 1 for _, y in points):
            continue  # ours itself
        xs, ys = zip(*sorted(points), strict=True)
        panel.plot(xs, ys, **looks.style(*kind))


def label(row: Row) -> str:
    """The contestant's name for people.

    Example:
        >>> label(Row(op="lstm", T=5, B=3, dtype="float32", mode="forward", device="cpu",
        ...           impl="torch", threads=1))
        'nn.LSTM'
    """
    return row.contestant if row.impl == OURS else OPERATIONS[row.op].labels[row.impl]


def bars_height(rows: Sequence[Row]) -> float:
    """Inches that ``draw_bars`` needs."""
    return 1.2 + 0.2 * len(rows) + 0.2 * len({_cell(row) for row in rows})


def draw_bars(canvas: Any, panels: Sequence[Any], rows: Sequence[Row]) -> None:
    """Time, ratio and error of every shape into three panels."""
    cells = list(dict.fromkeys(_cell(row) for row in rows))
    series = list(dict.fromkeys(label(row) for row in rows))
    thickness = 0.8 / max(len(series), 1)
    for k, name in enumerate(series):
        own = [row for row in rows if label(row) == name]
        places = [cells.index(_cell(row)) + (k - (len(series) - 1) / 2) * thickness for row in own]
        style = {
            "height": thickness * 0.9,
            "color": COLOURS[k % len(COLOURS)],
            "hatch": HATCHES[k % len(HATCHES)],
            "edgecolor": "white",
            "label": name,
        }
        columns: Sequence[tuple[str, Callable[[float], str]]] = (
            ("median_ms", ms),
            ("ratio", "{:.2f}".format),
            ("error", "{:.1e}".format),
        )
        for panel, (column, form) in zip(panels, columns, strict=True):
            values = [getattr(row, column) for row in own]
            known = [(y, x) for y, x in zip(places, values, strict=True) if x is not None]
            left = 0
            if column == "ratio":  # from 1 to the side of the faster one; ours itself has no bar
                left, known = 1, [(y, x) for y, x in known if x != 1]
            bars = panel.barh(
                [y for y, _ in known], [x - left for _, x in known], left=left, **style
            )
            texts = [form(x) for _, x in known]
            panel.bar_label(bars, labels=texts, padding=3, fontsize="x-small")
    for panel, text in zip(panels, (TIME, RATIO, ERROR), strict=True):
        panel.set(xscale="log", xlabel=text)
        panel.margins(x=0.25)
        plain_log(panel, "x", scientific=text == ERROR)
        panel.set_yticks(range(len(cells)), cells if panel is panels[0] else [""] * len(cells))
        panel.set_ylim(len(cells) - 0.5, -0.5)
    panels[1].axvline(1, color="black", linewidth=0.8)
    panels[0].set_ylabel(OPERATIONS[rows[0].op].heading)
    legend_below(canvas, panels[0], columns=len(series))


def _cell(row: Row) -> str:
    details = [f"p = {row.p:g}"] if row.p else []
    details += [row.mode] if row.mode != "forward+backward" else []
    details += [text for text in (row.dtype, row.device) if text not in ("float32", "cpu")]
    return "\n".join([sizes(row), *([", ".join(details)] if details else [])])


def sweep(rows: Sequence[Row]) -> Any:
    """The first peer's time / ours of every shape: H across, one marker per B, T by darkness."""
    peer = next((label(row) for row in rows if not row.ours), None)
    points = [row for row in rows if label(row) == peer and row.ratio is not None]
    kinds = list(dict.fromkeys(_kind(row) for row in points))
    canvas, panels = figure(max(len(kinds), 1), [4.2])
    batches = sorted({row.B for row in points})
    steps = sorted({row.T for row in points})
    for panel, kind in zip(panels, kinds, strict=False):
        for k, batch in enumerate(batches):
            own = [row for row in points if _kind(row) == kind and batch == row.B]
            # A batch gets its own place beside H, or its points would hide those of the others.
            panel.scatter(
                [(row.H or row.D or 1) * 1.12 ** (k - (len(batches) - 1) / 2) for row in own],
                [row.ratio for row in own],
                c=[0.25 + 0.75 * (steps.index(row.T) + 1) / len(steps) for row in own],
                cmap="Greys",
                vmin=0,
                vmax=1,
                marker=MARKERS[k % len(MARKERS)],
                edgecolor="black",
                linewidth=0.6,
                s=34,
                label=f"B = {batch}",
            )
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(xscale="log", yscale="log", xlabel="H", title=kind)
        hidden = sorted({row.H or row.D or 1 for row in points})
        panel.set_xticks(hidden, [str(h) for h in hidden])
        panel.minorticks_off()
        plain_log(panel)
    panels[0].set_ylabel(f"{peer}: {RATIO}")
    canvas.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right upper",
        frameon=False,
        fontsize="small",
        title=f"darker:\nlonger T\n({steps[0]} to {steps[-1]})" if steps else None,
    )
    return canvas


def _kind(row: Row) -> str:
    return row.mode if row.p is None else f"{row.mode}, p = {row.p:g}"


def roofline(rows: Sequence[Row]) -> Any:
    """GFLOP/s over arithmetic intensity, under what the machine itself reached in the same minutes.

    The intensity counts the traffic that nobody can avoid, so that it is an upper bound. A panel
    for every mode.

    Args:
        rows: of one operation; those without a rate are left out.
    """
    known = [r for r in rows if r.gflops and r.gbs and r.share_of_matmul and r.share_of_bandwidth]
    modes = [mode for mode in LINES if any(row.mode == mode for row in known)]
    looks = Looks(known)
    canvas, panels = figure(len(modes), [4.8], width=6)
    for panel, mode in zip(panels, modes, strict=True):
        own = [row for row in known if row.mode == mode]
        for row in own:
            if NO_DETACH not in row.note:
                style = looks.style(looks.name(row), row.p, mode) | {"linestyle": "none"}
                panel.plot([_intensity(row)], [row.gflops], **style)
        _draw_roofs(panel, own)
        _name_points(panel, own)
        panel.set_xlabel("operations per byte that nobody can avoid to move")
        panel.set_title(mode, fontsize="small")
        plain_log(panel)
        plain_log(panel, "x")
    panels[0].set_ylabel("GFLOP/s (more is better)")
    looks.draw_legend(canvas, columns=3, lines=False)
    canvas.suptitle(
        f"{title(known)}\nbeside our points: {OPERATIONS[known[0].op].heading}", fontsize="small"
    )
    return canvas


def _name_points(panel: Any, rows: Sequence[Row]) -> None:
    """The sizes beside one point of ours for every shape; only the one that varies, if one does."""
    varying = [name for name in SIZES if len({getattr(row, name) for row in rows}) > 1]
    named: dict[str, Row] = {}
    for row in rows:
        if row.ours:
            text = f"{varying[0]} = {getattr(row, varying[0])}" if len(varying) == 1 else sizes(row)
            named.setdefault(text, row)
    for k, (text, row) in enumerate(named.items()):
        panel.annotate(
            text,
            (_intensity(row), row.gflops),
            xytext=(0, -13 if k % 2 else 7),  # up and down in turns: neighbours stay apart
            textcoords="offset points",
            fontsize="x-small",
            ha="center",
        )


def _intensity(row: Row) -> float:
    assert row.gflops and row.gbs
    return row.gflops / row.gbs


def _draw_roofs(panel: Any, rows: Sequence[Row]) -> None:
    """One roof per device and dtype: bandwidth up to the ridge, then the matrix product."""
    for k, (device, dtype) in enumerate(dict.fromkeys((row.device, row.dtype) for row in rows)):
        own = [row for row in rows if (row.device, row.dtype) == (device, dtype)]
        matmul = statistics.median((r.gflops or 0) / (r.share_of_matmul or 1) for r in own)
        copy = statistics.median((r.gbs or 0) / (r.share_of_bandwidth or 1) for r in own)
        ridge = matmul / copy
        xs = [ridge, *(_intensity(row) for row in own)]
        left, right = min(xs) / 2, max(xs) * 2
        panel.plot(
            [left, ridge, right],
            [left * copy, matmul, matmul],
            color="black",
            linestyle=list(LINES.values())[k % len(LINES)],
            linewidth=1.2,
        )
        place = {"textcoords": "offset points", "fontsize": "x-small", "va": "top"}
        text = f" {dtype} on this {device}:\n {matmul:.3g} GFLOP/s (matrix product)"
        panel.annotate(text, (ridge, matmul), xytext=(0, -3 - 24 * k), **place)
        panel.annotate(f"{copy:.3g} GB/s (copy)", (left, left * copy), xytext=(4, -6), **place)
