"""Variables without compiling an initialization."""

import jax
import numpy as np
import pytest

from jkd import nn


def _fill(path, leaf, rng):
    """A typical value: kernels of unit gain, scales and variances about 1, the rest about 0."""
    name = path[-1].key
    if name == "kernel":
        values = rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)
    else:
        values = (1 if name in ("scale", "var") else 0) + rng.uniform(-0.2, 0.2, leaf.shape)
    return values.astype(leaf.dtype)


@pytest.fixture(scope="session")
def random_variables():
    """A function (model, image_shape) -> variables in which no parameter or statistic is trivial."""

    def make(model, shape):
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(lambda: nn.init(model, jax.random.key(0), shape))
        # Cast by numpy and put whole: jnp.asarray would compile a program for each shape.
        return jax.device_put(jax.tree_util.tree_map_with_path(lambda path, leaf: _fill(path, leaf, rng), shapes))

    return make
