"""``bench report``: what the page holds, and that it needs nothing but itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from bench import __main__ as bench
from bench import page, page_plots, page_table
from bench.page_table import Entry
from bench.rows import SCHEMA, Row, write_csv

VOID = {"meta", "link", "br", "input"}


def make(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "op": "lstm",
        "T": 5,
        "B": 3,
        "I": 2,
        "H": 4,
        "p": 0.0,
        "dtype": "float32",
        "mode": "forward",
        "device": "cpu",
        "impl": "throughtime",
        "backend": "cpu",
        "threads": 2,
        "median_ms": 2.0,
        "q1_ms": 1.5,
        "q3_ms": 2.5,
        "runs": 7,
        "ratio": 1.0,
        "error": 1e-7,
        "machine": "one <machine>",
        "torch": "2.13",
        "version": "0.1.0",
        "date": "2026-01-02T03:04:05+00:00",
        "command": "throughtime bench lstm --T 5",
    }
    return Row(**(values | changes))


def peer(**changes: Any) -> Row:
    return make(**({"impl": "torch", "backend": None, "median_ms": 6.0, "ratio": 3.0} | changes))


FILES = {
    "a.csv": [make(), peer(), make(mode="inference", median_ms=1000.0), peer(T=9, peak_mb=4.5)],
    "b & c.csv": [
        *(make(op="relevancy", I=None, H=None, heads=2, D=8, p=None, T=t) for t in (8, 16, 32)),
        peer(op="relevancy", I=None, H=None, heads=2, D=8, p=None, T=8, impl="sdpa"),
        peer(op="relevancy", T=64, impl="sdpa", median_ms=None, ratio=None, note="it <takes> long"),
        peer(op="relevancy", T=99, impl="sdpa", median_ms=None, ratio=None, note="it <takes> long"),
    ],
}


class Tree(HTMLParser):
    """Checks that elements nest, and collects them as (tag, attributes, text)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), ""))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for place in self.open:
            name, attributes, text = self.elements[place]
            self.elements[place] = (name, attributes, text + data)

    def all(self, tag: str, **wanted: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (attributes, text)
            for name, attributes, text in self.elements
            if name == tag and all(attributes.get(k) == v for k, v in wanted.items())
        ]


@pytest.fixture(scope="module")
def html() -> str:
    return page.page(FILES)


@pytest.fixture(scope="module")
def tree(html: str) -> Tree:
    return Tree(html)


def test_page_refers_to_nothing_outside(html: str, tree: Tree) -> None:
    for _, attributes, _ in tree.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith("#"), value
    assert not re.findall(r"""url\((?!#)|@import|https?:|//\w|fetch\(|import\(""", html)


