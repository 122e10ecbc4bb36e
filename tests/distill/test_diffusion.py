import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jkd.distill import (
    centroid_distances,
    centroids_from_sums,
    class_centroids,
    class_sums,
    diffusion_index,
    similar_class_mask,
    superclass_mask,
)
from jkd.errors import UserError

REFERENCE = np.array([[0, 0], [1, 0], [0, 4.0]])
LATER = np.array([[0, 0], [0.5, 0], [0, 4.0]])
NEAR = np.array([[0, 1, 0], [1, 0, 0], [0, 1, 0]], bool)
POINTS = arrays(np.float32, (6, 3), elements=st.integers(-20, 20).map(float))
distances = jax.jit(centroid_distances, static_argnames="normalize")
index = jax.jit(diffusion_index)
similar = jax.jit(similar_class_mask, static_argnums=1)
centroids_of = jax.jit(class_centroids, static_argnums=2)
sums_of = jax.jit(class_sums, static_argnums=2)
near_of = jax.jit(superclass_mask)


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    return draw.normal(size=(32, 3)).astype(np.float32), draw.integers(0, 5, 32), draw.random(32) < 0.8


def test_diffusion_by_hand():
    d_ref, d_t = np.asarray(distances(REFERENCE)), np.asarray(distances(LATER))
    np.testing.assert_allclose(d_ref[0], [0, 0.328835, 1.315342], atol=1e-6)
    np.testing.assert_allclose(d_t[0], [0, 0.175827, 1.406613], atol=1e-6)
    eta = jax.tree.map(np.asarray, index(d_ref, d_t, NEAR))
    assert eta.similar[0] == pytest.approx(46.530490, abs=2e-4)
    assert eta.dissimilar[0] == pytest.approx(-6.939020, abs=2e-4)
    np.testing.assert_array_equal(eta.coincident, 0)


def test_centroids_by_hand():
    features = np.array([[1, 2], [3, 4], [5, 6], [np.nan, 0]])
    found = centroids_of(features, np.array([0, 0, 2, 2]), 4, np.array([True, True, True, False]))
    np.testing.assert_array_equal(found.centroids, [[2, 3], [np.nan] * 2, [5, 6], [np.nan] * 2])
    np.testing.assert_array_equal(found.counts, [2, 0, 1, 0])
    np.testing.assert_array_equal(sums_of(features[:3], np.array([-1, 4, 1]), 4).counts, [0, 1, 0, 0])


def test_sums_add_up(batch):
    features, labels, mask = batch
    whole = jax.tree.map(np.asarray, centroids_of(features, labels, 5))
    parts = [jax.tree.map(np.asarray, sums_of(features, labels, 5, m)) for m in (mask, ~mask)]
    added = jax.jit(centroids_from_sums)(jax.tree.map(np.add, *parts))
    np.testing.assert_allclose(added.centroids, whole.centroids, rtol=1e-5)
    np.testing.assert_array_equal(added.counts, np.bincount(labels, minlength=5))
    for k in range(5):
        np.testing.assert_allclose(whole.centroids[k], features[labels == k].mean(0), rtol=1e-5, atol=1e-6)


@given(points=POINTS, mask=arrays(bool, 6))
def test_distances_against_a_loop(points, mask):
    expected = np.linalg.norm(points[:, None] - points[None], axis=-1)
    expected[~mask], expected[:, ~mask] = np.nan, np.nan
    found = distances(np.where(mask[:, None], points, np.nan).astype(np.float32), mask, normalize=False)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    off = expected[mask[:, None] & mask & ~np.eye(6, dtype=bool)]
    if off.size and off.mean() > 0:
        np.testing.assert_allclose(distances(points, mask), expected / off.mean(), rtol=1e-4, atol=1e-5)


