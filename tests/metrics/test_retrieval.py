import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score

from jkd.errors import UserError
from jkd.metrics import (
    hamming_distance,
    hamming_mean_average_precision,
    mean_average_precision,
    pack_bits,
    precision_at_k,
    precision_at_radius,
    precision_recall,
    share_label,
)

STATIC = ("k", "normalize", "largest")
average = jax.jit(mean_average_precision, static_argnames=STATIC)
at_k = jax.jit(precision_at_k, static_argnames=("k", "largest"))
# More than two blocks, and a last one that is not full.
DISTANCES = arrays(np.int32, (3, 150), elements=st.integers(0, 4))
RELEVANCE = arrays(bool, (3, 150))


def brute_force(distances, relevance, k=None, normalize="found"):
    """Average precisions, by going down the list."""
    found = []
    for d, relevant in zip(distances, relevance, strict=True):
        order = sorted(range(len(d)), key=lambda i: (np.isnan(d[i]), d[i], i))[:k]
        hits, total = 0, 0.0
        for rank, i in enumerate(order, 1):
            hits += bool(relevant[i])
            total += hits / rank if relevant[i] else 0
        number = hits if normalize == "found" else min(relevant.sum(), len(order))
        found.append(total / max(number, 1) if relevant.any() else np.nan)
    return np.array(found)


def check(score, distances, relevance, k=None, normalize="found"):
    expected = brute_force(distances, relevance, k, normalize)
    np.testing.assert_allclose(score.per_query, expected, rtol=1e-5)
    assert score.counted == relevance.any(1).sum()
    if score.counted:
        assert score.map == pytest.approx(np.nanmean(expected), rel=1e-5)
    else:
        assert np.isnan(score.map)


def test_by_hand():
    query = np.array([[1, 1, -1, -1]])
    rows = np.array([[1, 1, -1, -1], [1, 1, 1, 1], [-1, -1, 1, 1], [1, 1, -1, 1]])
    distances = hamming_distance(query, rows)
    np.testing.assert_array_equal(distances, [[0, 2, 4, 1]])
    for relevant, expected in (([1, 0, 0, 1], 1), ([0, 1, 0, 1], (1 / 2 + 2 / 3) / 2)):
        score = mean_average_precision(distances, np.array([relevant]) == 1)
        assert score.map == pytest.approx(expected)
        assert (score.counted, score.undefined) == (1, 0)


def test_ties_go_to_the_lower_index():
    distances = np.zeros((2, 3), np.int32)
    relevance = np.array([[1, 0, 0], [0, 0, 1]]) == 1
    for kind in (np.int32, np.float32):
        np.testing.assert_allclose(average(distances.astype(kind), relevance, largest=1).per_query, [1, 1 / 3])


def test_cut_offs_by_hand():
    distances = np.arange(6, dtype=np.float32)[None]
    relevance = np.array([[0, 1, 0, 1, 1, 0]]) == 1
    assert average(distances, relevance, k=4, normalize="found").map == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert average(distances, relevance, k=4, normalize="min").map == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert average(distances, relevance, k=2, normalize="min").map == pytest.approx((1 / 2) / 2)
    assert average(distances, relevance, k=1, normalize="found").map == 0


@given(distances=DISTANCES, relevance=RELEVANCE, way=st.sampled_from([(None, "found"), (7, "found"), (70, "min")]))
def test_both_ways_agree_with_brute_force(distances, relevance, way):
    k, normalize = way
    check(average(distances, relevance, k=k, normalize=normalize, largest=4), distances, relevance, *way)
    check(average(distances.astype(np.float32), relevance, k=k, normalize=normalize), distances, relevance, *way)


def test_scikit_learn_agrees_without_ties():
    random = np.random.default_rng(0)
    distances, relevance = random.permuted(np.tile(np.arange(150), (3, 1)), axis=1), random.random((3, 150)) < 0.3
    expected = [average_precision_score(r, -d) for d, r in zip(distances, relevance, strict=True)]
    score = mean_average_precision(distances.astype(np.float32), relevance)
    np.testing.assert_allclose(score.per_query, expected, rtol=1e-5)


def test_queries_without_relevant_items_are_left_out():
    distances, relevance = np.array([[0, 1], [1, 0], [0, 1]]), np.array([[0, 1], [0, 0], [1, 1]]) == 1
    score = average(distances, relevance, largest=1)
    assert (score.map, score.counted) == (0.75, 2)
    np.testing.assert_array_equal(score.per_query, [0.5, np.nan, 1])
    nothing = average(distances, np.zeros_like(relevance), largest=1)
    assert np.isnan(nothing.map)
    assert nothing.counted == 0
    assert at_k(distances, relevance, k=1, largest=1)[::2] == (0.5, 2)


def test_nan_ranks_last_and_is_counted():
    distances = np.array([[np.nan, np.inf, 2, 1]], np.float32)
    score = average(distances, np.array([[1, 0, 0, 0]]) == 1)
    assert (score.map, score.undefined) == (0.25, 1)
    assert precision_at_radius(distances, np.array([[1, 0, 0, 1]]) == 1, np.inf).precision == pytest.approx(1 / 3)


def test_what_is_no_code_ranks_last():
    # hamming_distance says bits + 1 of what is no code: farther than the largest distance of any.
    score = average(np.array([[3, 2, 9]]), np.array([[1, 0, 0]]) == 1, largest=2)
    assert score.map == 0.5


