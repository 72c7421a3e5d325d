"""PairedComparison of two networks, or of two groups of seeds, by their verdicts on the same images.

```python
from engine.evaluation.statistics.paired import compare
found = compare([True, True, True, False], [True, False, False, True])
print(found.difference, found.interval, found.p_value)
```

Shape suffixes: S seeds, N images, P patterns (images on which every network gives the same verdicts), R resamples.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from engine.evaluation.statistics.intervals import CONFIDENCE

RESAMPLES = 20_000
POWER = 0.8
"""Probability with which a `resolvable` difference is told apart."""
PAIRED_TESTS = {
    "mcnemar": "McNemar's exact test; interval: percentiles of the bootstrap over images",
    "paired t": "t-test and t-interval of the differences, seed by seed",
    "welch": "Welch's t-test and t-interval of the seeds' accuracies",
    "one-sample t": "t-test and t-interval of the seeds' accuracies against one network, which is taken as given",
}
"""Tests by name, with the interval that goes with each."""

_NUMBERS_AT_ONCE = 2_000_000

Bools = NDArray[np.bool_]
Interval = tuple[float, float]


@dataclass(frozen=True)
class PairedComparison:
    """Accuracy of A minus that of B on the same n images, in [-1, 1]; of groups, of the mean over their seeds.

    test: one of `PAIRED_TESTS`. interval: of the difference, at the level `CONFIDENCE`. p_value: two-sided, of no
    difference. Where the seeds do not vary, their spread is not known: there is no interval then, and the p-value
    is 1 for no difference, else None.
    bootstrap: percentiles over images, of groups over seeds and images.
    only_a, only_b: images that A alone, and B alone, classifies correctly; None of groups.
    resolvable: the smallest difference that is told apart with probability `POWER`, as often as the networks
    disagree here, or as their seeds differ; None where no difference is.
    """

    test: str
    n: int
    seeds_a: int
    seeds_b: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    interval: Interval | None
    bootstrap: Interval
    p_value: float | None
    resolvable: float | None
    only_a: int | None = None
    only_b: int | None = None


def compare(
    verdicts_a: Any, verdicts_b: Any, *, paired_seeds: bool = False, comparisons: int = 1, seed: int = 0
) -> PairedComparison:
    """Compare two networks, or two groups of them, on the same images.

    verdicts: True where an image is classified correctly, (N,) of one network or (S, N) of a seed in each row;
    tensors, arrays or sequences of bool. paired_seeds: row s of A and row s of B are of the same seed.
    comparisons: how many are made together; `resolvable` is for the level (1 - CONFIDENCE) / comparisons, the
    hardest that Holm's adjustment asks for. seed: of the bootstrap.
    compare(b, a) is compare(a, b) with the sign of every difference turned, and the order of the images does not
    matter. Raises ValueError for verdicts that are no bool, none at all, or of different images.
    """
    a_SN, b_SN = _checked("verdicts_a", verdicts_a), _checked("verdicts_b", verdicts_b)
    if a_SN.shape[1] != b_SN.shape[1]:
        raise ValueError(f"verdicts_b: of {b_SN.shape[1]} images, and verdicts_a of {a_SN.shape[1]}")
    if paired_seeds and len(a_SN) != len(b_SN):
        raise ValueError(f"paired_seeds: {len(a_SN)} seeds of A, and {len(b_SN)} of B")
    if comparisons < 1:
        raise ValueError(f"comparisons: at least 1 is expected, got {comparisons}")
    level = (1 - CONFIDENCE) / comparisons
    sizes, n = (len(a_SN), len(b_SN)), a_SN.shape[1]
    right_a, right_b = int(a_SN.sum()), int(b_SN.sum())
    difference = (right_a * sizes[1] - right_b * sizes[0]) / (sizes[0] * sizes[1] * n)
    common: dict[str, Any] = {
        "n": n,
        "seeds_a": sizes[0],
        "seeds_b": sizes[1],
        "accuracy_a": right_a / (sizes[0] * n),
        "accuracy_b": right_b / (sizes[1] * n),
        "difference": difference,
        "bootstrap": bootstrap_interval(a_SN, b_SN, paired_seeds=paired_seeds, seed=seed),
    }
    if sizes == (1, 1):
        only_a, only_b = int((a_SN & ~b_SN).sum()), int((b_SN & ~a_SN).sum())
        return PairedComparison(
            "mcnemar",
            **common,
            interval=common["bootstrap"],
            p_value=mcnemar(only_a, only_b),
            resolvable=resolvable(only_a + only_b, n, level),
            only_a=only_a,
            only_b=only_b,
        )
    return PairedComparison(**common, **_over_seeds(a_SN, b_SN, difference, level, paired=paired_seeds))


def _checked(argument: str, verdicts: Any) -> Bools:
    """Verdicts as bool (S, N). Raises ValueError where they are something else."""
    try:
        found = np.asarray(verdicts)
    except (TypeError, ValueError):
        raise ValueError(f"{argument}: rows of the same length are expected") from None
    if found.dtype != np.bool_ or found.ndim not in (1, 2):
        raise ValueError(f"{argument}: bool of shape (N,) or (S, N) is expected, got {found.dtype} {found.shape}")
    if not found.size:
        raise ValueError(f"{argument}: there is nothing to compare in verdicts of shape {found.shape}")
    return found.reshape(-1, found.shape[-1])


# ---------------------------------------------------------------- two networks


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact two-sided p: min(1, 2 P(X <= min(b, c))), X binomial of b + c trials at 1/2."""
    return min(1.0, 2 * float(stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)))


