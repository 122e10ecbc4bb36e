import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jkd.errors import UserError
from jkd.gan import (
    DynamicFilter,
    PatchwiseSelfAttention,
    ReferenceAttention,
    SelfAttention2D,
    TokenAttention,
    dot_attention,
)

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
        inside = neighbors(i, j)
        for p, y, x in inside:
            units = units + key[b, y, x] @ params["mlp_keys"]["kernel"][p // 3, p % 3]
        scores = np.maximum(units, 0) @ params["mlp_out"]["kernel"] + params["mlp_out"]["bias"]
        weights = softmax(scores.reshape(9, 2)[[p for p, *_ in inside]], axis=0)
        for weight, (_, y, x) in zip(weights, inside, strict=True):
            expected[b, i, j] += np.tile(weight, 4) * value[b, y, x]
    np.testing.assert_allclose(apply(variables, X), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def dynamic():
    module = DynamicFilter(kernel_size=3, share_planes=4, hidden=5)
    return jax.jit(module.init)(KEY, X), jax.jit(module.apply)


def neighbors(i, j):
    """Place in the 3 x 3 patch and position of all that lie in the 3 x 3 map."""
    found = [(p, i + p // 3 - 1, j + p % 3 - 1) for p in range(9)]
    return [(p, y, x) for p, y, x in found if 0 <= y < 3 and 0 <= x < 3]


@pytest.mark.parametrize("normalize", [True, False])
def test_dynamic_filters_in_numpy(dynamic, normalize):
    variables, _ = dynamic
    params = jax.tree.map(np.asarray, variables["params"])
    value, expected = X @ params["value"]["kernel"], X.copy()
    for b, i, j in np.ndindex(2, 3, 3):
        around = neighbors(i, j)
        units = params["context"]["bias"] + sum(
            X[b, y, x] @ params["context"]["kernel"][p // 3, p % 3] for p, y, x in around
        )
        units = np.where(units > 0, units, 0.01 * units)
        filters = (units @ params["filters"]["kernel"] + params["filters"]["bias"]).reshape(9, 2)
        filters = filters[[p for p, *_ in around]]
        filters = softmax(filters, axis=0) if normalize else filters
        for weight, (_, y, x) in zip(filters, around, strict=True):
            expected[b, i, j] += np.tile(weight, 4) * value[b, y, x]
    apply = DynamicFilter(kernel_size=3, share_planes=4, hidden=5, normalize=normalize).apply
    np.testing.assert_allclose(jax.jit(apply)(variables, X), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def tokens():
    module = TokenAttention(tokens=3, rounds=2, qk_dim=2)
    return jax.jit(module.init)(KEY, X), jax.jit(module.apply)


def test_token_attention_in_numpy(tokens):
    variables, apply = tokens
    params = jax.tree.map(np.asarray, variables["params"])
    rows, found = X.reshape(2, 9, 8), None
    for name in ("round1", "round2"):
        of = params[name]
        w = {part: leaf["kernel"] for part, leaf in of.items() if part != "groups"}
        groups = of["groups"] if found is None else found @ of["groups"]["kernel"]
        pooled = np.swapaxes(softmax(rows @ np.swapaxes(groups, -1, -2), axis=1), 1, 2) @ rows
        scores = (pooled @ w["token_query"]) @ np.swapaxes(pooled @ w["token_key"], 1, 2)
        pooled = pooled + softmax(scores) @ pooled
        hidden = np.maximum(pooled @ w["token_hidden"] + of["token_hidden"]["bias"], 0)
        found = pooled + hidden @ w["token_out"] + of["token_out"]["bias"]
        rows = rows + softmax((rows @ w["query"]) @ np.swapaxes(found @ w["key"], 1, 2)) @ found
    np.testing.assert_allclose(apply(variables, X), rows.reshape(X.shape), rtol=1e-4, atol=1e-5)


@given(order=st.permutations(range(9)))
def test_token_attention_of_moved_positions(tokens, order):
    variables, apply = tokens

    def moved(x):
        return np.asarray(x).reshape(2, 9, 8)[:, order].reshape(X.shape)

    np.testing.assert_allclose(apply(variables, moved(X)), moved(apply(variables, X)), rtol=1e-4, atol=1e-5)


def test_one_token_gives_all_positions_the_same():
    module = TokenAttention(tokens=1)
    variables = jax.jit(module.init)(KEY, X)
    added = jax.jit(module.apply)(variables, X) - X
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1], X.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["patchwise", "dynamic"])
def test_weights_sum_to_one_inside_the_map(kind, request):
    variables, apply = request.getfixturevalue(kind)
    # Equal values everywhere: any weights that sum to 1 inside the map give them back, at its corners too.
    x = np.ones((1, 3, 3, 8), np.float32)
    value = x @ np.asarray(variables["params"]["value"]["kernel"])
    np.testing.assert_allclose(apply(variables, x), x + value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["patchwise", "dynamic"])
def test_a_patch_is_all_that_is_seen(kind, request):
    variables, apply = request.getfixturevalue(kind)
    moved = X.copy()
    moved[:, 2, 2] += 1
    changed = np.any(np.asarray(apply(variables, moved)) != np.asarray(apply(variables, X)), axis=(0, 3))
    np.testing.assert_array_equal(changed, [[False, False, False], [False, True, True], [False, True, True]])


def test_default_patchwise_parameters():
    shapes = jax.eval_shape(PatchwiseSelfAttention().init, KEY, jnp.zeros((1, 4, 4, 16)))["params"]
    assert shapes["query"]["kernel"].shape == (16, 2)
    assert shapes["mlp_keys"]["kernel"].shape == (7, 7, 2, 2)
    assert shapes["mlp_out"]["kernel"].shape == (2, 49 * 2)


def test_default_dynamic_filters_and_tokens():
    shapes = jax.eval_shape(DynamicFilter().init, KEY, jnp.zeros((1, 4, 4, 16)))["params"]
    assert shapes["context"]["kernel"].shape == (3, 3, 16, 16)
    assert shapes["filters"]["kernel"].shape == (16, 49 * 2)
    shapes = jax.eval_shape(TokenAttention().init, KEY, jnp.zeros((1, 4, 4, 16)))["params"]["round1"]
    assert shapes["groups"].shape == (16, 16)
    assert shapes["token_key"]["kernel"].shape == shapes["query"]["kernel"].shape == (16, 8)
    assert shapes["token_hidden"]["kernel"].shape == (16, 16)


def test_gradients_reach_all_parameters(self_attention, patchwise, dynamic, tokens):
    def loss(apply, variables, x):
        return jnp.square(apply(variables, x)).sum()

    for variables, apply in ((opened(self_attention[1]), self_attention[2]), patchwise, dynamic, tokens):
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
        DynamicFilter(3, 4, dtype=jnp.bfloat16),
        TokenAttention(3, 2, dtype=jnp.bfloat16),
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
        (DynamicFilter(4, 4), [X], "kernel_size must be odd.*got 4 and 4"),
        (DynamicFilter(3, 4, context_size=2), [X], "context_size must be odd, got 2"),
        (DynamicFilter(3, 4, hidden=0), [X], "hidden must be at least 1, got 0"),
        (TokenAttention(0), [X], "tokens must be at least 1, got 0"),
        (TokenAttention(rounds=0), [X], "rounds must be at least 1, got 0"),
        (TokenAttention(), [X[0]], r"x must be floating point \[batch, height, width, channels\]"),
    ],
)
def test_errors(module, maps, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(module.init, KEY, *maps)
