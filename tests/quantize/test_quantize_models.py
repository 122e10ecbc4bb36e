import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

from jkd import nn, train
from jkd.errors import UserError
from jkd.quantize import (
    ActQuant,
    DirectQuantConv,
    DirectQuantDense,
    activation_basis,
    activation_stats,
    calibrate,
    channel_weights,
    direct,
    fit_basis,
    low_bit_activations,
    quantization_error,
    quantize_activation,
    quantize_params,
    weighted_basis_update,
)

X = jnp.abs(jax.random.normal(jax.random.key(0), (4, 8, 8, 3)))


@pytest.mark.parametrize(
    ("layer", "plain"),
    [
        (DirectQuantDense(5), linen.Dense(5)),
        (DirectQuantConv(6, stride=2, use_bias=True), linen.Conv(6, (3, 3), 2, padding=1)),
    ],
)
def test_layers_are_those_of_flax_with_chosen_levels(layer, plain):
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    kernel = direct()(variables["params"])["kernel"]
    assert len(np.unique(kernel)) == 4
    found, grad = jax.jit(jax.value_and_grad(lambda v: layer.apply(v, X).sum()))(variables)
    bias = variables["params"]["bias"]
    wanted = plain.apply({"params": {"kernel": kernel, "bias": bias}}, X)
    np.testing.assert_allclose(layer.apply(variables, X), wanted, rtol=1e-5, atol=1e-5)
    assert found == pytest.approx(float(wanted.sum()), rel=1e-4, abs=1e-3)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grad))


def test_bfloat16_layers_have_float32_gradients():
    layer = DirectQuantDense(5, dtype=jnp.bfloat16)
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    out, grad = jax.eval_shape(
        lambda v: (layer.apply(v, X), jax.grad(lambda v: layer.apply(v, X).sum().astype(jnp.float32))(v)), variables
    )
    assert out.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(grad)} == {jnp.dtype("float32")}


def test_the_basis_of_activations_follows_them_in_training_only():
    layer = ActQuant(2, momentum=0.5)
    variables = layer.init(jax.random.key(0), X, train=True)
    start = variables["quant_stats"]["basis"]
    np.testing.assert_allclose(start, activation_basis(2))
    found, moved = layer.apply(variables, 3 * X, train=True, mutable=["quant_stats"])
    np.testing.assert_allclose(found, quantize_activation(3 * X, start), rtol=1e-6)
    assert np.abs(moved["quant_stats"]["basis"] - start).max() > 0.05
    still, same = layer.apply(variables, 3 * X, train=False, mutable=["quant_stats"])
    np.testing.assert_array_equal(same["quant_stats"]["basis"], start)
    np.testing.assert_array_equal(still, found)


# --- low-bit activations of any model ---

IMAGES = np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype(np.float32)
MODEL = nn.build("cnn", 5, width=4)
LOW = low_bit_activations(MODEL.apply, 2)
run_train = jax.jit(lambda params, state, images: nn.apply_train(LOW, params, state, images))
run_eval = jax.jit(lambda params, state, images: nn.apply_eval(LOW, params, state, images).logits)


class TwoLayers(linen.Module):
    """A dense layer, ReLU, and a dense layer named like the head of a model."""

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.relu(linen.Dense(6, name="hidden")(x))
        return linen.Dense(3, name="last")(inputs=x)


@pytest.fixture(scope="module")
def variables():
    found = nn.init(MODEL, jax.random.key(0), (8, 8, 1))
    return {**found, "quant_stats": activation_stats(MODEL.apply, found, (8, 8, 1), 2)}


def test_all_layers_but_the_first_and_last_have_bases(variables):
    stats = variables["quant_stats"]
    assert jax.tree.map(np.shape, stats) == {"block1": {"conv": {"basis": (2,)}}, "block2": {"conv": {"basis": (2,)}}}
    np.testing.assert_array_equal(stats["block1"]["conv"]["basis"], activation_basis(2))
    rules = ((r"^block1/", 3), (r"^stem/", 0), (r"^head/kernel", 1))
    stats = activation_stats(MODEL.apply, jax.eval_shape(lambda: variables), IMAGES, 2, rules=rules)
    assert sorted(x.size for x in jax.tree.leaves(stats)) == [1, 2, 3]


