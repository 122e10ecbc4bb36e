import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads
from scipy import linalg

from jkd.errors import UserError
from jkd.metrics import frechet_distance, moment_sums, moments

DRAW = np.random.default_rng(0)
FEATURES = arrays(np.float32, (16, 3), elements=st.floats(-10, 10, width=16))
distance, sums_of = jax.jit(frechet_distance), jax.jit(moment_sums)
add = functools.partial(jax.tree.map, jnp.add)


def normal(seed, dim=4):
    draw = np.random.default_rng(seed)
    factor = draw.normal(size=(dim, dim))
    return draw.normal(size=dim), factor @ factor.T + 0.5 * np.eye(dim)


def expected(mean1, cov1, mean2, cov2):
    return np.square(mean1 - mean2).sum() + np.trace(cov1 + cov2 - 2 * linalg.sqrtm(cov1 @ cov2).real)


def of(x):
    return moments(sums_of(x))


def test_by_hand():
    found = distance(np.zeros(2), np.diag([1.0, 4]), np.array([1.0, 2]), np.diag([9.0, 1]))
    assert found == pytest.approx(10, abs=1e-5)
    # One dimension: (m1 - m2)^2 + (s1 - s2)^2.
    assert distance(np.ones(1), np.array([[4.0]]), np.zeros(1), np.array([[25.0]])) == pytest.approx(10, abs=1e-5)


