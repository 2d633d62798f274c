"""Pictures of benchmarks: time, ratio and memory over a size, per shape or of a sweep; a roofline.

All are readable without colours. Every setting (mode, dtype, device, threads) has its own panels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from bench import plots, table
from bench.errors import require
from bench.operations import OPERATIONS
from bench.operations.operation import OURS, SIZES, sizes_text

MOST_BARS = 12
LEAST_POINTS = 3  # of a line
SETTING = ["mode", "dtype", "device", "threads"]
TIME, RATIO, MEMORY = "median_ms", "ratio", "peak_mb"
TITLES = {
    TIME: "ms per iteration (less is better)",
    RATIO: "time / ours (above 1: ours is faster)",
    MEMORY: "peak memory, MB (less is better)",
    "gflops": "GFLOP/s (more is better)",
}


def prepared(found: pd.DataFrame) -> pd.DataFrame:
    """Rows with a time, and columns of what a picture names: ``label``, ``sizes``, ``setting``."""
    own = found[found[TIME].notna()].copy()
    own["label"] = [label(row) for row in own.itertuples()]
    own["sizes"] = own.apply(sizes_text, axis=1)
    own["setting"] = own[SETTING].astype(str).agg(", ".join, axis=1) + " thread(s)"
    return own


def label(row: Any) -> str:
    """The contestant's name for people."""
    if row.impl == OURS:
        return table.contestant(row)
    return OPERATIONS[row.op].peers[row.impl].label


def title(own: pd.DataFrame) -> str:
    """Operation, machines and versions."""
    first = own.iloc[0]
    machines = " / ".join(own["machine"].unique())
    return f"{first.op}; {machines}\ntorch {first.torch}, throughtime {first.version}"


def speed(found: pd.DataFrame) -> Any:
    """The figure of one operation: lines, bars or a sweep, a row of panels for every setting."""
    own = prepared(found)
    across = varying(own)
    several = own["sizes"].nunique() > MOST_BARS
    columns = [name for name in (TIME, RATIO, MEMORY) if own[name].notna().any()]
    groups = list(own.groupby("setting", sort=False))
    if across is None and several and own[RATIO].nunique() > 1:
        canvas = sweep(own)
    else:
        heights = [
            3.6 if across else 1.2 + 0.2 * len(group) + 0.2 * _cases(group).nunique()
            for _, group in groups
        ]
        canvas, panels = plots.figure(len(columns), heights)
        for k, (setting, group) in enumerate(groups):
            row = panels[k * len(columns) : (k + 1) * len(columns)]
            if across:
                draw_lines(row, group, across, columns)
            else:
                draw_bars(row, group, columns)
            row[0].set_title(setting, fontsize="small", loc="left")
        look = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": "small"}
        canvas.legend(*panels[0].get_legend_handles_labels(), **look)
    canvas.suptitle(title(own), fontsize="small")
    return canvas


def varying(own: pd.DataFrame) -> str | None:
    """The only size of which there are several values; the input may be as wide as the state."""
    names = [name for name in SIZES if own[name].nunique() > 1]
    if names == ["I", "H"] and (own["I"] == own["H"]).all():
        names = ["H"]
    return names[0] if len(names) == 1 and own[names[0]].nunique() >= LEAST_POINTS else None


def _series(own: pd.DataFrame) -> Iterable[tuple[str, dict[str, Any], pd.DataFrame]]:
    """Label, look and rows of every contestant at every p."""
    several = own["p"].nunique() > 1
    labels, ps = list(own["label"].unique()), sorted(own["p"].dropna().unique())
    for (name, p), rows in own.groupby(["label", "p"], sort=False, dropna=False):
        look = {
            "color": plots.COLOURS[labels.index(name) % len(plots.COLOURS)],
            "marker": plots.MARKERS[labels.index(name) % len(plots.MARKERS)],
            "linestyle": plots.DASHES[ps.index(p) % len(plots.DASHES)] if several else "-",
            "fillstyle": "none" if several and p else "full",
        }
        yield f"{name}, p = {p:g}" if several else name, look, rows