def test_a_dense_model_by_hand():
    model, x = TwoLayers(), np.abs(np.random.default_rng(1).normal(size=(16, 4))).astype(np.float32)
    start = model.init(jax.random.key(0), x)
    rules = (("last", 1),)
    stats = activation_stats(model.apply, start, (4,), 2, rules=rules)
    low = low_bit_activations(model.apply, 2, rules=rules, mode="energy", momentum=0.5)
    params, state = nn.split({**start, "quant_stats": stats})

    @jax.jit
    def wanted(params):
        quantized = quantize_activation(x, activation_basis(2))
        hidden = jax.nn.relu(quantized @ params["hidden"]["kernel"])
        out = quantize_activation(hidden, activation_basis(1)) @ params["last"]["kernel"]
        return out.sum(), (out, hidden)

    (_, (out, hidden)), grad = jax.value_and_grad(wanted, has_aux=True)(params)

    @jax.jit
    def found(params):
        out, moved = nn.apply_train(low, params, state, x)
        return out.sum(), (out, moved["quant_stats"])

    (_, (logits, moved)), slope = jax.value_and_grad(jax.checkpoint(found), has_aux=True)(params)
    np.testing.assert_allclose(logits, out, rtol=1e-5)
    for name in ("hidden", "last"):
        np.testing.assert_allclose(slope[name]["kernel"], grad[name]["kernel"], rtol=1e-4, atol=1e-6)
    for name, inputs, bits in (("hidden", x, 2), ("last", hidden, 1)):
        basis = activation_basis(bits)
        target = weighted_basis_update(inputs, basis, channel_weights(inputs, "energy"))
        np.testing.assert_allclose(moved[name]["basis"], (basis + target) / 2, rtol=1e-4)


def test_bases_come_back_with_the_state_and_stay_in_evaluation(variables):
    params, state = nn.split(variables)
    out, moved = run_train(params, state, IMAGES)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(moved), strict=True):
        assert np.abs(old - new).max() > 0
    assert out.logits.shape == (8, 5)
    plain = MODEL.apply(nn_variables(variables), IMAGES, train=False).logits
    low = run_eval(params, state, IMAGES)
    assert np.abs(low - plain).max() > 1e-3
    assert np.abs(run_eval(params, moved, IMAGES) - low).max() > 0  # the stored bases are those used


def nn_variables(variables):
    return {name: tree for name, tree in variables.items() if name != "quant_stats"}


def test_it_composes_with_low_bit_weights_seeds_and_rematerialization(variables):
    params, state = nn.split(variables)
    split = jax.jit(quantize_params)(params)

    def loss(split, state):
        out, moved = nn.apply_train(LOW, direct()(split), state, IMAGES)
        return jnp.square(out.logits).sum(), moved

    step = jax.value_and_grad(loss, has_aux=True)
    (value, moved), grad = jax.jit(step)(split, state)
    assert np.abs(grad["block1"]["conv"]["kernel"]["assignment"]).max() > 0
    double = jax.tree.map(lambda x: jnp.stack([x, x]), (split, state))
    again = jax.jit(jax.vmap(jax.value_and_grad(jax.checkpoint(loss), has_aux=True)))(*double)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(((value, moved), grad)), strict=True):
        for seed in one:
            np.testing.assert_allclose(seed, other, rtol=1e-3, atol=1e-4)


