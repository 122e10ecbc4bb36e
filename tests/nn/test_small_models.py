"""MLP and CNN: hand values, taps, dtypes, faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd import nn
from jkd.errors import UserError

KEY = jax.random.key(0)


def test_mlp_by_hand():
    model = nn.MLP(hidden=(2,), num_classes=3)
    params = {
        "hidden1": {"kernel": jnp.array([[1.0, -1.0], [2.0, 0.0]]), "bias": jnp.array([0.5, 1.0])},
        "head": {"kernel": jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 4.0]]), "bias": jnp.array([0.0, 1.0, 0.0])},
    }
    # x W + b = (1 + 4 + 0.5, -1 + 1) = (5.5, 0) and (-3 + 0.5, 3 + 1) -> relu (0, 4).
    out = model.apply({"params": params}, jnp.array([[[1.0], [2.0]], [[-3.0], [0.0]]]))
    np.testing.assert_array_equal(out.features["hidden1"], [[5.5, 0.0], [0.0, 4.0]])
    np.testing.assert_array_equal(out.features["pool"], out.features["hidden1"])
    np.testing.assert_array_equal(out.logits, [[5.5, 1.0, 11.0], [0.0, 5.0, 16.0]])


def test_mlp_counts_and_linear_classifier():
    variables = jax.eval_shape(lambda: nn.init(nn.mlp(10), KEY, (28, 28, 1)))
    assert set(variables) == {"params"}
    assert nn.count_parameters(variables["params"]) == 785 * 256 + 257 * 256 + 257 * 10
    linear = nn.mlp(10, hidden=())
    variables = jax.eval_shape(lambda: nn.init(linear, KEY, (8, 8, 1)))
    assert nn.count_parameters(variables["params"]) == 65 * 10
    out = jax.eval_shape(linear.apply, variables, jnp.ones((2, 8, 8, 1)))
    assert out.features["pool"].shape == (2, 64)


def test_cnn_counts_and_taps():
    model = nn.cnn(10, width=4)
    variables = jax.eval_shape(lambda: nn.init(model, KEY, (28, 28, 1)))
    layers = [(1, 4), (4, 8), (8, 16)]
    assert nn.count_parameters(variables["params"]) == sum(9 * i * o + 2 * o for i, o in layers) + 17 * 10
    out = jax.eval_shape(model.apply, variables, jnp.zeros((3, 28, 28, 1)))
    assert {k: v.shape for k, v in out.features.items()} == {
        "stem": (3, 28, 28, 4),
        "block1": (3, 14, 14, 8),
        "block2": (3, 7, 7, 16),
        "pool": (3, 16),
    }


@pytest.mark.parametrize("model", [nn.mlp(5, hidden=(8,)), nn.cnn(5, width=4)], ids=["mlp", "cnn"])
def test_logits_read_the_pooled_vector(random_variables, model):
    variables = random_variables(model, (8, 8, 1))
    out = jax.jit(model.apply)(variables, jax.random.normal(KEY, (4, 8, 8, 1)))
    head = variables["params"]["head"]
    np.testing.assert_allclose(
        out.logits, out.features["pool"] @ head["kernel"] + head["bias"][None], rtol=1e-6, atol=1e-6
    )
    if "block2" in out.features:
        np.testing.assert_allclose(out.features["pool"], out.features["block2"].mean((1, 2)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet8"])
def test_bfloat16_computes_low_and_returns_float32(name):
    model = nn.build(name, 10, dtype="bfloat16")
    out = jax.eval_shape(lambda: model.apply(nn.init(model, KEY, (8, 8, 1)), jnp.zeros((1, 8, 8, 1))))
    assert out.logits.dtype == out.features["pool"].dtype == jnp.float32
    taps = {v.dtype for k, v in out.features.items() if k != "pool"}
    assert taps == {jnp.dtype(jnp.bfloat16)}


def test_faults_are_named():
    with pytest.raises(UserError, match="num_classes must be at least 2"):
        nn.MLP(num_classes=1)
    with pytest.raises(UserError, match="width must be at least 1, got 0"):
        nn.mlp(10, hidden=(4, 0))
    with pytest.raises(UserError, match="num_classes must be at least 2"):
        nn.CNN(num_classes=0)
    with pytest.raises(UserError, match="floating point, got int32"):
        nn.mlp(10).init(KEY, jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(UserError, match=r"got the shape \(1, 28, 28\)"):
        nn.cnn(10).init(KEY, jnp.zeros((1, 28, 28)))
