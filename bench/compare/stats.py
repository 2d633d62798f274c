"""When a difference between two trees counts as one. Pure functions.

What is judged are ratios of alternated rounds, time of the working tree / time of the base. Three
things make a ratio of equal code differ from 1:

- chance from round to round: a sign test and an interval of the median that assume no distribution,
  because a shared machine's noise has a long tail;
- the process: where memory happens to lie makes one process of the same code faster than another
  for as long as it lives. A twin, a second process of the base, shows how much: a median counts
  only beyond ``noise_limit``, and beyond twice what the case's own twin shows;
- many cases: limit and p-values are corrected for their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

ALPHA = 0.05
LEAST_LIMIT = 0.03
ODD = 20.0  # times the median difference between twins


@dataclass(frozen=True)
class Verdict:
    """What became of one case: ``ratio`` is the median of working tree / base.

    ``low`` to ``high`` encloses the true median in 95 of 100 cases; ``p`` is the p-value of "the
    median is not 1", times the number of cases; ``twin`` is the median of base / base. ``word``:

    - ``slower``, ``faster``: the median is beyond the limit, and not by chance (p < 0.05);
    - ``same``: the whole interval lies within the limit;
    - ``unclear``: neither; the machine was too noisy.
    """

    ratio: float
    low: float
    high: float
    p: float
    twin: float
    word: str


def sign_test(values: Sequence[float]) -> tuple[float, float, float]:
    """Two-sided p-value of "the median is not 1"; two values that enclose the true median.

    They do so with a probability of 95 % or more; too few values have none.
    """
    test = stats.quantile_test(values, q=1, p=0.5)
    found = test.confidence_interval(1 - ALPHA)
    low, high = float(found.low), float(found.high)
    known = not math.isnan(low) and not math.isnan(high)
    return (float(test.pvalue), low, high) if known else (float(test.pvalue), -math.inf, math.inf)


def noise_limit(twins: Sequence[float], cases: int) -> float:
    """How far from 1 the ratio of equal code may lie: ``LEAST_LIMIT``, or more if the twins differ.

    Taking the log ratios of processes of equal code as normal around 0, those of ``cases`` further
    cases stay within the limit, all of them together, with a probability of 95 % or more. A twin
    that is ``ODD`` speaks for its own case alone: it would hide what is slower in all others.
    """
    sizes = np.abs(np.log(twins))
    sizes = sizes[sizes <= max(LEAST_LIMIT, ODD * float(np.median(sizes)))]
    spread = math.sqrt(np.mean(sizes**2))
    quantile = float(stats.t.ppf(1 - ALPHA / cases, df=len(sizes)))
    return max(LEAST_LIMIT, math.expm1(quantile * spread))


def judge(
    ratios: Mapping[str, Sequence[float]],
    twins: Mapping[str, Sequence[float]],
    earlier: Sequence[float] = (),
) -> tuple[float, dict[str, Verdict]]:
    """The limit and a verdict per case, from tree / base and base / base of every round.

    ``earlier`` are medians of base / base from other processes, which show the same noise.
    """
    middle = {case: float(np.median(values)) for case, values in twins.items()}
    limit = noise_limit([*middle.values(), *earlier], len(ratios))
    verdicts = {}
    for case, values in ratios.items():
        ratio = float(np.median(values))
        p, low, high = sign_test(values)
        p = min(1.0, p * len(ratios))
        most = max(1 + limit, math.exp(2 * abs(math.log(middle[case]))))
        if p < ALPHA and not 1 / most <= ratio <= most:
            word = "slower" if ratio > 1 else "faster"
        else:
            within = 1 / most <= low and high <= most
            word = "same" if within else "unclear"
        verdicts[case] = Verdict(ratio, low, high, p, middle[case], word)
    return limit, verdicts
