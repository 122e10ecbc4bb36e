import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jkd import retrieval
from jkd.errors import UserError

H = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
W1, W2 = np.eye(2, dtype=np.float32), np.array([[1, -1], [2, 0]], np.float32)
BY_HAND = {
    "tanh": (
        [[0.593494, 0.129391, 0.277115], [0.450853, 0.098293, 0.450853]],
        [[0.870609, 0.406506], [0.901707, 0.549147]],
        [0.821007, 0.178993, 0],
    ),
    "relu": (
        [[0.665241, 0.090031, 0.244728], [0.468311, 0.063379, 0.468311]],
        [[0.909969, 0.334759], [0.936621, 0.531689]],
        [0.880797, 0.119203, 0],
    ),
}
pool = jax.jit(retrieval.multi_head_pool, static_argnames="act")
diversity = jax.jit(jax.value_and_grad(retrieval.attention_diversity))
close = functools.partial(np.testing.assert_allclose, atol=1e-6)


@functools.partial(jax.jit, static_argnames="act")
def loss(feats, w1, w2, mask, act="tanh"):
    """Any function of what comes out."""
    found = retrieval.multi_head_pool(feats, w1, w2, mask, act)
    return jnp.sin(found.pooled).sum() + (found.attention**2).sum()


gradients = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnames="act")


