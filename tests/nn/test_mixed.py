"""Low-precision products: what they compute in, and the dtype that gradients are accumulated and summed in."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jkd import nn, train
from jkd.nn import mixed
from jkd.train.collectives import collectives
from jkd.train.hlo import Program
from jkd.train.topology import topology_devices

BF16 = jnp.bfloat16
CONVS = {
    "plain": {},
    "strided": {"strides": 2, "padding": 1},
    "dilated": {"kernel_dilation": 2},
    "grouped": {"feature_group_count": 4},
}


def both(layer, x):
    """Output and gradients of a layer with Flax's casts, and with ours."""
    found, draw = [], np.random.default_rng(0)
    shapes = jax.eval_shape(lambda x: layer().init(jax.random.key(0), x), x)
    variables = jax.tree.map(lambda leaf: draw.uniform(-0.5, 0.5, leaf.shape).astype(leaf.dtype), shapes)
    for options in ({}, {"promote_dtype": mixed.promote}):
        ours = {"conv_general_dilated": mixed.conv_general_dilated} if layer.func is linen.Conv else None
        module = layer(**options, **((ours or {"dot_general": mixed.dot_general}) if options else {}))

        def loss(variables, x, module=module):
            out = module.apply(variables, x)
            return (out.astype(jnp.float32) ** 2).sum(), out

        gradients, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables, x)
        found.append((np.asarray(out), *jax.tree.map(np.asarray, gradients)))
    return found


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_convolutions_agree_with_flax(options):
    x = np.random.default_rng(1).normal(size=(2, 9, 9, 4)).astype(np.float32)
    for dtype, tolerance in ((jnp.float32, 1e-6), (BF16, 2e-2)):
        conv = functools.partial(linen.Conv, 8, (3, 3), use_bias=False, dtype=dtype, **options)
        flax, ours = both(conv, x)
        assert ours[0].dtype == flax[0].dtype == dtype
        for one, other in zip(jax.tree.leaves(flax), jax.tree.leaves(ours), strict=True):
            assert one.dtype == other.dtype
            one, other = one.astype(float), other.astype(float)
            scale = np.abs(one).max()
            np.testing.assert_allclose(one / scale, other / scale, atol=tolerance)


def test_dense_agrees_with_flax_and_keeps_its_bias_wide():
    x = np.random.default_rng(1).normal(size=(3, 5, 6)).astype(np.float32)
    flax, ours = both(functools.partial(linen.Dense, 7, dtype=BF16), x)
    assert (flax[0].dtype, ours[0].dtype) == (BF16, jnp.float32)
    for one, other in zip(jax.tree.leaves(flax), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(one.astype(float), other.astype(float), rtol=3e-2, atol=0.2)


def test_a_weight_s_gradient_is_accumulated_in_float32():
    x, kernel = np.ones((4097, 1), BF16), np.zeros((1, 1), np.float32)

    def loss(kernel, x):
        out = mixed.dot_general(x, kernel, (((1,), (0,)), ((), ())))
        return (out.astype(jnp.float32) * (1 / 16 + 1 / 1024)).sum()

    grad = np.asarray(jax.jit(jax.grad(loss))(kernel, x))
    assert grad.dtype == jnp.float32
    # The factor is exact in bfloat16's 8 bits, and the sum is not.
    assert grad[0, 0] == 4097 * (1 / 16 + 1 / 1024)


def test_float64_inputs_keep_the_gradients_of_float32_weights_wide():
    with jax.enable_x64(True):
        x = np.linspace(0.1, 1, 8)[:, None]
        kernel = np.ones((1, 1), np.float32)
        grad = jax.jit(jax.grad(lambda k, x: mixed.dot_general(x, k, (((1,), (0,)), ((), ()))).sum()))(kernel, x)
        np.testing.assert_array_equal(grad, np.float32(x.sum()))


MODELS = pytest.mark.parametrize("model", [nn.cnn(4, width=8, dtype=BF16), nn.mlp(4, hidden=(12, 20), dtype=BF16)])


def gradient_of(model):
    """The gradient of a loss, and abstract arguments for it."""
    variables = jax.eval_shape(lambda: nn.init(model, jax.random.key(0), (8, 8, 1)))
    params, model_state = nn.split(variables)

    def loss(params, images):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model_state)
        out, state = nn.apply_train(model.apply, params, zeros, images)
        return (out.logits**2).mean(), state

    return jax.grad(loss, has_aux=True), params, jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.float32)


def products(jaxpr):
    """The output shapes, sorted, and dtypes of all dense and convolutional products."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield sorted(equation.outvars[0].aval.shape), equation.outvars[0].aval.dtype
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            yield from products(inner) if hasattr(inner, "eqns") else ()


@MODELS
def test_gradients_of_weights_are_float32_products(model):
    gradient, params, images = gradient_of(model)
    kernels = [sorted(x.shape) for x in jax.tree.leaves(params) if x.ndim > 1]
    found = list(products(jax.make_jaxpr(gradient)(params, images).jaxpr))
    assert {dtype for shape, dtype in found if shape in kernels} == {jnp.dtype("float32")}
    assert sum(shape in kernels for shape, _ in found) == len(kernels)
    assert jnp.dtype(BF16) in {dtype for _, dtype in found}, "the rest is computed in bfloat16"


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jkd[tpu]'"
)
@MODELS
def test_a_tpu_sums_gradients_and_statistics_in_float32(model, no_cache):
    mesh = train.make_mesh(devices=topology_devices("v5e:2x2"))
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    gradient, params, images = gradient_of(model)
    jitted = jax.jit(gradient, in_shardings=(whole, rows), out_shardings=whole)
    found = collectives(Program(jitted.lower(params, images).compile().as_text()))
    assert {(one.kind, one.dtype) for one in found} == {("all-reduce", "f32")}
    assert sum(one.bytes for one in found) >= 4 * nn.count_parameters(params)


def test_forward_mode_works_in_one_precision():
    kernel = np.full((1, 1), 2, np.float32)

    def tangent_of(kernel):
        ones = jnp.ones((3, 1))
        return jax.jvp(lambda k: mixed.dot_general(ones, k, (((1,), (0,)), ((), ()))), (kernel,), (kernel,))[1]

    tangent = jax.jit(tangent_of)(kernel)
    np.testing.assert_array_equal(tangent, np.full((3, 1), 2.0))


def test_the_plain_products_are_lax_itself():
    x, w = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
    assert str(jax.make_jaxpr(lambda x, w: mixed.dot_general(x, w, (((1,), (0,)), ((), ()))))(x, w)) == str(
        jax.make_jaxpr(lambda x, w: lax.dot_general(x, w, (((1,), (0,)), ((), ()))))(x, w)
    )
