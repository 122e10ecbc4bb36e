import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads

from jkd.errors import UserError
from jkd.metrics import kid, kid_over_subsets

X = arrays(np.float32, (6, 3), elements=st.floats(-3, 3, width=16))
Y = arrays(np.float32, (5, 3), elements=st.floats(-3, 3, width=16))
SETS = np.random.default_rng(0).normal(size=(2, 16, 3)).astype(np.float32)
estimate = jax.jit(kid, static_argnames="max_pairs")
subsets = jax.jit(kid_over_subsets, static_argnames=("number", "size", "max_pairs"))


def expected(x, y):
    def mean(a, b, same):
        values = [
            (float(np.dot(p, q)) / len(p) + 1) ** 3
            for i, p in enumerate(a.astype(np.float64))
            for j, q in enumerate(b.astype(np.float64))
            if not (same and i == j)
        ]
        return np.mean(values)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def test_by_hand():
    # One dimension: k(0, 1) = 1, k(2, 3) = 343; across 1, 1, 27, 64.
    x, y = np.array([[0.0], [1]]), np.array([[2.0], [3]])
    assert estimate(x, y) == pytest.approx(1 + 343 - 2 * 93 / 4)
    # Unbiased: of one and the same set, below 0 by what the diagonal adds: 1 + 1 - 2 (1 + 1 + 1 + 8) / 4.
    assert estimate(x, x) == pytest.approx(-3.5)
    assert estimate(np.zeros((2, 4)), np.zeros((3, 4))) == 0


@given(x=X, y=Y, max_pairs=st.sampled_from([1, 12, 2**20]))
def test_agrees_with_double_loops(x, y, max_pairs):
    assert estimate(x, y, max_pairs=max_pairs) == pytest.approx(expected(x, y), rel=1e-4, abs=1e-3)


@given(x=X, y=Y, seed=st.integers(0, 100))
def test_what_moves_no_estimate(x, y, seed):
    draw = np.random.default_rng(seed)
    turn = np.linalg.qr(draw.normal(size=(3, 3)))[0].astype(np.float32)
    one = pytest.approx(float(estimate(x, y)), rel=1e-3, abs=1e-2)
    assert estimate(draw.permutation(x), draw.permutation(y)) == one
    assert estimate(x @ turn, y @ turn) == one
    assert estimate(y, x) == one


def test_small_features_keep_their_digits():
    x, y = SETS * 1e-3
    assert estimate(x, y) == pytest.approx(expected(x, y), rel=1e-3)


def test_its_expectation_is_zero_without_a_difference():
    draw = np.random.default_rng(1)
    found = [float(estimate(*draw.normal(size=(2, 16, 3)).astype(np.float32))) for _ in range(100)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 10
    assert estimate(SETS[0], SETS[1] + 2) > 10 * np.std(found)


def test_subsets():
    key = jax.random.key(0)
    found = subsets(key, *SETS, number=5, size=8)
    keys = [jax.random.split(k) for k in jax.random.split(key, 5)]
    drawn = [[a[jax.random.permutation(k, 16)[:8]] for a, k in zip(SETS, pair, strict=True)] for pair in keys]
    values = [expected(*pair) for pair in drawn]
    assert found == pytest.approx((np.mean(values), np.std(values)), rel=1e-4)
    # All samples each time: no spread, up to the order of sums.
    whole = subsets(key, *SETS, number=3, size=16)
    assert whole == pytest.approx((expected(*SETS), 0), rel=1e-4, abs=1e-4)


def test_gradients():
    with jax.enable_x64(True):
        x, y = SETS[:, :4].astype(np.float64)
        check_grads(jax.jit(functools.partial(kid, max_pairs=8)), (x, y), 1, modes=["rev"])


def test_half_precision_is_upcast_and_nan_stays():
    assert estimate(np.ones((2, 3), jnp.bfloat16), np.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32
    bad = np.where(np.arange(16).reshape(16, 1) == 3, np.nan, SETS[0])
    assert np.isnan(estimate(bad, SETS[1]))
    assert np.isnan(estimate(SETS[1], bad))


def test_eight_devices_equal_one(over_devices):
    assert estimate(*over_devices(*SETS)) == pytest.approx(float(estimate(*SETS)), rel=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_mistakes():
    key, x = jax.random.key(0), SETS[0]
    with pytest.raises(UserError, match=r"x must have .* with at least 2 samples, got \[1, 3\]"):
        kid(x[:1], x)
    with pytest.raises(UserError, match=r"y must have the shape \[samples, dim\]"):
        kid(x, x[0])
    with pytest.raises(UserError, match=r"features of the same length, got \[16, 3\] and \[16, 2\]"):
        kid(x, x[:, :2])
    with pytest.raises(UserError, match="y must be floating point"):
        kid(x, x.astype(np.int32))
    with pytest.raises(UserError, match="max_pairs must be positive, got 0"):
        kid(x, x, max_pairs=0)
    with pytest.raises(UserError, match=r"size must lie in \[2, 16\], got 17"):
        kid_over_subsets(key, x, x, size=17)
    with pytest.raises(UserError, match="number must be positive, got 0"):
        kid_over_subsets(key, x, x, size=4, number=0)
