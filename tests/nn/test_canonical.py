"""Convolutions in one layout: the same values, whatever layouts derivatives ask for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jkd.nn import platform
from jkd.nn.canonical import canonical_convolutions

X, W = (
    np.random.RandomState(i).randn(*shape).astype(np.float32) for i, shape in enumerate([(2, 6, 8, 3), (3, 3, 3, 4)])
)


def convolve(x, w, stride=1):
    return lax.conv_general_dilated(x, w, (stride, 1), ((1, 1), (2, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def penalty(x, w, stride=2):
    """The squared slopes of something that is not linear, with custom derivatives and a jitted part."""
    slopes = jax.grad(lambda x: jax.nn.relu(jax.jit(convolve, static_argnums=2)(jnp.tanh(x), w, stride)).sum())(x)
    return jnp.square(slopes).sum()


def derivatives(x, w):
    return jax.value_and_grad(penalty, (0, 1))(x, w)


def layouts(fn):
    text = jax.jit(lambda go, *args: lax.cond(go, fn, shapes, *args)).lower(True, X, W).as_text()
    return set(re.findall(r"dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])", text))


def shapes(x, w):
    return jnp.zeros(()), (jnp.zeros_like(x), jnp.zeros_like(w))


def test_all_layouts_become_one_and_values_stay():
    assert layouts(canonical_convolutions(derivatives)) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
    assert len(layouts(derivatives)) > 1
    found, expected = jax.jit(canonical_convolutions(derivatives))(X, W), jax.jit(derivatives)(X, W)
    assert float(expected[0]) > 0
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [("NCHW", "OIHW", "NHWC"), ("NHWC", "HWIO", "NCHW"), ("CHWN", "IHWO", "HNWC")])
def test_any_layout(layout):
    turned = [np.transpose(array, ["NHWC".index(c) for c in layout[0]]) for array in (X,)]
    turned.append(np.transpose(W, ["HWIO".index(c) for c in layout[1]]))

    def fn(x, w):
        return lax.conv_general_dilated(x, w, (1, 2), ((0, 1), (1, 1)), rhs_dilation=(2, 1), dimension_numbers=layout)

    np.testing.assert_allclose(canonical_convolutions(fn)(*turned), fn(*turned), rtol=1e-4, atol=1e-5)


def test_trees_closures_and_accelerators():
    scale = jnp.asarray(2.0)
    fn = canonical_convolutions(lambda tree: {"y": [scale * tree["x"], 3.0, tree["x"]]})
    found = jax.jit(fn)({"x": X})
    np.testing.assert_array_equal(found["y"][0], 2 * X)
    assert float(found["y"][1]) == 3
    with platform.tracing_for("tpu"):
        assert len(layouts(canonical_convolutions(derivatives))) > 1
