import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads

from jkd import gan
from jkd.errors import UserError

KEY = jax.random.key(0)
FEATURES = arrays(np.float32, (4, 2, 3), elements=st.floats(0.125, 8, width=32) | st.floats(-8, -0.125, width=32))
ONE_APART = np.array([[1, 0], [1, 0], [0, 1]], np.float32)


@functools.partial(jax.jit, static_argnames="direction")
def consistency(target, source, direction="paper"):
    loss = functools.partial(gan.distance_consistency_loss, direction=direction)
    return jax.value_and_grad(loss, (0, 1))(target, source)


def test_consistency_by_hand():
    same = np.ones((3, 2), np.float32)
    # Two of three are alike: their neighbors have shares of sigmoid(1) and 1 - sigmoid(1) instead of a half each.
    for direction, pair in (("paper", (ONE_APART, same)), ("code", (same, ONE_APART))):
        assert consistency(*pair, direction)[0] == pytest.approx(2 / 3 * 0.110944, abs=1e-6)
        assert consistency(*pair[::-1], direction)[0] == pytest.approx(2 / 3 * 0.120114, abs=1e-6)
    assert consistency(ONE_APART, ONE_APART)[0] == 0
    each = gan.distance_consistency_loss(ONE_APART, same, reduction="none")
    np.testing.assert_allclose(each, [0.110944, 0.110944, 0], atol=1e-6)


@pytest.mark.parametrize("direction", ["paper", "code"])
def test_consistency_agrees_with_pytorch(direction):
    torch = pytest.importorskip("torch")
    target, source = np.random.default_rng(0).normal(size=(2, 5, 3, 2))
    t = torch.tensor(target, requires_grad=True)

    def neighbors(x):
        flat = x.reshape(5, -1)
        rows = [
            torch.stack([torch.cosine_similarity(flat[i], flat[j], dim=0) for j in range(5) if j != i])
            for i in range(5)
        ]
        return torch.softmax(torch.stack(rows), dim=1)

    # PyTorch's target comes second: KL(second || first).
    pair = (neighbors(t), neighbors(torch.tensor(source)))
    against, of = pair if direction == "code" else pair[::-1]
    expected = torch.nn.KLDivLoss(reduction="batchmean")(torch.log(against), of)
    expected.backward()
    with jax.enable_x64(True):
        value, (slope, _) = consistency(target, source, direction)
        loss = jax.jit(lambda t: gan.distance_consistency_loss(t, source, direction=direction))
        check_grads(loss, (jnp.asarray(target),), order=1, modes=["rev"])
    assert value == pytest.approx(expected.item(), rel=1e-10)
    np.testing.assert_allclose(slope, t.grad.numpy(), rtol=1e-8, atol=1e-12)


@given(target=FEATURES, source=FEATURES, scale=arrays(np.float32, 4, elements=st.floats(0.5, 4)))
def test_consistency_does_not_see_scale_or_order(target, source, scale):
    value, (to_target, to_source) = consistency(target, source)
    assert value >= -1e-6
    np.testing.assert_array_equal(to_source, 0)
    assert np.isfinite(to_target).all()
    scaled = consistency(target * scale[:, None, None], source * scale[::-1, None, None])[0]
    np.testing.assert_allclose(scaled, value, rtol=1e-4, atol=1e-5)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(consistency(target[order], source[order])[0], value, rtol=1e-4, atol=1e-5)


def test_consistency_of_zeros_bfloat16_and_nan():
    zero, some = np.zeros((4, 2, 3), np.float32), np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(consistency(zero, some)))
    low = consistency(some.astype(jnp.bfloat16), zero.astype(jnp.bfloat16))
    assert low[0].dtype == jnp.float32
    assert low[1][0].dtype == jnp.bfloat16
    assert low[0] == pytest.approx(float(consistency(some, zero)[0]), rel=0.02)
    some[0, 0, 0] = np.nan
    assert np.isnan(consistency(some, zero)[0])


def test_consistency_over_devices(over_devices):
    with jax.enable_x64(True):
        target, source = np.random.default_rng(0).normal(size=(2, 8, 6))
        alone, shared = consistency(target, source), consistency(*over_devices(target, source))
    for ours, theirs in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@jax.jit
def drawn(key, x):
    """A layer's gradient; those of the other layers are NaN where x is 0."""
    return jax.grad(lambda x: gan.select_layer(key, [lambda: x, lambda: 2 * x, lambda: 3 * x]))(x)


def test_layers_are_drawn_uniformly():
    keys = jax.random.split(KEY, 600)
    found = np.asarray(jax.vmap(lambda key: drawn(key, 1.0))(keys))
    assert all(abs((found == layer).mean() - 1 / 3) < 0.06 for layer in (1, 2, 3))
    assert drawn(KEY, 1.0) == drawn(KEY, 5.0)
    assert gan.select_layer(KEY, [lambda: jnp.float32(7)]) == 7


def test_layers_that_are_not_drawn_are_not_computed():
    draws = {int(drawn(jax.random.key(seed), 1.0)): jax.random.key(seed) for seed in range(20)}
    slope = jax.jit(lambda key, x: jax.grad(lambda x: gan.select_layer(key, [lambda: x, lambda: 0 / x, lambda: x]))(x))
    np.testing.assert_array_equal([slope(draws[layer], 0.0) for layer in (1, 2, 3)], [1, np.nan, 1])


def log_likelihood(params, example):
    x, y = example
    return -jnp.square(params["w"] @ x + params["b"] - y) / 2


