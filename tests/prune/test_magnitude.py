import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jkd.errors import UserError
from jkd.prune import keep_largest, magnitude_prune_mask, prune_params, sparsity

KERNEL = np.array([[0.1, -0.5, 0.3], [-0.05, 0.9, 0.2], [0.7, -0.15, 0.02], [0.4, 0.6, -0.8]], np.float32)
mask_of = jax.jit(magnitude_prune_mask, static_argnums=1)
kept_of = jax.jit(keep_largest)


@pytest.fixture
def params():
    draw = np.random.default_rng(0)
    return {
        "conv": {"kernel": draw.normal(size=(3, 3, 2, 5)).astype(np.float32), "bias": np.full(5, 1e-9, np.float32)},
        "norm": {"scale": np.full(5, 1e-9, np.float32), "bias": np.zeros(5, np.float32)},
        "head": {"kernel": KERNEL, "bias": np.array([1, 2, 3.0], np.float32)},
    }


def test_by_hand():
    mask = np.asarray(magnitude_prune_mask(KERNEL, 0.25))
    np.testing.assert_array_equal(np.sort(KERNEL[~mask]), np.float32([-0.05, 0.02, 0.1]))
    assert (~np.asarray(magnitude_prune_mask(KERNEL, 0.1))).sum() == 1


@pytest.mark.parametrize(("size", "rate", "pruned"), [(10, 0.25, 2), (10, 0.35, 4), (100, 0.29, 29), (100, 0.145, 14)])
def test_counts_are_those_of_the_rate_as_written(size, rate, pruned):
    # 0.29 * 100 is 28.999999999999996; a half goes to the even number.
    assert (~np.asarray(mask_of(np.ones(size), rate))).sum() == pruned


@given(scores=st.lists(st.integers(-3, 3), min_size=12, max_size=12), n=st.integers(0, 12))
def test_exactly_the_largest_are_kept_ties_by_index(scores, n):
    kept = kept_of(np.reshape(np.array(scores, np.float32), (3, 4)), n)
    order = sorted(range(12), key=lambda i: (-scores[i], i))
    assert set(np.flatnonzero(kept)) == set(order[:n])


def test_every_kernel_is_pruned_by_itself(params):
    pruned = prune_params(params, 0.25)
    for name in ("conv", "head"):
        before, after = params[name]["kernel"], pruned[name]["kernel"]
        mask = magnitude_prune_mask(before, 0.25)
        np.testing.assert_array_equal(after, np.where(mask, before, 0))
        np.testing.assert_array_equal(pruned[name]["bias"], params[name]["bias"])
    assert pruned["norm"] is not None
    jax.tree.map(np.testing.assert_array_equal, pruned["norm"], params["norm"])
    assert sparsity(params) == 0
    # round(0.25 * 90) = 22 of 90 and 3 of 12
    assert sparsity(pruned) == pytest.approx(25 / 102)
    assert sparsity(pruned, is_prunable=lambda name, leaf: name == "head/kernel") == pytest.approx(0.25)


def test_all_or_nothing(params):
    jax.tree.map(np.testing.assert_array_equal, prune_params(params, 0.0), params)
    empty = jax.tree.map(np.asarray, prune_params(params, 1.0))
    assert sparsity(empty) == 1
    np.testing.assert_array_equal(np.ones(4) @ empty["head"]["kernel"] + empty["head"]["bias"], [1, 2, 3])


def test_what_is_prunable_may_be_chosen(params):
    pruned = prune_params(params, 1.0, is_prunable=lambda name, leaf: leaf.ndim == 4)
    assert not np.asarray(pruned["conv"]["kernel"]).any()
    np.testing.assert_array_equal(pruned["head"]["kernel"], KERNEL)


def test_precision_and_transformations(params):
    eager = prune_params(params, 0.25)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda p: prune_params(p, 0.25))(params), eager)
    both = jax.tree.map(lambda leaf: np.stack([leaf, leaf**2]), params)
    members = jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda p: prune_params(p, 0.25)))(both))
    for i in range(2):
        alone = prune_params(jax.tree.map(lambda leaf, i=i: leaf[i], both), 0.25)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf, i=i: leaf[i], members), alone)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    pruned = jax.eval_shape(lambda p: prune_params(p, 0.25), low)
    assert {leaf.dtype for leaf in jax.tree.leaves(pruned)} == {jnp.dtype("bfloat16")}
    gradient = jax.jit(jax.grad(lambda k: prune_params({"kernel": k}, 0.25)["kernel"].sum()))(KERNEL)
    np.testing.assert_array_equal(gradient, magnitude_prune_mask(KERNEL, 0.25))


def test_nan_is_never_pruned_away():
    kernel = KERNEL.copy()
    kernel[2, 2] = np.nan
    assert np.isnan(np.asarray(prune_params({"kernel": kernel}, 0.9)["kernel"])).sum() == 1


def test_mistakes(params):
    for rate in (-0.1, 1.1, np.nan):
        with pytest.raises(UserError, match=r"rate must lie in \[0, 1\]"):
            prune_params(params, rate)
    with pytest.raises(UserError, match=r"n must lie in 0..12 \(the number of scores\), got 13"):
        keep_largest(KERNEL, 13)
    for function in (sparsity, lambda p: prune_params(p, 0.5)):
        with pytest.raises(UserError, match=r"Nothing in params is prunable: .*\['bias', 'scale'\]"):
            function(params["norm"])
