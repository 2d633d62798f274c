"""Pictures of training runs and of benchmarks; hatches and dashes carry what colours do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from throughtime.bench.errors import require
from throughtime.bench.report import Row, ms
from throughtime.bench.tasks.record import Epoch
from throughtime.bench.versus import Row as VersusRow

# Okabe and Ito's palette: told apart by people who see colours differently, and by lightness.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
DASHES = ("-", "--", "-.", ":", (0, (1, 1)))
HATCHES = ("", "//", "..", "xx", "\\\\")
MOST_BARS = 12
MARKERS = ("o", "s", "^", "D", "v")


def figure(columns: int, heights: Sequence[float] = (3.6,)) -> tuple[Any, list[Any]]:
    """A figure with rows of panels, drawn without a display; heights in inches."""
    require("matplotlib").use("Agg")
    canvas, axes = require("matplotlib.pyplot").subplots(
        len(heights),
        columns,
        figsize=(4.6 * columns, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
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


def curves(history: Sequence[Epoch], title: str) -> Any:
    """Loss, accuracy of all three sets and gradient norm of one run."""
    canvas, (loss, accuracy, norm) = figure(3)
    epochs = [epoch.epoch for epoch in history]
    loss.plot(epochs, [epoch.loss for epoch in history], color=COLOURS[0])
    for k, part in enumerate(("train", "validation", "test")):
        values = [getattr(epoch, f"{part}_accuracy") for epoch in history]
        accuracy.plot(epochs, values, label=part, color=COLOURS[k], linestyle=DASHES[k])
    norm.plot(epochs, [epoch.grad_norm_median for epoch in history], label="median", color="black")
    highest = [epoch.grad_norm_max for epoch in history]
    norm.plot(epochs, highest, label="maximum", color=COLOURS[1], linestyle="--")
    loss.set(ylabel="training loss", ylim=(0, None))
    accuracy.set(ylabel="accuracy", ylim=(0, 1))
    norm.set_ylabel("gradient norm before clipping")
    _log_axis(norm)
    for panel in (loss, accuracy, norm):
        _epoch_axis(panel)
    for panel in (accuracy, norm):
        panel.legend(frameon=False, fontsize="small")
    canvas.suptitle(title, fontsize="medium")
    return canvas


def bench(rows: Sequence[Row], labels: Mapping[str, str]) -> Any:
    """Bars of time, speed-up over nn.LSTM and error for a table; points of speed-up for a sweep."""
    if len({_cell(row) for row in rows}) <= MOST_BARS:
        canvas, panels = figure(3, [_bars_height(rows)])
        _draw_bars(canvas, panels, rows, labels)
    else:
        canvas = _sweep(rows)
    if rows:
        canvas.suptitle(_setting(rows[0]), fontsize="small")
    return canvas


def versus(rows: Sequence[VersusRow], labels: Mapping[str, str]) -> Any:
    """Time and speed-up of a benchmark against peers: over T where T alone varies, else per case.

    Solid is forward and backward, dashed the forward pass alone.
    """
    canvas, (time, ratio, memory) = figure(3, [3.8])
    measured = [row for row in rows if row.median_ms is not None]
    over_t = len({(row.B, row.H) for row in rows}) == 1
    cases = list(dict.fromkeys(f"{row.T}, {row.B}" for row in rows))

    def place(row: VersusRow) -> float:
        return row.T if over_t else cases.index(f"{row.T}, {row.B}")

    for k, impl in enumerate(dict.fromkeys(row.impl for row in measured)):
        for mode in dict.fromkeys(row.mode for row in measured):
            own = [row for row in measured if (row.impl, row.mode) == (impl, mode)]
            style = {
                "color": COLOURS[k % len(COLOURS)],
                "marker": MARKERS[k % len(MARKERS)],
                "linestyle": ("-" if mode == "forward+backward" else "--") if over_t else "none",
                "label": f"{labels[impl]}, {mode}",
            }
            time.plot([place(r) for r in own], [r.median_ms for r in own], **style)
            ratio.plot([place(r) for r in own], [r.ratio for r in own], **style)
            known = [r for r in own if r.peak_mb]
            if known:
                memory.plot([place(r) for r in known], [r.peak_mb for r in known], **style)
    time.set_ylabel("ms per iteration (less is better)")
    ratio.set_ylabel("time / ours")
    ratio.axhline(1, color="black", linewidth=0.8)
    memory.set_ylabel("peak memory, MB")
    for panel in (time, ratio, memory):
        if panel.lines:
            panel.set_yscale("log")
        if over_t:
            panel.set(xscale="log", xlabel="T")
        else:
            panel.set_xticks(range(len(cases)), cases)
            panel.set_xlabel("T, B")
            panel.margins(x=0.2)
    canvas.legend(
        *time.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize="small",
    )
    if rows:
        canvas.suptitle(f"{rows[0].op}; {_setting(rows[0])}", fontsize="small")
    return canvas


def attention(weights: Any, retained: Any, title: str) -> Any:
    """Heat map of attention over time, with the retained keys marked.

    Args:
        weights: ``[T, T]``, query by key, 0 where nothing is attended.
        retained: bool ``[T, T]``, where the key is in the retained set of the query.
        title: above the picture.
    """
    canvas, (panel,) = figure(1, [4.6])
    colours = require("matplotlib.colors").LogNorm(vmin=1e-3, vmax=1, clip=True)
    shown = require("numpy").ma.masked_equal(weights, 0)
    image = panel.imshow(shown, cmap="viridis_r", norm=colours, interpolation="none", aspect="auto")
    queries, keys = retained.nonzero()
    panel.plot(keys, queries, ".", color="#d55e00", markersize=1.5, label="retained")
    panel.set(xlabel="step attended (key)", ylabel="step (query)")
    panel.grid(False)
    panel.legend(frameon=False, fontsize="small", loc="upper right", markerscale=6)
    canvas.colorbar(image, ax=panel, label="attention")
    canvas.suptitle(title, fontsize="small")
    return canvas


def demo(
    runs: Mapping[str, Sequence[Epoch]], rows: Sequence[Row], labels: Mapping[str, str]
) -> Any:
    """Training runs side by side above, the benchmark below."""
    canvas, panels = figure(3, [3.4, _bars_height(rows)])
    loss, accuracy, norm = panels[:3]
    for k, (name, history) in enumerate(runs.items()):
        style = {"color": COLOURS[k], "linestyle": DASHES[k], "label": name}
        epochs = [epoch.epoch for epoch in history]
        seconds = list(itertools.accumulate(epoch.seconds for epoch in history))
        loss.plot(epochs, [epoch.loss for epoch in history], **style)
        accuracy.plot(seconds, [epoch.test_accuracy for epoch in history], **style)
        norm.plot(epochs, [epoch.grad_norm_median for epoch in history], **style)
    loss.set(ylabel="training loss", ylim=(0, None))
    accuracy.set(ylabel="test accuracy", xlabel="seconds of training", ylim=(0, 1))
    norm.set_ylabel("gradient norm, median")
    _log_axis(norm)
    for panel in (loss, norm):
        _epoch_axis(panel)
    accuracy.legend(frameon=False, fontsize="small", loc="lower right")
    _draw_bars(canvas, panels[3:], rows, labels)
    canvas.suptitle(f"digits, pixel by pixel (above); {_setting(rows[0])}", fontsize="small")
    return canvas


def _epoch_axis(panel: Any) -> None:
    panel.set_xlabel("epoch")
    panel.xaxis.get_major_locator().set_params(integer=True)


def _log_axis(panel: Any) -> None:
    """Logarithmic, with plain numbers also where the values stay within one decade."""
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(require("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.tick_params(axis="y", which="minor", labelleft=False)


def _setting(row: Row | VersusRow) -> str:
    threads = f"{row.threads} thread" + ("s" if row.threads > 1 else "")
    return f"{row.machine}, {threads}, torch {row.torch}, throughtime {row.version}"


def _bars_height(rows: Sequence[Row]) -> float:
    return 1.2 + 0.2 * len(rows) + 0.2 * len({_cell(row) for row in rows})


def _draw_bars(
    canvas: Any, panels: Sequence[Any], rows: Sequence[Row], labels: Mapping[str, str]
) -> None:
    cells = list(dict.fromkeys(_cell(row) for row in rows))
    order = {impl: k for k, impl in enumerate(labels)}
    series = sorted({(order[row.impl], row.p, row.impl) for row in rows})
    thickness = 0.8 / max(len(series), 1)
    time, ratio, error = panels
    for k, (_, p, impl) in enumerate(series):
        own = [row for row in rows if (row.impl, row.p) == (impl, p)]
        places = [cells.index(_cell(row)) + (k - (len(series) - 1) / 2) * thickness for row in own]
        style = {
            "height": thickness * 0.9,
            "color": COLOURS[k % len(COLOURS)],
            "hatch": HATCHES[k % len(HATCHES)],
            "edgecolor": "white",
            "label": f"{labels[impl]}, p = {p:g}",
        }
        _labelled_bars(time, places, [row.median_ms for row in own], ms, style)
        _labelled_bars(ratio, places, [row.ratio_to_torch for row in own], "{:.2f}".format, style)
        _labelled_bars(error, places, [row.error for row in own], "{:.1e}".format, style)
    time.set(xscale="log", xlabel="ms per iteration, median (less is better)")
    time.set_ylabel("T, B, I, H")
    ratio.axvline(1, color="black", linewidth=0.8)
    ratio.set_xlabel("speed-up over nn.LSTM (more is better)")
    error.set_xlabel("largest relative error against float64")
    for panel in panels:
        panel.set_yticks(range(len(cells)), cells if panel is time else [""] * len(cells))
        panel.set_ylim(len(cells) - 0.5, -0.5)
        panel.grid(False, axis="y")
        panel.margins(x=0.15)
    canvas.legend(
        *time.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(series),
        frameon=False,
        fontsize="small",
    )


def _labelled_bars(
    panel: Any,
    places: Sequence[float],
    values: Sequence[float | None],
    form: Callable[[float], str],
    style: Mapping[str, Any],
) -> None:
    known = [(y, value) for y, value in zip(places, values, strict=True) if value is not None]
    bars = panel.barh([y for y, _ in known], [value for _, value in known], **style)
    texts = [form(value) for _, value in known]
    panel.bar_label(bars, labels=texts, padding=3, fontsize="x-small")


def _sweep(rows: Sequence[Row]) -> Any:
    """Speed-up of every shape: H across, one marker per B, the darker the longer T."""
    ours = [row for row in rows if row.impl == "throughtime" and row.ratio_to_torch is not None]
    modes = list(dict.fromkeys(f"{row.mode}, p = {row.p:g}" for row in ours))
    canvas, panels = figure(max(len(modes), 1), [4.2])
    batches = sorted({row.B for row in ours})
    steps = sorted({row.T for row in ours})
    for panel, mode in zip(panels, modes, strict=False):
        for k, batch in enumerate(batches):
            points = [r for r in ours if f"{r.mode}, p = {r.p:g}" == mode and batch == r.B]
            # A batch gets its own place beside H, or its points would hide those of the others.
            panel.scatter(
                [row.H * 1.12 ** (k - (len(batches) - 1) / 2) for row in points],
                [row.ratio_to_torch for row in points],
                c=[0.25 + 0.75 * (steps.index(row.T) + 1) / len(steps) for row in points],
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
        panel.set(xscale="log", yscale="log", xlabel="H", title=mode)
        hidden = sorted({row.H for row in ours})
        panel.set_xticks(hidden, [str(h) for h in hidden], minor=False)
        panel.minorticks_off()
        low = min(row.ratio_to_torch or 1.0 for row in ours)
        high = max(row.ratio_to_torch or 1.0 for row in ours)
        ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20) if low / 1.2 < t < high * 1.2]
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_ylim(low / 1.2, high * 1.2)
    panels[0].set_ylabel("speed-up over nn.LSTM (more is better)")
    canvas.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right upper",
        frameon=False,
        fontsize="small",
        title=f"darker:\nlonger T\n({steps[0]} to {steps[-1]})",
    )
    return canvas


def _cell(row: Row) -> str:
    details = [row.mode] if row.mode != "forward+backward" else []
    details += [row.dtype] if row.dtype != "float32" else []
    return "\n".join([f"{row.T}, {row.B}, {row.I}, {row.H}", *details])
