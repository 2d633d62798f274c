"""``bench report``: its plots, as SVG that takes the page's colours in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from bench import plots
from bench.errors import require
from bench.page_table import SIZES, Entry, text

MOST_BARS = 14  # cases that still fit below each other
LEAST_POINTS = 3  # of a line
# matplotlib knows no variables of CSS: these stand for them until the SVG is written.
INK, GRID = "#010203", "#040506"
PANELS = (
    ("median_ms", "ms per iteration (less is better)"),
    ("ratio", "time / ours"),
    ("peak_mb", "peak memory, MB"),
)


@dataclass(frozen=True)
class Series:
    """What is drawn in one colour: entries of one contestant."""

    label: str
    entries: Sequence[Entry]


def draw(entries: Sequence[Entry], label: str, prefix: str) -> str:
    """Time, ratio and memory of entries with a time: over T where T alone varies, else per case.

    More cases than fit below each other become points, if there are peers: ratio over time.

    Args:
        entries: of one operation, dtype, mode, device and number of threads, one or more.
        label: names the picture for those who do not see it.
        prefix: begins every id of the picture, because ids are the page's and not the picture's.

    Returns:
        An ``<svg>`` element that refers to nothing outside of itself.

    Raises:
        UsageError: if matplotlib is not installed.
    """
    series = _series(entries)
    name_case = _case_names(entries)
    cases = list(dict.fromkeys(name_case(entry) for entry in entries))
    panels = [p for p in PANELS if any(getattr(e.row, p[0]) is not None for e in entries)]
    with _style():
        if _over_t(entries):
            canvas = _lines(series, panels)
        elif len(cases) <= MOST_BARS or not any(_is_compared(entry) for entry in entries):
            canvas = _bars(series, panels, cases, name_case)
        else:
            canvas = _points(series)
        return inline(_svg(canvas), label, prefix)


def _series(entries: Sequence[Entry]) -> list[Series]:
    """One per contestant; p and file are named only where they tell two apart."""
    names = [name for name in ("p",) if len({_own(e, name) for e in entries}) > 1]
    several = len({e.file for e in entries}) > 1
    grouped: dict[str, list[Entry]] = {}
    for entry in entries:
        parts = [entry.row.contestant]
        parts += [f"{n} = {text(n, _own(entry, n))}" for n in names if _own(entry, n) is not None]
        parts += [f"file {entry.file}"] if several else []
        grouped.setdefault(", ".join(parts), []).append(entry)
    return [Series(label, own) for label, own in grouped.items()]


def _own(entry: Entry, name: str) -> Any:
    return getattr(entry.row, name)


def _case_names(entries: Sequence[Entry]) -> Callable[[Entry], str]:
    """Names a case by the sizes that differ, or by T; p has a series of its own."""
    names = [n for n in SIZES if n != "p" and len({_own(e, n) for e in entries}) > 1] or ["T"]
    return lambda entry: ", ".join(f"{name} {_own(entry, name)}" for name in names)


def _over_t(entries: Sequence[Entry]) -> bool:
    others = {tuple(_own(e, name) for name in SIZES if name not in ("T", "p")) for e in entries}
    return len(others) == 1 and len({entry.row.T for entry in entries}) >= LEAST_POINTS


def _is_compared(entry: Entry) -> bool:
    return bool(entry.row.ratio) and not entry.row.ours


def _look(k: int) -> dict[str, Any]:
    return {"color": plots.COLOURS[k % len(plots.COLOURS)]}


def _lines(series: Sequence[Series], panels: Sequence[tuple[str, str]]) -> Any:
    canvas, axes = _figure(len(panels), 3.6)
    for axis, (name, title) in zip(axes, panels, strict=True):
        for k, one in enumerate(series):
            own = sorted((e for e in one.entries if _own(e, name)), key=lambda e: e.row.T)
            axis.plot(
                [e.row.T for e in own],
                [_own(e, name) for e in own],
                marker=plots.MARKERS[k % len(plots.MARKERS)],
                linestyle=plots.DASHES[k % len(plots.DASHES)],
                label=one.label,
                **_look(k),
            )
        axis.set(xlabel="T", ylabel=title)
        plots.plain_log(axis, "x")
        plots.plain_log(axis, "y")
    _finish(canvas, axes, panels, horizontal=True)
    return canvas


def _bars(
    series: Sequence[Series],
    panels: Sequence[tuple[str, str]],
    cases: Sequence[str],
    name_case: Callable[[Entry], str],
) -> Any:
    height = 1.2 + 0.22 * sum(len(one.entries) for one in series) + 0.15 * len(cases)
    canvas, axes = _figure(len(panels), height)
    thick = 0.8 / len(series)
    for axis, (name, title) in zip(axes, panels, strict=True):
        for k, one in enumerate(series):
            own = [e for e in one.entries if _own(e, name) is not None]
            shift = (k - (len(series) - 1) / 2) * thick
            bars = axis.barh(
                [cases.index(name_case(e)) + shift for e in own],
                [_own(e, name) for e in own],
                height=0.9 * thick,
                hatch=plots.HATCHES[k % len(plots.HATCHES)],
                edgecolor=GRID,
                label=one.label,
                **_look(k),
            )
            shown = [text(name, _own(e, name)) for e in own]
            axis.bar_label(bars, labels=shown, padding=3, fontsize="x-small", color=INK)
        axis.set_yticks(range(len(cases)), cases if axis is axes[0] else [""] * len(cases))
        axis.set_ylim(len(cases) - 0.5, -0.5)
        axis.set_xlabel(title)
        axis.margins(x=0.2)
        axis.grid(False, axis="y")
        if name == "median_ms":
            plots.plain_log(axis, "x")
    _finish(canvas, axes, panels, horizontal=False)
    return canvas


def _points(series: Sequence[Series]) -> Any:
    canvas, axes = _figure(1, 4.4, width=9.2)
    for k, one in enumerate(series):
        own = [e for e in one.entries if _is_compared(e)]
        if own:
            axes[0].plot(
                [e.row.median_ms for e in own],
                [e.row.ratio for e in own],
                linestyle="none",
                marker=plots.MARKERS[k % len(plots.MARKERS)],
                alpha=0.75,
                label=one.label,
                **_look(k),
            )
    axes[0].set(xlabel="ms per iteration of the peer, one point a case", ylabel="time / ours")
    plots.plain_log(axes[0], "x")
    plots.plain_log(axes[0], "y")
    _finish(canvas, axes, (("ratio", ""),), horizontal=True)
    return canvas


def _figure(panels: int, height: float, *, width: float = 4.6) -> tuple[Any, list[Any]]:
    canvas, axes = plots.figure(panels, [height], width=width)
    for axis in axes:
        axis.grid(True, color=GRID)
    return canvas, axes


def _finish(
    canvas: Any, axes: Sequence[Any], panels: Sequence[tuple[str, str]], *, horizontal: bool
) -> None:
    """A line where the ratio is 1, and the legend below."""
    for axis, (name, _) in zip(axes, panels, strict=True):
        if name == "ratio":
            (axis.axhline if horizontal else axis.axvline)(1, color=INK, linewidth=0.8)
    columns = max(1, int(canvas.get_figwidth() // 3))  # inches of a label
    plots.legend_below(canvas, axes[0], columns=columns)


@contextmanager
def _style() -> Iterator[None]:
    """Text as text and everything in the page's colours; the settings of others come back."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "throughtime", "hatch.linewidth": 0.6}
    settings |= dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    with require("matplotlib").rc_context(settings):
        yield


def _svg(canvas: Any) -> str:
    written = io.StringIO()
    canvas.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    require("matplotlib.pyplot").close(canvas)
    return written.getvalue()


def inline(svg: str, label: str, prefix: str) -> str:
    """A file of matplotlib as an element of a page: no prologue, own ids, colours of the page.

    Example:
        >>> inline('<?xml?><svg><g id="a" fill="#010203"/><use href="#a"/></svg>', "b", "p-")
        '<svg role="img" aria-label="b"><g id="p-a" fill="currentColor"/><use href="#p-a"/></svg>'
    """
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows them
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = svg.replace("url(#", f"url(#{prefix}")
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
