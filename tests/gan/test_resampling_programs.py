"""Which form of a resizing convolution is traced, and that XLA's CPU backend does not slow its derivatives down."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd.gan import resampling
from jkd.nn import platform

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 8, 4)), jnp.float32)
KERNELS = {
    size: jnp.asarray(np.random.default_rng(size).normal(size=(size, size, 4, 8)), jnp.float32) for size in (3, 4)
}
SIZES = {"conv_down": 4, "conv_up": 4, "filtered_conv_down": 3, "filtered_conv_up": 3}
PLAIN = "b01f_01io->b01f"


def layouts(fn, kernel):
    """The layouts of all convolutions in the compiled gradient with respect to kernel and maps."""

    def loss(kernel, x):
        return jnp.sin(fn(x, kernel)).sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(kernel, X).compile().as_text()
    return set(re.findall(r"dim_labels=([^\s,]+)", text))


@pytest.mark.parametrize("name", SIZES)
def test_derivatives_are_plain_convolutions(name):
    """Those of other layouts take ten times as long: no fast kernel of the CPU backend knows them."""
    assert layouts(getattr(resampling, name), KERNELS[SIZES[name]]) == {PLAIN}


def test_platforms_decided_in_lowering_leave_other_layouts():
    """What the choice in `jkd.nn.platform` avoids; if this fails, XLA has learned it, and the choice may go."""

    @jax.jit
    def lowered(x, kernel):
        def without_stride(x, kernel):
            return resampling._down_without_stride(x, kernel, resampling.DOWN)

        return jax.lax.platform_dependent(x, kernel, cpu=without_stride, default=resampling.down_with_stride)

    assert layouts(lowered, KERNELS[4]) > {PLAIN}


@pytest.mark.parametrize("name", SIZES)
def test_forms_are_chosen_when_traced(name):
    def traced(target):
        with platform.tracing_for(target):
            # Another function each time: what is traced is kept by the function.
            made = jax.jit(lambda x, kernel: getattr(resampling, name)(x, kernel))
            return str(made.trace(X, KERNELS[SIZES[name]]).jaxpr), made(X, KERNELS[SIZES[name]])

    gaps = "lhs_dilation=(2, 2)" if "up" in name else "window_strides=(2, 2)"
    assert platform.target() == jax.default_backend() == "cpu"
    found = {target: traced(target) for target in ("cpu", "tpu", "gpu")}
    assert [gaps in text for text, _ in found.values()] == [False, True, True]
    np.testing.assert_allclose(found["tpu"][1], found["cpu"][1], rtol=1e-4, atol=1e-5)
    assert platform.target() == "cpu"


def test_the_target_is_given_back_after_an_error():
    def fail():
        with platform.tracing_for("tpu"):
            raise ValueError(platform.target())

    with pytest.raises(ValueError, match="tpu"):
        fail()
    assert platform.target() == "cpu"
