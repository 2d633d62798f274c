"""``bench scaling``: the fit finds powers, and the check sees what is not linear."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import pytest
from bench import __main__ as bench
from bench import measure, scaling, scaling_series
from bench.cell import Contestant
from bench.rows import read_csv
from bench.scaling_fit import Fit, fit
from bench.scaling_series import CONTROL, RANGES, Series

SIZES = (256.0, 512.0, 1024.0, 2048.0)
OURS = Contestant("throughtime", "cpu")


def powers(exponent: float, *, noise: float = 0.0, seed: int = 0) -> dict[float, float]:
    draw = random.Random(seed)
    return {size: 3.0 * size**exponent * math.exp(draw.gauss(0, noise)) for size in SIZES}


def fitted(exponent: float) -> Fit:
    found = fit(powers(exponent))
    assert found is not None
    return found


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_fit_finds_the_power(exponent: float) -> None:
    found = fitted(exponent)
    assert found.exponent == pytest.approx(exponent)
    assert found.factor == pytest.approx(3.0)
    assert found.half_width == pytest.approx(0.0, abs=1e-6)
    assert (found.low, found.high, found.points) == (256, 2048, 4)
    assert found.at(100.0) == pytest.approx(3.0 * 100**exponent)


def test_interval_holds_the_true_power_as_often_as_it_says() -> None:
    found = [fit(powers(1.0, noise=0.1, seed=seed)) for seed in range(400)]
    hits = sum(abs(one.exponent - 1.0) <= one.half_width for one in found if one is not None)
    assert 0.92 * 400 <= hits <= 0.98 * 400


def test_sizes_where_the_fixed_cost_dominates_do_not_count() -> None:
    costs = {size: size + 1000.0 for size in (10.0, 100.0, 5e3, 5e4, 5e5)}
    found = fit(costs, fixed=1000.0)
    assert found is not None
    assert (found.low, found.points) == (5e3, 3)
    assert found.exponent == pytest.approx(1.0, abs=0.05)
    assert fit(costs, fixed=1e5) is None  # two sizes remain
    everything = fit(costs)
    assert everything is not None and everything.exponent < 0.7  # what would be found otherwise


def test_a_cost_of_nothing_has_no_power() -> None:
    assert fit(dict.fromkeys(SIZES, 0.0)) is None


@pytest.mark.parametrize(
    ("exponent", "half_width", "verdict"),
    [
        (1.0, 0.0, "linear"),
        (1.15, 0.0, "linear"),
        (1.3, 0.2, "linear"),
        (1.36, 0.2, "more than linear"),
        (2.0, 0.1, "more than linear"),
        (2.0, 0.8, "more than linear"),
        (1.0, 0.3, "unclear"),
        (2.0, 0.9, "unclear"),
    ],
)
def test_verdicts(exponent: float, half_width: float, verdict: str) -> None:
    assert Fit(exponent, half_width, 1.0, 1.0, 2.0, 4).verdict == verdict


def make(op: str, time: float, memory: float, contestant: Contestant = OURS) -> Series:
    return Series(op, "T", contestant, [], fitted(time), fitted(memory))


LINEAR = [make("lstm", 1.0, 0.9), make("relevancy", 1.05, 1.0)]
QUADRATIC = make("relevancy", 2.0, 2.0, CONTROL)


def test_linear_passes_beside_a_quadratic_control() -> None:
    found = [*LINEAR, QUADRATIC]
    assert scaling.passed(found)
    assert scaling.conclusions(found)[1:] == [
        "Control: full attention is more than linear, as it must be."
    ]
    lines = scaling.table(found).splitlines()
    assert "1.05 +- 0.00 (256-2048)" in lines[3] and lines[3].split("|")[-2].strip() == "linear"
    assert lines[4].split("|")[-2].strip() == "more than linear"


@pytest.mark.parametrize(
    ("series", "words"),
    [
        (make("lstm", 2.0, 1.0), "NOT LINEAR: time of lstm grows faster than T."),
        (make("lstm", 1.0, 2.0), "NOT LINEAR: memory of lstm grows faster than T."),
        (dataclasses.replace(LINEAR[0], memory=None), "UNCLEAR: memory of lstm"),
        (make("relevancy", 1.0, 2.0, CONTROL), "but here time linear, memory more than linear"),
    ],
)
def test_check_fails_and_says_why(series: Series, words: str) -> None:
    found = [make("rel-lstm", 1.0, 1.0), series]
    assert not scaling.passed(found)
    assert words in scaling.conclusions(found)[-1]


def test_other_sizes_are_reported_and_not_judged() -> None:
    over_h = dataclasses.replace(make("relevancy", 2.0, 2.0), axis="H")
    assert scaling.passed([over_h])
    assert scaling.table([over_h]).splitlines()[2].split("|")[3].strip() == "D"


def test_scatter_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def series(op: str, axis: str, contestant: Contestant, *rest: object) -> Series:
        calls.append((op, axis))
        vague = Fit(1.0, 0.5, 1.0, 1.0, 2.0, 4)
        first = len(calls) == 1
        return dataclasses.replace(LINEAR[0], axis=axis, time=vague if first else fitted(1.0))

    monkeypatch.setattr(scaling, "series", series)
    found = scaling.measure_all(["lstm"], ["T", "B"], quick=True)
    assert calls == [("lstm", "T"), ("lstm", "T"), ("lstm", "B"), ("relevancy", "T")]
    assert len(found) == 3


def test_ranges_begin_beyond_the_fixed_cost() -> None:
    for ranges in RANGES.values():
        assert list(ranges) == list(scaling_series.AXES)
        for one in ranges.values():
            assert one.smallest < min(one.values) and len(one.values) == scaling.SIZES
            assert sorted(one.values) == list(one.values)


def test_unknown_operation_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["scaling", "gru"]) == 2
    assert "OP wants lstm, rel-lstm, relevancy, got 'gru'" in capsys.readouterr().err


def test_relevancy_is_measured_linear_and_full_attention_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "QUICK_PLAN", measure.Plan(rounds=3, exactly=True))
    csv, plot = tmp_path / "rows.csv", tmp_path / "plot"
    options = ["--axis", "T", "--quick", "--csv", str(csv), "--plot", str(plot)]
    bench.main(["scaling", "relevancy", *options])  # a busy machine may leave it unclear
    ours, full = capsys.readouterr().out.split("\n|")[3:5]
    assert "throughtime" in ours and "full" in full
    assert float(ours.split("|")[3].split()[0]) < 1.4 < float(full.split("|")[3].split()[0])
    assert float(ours.split("|")[4].split()[0]) < 1.1 < float(full.split("|")[4].split()[0])
    rows = read_csv(csv)
    assert len(rows) == 2 * (1 + scaling.QUICK_SIZES)
    assert {row.threads for row in rows} == {1}
    assert all(row.median_ms and row.peak_mb is not None for row in rows)
    assert plot.with_suffix(".svg").exists()
