import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist

from jkd.errors import UserError
from jkd.metrics import hamming, hamming_distance, pack_bits, packed_hamming_distance, unpack_bits

distance, pack, packed = (jax.jit(f) for f in (hamming_distance, pack_bits, packed_hamming_distance))
unpack = jax.jit(unpack_bits, static_argnums=1)


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


def test_packing_by_hand():
    bits = np.zeros((2, 34), bool)
    bits[0, [0, 1, 31, 33]] = bits[1, 32] = True
    words = pack(bits)
    assert words.dtype == jnp.uint32
    np.testing.assert_array_equal(words, [[2**31 + 3, 2], [0, 1]])
    np.testing.assert_array_equal(packed(words, words), [[0, 5], [5, 0]])


@given(codes=arrays(bool, (6, 70)), bits=st.sampled_from([1, 33, 64]))
def test_packing_comes_back_and_keeps_distances(codes, bits):
    codes = codes[:, :bits]
    words = pack(codes)
    np.testing.assert_array_equal(unpack(words, bits), codes)
    np.testing.assert_array_equal(pack(np.where(codes, 1.0, -1.0)), words)
    np.testing.assert_array_equal(packed(words, words[:4]), (codes[:, None] != codes[None, :4]).sum(-1))


def test_both_forms_agree_on_long_codes():
    codes = np.random.default_rng(0).integers(0, 2, (5, 4200)).astype(bool)
    expected = (codes[:, None] != codes[None]).sum(-1)
    signs = jnp.where(codes, 1, -1).astype(jnp.int8)
    for form in (hamming._by_count, hamming._by_product):
        np.testing.assert_array_equal(jax.jit(form)(signs, signs), expected)
    # More words than are written out.
    np.testing.assert_array_equal(packed(pack(codes), pack(codes)), expected)


@pytest.mark.usefixtures("unchecked")
def test_errors_of_packed_codes():
    words = np.zeros((3, 2), np.uint32)
    with pytest.raises(UserError, match="equally many bits: a row has 2 in a and 1 in b words"):
        packed_hamming_distance(words, words[:, :1])
    with pytest.raises(UserError, match=r"b must be uint32 \[rows, words\], made by pack_bits, got int32 \[3, 2\]"):
        packed_hamming_distance(words, words.astype(np.int32))
    with pytest.raises(UserError, match="bits must need 2 words of 32 bits, got 32"):
        unpack_bits(words, 32)
    with pytest.raises(UserError, match="at least one bit, got"):
        pack_bits(np.zeros((3, 0), bool))
    with pytest.raises(UserError, match="codes must be boolean, or -1 and 1"):
        pack_bits(np.zeros((3, 2)))
