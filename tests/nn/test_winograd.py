"""Minimal filtering against the convolution it replaces, and where it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jkd.nn import mixed, winograd
from jkd.nn.layers import conv

PLAIN = {"dimension_numbers": winograd.NHWC}
PADDED = ((1, 1), (1, 1))


def direct(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), PADDED, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.RandomState(seed).randn(*shape), dtype)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(winograd, "WORK", 0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-5)])
def test_it_is_the_direct_convolution(dtype, tolerance, monkeypatch):
    with jax.enable_x64(True):
        x, w = normal(0, 6, 8, 12, 5, dtype=dtype), normal(1, 3, 3, 5, 7, dtype=dtype)
        monkeypatch.setattr(winograd, "BLOCK", 2 * 6 * 7)  # three blocks of two images, whose six tiles are no square
        assert winograd.images_per_block(x.shape, w.shape) == 2
        found, expected = jax.jit(winograd.minimal)(x, w), np.asarray(direct(x, w))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_an_image_of_one_pixel_gives_the_flipped_kernel():
    x, w = jnp.zeros((1, 4, 4, 1)).at[0, 1, 2, 0].set(1.0), jnp.arange(9.0).reshape(3, 3, 1, 1)
    np.testing.assert_allclose(winograd.conv3x3(x, w)[0, :3, 1:, 0], w[::-1, ::-1, 0, 0], atol=1e-5)


def test_all_derivatives_are_those_of_the_direct_convolution():
    x, w, dx, dw = (normal(i, *shape) for i, shape in enumerate([(2, 4, 4, 3), (3, 3, 3, 2)] * 2))

    def derivatives(fn):
        def loss(x, w):
            return jnp.tanh(fn(x, w)).sum()

        def both(x, w):
            return jax.grad(loss, (0, 1))(x, w)

        return jax.jit(lambda *args: jax.jvp(both, args, (dx, dw)))(x, w)  # forward over reverse

    found, expected = derivatives(winograd.conv3x3), derivatives(direct)
    for ours, plain in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4 * float(jnp.abs(plain).max()))


def test_what_is_frozen_costs_no_convolution():
    x, w = normal(0, 2, 4, 4, 3), normal(1, 3, 3, 3, 2)

    def convolutions(argument):
        traced = jax.make_jaxpr(jax.grad(lambda x, w: winograd.conv3x3(x, w).sum(), argument))(x, w)
        return str(traced).count("= conv_general_dilated[")

    # One is the direct branch of the forward pass.
    assert [convolutions(argument) for argument in (0, 1, (0, 1))] == [2, 2, 3]


def test_vmapped_kernels_equal_a_loop():
    x, w = normal(0, 2, 4, 8, 3), normal(1, 5, 3, 3, 3, 2)
    found = jax.vmap(winograd.conv3x3, in_axes=(None, 0))(x, w)
    np.testing.assert_allclose(found, [direct(x, one) for one in w], atol=2e-4)


def test_accelerators_get_the_convolution_itself():
    traced = jax.jit(winograd.conv3x3).trace(normal(0, 2, 4, 4, 3), normal(1, 3, 3, 3, 2))
    for platform, ours in (("tpu", False), ("cuda", False), ("cpu", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" in text) != ours
        assert ("stablehlo.dot_general" in text) == ours


IMAGES, KERNEL = (8, 8, 8, 32), (3, 3, 32, 64)
MISFITS = {
    "stride": {"strides": (2, 2)},
    "padding": {"padding": ((0, 0), (0, 0))},
    "padding by name": {"padding": "SAME"},
    "dilated input": {"lhs_dilation": (2, 2)},
    "dilated kernel": {"rhs_dilation": (2, 2)},
    "groups": {"feature_group_count": 2},
    "layout": {"dimension_numbers": None},
    "precision": {"precision": lax.Precision.HIGHEST},
    "narrow type": {"dtype": jnp.bfloat16},
    "few channels": {"kernel": (3, 3, 32, 16)},
    "other kernel": {"kernel": (1, 1, 32, 64)},
    "no whole tiles": {"images": (8, 6, 8, 32)},
    "few tiles": {"images": (1, 8, 8, 32)},
}


def fits(images=IMAGES, kernel=KERNEL, dtype=jnp.float32, strides=(1, 1), padding=PADDED, **options):
    arrays = (jax.ShapeDtypeStruct(shape, dtype) for shape in (images, kernel))
    return winograd.fits(*arrays, strides, padding, **(PLAIN | options))


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_only_what_gains_is_replaced(one_device, change):
    assert fits()
    assert not fits(**change)


def test_little_work_is_not_worth_compiling(one_device, monkeypatch):
    monkeypatch.setattr(winograd, "WORK", 8 * 8 * 8 * 9 * 32 * 64)
    assert fits()
    assert not fits(images=(7, 8, 8, 32))


def test_it_can_be_switched_off(one_device):
    with winograd.direct_only():
        assert not fits()
    assert fits()


def test_several_devices_keep_the_convolution_that_can_be_partitioned():
    assert jax.device_count() > 1
    assert not fits()


def test_layers_take_it(one_device):
    layer = conv(64, 3, dtype=jnp.float32, param_dtype=jnp.float32, name="conv")
    x = normal(0, *IMAGES)
    variables = layer.init(jax.random.key(0), x)
    assert "dot_general" in str(jax.make_jaxpr(layer.apply)(variables, x))
    expected = direct(x, variables["params"]["kernel"])
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), expected, atol=1e-4)


def test_products_of_two_dtypes_are_left_alone(one_device):
    x, w = normal(0, *IMAGES, dtype=jnp.bfloat16), normal(1, *KERNEL)
    traced = jax.make_jaxpr(lambda x, w: mixed.conv_general_dilated(x, w, (1, 1), PADDED, **PLAIN))(x, w)
    assert "dot_general" not in str(traced)
