import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jkd import train

KEY = jax.random.key(0)
VARIABLES = {"params": {"w": jnp.array([2.0, -1.0])}, "batch_stats": {"mean": jnp.zeros(2)}}
BATCH = {"x": jnp.array([[1.0, 0.0], [0.0, 3.0]]), "y": jnp.array([0.0, 1.0])}


def squares(params, batch, key):
    return ((batch["x"] @ params["w"] - batch["y"]) ** 2).mean()


def test_create_state_splits_variables():
    state = train.create_state(VARIABLES, optax.sgd(0.1))
    np.testing.assert_array_equal(state.params["w"], [2, -1])
    assert state.model_state.keys() == {"batch_stats"}
    assert jax.tree.structure(state.variables) == jax.tree.structure(VARIABLES)
    bare = train.create_state({"params": {}}, optax.sgd(0.1))
    assert bare.model_state == {}
    assert bare.variables == {"params": {}}


def test_step_is_the_sgd_step_worked_out_by_hand():
    # Residuals (2, -4): loss (4 + 16) / 2 = 10, gradient 2/2 (2 * [1, 0] - 4 * [0, 3]) = [2, -12].
    step = train.make_train_step(squares, optax.sgd(0.1))
    state, metrics = jax.jit(step)(train.create_state(VARIABLES, optax.sgd(0.1)), BATCH, KEY)
    np.testing.assert_allclose(state.params["w"], [1.8, 0.2], rtol=1e-6)
    assert metrics.keys() == {"loss", "grad_norm"}
    np.testing.assert_allclose(metrics["loss"], 10, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], 148**0.5, rtol=1e-6)
    np.testing.assert_array_equal(state.model_state["batch_stats"]["mean"], [0, 0])


def test_momentum_lives_in_the_state():
    optimizer = optax.sgd(0.1, momentum=0.5)
    step = train.make_train_step(lambda params, batch, key: params["w"].sum(), optimizer)
    state = train.create_state({"params": {"w": jnp.zeros(1)}}, optimizer)
    for wanted in (-0.1, -0.25, -0.425):  # velocities 1, 1.5, 1.75
        state, _ = step(state, None, KEY)
        np.testing.assert_allclose(state.params["w"], [wanted], rtol=1e-6)


def test_aux_adds_metrics_and_passes_model_state():
    def loss_fn(params, batch, key):
        mean = {"batch_stats": {"mean": batch["x"].mean(0)}}
        return squares(params, batch, key), train.Aux({"accuracy": jnp.float32(0.25)}, mean)

    step = train.make_train_step(loss_fn, optax.sgd(0.1))
    state, metrics = step(train.create_state(VARIABLES, optax.sgd(0.1)), BATCH, KEY)
    assert metrics.keys() == {"loss", "grad_norm", "accuracy"}
    assert metrics["accuracy"] == 0.25
    np.testing.assert_allclose(state.model_state["batch_stats"]["mean"], [0.5, 1.5])
    np.testing.assert_allclose(state.params["w"], [1.8, 0.2], rtol=1e-6)


def test_aux_without_model_state_keeps_the_old_one():
    def loss_fn(params, batch, key):
        return squares(params, batch, key), train.Aux({})

    before = train.create_state(VARIABLES, optax.sgd(0.1))
    after, metrics = train.make_train_step(loss_fn, optax.sgd(0.1))(before, BATCH, KEY)
    assert after.model_state is before.model_state
    assert metrics.keys() == {"loss", "grad_norm"}


@pytest.mark.parametrize("seed", [0, 1])
def test_key_reaches_the_loss(seed):
    def loss_fn(params, batch, key):
        return jax.random.normal(key) + 0 * params["w"].sum()

    key = jax.random.key(seed)
    state = train.create_state(VARIABLES, optax.sgd(0.1))
    _, metrics = train.make_train_step(loss_fn, optax.sgd(0.1))(state, BATCH, key)
    np.testing.assert_allclose(metrics["loss"], jax.random.normal(key), rtol=1e-6)


def test_chain_applies_from_left_to_right():
    materialize = train.chain(lambda x: x + 1, lambda x: 2 * x)
    assert materialize(3) == 8
    assert train.chain()(3) == 3