def draw_lines(panels: Sequence[Any], own: pd.DataFrame, across: str, columns: list[str]) -> None:
    """One column into each panel, with a guide of slope 1 beside the costs."""
    for panel, column in zip(panels, columns, strict=True):
        for name, look, rows in _series(own):
            rows = rows[rows[column].notna() & (rows[column] > 0)].sort_values(across)
            # Without h-detach its time is that at p = 0, which is drawn already.
            repeated = rows["note"].str.contains(table.NO_DETACH) & (column != RATIO)
            if column != RATIO or (rows[column] != 1).any():
                panel.plot(rows[across][~repeated], rows[column][~repeated], label=name, **look)
        ticks = sorted(own[across].unique())
        panel.set(xscale="log", xlabel=across)
        panel.set_ylabel(TITLES[column], fontsize="small")
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        if column == RATIO:
            panel.axhline(1, color="black", linewidth=0.8)
        else:
            plots.linear_guide(panel)
        plots.plain_log(panel)


def _cases(own: pd.DataFrame) -> pd.Series:
    return own["sizes"] + own["p"].map(lambda p: f"\np = {p:g}" if p > 0 else "")


def draw_bars(panels: Sequence[Any], own: pd.DataFrame, columns: Sequence[str]) -> None:
    """One column into each panel, a group of bars for every case; ratios start at 1."""
    cases = _cases(own)
    for panel, column in zip(panels, columns, strict=True):
        values = own.assign(case=cases).drop_duplicates(["case", "label"])
        values = values.pivot(index="case", columns="label", values=column)
        values = values.loc[cases.unique(), own["label"].unique()]
        ratio = column == RATIO
        if not values.notna().any(axis=None):
            panel.set_visible(False)
            continue
        plots.bars(panel, values.where(values != 1) if ratio else values, left=int(ratio))
        panel.set_xlabel(TITLES[column])
        plots.plain_log(panel, "x")
        if panel is not panels[0]:
            panel.set_yticklabels([])
        if ratio:
            panel.axvline(1, color="black", linewidth=0.8)
    panels[0].set_ylabel(OPERATIONS[own["op"].iloc[0]].heading)


