import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA

from jkd import hashing
from jkd.errors import UserError

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
X = (RANDOM.normal(size=(48, 6)) * [4, 3, 2, 1, 0.5, 0.2] + 5).astype(np.float32)
rotation = jax.jit(hashing.itq_rotation, static_argnames="iters")


def test_one_convention_of_bits():
    scores = np.array([[0.0, -0.0, 1e-30, -1e-30, np.inf, -np.inf]], np.float32)
    np.testing.assert_array_equal(hashing.to_bits(scores), [[1, 1, 1, 0, 1, 0]])
    np.testing.assert_array_equal(hashing.to_signs(scores), [[1, 1, 1, -1, 1, -1]])
    assert hashing.to_signs(scores.astype(jnp.bfloat16)).dtype == jnp.int8


def test_nan_is_no_bit():
    scores = np.array([[1.0, np.nan]], np.float32)
    for code in (hashing.to_bits, hashing.to_signs):
        with pytest.raises(UserError, match="scores must not be NaN"):
            code(scores)
    np.testing.assert_array_equal(jax.jit(hashing.to_signs)(scores), [[1, 0]])


def test_pca_is_that_of_scikit_learn():
    found = hashing.pca_projection(X, 4)
    known = PCA(4).fit(X)
    np.testing.assert_allclose(np.abs(found.weights), np.abs(known.components_.T), atol=1e-5)
    np.testing.assert_allclose(found.center, known.mean_, rtol=1e-6)
    np.testing.assert_allclose(np.abs(hashing.project(found, X)), np.abs(known.transform(X)), atol=1e-4)
    # The largest entry of each direction is positive.
    assert (np.take_along_axis(found.weights, np.abs(found.weights).argmax(0)[None], 0) > 0).all()


def test_directions_without_variance_are_constant_bits():
    flat = np.repeat(X[:1], 5, 0)
    codes = hashing.to_signs(hashing.project(hashing.pca_projection(flat, 3), flat))
    np.testing.assert_array_equal(codes, np.ones((5, 3)))
    line = X[:, :1] * np.ones((1, 3), np.float32)
    weights = np.asarray(hashing.pca_projection(line, 3).weights)
    assert weights[:, 0] == pytest.approx(3**-0.5, abs=1e-5)
    assert not weights[:, 1:].any()


def quantization_error(v, r):
    scores = np.float64(v) @ np.float64(r)
    return np.square(np.where(scores >= 0, 1, -1) - scores).sum()


def test_itq_by_hand():
    # The corners of a square that stands on its corner: turned by 45 degrees, they are their own signs.
    v = 2**0.5 * np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    found = np.asarray(rotation(KEY, v, iters=20))
    np.testing.assert_allclose(np.abs(found), 2**-0.5, atol=1e-6)
    assert quantization_error(v, found) == pytest.approx(0, abs=1e-6)


def test_itq_never_raises_the_error():
    v = np.asarray(hashing.project(hashing.pca_projection(X, 4), X))
    found = [np.asarray(rotation(KEY, v, iters=n)) for n in (0, 1, 2, 5, 50)]
    errors = [quantization_error(v, r) for r in found]
    assert all(later <= sooner + 1e-3 for sooner, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]
    for r in found:
        np.testing.assert_allclose(r.T @ r, np.eye(4), atol=1e-5)


def test_itq_agrees_with_numpy():
    v = np.asarray(hashing.project(hashing.pca_projection(X, 4), X))
    r = np.float64(rotation(KEY, v, iters=0))
    for _ in range(5):
        w, _, qt = np.linalg.svd(v.T @ np.where(v @ r >= 0, 1, -1))
        r = w @ qt
    found = np.asarray(rotation(KEY, v, iters=5))
    # The start is that of `iters=0` up to flips of its columns, which every step passes on.
    np.testing.assert_allclose(found, hashing.fix_signs(r.astype(np.float32)), atol=1e-4)


def test_itq_of_rows_on_devices(over_devices):
    v = np.asarray(hashing.project(hashing.pca_projection(X, 4), X))
    (sharded,) = over_devices(v)
    np.testing.assert_allclose(rotation(KEY, sharded, iters=5), rotation(KEY, v, iters=5), atol=1e-4)


def test_itq_beats_signs_of_pca():
    found = hashing.itq_projection(KEY, X, 4)
    plain = hashing.pca_projection(X, 4)
    errors = [np.square(np.abs(hashing.project(p, X)) - 1).sum() for p in (found, plain)]
    assert errors[0] < errors[1]
    assert np.isnan(rotation(KEY, np.full((4, 2), np.nan, np.float32), iters=1)).all()


def test_lsh_shows_angles():
    x = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
    codes = hashing.to_signs(hashing.project(hashing.lsh_projection(KEY, x, 4000), x))
    distances = (codes[:1] != codes).mean(1)
    assert distances[:2].tolist() == [0, 1]
    assert distances[2:] == pytest.approx(0.5, abs=0.04)


@functools.cache
def two_views():
    shared = RANDOM.normal(size=(60, 2))
    views = [
        np.hstack([shared @ RANDOM.normal(size=(2, 2)), RANDOM.normal(size=(60, 2))])
        + 0.05 * RANDOM.normal(size=(60, 4))
        for _ in range(2)
    ]
    return [(3 * v + 1).astype(np.float32) for v in views]


def test_cca_is_that_of_scikit_learn():
    first, second = two_views()
    found = hashing.cca_projections(first, second, 2)
    scores = [np.asarray(hashing.project(p, x)) for p, x in zip(found, (first, second), strict=True)]
    for mine, known in zip(scores, CCA(2, max_iter=2000).fit(first, second).transform(first, second), strict=True):
        correlation = np.abs([np.corrcoef(a, b)[0, 1] for a, b in zip(mine.T, known.T, strict=True)])
        assert correlation == pytest.approx(1, abs=1e-4)
    together = np.corrcoef(np.hstack(scores).T)
    assert together[0, 2] > 0.95
    assert together[1, 3] > 0.95


def test_constant_columns_do_not_count_in_cca():
    first, second = two_views()
    padded = np.hstack([first, np.full((60, 1), 7, np.float32)])
    plain, found = (hashing.cca_projections(x, second, 2)[0] for x in (first, padded))
    np.testing.assert_allclose(hashing.project(found, padded), hashing.project(plain, first), atol=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    with pytest.raises(UserError, match=r"bits must lie in \[1, min\(rows - 1, dim\)\] = \[1, 2\], got 3"):
        hashing.pca_projection(X[:3], 3)
    with pytest.raises(UserError, match=r"as many rows as columns \(bits\), got \[3, 6\]"):
        hashing.itq_rotation(KEY, X[:3])
    with pytest.raises(UserError, match="iters must not be negative"):
        hashing.itq_rotation(KEY, X, -1)
    with pytest.raises(UserError, match="bits must be positive"):
        hashing.lsh_projection(KEY, X, 0)
    with pytest.raises(UserError, match=r"x must have the shape \[rows, 6\]"):
        hashing.project(hashing.pca_projection(X, 2), X[:, :5])
    with pytest.raises(UserError, match="floating point"):
        hashing.to_bits(np.ones((2, 2), int))
    first, second = two_views()
    with pytest.raises(UserError, match=r"bits must lie in \[1, 4\]"):
        hashing.cca_projections(first, second, 5)
    with pytest.raises(UserError, match="got 60 and 59"):
        hashing.cca_projections(first, second[1:], 1)
    with pytest.raises(UserError, match="second must be finite"):
        hashing.cca_projections(first, second * np.nan, 1)
