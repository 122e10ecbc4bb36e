"""Low-bit training on one device and on eight, and where its arrays lie."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jkd import nn, quantize, train

RULES = [(r"^hidden1/", 0)]


def mesh(devices, fsdp=1):
    return train.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])


def start():
    """A small network, its low-bit parameters of two forms and the statistics of its activations, in float64."""
    model = nn.MLP((16, 12), 4, norm=True, dtype=jnp.float64, param_dtype=jnp.float64)
    variables = nn.init(model, jax.random.key(0), (8,))
    stats = quantize.activation_stats(model.apply, variables, (8,), 3, rules=RULES)
    params = quantize.quantize_params(variables["params"], 2, rules=[*RULES, ("^head/", 0)])
    params = quantize.quantize_params(params, 2, rules=RULES, form="binary")
    apply_fn = quantize.low_bit_activations(model.apply, 3, rules=RULES)
    return apply_fn, jax.device_get({**variables, "params": params, "quant_stats": stats})


def trained(apply_fn, variables, on):
    """20 steps on choices, levels, norms and bases."""

    # Adam makes large steps of gradients that are nothing but rounding: not here.
    groups = {"choices": optax.adam(0.2, eps=1e-3), "levels": optax.sgd(0.05, 0.9), "weights": optax.sgd(0.05, 0.9)}
    tx = optax.partition(groups, quantize.labels)

    def step(state, batch):
        params, opt_state, rest = state

        def loss_fn(params):
            out, new = nn.apply_train(apply_fn, quantize.direct()(params), rest, batch["x"])
            return optax.losses.softmax_cross_entropy_with_integer_labels(out.logits, batch["y"]).mean(), new

        (value, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, rest), value

    rules = [(".*", train.fsdp(min_size=1))]
    jitted = train.jit_step(step, on, rules=rules)
    rest = {name: variables[name] for name in ("batch_stats", "quant_stats")}
    state = train.place((variables["params"], tx.init(variables["params"]), rest), on, rules)
    draw = np.random.default_rng(1)
    for _ in range(20):
        batch = {"x": draw.normal(size=(32, 8)), "y": draw.integers(0, 4, 32)}
        state, _ = jitted(state, batch)
    return jax.device_get(state)


def test_low_bit_training_agrees_on_any_mesh():
    with jax.enable_x64(True):
        apply_fn, variables = start()
        wanted, other = (trained(apply_fn, variables, on) for on in (mesh(1), mesh(8, 4)))
    assert wanted[2]["quant_stats"]["head"]["basis"].dtype == np.float64
    before, after = (quantize.choices(params) for params in (variables["params"], wanted[0]))
    for kernel in ("hidden2/kernel", "head/kernel"):
        assert 0.05 < (before[kernel] != after[kernel]).mean() < 0.9
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), other, wanted)


@pytest.mark.parametrize(("form", "name"), [("onehot", "assignment"), ("binary", "codes")])
def test_choices_lie_like_their_weights(form, name):
    kernels = {
        "conv": {"kernel": np.ones((3, 3, 64, 128), np.float32)},
        "dense": {"kernel": np.ones((256, 64), np.float32)},
    }
    low = jax.eval_shape(lambda p: quantize.quantize_params(p, 2, rules=(), form=form), kernels)
    plain, split = (train.tree_shardings(tree, mesh(8, 4)) for tree in (kernels, low))
    for layer in kernels:
        assert plain[layer]["kernel"].spec == split[layer]["kernel"][name].spec
        assert "fsdp" in plain[layer]["kernel"].spec
