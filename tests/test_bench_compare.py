"""``bench compare``: green for equal code, red for slower code, and honest where noise hides it."""

from __future__ import annotations

import math
import random

import pytest
from throughtime.bench import compare_stats as stats

CASES = [f"case {k}" for k in range(6)]


def simulate(
    seed: int, *, slowdown: float = 1.0, process: float
) -> tuple[float, dict[str, stats.Verdict]]:
    """Judged ratios of a shared machine: long tails, and every process with its own speed.

    ``slowdown`` is that of the first case.
    """
    draw = random.Random(seed)

    def sample(speed: float) -> float:
        busy = draw.expovariate(1 / 0.5) if draw.random() < 0.15 else 0.0
        return speed * math.exp(draw.gauss(0, 0.02)) + busy

    ratios, twins = {}, {}
    for case in CASES:
        base, twin, work = (math.exp(draw.gauss(0, process / math.sqrt(2))) for _ in range(3))
        work *= slowdown if case == CASES[0] else 1.0
        taken = [(sample(base), sample(twin), sample(work)) for _ in range(31)]
        ratios[case] = [w / b for b, _, w in taken]
        twins[case] = [t / b for b, t, _ in taken]
    return stats.judge(ratios, twins)


def red(verdicts: dict[str, stats.Verdict]) -> list[str]:
    return [case for case, verdict in verdicts.items() if verdict.word == "slower"]


@pytest.mark.parametrize("process", [0.0, 0.02, 0.05])
def test_equal_code_is_green(process: float) -> None:
    runs = [simulate(seed, process=process)[1] for seed in range(300)]
    assert sum(not red(verdicts) for verdicts in runs) >= 0.95 * len(runs)


def test_a_tenth_slower_is_red() -> None:
    runs = [simulate(seed, slowdown=1.1, process=0.01)[1] for seed in range(300)]
    assert sum(red(verdicts) == CASES[:1] for verdicts in runs) >= 0.95 * len(runs)


def test_a_gain_is_told_and_is_not_red() -> None:
    runs = [simulate(seed, slowdown=1 / 1.1, process=0.01)[1][CASES[0]].word for seed in range(100)]
    assert runs.count("faster") >= 95 and "slower" not in runs


def test_noise_between_processes_hides_a_tenth_and_the_limit_says_so() -> None:
    runs = [simulate(seed, slowdown=1.1, process=0.08) for seed in range(100)]
    assert sum(bool(red(verdicts)) for _, verdicts in runs) <= 10
    assert sum(limit > 0.1 for limit, _ in runs) >= 95


def test_few_rounds_prove_nothing() -> None:
    _, verdicts = stats.judge({"a": [2.0] * 4}, {"a": [1.0] * 4})
    assert verdicts["a"].word == "unclear"


def test_sign_test_counts() -> None:
    assert stats.sign_test([2.0] * 10, 1.0) == 2**-10
    assert stats.sign_test([1.0] * 10, 1.0) == 1.0  # equal is not above
    assert stats.sign_test([2.0, 0.5], 1.0) == 0.75


def test_interval_encloses_the_median_as_often_as_it_says() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(400):
        low, high = stats.median_interval([draw.expovariate(1.0) for _ in range(15)])
        hits += low <= math.log(2) <= high
    assert 0.93 * 400 <= hits <= 0.995 * 400  # 96.5 % for 15 samples
    assert stats.median_interval([1.0] * 5) == (-math.inf, math.inf)


def test_holm_by_hand() -> None:
    assert stats.holm([0.04, 0.01, 0.03]) == [0.06, 0.03, 0.06]
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]


def test_limit_grows_with_the_difference_between_twins() -> None:
    assert stats.noise_limit([1.0] * 6, 6) == stats.LEAST_LIMIT
    low, high = (stats.noise_limit([1 + d, 1 - d] * 3, 6) for d in (0.02, 0.05))
    assert 0.03 < low < high
