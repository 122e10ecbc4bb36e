import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from jkd.errors import UserError
from jkd.metrics import bit_accuracy, detection_threshold, match_log_pvalue, matching_bits

log_p = jax.jit(match_log_pvalue, static_argnames=("bits", "users"))
accuracy, matches = jax.jit(bit_accuracy), jax.jit(matching_bits)
TABLE = {64: 0.535193, 80: 2.962603e-3, 96: 6.420882e-9, 112: 3.189613e-19, 122: 1.674843e-29, 127: 3.790969e-37}


def test_by_hand():
    found = log_p(np.array([*TABLE]), 128)
    np.testing.assert_allclose(found, np.log([*TABLE.values()]), atol=1e-5)
    assert log_p(128, 128) == pytest.approx(-88.722839, abs=1e-5)
    assert log_p(0, 128) == 0
    assert np.exp(log_p(96, 128, users=1_000_000)) == pytest.approx(0.006400, abs=1e-6)
    # Two coins: 3/4 for at least one head; of two users, 1 - 1/16.
    assert np.exp(log_p(1, 2)) == pytest.approx(0.75)
    assert np.exp(log_p(1, 2, users=2)) == pytest.approx(15 / 16)


def test_thresholds_by_hand():
    assert [detection_threshold(128, rate) for rate in (1e-3, 1e-6, 1e-9, 1e-12)] == [82, 92, 98, 103]
    assert detection_threshold(128, 1.0) == 0
    assert detection_threshold(1, 0.5) == 1
    assert detection_threshold(128, 1e-3, users=1_000_000) == 98


@pytest.mark.parametrize("bits", [1, 7, 128, 900])
def test_tails_agree_with_scipy(bits):
    k = np.arange(bits + 1)
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            match_log_pvalue(k, bits), stats.binom.logsf(k - 1, bits, 0.5), rtol=1e-9, atol=1e-12
        )
    found = np.asarray(log_p(k, bits))
    assert (np.diff(found) <= 0).all()
    middle = bits // 2
    assert np.exp(found[middle]) == pytest.approx(stats.binomtest(middle, bits, alternative="greater").pvalue, rel=1e-5)


@given(k=st.integers(0, 40), users=st.sampled_from([1, 2, 1000, 10**9]))
def test_the_best_of_many_users(k, users):
    p = stats.binom.sf(k - 1, 40, 0.5)
    expected = -np.expm1(users * np.log1p(-p)) if p < 1 else 1
    assert np.exp(log_p(k, 40, users=users)) == pytest.approx(expected, rel=2e-5)


def test_tiny_values_keep_their_digits():
    assert log_p(4000, 4000) == pytest.approx(-4000 * np.log(2), rel=1e-6)
    assert log_p(4000, 4000, users=1000) == pytest.approx(np.log(1000) - 4000 * np.log(2), rel=1e-6)


def test_counts_that_cannot_be():
    np.testing.assert_array_equal(np.isnan(log_p(np.array([[-1, 0], [8, 9]]), 8)), [[True, False], [False, True]])


def test_bits_by_hand():
    logits, bits = np.array([[2, -1, 0.5, -3], [0, 0, 1, np.nan]]), np.array([[1, 0, 1, 1], [0, 1, 1, 1]])
    np.testing.assert_array_equal(accuracy(logits, bits), [0.75, np.nan])
    np.testing.assert_array_equal(matches(logits, bits), [3, -1])
    # Exactly 0 reads as bit 0.
    np.testing.assert_array_equal(matches(np.zeros((1, 4)), bits[:1]), [1])


@given(logits=arrays(np.float32, (3, 6), elements=st.integers(-2, 2).map(float)), bits=arrays(bool, (3, 6)))
def test_bits_agree_with_a_count(logits, bits):
    expected = [sum((x > 0) == b for x, b in zip(*rows, strict=True)) for rows in zip(logits, bits, strict=True)]
    np.testing.assert_array_equal(matches(logits, bits), expected)
    np.testing.assert_array_equal(matches(logits, bits.astype(np.float32)), expected)
    np.testing.assert_allclose(accuracy(logits, bits), np.array(expected) / 6, rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_mistakes():
    with pytest.raises(UserError, match="bits must be 0 or 1"):
        bit_accuracy(np.ones((1, 2)), np.array([[-1, 1]]))
    with pytest.raises(UserError, match=r"with at least one bit, got \[1, 0\] and \[1, 0\]"):
        bit_accuracy(np.ones((1, 0)), np.ones((1, 0)))
    with pytest.raises(UserError, match=r"got \[1, 2\] and \[2\]"):
        matching_bits(np.ones((1, 2)), np.ones(2))
    with pytest.raises(UserError, match="logits must be floating point"):
        matching_bits(np.ones((1, 2), np.int32), np.ones((1, 2)))
    with pytest.raises(UserError, match="bits must be positive, got 0"):
        match_log_pvalue(0, 0)
    with pytest.raises(UserError, match="users must be positive, got 0"):
        match_log_pvalue(0, 4, users=0)
    with pytest.raises(UserError, match="matched must be integer, got float32"):
        match_log_pvalue(np.ones(2, np.float32), 4)
    with pytest.raises(UserError, match=r"false_positive_rate must lie in \(0, 1\], got 0"):
        detection_threshold(8, 0)
    with pytest.raises(UserError, match="8 bits are too few to tell at a false positive rate of 1e-06"):
        detection_threshold(8, 1e-6)
