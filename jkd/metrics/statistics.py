"""Intervals, paired comparisons and corrections for tables of results; numpy, on the host."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import special

from jkd.errors import UserError

# Up to this many pairs all 2^n <= 4096 sign patterns are enumerated.
EXACT_PAIRS = 12


class Interval(NamedTuple):
    """A mean over `n` values with its standard error and confidence interval."""

    mean: float
    low: float
    high: float
    standard_error: float
    n: int


class PairedDifference(NamedTuple):
    """The mean of `n` differences a - b with its interval and a two-sided p-value."""

    mean: float
    low: float
    high: float
    standard_error: float
    n: int
    p_value: float


def _vector(name: str, values: ArrayLike, minimum: int) -> np.ndarray:
    vector = np.asarray(values, np.float64)
    if vector.ndim != 1 or vector.size < minimum:
        raise UserError(f"{name} must be a vector of at least {minimum} values, got shape {vector.shape}.")
    if not np.isfinite(vector).all():
        raise UserError(f"{name} must be finite, got {np.sum(~np.isfinite(vector))} NaN or infinite values.")
    return vector


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = _vector("a", a, 2), _vector("b", b, 2)
    if first.size != second.size:
        raise UserError(f"a and b must be paired, got {first.size} and {second.size} values.")
    return first, second


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """The mean with Student's t interval.

        mean +- t_{n-1, (1 + confidence) / 2} s / sqrt(n),    s^2 = sum (x - mean)^2 / (n - 1)

    Equal values give an interval of width zero.

    Args:
      values: at least 2, one for each independent run (seed).
      confidence: in (0, 1).

    Raises:
      UserError: on fewer than 2 values, a value that is not finite, or `confidence` outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence must lie in (0, 1), got {confidence}.")
    x = _vector("values", values, 2)
    # The mean of equal values may be off by a rounding; the spread must then be 0, not 1e-17.
    mean = float(x[0] if np.ptp(x) == 0 else x.mean())
    error = float(np.sqrt(np.sum((x - mean) ** 2) / (x.size - 1) / x.size))
    half = float(special.stdtrit(x.size - 1, (1 + confidence) / 2)) * error
    return Interval(mean, mean - half, mean + half, error, x.size)


def _sign_flip_p(differences: np.ndarray) -> float:
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    # Patterns that tie with the observed one count, whatever the order of summation rounds to.
    tolerance = 1e-12 * np.abs(differences).sum()
    return float(np.mean(np.abs(sums) >= abs(differences.sum()) - tolerance))


def _t_test_p(interval: Interval, margin: float) -> float:
    distance = abs(interval.mean + margin)
    if interval.standard_error == 0:
        return 1.0 if distance == 0 else 0.0
    return float(2 * special.stdtr(interval.n - 1, -distance / interval.standard_error))


def paired_difference(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95, *, margin: float = 0.0, exact: bool | None = None
) -> PairedDifference:
    """The mean of a - b over pairs (same seed, same split), its Student t interval and p-value.

    The null hypothesis is that each difference lies as likely as far on the other side of -margin. Up to 12 pairs
    the p-value is exact: the share of the 2^n sign patterns whose absolute sum is at least the observed one
    (at best 2 / 2^n, so 5 pairs cannot fall below 0.0625). For more pairs it is that of the two-sided
    paired t-test, which is below 1 - confidence where the interval leaves -margin out.

    Args:
      a: at least 2 values.
      b: as many, in the order of `a`.
      confidence: of the interval, in (0, 1).
      margin: the null hypothesis is a difference of -margin; mean and interval are not shifted.
      exact: True or False for one of the two tests whatever the number of pairs; exact ones take 2^n time.

    Raises:
      UserError: on fewer than 2 pairs, different lengths, a value that is not finite, or `confidence`
        outside (0, 1).
    """
    first, second = _pair(a, b)
    differences = first - second
    interval = mean_interval(differences, confidence)
    exact = differences.size <= EXACT_PAIRS if exact is None else exact
    p_value = _sign_flip_p(differences + margin) if exact else _t_test_p(interval, margin)
    return PairedDifference(*interval, p_value)


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation, in [-1, 1]; ties get their mean rank.

        rho = Pearson correlation of rank(a) and rank(b)

    NaN where one side is constant: there is no order to compare.

    Raises:
      UserError: on fewer than 2 pairs, different lengths, or a value that is not finite.
    """
    first, second = _pair(a, b)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(_mean_ranks(first), _mean_ranks(second))[0, 1])


def _mean_ranks(x: np.ndarray) -> np.ndarray:
    # scipy.stats.rankdata; that module takes longer to import than JAX does.
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def holm(p_values: ArrayLike) -> Float[np.ndarray, " tests"]:
    """Holm's adjusted p-values, in the order given: reject where adjusted <= level.

        adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)),    p_(1) <= ... <= p_(m)

    Controls the family-wise error under any dependence.

    Raises:
      UserError: if there is no p-value, or one lies outside [0, 1].

    Reference: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of
      Statistics 6, 1979.
    """
    p = _vector("p_values", p_values, 1)
    if p.min() < 0 or p.max() > 1:
        raise UserError(f"p_values must lie in [0, 1], got {p.min()} to {p.max()}.")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(np.minimum(1.0, p[order] * np.arange(p.size, 0, -1)))
    adjusted = np.empty_like(p)
    adjusted[order] = stepped
    return adjusted
