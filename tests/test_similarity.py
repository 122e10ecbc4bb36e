import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads
from scipy.spatial.distance import cdist, cosine

from jkd.errors import UserError
from jkd.similarity import cosine_similarity, pairwise_cosine

cosines, pairwise = jax.jit(cosine_similarity, static_argnames="axis"), jax.jit(pairwise_cosine)
VECTORS = arrays(np.float64, (3, 4), elements=st.floats(0.01, 50) | st.floats(-50, -0.01))


@given(a=VECTORS, b=VECTORS)
def test_scipy_agrees(a, b):
    with jax.enable_x64(True):
        rows, columns = cosines(a, b), cosines(a, b, axis=0)
        pairs = pairwise(a, b)
    np.testing.assert_allclose(rows, [1 - cosine(x, y) for x, y in zip(a, b, strict=True)], atol=1e-11)
    np.testing.assert_allclose(columns, [1 - cosine(x, y) for x, y in zip(a.T, b.T, strict=True)], atol=1e-11)
    np.testing.assert_allclose(pairs, 1 - cdist(a, b, "cosine"), atol=1e-11)


def test_a_matrix_with_itself():
    a = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    similarity = np.asarray(pairwise_cosine(a))
    np.testing.assert_allclose(np.diag(similarity), 1, rtol=1e-6)
    np.testing.assert_array_equal(similarity, pairwise_cosine(a, a))
    np.testing.assert_allclose(similarity, similarity.T, rtol=1e-6)


def test_gradients():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(2, 3, 4))
    with jax.enable_x64(True):
        check_grads(jax.jit(cosine_similarity), (a, b), order=1, modes=["rev"])
        check_grads(jax.jit(pairwise_cosine), (a, b), order=1, modes=["rev"])


@pytest.mark.parametrize("function", [cosine_similarity, pairwise_cosine])
def test_zero_vectors_have_similarity_zero_and_a_finite_gradient(function):
    zero, other = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    step = jax.jit(jax.value_and_grad(lambda a, b: function(a, b).sum(), (0, 1)))
    for pair in ((zero, other), (other, zero), (zero, zero)):
        value, gradient = step(*pair)
        assert value == 0
        assert all(np.isfinite(part).all() for part in gradient)


@given(a=VECTORS, scale=st.floats(0.01, 100))
def test_scale_does_not_matter(a, scale):
    b = a[::-1]
    np.testing.assert_allclose(cosines(scale * a, b), cosines(a, b), atol=2e-6)


def test_precision_and_nan():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    low = [x.astype(jnp.bfloat16) for x in (a, b)]
    assert cosines(*low).dtype == pairwise(*low).dtype == jnp.float32
    np.testing.assert_allclose(cosines(*low), cosine_similarity(a, b), atol=0.02)
    a[1, 0] = np.nan
    np.testing.assert_array_equal(np.isnan(cosines(a, b)), [False, True, False])


@pytest.mark.usefixtures("unchecked")
def test_shapes():
    a = np.ones((3, 4), np.float32)
    with pytest.raises(UserError, match=r"\[rows, dim\] and \[columns, dim\], got \[3, 4\] and \[4, 3\]"):
        pairwise_cosine(a, a.T)
    assert jax.eval_shape(cosine_similarity, a[0], a[0]).shape == ()
    assert jax.eval_shape(pairwise_cosine, a, a[:1]).shape == (3, 1)