def test_statistics_are_those_of_the_batch_on_all_devices(variables, over_devices):
    params, state = nn.split(variables)
    (spread,) = over_devices(IMAGES)
    for one, other in zip(
        jax.tree.leaves(run_train(params, state, spread)),
        jax.tree.leaves(run_train(params, state, IMAGES)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_train_step_carries_the_bases(variables):
    optimizer = optax.sgd(0.1)

    def loss_fn(params, batch, key, state):
        out, moved = nn.apply_train(LOW, params, state, batch)
        return jnp.square(out.logits).mean(), train.Aux({}, moved)

    @jax.jit
    def step(state):
        fn = functools.partial(loss_fn, state=state.model_state)
        return train.make_train_step(fn, optimizer)(state, IMAGES, jax.random.key(0))

    state = train.create_state(variables, optimizer)
    before = float(state.model_state["quant_stats"]["block1"]["conv"]["basis"][0])
    state, first = step(state)
    for _ in range(3):
        state, last = step(state)
    assert last["loss"] < first["loss"]
    assert state.model_state["quant_stats"]["block1"]["conv"]["basis"][0] != before


def test_calibration_makes_small_errors_without_training(variables):
    scaled = {**variables, "params": jax.tree.map(lambda x: x, variables["params"])}
    norm = scaled["params"]["stem"]["norm"]
    scaled["params"]["stem"]["norm"] = {"scale": norm["scale"] * 1e-3, "bias": norm["bias"]}
    scaled["params"]["block1"]["conv"] = {"kernel": scaled["params"]["block1"]["conv"]["kernel"] * 1e3}
    plain = MODEL.apply(nn_variables(scaled), IMAGES, train=False).logits
    low = low_bit_activations(MODEL.apply, 4)
    stats = activation_stats(MODEL.apply, nn_variables(scaled), IMAGES, 4)
    start = {**scaled, "quant_stats": stats}
    ready = jax.jit(lambda v, x: calibrate(MODEL.apply, v, x, iterations=20))(start, IMAGES)
    errors = [np.abs(low(v, IMAGES, train=False).logits - plain).max() / np.abs(plain).max() for v in (start, ready)]
    assert errors[0] > 0.2  # activations a thousand times smaller than the basis: all 0
    assert errors[1] < 0.1
    assert ready["params"] is not None
    assert jax.tree.structure(ready) == jax.tree.structure(start)


def test_a_fit_serves_channels_of_all_sizes():
    x = np.abs(np.random.default_rng(4).normal(size=(200, 16))).astype(np.float32) * 1e-3
    x[:, :2] *= 30
    error = {
        mode: np.median(quantization_error(x, quantize_activation(x, fit_basis(x, 2, mode, iterations=20))))
        for mode in ("uniform", "variance")
    }
    assert error["uniform"] > 0.9
    assert error["variance"] < 0.5
    assert np.isfinite(fit_basis(x, 2, "robust", iterations=20)).all()
    dark = fit_basis(np.zeros((8, 2), np.float32), 2, iterations=2)
    np.testing.assert_allclose(dark, activation_basis(2), rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda v: LOW(nn_variables(v), IMAGES),
            "hold no basis for the inputs of block1/conv/kernel: activation_stats",
        ),
        (
            lambda v: low_bit_activations(MODEL.apply, 3)(v, IMAGES),
            "block1/conv/kernel must have 3 bits, got the shape",
        ),
        (lambda v: low_bit_activations(MODEL.apply, 9), "bits must be an integer in 1..8, got 9"),
        (lambda v: low_bit_activations(MODEL.apply, 2, mode="plain"), "Unknown mode 'plain'"),
        (lambda v: low_bit_activations(MODEL.apply, 2, momentum=-1), r"momentum must lie in \[0, 1\)"),
        (lambda v: low_bit_activations(lambda v, x, train: x, 2)(v, IMAGES), "No layer has low-bit activations"),
        (lambda v: low_bit_activations(MODEL.apply, 2, rules=((".", 0),))(v, IMAGES), "No layer has low-bit"),
        (lambda v: activation_stats(MODEL.apply, v, IMAGES, 2, rules=((".", 0),)), "No layer has low-bit"),
        (lambda v: activation_stats(MODEL.apply, v, IMAGES, 0), "bits must be an integer in 1..8, got 0"),
        (lambda v: calibrate(MODEL.apply, nn_variables(v), IMAGES), "No layer has low-bit activations"),
        (lambda v: calibrate(MODEL.apply, v, IMAGES, mode="plain"), "Unknown mode 'plain'"),
    ],
)
def test_mistakes_with_models(call, says, variables):
    with pytest.raises(UserError, match=says):
        call(variables)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ActQuant(0), "bits must be an integer in 1..8"),
        (lambda: ActQuant(2, "enery"), "Did you mean 'energy'"),
        (lambda: ActQuant(2, momentum=1.0), r"momentum must lie in \[0, 1\), got 1.0"),
    ],
)
def test_mistakes(make, says):
    with pytest.raises(UserError, match=says):
        make()