def test_fisher_information_agrees_with_a_loop():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(7, 3)), draw.normal(size=7)
    params = {"w": draw.normal(size=3), "b": np.float64(0.5)}
    with jax.enable_x64(True):
        found = jax.jit(lambda params, examples: gan.fisher_information(log_likelihood, params, examples))(
            params, (x, y)
        )
    left = x @ params["w"] + params["b"] - y
    np.testing.assert_allclose(found["w"], np.square(left[:, None] * x).mean(0), rtol=1e-10)
    np.testing.assert_allclose(found["b"], np.square(left).mean(), rtol=1e-10)


def test_fisher_information_of_keys_in_bfloat16():
    def of_key(weight, key):
        return jnp.log(jax.nn.sigmoid((weight * jax.random.normal(key, (), weight.dtype)).astype(jnp.float32)))

    keys = jax.random.split(KEY, 64)
    found = gan.fisher_information(of_key, jnp.zeros((), jnp.bfloat16), keys)
    # At weight 0 the slope is half the latent.
    noise = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (), jnp.bfloat16))(keys), np.float32)
    assert found.dtype == jnp.float32
    assert found == pytest.approx(np.square(noise).mean() / 4, rel=0.02)
    assert np.isnan(gan.fisher_information(lambda w, x: w * x, 1.0, np.array([1, np.nan], np.float32)))


def test_elastic_penalty_by_hand():
    params, anchor = {"w": np.array([1, 2], np.float32)}, {"w": np.array([0, 5], np.float32)}
    fisher = {"w": np.array([4, 0.5], np.float32)}
    value, slopes = jax.value_and_grad(gan.ewc_penalty, (0, 1, 2))(params, anchor, fisher)
    assert value == 4 + 4.5
    np.testing.assert_array_equal(slopes[0]["w"], [8, -3])
    np.testing.assert_array_equal([slopes[1]["w"], slopes[2]["w"]], np.zeros((2, 2)))
    assert gan.ewc_penalty(anchor, anchor, fisher) == 0
    assert gan.ewc_penalty({}, {}, {}) == 0
    low = gan.ewc_penalty(*(jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree) for tree in (params, anchor, fisher)))
    assert (low, low.dtype) == (8.5, jnp.float32)


def test_frozen_leaves_do_not_move():
    params = {"block_0": {"kernel": jnp.ones(2)}, "block_1": {"kernel": jnp.ones(2)}, "head": jnp.ones(3)}
    labels = gan.freeze(params, ["^block_0/"])
    assert labels == {"block_0": {"kernel": "frozen"}, "block_1": {"kernel": "trained"}, "head": "trained"}
    optimizer = optax.partition({"trained": optax.sgd(1.0), "frozen": optax.set_to_zero()}, labels)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert jax.tree.map(lambda x: float(x[0]), updates) == {
        "block_0": {"kernel": 0},
        "block_1": {"kernel": -1},
        "head": -1,
    }
    assert set(jax.tree.leaves(gan.freeze(params, []))) == {"trained"}


def test_latents_lie_around_anchors():
    anchors = 10 * np.arange(4, dtype=np.float32)[:, None] * np.ones((1, 5), np.float32)
    found = np.asarray(gan.anchored_latents(KEY, anchors, 400))
    nearest = np.rint(found.mean(1) / 10).astype(int)
    assert np.bincount(nearest, minlength=4).min() > 60
    assert (found - anchors[nearest]).std() == pytest.approx(0.1, rel=0.1)
    assert np.unique(gan.anchored_latents(KEY, anchors, 64, sigma=0), axis=0).tolist() == anchors.tolist()
    assert gan.anchored_latents(KEY, np.ones((2, 3, 4), np.float32), 5).shape == (5, 3, 4)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    two = ONE_APART[:2]
    with pytest.raises(UserError, match="feat_t must hold at least 3 examples, got 2"):
        gan.distance_consistency_loss(two, two)
    with pytest.raises(UserError, match=r"feat_t and feat_s must have the same shape, got \[3, 2\] and \[2, 2\]"):
        gan.distance_consistency_loss(ONE_APART, two)
    with pytest.raises(UserError, match="Unknown direction 'codes'. Did you mean 'code'"):
        gan.distance_consistency_loss(ONE_APART, ONE_APART, direction="codes")
    with pytest.raises(UserError, match="losses must hold at least one function"):
        gan.select_layer(KEY, [])
    with pytest.raises(UserError, match=r"examples must share one leading axis of at least 1, got \[\(2,\), \(3,\)\]"):
        gan.fisher_information(log_likelihood, {}, (np.ones(2), np.ones(3)))
    with pytest.raises(UserError, match="examples must share one leading axis"):
        gan.fisher_information(log_likelihood, {}, np.ones(0))
    with pytest.raises(UserError, match="fisher must be a tree like params"):
        gan.ewc_penalty({"w": two}, {"w": two}, {"w": ONE_APART})
    with pytest.raises(UserError, match="anchor_params must be a tree like params"):
        gan.ewc_penalty({"w": two}, {"v": two}, {"w": two})
    with pytest.raises(UserError, match="'conv' is in no path of params. Paths: a/b"):
        gan.freeze({"a": {"b": 1.0}}, ["conv"])
    with pytest.raises(UserError, match=r"the regex '\(' cannot be read"):
        gan.freeze({"a": 1.0}, ["("])
    with pytest.raises(UserError, match="sigma must be >= 0 and finite, got -1"):
        gan.anchored_latents(KEY, two, 2, sigma=-1)
    with pytest.raises(UserError, match="batch must be positive, got 0"):
        gan.anchored_latents(KEY, two, 0)
    with pytest.raises(UserError, match=r"anchors must have the shape \[batch, ...\]"):
        gan.anchored_latents(KEY, two[:0], 2)