def resolvable(discordant: int, n: int, level: float = 1 - CONFIDENCE) -> float | None:
    """Smallest difference d that McNemar's test finds with probability `POWER` where a share r of images differs.

    d solves d sqrt(n) = z_a sqrt(r) + z_p sqrt(r - d^2) (Connor, 1987). r = discordant / n is not below d: where
    d would be larger, all images that differ are on one side, and d solves P(X >= k) = `POWER` with X binomial of
    n trials at d, and k the fewest that are significant. None where n images are too few for any.
    """
    share, z_a, z_p = discordant / n, NormalDist().inv_cdf(1 - level / 2), NormalDist().inv_cdf(POWER)
    # d^2 (n + z_p^2) - 2 d z_a sqrt(n r) + r (z_a^2 - z_p^2) = 0, the larger root
    half, quadratic = z_a * math.sqrt(n * share), n + z_p**2
    root = (half + math.sqrt(max(0.0, half**2 - quadratic * share * (z_a**2 - z_p**2)))) / quadratic
    if 0 < root <= share:
        return root
    fewest = next(k for k in range(1, 2000) if 2 * 0.5**k < level)
    if fewest > n:
        return None
    # P(X >= k) = P(d' <= d), d' of the beta distribution of k and n - k + 1
    return max(float(stats.beta.ppf(POWER, fewest, n - fewest + 1)), share)


# ---------------------------------------------------------------- groups of seeds


def _over_seeds(a_SN: Bools, b_SN: Bools, difference: float, level: float, *, paired: bool) -> dict[str, Any]:
    """Test, interval, p-value and resolvable difference by Student's t.

    The variance is computed of whole numbers, so that equal accuracies have none.
    """
    right_a, right_b, n = a_SN.sum(1).tolist(), b_SN.sum(1).tolist(), a_SN.shape[1]
    if paired:
        name, samples = "paired t", [[a - b for a, b in zip(right_a, right_b, strict=True)]]
    elif 1 in (len(right_a), len(right_b)):
        name, samples = "one-sample t", [max(right_a, right_b, key=len)]
    else:
        name, samples = "welch", [right_a, right_b]
    parts = [statistics.variance(sample) / len(sample) for sample in samples]
    error = math.sqrt(sum(parts)) / n
    squares = sum(part**2 / (len(sample) - 1) for part, sample in zip(parts, samples, strict=True))
    df = sum(parts) ** 2 / squares if error else math.inf  # Welch and Satterthwaite; of one sample S - 1
    return {"test": name, **by_student(difference, error, df, level)._asdict()}


