"""Bounds on mutual information: worked values, exhaustive enumeration, invariances, degenerate points, devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.special import logit

from jkd import hashing
from jkd.errors import UserError

Q = np.array([[0.9, 0.2], [0.1, 0.8], [0.6, 0.4]])
BITS = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
Q1, Q2 = np.array([[0.9, 0.2], [0.2, 0.9]]), np.array([[0.8, 0.3], [0.3, 0.8]])


def z(q):
    return logit(q).astype(np.float32)


def assignments(q):
    """Every way in which the bits of all rows can fall [2^(N L), N, L], and how likely each is."""
    bits = np.array(list(itertools.product((0, 1), repeat=q.size)), np.float32).reshape(-1, *q.shape)
    return bits, np.where(bits > 0, q, 1 - q).prod((1, 2))


@jax.jit
def weighted(bits, chances, logits):
    return chances @ jax.vmap(hashing.mi_lower_bound, (0, None))(bits, logits)


def expected(q, other=None):
    """The exact mean of the bound over all draws."""
    bits, chances = assignments(q)
    return float(weighted(bits, chances.astype(np.float32), z(q if other is None else other)))


def exact(q):
    """I(B; row) by summing over all codes, in numpy."""
    codes = np.array(list(itertools.product((0, 1), repeat=q.shape[1])))
    of = np.where(codes[:, None] > 0, q[None], 1 - q[None]).prod(-1)  # [codes, rows]
    return float((of * np.log(of / of.mean(1, keepdims=True))).sum() / len(q))


def bits_of(q):
    return float(hashing.bit_information(np.asarray(q, np.float32)))


# --- worked values ---


def test_one_bit_of_two_rows():
    q = np.array([[0.9], [0.1]])
    assert expected(q) == pytest.approx(0.368064, abs=1e-5)
    assert bits_of(q) == pytest.approx(0.368064, abs=1e-5)  # one bit: both forms are exact


def test_two_bits_of_three_rows():
    assert expected(Q) == pytest.approx(0.327324, abs=1e-5)
    assert bits_of(Q) == pytest.approx(0.382849, abs=1e-5)
    assert [bits_of(Q[:, [k]]) for k in (0, 1)] == pytest.approx([0.249864, 0.132984], abs=1e-5)


def test_likelihoods_and_one_draw():
    likelihoods = [
        [-0.328504, -3.912023, -1.021651],
        [-3.912023, -0.328504, -1.832581],
        [-1.714798, -2.525729, -1.427116],
    ]
    found = np.asarray(hashing.bernoulli_loglik_matrix(BITS, z(Q)))
    np.testing.assert_allclose(found, likelihoods, atol=1e-5)
    np.testing.assert_array_equal(hashing.bernoulli_loglik_matrix(BITS > 0, z(Q)), found)
    terms = np.diag(found) - np.log(np.exp(found).mean(1))
    np.testing.assert_allclose(terms, [0.674798, 0.875469, 0.364643], atol=1e-5)
    assert float(hashing.mi_lower_bound(BITS, z(Q))) == pytest.approx(0.638303, abs=1e-5)


def test_four_sure_codes_reach_the_logarithm_of_their_number():
    codes = np.array(list(itertools.product((0, 1), repeat=2)))
    q = np.where(codes > 0, 1 - 1e-6, 1e-6)
    assert expected(q) == pytest.approx(1.386265, abs=2e-5)
    assert bits_of(q) == pytest.approx(2 * np.log(2), abs=1e-4)


def test_both_sides():
    cross = [expected(Q1, Q2), expected(Q2, Q1)]
    intra = [expected(Q1), expected(Q2)]
    assert cross == pytest.approx([0.392938, 0.197753], abs=1e-5)
    assert intra == pytest.approx([0.420983, 0.232630], abs=1e-5)
    assert expected(Q1, Q1) == pytest.approx(intra[0], abs=1e-6)
    first, second = Q1.astype(np.float32), Q2.astype(np.float32)
    assert float(hashing.modality_gap(first, second)) == pytest.approx(0.01, abs=1e-6)
    np.testing.assert_allclose(hashing.bernoulli_kl(first, second), 0.062422, atol=1e-5)
    there, back = (float(hashing.bernoulli_kl(*pair).mean()) for pair in ((first, second), (second, first)))
    assert float(hashing.modality_gap(first, second, kind="kl")) == pytest.approx((there + back) / 2, rel=1e-5)
    assert hashing.modality_gap(first, second, reduction="none").shape == (2,)


def test_a_constant_code_knows_nothing_and_stays():
    q = np.tile([[0.3, 0.8]], (3, 1))
    assert expected(q) == pytest.approx(0, abs=1e-6)
    assert bits_of(q) == pytest.approx(0, abs=1e-6)
    bits, chances = assignments(q)

    def drawn(logits, bits):  # as sample_bits_st: the value of the bits, the gradient of q
        soft = jax.nn.sigmoid(logits)
        return hashing.mi_lower_bound(bits + soft - jax.lax.stop_gradient(soft), logits)

    each = jax.vmap(jax.grad(drawn), (None, 0))(z(q), bits)
    assert float(np.abs(each).max()) > 0.1
    np.testing.assert_allclose(np.tensordot(chances, each, 1), 0, atol=1e-6)


# --- properties ---


@given(arrays(np.float64, (3, 2), elements=st.floats(0.02, 0.98)))
def test_the_mean_over_draws_is_the_information(q):
    assert expected(q) == pytest.approx(exact(q), abs=2e-5)
    assert -1e-5 <= expected(q) <= min(np.log(3), 2 * np.log(2)) + 1e-5
    assert bits_of(q) >= exact(q) - 1e-5


@given(arrays(np.float64, (2, 3, 2), elements=st.floats(0.02, 0.98)))
def test_another_side_can_at_most_know_all(sides):
    assert expected(*sides) <= expected(sides[0]) + 1e-5


@pytest.fixture(scope="module")
def batch():
    draw = np.random.RandomState(0)
    logits = 2 * draw.standard_normal((2, 24, 5)).astype(np.float32)
    return logits, (draw.rand(2, 24, 5) < 0.5).astype(np.float32)


@jax.jit
def parts(logits, bits):
    """All terms of given bits."""
    q = hashing.bit_probabilities(logits)
    intra = [hashing.mi_lower_bound(bits[m], logits[m]) for m in (0, 1)]
    cross = [hashing.cross_mi_lower_bound(bits[m], logits[1 - m]) for m in (0, 1)]
    return jnp.stack([*intra, *cross, hashing.modality_gap(q[0], q[1]), *map(hashing.bit_information, q)])


def flipped(logits, bits, sides):
    logits, bits = logits.copy(), bits.copy()
    for m in sides:
        logits[m, :, 1] *= -1
        bits[m, :, 1] = 1 - bits[m, :, 1]
    return parts(logits, bits)


def test_order_and_names_of_bits_do_not_count(batch):
    found = parts(*batch)
    order = np.random.RandomState(1).permutation(24)
    np.testing.assert_allclose(parts(*(x[:, order] for x in batch)), found, rtol=1e-4)
    np.testing.assert_allclose(flipped(*batch, (0, 1)), found, rtol=1e-4)
    one, found = np.asarray(flipped(*batch, (0,))), np.asarray(found)
    np.testing.assert_allclose(one[[0, 1, 5, 6]], found[[0, 1, 5, 6]], rtol=1e-4)
    assert (np.abs(one - found)[[2, 3, 4]] > 1e-2).all()


@pytest.mark.parametrize("max_pairs", [1, 60, 24 * 7, 24 * 12])
def test_groups_of_rows_change_nothing(batch, max_pairs):
    logits, bits = batch
    both = (
        jax.jit(jax.value_and_grad(lambda b, z, n=n: hashing.mi_lower_bound(b, z, max_pairs=n), (0, 1)))
        for n in (2**24, max_pairs)
    )
    (whole, grads), (some, others) = (f(bits, logits[0]) for f in both)
    np.testing.assert_allclose(some, whole, rtol=1e-5)
    for ours, theirs in zip(others, grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_several_draws_are_averaged(batch):
    logits, bits = batch
    single = [float(hashing.mi_lower_bound(one, logits[0])) for one in bits]
    assert float(hashing.mi_lower_bound(bits, logits[0])) == pytest.approx(np.mean(single), rel=1e-5)


# --- draws ---


def test_draws_have_the_probabilities_they_should():
    logits = np.array([[-2.0, 0.0, 1.5]], np.float32)
    q = 1 / (1 + np.exp(-logits[0]))
    for estimator in ("straight_through", "relaxed"):
        bits = hashing.sample_bits(jax.random.key(0), logits, estimator=estimator, num_samples=4000, temperature=0.3)
        assert bits.shape == (4000, 1, 3)
        np.testing.assert_allclose((bits > 0.5).mean((0, 1)), q, atol=0.03)
    hard = hashing.sample_bits_st(jax.random.key(1), np.zeros((50, 2), np.float32))
    assert set(np.asarray(hard).ravel().tolist()) == {0.0, 1.0}
    cold = hashing.sample_bits_relaxed(jax.random.key(1), np.zeros((50, 2), np.float32), 0.01)
    assert (np.minimum(cold, 1 - cold) < 0.05).mean() > 0.8


def test_gradients_of_draws(batch):
    logits, _ = batch
    q = np.asarray(hashing.bit_probabilities(logits[0]))
    slope = jax.grad(lambda z: hashing.sample_bits_st(jax.random.key(0), z).sum())(logits[0])
    np.testing.assert_allclose(slope, q * (1 - q), rtol=1e-4)
    soft = hashing.sample_bits_relaxed(jax.random.key(0), logits[0], 0.5)
    slope = jax.grad(lambda z: hashing.sample_bits_relaxed(jax.random.key(0), z, 0.5).sum())(logits[0])
    np.testing.assert_allclose(slope, soft * (1 - soft) / 0.5, rtol=1e-3, atol=1e-6)


def test_the_temperature_falls():
    found = [float(hashing.concrete_temperature(t, 100)) for t in (0, 50, 100, 300)]
    assert found == pytest.approx([0.5, np.sqrt(0.05), 0.1, 0.1], rel=1e-5)


# --- the loss ---


@pytest.mark.parametrize("estimator", ["straight_through", "relaxed"])
def test_the_loss_is_the_weighted_sum_of_its_terms(batch, estimator):
    weights = {"intra_weight": 0.5, "cross_weight": 2.0, "gap_weight": 0.3, "bit_weight": 0.7}
    terms = hashing.cmimh_terms(jax.random.key(0), *batch[0], **weights, estimator=estimator, num_samples=2, gap="kl")
    by_hand = (
        -0.5 * (terms.intra_first + terms.intra_second) / 2
        - 2 * (terms.cross_first + terms.cross_second) / 2
        + 0.3 * terms.gap
        - 0.7 * (terms.bits_first + terms.bits_second) / 2
    )
    np.testing.assert_allclose(terms.loss, by_hand, rtol=1e-5)
    q = hashing.bit_probabilities(batch[0])
    np.testing.assert_allclose(terms.gap, hashing.modality_gap(*q, kind="kl"), rtol=1e-5)
    np.testing.assert_allclose(terms.bits_first, hashing.bit_information(q[0]) / 5, rtol=1e-5)


def test_a_critic_may_see_what_is_not_equal(batch):
    """The second side says the opposite of the first: predictable, but not equal."""
    logits = 6 * np.sign(batch[0][0])
    key, inverse = jax.random.key(0), lambda q: 8 - 16 * q
    tied = hashing.cmimh_terms(key, logits, -logits)
    free = hashing.cmimh_terms(key, logits, -logits, (inverse, inverse))
    assert float(tied.cross_first) < -5
    assert float(free.cross_first) == pytest.approx(float(free.intra_first), abs=0.1)
    loss = hashing.cmimh_loss(key, logits, -logits, (inverse, inverse))
    np.testing.assert_allclose(loss, free.loss, rtol=1e-6)


def test_learning_raises_the_information():
    x = np.eye(8, dtype=np.float32)

    @jax.jit
    def step(w, key):
        grads = jax.grad(lambda w: hashing.cmimh_loss(key, x @ w[0], x @ w[1], num_samples=4))(w)
        return w - 2.0 * grads

    w = 0.1 * jax.random.normal(jax.random.key(0), (2, 8, 4))
    for i in range(150):
        w = step(w, jax.random.key(i))
    terms = hashing.cmimh_terms(jax.random.key(999), *w, num_samples=64)
    assert min(terms.intra_first, terms.cross_first, terms.cross_second) > 1.4  # log 8 = 2.08


# --- degenerate points ---


@pytest.mark.parametrize("size", [1e4, np.inf])
def test_huge_logits_are_finite(size):
    logits = size * np.sign(np.random.RandomState(0).standard_normal((2, 6, 3))).astype(np.float32)
    loss, grads = jax.value_and_grad(lambda z: hashing.cmimh_loss(jax.random.key(0), *z, gap="kl"))(logits)
    assert np.isfinite(loss)
    assert np.isfinite(grads).all()
    slopes = jax.grad(lambda q: hashing.bit_information(q[0]) + hashing.bernoulli_kl(*q).sum())
    assert np.isfinite(slopes(np.stack([np.eye(4), 1 - np.eye(4)]).astype(np.float32))).all()


def test_nan_is_not_hidden(batch):
    logits = batch[0].copy()
    logits[0, 3, 2] = np.nan
    terms = hashing.cmimh_terms(jax.random.key(0), *logits)
    assert np.isnan([terms.loss, terms.intra_first, terms.cross_first, terms.gap, terms.bits_first]).all()
    assert np.isfinite(terms.intra_second)


def test_one_row_has_nothing_to_tell_it_from():
    with pytest.warns(UserWarning, match="over a batch of 1 is 0"):
        assert float(hashing.mi_lower_bound(BITS[:1], z(Q)[:1])) == 0
    with pytest.warns(UserWarning, match="batch of 1"):
        assert np.isnan(hashing.mi_lower_bound(BITS[:1], np.full((1, 2), np.nan, np.float32)))


def test_half_precision_is_widened(batch):
    logits = jnp.asarray(batch[0], jnp.bfloat16)
    terms = hashing.cmimh_terms(jax.random.key(0), *logits)
    assert {x.dtype for x in terms} == {jnp.dtype("float32")}


def test_eight_devices_equal_one(batch):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.enable_x64(True):
        logits = batch[0].astype(np.float64)

        def loss(logits, critic):
            critics = (lambda q: q @ critic, lambda q: q @ critic)
            return hashing.cmimh_loss(jax.random.key(0), *logits, critics, num_samples=2, max_pairs=2 * 24 * 8)

        both = jax.jit(jax.value_and_grad(loss, (0, 1)))
        one = both(logits, np.eye(5))
        eight = both(jax.device_put(logits, NamedSharding(mesh, P(None, "data"))), np.eye(5))
        for ours, theirs in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
            assert ours.dtype == np.float64
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hashing.bernoulli_loglik_matrix(BITS, np.zeros((2, 3), np.float32)), r"got \[3, 2\] and \[2, 3\]"),
        (
            lambda: hashing.mi_lower_bound(BITS, np.zeros((2, 2), np.float32)),
            r"shape of logits, \[2, 2\].*got \[3, 2\]",
        ),
        (lambda: hashing.mi_lower_bound(BITS[:0], z(Q)[:0]), "not be empty"),
        (lambda: hashing.cmimh_loss(jax.random.key(0), z(Q), z(Q1)), r"got \[3, 2\] and \[2, 2\]"),
        (lambda: hashing.cmimh_loss(jax.random.key(0), z(Q), z(Q), estimator="st"), "Unknown estimator 'st'"),
        (lambda: hashing.cmimh_loss(jax.random.key(0), z(Q), z(Q), gap="l1"), "Unknown kind of gap 'l1'"),
        (lambda: hashing.sample_bits(jax.random.key(0), z(Q), num_samples=0), "num_samples must be at least 1"),
        (lambda: hashing.sample_bits_relaxed(jax.random.key(0), z(Q), 0.0), "temperature must be positive"),
        (lambda: hashing.concrete_temperature(0, 10, end=-1.0), "end must be positive"),
        (lambda: hashing.bit_information(np.zeros((0, 2), np.float32)), "with rows"),
        (lambda: hashing.modality_gap(Q1.astype("f"), Q.astype("f")), "must be of one shape"),
    ],
)
def test_refusals(unchecked, call, message):
    with pytest.raises(UserError, match=message):
        call()
