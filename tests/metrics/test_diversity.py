import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads
from scipy.spatial.distance import cdist

from jkd.errors import UserError
from jkd.metrics import (
    euclidean_distances,
    intra_cluster_distance,
    intra_cluster_distance_of_matrices,
    nearest_reference,
)

CENTERS = np.array([[0.0, 0], [10, 0]])
IMAGES = np.array([[0.0, 1], [0, -1], [1, 0], [10, 0], [10, 2]])
SAMPLES = arrays(np.float32, (9, 2), elements=st.integers(-6, 6).map(float))
REFERENCES = arrays(np.float32, (4, 2), elements=st.integers(-6, 6).map(float))
KEY = jax.random.key(0)
between = jax.jit(euclidean_distances)
of_samples = jax.jit(intra_cluster_distance, static_argnums=3, static_argnames="max_members")
of_matrices = jax.jit(intra_cluster_distance_of_matrices)


def expected(samples, references):
    nearest = cdist(samples, references).argmin(1)
    members = [samples[nearest == k] for k in range(len(references))]
    return [np.mean([np.linalg.norm(a - b) for a, b in itertools.combinations(x, 2)] or np.nan) for x in members]


def test_by_hand():
    for found in (of_samples(KEY, IMAGES, CENTERS), of_matrices(cdist(IMAGES, CENTERS), cdist(IMAGES, IMAGES))):
        np.testing.assert_allclose(found.distances, [1.609476, 2], atol=1e-6)
        assert found.mean == pytest.approx(1.804738, abs=1e-6)
        np.testing.assert_array_equal(found.members, [3, 2])
        assert found.skipped == 0


def test_clusters_of_one_are_skipped_and_counted():
    references = np.array([[0.0, 0], [10, 0], [50, 0], [10, 2]])
    found = of_samples(KEY, IMAGES, references)
    np.testing.assert_array_equal(found.members, [3, 1, 0, 1])
    np.testing.assert_allclose(found.distances, [1.609476, np.nan, np.nan, np.nan], atol=1e-6)
    assert found.mean == pytest.approx(1.609476, abs=1e-6)
    assert found.skipped == 3
    nothing = of_samples(KEY, IMAGES[3:], references)
    assert np.isnan(nothing.mean)
    assert nothing.skipped == 4


@given(samples=SAMPLES, references=REFERENCES)
def test_agrees_with_double_loops(samples, references):
    clusters = np.array(expected(samples, references))
    known = ~np.isnan(clusters)
    for found in (
        of_samples(KEY, samples, references),
        of_matrices(cdist(samples, references), cdist(samples, samples)),
    ):
        np.testing.assert_allclose(found.distances, clusters, rtol=1e-5)
        assert found.skipped == (~known).sum()
        assert found.members.sum() == len(samples)
        if known.any():
            assert found.mean == pytest.approx(clusters[known].mean(), rel=1e-5)


def test_a_draw_of_members():
    samples = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    reference = np.zeros((1, 2), np.float32)
    pairs = [np.mean(cdist(x, x)[np.triu_indices(3, 1)]) for x in map(np.array, itertools.combinations(samples, 3))]
    found = [of_samples(jax.random.key(i), samples, reference, max_members=3) for i in range(4)]
    for one in found:
        assert np.isclose(pairs, one.mean, rtol=1e-5).any()
        assert one.members == 12
    assert len({float(one.mean) for one in found}) > 1


def test_copies_have_no_diversity():
    samples = np.tile(np.random.default_rng(1).normal(size=(2, 3, 3, 1)), (4, 1, 1, 1)).astype(np.float32)
    np.testing.assert_array_equal(of_samples(KEY, samples, samples[:2]).distances, [0, 0])


def test_any_distance():
    def city_block(a, b):
        return jnp.abs(a[:, None] - b[None]).sum(-1)

    found = of_samples(KEY, IMAGES, CENTERS, city_block)
    np.testing.assert_allclose(found.distances, [2, 2], rtol=1e-6)

    def halved(a, b):
        return euclidean_distances(a / 2, b / 2)

    np.testing.assert_allclose(of_samples(KEY, IMAGES, CENTERS, halved).distances, [1.609476 / 2, 1], atol=1e-6)


def test_nearest():
    found = nearest_reference(np.array([[1.0, 1], [2, 1], [np.nan, 0], [np.inf, 3]]))
    np.testing.assert_array_equal(found, [0, 1, -1, 1])


def test_nan_stays():
    broken = np.where(np.arange(10).reshape(5, 2) == 3, np.nan, IMAGES)
    found = of_samples(KEY, broken, CENTERS)
    assert np.isnan([found.mean, *found.distances]).all()
    matrix = cdist(IMAGES, IMAGES)
    matrix[3, 4] = np.nan
    np.testing.assert_array_equal(np.isnan(of_matrices(cdist(IMAGES, CENTERS), matrix).distances), [False, True])


def test_euclidean_distances():
    a, b = np.random.default_rng(3).normal(1000, 1, size=(2, 4, 3, 2)).astype(np.float32)
    np.testing.assert_allclose(between(a, b), cdist(a.reshape(4, 6), b.reshape(4, 6)), rtol=1e-6)
    np.testing.assert_array_equal(np.diag(between(a, a)), 0)
    assert between(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)).dtype == jnp.float32
    assert np.isfinite(jax.jit(jax.grad(lambda x: euclidean_distances(x, a).sum()))(a)).all()
    with jax.enable_x64(True):
        check_grads(
            jax.jit(euclidean_distances), (a[:2].astype(np.float64), b[:2].astype(np.float64)), 1, modes=["rev"]
        )


def test_eight_devices_equal_one(over_devices):
    samples = np.random.default_rng(4).normal(size=(16, 3)).astype(np.float32)
    spread, one = (of_samples(KEY, x, samples[:3]) for x in (*over_devices(samples), samples))
    for a, b in zip(spread, one, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_mistakes():
    with pytest.raises(UserError, match=r"must have rows of one shape, got \[5, 2\] and \[2, 3\]"):
        intra_cluster_distance(KEY, IMAGES, np.ones((2, 3)))
    with pytest.raises(UserError, match=r"samples \(at least 2\)"):
        intra_cluster_distance(KEY, IMAGES[:1], CENTERS)
    with pytest.raises(UserError, match=r"references \(at least 1\)"):
        intra_cluster_distance(KEY, IMAGES, CENTERS[:0])
    with pytest.raises(UserError, match="max_members must be at least 2, got 1"):
        intra_cluster_distance(KEY, IMAGES, CENTERS, max_members=1)
    with pytest.raises(UserError, match=r"distance_fn must give the shape \[5, 2\], got \[5\]"):
        intra_cluster_distance(KEY, IMAGES, CENTERS, lambda a, b: a[:, 0])
    with pytest.raises(UserError, match=r"between must have the shape \[5, 5\], got \[2, 2\]"):
        intra_cluster_distance_of_matrices(cdist(IMAGES, CENTERS), np.ones((2, 2)))
    with pytest.raises(UserError, match=r"distances must have the shape \[samples, references\], got \[3, 0\]"):
        nearest_reference(np.ones((3, 0)))
    with pytest.raises(UserError, match=r"the rows of a and b must have the same shape, got \[2, 3\] and \[2, 2\]"):
        euclidean_distances(np.ones((2, 3)), np.ones((2, 2)))
