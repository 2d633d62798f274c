"""Pictures of benchmarks: time, ratio and memory over a size, per shape or of a sweep; a roofline.

All are readable without colours. Every setting (mode, dtype, device, threads) has its own panels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.colors import LogNorm

from bench import plots, table
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
}


def prepared(found: pd.DataFrame) -> pd.DataFrame:
    """Rows with a time, and columns of what a picture names.

    ``label`` is a contestant, ``line`` also its p, ``case`` the sizes with p, ``setting`` a panel,
    ``width`` H or D.
    """
    own = found[found[TIME].notna()].reset_index(drop=True)
    own["label"] = [
        table.contestant(row) if row.impl == OURS else OPERATIONS[row.op].peers[row.impl].label
        for row in own.itertuples()
    ]
    own["sizes"] = own.apply(sizes_text, axis=1)
    p = own["p"].map("p = {:g}".format)
    own["line"] = own["label"] + (", " + p if own["p"].nunique() > 1 else "")
    own["case"] = own["sizes"] + ("\n" + p).where(own["p"] > 0, "")
    own["setting"] = own[SETTING].astype(str).agg(", ".join, axis=1) + " thread(s)"
    own["width"] = own["H"].fillna(own["D"]).astype(float)
    return own


def title(own: pd.DataFrame) -> str:
    first = own.iloc[0]
    machines = " / ".join(own["machine"].unique())
    return f"{first.op}; {machines}\ntorch {first.torch}, throughtime {first.version}"


def speed(found: pd.DataFrame) -> Any:
    """The figure of one operation: lines, bars or a sweep, a row of panels for every setting."""
    own = prepared(found)
    across = varying(own)
    several = own["sizes"].nunique() > MOST_BARS
    if across is None and several and own[RATIO].nunique() > 1:
        return sweep(own)
    columns = [name for name in TITLES if own[name].notna().any()]
    groups = list(own.groupby("setting", sort=False))
    heights = [
        3.6 if across else 1.2 + 0.2 * len(group) + 0.2 * group["case"].nunique()
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


def draw_lines(
    panels: Sequence[Any], own: pd.DataFrame, across: str, columns: Sequence[str]
) -> None:
    """One column into each panel, with a guide of slope 1 beside the costs."""
    lines = list(own["line"].unique())
    for panel, column in zip(panels, columns, strict=True):
        for name, rows in own[own[column] > 0].groupby("line", sort=False):
            # Without h-detach its time is that at p = 0, which is drawn already.
            repeated = rows["note"].str.contains(table.NO_DETACH) & (column != RATIO)
            rows = rows[~repeated].sort_values(across)
            if column != RATIO or (rows[column] != 1).any():
                panel.plot(rows[across], rows[column], label=name, **plots.look(lines.index(name)))
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


def draw_bars(panels: Sequence[Any], own: pd.DataFrame, columns: Sequence[str]) -> None:
    """One column into each panel, a group of bars for every case; ratios start at 1."""
    once = own.drop_duplicates(["case", "label"])
    for panel, column in zip(panels, columns, strict=True):
        values = once.pivot(index="case", columns="label", values=column)
        values = values.loc[once["case"].unique(), once["label"].unique()]
        if not values.notna().any(axis=None):
            panel.set_visible(False)
            continue
        ratio = column == RATIO
        plots.bars(panel, values.where(values != 1) if ratio else values, left=int(ratio))
        panel.set_xlabel(TITLES[column])
        plots.plain_log(panel, "x")
        if panel is not panels[0]:
            panel.set_yticklabels([])
        if ratio:
            panel.axvline(1, color="black", linewidth=0.8)
    panels[0].set_ylabel(OPERATIONS[own["op"].iloc[0]].heading)


def sweep(own: pd.DataFrame) -> Any:
    """The first peer's time / ours of every shape: H across, one marker per B, T by darkness."""
    peer = own.loc[own["impl"] != OURS, "label"].iloc[0]
    points = own[(own["label"] == peer) & own[RATIO].notna()].copy()
    points["kind"] = points["setting"] + points["line"].str.removeprefix(peer)
    points["place"] = points["width"] * 1.12 ** (points["B"].rank(method="dense") - 1)
    canvas, panels = _scatter(points, "kind", ("place", RATIO, "T"), points["B"].astype(str))
    for panel in panels:
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(xlabel="H or D; each B has a place of its own beside it")
        panel.set_ylabel(f"{peer}: {TITLES[RATIO]}", fontsize="small")
        plots.plain_log(panel)
        plots.plain_log(panel, "x")
    return canvas


def roofline(found: pd.DataFrame) -> Any:
    """GFLOP/s over arithmetic intensity, under the best rates of the machine in the same minutes.

    Contestants have markers, widths have colours. The intensity counts the traffic that no
    implementation can avoid, so that it is an upper bound.
    """
    own = prepared(found)
    own = own[(own["gflops"] > 0) & (own["gbs"] > 0)]
    own = own[~own["note"].str.contains(table.NO_DETACH)]
    own["intensity"] = own["gflops"] / own["gbs"]
    canvas, panels = _scatter(own, "setting", ("intensity", "gflops", "width"), own["line"])
    for panel, (setting, group) in zip(panels, own.groupby("setting", sort=False), strict=False):
        _draw_roofs(panel, group, str(setting))
        panel.set(
            xlabel="operations per byte that must be moved", ylabel="GFLOP/s (more is better)"
        )
        plots.plain_log(panel)
        plots.plain_log(panel, "x")
    return canvas


def _scatter(
    own: pd.DataFrame, panel_by: str, axes: tuple[str, str, str], marker_by: pd.Series
) -> tuple[Any, list[Any]]:
    """Points of x, y and darkness: a panel for each value of a column, a marker for another's."""
    x, y, dark = axes
    groups, markers = list(own.groupby(panel_by, sort=False)), list(marker_by.unique())
    canvas, panels = plots.figure(min(len(groups), 2), [4.6] * -(-len(groups) // 2), width=6)
    norm = LogNorm(own[dark].min() / 2, own[dark].max())
    for panel, (name, group) in zip(panels, groups, strict=False):
        for marker, rows in group.groupby(marker_by, sort=False):
            shape = plots.MARKERS[markers.index(marker) % len(plots.MARKERS)]
            drawn = panel.scatter(
                rows[x], rows[y], c=rows[dark].astype(float), cmap="Greys", norm=norm, s=34,
                marker=shape, edgecolor="black", linewidth=0.6, label=f"{marker_by.name} {marker}",
            )  # fmt: skip
        panel.set_title(name, fontsize="x-small", loc="left")
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    canvas.colorbar(drawn, ax=panels, label=dark.replace("width", "H or D"), format="{x:g}")
    handles = {
        text: handle
        for panel in panels
        for handle, text in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    look = {"loc": "outside lower center", "ncols": 2, "frameon": False, "fontsize": "small"}
    canvas.legend(handles.values(), [text.removeprefix("line ") for text in handles], **look)
    canvas.suptitle(title(own), fontsize="small")
    return canvas, panels[: len(groups)]


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
