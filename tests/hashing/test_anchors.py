"""Anchor graphs, k-means and spectral embeddings: hand-worked values, scikit-learn and scipy, degenerate sets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from sklearn.cluster import KMeans

from jkd import hashing
from jkd.errors import UserError

Z = np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]], np.float32)
A = np.array([[0.453333, 0.373333, 0.173333], [0.373333, 0.346667, 0.28], [0.173333, 0.28, 0.546667]])
PAIRS = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]], np.float32)
ROWS, ANCHORS, BITS = 64, 12, 6

graph = jax.jit(hashing.anchor_graph, static_argnums=2)
sparse = jax.jit(hashing.sparse_anchor_graph, static_argnums=2)
factor = jax.jit(hashing.graph_factor)
embed = jax.jit(hashing.spectral_embedding, static_argnums=1)


@functools.cache
def features(rows=ROWS, dim=5, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


@pytest.fixture(scope="module")
def anchors():
    return features()[:ANCHORS] + 0.1


def projector(v):
    return np.asarray(v, np.float64) @ np.asarray(v, np.float64).T


# --- k-means ---


def test_kmeans_goes_where_scikit_learn_goes():
    x = features(200)
    key = jax.random.key(3)
    start = np.asarray(hashing.kmeans(key, x, 7, iters=0))
    assert all((row == x).all(1).any() for row in start)
    wanted = KMeans(7, init=start, n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(x)
    found = hashing.kmeans(key, x, 7, iters=40)
    np.testing.assert_allclose(found, wanted.cluster_centers_, atol=1e-4)


def test_centers_without_rows_stay():
    x = np.repeat(np.array([[0.0, 1], [4, 5]], np.float32), 4, axis=0)
    found = np.asarray(hashing.kmeans(jax.random.key(0), x, 5, iters=3))
    assert {tuple(row) for row in found} == {(0, 1), (4, 5)}


def test_rows_over_devices_have_the_same_centers_and_graph(over_devices):
    with jax.enable_x64(True):
        x, key = np.asarray(features(), np.float64), jax.random.key(1)
        both = []
        for rows in (jnp.asarray(x), *over_devices(x)):
            centers = jax.jit(hashing.kmeans, static_argnums=2)(key, rows, ANCHORS)
            both.append((centers, graph(rows, centers, 3), sparse(rows, centers, 3).dense()))
        for one, other in zip(*both, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-12)


# --- graphs ---


def test_hand_worked_graph():
    h = np.asarray(hashing.graph_factor(Z))
    np.testing.assert_allclose(h @ h.T, A, atol=1e-6)
    np.testing.assert_allclose((h @ h.T).sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.eigvalsh(h @ h.T), [0, 0.346667, 1], atol=1e-6)
    np.testing.assert_allclose(scipy.linalg.svd(h)[1] ** 2, [1, 0.346667], atol=1e-6)


def test_weights_of_the_nearest_anchors(anchors):
    x = features()
    squares = ((x[:, None] - anchors[None]) ** 2).sum(-1).astype(np.float64)
    nearest = np.argsort(squares, 1, kind="stable")[:, :3]
    kept = np.take_along_axis(squares, nearest, 1)
    wanted = np.zeros((ROWS, ANCHORS))
    np.put_along_axis(wanted, nearest, np.exp(-kept / kept.mean()), 1)
    wanted /= wanted.sum(1, keepdims=True)
    np.testing.assert_allclose(graph(x, anchors, 3), wanted, atol=1e-5)
    np.testing.assert_allclose(hashing.anchor_graph(x, anchors, 3, bandwidth=float(kept.mean())), wanted, atol=1e-5)


def test_sparse_and_dense_factors_are_one(anchors):
    x = features()
    dense, few = factor(graph(x, anchors, 3)), factor(sparse(x, anchors, 3))
    np.testing.assert_allclose(few.dense(), dense, atol=1e-6)
    right = jax.random.normal(jax.random.key(0), (ANCHORS, 4))
    np.testing.assert_allclose(few.times(right), dense @ right, atol=1e-5)
    np.testing.assert_allclose(few.transposed_times(dense @ right), dense.T @ (dense @ right), atol=1e-5)
    np.testing.assert_allclose(hashing.centered_gram(few), hashing.centered_gram(dense), atol=1e-5)
    assert few.shape == dense.shape == (ROWS, ANCHORS)


def test_far_rows_have_weights_all_the_same(anchors):
    far = np.concatenate([features(), np.full((1, 5), 1e3, np.float32)])
    found = np.asarray(hashing.anchor_graph(far, anchors, 3, bandwidth=1.0))
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)


def test_rows_on_their_anchors():
    found = hashing.anchor_graph(np.ones((4, 2), np.float32), np.ones((3, 2), np.float32), 2)
    np.testing.assert_array_equal(found, np.broadcast_to([0.5, 0.5, 0], (4, 3)))


def test_a_traced_nan_is_seen(anchors):
    x = features().copy()
    x[3, 0] = np.nan
    assert np.isnan(graph(x, anchors, 3)[3]).any()


# --- embeddings ---


def test_two_blocks_are_one_split():
    found = hashing.spectral_embedding(hashing.graph_factor(PAIRS), 1)
    np.testing.assert_allclose(found.vectors[:, 0], [0.5, 0.5, -0.5, -0.5], atol=1e-6)
    np.testing.assert_allclose(found.singular, [1], atol=1e-6)


def test_embedding_is_the_truncated_svd(anchors):
    h = np.asarray(factor(graph(features(), anchors, 3)), np.float64)
    u, s, _ = scipy.linalg.svd(h - h.mean(0), full_matrices=False)
    found = embed(h.astype(np.float32), BITS)
    np.testing.assert_allclose(found.singular, s[:BITS], atol=1e-5)
    np.testing.assert_allclose(np.abs((found.vectors * u[:, :BITS]).sum(0)), 1, atol=1e-4)
    np.testing.assert_allclose(found.vectors.sum(0), 0, atol=1e-5)
    largest = np.abs(found.vectors).argmax(0)
    assert (np.asarray(found.vectors)[largest, np.arange(BITS)] > 0).all()


def test_anchors_without_rows_change_nothing(anchors):
    lonely = np.concatenate([anchors, np.full((2, 5), 50, np.float32)])
    weights = np.asarray(graph(features(), lonely, 3))
    assert (weights[:, ANCHORS:] == 0).all()
    found, without = embed(factor(weights), BITS), embed(factor(weights[:, :ANCHORS]), BITS)
    np.testing.assert_allclose(projector(found.vectors), projector(without.vectors), atol=1e-4)


def test_used_up_rank_is_completed_by_orthonormal_columns():
    """Three kinds of rows have two directions; the other columns are drawn."""
    h = hashing.graph_factor(np.eye(8, dtype=np.float32)[np.arange(12) % 3] * 0.9 + np.float32(0.1 / 8))
    found = hashing.spectral_embedding(h, 5, key=jax.random.key(4))
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(found.vectors.sum(0), 0, atol=1e-5)
    assert (np.asarray(found.singular) > 0).tolist() == [True, True, False, False, False]
    for k in range(3):
        same = np.asarray(found.vectors)[k::3, :2]
        np.testing.assert_allclose(same, np.broadcast_to(same[:1], same.shape), atol=1e-5)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_embedding_over_devices(anchors, over_devices, form):
    with jax.enable_x64(True):
        x = np.asarray(features(), np.float64)
        make = graph if form == "dense" else sparse
        (sharded,) = over_devices(x)
        one, eight = (embed(factor(make(rows, anchors.astype(np.float64), 3)), BITS) for rows in (x, sharded))
        np.testing.assert_allclose(projector(one.vectors), projector(eight.vectors), atol=1e-10)
        np.testing.assert_allclose(one.singular, eight.singular, atol=1e-12)


# --- mistakes ---


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: hashing.kmeans(jax.random.key(0), PAIRS, 5), "needs at least as many rows, got 4"),
        (lambda: hashing.kmeans(jax.random.key(0), PAIRS, 0), "clusters must be >= 1"),
        (lambda: hashing.kmeans(jax.random.key(0), PAIRS[0], 1), "[rows, dim]"),
        (lambda: hashing.anchor_graph(PAIRS, PAIRS, 5), "nearest must lie in [1, anchors], got 5 of 4"),
        (lambda: hashing.anchor_graph(PAIRS, Z[:, :1], 1), "equally long rows, got 2 and 1"),
        (lambda: hashing.anchor_graph(PAIRS * np.nan, PAIRS, 1), "x must be finite"),
        (lambda: hashing.anchor_graph(PAIRS, PAIRS, 1, bandwidth="median"), 'bandwidth must be "mean"'),
        (lambda: hashing.anchor_graph(PAIRS, PAIRS, 1, bandwidth=0.0), "bandwidth must be positive"),
        (lambda: hashing.graph_factor(-Z), "graph must be finite and >= 0"),
        (lambda: hashing.spectral_embedding(Z, 2), "2 bits need at least 3 rows and as many anchors"),
        (lambda: hashing.spectral_embedding(np.ones((3, 9), np.float32), 3), "3 bits need at least 4 rows"),
        (lambda: hashing.spectral_embedding(PAIRS * np.array([1, 0], np.float32), 1), "got 4 rows and 1 anchors"),
        (lambda: hashing.spectral_embedding(Z * np.nan, 1), "a factor must be finite"),
        (lambda: hashing.spectral_embedding(Z, 0), "bits must be at least 1"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(UserError) as error:
        call()
    assert says in str(error.value)
