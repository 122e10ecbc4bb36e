import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist

from jkd.errors import UserError
from jkd.metrics import hamming_distance

distance = jax.jit(hamming_distance)


def test_by_hand():
    a, b = np.array([[1, 1, -1], [-1, -1, -1]]), np.array([[1, 1, -1], [1, 1, 1], [-1, 1, -1]])
    np.testing.assert_array_equal(distance(a, b), [[0, 1, 1], [2, 3, 1]])
    assert distance(a, b).dtype == jnp.int32
    # Codes of different dtypes are compared bit by bit.
    np.testing.assert_array_equal(distance(a > 0, b.astype(np.float32)), [[0, 1, 1], [2, 3, 1]])


@given(a=arrays(bool, (4, 37)), b=arrays(bool, (5, 37)), dtype=st.sampled_from([np.float32, np.int8, jnp.bfloat16]))
def test_scipy_agrees(a, b, dtype):
    expected = np.rint(37 * cdist(a, b, "hamming"))
    np.testing.assert_array_equal(distance(a, b), expected)
    signs = [np.where(x, 1, -1).astype(dtype) for x in (a, b)]
    np.testing.assert_array_equal(distance(*signs), expected)


def test_long_codes_are_counted_exactly():
    codes = np.ones((1, 5001), np.float32)
    other = codes.copy()
    other[0, :3] = -1
    assert distance(codes, other) == 3
    assert distance(codes, -other) == 4998


def test_no_code_is_far_from_all():
    codes = np.array([[1, -1, 1], [1, np.nan, 1], [0, 1, 1]], np.float32)
    np.testing.assert_array_equal(distance(codes, codes[:2]), [[0, 4], [4, 4], [4, 4]])


@pytest.mark.usefixtures("unchecked")
def test_errors():
    signs = np.ones((2, 3), np.float32)
    with pytest.raises(UserError, match="b must be boolean, or -1 and 1; of bits 0 and 1, pass bits == 1"):
        hamming_distance(signs, 0 * signs)
    with pytest.raises(UserError, match="a must be boolean"):
        hamming_distance(signs * np.nan, signs)
    with pytest.raises(UserError, match=r"at least one bit, got \[2, 3\] and \[2, 2\]"):
        hamming_distance(signs, signs[:, :2])
    with pytest.raises(UserError, match=r"got \[2, 0\] and \[2, 0\]"):
        hamming_distance(signs[:, :0], signs[:, :0])
    with pytest.raises(UserError, match=r"got \[3\] and \[2, 3\]"):
        hamming_distance(signs[0], signs)