def test_moments_by_hand():
    sums = sums_of(np.array([[1.0, 2], [3, 2], [5, 8]]))
    assert sums.count == 3
    np.testing.assert_array_equal(sums.total, [9, 12])
    np.testing.assert_array_equal(sums.outer, [[35, 48], [48, 72]])
    mean, cov = moments(sums)
    np.testing.assert_allclose(mean, [3, 4], rtol=1e-6)
    np.testing.assert_allclose(cov, [[4, 6], [6, 12]], rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_scipy(seed):
    both = *normal(seed), *normal(seed + 10)
    assert distance(*both) == pytest.approx(expected(*both), rel=1e-5)
    with jax.enable_x64(True):
        assert frechet_distance(*both) == pytest.approx(expected(*both), rel=1e-12)


@given(x=FEATURES, y=FEATURES)
def test_of_any_features(x, y):
    first, second = of(x), of(y)
    scale = float(jnp.trace(first[1]) + jnp.trace(second[1]))
    found = distance(*first, *second)
    assert found >= np.square(first[0] - second[0]).sum() - 1e-3 * scale - 1e-4
    assert found == pytest.approx(float(distance(*second, *first)), abs=1e-3 * scale + 1e-5, rel=1e-5)
    assert 0 <= distance(*first, *first) <= 1e-5 * scale


def test_covariances_of_any_rank():
    # Of rank one: tr (C1^1/2 C2 C1^1/2)^1/2 = |a.b|.
    a, b = DRAW.normal(size=(2, 6)).astype(np.float32)
    zero = np.zeros(6, np.float32)
    found = distance(zero, np.outer(a, a), zero, np.outer(b, b))
    assert found == pytest.approx(a @ a + b @ b - 2 * abs(a @ b), rel=2e-3)
    # In a common subspace nothing is lost to the directions without variance.
    (_, small1), (_, small2) = normal(0, 2), normal(1, 2)
    cov1, cov2 = (np.pad(cov, (0, 4)).astype(np.float32) for cov in (small1, small2))
    of_two = expected(np.zeros(2), small1, np.zeros(2), small2)
    assert distance(zero, cov1, zero, cov2) == pytest.approx(of_two, rel=1e-5)
    assert distance(zero, cov1, zero, np.zeros((6, 6))) == pytest.approx(np.trace(cov1), rel=1e-6)
    # Fewer samples than dimensions.
    few = of(DRAW.normal(size=(3, 6)).astype(np.float32))
    assert distance(*few, *few) < 1e-4


def test_maps_that_move_no_distance():
    turn = np.linalg.qr(DRAW.normal(size=(4, 4)))[0]
    (mean1, cov1), (mean2, cov2) = normal(3), normal(4)
    moved = [(turn @ mean + 3 * np.arange(4), turn @ cov @ turn.T) for mean, cov in ((mean1, cov1), (mean2, cov2))]
    one = distance(mean1, cov1, mean2, cov2)
    assert distance(*moved[0], *moved[1]) == pytest.approx(float(one), rel=1e-5)
    assert distance(2 * mean1, 4 * cov1, 2 * mean2, 4 * cov2) == pytest.approx(4 * float(one), rel=1e-5)


def test_gradients():
    both = *normal(5, 3), *normal(6, 3)
    with jax.enable_x64(True):
        check_grads(jax.jit(frechet_distance), both, 1, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)
    gradient = jax.jit(jax.grad(frechet_distance, argnums=(0, 1, 2, 3)))
    # At equal distributions, the minimum, also with equal eigenvalues.
    for slope in gradient(np.ones(3), np.eye(3), np.ones(3), np.eye(3)):
        np.testing.assert_allclose(slope, 0, atol=1e-6)
    lacking = np.diag([1.0, 2, 0]), np.diag([4.0, 0, 0])
    _, slope, _, other = gradient(np.zeros(3), lacking[0], np.zeros(3), lacking[1])
    # 1 - sqrt(4 / 1) and 1 - sqrt(1 / 4) where both vary; that of the trace alone elsewhere.
    np.testing.assert_allclose(slope, np.diag([-1, 1, 1]), atol=1e-5)
    np.testing.assert_allclose(other, np.diag([0.5, 1, 1]), atol=1e-5)


@given(x=FEATURES, mask=arrays(bool, 16))
def test_sums_add_up_and_a_mask_is_a_slice(x, mask):
    padded = np.where(mask[:, None], x, np.nan)
    part, rest = sums_of(padded, mask), sums_of(x, ~mask)
    assert part.count == mask.sum()
    np.testing.assert_allclose(part.total, x[mask].astype(np.float64).sum(0), atol=1e-3)
    for a, b in zip(add(part, rest), sums_of(x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


def test_batches_and_eight_devices_equal_one_pass(over_devices):
    x, mask = DRAW.normal(3, 2, size=(32, 5)), DRAW.random(32) < 0.8
    with jax.enable_x64(True):
        batches = functools.reduce(add, (moment_sums(x[i : i + 8], mask[i : i + 8]) for i in range(0, 32, 8)))
        spread = jax.jit(moment_sums)(*over_devices(x, mask))
        for sums in (batches, spread):
            mean, cov = moments(sums)
            np.testing.assert_allclose(mean, x[mask].mean(0), rtol=1e-13)
            np.testing.assert_allclose(cov, np.cov(x[mask], rowvar=False), rtol=1e-12, atol=1e-13)


def test_a_shift_keeps_the_digits():
    x = DRAW.normal(1000, 1, size=(64, 3)).astype(np.float32)
    cov = np.cov(x.astype(np.float64), rowvar=False)
    shift = x[:8].mean(0)
    sums = add(*(moment_sums(part, shift=shift) for part in (x[:32], x[32:])))
    mean, found = moments(sums, shift=shift)
    np.testing.assert_allclose(found, cov, atol=1e-5)
    np.testing.assert_allclose(mean, x.mean(0, np.float64), rtol=1e-6)
    assert np.abs(moments(moment_sums(x))[1] - cov).max() > 1e-3


def test_half_precision_is_upcast_and_nan_stays():
    assert sums_of(np.ones((2, 3), jnp.bfloat16)).outer.dtype == jnp.float32
    mean, cov = normal(0)
    for bad in (np.nan, np.inf):
        assert np.isnan(distance(mean, cov, mean, np.where(np.eye(4) > 0, bad, cov)))
        assert np.isnan(distance(np.full(4, bad), cov, mean, cov))
    assert np.isnan(jax.jit(moments)(sums_of(np.ones((1, 2))))[1]).all()


@pytest.mark.usefixtures("unchecked")
def test_mistakes():
    with pytest.raises(UserError, match="a covariance needs at least 2 samples, got 1"):
        moments(moment_sums(np.ones((1, 2))))
    with pytest.raises(UserError, match=r"features must have the shape \[batch, dim\], got \[2\]"):
        moment_sums(np.ones(2))
    with pytest.raises(UserError, match="features must be floating point, got int32"):
        moment_sums(np.ones((3, 2), np.int32))
    with pytest.raises(UserError, match=r"mask must have the shape \[3\], got \[2\]"):
        moment_sums(np.ones((3, 2)), np.ones(2, bool))
    with pytest.raises(UserError, match=r"shift must have the shape \[2\], got \[3\]"):
        moment_sums(np.ones((3, 2)), shift=np.ones(3))
    with pytest.raises(UserError, match=r"got \[2\], \[2, 2\], \[3\], \[3, 3\]"):
        frechet_distance(np.ones(2), np.eye(2), np.ones(3), np.eye(3))
