import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jkd.errors import UserError
from jkd.gan import PatchwiseSelfAttention, ReferenceAttention, SelfAttention2D, dot_attention

T = np.array([[[1, 0], [0, 1], [1, 1]]], np.float32)
MAPS = np.random.default_rng(0).normal(size=(2, 2, 3, 3, 8)).astype(np.float32)
X, OTHER = MAPS
POSITIONS = arrays(np.float32, (1, 4, 2), elements=st.floats(-4, 4, width=32))
attend = jax.jit(dot_attention, static_argnames="scale")
KEY = jax.random.key(0)


def opened(variables):
    """The variables with gamma = 1."""
    return {"params": variables["params"] | {"gamma": jnp.ones(())}}


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def test_attention_by_hand():
    rows = [[0.422319, 0.155362, 0.422319], [0.155362, 0.422319, 0.422319], [0.211942, 0.211942, 0.576117]]
    np.testing.assert_allclose(attend(T, T, np.eye(3, dtype=np.float32)[None])[0], rows, atol=1e-6)
    out = [[0.844638, 0.577681], [0.577681, 0.844638], [0.788058, 0.788058]]
    np.testing.assert_allclose(attend(T, T, T)[0], out, atol=1e-6)
    reference = np.array([[[0, 0], [2, 0], [0, 2]]], np.float32)
    out = [[0.666667, 0.666667], [0.035337, 0.982332], [0.982332, 0.982332]]
    np.testing.assert_allclose(attend(reference, reference, T)[0], out, atol=1e-6)
    scaled = softmax(T[0] @ T[0].T / np.sqrt(2)) @ T[0]
    np.testing.assert_allclose(attend(T, T, T, scale=True)[0], scaled, atol=1e-6)


