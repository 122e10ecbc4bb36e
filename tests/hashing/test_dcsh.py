"""Codes that modalities share: hand-worked values, monotone updates, invariances, degenerate rows, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from jkd import hashing, metrics
from jkd.errors import UserError

SQUARE = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
ROWS, ANCHORS, BITS = 64, 20, 6
ALPHA, RHO = 1.0, 0.1

objective = jax.jit(hashing.dcsh_objective)
update_v = jax.jit(hashing.update_v)
update_b = jax.jit(hashing.update_b, static_argnames="inner")
update_y = jax.jit(hashing.update_y, static_argnames="dtype")
fit = jax.jit(hashing.fit_binary_codes, static_argnums=2, static_argnames=("iters", "weight_eigs"))


@functools.cache
def two_views(seed=0, rows=ROWS, dtype=np.float32):
    """Factors of two noisy views of four clusters."""
    draw = np.random.default_rng(seed)
    label = draw.integers(0, 4, rows)
    views = [draw.normal(size=(4, dim))[label] + draw.normal(size=(rows, dim)) for dim in (8, 5)]
    make = functools.partial(hashing.anchor_graph, nearest=4)
    return tuple(np.asarray(hashing.graph_factor(make(x, x[:ANCHORS])), dtype) for x in views)


def random_codes(seed, shape=(ROWS, BITS)):
    return np.random.default_rng(seed).choice([-1, 1], shape).astype(np.int8)


def projector(v):
    return np.asarray(v, np.float64) @ np.asarray(v, np.float64).T


def check_targets(targets, atol=1e-4):
    rows, bits = targets.shape
    np.testing.assert_allclose(targets.T @ targets / rows, np.eye(bits), atol=atol)
    np.testing.assert_allclose(targets.mean(0), 0, atol=atol)


# --- single updates ---


def test_balanced_independent_bits_are_their_own_targets():
    found = hashing.update_y(jax.random.key(0), SQUARE)
    np.testing.assert_allclose(found, SQUARE, atol=1e-5)
    np.testing.assert_allclose(found.T @ found, 4 * np.eye(2), atol=1e-5)


def test_targets_are_the_polar_factor_of_the_codes():
    codes = random_codes(1)
    middle = codes - codes.mean(0)
    wanted = np.sqrt(ROWS) * scipy.linalg.polar(middle)[0]
    found = update_y(jax.random.key(0), codes)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    nuclear = np.sqrt(ROWS) * scipy.linalg.svdvals(middle).sum()
    np.testing.assert_allclose((found * codes).sum(), nuclear, rtol=1e-5)


@pytest.mark.parametrize("kind", ["constant", "copies", "few rows"])
def test_targets_of_codes_without_full_rank(kind):
    codes = random_codes(2)
    if kind == "constant":
        codes[:, :2] = 1
    elif kind == "copies":
        codes[:, 1], codes[:, 2] = codes[:, 0], -codes[:, 0]
    else:
        codes = np.ones((BITS + 1, BITS), np.int8)
    found = update_y(jax.random.key(3), codes)
    check_targets(np.asarray(found))
    rank = np.linalg.matrix_rank(codes - codes.mean(0))
    nuclear = np.sqrt(len(codes)) * scipy.linalg.svdvals(codes - codes.mean(0)).sum()
    assert rank < BITS
    np.testing.assert_allclose((found * codes).sum(), nuclear, rtol=1e-4, atol=1e-3)


def test_views_are_the_leading_singular_vectors():
    h, codes = two_views()[0].astype(np.float64), random_codes(0)
    whole = np.concatenate([h - h.mean(0), np.sqrt(ALPHA / codes.size) * (codes - codes.mean(0))], axis=1)
    u, s, _ = scipy.linalg.svd(whole, full_matrices=False)
    found = update_v(jax.random.key(0), two_views()[0], codes)
    np.testing.assert_allclose(found.singular, s[:BITS], atol=1e-5)
    np.testing.assert_allclose(projector(found.vectors), projector(u[:, :BITS]), atol=1e-3)


def test_codes_follow_the_gradient_and_keep_what_it_leaves_open():
    views = (np.array([[1.0], [-1], [0], [0]], np.float32) / np.sqrt(2),)
    targets, codes = np.array([[0.0], [0], [1], [0]], np.float32), np.array([[1], [-1], [-1], [-1]], np.int8)
    for weights in (None, (np.ones(1, np.float32),)):
        found = hashing.update_b(codes, views, targets, rho=0.1, eigenvalues=weights)
        assert found.ravel().tolist() == [1, -1, 1, -1], "the last row's gradient is 0"
        assert found.dtype == np.int8


@given(st.integers(0, 10_000))
def test_no_update_lowers_the_objective(seed):
    factors, codes = two_views(), random_codes(seed)
    keys = jax.random.split(jax.random.key(seed), 4)
    views = tuple(update_v(k, h, random_codes(seed + 1)).vectors for k, h in zip(keys, factors, strict=False))
    targets = update_y(keys[2], random_codes(seed + 2))
    steps = [objective(factors, views, codes, targets)]
    views = tuple(update_v(k, h, codes).vectors for k, h in zip(keys, factors, strict=False))
    steps.append(objective(factors, views, codes, targets))
    codes = update_b(codes, views, targets)
    steps.append(objective(factors, views, codes, targets))
    targets = update_y(keys[3], codes)
    steps.append(objective(factors, views, codes, targets))
    assert (np.diff(steps) >= -1e-4).all(), steps
    assert float(objective(factors, views, codes, targets, alpha=0.0, rho=0.0)) <= 2 * BITS + 1e-4
    for view in views:
        assert np.square(np.asarray(view).T @ codes).sum() <= ROWS * BITS * (1 + 1e-5)
    check_targets(np.asarray(targets))


def test_weighted_codes_raise_the_weighted_objective():
    factors, codes = two_views(), random_codes(0)
    found = [update_v(jax.random.key(0), h, codes) for h in factors]
    state = tuple(v.vectors for v in found), tuple(jnp.square(v.singular) for v in found)
    targets = update_y(jax.random.key(1), codes)
    before = objective(factors, state[0], codes, targets, eigenvalues=state[1])
    better = update_b(codes, state[0], targets, eigenvalues=state[1])
    assert float(objective(factors, state[0], better, targets, eigenvalues=state[1])) > float(before) + 1


def test_what_the_objective_does_not_see():
    factors, codes = two_views(), random_codes(5)
    views = tuple(update_v(jax.random.key(0), h, codes).vectors for h in factors)
    targets = np.asarray(update_y(jax.random.key(1), codes))
    base = float(objective(factors, views, codes, targets))
    turn = scipy.linalg.qr(np.random.default_rng(0).normal(size=(BITS, BITS)))[0].astype(np.float32)
    order, flip = np.random.default_rng(1).permutation(BITS), np.array([1, -1, 1, -1, -1, 1])
    rows = np.random.default_rng(2).permutation(ROWS)
    others = [
        objective(factors, tuple(v @ turn for v in views), codes, targets),
        objective(
            factors, views, (codes * flip)[:, order].astype(np.int8), (targets * flip)[:, order].astype(np.float32)
        ),
        objective(tuple(h[rows] for h in factors), tuple(v[rows] for v in views), codes[rows], targets[rows]),
    ]
    np.testing.assert_allclose(others, base, rtol=1e-5)


def test_objective_by_hand():
    h = hashing.graph_factor(np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]], np.float32))
    view, codes = np.array([[0.5], [0.5], [-0.5], [-0.5]], np.float32), np.array([[1], [1], [-1], [1]], np.int8)
    targets = np.array([[1.0], [1], [-1], [-1]], np.float32)
    # tr(V^T A V) = 1; V^T B = 1, squared over n L = 4; Y^T B = 2, times 2 rho / n.
    found = hashing.dcsh_objective((h,), (view,), codes, targets, alpha=2.0, rho=0.3)
    np.testing.assert_allclose(found, 1 + 2 * 1 / 4 + 2 * 0.3 / 4 * 2, rtol=1e-6)


# --- the whole of step 1 ---


@pytest.fixture(scope="module")
def fitted():
    return {weighted: fit(jax.random.key(0), two_views(), BITS, weight_eigs=weighted) for weighted in (True, False)}


@pytest.mark.parametrize("weighted", [True, False])
def test_fitted_codes_satisfy_the_constraints(fitted, weighted):
    found = fitted[weighted]
    assert set(np.unique(found.codes)) == {-1, 1}
    assert found.trace.shape == (11,)
    check_targets(np.asarray(found.targets))
    for view in found.views:
        np.testing.assert_allclose(view.T @ view, np.eye(BITS), atol=1e-5)
        np.testing.assert_allclose(view.sum(0), 0, atol=1e-5)
    if not weighted:
        assert (np.diff(found.trace) >= -1e-4).all()
        again = objective(two_views(), found.views, found.codes, found.targets)
        np.testing.assert_allclose(again, found.trace[-1], rtol=1e-6)


def test_the_trace_begins_at_the_initial_codes(fitted):
    key = jax.random.split(jax.random.key(0))[0]
    first = jax.jit(hashing.initial_codes, static_argnums=2)(key, two_views(), BITS)
    value = objective(two_views(), first.views, first.codes, first.targets)
    np.testing.assert_allclose(value, fitted[False].trace[0], rtol=1e-5)
    weighted = objective(two_views(), first.views, first.codes, first.targets, eigenvalues=first.eigenvalues)
    np.testing.assert_allclose(weighted, fitted[True].trace[0], rtol=1e-5)


def test_rows_and_their_order():
    """Rows are named by nothing: another order of them permutes the codes."""
    order = np.random.default_rng(0).permutation(ROWS)
    one = fit(jax.random.key(0), two_views(), BITS)
    other = fit(jax.random.key(0), tuple(h[order] for h in two_views()), BITS)
    both = [np.asarray(metrics.hamming_distance(*(2 * [codes]))) for codes in (one.codes[order], other.codes)]
    assert (both[0] == both[1]).mean() > 0.9, "the rotation starts from signs that rounding may flip"


def test_equal_rows_get_equal_codes():
    twice = tuple(np.concatenate([h, h]) for h in two_views())
    codes = np.concatenate([random_codes(0)] * 2)
    views = tuple(update_v(jax.random.key(0), h, codes).vectors for h in twice)
    targets = update_y(jax.random.key(1), codes)
    found = np.asarray(update_b(codes, views, targets, inner=1))
    np.testing.assert_array_equal(found[:ROWS], found[ROWS:])


def test_few_kinds_of_rows_still_have_codes():
    h = hashing.graph_factor(np.eye(8, dtype=np.float32)[np.arange(12) % 3] * 0.9 + np.float32(0.1 / 8))
    found = fit(jax.random.key(0), (h, h), 5, iters=3)
    assert np.isfinite(found.trace).all()
    assert len({tuple(row) for row in np.asarray(found.codes[:3])}) == 3, "each kind has another"
    check_targets(np.asarray(found.targets))


def test_a_traced_nan_shows_in_the_trace():
    h, other = two_views()
    broken = np.where(np.arange(ROWS)[:, None] == 3, np.nan, h).astype(np.float32)
    assert np.isnan(fit(jax.random.key(0), (broken, other), BITS).trace).any()


@pytest.fixture(scope="module")
def eight(over_devices):
    """Factors in float64, whole and split over 8 devices."""
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        label = draw.integers(0, 4, ROWS)
        views = [draw.normal(size=(4, dim))[label] + draw.normal(size=(ROWS, dim)) for dim in (8, 5)]
        make = jax.jit(lambda x, u: hashing.graph_factor(hashing.sparse_anchor_graph(x, u, 4)))
        both = (views, over_devices(*views))
        return [tuple(make(x, whole[:ANCHORS]) for x, whole in zip(of, views, strict=True)) for of in both]


def test_eight_devices_find_the_same_codes(eight):
    with jax.enable_x64(True):
        one, many = (fit(jax.random.key(1), factors, BITS) for factors in eight)
        for first, second in zip(one.views, many.views, strict=True):
            np.testing.assert_allclose(projector(first), projector(second), atol=1e-8)
        same = [np.asarray(metrics.hamming_distance(found.codes, found.codes)) for found in (one, many)]
        np.testing.assert_array_equal(*same)
        np.testing.assert_allclose(one.trace, many.trace, rtol=1e-9)


def no_rows_cross(compiled):
    """Sums over rows are [anchors + bits, anchors + bits] at most; nobody gathers rows, or compares all of them."""
    lines = [line for line in compiled.as_text().splitlines() if " all-gather(" in line or " all-reduce(" in line]
    assert lines, "the rows were not split"
    assert not [line.strip()[:160] for line in lines if f"[{ROWS}," in line.split("(")[0]]
    assert f"[{ROWS},{ROWS}]" not in compiled.as_text()


def test_no_array_of_all_rows_crosses_devices(eight):
    with jax.enable_x64(True):
        no_rows_cross(fit.lower(jax.random.key(1), eight[1], BITS).compile())
        dense = jax.jit(lambda factor: factor.dense())(eight[1][0])
        codes = jax.device_put(random_codes(0), dense.sharding)
        no_rows_cross(update_v.lower(jax.random.key(1), dense, codes).compile())


def test_bits_that_are_copies():
    codes = np.array([[1, 1, -1], [1, 1, 1], [-1, -1, -1], [-1, -1, 1]])
    assert float(hashing.max_bit_correlation(codes)) == 1
    assert float(hashing.max_bit_correlation(SQUARE)) == 0
    assert float(hashing.max_bit_correlation(SQUARE[:3])) == pytest.approx(1 / 3)


# --- mistakes ---


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: hashing.fit_binary_codes(jax.random.key(0), (), 2), "at least one modality"),
        (lambda: hashing.fit_binary_codes(jax.random.key(0), two_views(), ANCHORS), "20 bits need at least 21 rows"),
        (lambda: hashing.fit_binary_codes(jax.random.key(0), (two_views()[0][:5],), 5), "got 5 rows and"),
        (
            lambda: hashing.fit_binary_codes(jax.random.key(0), (two_views()[0], two_views()[1][1:]), 2),
            "equally many rows, got [64, 63]",
        ),
        (lambda: hashing.fit_binary_codes(jax.random.key(0), two_views(), 2, alpha=-1), "alpha must be finite and >="),
        (lambda: hashing.fit_binary_codes(jax.random.key(0), two_views(), 2, rho=np.nan), "rho must be finite"),
        (lambda: hashing.fit_binary_codes(jax.random.key(0), two_views(), 2, iters=-1), "iters must be finite and >="),
        (lambda: hashing.update_y(jax.random.key(0), SQUARE[:2]), "2 bits need at least 3 rows, got 2"),
        (lambda: hashing.update_y(jax.random.key(0), SQUARE * 2), "codes must be -1 and 1"),
        (lambda: hashing.dcsh_objective(two_views(), (), SQUARE, SQUARE), "equally many, got 2 and 0"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(UserError) as error:
        call()
    assert says in str(error.value)
