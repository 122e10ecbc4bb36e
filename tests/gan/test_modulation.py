"""Modulated weights: the spec's numbers, and the scale-activation form against weights for each example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd.errors import UserError
from jkd.gan.modulation import demodulation, modulated_conv, modulated_kernel

KERNEL = jnp.array([[1.0, 2.0], [3.0, -1.0]])
STYLE = jnp.array([2.0, 0.5])


def test_values_worked_out_by_hand():
    np.testing.assert_allclose(modulated_kernel(KERNEL, STYLE), [[0.8, 0.992278], [0.6, -0.124035]], atol=1e-6)
    np.testing.assert_allclose(modulated_conv(jnp.ones((1, 2)), KERNEL, STYLE[None])[0], [1.4, 0.868243], atol=1e-6)


def test_only_the_direction_of_a_style_counts_where_it_is_demodulated():
    both = modulated_kernel(KERNEL, STYLE), modulated_kernel(KERNEL, 7 * STYLE)
    np.testing.assert_allclose(*both, rtol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(both[0], axis=0), 1, rtol=1e-6)
    np.testing.assert_allclose(modulated_kernel(KERNEL, STYLE, demodulate=False), KERNEL * STYLE[:, None])


@pytest.mark.parametrize("demodulate", [True, False])
def test_scaled_activations_equal_weights_for_each_example(demodulate):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 4, 4, 5))
    kernel = jax.random.normal(keys[1], (3, 3, 5, 6))
    style = jax.random.normal(keys[2], (3, 5))

    @jax.jit
    def each(x, style):
        return jax.vmap(
            lambda x, s: jax.lax.conv_general_dilated(
                x[None],
                modulated_kernel(kernel, s, demodulate=demodulate),
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )[0]
        )(x, style)

    found = jax.jit(modulated_conv, static_argnames="demodulate")(x, kernel, style, demodulate=demodulate)
    np.testing.assert_allclose(found, each(x, style), rtol=1e-4, atol=1e-4)


def test_zeros_have_finite_gradients():
    grads = jax.grad(lambda k, s: demodulation(k, s).sum(), argnums=(0, 1))(jnp.zeros((2, 2)), jnp.zeros((1, 2)))
    assert all(jnp.isfinite(g).all() for g in grads)


def test_shapes_that_do_not_fit_are_refused(unchecked):
    with pytest.raises(UserError, match="kernel takes 2 channels, x has 3"):
        modulated_conv(jnp.ones((1, 3)), KERNEL, jnp.ones((1, 3)))
    with pytest.raises(UserError, match="x, kernel and style must be"):
        modulated_conv(jnp.ones((1, 2)), KERNEL, jnp.ones((2, 2)))
