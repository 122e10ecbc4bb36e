import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jkd import metrics
from jkd.errors import UserError

ranks = jax.jit(metrics.image_text_ranks, static_argnames="captions_per_image")
of_vectors = jax.jit(metrics.embedding_ranks, static_argnames=("captions_per_image", "chunk_size"))
SCORES = arrays(np.int8, (4, 8), elements=st.integers(-3, 3))


def blocks(images=12, captions=5):
    return np.kron(np.eye(images), np.ones(captions)).astype(np.float32)


def by_sorting(scores, captions):
    """Pessimistic ranks from sorted lists in which the right ones come behind their equals."""
    images, texts = scores.shape
    best, found = [], []
    for i in range(images):
        order = sorted(range(texts), key=lambda j: (-scores[i, j], j // captions == i))
        best.append(1 + min(order.index(j) for j in range(captions * i, captions * (i + 1))))
    # Behind its equals of other images, but its own image's captions do not push each other down.
    for j in range(texts):
        order = sorted(range(images), key=lambda i: (-scores[i, j], i == j // captions))
        found.append(1 + order.index(j // captions))
    return best, found


def test_by_hand():
    scores = np.array([[0.1, 0.9, 0.8, 0.2], [0.95, 0.3, 0.4, 0.7]], np.float32)
    found = ranks(scores, captions_per_image=2)
    np.testing.assert_array_equal(found.image_to_text, [1, 2])
    np.testing.assert_array_equal(found.text_to_image, [2, 1, 2, 1])
    recall = metrics.image_text_recall(scores, captions_per_image=2, ks=(1, 2))
    np.testing.assert_allclose(recall.image_to_text, [50, 100])
    np.testing.assert_allclose(recall.text_to_image, [50, 100])
    assert (float(recall.image_to_text_median), float(recall.text_to_image_median)) == (1.5, 1.5)
    assert float(recall.total) == 300


def test_perfect_and_constant_scores():
    perfect = metrics.image_text_recall(blocks())
    np.testing.assert_array_equal(perfect.image_to_text, 100)
    np.testing.assert_array_equal(perfect.text_to_image, 100)
    assert float(perfect.total) == 600
    constant = metrics.image_text_recall(np.ones((12, 60), np.float32))
    np.testing.assert_array_equal(constant.image_to_text, 0)
    np.testing.assert_array_equal(constant.text_to_image, 0)
    assert (float(constant.image_to_text_median), float(constant.text_to_image_median)) == (56, 12)


@given(scores=SCORES)
def test_sorting_agrees(scores):
    found = ranks(scores.astype(np.float32), captions_per_image=2)
    best, single = by_sorting(scores, 2)
    np.testing.assert_array_equal(found.image_to_text, best)
    np.testing.assert_array_equal(found.text_to_image, single)


def vectors(images=12, captions=5, dim=6):
    draw = np.random.default_rng(0)
    first = draw.normal(size=(images, dim)).astype(np.float32)
    return first, (np.repeat(first, captions, 0) + 0.8 * draw.normal(size=(images * captions, dim))).astype(np.float32)


@pytest.mark.parametrize("chunk_size", [1, 5, 12, 100])
def test_ranks_without_the_whole_matrix(chunk_size):
    first, second = vectors()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second)]
    wanted = ranks(unit[0] @ unit[1].T, captions_per_image=5)
    found = of_vectors(first, second, captions_per_image=5, chunk_size=chunk_size)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_equal_vectors_rank_last_in_chunks_too():
    first, second = np.ones((6, 4), np.float32), np.ones((12, 4), np.float32)
    found = of_vectors(first, second, captions_per_image=2, chunk_size=4)
    np.testing.assert_array_equal(found.image_to_text, 11)
    np.testing.assert_array_equal(found.text_to_image, 6)


def test_no_chunk_holds_all_scores():
    shapes = ((500, 8), (2500, 8))
    fn = functools.partial(metrics.embedding_ranks, captions_per_image=5, chunk_size=20)
    text = str(jax.make_jaxpr(fn)(*(np.zeros(shape, np.float32) for shape in shapes)))
    assert "20,2500" in text
    assert "500,100" in text
    assert "500,2500" not in text


def test_folds_are_searched_separately():
    first, second = vectors()
    parts = [metrics.embedding_recall(first[k : k + 4], second[5 * k : 5 * k + 20], ks=(1, 4)) for k in (0, 4, 8)]
    found = metrics.embedding_recall(first, second, ks=(1, 4), folds=3)
    jax.tree.map(lambda x, *of: np.testing.assert_allclose(x, np.mean(of, 0), rtol=1e-6), found, *parts)
    whole = metrics.embedding_recall(first, second, ks=(1, 4))
    assert (np.asarray(found.text_to_image) >= np.asarray(whole.text_to_image)).all()


def test_nan_never_ranks_first():
    scores = blocks(4, 2)
    scores[1, 2], scores[3, 0] = np.nan, np.nan
    found = ranks(scores, captions_per_image=2)  # traced
    assert found.image_to_text[1] == 7, "nothing is known of its own captions"
    assert found.text_to_image[2] == 4
    assert found.text_to_image[0] == 2, "what is not known of another image may be better"
    with pytest.raises(UserError, match="scores must not hold NaN"):
        metrics.image_text_recall(scores, captions_per_image=2, ks=(1,))
    first, second = vectors()
    with pytest.raises(UserError, match="texts must not hold NaN"):
        metrics.embedding_recall(first, np.where(second > 1, np.nan, second).astype(np.float32))


def test_devices(over_devices):
    first, second = vectors(16)
    wanted = of_vectors(first, second, captions_per_image=5, chunk_size=8)
    found = of_vectors(*over_devices(first, second), captions_per_image=5, chunk_size=8)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: metrics.image_text_recall(blocks(3)), r"ks must lie in \[1, 3\]"),
        (lambda: metrics.image_text_recall(blocks(), ks=(0,)), "ks must lie in"),
        (lambda: metrics.image_text_recall(blocks()[:, :-1]), "5 captions for each image"),
        (lambda: metrics.image_text_recall(blocks(), captions_per_image=0), "captions_per_image"),
        (lambda: metrics.image_text_recall(blocks().astype(int)), "floating point"),
        (lambda: metrics.embedding_recall(*vectors(), folds=5), "divide the 12 images, got 5"),
        (lambda: metrics.embedding_ranks(*vectors(), chunk_size=0), "chunk_size"),
        (lambda: metrics.embedding_ranks(vectors()[0], vectors()[1][:, :2]), r"\[captions, dim\]"),
    ],
)
def test_mistakes(call, says, unchecked):
    with pytest.raises(UserError, match=says):
        call()
