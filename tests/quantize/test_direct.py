import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jkd.errors import UserError
from jkd.quantize import (
    basis_update,
    chosen,
    direct_quantize,
    direct_quantize_binary,
    hard_onehot_ste,
    init_assignment,
    init_binary,
    init_levels,
    levels_from_basis,
    nearest_index,
    nearest_levels,
    weight_basis,
)

LEVELS = np.array([-1, -0.3, 0.3, 1], np.float32)
WEIGHTS = np.array([0.9, -0.2, 0.35, -1.1], np.float32)
G = np.array([0.1, -0.2, 0.3, 0.4], np.float32)
SCORES = arrays(np.float32, (6, 4), elements=st.floats(-5, 5, width=32))
quantize = jax.jit(direct_quantize, static_argnames="gradient")


@jax.jit
def slope(assignment, levels, g, tau=1.0):
    return jax.vjp(lambda a, v: direct_quantize(a, v, tau), assignment, levels)[1](g)


# Values worked out by hand.


def test_the_nearest_levels_by_hand():
    np.testing.assert_array_equal(nearest_index(WEIGHTS, jnp.asarray(LEVELS)), [3, 1, 2, 0])
    assignment = init_assignment(WEIGHTS, LEVELS)
    found = quantize(assignment, LEVELS)
    np.testing.assert_array_equal(found, LEVELS[[3, 1, 2, 0]])
    assert np.square(found - WEIGHTS).sum() == pytest.approx(0.0325, abs=1e-6)
    # d = 2 / 3: for 0.9, the gap to 1 is 0.15 d.
    assert assignment[0, 3] == pytest.approx(-(0.15**2), rel=1e-5)


def test_gradients_by_hand():
    assignment = init_assignment(WEIGHTS, LEVELS)
    _, of_levels = slope(assignment, LEVELS, G)
    np.testing.assert_allclose(of_levels, [0.4, -0.2, 0.3, 0.1], rtol=1e-6)
    _, back = jax.vjp(lambda a: direct_quantize(a, LEVELS, gradient="identity"), assignment)
    np.testing.assert_allclose(back(G)[0][0], [-0.1, -0.03, 0.03, 0.1], rtol=1e-6)
    row = np.array([[0, 0, 0, 1.0]], np.float32)
    of_row, _ = slope(row, LEVELS, np.float32([0.4]))
    np.testing.assert_allclose(of_row, [[-0.090971, -0.042005, -0.000034, 0.133010]], atol=1e-6)
    assert of_row.sum() == pytest.approx(0, abs=1e-7)


def test_levels_from_scratch_by_hand():
    # n = 9 * 32 outputs: 0.6745 sqrt(2 / 288) = 0.0562083.
    np.testing.assert_allclose(weight_basis((3, 3, 16, 32), 2), [0.0281042, 0.0562083], rtol=1e-5)
    found = levels_from_basis(np.float32([0.5, 1]), signed=True)
    np.testing.assert_allclose(found.values, [-1.5, -0.5, 0.5, 1.5])
    np.testing.assert_array_equal(found.codes, [[-1, -1], [1, -1], [-1, 1], [1, 1]])
    # A basis out of order, and one below 0: values and codes share one order.
    for basis in ([1.0, 0.5], [-0.5, 1.0]):
        found = levels_from_basis(np.float32(basis), signed=False)
        np.testing.assert_allclose(found.values, np.sort(found.codes @ np.float32(basis)))


# Oracles.


@given(scores=SCORES, tau=st.floats(0.3, 3))
def test_the_one_hot_form_has_the_same_value_and_gradient(scores, tau):
    @jax.jit
    def both(a, v, g, tau):
        value, back = jax.vjp(lambda a, v: hard_onehot_ste(a, tau) @ v, a, v)
        return value, back(g)

    g = np.linspace(-1, 2, 6, dtype=np.float32)
    value, (of_scores, of_levels) = both(scores, LEVELS, g, tau)
    np.testing.assert_allclose(quantize(scores, LEVELS, tau), value, atol=1e-6)
    found = slope(scores, LEVELS, g, tau)
    np.testing.assert_allclose(found[0], of_scores, atol=1e-5)
    np.testing.assert_allclose(found[1], of_levels, atol=1e-5)
    assert set(np.asarray(quantize(scores, LEVELS, tau)).tolist()) <= set(LEVELS.tolist())


