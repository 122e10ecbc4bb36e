import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jkd import retrieval
from jkd.errors import UserError

SCORES = np.array([[0.9, 0.75, 0.1], [0.3, 0.5, 0.45], [0.2, 0.8, 0.6]], np.float32)
SQUARES = arrays(np.float64, (4, 4), elements=st.floats(-1, 1))
NEGATIVES = ("hard", "all", 2)
ranking = jax.jit(retrieval.vse_ranking_loss, static_argnames=("negatives", "reduction"))
KINDS = {
    name: jax.jit(
        jax.value_and_grad(functools.partial(retrieval.vse_hard_negative_loss, reduction="sum", **named), (0, 1))
    )
    for name, named in {
        **{str(kind): {"negatives": kind} for kind in NEGATIVES},
        "chunked": {"negatives": "hard", "chunk_size": 4},
        "chunked all": {"negatives": "all", "chunk_size": 2},
    }.items()
}


def double_loop(scores, margin=0.2, negatives="hard", ids=None):
    """Each pair's hinges, one by one."""
    size = len(scores)
    found = np.zeros(size)
    for matrix in (scores, scores.T):
        for i in range(size):
            others = [j for j in range(size) if j != i and (ids is None or ids[i] != ids[j])]
            hinges = sorted((max(0.0, margin + matrix[i, j] - matrix[i, i]) for j in others), reverse=True)
            found[i] += sum(hinges[: {"hard": 1, "all": size}.get(negatives, negatives)])
    return found


def vectors(size=8, dim=5, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(2, size, dim)).astype(dtype)


def test_by_hand():
    terms = retrieval.vse_ranking_terms(SCORES)
    np.testing.assert_allclose(terms.image_to_text, [0.05, 0.15, 0.4], atol=1e-6)
    np.testing.assert_allclose(terms.text_to_image, [0, 0.5, 0.05], atol=1e-6)
    assert ranking(SCORES, reduction="sum") == pytest.approx(1.15)
    assert ranking(SCORES, negatives="all", reduction="sum") == pytest.approx(1.6)
    assert ranking(SCORES.T, reduction="sum") == pytest.approx(1.15)
    assert ranking(SCORES) == pytest.approx(1.15 / 3)


@given(scores=SQUARES, same=st.booleans())
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_double_loops_agree(scores, same, negatives):
    ids = np.array([0, 1, 1, 2], np.int32) if same else np.arange(4, dtype=np.int32)
    with jax.enable_x64(True):
        found = ranking(scores, negatives=negatives, same_image_ids=ids, reduction="none")
    np.testing.assert_allclose(found, double_loop(scores, 0.2, negatives, ids), atol=1e-12)


def test_torch_agrees():
    torch = pytest.importorskip("torch", reason="needs the oracles extra")
    images, texts = vectors()
    for kind in ("hard", "all"):
        a, b = (torch.tensor(x, requires_grad=True) for x in (images, texts))
        scores = torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T
        own, eye = scores.diagonal(), torch.eye(len(a), dtype=torch.bool)
        hinges = [(0.2 + s - own[:, None]).clamp(min=0).masked_fill(eye, 0) for s in (scores, scores.T)]
        loss = sum((h.max(1)[0] if kind == "hard" else h).sum() for h in hinges)
        loss.backward()
        value, gradient = KINDS[kind](images, texts)
        assert float(value) == pytest.approx(loss.item(), rel=1e-5)
        for ours, theirs in zip(gradient, (a.grad, b.grad), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_where_training_ends_and_collapses():
    separated = np.full((4, 4), 0.7, np.float32) + 0.3 * np.eye(4, dtype=np.float32)
    value, gradient = jax.value_and_grad(retrieval.vse_ranking_loss)(separated)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    assert ranking(np.ones((4, 4), np.float32), reduction="sum") == pytest.approx(2 * 4 * 0.2)


def test_the_gradient_goes_to_one_of_equally_hard_negatives():
    scores = np.array([[0.5, 0.4, 0.4], [-1, 0.9, -1], [-1, -1, 0.9]], np.float32)
    gradient = jax.grad(lambda s: retrieval.vse_ranking_terms(s).image_to_text.sum())(scores)
    np.testing.assert_array_equal(gradient, [[-1, 1, 0], [0, 0, 0], [0, 0, 0]])


def test_the_diagonal_is_left_out_also_where_all_negatives_are_lower():
    """Flipping the diagonal's sign would find -s_ii."""
    scores = np.array([[0.1, -0.9], [-0.95, 0.1]], np.float32)
    found = retrieval.vse_ranking_terms(scores, margin=1.5)
    np.testing.assert_allclose(found.image_to_text, [0.5, 0.45], atol=1e-6)


def test_pairs_of_one_image_are_no_negatives():
    ids = np.zeros(3, np.int32)
    for kind in NEGATIVES:
        value, gradient = jax.value_and_grad(retrieval.vse_ranking_loss)(SCORES, negatives=kind, same_image_ids=ids)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(("chunked", "whole"), [("chunked", "hard"), ("chunked all", "all")])
def test_chunks_change_nothing(chunked, whole):
    images, texts = vectors()
    ids = np.array([0, 1, 2, 2, 4, 5, 6, 7], np.int32)
    found, wanted = (KINDS[kind](images, texts, same_image_ids=ids) for kind in (chunked, whole))
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found[1], wanted[1])


