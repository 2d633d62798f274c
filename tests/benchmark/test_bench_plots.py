"""Pictures of benchmarks, and the command that draws them from stored tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench import plot, report, speed_plots
from bench.engine import NO_DETACH
from bench.errors import UsageError, require
from bench.rows import Row, write_csv

from throughtime.__main__ import main


def make_row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "op": "lstm",
        "T": 5,
        "B": 3,
        "I": 4,
        "H": 4,
        "dtype": "float32",
        "p": 0.0,
        "mode": "forward+backward",
        "device": "cpu",
        "impl": "throughtime",
        "backend": "cpu",
        "threads": 1,
        "median_ms": 2.0,
        "q1_ms": 1.5,
        "q3_ms": 2.5,
        "runs": 7,
        "ratio": 1.0,
        "ratio_q1": 1.0,
        "ratio_q3": 1.0,
        "gflops": 50.0,
        "share_of_matmul": 0.5,
        "gbs": 4.0,
        "share_of_bandwidth": 0.25,
        "error": 1e-7,
        "machine": "a machine, 2 cores",
        "torch": "2.13",
        "version": "0.1.0",
    }
    return Row(**(values | changes))


def peer(**changes: Any) -> Row:
    return make_row(
        **({"impl": "torch", "backend": None, "median_ms": 6.0, "ratio": 3.0} | changes)
    )


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    require("matplotlib.pyplot").close("all")


def points(panel: Any) -> list[tuple[list[float], list[float]]]:
    return [tuple(map(list, line.get_data())) for line in panel.lines if len(line.get_xdata()) > 1]


@pytest.mark.parametrize("across", ["T", "B", "H", "window_size"])
def test_lines_over_the_size_that_varies(across: str) -> None:
    sizes: dict[str, Any] = {"op": "rel-lstm", "window_size": 2, "top_k": 2, "I": 9}
    rows = [
        row
        for size in (16, 64, 32)
        for row in (make_row(**sizes | {across: size}), peer(**sizes | {across: size}))
    ]
    canvas = speed_plots.speed(rows)
    time, ratio, error = canvas.axes
    assert points(time) == [([16, 32, 64], [2.0] * 3), ([16, 32, 64], [6.0] * 3)]
    # The line at 1, and of the peers: ours would be that line again.
    assert points(ratio) == [([16, 32, 64], [3.0] * 3), ([0, 1], [1, 1])]
    assert points(error) == [([16, 32, 64], [1e-7] * 3)] * 2
    for panel in canvas.axes:
        assert panel.get_xscale() == panel.get_yscale() == "log"
        assert panel.get_xlabel() == across
    assert f"{across} = " not in time.get_ylabel() and "top_k = 2" in time.get_ylabel()


def test_looks_tell_contestants_modes_and_p_apart_without_colours() -> None:
    rows = [
        make_row(T=size, p=p, mode=mode, **who)
        for size in (16, 32)
        for who in ({}, {"impl": "loop", "backend": None})
        for p, mode in ((0.0, "forward+backward"), (0.5, "forward+backward"), (0.0, "forward"))
    ]
    time = speed_plots.speed(rows).axes[0]
    looks = {(li.get_marker(), li.get_linestyle(), li.get_fillstyle()) for li in time.lines}
    assert len(looks) == len(time.lines) == 6
    by_mode = {line.get_linestyle() for line in time.lines if line.get_fillstyle() == "full"}
    assert by_mode == {"-", "--"}
    texts = [text.get_text() for text in time.figure.legends[0].get_texts()]
    assert texts == [
        *("throughtime (cpu)", "Python loop", "p = 0", "p = 0.5", "forward+backward", "forward")
    ]


def test_a_grid_has_a_row_of_panels_for_every_view() -> None:
    rows = [make_row(T=t, B=b) for t in (5, 10) for b in (3, 6)]
    across = [panel.get_xlabel() for panel in speed_plots.speed(rows).axes]
    assert across == ["T"] * 6 + ["B"] * 6


def test_a_peer_without_h_detach_is_drawn_once_but_has_every_ratio() -> None:
    rows = [peer(T=size, p=p, note=NO_DETACH if p else "") for size in (5, 9) for p in (0.0, 0.5)]
    time, ratio, error = speed_plots.speed(rows).axes
    assert [len(points(panel)) for panel in (time, ratio, error)] == [1, 3, 1]


def test_bars_where_nothing_varies_alone() -> None:
    rows = [row for k in (5, 9) for row in (make_row(T=k, B=k), peer(T=k, B=k, ratio=0.5))]
    time, ratio, error = speed_plots.speed(rows).axes
    assert [bar.get_width() for bar in time.patches] == [2.0, 2.0, 6.0, 6.0]
    assert [(bar.get_x(), bar.get_width()) for bar in ratio.patches] == [(1, -0.5)] * 2
    assert [bar.get_width() for bar in error.patches] == [1e-7] * 4
    assert len({bar.get_hatch() for bar in time.patches}) == 2
    assert [label.get_text() for label in time.get_yticklabels()] == ["5, 5, 4, 4", "9, 9, 4, 4"]


def test_a_sweep_shows_every_shape() -> None:
    shapes = [(t, b, h) for t in (10, 100) for b in (1, 8) for h in (8, 64, 512, 999)]
    rows = [r(T=t, B=b, H=h, I=h) for t, b, h in shapes for r in (make_row, peer)]
    (panel,) = speed_plots.speed(rows).axes
    assert sum(len(drawn.get_offsets()) for drawn in panel.collections) == len(shapes)
    assert panel.get_ylabel().startswith("nn.LSTM: time / ours")


def test_roofline_by_hand() -> None:
    """100 GFLOP/s and 16 GB/s meet at 6.25 operations per byte."""
    rows = [make_row(), peer(gflops=10.0, share_of_matmul=0.1), make_row(gflops=None)]
    (panel,) = speed_plots.roofline(rows).axes
    ours, theirs, roof = panel.lines
    assert (ours.get_xdata(), ours.get_ydata()) == ([12.5], [50.0])
    assert (theirs.get_xdata(), theirs.get_ydata()) == ([2.5], [10.0])
    assert list(roof.get_xdata()) == pytest.approx([1.25, 6.25, 25])
    assert list(roof.get_ydata()) == pytest.approx([20, 100, 100])
    texts = [text.get_text() for text in panel.texts]
    assert any("100 GFLOP/s" in text for text in texts) and "16 GB/s (copy)" in texts
    assert "5, 3, 4, 4" in texts


def test_plot_draws_stored_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "a.csv", [make_row(), peer(note="cannot run", median_ms=None)])
    write_csv(tmp_path / "b.csv", [make_row(op="rel-lstm", window_size=2, top_k=3)])
    files = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    assert main(["bench", "plot", *files, "--out", str(tmp_path / "new" / "x.svg")]) == 0
    names = [
        f"x-{op}{kind}.{suffix}"
        for op in ("lstm", "rel-lstm")
        for kind in ("", "-roofline")
        for suffix in ("svg", "png")
    ]
    written = {path.name for path in (tmp_path / "new").iterdir()}
    assert written == set(names)
    told = capsys.readouterr().out
    for name in names:
        assert f"plot: {tmp_path / 'new' / name}\n" in told
        head = (tmp_path / "new" / name).read_bytes()[:5]
        assert head == (b"<?xml" if name.endswith("svg") else b"\x89PNG\r")


def test_one_operation_is_drawn_under_the_given_name(tmp_path: Path) -> None:
    files = plot.draw([make_row()], tmp_path / "v1.2")
    assert [path.name for path in files[:2]] == ["v1.2.svg", "v1.2.png"]
    with pytest.raises(UsageError, match="none of the 1 rows has a time"):
        plot.draw([make_row(median_ms=None)], tmp_path / "x")


# Tables


def test_the_table_leaves_out_what_is_the_same_everywhere() -> None:
    rows = [make_row(reference_ratio=4.0), peer(note="a remark", gflops=None)]
    lines = report.table(rows, "T, B, I, H").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        *("T, B, I, H", "implementation", "ms (quartiles; runs)", "/ ours (quartiles)"),
        *("reference /", "GFLOP/s", "of matmul", "GB/s", "of bandwidth", "error", "note"),
    ]
    assert cells[2] == [
        *("5, 3, 4, 4", "throughtime (cpu)", "2 (1.5-2.5; 7)", "1 (1-1)"),
        *("4", "50", "50%", "4", "25%", "1.0e-07", ""),
    ]
    assert cells[3][1:6] == ["torch", "6 (1.5-2.5; 7)", "3 (1-1)", "-", "-"]
    several = report.table([make_row(), make_row(p=0.5, mode="forward")], "T, B, I, H")
    assert [cell.strip() for cell in several.splitlines()[3].split("|")][2:4] == ["forward", "0.5"]
