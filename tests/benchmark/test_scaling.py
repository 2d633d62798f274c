"""``bench scaling``: the fit finds powers, and the check sees what is not linear."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from bench import scaling, table
from bench.__main__ import main
from bench.measure.timing import Plan
from bench.operations.operation import OURS
from bench.scaling import RANGES, Fit, Series, fit

RESULTS = Path(__file__).parents[2] / "bench" / "results"
SIZES = (256.0, 512.0, 1024.0, 2048.0)


def powers(exponent: float, *, noise: float = 0.0, seed: int = 0) -> pd.Series:
    draw = random.Random(seed)
    costs = {x: 3.0 * x**exponent * math.exp(draw.gauss(0, noise)) for x in SIZES}
    return pd.Series({1.0: 0.0} | costs)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_fit_finds_the_power(exponent: float) -> None:
    found = fit(powers(exponent))
    assert found is not None
    assert found.exponent == pytest.approx(exponent)
    assert found.half_width == pytest.approx(0.0, abs=1e-6)
    assert (found.low, found.high) == (256, 2048)


def test_interval_holds_the_true_power_as_often_as_it_says() -> None:
    found = [fit(powers(1.0, noise=0.1, seed=seed)) for seed in range(400)]
    hits = sum(abs(one.exponent - 1.0) <= one.half_width for one in found if one is not None)
    assert 0.92 * 400 <= hits <= 0.98 * 400


def test_sizes_where_the_fixed_cost_dominates_do_not_count() -> None:
    costs = pd.Series({size: size + 1000.0 for size in (1.0, 10.0, 100.0, 5e3, 5e4, 5e5)})
    found = fit(costs)
    assert found is not None
    assert found.low == 5e3 and found.exponent == pytest.approx(1.0, abs=0.05)
    everything = fit(costs.where(costs.index > 1, 0.0))
    assert everything is not None and everything.exponent < 0.7  # what would be found otherwise
    assert fit(costs.where(costs.index > 1, 1e5)) is None  # two sizes remain
    assert fit(0 * powers(1.0)) is None  # a cost of nothing has no power


@pytest.mark.parametrize(
    ("exponent", "half_width", "verdict"),
    [
        (1.0, 0.0, "linear"),
        (1.15, 0.0, "linear"),
        (1.3, 0.2, "linear"),
        (1.36, 0.2, "more than linear"),
        (2.0, 0.8, "more than linear"),
        (1.0, 0.3, "unclear"),
        (2.0, 0.9, "unclear"),
    ],
)
def test_verdicts(exponent: float, half_width: float, verdict: str) -> None:
    assert Fit(exponent, half_width, 1.0, 2.0).verdict == verdict


def make(name: str, time: float, memory: float) -> Series:
    rows = pd.DataFrame({"T": (1.0, *SIZES)})
    return Series(name, rows.assign(median_ms=rows["T"] ** time, peak_mb=rows["T"] ** memory))


def test_linear_passes_beside_a_quadratic_control() -> None:
    found = [make("lstm", 1.0, 0.9), make("relevancy", 1.05, 1.0), make("full", 2.0, 2.0)]
    assert [one.failure for one in found] == [None] * 3
    lines = scaling.report(found).splitlines()
    assert "1.05 +- 0.00 (256-2048)" in lines[3] and lines[3].split("|")[-2].strip() == "linear"
    assert lines[4].split("|")[-2].strip() == "more than linear"


@pytest.mark.parametrize(
    ("series", "words"),
    [
        (make("lstm", 2.0, 1.0), "lstm: time more than linear, memory linear in T, wanted linear"),
        (make("lstm", 1.0, 2.0), "lstm: time linear, memory more than linear in T"),
        (make("lstm", 1.0, 0.0), "lstm: time linear, memory unclear in T"),
        (make("full", 1.0, 1.0), "full: linear in T, wanted more than linear"),
    ],
)
def test_check_fails_and_says_why(
    series: Series, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "measure", lambda ops, quick: [make("rel-lstm", 1, 1), series])
    assert main(["scaling"]) == 1
    assert f"FAILED: {words}" in capsys.readouterr().out.splitlines()[-1]


def test_scatter_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def measure_one(name: str, quick: bool) -> pd.DataFrame:
        calls.append(name)
        return make(name, 1.0, 0.0 if len(calls) == 1 else 1.0).rows

    monkeypatch.setattr(scaling, "measure_one", measure_one)
    assert len(scaling.measure(["lstm"], quick=True)) == 2
    assert calls == ["lstm", "lstm", "full"]


@pytest.mark.parametrize("name", RANGES)
def test_stored_series_pass_again(name: str) -> None:
    rows = table.read_csv(RESULTS / "epyc-zen4-2core" / "scaling.csv")
    (lengths, sizes), control = RANGES[name], name == scaling.CONTROL
    own = rows[(rows["op"] == name) & (rows["impl"] == OURS) | control & (rows["impl"] == name)]
    own = own[own["T"].isin(lengths)]
    stored = dict(sizes) | ({"heads": 2} if name == "relevancy" else {})
    for size, value in stored.items():
        own = own[own[size] == value]
    assert len(own) == len(lengths) and Series(name, own).failure is None


def test_relevancy_is_measured_linear_and_full_attention_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "QUICK_PLAN", Plan(3, 0))
    csv, plot = tmp_path / "rows.csv", tmp_path / "plot"
    options: Any = ["--quick", "--csv", str(csv), "--plot", str(plot)]
    main(["scaling", "--ops", "relevancy", *options])  # a busy machine may leave it unclear
    ours, full = capsys.readouterr().out.split("\n|")[3:5]
    assert "relevancy" in ours and "full" in full
    for cost, limit in ((1, 1.4), (2, 1.1)):
        exponents = [float(line.split("|")[cost].split()[0]) for line in (ours, full)]
        assert exponents[0] < limit < exponents[1]
    rows = table.read_csv(csv)
    assert len(rows) == 2 * (1 + scaling.QUICK_SIZES) and set(rows["threads"]) == {1}
    assert rows["median_ms"].notna().all() and rows["peak_mb"].notna().all()
    assert plot.with_suffix(".svg").exists()
