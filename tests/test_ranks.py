import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads
from scipy.special import expit
from scipy.stats import rankdata

from jkd.errors import UserError
from jkd.ranks import hard_ranks, soft_ranks

ROW = np.array([2, 0, 1, -1.0])
hard, soft = jax.jit(hard_ranks), jax.jit(soft_ranks, static_argnames="chunk")


def test_by_hand():
    np.testing.assert_array_equal(hard(ROW), [4, 2, 3, 1])
    np.testing.assert_allclose(soft(ROW, 1.0), [3.564430, 2.119203, 2.880797, 1.435570], atol=1e-6)
    np.testing.assert_allclose(soft(ROW, 0.1), [3.999955, 2, 3, 1.000045], atol=1e-6)
    np.testing.assert_array_equal(soft(ROW, 1e-4), [4, 2, 3, 1])


@given(x=arrays(np.float32, (3, 5), elements=st.integers(-4, 4).map(float)))
def test_hard_ranks_are_those_of_scipy_ties_included(x):
    ranks = np.asarray(hard(x))
    np.testing.assert_array_equal(ranks, rankdata(x, axis=1))
    np.testing.assert_array_equal(ranks.sum(1), 15)


@given(x=arrays(np.float32, (3, 5), elements=st.floats(-20, 20, width=32)), tau=st.floats(0.1, 10))
def test_soft_ranks_add_up_and_match_a_loop(x, tau):
    ranks = np.asarray(soft(x, tau))
    np.testing.assert_allclose(ranks.sum(1), 15, rtol=1e-5)
    expected = [[0.5 + sum(expit((a - b) / tau) for b in row) for a in row] for row in x.astype(np.float64)]
    np.testing.assert_allclose(ranks, expected, rtol=1e-4)
    np.testing.assert_allclose(soft(x, tau, chunk=2), ranks, rtol=1e-6)


@pytest.mark.parametrize("function", [hard, soft])
def test_ranks_move_with_the_values_and_ignore_shifts(function):
    x = np.random.default_rng(0).integers(-3, 3, (3, 5)).astype(np.float32)
    order = np.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(function(x[:, order]), np.asarray(function(x))[:, order], rtol=1e-6)
    np.testing.assert_allclose(function(x + 7), function(x), rtol=1e-6)


@pytest.mark.parametrize("function", [hard, soft])
def test_nan_is_not_ranked(function):
    x = np.array([[1, np.nan, 2, 0, 4], [3, 1, 2, 0, 4], [3, 1, 2, 0, 4]], np.float32)
    np.testing.assert_array_equal(np.isnan(function(x)), [[True] * 5, [False] * 5, [False] * 5])


def test_infinities_are_ordered():
    np.testing.assert_array_equal(hard(np.array([np.inf, 0, -np.inf, 1])), [4, 2, 1, 3])


def test_gradients():
    x = np.random.default_rng(0).normal(size=(3, 5))
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: (hard_ranks(x) ** 2).sum()))(x), 0)
    with jax.enable_x64(True):
        check_grads(soft, (x, 0.7), order=1, modes=["rev"])
        check_grads(lambda x, t: soft(x, t, chunk=2), (x, 0.7), order=1, modes=["rev"])
    ties = jax.jit(jax.grad(lambda x: (soft_ranks(x) ** 2).sum()))(np.zeros((1, 3), np.float32))
    assert np.isfinite(ties).all()


def test_chunks_bound_what_the_gradient_keeps():
    x = np.zeros((8, 20), np.float32)

    def kept(chunk):
        _, pull = jax.vjp(lambda x: soft_ranks(x, chunk=chunk), x)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept(None) >= 8 * 20 * 20
    assert kept(2) <= 2 * x.size


def test_precision_and_vmap():
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    for function in (hard_ranks, soft_ranks):
        low = function(x.astype(jnp.bfloat16))
        assert low.dtype == jnp.float32
        np.testing.assert_array_equal(low, function(x.astype(jnp.bfloat16).astype(np.float32)))
        np.testing.assert_allclose(jax.jit(jax.vmap(function))(x), function(x), rtol=1e-6)
    np.testing.assert_allclose(soft(x, chunk=4), soft_ranks(x), rtol=1e-6)


def test_mistakes():
    with pytest.raises(UserError, match="chunk must be at least 1, got 0"):
        soft_ranks(ROW, chunk=0)
    with pytest.raises(UserError, match="tau must be positive and finite, got 0"):
        soft_ranks(ROW, 0.0)
