"""Perceptual distances, against loops over images, positions and channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jkd.errors import UserError
from jkd.metrics import intra_cluster_distance_of_matrices, pairwise_perceptual_distances, perceptual_distance

LAYERS = {"early": (4, 3, 5), "late": (2, 2, 7), "pool": (6,)}
distance = jax.jit(perceptual_distance)
pairwise = jax.jit(pairwise_perceptual_distances)


def draw(seed, count):
    rng = np.random.default_rng(seed)
    return {
        name: np.maximum(rng.normal(0.3, 1, (count, *shape)), 0).astype(np.float32) for name, shape in LAYERS.items()
    }


def head(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(0, 2, shape[-1]).astype(np.float32) for name, shape in LAYERS.items()}


def by_loops(a, b, weights):
    total = 0
    for name in LAYERS:
        x, y, w = (np.asarray(part, float) for part in (a[name], b[name], weights[name]))
        positions = list(np.ndindex(x.shape[:-1]))
        for p in positions:
            units = [v[p] / max(np.linalg.norm(v[p]), 1e-12) for v in (x, y)]
            total += (w * (units[0] - units[1]) ** 2).sum() / len(positions)
    return total


def rows(features, i):
    return {name: values[i] for name, values in features.items()}


@pytest.mark.parametrize("weighted", [False, True])
def test_both_agree_with_loops(weighted):
    a, b = draw(0, 4), draw(1, 3)
    weights = head(2) if weighted else None
    plain = weights or {name: np.ones(shape[-1]) for name, shape in LAYERS.items()}
    want = np.array([[by_loops(rows(a, i), rows(b, j), plain) for j in range(3)] for i in range(4)])
    np.testing.assert_allclose(pairwise(a, b, weights), want, rtol=1e-5)
    np.testing.assert_allclose(distance(rows(a, slice(3)), b, weights), np.diag(want), rtol=1e-5)


def test_by_hand():
    # Right angles at one position of two, nothing at the other: 2 / 2; opposite vectors: 4; lengths do not count.
    a = {"map": np.array([[[[3.0, 0], [0, 5]]]]), "pool": np.array([[1.0, 1]])}
    b = {"map": np.array([[[[0.0, 2], [0, 1]]]]), "pool": np.array([[-3.0, -3]])}
    assert distance(a, b)[0] == pytest.approx(5, rel=1e-6)
    assert distance(a, b, {"map": np.array([3.0, 1]), "pool": np.array([0.5, 0.0])})[0] == pytest.approx(3, rel=1e-6)
    np.testing.assert_array_equal(distance(a, a), [0])


def test_scale_does_not_count_and_copies_are_near_zero():
    a, b = draw(3, 4), draw(4, 4)
    scaled = {name: 100 * values for name, values in a.items()}
    np.testing.assert_allclose(distance(scaled, b), distance(a, b), rtol=1e-5)
    np.testing.assert_allclose(np.diag(pairwise(a, scaled)), 0, atol=2e-6)
    assert (pairwise(a, a) >= 0).all()
    low = {name: jnp.asarray(values, jnp.bfloat16) for name, values in a.items()}
    assert distance(low, b).dtype == pairwise(low, b).dtype == jnp.float32
    np.testing.assert_allclose(distance(low, b), distance(a, b), rtol=0.03)


def test_gradients():
    a, b = draw(5, 2), draw(6, 2)
    dead = {name: np.zeros_like(values) for name, values in a.items()}
    for fn in (perceptual_distance, pairwise_perceptual_distances):
        slope = jax.jit(jax.grad(lambda x, y, fn=fn: fn(x, y).sum(), argnums=(0, 1)))
        for first in (dead, b):
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope(first, b)))
    with jax.enable_x64(True):
        wide = [{"pool": np.asarray(x["pool"], float) + 0.1} for x in (a, b)]
        check_grads(jax.jit(pairwise_perceptual_distances), tuple(wide), 1, modes=["rev"])


def test_intra_cluster_distance_takes_the_matrices(over_devices):
    samples, references = draw(7, 8), draw(8, 2)
    found = intra_cluster_distance_of_matrices(pairwise(samples, references), pairwise(samples, samples))
    nearest = np.asarray(pairwise(samples, references)).argmin(1)
    between = np.asarray(pairwise(samples, samples))
    members = np.flatnonzero(nearest == 0)
    want = np.mean([between[i, j] for i in members for j in members if i < j])
    assert found.distances[0] == pytest.approx(want, rel=1e-5)
    (spread,) = over_devices(samples)
    np.testing.assert_allclose(pairwise(spread, samples), between, atol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_mistakes():
    a = {"map": np.ones((2, 3, 3, 4)), "pool": np.ones((2, 4))}
    with pytest.raises(UserError, match=r"features_b must have the layers of features_a, \['map', 'pool'\], got \['p"):
        perceptual_distance(a, {"pool": a["pool"]})
    with pytest.raises(UserError, match=r"weights must have the layers of features_a"):
        perceptual_distance(a, a, {"map": np.ones(4)})
    with pytest.raises(UserError, match=r"the weights of 'pool' must have the shape \[4\], got \[3\]"):
        perceptual_distance(a, a, {"map": np.ones(4), "pool": np.ones(3)})
    with pytest.raises(UserError, match=r"the maps 'pool' of both must have the same shape, got \[2, 4\] and \[1, 4\]"):
        perceptual_distance(a, {**a, "pool": a["pool"][:1]})
    with pytest.raises(UserError, match=r"all layers must be of the same images, got the numbers \[\(2, 1\), \(2, 2\)"):
        pairwise_perceptual_distances(a, {**a, "pool": a["pool"][:1]})
    with pytest.raises(UserError, match=r"the map 'x' must be \[batch, height, width, channels\].*got \[2, 3, 4\]"):
        perceptual_distance({"x": np.ones((2, 3, 4))}, {"x": np.ones((2, 3, 4))})
    with pytest.raises(UserError, match="features_a must have at least one layer"):
        perceptual_distance({}, {})
    with pytest.raises(UserError, match="x must be floating point, got int"):
        perceptual_distance({"x": np.ones((2, 3), int)}, {"x": np.ones((2, 3), int)})
