import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jkd.errors import UserError
from jkd.quantize import (
    activation_basis,
    channel_weights,
    levels_from_basis,
    quantization_error,
    quantize_activation,
    quantize_by_thresholds,
    weighted_basis_update,
)

X = np.array([0.1, 0.4, 0.9, 1.6], np.float32)
TWO = np.stack([X, 2 * X], axis=1)
quantize = jax.jit(quantize_activation)


@jax.jit
def slope(x, basis):
    return jax.vjp(quantize_activation, x, basis)[1](jnp.ones(x.shape))


def settled(x, basis, mode, steps=50):
    """The basis after so many updates, each in full."""

    def better(_, basis):
        error = jnp.square(x - quantize_activation(x, basis)).mean(0)
        return weighted_basis_update(x, basis, channel_weights(x, mode, error=error))

    return jax.jit(lambda u: jax.lax.fori_loop(0, steps, better, u))(jnp.float32(basis))


# Values worked out by hand.


def test_levels_and_one_update_by_hand():
    basis = np.float32([0.5, 1])
    np.testing.assert_allclose(quantize(X, basis), [0, 0.5, 1, 1.5])
    found = weighted_basis_update(X[:, None], basis, np.ones(1, np.float32))
    np.testing.assert_allclose(found, [0.5, 1], atol=1e-5)
    assert np.square(quantize(X, basis) - X).mean() == pytest.approx(0.01, abs=1e-6)
    np.testing.assert_allclose(activation_basis(2), [0.449667, 0.899333], atol=1e-6)


def test_two_channels_of_unlike_size_by_hand():
    small = np.float32([0.1, 0.2, 0.3, 0.4])
    x = np.stack([small, 20 * small], axis=1)
    plain, aware = (settled(x, [0.5, 1.0], mode) for mode in ("uniform", "variance"))
    np.testing.assert_allclose(plain, [2.4, 4.4], atol=1e-3)
    np.testing.assert_allclose(quantization_error(x, quantize(x, plain)), [1.0, 0.02], atol=2e-3)
    np.testing.assert_allclose(aware, [0.302913, 5.798058], rtol=2e-3)
    np.testing.assert_allclose(quantization_error(x, quantize(x, aware)), [0.100085, 0.081080], rtol=2e-2)


