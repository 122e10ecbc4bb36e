"""The helpers around models: creating, training and evaluation calls, sharded batches."""

import functools

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
def variables(random_variables):
    return random_variables(MODEL, (8, 8, 3))


@pytest.fixture(scope="module")
def images():
    return 2 + 3 * np.random.default_rng(1).normal(size=(16, 8, 8, 3)).astype(np.float32)


def train_call(params, state, images):
    return nn.apply_train(MODEL.apply, params, state, images)


jitted_train_call = jax.jit(train_call)
evaluate = jax.jit(functools.partial(nn.apply_eval, MODEL.apply))


def test_init_is_determined_by_the_key():
    model = nn.mlp(3, hidden=(4,))
    first = nn.init(model, KEY, (5,))
    chex.assert_trees_all_equal(first, nn.init(nn.mlp(3, hidden=(4,)), jax.random.key(0), (5,)))
    other = nn.init(model, jax.random.key(1), (5,))
    assert (np.asarray(other["params"]["head"]["kernel"]) != np.asarray(first["params"]["head"]["kernel"])).all()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    sharded = jax.jit(lambda key: nn.init(model, key, (5,)), out_shardings=replicated)(KEY)
    assert sharded["params"]["head"]["kernel"].sharding == replicated
    chex.assert_trees_all_close(sharded, first, rtol=1e-6, atol=1e-7)


def test_init_names_a_bad_shape():
    with pytest.raises(UserError, match=r"image_shape must be the positive sizes .* got \(0, 8, 3\)"):
        nn.init(MODEL, KEY, (0, 8, 3))


def test_split_and_count(variables):
    params, state = nn.split(variables)
    assert set(state) == {"batch_stats"}
    assert nn.split({"params": params}) == (params, {})
    assert nn.count_parameters({"a": np.zeros((2, 3)), "b": [np.zeros(()), np.zeros(4)]}) == 11
    assert nn.count_parameters({}) == 0


def test_training_moves_the_statistics_by_a_tenth(variables, images):
    params, state = nn.split(variables)
    _, new = jitted_train_call(params, state, images)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    kernel = np.asarray(params["stem"]["conv"]["kernel"], np.float64)
    padded = np.pad(np.asarray(images, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    maps = sum(padded[:, i : i + 8, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3))
    old, got = (tree["batch_stats"]["stem"]["norm"] for tree in (state, new))
    for name, now in (("mean", maps.mean((0, 1, 2))), ("var", maps.var((0, 1, 2)))):
        np.testing.assert_allclose(got[name], 0.9 * old[name] + 0.1 * now, rtol=1e-4, atol=1e-5)


def test_evaluation_uses_the_statistics_and_keeps_them(variables, images):
    params, state = nn.split(variables)
    trained, new = jitted_train_call(params, state, images)
    before = evaluate(params, state, images)
    after = evaluate(params, new, images)
    for other in (trained, after):
        assert np.abs(np.asarray(before.logits) - np.asarray(other.logits)).max() > 1e-2
    apply = jax.jit(functools.partial(MODEL.apply, train=False, mutable=["batch_stats"]))
    _, updated = apply({"params": params, **state}, images)
    chex.assert_trees_all_equal(updated, state)
    # Evaluation treats rows alone: a batch of one gives the same row.
    one = evaluate(params, state, images[3:4])
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
    images = images + np.arange(16, dtype=np.float32)[:, None, None, None]
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
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_the_new_state_has_no_gradient(variables, images):
    params, state = nn.split(variables)

    def total(kernel):
        edited = {**params, "stem": {**params["stem"], "conv": {"kernel": kernel}}}
        _, new = nn.apply_train(MODEL.apply, edited, state, images)
        return sum(leaf.sum() for leaf in jax.tree.leaves(new))

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(params["stem"]["conv"]["kernel"]), 0)


def test_plain_functions_fit():
    def apply_fn(variables, x, train):
        return x @ variables["params"] * (2 if train else 1)

    weights, x = np.array([[1.0], [2.0]]), np.array([[3.0, 4.0]])
    out, state = nn.apply_train(apply_fn, weights, {}, x)
    assert (float(out[0, 0]), state) == (22.0, {})
    assert float(nn.apply_eval(apply_fn, weights, {}, x)[0, 0]) == 11.0


def test_untouched_collections_survive_and_rngs_are_passed():
    def apply_fn(variables, x, train, mutable, rngs):
        assert train
        assert sorted(mutable) == ["batch_stats", "constants"]
        return x + jax.random.uniform(rngs["dropout"]), {"batch_stats": variables["batch_stats"] + 1}

    state = {"batch_stats": jnp.zeros(()), "constants": jnp.ones(())}
    out, new = nn.apply_train(apply_fn, {}, state, jnp.ones(()), rngs={"dropout": KEY})
    assert out == 1 + jax.random.uniform(KEY)
    assert {k: float(v) for k, v in new.items()} == {"batch_stats": 1, "constants": 1}