@pytest.mark.parametrize("kind", KINDS)
def test_negatives_are_sought_over_all_devices(kind, over_devices):
    with jax.enable_x64(True):
        arrays = vectors(16, dtype=np.float64)
        one, many = KINDS[kind](*arrays), KINDS[kind](*over_devices(*arrays))
    assert one[0].dtype == np.float64
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), many, one)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_vectors_and_nan(kind):
    images, texts = vectors()
    images[3] = 0
    value, gradient = KINDS[kind](images, texts)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in gradient)
    texts[2, 1] = np.nan
    assert np.isnan(KINDS[kind](images, texts)[0])


def test_a_nan_among_negatives_is_not_sorted_away():
    for sign in (np.nan, -np.nan):
        scores = SCORES.copy()
        scores[0, 1] = sign
        for kind in NEGATIVES:
            found = retrieval.vse_ranking_terms(scores, negatives=kind)
            assert np.isnan(found.image_to_text[0]), kind
            assert np.isfinite(found.image_to_text[2]), kind


def test_bfloat16_and_scale():
    images, texts = vectors()
    wanted = KINDS["hard"](images, texts)[0]
    assert KINDS["hard"](7 * images, 0.1 * texts)[0] == pytest.approx(float(wanted), rel=1e-5)
    low = KINDS["hard"](*(jnp.asarray(x, jnp.bfloat16) for x in (images, texts)))
    assert low[0].dtype == jnp.float32
    assert low[1][0].dtype == jnp.bfloat16
    assert float(low[0]) == pytest.approx(float(wanted), rel=0.02)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: retrieval.vse_ranking_loss(SCORES[:1, :1]), "at least 2 pairs, got 1"),
        (lambda: retrieval.vse_ranking_loss(SCORES[:2]), "must have the shape"),
        (lambda: retrieval.vse_ranking_loss(SCORES, negatives="hardest"), "hard"),
        (lambda: retrieval.vse_ranking_loss(SCORES, negatives=3), r"a number in \[1, 2\], got 3"),
        (lambda: retrieval.vse_ranking_loss(SCORES, negatives=True), "got True"),
        (lambda: retrieval.vse_ranking_loss(SCORES, margin=0.0), "margin must be positive"),
        (lambda: retrieval.vse_ranking_loss(SCORES.astype(int)), "floating point"),
        (lambda: retrieval.vse_ranking_loss(SCORES, same_image_ids=np.zeros(2, int)), "same_image_ids"),
        (lambda: retrieval.vse_ranking_loss(SCORES, reduction="max"), "reduction"),
        (lambda: retrieval.vse_hard_negative_loss(SCORES, SCORES[:2]), "one shape"),
        (lambda: retrieval.vse_hard_negative_loss(SCORES, SCORES, chunk_size=2), "divide the batch of 3"),
        (lambda: retrieval.vse_hard_negative_loss(SCORES[:1], SCORES[:1], chunk_size=1), "at least 2 pairs"),
    ],
)
def test_mistakes(call, says, unchecked):
    with pytest.raises(UserError, match=says):
        call()
