"""Masks: counts to the weight, what is pruned stays pruned, and training that keeps it at 0."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jkd import prune, train
from jkd.errors import UserError
from jkd.train.collectives import collectives
from jkd.train.hlo import Program

A = np.array([0.5, -0.1, 0.3, -0.4], np.float32)
B = np.array([0.05, 0.2, -0.9, 0.01], np.float32)
HAND = {"a": {"kernel": A, "bias": np.full(2, 1e-9, np.float32)}, "b": {"kernel": B}}
SPLIT_ALL = ((".*", train.fsdp(min_size=1)),)

global_of = jax.jit(prune.global_magnitude_mask, static_argnums=2)
layerwise_of = jax.jit(prune.layerwise_magnitude_mask, static_argnums=2)
tau_of = jax.jit(prune.magnitude_threshold, static_argnums=2)
random_of = jax.jit(prune.random_masks, static_argnums=2)


def bits(masks):
    """The prunable masks of HAND, and that the others are scalars."""
    assert np.shape(masks["a"]["bias"]) == ()
    assert bool(masks["a"]["bias"])
    return [np.asarray(masks[name]["kernel"]).astype(int).tolist() for name in "ab"]


def weights(*values):
    """A tree of two prunable leaves, (6,) and (3, 4), and a bias."""
    flat = np.concatenate([np.ravel(x) for x in values]).astype(np.float32)
    return {"a": {"kernel": flat[:6], "bias": np.ones(4, np.float32)}, "b": {"kernel": flat[6:].reshape(3, 4)}}


def flat(tree):
    return np.concatenate([np.ravel(tree[name]["kernel"]) for name in "ab"])


def network(seed=0):
    draw = np.random.default_rng(seed)
    return {
        "first": {"kernel": draw.normal(size=(8, 16)), "bias": draw.normal(size=16)},
        "second": {"kernel": 3 * draw.normal(size=(16, 4)), "bias": draw.normal(size=4)},
    }


def float32(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


# --- by hand ---


def test_by_hand():
    ones = prune.ones_masks(HAND)
    assert bits(ones) == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert bits(prune.global_magnitude_mask(HAND, ones, 0.5)) == [[1, 0, 1, 1], [0, 0, 1, 0]]
    assert bits(prune.layerwise_magnitude_mask(HAND, ones, 0.5)) == [[1, 0, 0, 1], [0, 1, 1, 0]]
    assert prune.magnitude_threshold(HAND, ones, 0.5) == np.float32(0.3)
    assert bits(jax.jit(prune.threshold_mask)(HAND, np.float32(0.3), ones)) == [[1, 0, 1, 1], [0, 0, 1, 0]]


def test_the_schedule_by_hand():
    np.testing.assert_allclose(prune.keep_schedule(0.2, 4), (0.584804, 0.341995, 0.2), rtol=2e-6)
    assert prune.keep_schedule(0.2, 2) == (0.2,)
    assert prune.keep_schedule(0.3, 5)[-1] == 0.3
    assert prune.keep_schedule(1.0, 3) == (1, 1)
    with pytest.raises(UserError, match="rounds counts the dense round too and must be >= 2, got 1"):
        prune.keep_schedule(0.2, 1)
    for keep in (0.0, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"final_keep must lie in \(0, 1\]"):
            prune.keep_schedule(keep, 3)


def test_a_report_by_hand():
    report = prune.sparsity_report(HAND, prune.global_magnitude_mask(HAND, prune.ones_masks(HAND), 0.5))
    assert {name: float(share) for name, share in report.per_layer.items()} == {"a/kernel": 0.25, "b/kernel": 0.75}
    assert float(report.prunable) == 0.5
    assert float(report.total) == pytest.approx(0.4), "4 of 10 parameters"


# --- counts ---


@pytest.mark.parametrize(("size", "keep", "kept"), [(100, 0.29, 29), (100, 0.295, 29), (10, 0.25, 2), (7, 1.0, 7)])
def test_counts_are_those_of_the_share_as_written(size, keep, kept):
    params = {"kernel": np.ones(size, np.float32)}  # ties throughout
    masks = prune.ones_masks(params)
    for found in (global_of(params, masks, keep), layerwise_of(params, masks, keep)):
        np.testing.assert_array_equal(found["kernel"], np.arange(size) < kept)
    assert int(random_of(jax.random.key(0), masks, keep)["kernel"].sum()) == kept


SHARES = st.sampled_from([0.1, 0.29, 0.5, 0.75, 1.0])
VALUES = st.lists(st.integers(-3, 3), min_size=18, max_size=18)


@given(first=VALUES, second=VALUES, shares=st.lists(SHARES, min_size=2, max_size=2))
def test_masks_are_exact_and_monotone(first, second, shares):
    masks, alive = prune.ones_masks(weights(first)), np.ones(18, bool)
    for values, keep in zip((first, second), sorted(shares, reverse=True), strict=True):
        masks = global_of(weights(values), masks, keep)
        order = sorted(np.flatnonzero(alive), key=lambda i, values=values: (-abs(values[i]), i))
        alive = np.isin(np.arange(18), order[: int(keep * 18 + 1e-9)])
        np.testing.assert_array_equal(flat(masks), alive)


@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=18, max_size=18))
def test_the_threshold_is_the_nth_magnitude(values):
    params = weights(values)
    for keep in (0.1, 0.5, 1.0):
        tau = tau_of(params, prune.ones_masks(params), keep)
        wanted = np.sort(np.abs(flat(params)))[::-1][int(keep * 18 + 1e-9) - 1]
        assert np.asarray(tau).tobytes() == wanted.tobytes()


def test_the_threshold_counts_what_is_left():
    params = weights(np.arange(18))
    masks = prune.threshold_mask(params, 9, prune.ones_masks(params))
    assert int(flat(masks).sum()) == 9
    params["b"]["kernel"][0] = 100  # four that are pruned already (6 .. 9), and one that is not
    masks["b"]["kernel"] = masks["b"]["kernel"].at[0].set(False)
    assert float(prune.magnitude_threshold(params, masks, 0.3)) == 13
    assert float(tau_of(params, masks, 0.9)) == 0, "fewer are left"
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    assert prune.magnitude_threshold(half, masks, 0.3).dtype == jnp.float32
    with jax.enable_x64(True):
        wide = {"kernel": np.array([1, 1 + 1e-12, 1 + 2e-12])}
        assert float(prune.magnitude_threshold(wide, prune.ones_masks(wide), 0.7)) == 1 + 1e-12


def test_layerwise_and_global_totals_agree_and_their_layers_do_not():
    params = float32(network())
    ones = prune.ones_masks(params)
    reports = [prune.sparsity_report(params, find(params, ones, 0.3)) for find in (global_of, layerwise_of)]
    assert abs(float(reports[0].prunable - reports[1].prunable)) <= 2 / 192
    assert float(reports[0].prunable) == pytest.approx(1 - 57 / 192)
    layers = [[float(x) for x in report.per_layer.values()] for report in reports]
    assert layers[0][0] - layers[0][1] > 0.3, "the second layer's weights are three times as large"
    assert layers[1] == pytest.approx([1 - 38 / 128, 1 - 19 / 64])


# --- controls ---


def test_random_masks_keep_what_is_alive():
    params = weights(np.arange(18))
    masks = global_of(params, prune.ones_masks(params), 0.5)
    found = [random_of(jax.random.key(k), masks, 0.29) for k in range(2)]
    for each in found:
        assert flat(each).sum() == 5
        assert not (flat(each) & ~flat(masks)).any()
    assert (flat(found[0]) != flat(found[1])).any()


def test_shuffled_masks_keep_the_share_of_a_layer():
    masks = global_of(float32(network()), prune.ones_masks(network()), 0.3)
    found = jax.jit(prune.shuffled_masks)(jax.random.key(0), masks)
    assert jax.tree.structure(found) == jax.tree.structure(masks)
    for layer in ("first", "second"):
        assert found[layer]["kernel"].sum() == masks[layer]["kernel"].sum()
        assert (found[layer]["kernel"] != masks[layer]["kernel"]).any()
        assert found[layer]["bias"].shape == ()


# --- training ---

SCHEDULE = optax.linear_schedule(0.1, 0.01, 8)
OPTIMIZERS = {
    "momentum": optax.sgd(SCHEDULE, momentum=0.9),
    "nesterov": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
}


def loss(params, x):
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return ((hidden @ params["second"]["kernel"] + params["second"]["bias"][None]) ** 2).mean()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_at_zero(name):
    tx, params, x = OPTIMIZERS[name], float32(network()), np.random.default_rng(1).normal(size=(8, 8))
    x = x.astype(np.float32)

    @jax.jit
    def step(params, state, masks):
        masked = prune.masked_update(tx, masks)
        updates, state = masked.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    ones = prune.ones_masks(params)
    state, dense = tx.init(params), params
    for _ in range(2):  # dense: there is momentum on what will be pruned
        dense, state = step(dense, state, ones)
    masks = global_of(dense, ones, 0.3)
    params = prune.apply_masks(dense, masks)
    assert jax.tree.structure(state) == jax.tree.structure(prune.masked_update(tx, masks).init(params))
    for _ in range(4):
        before = params
        params, state = step(params, state, masks)
        jax.tree.map(np.testing.assert_array_equal, params, prune.apply_masks(params, masks))
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True))
    momentum = [x for p, x in jax.tree.leaves_with_path(state) if "first" in str(p) and "kernel" in str(p)]
    assert np.asarray(momentum[0])[~np.asarray(masks["first"]["kernel"])].any(), "the optimizer's state is its own"


def test_masks_of_ones_change_no_bit():
    tx, params = OPTIMIZERS["adamw"], float32(network())
    x = np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)
    grads = jax.grad(loss)(params, x)
    update = jax.jit(lambda masks: prune.masked_update(tx, masks).update(grads, tx.init(params), params))
    wanted = jax.jit(lambda: tx.update(grads, tx.init(params), params))()
    jax.tree.map(np.testing.assert_array_equal, update(prune.ones_masks(params)), wanted)


def test_pruned_entries_are_zero_whatever_they_were():
    params = {"kernel": np.array([np.inf, np.nan, 2, 3], np.float32), "bias": np.ones(1, np.float32)}
    masks = {"kernel": np.array([False, False, True, False]), "bias": np.array(True)}
    transform = train.chain(prune.apply(masks), lambda tree: jax.tree.map(lambda x: 2 * x, tree))
    np.testing.assert_array_equal(transform(params)["kernel"], [0, 0, 4, 0])
    np.testing.assert_array_equal(transform(params)["bias"], [2])
    gradient = jax.jit(jax.grad(lambda tree: sum(jnp.sum(x**2) for x in jax.tree.leaves(transform(tree)))))(params)
    np.testing.assert_array_equal(gradient["kernel"], [0, 0, 16, 0])
    low = prune.apply_masks({"kernel": jnp.ones(4, jnp.bfloat16), "bias": jnp.ones(1)}, masks)
    assert low["kernel"].dtype == jnp.bfloat16


def test_members_are_masked_each_by_itself():
    both = jax.tree.map(lambda *xs: np.stack(xs), float32(network(0)), float32(network(1)))

    @jax.jit
    @jax.vmap
    def ticket(params):
        masks = prune.global_magnitude_mask(params, prune.ones_masks(params), 0.3)
        return masks, prune.apply_masks(params, masks), prune.sparsity_report(params, masks).prunable

    masks, params, shares = ticket(both)
    for k in range(2):
        alone = float32(network(k))
        wanted = global_of(alone, prune.ones_masks(alone), 0.3)
        jax.tree.map(lambda x, y, k=k: np.testing.assert_array_equal(x[k], y), masks, wanted)
        jax.tree.map(lambda x, y, k=k: np.testing.assert_array_equal(x[k], y), params, prune.apply_masks(alone, wanted))
    np.testing.assert_allclose(shares, 1 - 57 / 192, rtol=1e-6)


# --- many devices ---


@functools.cache
def mesh(count, ways=1):
    return train.make_mesh(fsdp=ways, devices=jax.devices()[:count])


def train_masked(on, params, masks):
    """30 steps of momentum and decay in float64, and the masks of the end."""
    tx = OPTIMIZERS["nesterov"]
    draw = np.random.default_rng(2)

    def step(state, batch, masks):
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = prune.masked_update(tx, masks).update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    jitted, masks = train.jit_step(step, on, rules=SPLIT_ALL), train.place(masks, on, SPLIT_ALL)
    state = train.place((params, tx.init(params)), on, SPLIT_ALL)
    for _ in range(30):
        state, _ = jitted(state, draw.normal(size=(16, 8)), masks)
    tau = jax.jit(prune.magnitude_threshold, static_argnums=2)(state[0], masks, 0.2)
    return jax.device_get((state, prune.threshold_mask(state[0], tau, masks)))


def test_float64_training_agrees_on_any_mesh():
    with jax.enable_x64(True):
        params = network()
        masks = prune.global_magnitude_mask(params, prune.ones_masks(params), 0.3)
        params = jax.device_get(prune.apply_masks(params, masks))
        wanted, *found = (train_masked(on, params, masks) for on in (mesh(1), mesh(8), mesh(8, 4)))
    assert wanted[0][0]["first"]["kernel"].dtype == np.float64
    kept = sum(wanted[1][layer]["kernel"].sum() for layer in ("first", "second"))
    assert kept == 38
    for other in found:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), other, wanted)


def test_masks_lie_like_their_weights():
    params = {"dense": {"kernel": np.ones((128, 256), np.float32), "bias": np.ones(256, np.float32)}}
    masks = prune.ones_masks(params)
    specs = [
        jax.tree.map(lambda s: s.spec, train.tree_shardings(tree, mesh(8, 4))) for tree in (params, {"masks": masks})
    ]
    assert specs[0] == specs[1]["masks"]
    assert specs[0]["dense"]["kernel"] == jax.sharding.PartitionSpec(None, "fsdp")


def test_a_threshold_gathers_nothing():
    on = mesh(8, 4)
    params = {"kernel": np.ones((128, 256), np.float32)}
    shapes = [
        jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, train.tree_shardings(tree, on)
        )
        for tree in (params, prune.ones_masks(params))
    ]
    compiled = tau_of.lower(*shapes, 0.2).compile()
    assert {one.kind for one in collectives(Program(compiled.as_text()))} == {"all-reduce"}


# --- transfer ---


def test_masks_transfer_to_shared_modules():
    source = float32(network())
    masks = prune.global_magnitude_mask(source, prune.ones_masks(source), 0.3)
    target = source | {"second": {"kernel": np.ones((16, 7), np.float32), "bias": np.ones(7, np.float32)}}
    found = prune.transfer_masks(masks, target, exclude=("^second/",))
    assert jax.tree.structure(found) == jax.tree.structure(target)
    np.testing.assert_array_equal(found["first"]["kernel"], masks["first"]["kernel"])
    assert found["second"]["kernel"].shape == ()
    prune.apply_masks(target, found)
    jax.tree.map(np.testing.assert_array_equal, prune.transfer_masks(masks, source), masks)
    with pytest.raises(UserError, match=r"do not transfer: second/kernel \(mask \(16, 4\), weights \(16, 7\)\)"):
        prune.transfer_masks(masks, target)
    with pytest.raises(UserError, match=r"second/bias \(not in the source\), second/kernel \(not in the source\)"):
        prune.transfer_masks({"first": masks["first"]}, target)
    with pytest.raises(UserError, match=r"not transfer: second/kernel \(only in the source\). Name what is not shared"):
        prune.transfer_masks(masks, {"first": source["first"]})
    with pytest.raises(UserError, match="exclude='secnd' is found in no path"):
        prune.transfer_masks(masks, target, exclude=("secnd",))


# --- mistakes ---


@pytest.mark.parametrize(
    "find", [prune.global_magnitude_mask, prune.layerwise_magnitude_mask, prune.magnitude_threshold]
)
def test_degenerate_shares(find):
    ones = prune.ones_masks(HAND)
    for keep in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(UserError, match=r"keep must lie in \(0, 1\], got"):
            find(HAND, ones, keep)
    with pytest.raises(UserError, match=r"keep=0.1 leaves none of the . weights of .*; keep must be at least 0"):
        find(HAND, ones, 0.1)
    half = prune.layerwise_magnitude_mask(HAND, ones, 0.5)
    with pytest.raises(UserError, match="are to be kept, but only . are left: what is pruned stays pruned"):
        find(HAND, half, 0.75)


@pytest.mark.parametrize("find", [prune.global_magnitude_mask, prune.layerwise_magnitude_mask])
def test_nan_has_no_rank(find):
    params = {"a": HAND["a"], "b": {"kernel": np.array([0.1, np.nan, 0.2, 0.3], np.float32)}}
    masks = prune.ones_masks(params)
    with pytest.raises(UserError, match="NaN among the weights of b/kernel: they have no rank"):
        find(params, masks, 0.5)
    masks["b"]["kernel"] = masks["b"]["kernel"].at[1].set(False)
    assert not find(params, masks, 0.5)["b"]["kernel"][1], "a pruned weight may be anything"


def test_an_emptied_layer_is_told():
    params = {"a": HAND["a"], "b": {"kernel": B / 100}}
    with pytest.warns(UserWarning, match="All weights of b/kernel are pruned"):
        masks = prune.global_magnitude_mask(params, prune.ones_masks(params), 0.5)
    assert float(prune.sparsity_report(params, masks).per_layer["b/kernel"]) == 1
    prune.global_magnitude_mask(params, masks, 0.25)  # is told once


def test_masks_of_another_network():
    ones = prune.ones_masks(HAND)
    with pytest.raises(UserError, match=r"do not fit the parameters: b/kernel \(mask \(4,\), weights \(5,\)\)"):
        prune.apply_masks(HAND | {"b": {"kernel": np.ones(5, np.float32)}}, ones)
    with pytest.raises(UserError, match="do not fit the parameters: b/kernel"):
        prune.global_magnitude_mask({"a": HAND["a"]}, ones, 0.5)
    with pytest.raises(UserError, match="no prunable leaf"):
        prune.sparsity_report({"bias": np.ones(2)}, {"bias": np.array(True)})
    with pytest.raises(UserError, match="Nothing in params is prunable"):
        prune.ones_masks({"bias": np.ones(2)})
    with pytest.raises(UserError, match="Scalars cannot be pruned, but is_prunable takes scale/kernel"):
        prune.ones_masks({"scale": {"kernel": np.float32(1)}})


def test_what_is_prunable_may_be_chosen():
    masks = prune.ones_masks(HAND, lambda name, leaf: name.startswith("b/"))
    assert masks["a"]["kernel"].shape == ()
    found = prune.global_magnitude_mask(HAND, masks, 0.5)
    np.testing.assert_array_equal(found["b"]["kernel"], [False, True, True, False])
    assert prune.sparsity_report(HAND, found).per_layer.keys() == {"b/kernel"}
