import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from jkd.errors import UserError
from jkd.metrics import holm, mean_interval, paired_difference, spearman

VALUES = arrays(np.float64, 7, elements=st.integers(-5, 5).map(float))
LONG = arrays(np.float64, 20, elements=st.floats(-10, 10, width=16), unique=True)


def test_interval_by_hand():
    # s^2 = 2.5, s / sqrt(5) = 0.707107, t_4(0.975) = 2.776445.
    interval = mean_interval([1, 2, 3, 4, 5])
    assert interval == pytest.approx((3, 1.036757, 4.963243, 0.707107, 5), abs=1e-6)


def test_interval_of_two_by_hand():
    # t_1 is the Cauchy distribution: its 0.75 quantile is 1.
    assert mean_interval([0, 2], confidence=0.5) == pytest.approx((1, 0, 2, 1, 2))


@given(values=LONG, confidence=st.floats(0.5, 0.999))
def test_interval_agrees_with_scipy(values, confidence):
    interval = mean_interval(values, confidence)
    expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.standard_error == pytest.approx(stats.sem(values))


def test_equal_values_have_no_width():
    # The plain mean of three 0.1 is 0.10000000000000002.
    assert mean_interval([0.1, 0.1, 0.1]) == (0.1, 0.1, 0.1, 0.0, 3)


def test_sign_flips_by_hand():
    # All of one sign: only the observed pattern and its mirror image reach the sum.
    assert paired_difference([2, 3, 4, 5, 6], [1, 1, 1, 1, 1]).p_value == 2 / 32
    # 1 + 2 - 4: |sum| = 1 is the smallest that signs can give.
    assert paired_difference([1, 2, 0], [0, 0, 4]).p_value == 1
    # 3 + 2 - 1 = 4: reached by +-(3, 2, 1) and +-(3, 2, -1).
    assert paired_difference([3, 2, 0], [0, 0, 1]).p_value == 4 / 8


@given(a=VALUES, b=VALUES)
def test_sign_flips_agree_with_enumeration(a, b):
    d = a - b
    sums = [abs(np.dot(signs, d)) for signs in itertools.product((-1, 1), repeat=7)]
    found = paired_difference(a, b)
    assert found.p_value == np.mean(np.array(sums) >= abs(d.sum()))
    assert found[:5] == mean_interval(d)
    mirrored = paired_difference(b, a)
    assert (mirrored.mean, mirrored.p_value) == (-found.mean, found.p_value)


def test_rounded_ties_count():
    # 0.1 + 0.2 - 0.3 is 5.6e-17 in one order of summation and 2.8e-17 in another.
    assert paired_difference([0.3, 0.1, 0.2], [0, 0, 0.3 + 0.2]).p_value == 1


@given(a=LONG, b=LONG)
def test_many_pairs_take_the_t_test(a, b):
    if np.ptp(a - b) > 0:
        assert paired_difference(a, b).p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)


@given(a=VALUES, b=VALUES, margin=st.floats(-1, 1))
def test_a_margin_moves_the_null_hypothesis_alone(a, b, margin):
    plain = paired_difference(a, b)
    for exact, moved in ((True, paired_difference(a + margin, b)), (False, stats.ttest_1samp(a - b, -margin))):
        found = paired_difference(a, b, margin=margin, exact=exact)
        assert found[:5] == plain[:5]
        p_value = moved.p_value if exact else moved.pvalue
        assert np.isnan(p_value) or found.p_value == pytest.approx(p_value, rel=1e-6, abs=1e-9)


@given(a=VALUES, b=VALUES)
def test_the_t_test_agrees_with_the_interval(a, b):
    found = paired_difference(a, b, exact=False)
    if found.standard_error > 0:
        assert (found.p_value < 0.05) == (found.low > 0 or found.high < 0)


@pytest.mark.parametrize("n", [4, 20])
def test_identical_runs(n):
    assert paired_difference(np.arange(n), np.arange(n)) == (0, 0, 0, 0, n, 1)


def test_a_constant_difference():
    assert paired_difference(np.arange(20.0) + 1, np.arange(20.0)) == (1, 1, 1, 0, 20, 0)


def test_spearman_by_hand():
    # 1 - 6 * sum d^2 / (n (n^2 - 1)) with d = 0, 1, -1, 0.
    assert spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
    assert spearman([1, 2, 3], [1, 8, 27]) == pytest.approx(1)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


@given(a=LONG, b=LONG)
def test_spearman_sees_ranks_only(a, b):
    rho = spearman(a, b)
    assert -1 - 1e-12 <= rho <= 1 + 1e-12
    assert spearman(b, a) == pytest.approx(rho, abs=1e-12)
    assert spearman(a**3, b) == pytest.approx(rho, abs=1e-12)
    assert spearman(-a, b) == pytest.approx(-rho, abs=1e-12)
    assert rho == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1, 1])
    np.testing.assert_allclose(holm([0.2]), [0.2])


@given(p=arrays(np.float64, 6, elements=st.floats(0, 1)), level=st.floats(0.01, 0.5))
def test_holm_rejects_step_by_step(p, level):
    adjusted = holm(p)
    assert np.all((adjusted >= p) & (adjusted <= 1))
    rejected = np.zeros(6, bool)
    for step, i in enumerate(np.argsort(p, kind="stable")):
        if p[i] * (6 - step) > level:
            break
        rejected[i] = True
    np.testing.assert_array_equal(adjusted <= level, rejected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([1.0]), "values must be a vector of at least 2 values"),
        (lambda: mean_interval([[1.0, 2.0]]), r"got shape \(1, 2\)"),
        (lambda: mean_interval([1.0, np.nan]), "values must be finite, got 1 NaN"),
        (lambda: mean_interval([1.0, 2.0], confidence=95.0), r"confidence must lie in \(0, 1\), got 95"),
        (lambda: paired_difference([1.0, 2.0], [1.0, 2.0, 3.0]), "must be paired, got 2 and 3 values"),
        (lambda: paired_difference([1.0], [2.0]), "a must be a vector of at least 2"),
        (lambda: spearman([1.0, 2.0], [np.inf, 2.0]), "b must be finite"),
        (lambda: holm([]), "p_values must be a vector of at least 1"),
        (lambda: holm([0.1, 1.2]), r"p_values must lie in \[0, 1\], got 0.1 to 1.2"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(UserError, match=message):
        call()
