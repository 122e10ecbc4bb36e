"""The helpers around models: creating, training and evaluation calls, sharded batches."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jkd import nn
from jkd.errors import UserError

KEY = jax.random.key(0)
MODEL = nn.resnet8(5, width=4)


@pytest.fixture(scope="module")
def variables():
    return nn.init(MODEL, KEY, (8, 8, 3))


@pytest.fixture(scope="module")
def images():
    return 2 + 3 * jax.random.normal(jax.random.key(1), (16, 8, 8, 3))


def train_call(params, state, images):
    return nn.apply_train(MODEL.apply, params, state, images)


jitted_train_call = jax.jit(train_call)


def test_init_is_determined_by_the_key(variables):
    chex.assert_trees_all_equal(variables, nn.init(MODEL, jax.random.key(0), (8, 8, 3)))
    other = nn.init(MODEL, jax.random.key(1), (8, 8, 3))
    assert (other["params"]["head"]["kernel"] != variables["params"]["head"]["kernel"]).all()
    assert set(variables) == {"params", "batch_stats"}
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(lambda key: nn.init(MODEL, key, (8, 8, 3)), KEY), variables
    )


def test_init_can_be_created_sharded(variables):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    made = jax.jit(lambda key: nn.init(MODEL, key, (8, 8, 3)), out_shardings=replicated)(KEY)
    assert made["params"]["head"]["kernel"].sharding == replicated
    chex.assert_trees_all_close(made, variables, rtol=1e-6, atol=1e-7)


def test_init_names_a_bad_shape():
    with pytest.raises(UserError, match=r"image_shape must be the positive sizes .* got \(0, 8, 3\)"):
        nn.init(MODEL, KEY, (0, 8, 3))


def test_split_and_count(variables):
    params, state = nn.split(variables)
    assert set(state) == {"batch_stats"}
    assert nn.split({"params": params}) == (params, {})
    assert nn.count_parameters({"a": jnp.zeros((2, 3)), "b": [jnp.zeros(()), jnp.zeros(4)]}) == 11
    assert nn.count_parameters({}) == 0


def test_training_moves_the_statistics_by_a_tenth(variables, images):
    params, state = nn.split(variables)
    _, new = jitted_train_call(params, state, images)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    kernel = np.asarray(params["stem"]["conv"]["kernel"], np.float64)
    padded = np.pad(np.asarray(images, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    maps = sum(padded[:, i : i + 8, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3))
    got = new["batch_stats"]["stem"]["norm"]
    np.testing.assert_allclose(got["mean"], 0.1 * maps.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["var"], 0.9 + 0.1 * maps.var((0, 1, 2)), rtol=1e-4)


def test_evaluation_uses_the_statistics_and_keeps_them(variables, images):
    params, state = nn.split(variables)
    trained, new = jitted_train_call(params, state, images)
    apply = jax.jit(MODEL.apply)
    before = nn.apply_eval(apply, params, state, images)
    after = nn.apply_eval(apply, params, new, images)
    assert float(jnp.abs(before.logits - trained.logits).max()) > 1e-2
    assert float(jnp.abs(before.logits - after.logits).max()) > 1e-2
    _, updated = MODEL.apply({"params": params, **state}, images[:2], train=False, mutable=["batch_stats"])
    chex.assert_trees_all_equal(updated, state)
    # Evaluation treats rows alone: a batch of one gives the same row.
    one = nn.apply_eval(apply, params, state, images[3:4])
    np.testing.assert_allclose(one.logits, before.logits[3:4], rtol=1e-4, atol=1e-5)


def test_training_with_a_batch_of_one_is_finite(variables, images):
    out, state = jitted_train_call(*nn.split(variables), images[:1])
    chex.assert_tree_all_finite((out, state))


def test_jit_equals_eager(variables, images):
    params, state = nn.split(variables)
    with jax.disable_jit():
        eager = nn.apply_train(MODEL.apply, params, state, images)
    chex.assert_trees_all_close(jitted_train_call(params, state, images), eager, rtol=1e-4, atol=1e-5)


def test_a_sharded_batch_has_global_statistics(variables, images):
    """Eight devices with two images each: statistics of a device alone would differ by far."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, state = nn.split(variables)
    # Unlike rows: each device's own mean is far from the global one.
    images = images + jnp.arange(16.0)[:, None, None, None]
    one = jitted_train_call(params, state, images)
    replicated, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    spread = jax.device_put((params, state), replicated)
    eight = jitted_train_call(*spread, jax.device_put(images, rows))
    assert len(eight[0].logits.sharding.device_set) == 8
    chex.assert_trees_all_close(eight[1], one[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(eight[0].logits, one[0].logits, rtol=1e-5, atol=1e-5)


def test_a_pure_loss_has_gradients_for_every_parameter(variables, images):
    params, state = nn.split(variables)

    @jax.jit
    def gradients(params):
        def loss_fn(params):
            out, new = nn.apply_train(MODEL.apply, params, state, images)
            return (out.logits**2).mean(), new

        return jax.grad(loss_fn, has_aux=True)(params)

    grads, new = gradients(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))


def test_the_new_state_has_no_gradient(variables, images):
    params, state = nn.split(variables)

    def total(kernel):
        edited = {**params, "stem": {**params["stem"], "conv": {"kernel": kernel}}}
        _, new = nn.apply_train(MODEL.apply, edited, state, images)
        return sum(leaf.sum() for leaf in jax.tree.leaves(new))

    assert (jax.jit(jax.grad(total))(params["stem"]["conv"]["kernel"]) == 0).all()


def test_plain_functions_fit():
    def apply_fn(variables, x, train):
        return x @ variables["params"] * (2 if train else 1)

    weights, x = jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 4.0]])
    out, state = nn.apply_train(apply_fn, weights, {}, x)
    assert (float(out[0, 0]), state) == (22.0, {})
    assert float(nn.apply_eval(apply_fn, weights, {}, x)[0, 0]) == 11.0


def test_untouched_collections_survive_and_rngs_are_passed():
    def apply_fn(variables, x, train, mutable, rngs):
        assert train and sorted(mutable) == ["batch_stats", "constants"]
        return x + rngs["dropout"], {"batch_stats": variables["batch_stats"] + 1}

    state = {"batch_stats": jnp.zeros(()), "constants": jnp.ones(())}
    out, new = nn.apply_train(apply_fn, {}, state, jnp.ones(()), rngs={"dropout": 5})
    assert float(out) == 6
    assert {k: float(v) for k, v in new.items()} == {"batch_stats": 1, "constants": 1}
