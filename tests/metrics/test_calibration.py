import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jkd.errors import UserError
from jkd.metrics import calibration_bins, ece, ece_unweighted, expected_calibration_error

# Confidences .95, .85, .85, .35, of which the first two are right.
PROBS = np.array([[0.95, 0.03, 0.02], [0.05, 0.85, 0.1], [0.85, 0.1, 0.05], [0.33, 0.35, 0.32]])
LABELS = np.array([0, 1, 2, 2])
bins_of = jax.jit(calibration_bins, static_argnums=2)
errors_of = jax.jit(lambda bins: (ece(bins), ece_unweighted(bins)))
whole = jax.jit(expected_calibration_error)


def test_by_hand():
    bins = bins_of(PROBS, LABELS, 10)
    np.testing.assert_array_equal(bins.total, [0, 0, 0, 1, 0, 0, 0, 0, 2, 1])
    np.testing.assert_array_equal(bins.correct, [0, 0, 0, 0, 0, 0, 0, 0, 1, 1])
    np.testing.assert_allclose(bins.confidence, [0, 0, 0, 0.35, 0, 0, 0, 0, 1.7, 0.95], rtol=1e-6)
    np.testing.assert_allclose(errors_of(bins), [0.275, 0.075], atol=1e-6)
    assert expected_calibration_error(PROBS, LABELS, n_bins=10) == pytest.approx(0.275, abs=1e-6)


def test_edges_belong_to_the_bin_below():
    edges = np.arange(1, 11) / 10
    probs = np.stack([edges, np.zeros(10)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(bins_of(probs, np.zeros(10, int), 10).total, 1)
    just_above = np.nextafter(probs, np.float32(2))
    np.testing.assert_array_equal(bins_of(just_above, np.zeros(10, int), 10).total, [0] + [1] * 8 + [2])


def test_confidences_outside_the_unit_interval_are_counted():
    probs = np.array([[0, 0.0], [1.0000001, 0], [-1, -2]], np.float32)
    np.testing.assert_array_equal(calibration_bins(probs, np.zeros(3, int), 2).total, [2, 1])


@given(
    confidence=arrays(np.float32, 16, elements=st.floats(0.5, 1, width=32)),
    right=arrays(bool, 16),
    mask=arrays(bool, 16),
)
def test_agrees_with_a_loop_and_adds_up(confidence, right, mask):
    probs, labels = np.stack([confidence, 1 - confidence], axis=1), np.where(right, 0, 1)
    # At 0.5 both are equal and the tie goes to class 0.
    gaps, total = 0.0, 0
    for i in range(10):
        low, high = np.float32(i / 10), np.float32((i + 1) / 10)
        inside = (confidence > low) & (confidence <= high) & mask
        total += inside.sum()
        gaps += abs(right[inside].sum() - confidence[inside].astype(np.float64).sum())
    bins, rest = bins_of(probs, labels, 10, mask), bins_of(probs, labels, 10, ~mask)
    if total:
        assert errors_of(bins)[0] == pytest.approx(gaps / total, abs=1e-5)
    for one, other, both in zip(bins, rest, bins_of(probs, labels, 10), strict=True):
        np.testing.assert_allclose(np.add(one, other), both, rtol=1e-6)


def test_nan_shows_unless_it_is_masked():
    probs = np.where(np.arange(4)[:, None] == 1, np.nan, PROBS)
    assert np.isnan(whole(probs, LABELS))
    # Without the second: gaps .05, .85 and .35 of one example each.
    assert whole(probs, LABELS, mask=np.arange(4) != 1) == pytest.approx(1.25 / 3, abs=1e-6)
    assert np.isnan(whole(PROBS, LABELS, mask=np.zeros(4, bool)))


def test_half_precision_is_upcast():
    assert calibration_bins(PROBS.astype(jnp.bfloat16), LABELS).confidence.dtype == jnp.float32
    assert calibration_bins(PROBS[:1], LABELS[:1], 1).total.tolist() == [1]


def test_eight_devices_equal_one(over_devices):
    draw = np.random.default_rng(0)
    batch = draw.dirichlet(np.ones(5), 32).astype(np.float32), draw.integers(0, 5, 32), draw.random(32) < 0.8
    bins = jax.jit(lambda p, y, m: calibration_bins(p, y, 10, m))
    for spread, one in zip(bins(*over_devices(*batch)), bins(*batch), strict=True):
        np.testing.assert_allclose(spread, one, rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_mistakes():
    with pytest.raises(UserError, match="n_bins must be positive, got 0"):
        calibration_bins(PROBS, LABELS, 0)
    with pytest.raises(UserError, match=r"probs must have the shape .* labels \[batch\], got \[4, 3\] and \[2\]"):
        calibration_bins(PROBS, LABELS[:2])
    with pytest.raises(UserError, match=r"mask must have the shape \[4\], got \[2\]"):
        expected_calibration_error(PROBS, LABELS, mask=np.ones(2, bool))
    with pytest.raises(UserError, match="probs must be floating point"):
        calibration_bins(PROBS.astype(np.int32), LABELS)