@given(x=POSITIONS)
def test_permuted_positions_and_rows_that_sum_to_one(x):
    order = np.array([2, 0, 3, 1])
    out = np.asarray(attend(x, x, x))
    np.testing.assert_allclose(attend(x[:, order], x[:, order], x[:, order]), out[:, order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(attend(x, x, np.ones_like(x)), 1, rtol=1e-5)


@pytest.fixture(scope="module")
def self_attention():
    module = SelfAttention2D(features=4, qk_dim=2)
    variables = jax.jit(module.init)(KEY, X)
    return module, variables, jax.jit(module.apply)


def test_a_fresh_block_is_the_identity(self_attention):
    _, variables, apply = self_attention
    np.testing.assert_array_equal(apply(variables, X), X)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes.pop("gamma") == ()
    widths = {"query": (8, 2), "key": (8, 2), "value": (8, 4), "out": (4, 8)}
    assert shapes == {name: {"kernel": shape} for name, shape in widths.items()}


def test_the_block_in_numpy(self_attention):
    _, variables, apply = self_attention
    w = {name: np.asarray(leaf["kernel"]) for name, leaf in variables["params"].items() if name != "gamma"}
    rows = X.reshape(2, 9, 8)
    weights = softmax((rows @ w["query"]) @ (rows @ w["key"]).transpose(0, 2, 1))
    expected = X + (weights @ (rows @ w["value"]) @ w["out"]).reshape(X.shape)
    np.testing.assert_allclose(apply(opened(variables), X), expected, rtol=1e-4, atol=1e-5)
    constant = np.asarray(apply(opened(variables), np.broadcast_to(X[:, :1, :1], X.shape)))
    np.testing.assert_allclose(constant, np.broadcast_to(constant[:, :1, :1], X.shape), rtol=1e-5, atol=1e-6)


def test_reference_attention(self_attention):
    _, variables, apply = self_attention
    module = ReferenceAttention(features=4, qk_dim=2)
    both = jax.jit(module.apply)
    variables = opened(variables)
    np.testing.assert_allclose(both(variables, X, X), apply(variables, X), rtol=1e-6)
    w = {name: np.asarray(leaf["kernel"]) for name, leaf in variables["params"].items() if name != "gamma"}
    rows, other = X.reshape(2, 9, 8), OTHER.reshape(2, 9, 8)
    weights = softmax((other @ w["query"]) @ (other @ w["key"]).transpose(0, 2, 1))
    expected = X + (weights @ (rows @ w["value"]) @ w["out"]).reshape(X.shape)
    np.testing.assert_allclose(both(variables, X, OTHER), expected, rtol=1e-4, atol=1e-5)


def test_the_sources_of_reference_attention_can_be_chosen(self_attention):
    _, variables, apply = self_attention
    module = ReferenceAttention(features=4, qk_dim=2, query_from="primary", key_from="primary")
    variables = opened(variables)
    np.testing.assert_allclose(jax.jit(module.apply)(variables, X, OTHER), apply(variables, X), rtol=1e-6)
    module = ReferenceAttention(features=4, qk_dim=2, value_from="reference")
    moved = jax.jit(module.apply)(variables, X, OTHER)
    np.testing.assert_allclose(moved, X + np.asarray(apply(variables, OTHER)) - OTHER, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def patchwise():
    module = PatchwiseSelfAttention(kernel_size=3, share_planes=4, qk_dim=2, hidden=5)
    return jax.jit(module.init)(KEY, X), jax.jit(module.apply)


def test_patchwise_in_numpy(patchwise):
    variables, apply = patchwise
    params = jax.tree.map(np.asarray, variables["params"])
    query, key, value = (X @ params[name]["kernel"] for name in ("query", "key", "value"))
    expected = X.copy()
    for b, i, j in np.ndindex(2, 3, 3):
        units = query[b, i, j] @ params["mlp_query"]["kernel"] + params["mlp_query"]["bias"]
        inside = [
            (p, i + p // 3 - 1, j + p % 3 - 1) for p in range(9) if 0 <= i + p // 3 - 1 < 3 and 0 <= j + p % 3 - 1 < 3
        ]
        for p, y, x in inside:
            units = units + key[b, y, x] @ params["mlp_keys"]["kernel"][p // 3, p % 3]
        scores = np.maximum(units, 0) @ params["mlp_out"]["kernel"] + params["mlp_out"]["bias"]
        weights = softmax(scores.reshape(9, 2)[[p for p, *_ in inside]], axis=0)
        for weight, (_, y, x) in zip(weights, inside, strict=True):
            expected[b, i, j] += np.tile(weight, 4) * value[b, y, x]
    np.testing.assert_allclose(apply(variables, X), expected, rtol=1e-4, atol=1e-5)


def test_patchwise_weights_sum_to_one_inside_the_map(patchwise):
    variables, apply = patchwise
    # Equal values everywhere: any weights that sum to 1 inside the map give them back, at its corners too.
    x = np.ones((1, 3, 3, 8), np.float32)
    value = x @ np.asarray(variables["params"]["value"]["kernel"])
    np.testing.assert_allclose(apply(variables, x), x + value, rtol=1e-5, atol=1e-6)


def test_patchwise_sees_its_patch_only(patchwise):
    variables, apply = patchwise
    moved = X.copy()
    moved[:, 2, 2] += 1
    changed = np.any(np.asarray(apply(variables, moved)) != np.asarray(apply(variables, X)), axis=(0, 3))
    np.testing.assert_array_equal(changed, [[False, False, False], [False, True, True], [False, True, True]])


def test_default_patchwise_parameters():
    shapes = jax.eval_shape(PatchwiseSelfAttention().init, KEY, jnp.zeros((1, 4, 4, 16)))["params"]
    assert shapes["query"]["kernel"].shape == (16, 2)
    assert shapes["mlp_keys"]["kernel"].shape == (7, 7, 2, 2)
    assert shapes["mlp_out"]["kernel"].shape == (2, 49 * 2)


def test_gradients_reach_all_parameters(self_attention, patchwise):
    def loss(apply, variables, x):
        return jnp.square(apply(variables, x)).sum()

    for variables, apply in ((opened(self_attention[1]), self_attention[2]), patchwise):
        slopes = jax.jit(jax.grad(lambda v, a=apply: loss(a, v, X)))(variables)
        assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slopes))
    fresh = jax.jit(jax.grad(lambda v: loss(self_attention[2], v, X)))(self_attention[1])["params"]
    assert fresh.pop("gamma") != 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(fresh))


@pytest.mark.parametrize(
    "module",
    [
        SelfAttention2D(4, 2, dtype=jnp.bfloat16),
        PatchwiseSelfAttention(3, 4, dtype=jnp.bfloat16),
    ],
)
def test_bfloat16(module):
    variables = jax.eval_shape(module.init, KEY, X)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    out = jax.eval_shape(module.apply, variables, X)
    assert (out.dtype, out.shape) == (jnp.bfloat16, X.shape)


def test_bfloat16_is_near(self_attention):
    module, variables, apply = self_attention
    low = jax.jit(module.clone(dtype=jnp.bfloat16).apply)(opened(variables), X)
    np.testing.assert_allclose(low.astype(np.float32), apply(opened(variables), X), atol=0.06)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("module", "maps", "message"),
    [
        (SelfAttention2D(4, 2), [X[0]], r"x must be floating point \[batch, height, width, channels\]"),
        (SelfAttention2D(4, 2), [X.astype(np.int32)], "x must be floating point.*int32"),
        (SelfAttention2D(4, 0), [X], "qk_dim must be at least 1, got 0"),
        (ReferenceAttention(4, 2), [X, X[:1]], r"same shape, got \[2, 3, 3, 8\] and \[1, 3, 3, 8\]"),
        (ReferenceAttention(4, 2, query_from="primry"), [X, X], "Unknown source 'primry'. Did you mean 'primary'"),
        (PatchwiseSelfAttention(4, 4), [X], "kernel_size must be odd.*got 4 and 4"),
        (PatchwiseSelfAttention(3, 3), [X], "share_planes must divide the 8 channels, got 3 and 3"),
    ],
)
def test_errors(module, maps, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(module.init, KEY, *maps)