class StudentTest(NamedTuple):
    """Fields of `PairedComparison` by Student's t."""

    interval: Interval | None
    p_value: float | None
    resolvable: float | None


def by_student(difference: float, error: float, df: float, level: float = 1 - CONFIDENCE) -> StudentTest:
    """Student's t-test of a difference with its standard error. level: of `resolvable`.

    interval: difference +- t error, t the quantile of df degrees of freedom. resolvable: (t_a + t_p) error, with
    the quantiles of the level and of `POWER`. An error of 0 tells nothing: see `PairedComparison`.
    """
    if not error:
        return StudentTest(None, None if difference else 1.0, None)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * error
    return StudentTest(
        (difference - half, difference + half),
        2 * float(stats.t.sf(abs(difference) / error, df)),
        error * float(stats.t.ppf(1 - level / 2, df) + stats.t.ppf(POWER, df)),
    )


# ---------------------------------------------------------------- bootstrap


def bootstrap_interval(a_SN: Bools, b_SN: Bools, *, paired_seeds: bool = False, seed: int = 0) -> Interval:
    """Percentile interval of the difference over `RESAMPLES` resamples of images, and of each group's seeds.

    A resample takes n images with replacement, the same for all networks, and of each group as many seeds as it
    has, the same of both where paired_seeds. Of the images only the number of each pattern of verdicts is drawn,
    which has the same distribution. Turned round, (b, a) gives the same interval with the other sign.
    """
    forward, backward = _patterns(a_SN, b_SN), _patterns(b_SN, a_SN)
    turned = (len(a_SN), *_key(forward)) > (len(b_SN), *_key(backward))
    patterns_PS, counts_P = backward if turned else forward
    size_a = len(b_SN) if turned else len(a_SN)
    differences_R = _resampled(patterns_PS, counts_P, size_a, paired_seeds=paired_seeds, seed=seed)
    low, high = np.quantile(differences_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    if len(a_SN) == len(b_SN) and _key(forward) == _key(
        backward
    ):  # the distribution is symmetric, its sample nearly
        low, high = (low - high) / 2, (high - low) / 2
    return (0.0 - high, 0.0 - low) if turned else (low, high)


def _patterns(a_SN: Bools, b_SN: Bools) -> tuple[Bools, NDArray[np.int64]]:
    """Patterns of verdicts (P, S_A + S_B) in order, and the number of images of each."""
    patterns_PS, counts_P = np.unique(np.concatenate([a_SN, b_SN]).T, axis=0, return_counts=True)
    return patterns_PS, counts_P.astype(np.int64)


def _key(patterns: tuple[Bools, NDArray[np.int64]]) -> tuple[bytes, bytes]:
    return patterns[0].tobytes(), patterns[1].tobytes()


def _resampled(
    patterns_PS: Bools, counts_P: NDArray[np.int64], size_a: int, *, paired_seeds: bool, seed: int
) -> NDArray[np.float64]:
    """Differences of the resamples, (R,)."""
    generator, n = np.random.default_rng(seed), int(counts_P.sum())
    size_b, found = patterns_PS.shape[1] - size_a, []
    rows = max(1, _NUMBERS_AT_ONCE // len(counts_P))
    for first in range(0, RESAMPLES, rows):
        images_RP = generator.multinomial(n, counts_P / n, min(rows, RESAMPLES - first))
        right_RS = images_RP @ patterns_PS.astype(np.int64)
        seeds_a = _seeds(generator, size_a, len(right_RS))
        seeds_b = seeds_a if paired_seeds else _seeds(generator, size_b, len(right_RS))
        right_a = (right_RS[:, :size_a] * seeds_a).sum(1)
        right_b = (right_RS[:, size_a:] * seeds_b).sum(1)
        found.append((right_a * size_b - right_b * size_a) / (size_a * size_b * n))
    return np.concatenate(found)


def _seeds(generator: np.random.Generator, size: int, rows: int) -> NDArray[np.int64]:
    """Number of times that each seed is taken, (R, S)."""
    return generator.multinomial(size, [1 / size] * size, rows)