@functools.cache
def codes():
    random = np.random.default_rng(0)
    bits = random.integers(0, 2, (47, 40)).astype(bool)
    return bits[:7], bits[7:], random.integers(0, 5, 7), random.integers(0, 5, 40)


def test_packed_codes_agree_whatever_is_held_at_once():
    queries, database, first, second = codes()
    expected = mean_average_precision(hamming_distance(queries, database), share_label(first, second), 9, "min")
    for max_pairs in (1, 3 * 64, 2**22):  # one query, some after the other and a rest, all
        found = hamming_mean_average_precision(
            pack_bits(queries), pack_bits(database), first, second, 9, "min", max_pairs=max_pairs
        )
        np.testing.assert_allclose(found.per_query, expected.per_query, rtol=1e-6)
        assert found.counted == expected.counted


def test_many_items_and_many_bits():
    # More items than counts of 16 bits hold, several chunks of them; and more distances than one expression compares.
    random = np.random.default_rng(0)
    distances, relevance = random.integers(0, 200, (2, 66_000), np.int32), random.random((2, 66_000)) < 0.1
    score = average(distances, relevance, largest=200)
    np.testing.assert_allclose(score.per_query, average(distances.astype(np.float32), relevance).per_query, rtol=1e-4)


def test_devices_agree(over_devices):
    distances = np.random.default_rng(0).integers(0, 5, (8, 150), np.int32)
    relevance = np.random.default_rng(1).random((8, 150)) < 0.3
    sharded = average(*over_devices(distances, relevance), largest=4)
    np.testing.assert_allclose(sharded.per_query, average(distances, relevance, largest=4).per_query, rtol=1e-6)


def test_precision_by_hand():
    distances, relevance = np.array([[0, 1, 1, 3], [3, 3, 3, 3]]), np.array([[1, 0, 1, 1], [1, 1, 0, 0]]) == 1
    np.testing.assert_allclose(precision_at_k(distances, relevance, 3).per_query, [2 / 3, 2 / 3])
    np.testing.assert_allclose(precision_at_k(distances.astype(np.float32), relevance, 2).per_query, [0.5, 1])
    for values in (distances, distances.astype(np.float32)):
        np.testing.assert_allclose(precision_at_radius(values, relevance, 1).per_query, [2 / 3, 0])
        np.testing.assert_allclose(precision_at_radius(values, relevance, 3).per_query, [3 / 4, 1 / 2])


def test_curves_by_hand():
    distances, relevance = np.array([[0, 1, 1, 3], [0, 0, 0, 0]]), np.array([[1, 0, 1, 1], [0, 0, 0, 0]]) == 1
    curve = precision_recall(distances, relevance)
    np.testing.assert_array_equal(curve.threshold, [0, 1, 2, 3])
    np.testing.assert_allclose(curve.precision, [1, 2 / 3, 2 / 3, 3 / 4])
    np.testing.assert_allclose(curve.recall, [1 / 3, 2 / 3, 2 / 3, 1])
    assert curve.counted == 1
    curve = precision_recall(distances.astype(np.float32), relevance, "rank")
    np.testing.assert_array_equal(curve.threshold, [1, 2, 3, 4])
    np.testing.assert_allclose(curve.precision, [1, 1 / 2, 2 / 3, 3 / 4])
    np.testing.assert_allclose(curve.recall, [1 / 3, 1 / 3, 2 / 3, 1])


def test_shared_labels():
    np.testing.assert_array_equal(share_label(np.array([1, 2]), np.array([2, 1, 3])), [[0, 1, 0], [1, 0, 0]])
    several = np.array([[1, 1, 0], [0, 0, 0]]) == 1
    np.testing.assert_array_equal(share_label(several, several), [[1, 0], [0, 0]])


@pytest.mark.usefixtures("unchecked")
def test_errors():
    distances, relevance = np.zeros((2, 3), np.int32), np.ones((2, 3), bool)
    with pytest.raises(UserError, match=r"k must lie in \[1, 3\], the number of items, got 4"):
        mean_average_precision(distances, relevance, 4)
    with pytest.raises(UserError, match="normalize must be 'found' or 'min', got 'all'"):
        mean_average_precision(distances, relevance, normalize="all")
    with pytest.raises(UserError, match=r"boolean relevance must share the shape .* got \[2, 3\] and int32 \[2, 3\]"):
        mean_average_precision(distances, distances)
    with pytest.raises(UserError, match=r"got \[2, 0\] and bool \[2, 0\]"):
        precision_at_k(distances[:, :0], relevance[:, :0], 1)
    with pytest.raises(UserError, match="Radii need integer distances"):
        precision_recall(distances.astype(np.float32), relevance)
    with pytest.raises(UserError, match="over must be 'radius' or 'rank'"):
        precision_recall(distances, relevance, "all")
    with pytest.raises(UserError, match="largest must not be negative"):
        mean_average_precision(distances, relevance, largest=-1)
    with pytest.raises(UserError, match=r"got int64 \[2\] and bool \[2, 3\]"):
        share_label(np.arange(2), relevance)
    words, labels = np.zeros((2, 1), np.uint32), np.arange(2)
    with pytest.raises(UserError, match="equally many bits"):
        hamming_mean_average_precision(words, np.zeros((2, 2), np.uint32), labels, labels)
    with pytest.raises(UserError, match="one label a database code, at least one; got 1 for 2"):
        hamming_mean_average_precision(words, words, labels, labels[:1])
    with pytest.raises(UserError, match="max_pairs must be positive"):
        hamming_mean_average_precision(words, words, labels, labels, max_pairs=0)