def test_the_gradient_is_clipped_above_the_top_level():
    x = np.float32([-1, 0, 0.7, 1.5, 1.6])
    of_x, of_basis = slope(x, np.float32([0.5, 1]))
    np.testing.assert_array_equal(of_x, [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(of_basis, 0)
    np.testing.assert_array_equal(quantize(x, np.float32([0.5, 1])), [0, 0, 0.5, 1.5, 1.5])  # 0.75 is the threshold


def test_a_threshold_belongs_to_the_lower_level():
    found, index = quantize_by_thresholds(np.float32([0.25, 0.26, np.nan]), np.float32([0, 0.5, 1]))
    np.testing.assert_array_equal(found, [0, 0.5, np.nan])
    np.testing.assert_array_equal(index[:2], [0, 1])


# An oracle, and properties.


@pytest.mark.parametrize("mode", ["uniform", "variance", "energy"])
def test_the_update_is_weighted_least_squares(mode):
    x = np.abs(np.random.default_rng(0).normal(size=(30, 4))).astype(np.float32) * np.float32([1, 2, 5, 0.1])
    basis = np.float32([0.4, 1.1])
    weights = {"uniform": np.ones(4), "variance": 1 / (x.var(0) + 1e-5), "energy": 1 / (np.square(x).mean(0) + 1e-5)}
    np.testing.assert_allclose(channel_weights(x, mode), weights[mode], rtol=1e-5)
    levels = levels_from_basis(basis, signed=False)
    digits = np.asarray(levels.codes)[np.asarray(quantize_by_thresholds(x, levels.values)[1])]
    root = np.sqrt(weights[mode])
    wanted, *_ = np.linalg.lstsq((digits * root[:, None]).reshape(-1, 2), (x * root).ravel(), rcond=None)
    found = weighted_basis_update(x, basis, channel_weights(x, mode), delta=0.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@given(scale=st.floats(0.5, 8), mode=st.sampled_from(["uniform", "variance", "energy"]))
def test_the_basis_scales_with_the_activations(scale, mode):
    x = np.abs(np.random.default_rng(1).normal(size=(40, 3))).astype(np.float32)
    basis, scale = np.float32([0.3, 0.8]), np.float32(scale)
    found = weighted_basis_update(x, basis, channel_weights(x, mode), delta=0.0)
    again = weighted_basis_update(scale * x, scale * basis, channel_weights(scale * x, mode), delta=0.0)
    np.testing.assert_allclose(again, scale * found, rtol=2e-3)


def test_channels_of_equal_variance_count_alike():
    x = np.random.default_rng(2).permuted(
        np.repeat(np.abs(np.random.default_rng(3).normal(size=(50, 1))), 3, 1), axis=0
    )
    x = x.astype(np.float32)
    found = [
        weighted_basis_update(x, np.float32([0.3, 0.9]), channel_weights(x, mode)) for mode in ("uniform", "variance")
    ]
    np.testing.assert_allclose(*found, rtol=1e-3)


def test_what_is_scaled_up_no_longer_drowns_the_rest():
    draw = np.random.default_rng(4)
    x = np.abs(draw.normal(size=(200, 16))).astype(np.float32)
    x[:, :2] *= 30
    errors = {}
    for mode in ("uniform", "variance", "robust"):
        quantized = quantize(x, settled(x, activation_basis(2), mode))
        errors[mode] = np.median(quantization_error(x, quantized)), float(np.square(x - quantized).mean())
    assert errors["uniform"][0] > 0.9  # most channels are wiped out
    assert errors["variance"][0] < 0.5
    assert errors["robust"][0] < 0.9
    assert errors["variance"][1] > errors["uniform"][1]  # what is paid: the mean raw error


# The edges.


def test_dead_channels():
    x = np.zeros((10, 2), np.float32)
    x[:, 1] = 3.0
    np.testing.assert_array_equal(channel_weights(x, "variance"), 0)
    np.testing.assert_allclose(channel_weights(x, "energy"), [0, 1 / 9.00001], rtol=1e-5)
    basis = np.float32([0.4, 0.9])
    np.testing.assert_allclose(weighted_basis_update(x, basis, channel_weights(x)), basis, rtol=1e-5)
    dark = np.zeros((10, 2), np.float32)
    np.testing.assert_allclose(weighted_basis_update(dark, basis, np.ones(2, np.float32)), basis, rtol=1e-4)
    assert np.isfinite(channel_weights(dark, "robust", error=np.zeros(2, np.float32))).all()


def test_nan_shows():
    x = np.float32([[1, 2], [np.nan, 3]])
    assert np.isnan(quantize(x, np.float32([0.5, 1]))[1, 0])
    assert np.isnan(weighted_basis_update(x, np.float32([0.5, 1]), np.ones(2, np.float32))).any()


def test_eight_devices_equal_one(over_devices):
    x = np.abs(np.random.default_rng(5).normal(size=(64, 8))).astype(np.float32)

    @jax.jit
    def both(x):
        return weighted_basis_update(x, np.float32([0.4, 0.9]), channel_weights(x)), slope(x, jnp.float32([0.4, 0.9]))[
            0
        ]

    (spread,) = over_devices(x)
    for one, other in zip(both(spread), both(x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: channel_weights(TWO, "varience"), "Did you mean 'variance'"),
        (lambda: channel_weights(TWO, "robust"), 'mode="robust" weights channels by their error'),
        (lambda: weighted_basis_update(TWO, X[:2], np.ones(3)), r"weights must have the shape \[channels\] = \[2\]"),
        (lambda: quantization_error(TWO, TWO[:2]), "quantized must have the shape of x"),
        (lambda: quantize_by_thresholds(X, np.zeros((2, 2))), "levels must be a vector"),
        (lambda: activation_basis(0), "bits must be an integer in 1..8"),
    ],
)
def test_mistakes(call, says):
    with pytest.raises(UserError, match=says):
        call()
