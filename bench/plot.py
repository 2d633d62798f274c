"""``bench plot``: prints stored measurements as Markdown, and draws them.

Time, ratio and memory over a size or per shape, and a roofline. All pictures are readable without
colours. Every setting (mode, dtype, device, threads) has its own panels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.colors import LogNorm

from bench import plots, table
from bench.arguments import UsageError
from bench.operations import OPERATIONS
from bench.operations.operation import OURS, SIZES, sizes_text

LEAST_POINTS = 3  # of a line
MOST_SHAPES = 16  # of bars; more shapes have a roofline alone
SETTING = ["mode", "dtype", "device", "threads"]
TIME, RATIO, MEMORY = "median_ms", "ratio", "peak_mb"
TITLES = {
    TIME: "ms per iteration (less is better)",
    RATIO: "time / ours (above 1: ours is faster)",
    MEMORY: "peak memory, MB (less is better)",
}
LEGEND = {"loc": "outside lower center", "fontsize": "small"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    add = parser.add_argument
    add("csv", type=Path, nargs="+", metavar="CSV", help="of `bench OP --csv`")
    text = "writes FILE.svg, FILE.png and the same with -roofline; of several operations by name"
    add("--out", type=Path, required=True, metavar="FILE", help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    found = pd.concat([table.read_csv(path) for path in args.csv])
    for _, own in found.groupby("op", sort=False):
        print(f"{table.report(own)}\n")
    for path in draw(found, args.out):
        print(f"plot: {path}")
    return 0


def draw(found: pd.DataFrame, out: Path) -> list[Path]:
    """Write the pictures as svg and as png, and return the files.

    Raises:
        UsageError: if no row has a time.
    """
    measured = found[found[TIME].notna()].reset_index(drop=True)
    if measured.empty:
        raise UsageError(f"nothing to draw: none of the {len(found)} rows has a time (see notes)")
    drawn = {}
    for operation, own in measured.groupby("op", sort=False):
        name = f"-{operation}" if measured["op"].nunique() > 1 else ""
        if varying(own) or own.apply(sizes_text, axis=1).nunique() <= MOST_SHAPES:
            drawn[name] = speed(own)
        if own["share_of_matmul"].notna().any():
            drawn[f"{name}-roofline"] = roofline(own)
    stem = out.with_suffix("") if out.suffix in (".svg", ".png") else out
    return [
        path
        for end, canvas in drawn.items()
        for path in plots.save_both(canvas, stem.with_name(f"{stem.name}{end}"))
    ]


def write(found: pd.DataFrame, args: argparse.Namespace) -> None:
    """The files that ``arguments.add_files`` lets a command name."""
    if args.csv is not None:
        table.write_csv(args.csv, found)
        print(f"measurements: {args.csv}")
    if args.plot is not None:
        for path in draw(found, args.plot):
            print(f"plot: {path}")


def prepared(found: pd.DataFrame) -> pd.DataFrame:
    """Rows with a time, and columns of what a picture names.

    ``label`` is a contestant, ``line`` also its p, ``case`` the sizes with p, ``setting`` a panel.
    """
    own = found[found[TIME].notna()].reset_index(drop=True)
    own["label"] = [
        table.contestant(row) if row.impl == OURS else OPERATIONS[row.op].peers[row.impl].label
        for row in own.itertuples()
    ]
    p = own["p"].map("p = {:g}".format)
    own["line"] = own["label"] + (", " + p if own["p"].nunique() > 1 else "")
    own["case"] = own.apply(sizes_text, axis=1) + ("\n" + p).where(own["p"] > 0, "")
    own["setting"] = own[SETTING].astype(str).agg(", ".join, axis=1) + " thread(s)"
    return own


def title(own: pd.DataFrame) -> str:
    first = own.iloc[0]
    machines = " / ".join(own["machine"].unique())
    return f"{first.op}; {machines}\ntorch {first.torch}, throughtime {first.version}"


def speed(found: pd.DataFrame) -> Any:
    """The figure of one operation: lines or bars, a row of panels for every setting."""
    own = prepared(found)
    across = varying(own)
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
    canvas.legend(*panels[0].get_legend_handles_labels(), ncols=4, **LEGEND)
    canvas.suptitle(title(own), fontsize="small")
    return canvas


def varying(own: pd.DataFrame) -> str | None:
    """The only size of which there are several values; the input may be as wide as the state."""
    names = [name for name in SIZES if name in own and own[name].nunique() > 1]
    if names == ["I", "H"] and (own["I"] == own["H"]).all():
        names = ["H"]
    return names[0] if len(names) == 1 and own[names[0]].nunique() >= LEAST_POINTS else None


def draw_lines(
    panels: Sequence[Any], own: pd.DataFrame, across: str, columns: Sequence[str]
) -> None:
    """One column into each panel, with a guide of slope 1 beside the costs."""
    lines = list(own["line"].unique())
    if across == "T":
        own = own[own["T"] > 1]  # one step costs little but the call
    for panel, column in zip(panels, columns, strict=True):
        for name, rows in own[own[column] > 0].groupby("line", sort=False):
            # Without h-detach its time is that at p = 0, which is drawn already.
            repeated = rows["note"].str.contains(table.NO_DETACH) & (column != RATIO)
            rows = rows[~repeated].sort_values(across)
            if column != RATIO or (rows[column] != 1).any():
                panel.plot(rows[across], rows[column], label=name, **plots.look(lines.index(name)))
        panel.set_xlabel(across)
        panel.set_ylabel(TITLES[column], fontsize="small")
        if column == RATIO:
            panel.axhline(1, color="black", linewidth=0.8)
        else:
            plots.linear_guide(panel)
        plots.plain_log(panel, "x")
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


def roofline(found: pd.DataFrame) -> Any:
    """GFLOP/s over arithmetic intensity, under the best rates of the machine in the same minutes.

    Contestants have markers, widths have colours. The intensity counts the traffic that no
    implementation can avoid, so that it is an upper bound.
    """
    own = prepared(found)
    own = own[(own["gflops"] > 0) & (own["gbs"] > 0)]
    own = own[~own["note"].str.contains(table.NO_DETACH)]
    own["intensity"] = own["gflops"] / own["gbs"]
    own["width"] = own["H"].fillna(own["D"]).astype(float)
    groups, lines = list(own.groupby("setting", sort=False)), list(own["line"].unique())
    canvas, panels = plots.figure(min(len(groups), 2), [4.6] * -(-len(groups) // 2), width=6)
    norm = LogNorm(own["width"].min() / 2, own["width"].max())
    handles = {}
    for panel, (setting, group) in zip(panels, groups, strict=False):
        for line, rows in group.groupby("line", sort=False):
            handles[line] = panel.scatter(
                rows["intensity"], rows["gflops"], c=rows["width"], cmap="Greys", norm=norm, s=34,
                marker=plots.MARKERS[lines.index(line) % len(plots.MARKERS)], edgecolor="black",
                linewidth=0.6,
            )  # fmt: skip
        _draw_roofs(panel, group, str(setting))
        panel.set(
            xlabel="operations per byte that must be moved", ylabel="GFLOP/s (more is better)"
        )
        plots.plain_log(panel)
        plots.plain_log(panel, "x")
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    canvas.colorbar(handles[lines[-1]], ax=panels, label="H or D", format="{x:g}")
    canvas.legend(handles.values(), handles, ncols=2, **LEGEND)
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
    for roof, name, reason in (
        (own["intensity"] * copy, "slope", "caches hold their data"),
        (matmul, "flat roof", "faster than torch's product"),
    ):
        above = int((own["gflops"] > roof).sum())
        words += [f"{above} points above the {name}: {reason}"] if above else []
    panel.set_title("\n".join([setting, *words]), fontsize="x-small", loc="left")
