import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from jkd.errors import UserError
from jkd.quantize import ActQuant, DirectQuantConv, DirectQuantDense, activation_basis, direct, quantize_activation

X = jnp.abs(jax.random.normal(jax.random.key(0), (4, 8, 8, 3)))


@pytest.mark.parametrize(
    ("layer", "plain"),
    [
        (DirectQuantDense(5), linen.Dense(5)),
        (DirectQuantConv(6, stride=2, use_bias=True), linen.Conv(6, (3, 3), 2, padding=1)),
    ],
)
def test_layers_are_those_of_flax_with_chosen_levels(layer, plain):
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    kernel = direct()(variables["params"])["kernel"]
    assert len(np.unique(kernel)) == 4
    found, grad = jax.jit(jax.value_and_grad(lambda v: layer.apply(v, X).sum()))(variables)
    bias = variables["params"]["bias"]
    wanted = plain.apply({"params": {"kernel": kernel, "bias": bias}}, X)
    np.testing.assert_allclose(layer.apply(variables, X), wanted, rtol=1e-5, atol=1e-5)
    assert found == pytest.approx(float(wanted.sum()), rel=1e-4, abs=1e-3)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grad))


def test_bfloat16_layers_have_float32_gradients():
    layer = DirectQuantDense(5, dtype=jnp.bfloat16)
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    out, grad = jax.eval_shape(
        lambda v: (layer.apply(v, X), jax.grad(lambda v: layer.apply(v, X).sum().astype(jnp.float32))(v)), variables
    )
    assert out.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(grad)} == {jnp.dtype("float32")}


def test_the_basis_of_activations_follows_them_in_training_only():
    layer = ActQuant(2, momentum=0.5)
    variables = layer.init(jax.random.key(0), X, train=True)
    start = variables["quant_stats"]["basis"]
    np.testing.assert_allclose(start, activation_basis(2))
    found, moved = layer.apply(variables, 3 * X, train=True, mutable=["quant_stats"])
    np.testing.assert_allclose(found, quantize_activation(3 * X, start), rtol=1e-6)
    assert np.abs(moved["quant_stats"]["basis"] - start).max() > 0.05
    still, same = layer.apply(variables, 3 * X, train=False, mutable=["quant_stats"])
    np.testing.assert_array_equal(same["quant_stats"]["basis"], start)
    np.testing.assert_array_equal(still, found)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ActQuant(0), "bits must be an integer in 1..8"),
        (lambda: ActQuant(2, "enery"), "Did you mean 'energy'"),
        (lambda: ActQuant(2, momentum=1.0), r"momentum must lie in \[0, 1\), got 1.0"),
    ],
)
def test_mistakes(make, says):
    with pytest.raises(UserError, match=says):
        make()