@given(points=POINTS, shift=st.integers(-50, 50), scale=st.sampled_from([0.01, 3.0, 500.0]))
def test_moving_turning_and_scaling_do_not_diffuse(points, shift, scale):
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    moved = (scale * (points @ rotation) + scale * shift).astype(np.float32)
    np.testing.assert_allclose(distances(moved), distances(points), atol=3e-3)
    with jax.enable_x64(True):
        wide = points.astype(np.float64)
        d_ref, d_t = distances(wide), distances(scale * (wide @ rotation) + shift)
        eta = index(d_ref, d_t, near_of(np.arange(6) // 2))
    for values in (eta.similar, eta.dissimilar):
        np.testing.assert_allclose(np.nan_to_num(np.asarray(values)), 0, atol=1e-8)


def test_diffusion_against_a_loop(batch):
    draw = np.random.default_rng(1)
    mask = np.array([True, True, False, True, True, True])
    d_ref, d_t = (np.asarray(distances(draw.normal(size=(6, 3)).astype(np.float32), mask)) for _ in range(2))
    near = np.asarray(near_of(np.arange(6) % 2))
    eta = jax.tree.map(np.asarray, index(d_ref, d_t, near, mask))
    for c in np.flatnonzero(mask):
        for values, group in ((eta.similar, near), (eta.dissimilar, ~near)):
            others = [k for k in range(6) if group[c, k] and k != c and mask[k]]
            expected = np.mean([100 * (d_ref[c, k] - d_t[c, k]) / d_ref[c, k] for k in others])
            assert values[c] == pytest.approx(expected, rel=1e-5)
    assert np.isnan(eta.similar[2])
    assert np.isnan(eta.dissimilar[2])


def test_coincident_references_are_left_out_and_counted():
    points = np.array([[1.1, 2.3], [1.1, 2.3], [0, 5], [7, 3.7]])
    d_ref = np.asarray(distances(points))
    assert d_ref[0, 1] == 0
    eta = index(d_ref, np.float32(0.5) * d_ref, near_of(np.array([0, 0, 1, 1])))
    np.testing.assert_array_equal(eta.coincident, [1, 1, 0, 0])
    np.testing.assert_allclose(eta.similar, [np.nan, np.nan, 50, 50], rtol=1e-5)
    np.testing.assert_allclose(eta.dissimilar, 50, rtol=1e-5)
    np.testing.assert_array_equal(distances(np.ones((4, 2))), 0)


def test_nan_shows(batch):
    d_ref = np.array(distances(REFERENCE))
    for place, part in (((0, 1), "similar"), ((0, 2), "dissimilar")):
        broken = d_ref.copy()
        broken[place] = np.nan
        for pair in ((d_ref, broken), (broken, d_ref)):
            assert np.isnan(np.asarray(getattr(index(*pair, NEAR), part))[0])
    assert np.isnan(distances(np.where(REFERENCE == 4, np.nan, REFERENCE))).all()


def test_gradients_are_finite_where_centroids_coincide():
    points = np.array([[1, 2], [1, 2], [1, 2], [0, 5.0]])
    gradient = jax.jit(jax.grad(lambda c: centroid_distances(c).sum() + centroid_distances(c, normalize=False).sum()))
    assert np.isfinite(gradient(points)).all()
    assert np.isfinite(gradient(np.ones((4, 2)))).all()


def test_similar_classes_by_hand():
    line = np.array([[0], [1], [3], [7], [7.5]])
    expected = np.zeros((5, 5), bool)
    expected[[0, 1, 2, 3, 4], [1, 0, 1, 4, 3]] = True
    np.testing.assert_array_equal(similar(line, 1), expected)
    np.testing.assert_array_equal(np.sum(np.asarray(similar(line, 2)), axis=1), 2)
    masked = similar(np.where(line == 1, np.nan, line), 3, np.array([True, False, True, True, True]))
    np.testing.assert_array_equal(masked, ~np.eye(5, dtype=bool) & (line != 1) & (line != 1).T)
    ties = similar(np.array([[0], [1], [-1], [2.0], [9]]), 1)
    np.testing.assert_array_equal(np.asarray(ties)[0], [False, True, False, False, False])


def test_superclasses():
    np.testing.assert_array_equal(
        near_of(np.array([4, 1, 4])), [[False, False, True], [False] * 3, [True, False, False]]
    )


def test_half_precision_is_upcast(batch):
    def distances_of(features, labels):
        found = class_centroids(features, labels, 5).centroids
        return found, centroid_distances(found.astype(jnp.bfloat16))

    for values in jax.eval_shape(distances_of, batch[0].astype(jnp.bfloat16), batch[1]):
        assert values.dtype == jnp.float32


def test_eight_devices_equal_one(batch, over_devices):
    step = jax.jit(lambda x, y, m: centroid_distances(class_centroids(x, y, 5, m).centroids))
    np.testing.assert_allclose(step(*over_devices(*batch)), step(*batch), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_mistakes():
    d = np.asarray(distances(REFERENCE))
    with pytest.raises(UserError, match="similar leaves class 1 without any similar class"):
        diffusion_index(d, d, NEAR & (np.arange(3) != 1)[:, None])
    with pytest.raises(UserError, match="similar leaves class 0 without any similar class"):
        jax.jit(lambda d: diffusion_index(d, d, NEAR, np.array([True, False, True])))(d)
    with pytest.raises(UserError, match="similar leaves class 2 without any dissimilar class"):
        diffusion_index(d, d, NEAR | (np.arange(3) == 2)[:, None])
    with pytest.raises(UserError, match=r"share one shape .* got \[3, 3\], \[2, 2\], \[3, 3\]"):
        diffusion_index(d, d[:2, :2], NEAR)
    with pytest.raises(UserError, match=r"labels and mask \[batch\], got \[3, 2\], \[2\]"):
        class_sums(REFERENCE, np.zeros(2, int), 3)
    with pytest.raises(UserError, match="num_classes must be positive"):
        class_centroids(REFERENCE, np.zeros(3, int), 0)
    with pytest.raises(UserError, match=r"mask must have the shape \[3\], got \[2\]"):
        centroid_distances(REFERENCE, np.ones(2, bool))
    with pytest.raises(UserError, match=r"centroids must have the shape \[classes, features\], got \[2\]"):
        centroid_distances(REFERENCE[0])
    with pytest.raises(UserError, match=r"m must lie in 1\.\.1 \(the number of classes - 2\), got 2"):
        similar_class_mask(REFERENCE, 2)
    with pytest.raises(UserError, match="reference_centroids must be finite"):
        similar_class_mask(np.where(REFERENCE == 4, np.nan, REFERENCE), 1)
    with pytest.raises(UserError, match=r"superclass must have the shape \[classes\]"):
        superclass_mask(np.zeros((2, 2), int))
