"""The one table, and what is made of it: Markdown and pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from bench import plot, plots, table
from bench.__main__ import main
from bench.arguments import UsageError

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def ours(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "op": "lstm", "T": 5, "B": 3, "I": 4, "H": 4, "dtype": "float32", "p": 0.0,
        "mode": "forward+backward", "device": "cpu", "impl": "throughtime", "backend": "cpu",
        "threads": 1, "median_ms": 2.0, "q1_ms": 1.5, "q3_ms": 2.5, "runs": 7, "ratio": 1.0,
        "ratio_q1": 1.0, "ratio_q3": 1.0, "gflops": 50.0, "share_of_matmul": 0.5, "gbs": 4.0,
        "share_of_bandwidth": 0.25, "error": 1e-7, "machine": "a <machine>, 2 cores",
        "torch": "2.13", "version": "0.1.0", "command": "bench lstm --T 5",
    }  # fmt: skip
    return row | changes


def peer(**changes: Any) -> dict[str, Any]:
    return ours(**({"impl": "torch", "backend": None, "median_ms": 6.0, "ratio": 3.0} | changes))


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def test_every_column_has_a_meaning() -> None:
    text = (RESULTS.parent / "README.md").read_text("utf-8")
    found = re.findall(r"^\| `(\w+)` \| .* \|$", text, re.MULTILINE)
    assert found[-len(table.COLUMNS) :] == list(table.COLUMNS)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    sdpa = peer(impl="sdpa", heads=4, D=8, p=None, note='cannot run: no, it "can\'t"', ratio=None)
    written = table.frame([ours(), sdpa])
    path = tmp_path / "new" / "rows.csv"
    table.write_csv(path, written)
    _, line, _ = path.read_text().splitlines()
    assert line.startswith("lstm,5,3,4,4,,,,,,float32,0,forward+backward,cpu,throughtime,cpu,1,2,")
    pd.testing.assert_frame_equal(table.read_csv(path), written)


@pytest.mark.parametrize("name", ["lstm", "lstm-sweep", "rel-lstm", "relevancy", "scaling"])
def test_stored_tables_are_read_and_written_to_the_byte(name: str, tmp_path: Path) -> None:
    stored = RESULTS / "epyc-zen4-2core" / f"{name}.csv"
    found = table.read_csv(stored)
    table.write_csv(tmp_path / "again.csv", found)
    assert (tmp_path / "again.csv").read_bytes() == stored.read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("share_of_matmul", "share_of_sgemm"), "lacks or adds share_of_matmul, share_of_sgemm"),
        (("device,impl", "impl,device"), "nothing, but in another order"),
        (("lstm,5,", "lstm,five,"), "'five'"),
        ((",1e-07,", ",half,"), "'half'"),
        (("lstm,5,", "lstm,,"), "T is empty"),
        (("lstm,5,", "lstm,5"), "'forward+backward'"),
        (("lstm,5,", "lstm,5,,,"), "op, T is empty"),
    ],
)
def test_another_table_is_refused(change: tuple[str, str], words: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    table.write_csv(path, table.frame([ours()]))
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(UsageError) as caught:
        table.read_csv(path)
    assert words in str(caught.value) and f"{path}: " in str(caught.value)
    assert "measure again" in str(caught.value)
    with pytest.raises(UsageError, match=r"cannot read .*none.csv: No such file"):
        table.read_csv(tmp_path / "none.csv")


def test_the_printed_table_leaves_out_what_is_the_same_everywhere() -> None:
    found = table.frame([ours(reference_ratio=4.0), peer(note="a remark", gflops=None)])
    setting, _, *lines = table.report(found).splitlines()
    texts = [[text.strip() for text in line.strip("|").split("|")] for line in lines]
    assert setting == "op lstm, mode forward+backward, p 0.0, dtype float32, device cpu"
    assert texts[0] == [
        *("T, B, I, H", "implementation", "ms (quartiles; runs)", "/ ours (quartiles)"),
        *("reference_ratio", "gflops", "share_of_matmul", "gbs", "share_of_bandwidth"),
        *("error", "note"),
    ]
    assert texts[2] == [
        *("5, 3, 4, 4", "throughtime (cpu)", "2 (1.5-2.5; 7)", "1 (1-1)"),
        *("4", "50", "50%", "4", "25%", "1.0e-07", ""),
    ]
    assert texts[3][1:6] == ["torch", "6 (1.5-2.5; 7)", "3 (1-1)", "-", "-"]
    several = table.report(table.frame([ours(), ours(p=0.5, mode="forward")])).splitlines()
    assert [text.strip() for text in several[-1].split("|")][2:4] == ["forward", "0.5"]


# Pictures


def points(panel: Any) -> list[tuple[list[float], list[float]]]:
    found = [tuple(map(list, line.get_data())) for line in panel.lines]
    return [(x, y) for x, y in found if len(x) > 2]


@pytest.mark.parametrize("across", ["T", "B", "H", "window_size"])
def test_lines_over_the_size_that_varies(across: str) -> None:
    sizes: dict[str, Any] = {"op": "rel-lstm", "window_size": 2, "top_k": 2, "I": 9}
    rows = [row(**sizes | {across: size}) for size in (16, 64, 32) for row in (ours, peer)]
    time, ratio = plot.speed(table.frame(rows)).axes
    assert points(time) == [([16, 32, 64], [2.0] * 3), ([16, 32, 64], [6.0] * 3)]
    assert points(ratio) == [([16, 32, 64], [3.0] * 3)]  # ours is the line at 1
    for panel in (time, ratio):
        assert panel.get_xscale() == panel.get_yscale() == "log" and panel.get_xlabel() == across
    (guide,) = [line for line in time.lines if line.get_label() == "linear"]
    (x, end_x), (y, end_y) = guide.get_data()
    assert end_x / x == pytest.approx(end_y / y) and y < 2


def test_contestants_and_p_differ_without_colours_and_modes_have_panels() -> None:
    kinds = [(0.0, "forward+backward"), (0.5, "forward+backward"), (0.0, "forward")]
    rows = [
        row(T=size, p=p, mode=mode)
        for size in (16, 32, 64)
        for row in (ours, peer)
        for p, mode in kinds
    ]
    canvas = plot.speed(table.frame(rows))
    time, _, other, _ = canvas.axes
    looks = {(line.get_marker(), line.get_fillstyle()) for line in time.lines[:4]}
    assert len(looks) == 4 and len(points(other)) == 2
    assert [panel.get_title("left").split(",")[0] for panel in (time, other)] == [
        "forward+backward", "forward",
    ]  # fmt: skip


def test_a_peer_without_h_detach_is_drawn_once_but_has_every_ratio() -> None:
    rows = [
        peer(T=size, p=p, note=table.NO_DETACH if p else "", ratio=3.0 + p)
        for size in (5, 9, 12)
        for p in (0.0, 0.5)
    ]
    time, ratio = plot.speed(table.frame(rows)).axes
    assert [len(points(panel)) for panel in (time, ratio)] == [1, 2]


def test_bars_where_several_sizes_vary() -> None:
    rows = [row for k in (5, 9) for row in (ours(T=k, B=k), peer(T=k, B=k, ratio=0.5))]
    time, ratio = plot.speed(table.frame(rows)).axes
    assert [bar.get_width() for bar in time.patches] == [2.0, 2.0, 6.0, 6.0]
    assert [(bar.get_x(), bar.get_width()) for bar in ratio.patches] == [
        (1, 0),
        (1, 0),
        (1, -0.5),
        (1, -0.5),
    ]
    assert len({bar.get_hatch() for bar in time.patches}) == 2
    assert [label.get_text() for label in time.get_yticklabels()] == ["5, 5, 4, 4", "9, 9, 4, 4"]


def test_roofline_by_hand() -> None:
    """100 GFLOP/s and 16 GB/s meet at 6.25 operations per byte."""
    fast = ours(B=9, gflops=120.0, share_of_matmul=1.2)
    rows = [ours(), peer(gflops=10.0, share_of_matmul=0.1), ours(gflops=None), fast]
    panel, _ = plot.roofline(table.frame(rows)).axes  # and the scale of the width
    (roof,) = panel.lines
    ours_, theirs = (drawn.get_offsets().tolist() for drawn in panel.collections)
    assert ours_ == [[12.5, 50], [30, 120]] and theirs == [[2.5, 10]]
    assert list(roof.get_xdata()) == pytest.approx([1.25, 6.25, 60])
    assert list(roof.get_ydata()) == pytest.approx([20, 100, 100])
    words = panel.get_title("left")
    assert "matrix product, 100 GFLOP/s" in words and "copy, 16 GB/s" in words
    assert "1 points above the flat roof" in words and "above the slope" not in words


def test_no_labels_lie_over_each_other() -> None:
    """Every text of the stored LSTM pictures keeps to its own place."""
    found = table.read_csv(RESULTS / "epyc-zen4-2core" / "lstm.csv")
    for canvas in (plot.speed(found), plot.roofline(found)):
        canvas.canvas.draw()
        for panel in canvas.axes:
            boxes = [text.get_window_extent() for text in panel.texts]
            boxes += [x.get_window_extent() for x in panel.get_xticklabels() if x.get_text()]
            for k, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[:k])


def test_plot_draws_stored_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = peer(note="cannot run", median_ms=None)
    table.write_csv(tmp_path / "a.csv", table.frame([ours(), failed]))
    rel_lstm = ours(op="rel-lstm", window_size=2, top_k=3)
    table.write_csv(tmp_path / "b.csv", table.frame([rel_lstm]))
    files = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    assert main(["plot", *files, "--out", str(tmp_path / "new" / "x.svg")]) == 0
    names = {
        f"x-{op}{kind}.{suffix}"
        for op in ("lstm", "rel-lstm")
        for kind in ("", "-roofline")
        for suffix in ("svg", "png")
    }
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    printed = capsys.readouterr().out
    assert printed.count("| throughtime (cpu)") == 2 and "| cannot run" in printed
    for name in names:
        assert f"plot: {tmp_path / 'new' / name}\n" in printed
        head = (tmp_path / "new" / name).read_bytes()[:5]
        assert head == (b"<?xml" if name.endswith("svg") else b"\x89PNG\r")
    (first, *_) = plot.draw(table.frame([ours()]), tmp_path / "v1.2")
    assert first.name == "v1.2.png"
    with pytest.raises(UsageError, match="none of the 1 rows has a time"):
        plot.draw(table.frame([ours(median_ms=None)]), tmp_path / "x")


@pytest.mark.parametrize(("low", "high", "labelled"), [(1.0, 1.1, 2), (1.0, 900.0, 3)])
def test_a_logarithmic_axis_has_plain_numbers(low: float, high: float, labelled: int) -> None:
    canvas, (panel,) = plots.figure(1)
    panel.plot([1, 2], [low, high])
    plots.plain_log(panel)
    canvas.canvas.draw()
    bottom, top = panel.get_ylim()
    shown = [text.get_text() for text in panel.get_yticklabels()]
    inside = [text for text in shown if text and bottom <= float(text) <= top]
    assert top / bottom >= plots.LEAST_RANGE and len(inside) >= labelled