def drawn(batch=2, positions=4, dim=3, heads=2, hidden=5):
    draw = np.random.default_rng(0)
    shapes = ((batch, positions, dim), (hidden, dim), (heads, hidden))
    return tuple(draw.normal(size=shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize("act", BY_HAND)
def test_by_hand(act):
    attention, pooled, masked = BY_HAND[act]
    found = pool(H, W1, W2, act=act)
    close(found.attention, attention)
    close(found.pooled, pooled)
    close(pool(H, W1, W2, np.array([True, True, False]), act=act).attention, [masked, masked])


def test_diversity_by_hand():
    def of(rows):
        return float(diversity(np.asarray(rows, np.float32)[None])[0])

    assert of([[1, 0, 0], [0, 1, 0]]) == pytest.approx(1e-5)
    assert of([[0.5, 0.5, 0]] * 2) == pytest.approx(1.0)
    assert of([[0.25] * 4] * 2) == pytest.approx(1.118034)
    assert of([[1, 0, 0]] * 2) == pytest.approx(1.414214)
    assert of([[1 / 64] * 64] * 10) == pytest.approx(3.116394)
    assert of(BY_HAND["tanh"][0]) == pytest.approx(0.988143, abs=1e-5)


def test_overlap_by_hand():
    overlap = retrieval.head_overlap(
        np.array([[[1, 0, 0], [0, 1, 0]], [[0.5, 0.5, 0]] * 2, [[1, 0, 0]] * 2], np.float32), reduction="none"
    )
    close(overlap, [0, 0.5, 1])


@given(heads=st.integers(1, 4), positions=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_only_heads_on_positions_of_their_own_are_free(heads, positions, seed):
    rows = np.random.default_rng(seed).dirichlet(np.ones(positions), (3, heads)).astype(np.float32)
    values = retrieval.attention_diversity(rows, reduction="none")
    exact = np.linalg.norm(rows @ rows.swapaxes(1, 2) - np.eye(heads), axis=(1, 2))
    close(values, exact, atol=1e-4)
    assert (np.asarray(values) >= 0.99e-5).all()


@pytest.mark.parametrize("rows", [[[1.0, 0, 0], [0, 1, 0]], [[1.0, 0, 0]] * 2, [[1 / 3] * 3] * 2, [[0.0, 0, 0]] * 2])
def test_the_gradient_of_the_diversity_is_finite_everywhere(rows):
    gradient = diversity(np.asarray([rows], np.float32))[1]
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("act", BY_HAND)
def test_padding_changes_nothing(act):
    feats, w1, w2 = drawn()
    mask = np.ones(feats.shape[:2], bool)
    padded, longer = np.full((2, 7, 3), np.nan, np.float32), np.zeros((2, 7), bool)
    kept = [0, 2, 5, 6]  # before, between and after
    padded[:, kept], longer[:, kept] = feats, True
    found, wanted = pool(padded, w1, w2, longer, act), pool(feats, w1, w2, mask, act)
    close(found.pooled, wanted.pooled)
    close(found.attention[..., kept], wanted.attention)
    np.testing.assert_array_equal(np.delete(found.attention, kept, axis=-1), 0)
    found, wanted = gradients(padded, w1, w2, longer, act=act), gradients(feats, w1, w2, mask, act=act)
    close(found[0][:, kept], wanted[0])
    np.testing.assert_array_equal(np.delete(found[0], kept, axis=1), 0)
    jax.tree.map(close, found[1:], wanted[1:])


def test_orders():
    feats, w1, w2 = drawn()
    wanted = pool(feats, w1, w2)
    moved = pool(feats[:, ::-1], w1, w2)
    close(moved.pooled, wanted.pooled)
    close(moved.attention, wanted.attention[..., ::-1])
    close(pool(feats, w1, w2[::-1]).pooled, wanted.pooled[:, ::-1])


def test_dropout_is_seen_by_the_scorer_alone():
    feats, w1, w2 = drawn()
    seen = feats * np.random.default_rng(1).integers(0, 2, feats.shape)
    found = retrieval.multi_head_pool(feats, w1, w2, scored=seen)
    close(found.attention, pool(seen, w1, w2).attention)
    close(found.pooled, np.einsum("brp,bpd->brd", found.attention, feats))


def test_nothing_left_of_an_example():
    feats, w1, w2 = drawn()
    mask = np.array([[True] * 4, [False] * 4])
    with pytest.raises(UserError, match="nothing of example 1"):
        retrieval.multi_head_pool(feats, w1, w2, mask)
    found = pool(feats, w1, w2, mask)  # traced
    np.testing.assert_array_equal(found.pooled[1], 0)
    np.testing.assert_array_equal(found.attention[1], 0)
    assert all(np.isfinite(x).all() for x in gradients(feats, w1, w2, mask))
    close(found.pooled[0], pool(feats[:1], w1, w2).pooled[0])


def test_gradients_and_nan():
    feats, w1, w2 = drawn()
    mask = np.array([[True] * 4, [True, False, True, False]])
    check_grads(lambda *args: loss(*args, mask), (feats, w1, w2), order=1, modes=["rev"], rtol=0.02)
    feats[0, 1, 0] = np.nan
    found = pool(feats, w1, w2, mask)
    assert np.isnan(found.pooled[0]).all()
    assert np.isfinite(found.pooled[1]).all()
    assert np.isnan(diversity(found.attention)[0])


def test_bfloat16_has_wide_weights_and_wide_gradients_of_weights():
    feats, w1, w2 = drawn()
    low = jnp.asarray(feats, jnp.bfloat16)
    found = pool(low, w1, w2)
    assert found.pooled.dtype == jnp.bfloat16
    assert found.attention.dtype == jnp.float32
    close(found.attention.sum(-1), 1)
    close(np.asarray(found.pooled, np.float32), pool(feats, w1, w2).pooled, atol=0.05)
    assert [x.dtype for x in gradients(low, w1, w2, None)] == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_one_and_eight_devices(over_devices):
    with jax.enable_x64(True):
        feats, w1, w2 = (x.astype(np.float64) for x in drawn(batch=8))
        many = over_devices(feats)[0]
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
            gradients(many, w1, w2, None),
            gradients(feats, w1, w2, None),
        )
        attention = pool(feats, w1, w2).attention
        found, wanted = (float(diversity(x)[0]) for x in (over_devices(attention)[0], attention))
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: retrieval.multi_head_pool(H, W1[:, :1], W2), "must have the shapes"),
        (lambda: retrieval.multi_head_pool(H, W1, W2, act="gelu"), "act"),
        (lambda: retrieval.multi_head_pool(H.astype(int), W1, W2), "feats must be floating point"),
        (lambda: retrieval.multi_head_pool(H[:0], W1, W2), "at least one position"),
        (lambda: retrieval.multi_head_pool(H, W1, W2, np.ones(3)), "mask must be boolean"),
        (lambda: retrieval.multi_head_pool(H, W1, W2, scored=H[:2]), "scored must have the shape"),
        (lambda: retrieval.attention_diversity(H), "must have the shape"),
        (lambda: retrieval.attention_diversity(H[None], eps=0.0), "eps must be positive"),
        (lambda: retrieval.head_overlap(H[None, :1]), "at least 2 heads"),
    ],
)
def test_mistakes(call, says, unchecked):
    with pytest.raises(UserError, match=says):
        call()
