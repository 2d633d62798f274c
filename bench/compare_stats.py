"""``bench compare``: when a difference between two trees counts as one. Pure functions.

What is judged are ratios of alternated rounds, time of the working tree / time of the base. Three
things make a ratio of equal code differ from 1, and each has its answer here:

- chance from round to round: a sign test and an interval of the median that assume no distribution,
  because a shared machine's noise has a long tail;
- the process: where memory happens to lie makes one process of the same code faster than another
  for as long as it lives. A twin, a second process of the base, shows how much: a median counts
  only beyond ``noise_limit``;
- many cases: limit and p-values are corrected for their number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.errors import require

ALPHA = 0.05
LEAST_LIMIT = 0.03
Word = Literal["slower", "faster", "same", "unclear"]


@dataclass(frozen=True)
class Verdict:
    """What became of one case: ``ratio`` is the median of working tree / base.

    ``low`` to ``high`` encloses the true median in 95 of 100 cases; ``p`` is the corrected p-value
    of "the median is not 1"; ``twin`` is the median of base / base. ``word``:

    - ``slower``, ``faster``: the median is beyond the limit, and not by chance (p < 0.05);
    - ``same``: the whole interval lies within the limit;
    - ``unclear``: neither; the machine was too noisy to tell.
    """

    ratio: float
    low: float
    high: float
    p: float
    twin: float
    word: Word


def sign_test(values: Sequence[float], threshold: float) -> float:
    """One-sided p-value of "the median is above the threshold".

    Args:
        values: independent samples, one or more.
        threshold: values equal to it count against the claim.

    Returns:
        The probability of at least as many values above it if half of them were by chance.

    Example:
        >>> sign_test([1.2] * 5, 1.1)
        0.03125
    """
    above = sum(value > threshold for value in values)
    n = len(values)
    return math.fsum(math.comb(n, k) for k in range(above, n + 1)) / 2.0**n


def median_interval(values: Sequence[float], alpha: float = ALPHA) -> tuple[float, float]:
    """Two order statistics that enclose the true median with a probability of 1 - alpha or more.

    Args:
        values: independent samples; with fewer than six no pair encloses it in 95 % of cases.
        alpha: the probability that it lies outside.

    Returns:
        Lower and upper end; ``(-inf, inf)`` if there are too few values.

    Example:
        >>> median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
        (1.0, 6.0)
    """
    ordered = sorted(values)
    n = len(ordered)
    outside, cut = 0.0, 0
    while (outside := outside + 2 * math.comb(n, cut) / 2**n) <= alpha:
        cut += 1
    if cut == 0:
        return -math.inf, math.inf
    return ordered[cut - 1], ordered[n - cut]


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's method, in the order given.

    Source: Holm, *A simple sequentially rejective multiple test procedure*, 1979.

    Example:
        >>> holm([0.01, 0.5, 0.03])
        [0.03, 0.5, 0.06]
    """
    corrected = [1.0] * len(ps)
    highest = 0.0
    for rank, k in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, (len(ps) - rank) * ps[k])
        corrected[k] = min(1.0, highest)
    return corrected


def noise_limit(twins: Sequence[float], cases: int, alpha: float = ALPHA) -> float:
    """How far from 1 the ratio of equal code may lie: ``LEAST_LIMIT`` or what the twins say.

    Taking the log ratios of processes of equal code as normal around 0, those of further cases
    stay within the limit, all of them together, with a probability of 1 - alpha or more.

    Args:
        twins: medians of base / base, one per case that was measured.
        cases: how many medians of working tree / base will be held against the limit.
        alpha: the probability that one of those exceeds it although the code is equal.

    Returns:
        The limit as a fraction: 0.03 allows ratios from 1 / 1.03 to 1.03.

    Example:
        >>> noise_limit([1.0, 1.001, 0.999], cases=3)
        0.03
        >>> noise_limit([1.05, 0.97, 1.0], cases=3) > 0.1
        True
    """
    spread = math.sqrt(statistics.fmean(math.log(twin) ** 2 for twin in twins))
    quantile = float(require("scipy.stats").t.ppf(1 - alpha / cases, df=len(twins)))
    return max(LEAST_LIMIT, math.expm1(quantile * spread))


def judge(
    ratios: Mapping[str, Sequence[float]],
    twins: Mapping[str, Sequence[float]],
    earlier: Sequence[float] = (),
) -> tuple[float, dict[str, Verdict]]:
    """The limit and a verdict per case.

    Args:
        ratios: case -> working tree / base, one per round.
        twins: case -> base / base of the same rounds.
        earlier: medians of base / base from other processes, which tell of the same noise.

    Returns:
        The limit of ``noise_limit``, and the verdicts.

    Example:
        >>> limit, verdicts = judge({"a": [1.2] * 9}, {"a": [1.0] * 9})
        >>> limit, verdicts["a"].word, verdicts["a"].ratio
        (0.03, 'slower', 1.2)
    """
    middle = {case: statistics.median(values) for case, values in twins.items()}
    limit = noise_limit([*middle.values(), *earlier], len(ratios))
    ps = holm([_p_differs(values) for values in ratios.values()])
    return limit, {
        case: _verdict(values, p, middle[case], limit)
        for (case, values), p in zip(ratios.items(), ps, strict=True)
    }


def _p_differs(values: Sequence[float]) -> float:
    """Two-sided: the better of both directions, doubled because there are two."""
    slower = sign_test(values, 1.0)
    faster = sign_test([-value for value in values], -1.0)
    return min(1.0, 2 * min(slower, faster))


def _verdict(values: Sequence[float], p: float, twin: float, limit: float) -> Verdict:
    ratio = statistics.median(values)
    low, high = median_interval(values)
    if p < ALPHA and ratio > 1 + limit:
        word: Word = "slower"
    elif p < ALPHA and ratio < 1 / (1 + limit):
        word = "faster"
    elif 1 / (1 + limit) <= low and high <= 1 + limit:
        word = "same"
    else:
        word = "unclear"
    return Verdict(ratio, low, high, p, twin, word)