def test_every_local_reference_has_its_only_target(html: str, tree: Tree) -> None:
    ids = [attributes["id"] for _, attributes, _ in tree.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    wanted = re.findall(r'href="#([^"]+)"', html) + re.findall(r"url\(#([^)]+)\)", html)
    wanted += [a["aria-labelledby"] or "" for _, a, _ in tree.elements if "aria-labelledby" in a]
    assert wanted and set(wanted) <= set(ids)


def test_no_placeholder_is_left(html: str) -> None:
    assert "{{" not in html
    assert page_plots.INK not in html and page_plots.GRID not in html


def test_files_tell_machine_versions_and_command(tree: Tree) -> None:
    first, second = (text for _, text in tree.all("li") if ".csv" in text)
    assert "a.csv, 4 rows" in first and "b & c.csv, 6 rows" in second
    for words in ("one <machine>", "torch 2.13", "throughtime 0.1.0", "2026-01-02T03:04:05+00:00"):
        assert words in first
    assert ({}, "throughtime bench lstm --T 5") in tree.all("code")


def test_heads_are_buttons_that_say_what_the_column_means(tree: Tree) -> None:
    buttons = tree.all("button", type="button")
    assert {text for _, text in buttons} >= {"T", "mode", "impl", "median_ms", "ratio", "peak_mb"}
    for attributes, text in buttons:
        assert SCHEMA.get(text, "number of the file") in (attributes["title"] or "")
    assert all(attributes["aria-sort"] == "none" for attributes, _ in tree.all("th"))
    terms = [text for _, text in tree.all("dt")]
    meanings = [text for _, text in tree.all("dd")]
    assert dict(zip(terms, meanings, strict=True))["error"] == SCHEMA["error"]


def test_table_shows_what_differs_and_says_the_rest_once(tree: Tree) -> None:
    (caption, second) = (text for _, text in tree.all("caption"))
    assert caption.startswith("All rows: B 3, I 2, H 4, p 0, dtype float32, device cpu, threads 2")
    assert "heads 2, D 8" in second and "I" not in second.split()
    rows = [attributes for attributes, _ in tree.all("tr") if "data-op" in attributes]
    assert len(rows) == 8  # without those that have no time
    assert [row.get("class") for row in rows[:3]] == ["ours", None, "ours"]
    assert rows[2]["data-mode"] == "inference"


def test_cells_are_sorted_by_what_was_measured(tree: Tree) -> None:
    cells = tree.all("td")
    assert ({"class": "number", "data-key": "2.0"}, "2 (1.5 to 2.5)") in cells
    assert ({"class": "number", "data-key": "1000.0"}, "1000 (1.5 to 2.5)") in cells
    assert ({"class": "number", "data-key": ""}, "-") in cells  # no peak_mb
    assert ({"data-key": "throughtime (cpu)"}, "throughtime (cpu)") in cells


def test_filters_offer_what_there_is(tree: Tree) -> None:
    assert [attributes["name"] for attributes, _ in tree.all("select")] == ["op", "mode"]
    options = [text for _, text in tree.all("option")]
    assert options == ["all", "lstm", "relevancy", "all", "forward", "inference"]
    assert tree.all("output")[0][1] == "8 rows"


def test_notes_say_who_did_not_run_and_why(tree: Tree) -> None:
    (note,) = (text for _, text in tree.all("li") if "takes" in text)
    assert note.startswith("sdpa: it <takes> long (T 64")
    assert "T 99" in note


def test_a_note_names_a_few_of_many_places() -> None:
    rows = [make(T=t, note="slow") for t in range(1, 8)]
    (note,) = (text for _, text in Tree(page.page({"a": rows})).all("li") if "slow" in text)
    assert "T 4," in note and "T 5," not in note and note.endswith("; and 3 more)")


def test_every_group_has_its_plot(tree: Tree) -> None:
    assert [text for _, text in tree.all("figcaption")] == [
        "lstm, float32, forward, cpu, 2 threads",
        "lstm, float32, inference, cpu, 2 threads",
        "relevancy, float32, forward, cpu, 2 threads",
    ]
    labels = [attributes["aria-label"] for attributes, _ in tree.all("svg", role="img")]
    assert labels == [text for _, text in tree.all("figcaption")]


def test_plots_are_lines_over_t_bars_or_points() -> None:
    lines = [Entry(make(T=t), 1) for t in (2, 4, 8)]
    bars = [Entry(make(T=t, B=t), 1) for t in (2, 4, 8)]
    points = [Entry(row, 1) for t in range(20) for row in (make(T=t, B=t), peer(T=t, B=t))]
    drawn = [page_plots.draw(entries, "x", "x-") for entries in (lines, bars, points)]
    assert ["T 4, B 4" in svg for svg in drawn] == [False, True, False]
    assert ["one point a case" in svg for svg in drawn] == [False, False, True]
    assert [">T</text>" in svg for svg in drawn] == [True, False, False]


def test_many_cases_without_peers_are_bars() -> None:
    entries = [Entry(make(T=t, B=t, ratio=None), 1) for t in range(1, 21)]
    svg = page_plots.draw(entries, "x", "x-")
    assert "T 20, B 20" in svg and "one point a case" not in svg


def test_two_files_of_one_operation_are_told_apart() -> None:
    entries = [Entry(make(), 1), Entry(make(median_ms=3.0), 2)]
    svg = page_plots.draw(entries, "x", "x-")
    assert "throughtime (cpu), file 1" in svg and "throughtime (cpu), file 2" in svg
    shown, _ = page_table.columns(entries)
    assert [column.name for column in shown] == ["impl", "median_ms", "ratio", "file"]


def test_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "a.csv", FILES["a.csv"])
    out = tmp_path / "new" / "page.html"
    assert bench.main(["report", str(tmp_path / "a.csv"), "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert str(out) in capsys.readouterr().out


def test_nothing_to_report_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(tmp_path / "a.csv", [])
    assert bench.main(["report", str(tmp_path / "a.csv"), "--out", str(tmp_path / "x")]) == 2
    assert "a.csv: no measurement to report: measure some with --csv" in capsys.readouterr().err