def test_levels_are_those_of_k_means():
    cluster = pytest.importorskip("sklearn.cluster")
    weights = np.random.default_rng(0).normal(size=300).astype(np.float32)
    for bits in (1, 2, 3):
        found = init_levels(weights, bits, iterations=100)
        start = np.sort(weights)[((np.arange(2**bits) + 0.5) / 2**bits * 300).astype(int)]
        wanted = cluster.KMeans(2**bits, init=start[:, None], n_init=1, max_iter=100, tol=0).fit(weights[:, None])
        np.testing.assert_allclose(found, np.sort(wanted.cluster_centers_.ravel()), atol=2e-3)


def test_the_basis_is_that_of_least_squares():
    weights = np.random.default_rng(1).normal(size=(5, 40)).astype(np.float32)
    basis = np.float32([0.4, 0.9])
    found = levels_from_basis(basis, signed=True)
    codes = np.asarray(found.codes)[np.asarray(nearest_index(weights.ravel(), found.values))]
    wanted, *_ = np.linalg.lstsq(codes, weights.ravel(), rcond=None)
    np.testing.assert_allclose(basis_update(weights, basis, delta=0.0), wanted, rtol=1e-4)


# Properties.


def test_levels_for_each_channel():
    scores = np.random.default_rng(2).normal(size=(3, 5, 4)).astype(np.float32)
    levels = np.random.default_rng(3).normal(size=(5, 4)).astype(np.float32)
    found, back = jax.vjp(direct_quantize, scores, levels)
    g = np.random.default_rng(4).normal(size=(3, 5)).astype(np.float32)
    of_scores, of_levels = back(g)
    for c in range(5):
        one, back = jax.vjp(direct_quantize, scores[:, c], levels[c])
        np.testing.assert_array_equal(found[:, c], one)
        for whole, part in zip((of_scores[:, c], of_levels[c]), back(g[:, c]), strict=True):
            np.testing.assert_allclose(whole, part, rtol=1e-5, atol=1e-7)


def test_a_step_on_the_levels_lowers_the_loss():
    target = np.random.default_rng(5).normal(size=50).astype(np.float32)
    levels = np.float32([-1, -0.2, 0.1, 0.8])
    assignment = init_assignment(target, levels)

    def loss(v):
        return jnp.square(direct_quantize(assignment, v) - target).sum()

    value, of_levels = jax.value_and_grad(loss)(levels)
    assert loss(levels - 1e-3 * of_levels) < value
    # The levels' gradient is exact: to the next order, what the loss falls by.
    assert loss(levels - 1e-4 * of_levels) - value == pytest.approx(-1e-4 * np.square(of_levels).sum(), rel=0.05)


def test_many_levels_are_the_weights():
    weights = np.random.default_rng(6).normal(size=(20, 10)).astype(np.float32)
    levels = init_levels(weights, 8)
    found = quantize(init_assignment(weights, levels), levels)
    assert np.square(found - weights).mean() < 1e-4


def test_binary_codes():
    weights = np.random.default_rng(7).normal(size=(8, 6)).astype(np.float32)
    codes, basis = init_binary(weights, 2)
    found, back = jax.vjp(direct_quantize_binary, codes, basis)
    levels = levels_from_basis(basis, signed=True).values
    np.testing.assert_allclose(found, levels[nearest_index(weights, levels)], rtol=1e-6)
    g = np.random.default_rng(8).normal(size=(8, 6)).astype(np.float32)
    of_codes, of_basis = back(g)
    signs = np.where(np.asarray(codes) >= 0, 1, -1)
    np.testing.assert_allclose(of_basis, np.einsum("ij,ijb->b", g, signs), rtol=1e-4)
    np.testing.assert_allclose(of_codes, g[..., None] * np.asarray(basis), rtol=1e-5)
    # Outside the window there is no gradient; 0 counts as +1, and a NaN stays one.
    edge = np.float32([[0.0, 1.5], [-1.0, -1.5], [np.nan, 0.5]])
    found, back = jax.vjp(lambda a: direct_quantize_binary(a, np.float32([1, 2])), edge)
    np.testing.assert_array_equal(found, [3, -3, np.nan])
    np.testing.assert_array_equal(back(np.ones(3, np.float32))[0][:2], [[1, 0], [1, 0]])