def _grid(count: int, height: float) -> tuple[Any, list[Any]]:
    """So many panels, two in a row."""
    canvas, panels = plots.figure(min(count, 2), [height] * -(-count // 2), width=6)
    for panel in panels[count:]:
        panel.set_visible(False)
    return canvas, panels[:count]


def sweep(own: pd.DataFrame) -> Any:
    """The first peer's time / ours of every shape: H across, one marker per B, T by darkness."""
    peer = own.loc[own["impl"] != OURS, "label"].iloc[0]
    points = own[(own["label"] == peer) & own[RATIO].notna()].copy()
    points["width"] = points["H"].fillna(points["D"])
    several = points["p"].notna().any()
    points["kind"] = points["setting"] + (points["p"].map(", p = {:g}".format) if several else "")
    batches, steps = sorted(points["B"].unique()), sorted(points["T"].unique())
    widths = sorted(points["width"].unique())
    kinds = list(points.groupby("kind", sort=False))
    canvas, panels = _grid(len(kinds), 4.2)
    for panel, (kind, group) in zip(panels, kinds, strict=True):
        for k, batch in enumerate(batches):
            rows = group[group["B"] == batch]
            # A batch has its own place beside H, so that its points do not hide others.
            panel.scatter(
                rows["width"].astype(float) * 1.12 ** (k - (len(batches) - 1) / 2),
                rows[RATIO],
                c=[0.25 + 0.75 * (steps.index(t) + 1) / len(steps) for t in rows["T"]],
                cmap="Greys", vmin=0, vmax=1, marker=plots.MARKERS[k % len(plots.MARKERS)],
                edgecolor="black", linewidth=0.6, s=34, label=f"B = {batch}",
            )  # fmt: skip
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(xscale="log", yscale="log", xlabel="H" if group["H"].notna().any() else "D")
        panel.set_title(kind, fontsize="small")
        panel.set_xticks(widths, [str(width) for width in widths])
        panel.minorticks_off()
        plots.plain_log(panel)
        panel.set_ylabel(f"{peer}: {TITLES[RATIO]}", fontsize="small")
    canvas.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False,
        fontsize="small", title=f"darker:\nlonger T\n({steps[0]} to {steps[-1]})",
    )  # fmt: skip
    return canvas


def roofline(found: pd.DataFrame) -> Any:
    """GFLOP/s over arithmetic intensity, under the best rates of the machine in the same minutes.

    Contestants have markers, shapes have colours. The intensity counts the traffic that no
    implementation can avoid, so that it is an upper bound.
    """
    own = prepared(found)
    own = own[(own["gflops"] > 0) & (own["gbs"] > 0)]
    own = own[~own["note"].str.contains(table.NO_DETACH)]
    own["intensity"] = own["gflops"] / own["gbs"]
    many = own["sizes"].nunique() > MOST_BARS
    own["shape"] = "H = " + own["H"].fillna(own["D"]).astype(str) if many else own["sizes"]
    shapes, labels = list(own["shape"].unique()), list(own["label"].unique())
    colours = require("matplotlib").colormaps["viridis"].resampled(len(shapes))
    groups = list(own.groupby("setting", sort=False))
    canvas, panels = _grid(len(groups), 5.0)
    for panel, (setting, group) in zip(panels, groups, strict=True):
        for row in group.itertuples():
            look = {"marker": plots.MARKERS[labels.index(row.label) % len(plots.MARKERS)],
                    "color": colours(shapes.index(row.shape)),
                    "fillstyle": "none" if row.p > 0 else "full"}  # fmt: skip
            panel.plot(row.intensity, row.gflops, linestyle="none", **look)
        _draw_roofs(panel, group, setting)
        panel.set(xlabel="operations per byte that must be moved",
                  ylabel="GFLOP/s (more is better)")  # fmt: skip
        plots.plain_log(panel)
        plots.plain_log(panel, "x")
    marks: Callable[..., Any] = require("matplotlib.lines").Line2D
    bare = {"linestyle": "none"}
    handles = [marks([], [], label=name, color="0.3", **bare,
                     marker=plots.MARKERS[k % len(plots.MARKERS)])
               for k, name in enumerate(labels)]  # fmt: skip
    if (own["p"] > 0).any():
        look = {"color": "0.3", "marker": "o", "fillstyle": "none"}
        handles.append(marks([], [], label="p > 0", **look, **bare))
    handles += [marks([], [], label=shape, color=colours(k), marker="s", **bare)
                for k, shape in enumerate(shapes)]  # fmt: skip
    heading = "" if many else OPERATIONS[own["op"].iloc[0]].heading
    canvas.legend(handles=handles, loc="outside right upper", frameon=False, fontsize="x-small",
                  title=heading, title_fontsize="x-small")  # fmt: skip
    canvas.suptitle(title(own), fontsize="small")
    return canvas


def _draw_roofs(panel: Any, own: pd.DataFrame, setting: str) -> None:
    """Bandwidth up to the ridge, then the matrix product; points above them get a sentence."""
    matmul = (own["gflops"] / own["share_of_matmul"]).max()
    copy = (own["gbs"] / own["share_of_bandwidth"]).max()
    ridge = matmul / copy
    left, right = min(ridge, own["intensity"].min()) / 2, max(ridge, own["intensity"].max()) * 2
    panel.plot([left, ridge, right], [left * copy, matmul, matmul], color="black", linewidth=1.2)
    words = [f"flat roof: matrix product, {matmul:.3g} GFLOP/s", f"slope: copy, {copy:.3g} GB/s"]
    above = own[own["gflops"] > own["intensity"] * copy]
    if len(above):
        words.append(f"{len(above)} points above the slope: caches hold their data")
    above = own[own["gflops"] > matmul]
    if len(above):
        words.append(f"{len(above)} points above the flat roof: faster than torch's product")
    panel.set_title("\n".join([setting, *words]), fontsize="x-small", loc="left")
