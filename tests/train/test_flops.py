"""FLOPs against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from jkd.train import flops, make_mesh


def count(fn, *shapes):
    return flops.count_flops(jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))


def convolve(x, kernel, stride=1, groups=1):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=dimensions, feature_group_count=groups
    )


def test_products():
    assert count(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert count(jnp.matmul, (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7
    assert count(lambda x: jnp.tanh(x) + x.sum(), (64, 64)) == 0


def test_an_ensemble_counts_every_member():
    assert count(jax.vmap(jnp.matmul), (8, 3, 5), (8, 5, 7)) == 8 * 2 * 3 * 5 * 7


def test_gradients_cost_a_product_each():
    both = jax.value_and_grad(lambda x, w: ((x @ w) ** 2).sum(), (0, 1))
    assert count(both, (3, 5), (5, 7)) == 3 * (2 * 3 * 5 * 7)
    of_weights = jax.value_and_grad(lambda w, x: ((x @ w) ** 2).sum())
    assert count(of_weights, (5, 7), (3, 5)) == 2 * (2 * 3 * 5 * 7)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_and_their_gradients(stride, groups):
    shapes = (2, 8, 8, 4), (3, 3, 4 // groups, 12)
    forward = 2 * (2 * (8 // stride) ** 2 * 12) * (3 * 3 * 4 // groups)

    def loss(x, kernel):
        return (convolve(x, kernel, stride, groups) ** 2).sum()

    assert count(lambda x, kernel: convolve(x, kernel, stride, groups), *shapes) == forward
    # What flows back costs twice what flows forward, whatever the stride: zeros between pixels are no work.
    assert count(jax.value_and_grad(loss, (0, 1)), *shapes) == 3 * forward


def test_loops_branches_and_calls():
    def scanned(x, w):
        return jax.lax.scan(lambda carry, _: (carry @ w, None), x, length=6)[0]

    def branched(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: (x @ w) @ w, lambda: x @ w)

    def looped(x, w):
        return jax.lax.while_loop(lambda y: y[0, 0] > 0, lambda y: y @ w, x)

    product = jax.custom_jvp(jnp.matmul)
    product.defjvps(None, None)
    one = 2 * 3 * 5 * 5
    assert count(scanned, (3, 5), (5, 5)) == 6 * one
    assert count(branched, (3, 5), (5, 5)) == 2 * one
    assert count(looped, (3, 5), (5, 5)) == one
    assert count(jax.jit(product), (3, 5), (5, 5)) == one
    again = jax.grad(jax.checkpoint(lambda x, w: (jnp.sin(x @ w) @ w).sum()))
    assert count(again, (3, 5), (5, 5)) == 5 * one  # two forward, one of these again, two back


def test_what_each_device_does_is_summed():
    mesh, whole = make_mesh(), jax.P(("slice", "data"))
    sharded = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(whole, jax.P()), out_specs=whole)
    assert count(sharded, (16, 5), (5, 7)) == count(jnp.matmul, (16, 5), (5, 7))