def test_nearest_levels_pass_the_gradient_to_the_latent_weights():
    found, back = jax.vjp(lambda w, v: nearest_levels(w, v, learn_levels=True), WEIGHTS, LEVELS[::-1])
    np.testing.assert_array_equal(found, LEVELS[[3, 1, 2, 0]])
    of_weights, of_levels = back(G)
    np.testing.assert_array_equal(of_weights, G)
    np.testing.assert_allclose(of_levels[::-1], [0.4, -0.2, 0.3, 0.1], rtol=1e-6)
    fixed = jax.grad(lambda v: nearest_levels(WEIGHTS, v).sum())(LEVELS)
    np.testing.assert_array_equal(fixed, 0)


# The edges.


def test_a_constant_kernel_and_an_empty_level():
    levels = init_levels(np.full((3, 4), 0.5, np.float32), 2)
    np.testing.assert_array_equal(levels, 0.5)
    assignment = init_assignment(np.full((3, 4), 0.5, np.float32), levels)
    np.testing.assert_array_equal(quantize(assignment, levels), 0.5)
    of_scores, of_levels = slope(assignment, levels, np.ones((3, 4), np.float32))
    assert np.isfinite(of_scores).all()
    np.testing.assert_array_equal(of_levels, [12, 0, 0, 0])  # the first of equal scores; empty levels stay


def test_nan_shows():
    scores = np.float32([[0, 1], [np.nan, 0]])
    np.testing.assert_array_equal(quantize(scores, LEVELS[:2]), [LEVELS[1], np.nan])
    assert np.isnan(init_levels(np.float32([1, np.nan, 2]), 1)).all()
    assert np.isnan(nearest_levels(np.float32([np.nan]), LEVELS)).all()


def test_eight_devices_equal_one(over_devices):
    draw = np.random.default_rng(9)
    scores, g = draw.normal(size=(16, 6, 4)).astype(np.float32), draw.normal(size=(16, 6)).astype(np.float32)
    spread = over_devices(scores, g)
    found = slope(spread[0], LEVELS, spread[1])
    assert found[0].sharding.is_equivalent_to(spread[0].sharding, 3)
    for one, other in zip(found, slope(scores, LEVELS, g), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(chosen(spread[0]), scores.argmax(-1))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: init_levels(WEIGHTS, 0), "bits must be an integer in 1..8, got 0"),
        (lambda: init_levels(WEIGHTS, 9), "bits must be an integer in 1..8, got 9"),
        (lambda: init_levels(WEIGHTS[:0], 2), "kernel must hold weights"),
        (lambda: init_binary(WEIGHTS[:0], 2), "kernel must hold weights"),
        (lambda: direct_quantize(np.zeros((3, 4)), LEVELS[:3]), r"levels must have the shape.*got \[3\]"),
        (lambda: direct_quantize(np.zeros((3, 4)), LEVELS, 0.0), "tau must be positive"),
        (lambda: direct_quantize(np.zeros((3, 4)), LEVELS, gradient="soft"), "Did you mean 'softmax'"),
        (lambda: hard_onehot_ste(np.zeros((3, 4)), gradient="soft"), "Did you mean 'softmax'"),
        (lambda: direct_quantize_binary(np.zeros((3, 2)), LEVELS), r"basis must have the shape \[bits\]"),
        (lambda: levels_from_basis(np.zeros((2, 2)), signed=True), r"basis must have the shape \[bits\]"),
        (lambda: weight_basis((5,), 2), "shape must be that of a kernel"),
        (lambda: init_assignment(WEIGHTS, LEVELS[:1]), "levels must be a vector of at least 2"),
    ],
)
def test_mistakes(call, says):
    with pytest.raises(UserError, match=says):
        call()
