"""How many bits of two codes differ."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num

from jkd.checks import Tensor, concrete
from jkd.errors import UserError


def _signs(name: str, codes: Tensor) -> Array:
    """-1 and 1 as int8; 0 for what is neither of them."""
    if codes.dtype == jnp.bool_:
        return jnp.where(jnp.asarray(codes), 1, -1).astype(jnp.int8)
    known = concrete(codes)
    if known is not None and not ((known == 1) | (known == -1)).all():
        raise UserError(f"{name} must be boolean, or -1 and 1; of bits 0 and 1, pass bits == 1.")
    signs = jnp.asarray(codes)
    return (signs == 1).astype(jnp.int8) - (signs == -1).astype(jnp.int8)


def hamming_distance(
    a: Num[Tensor, "rows bits"] | Bool[Tensor, "rows bits"],
    b: Num[Tensor, "columns bits"] | Bool[Tensor, "columns bits"],
) -> Int[Array, "rows columns"]:
    """How many bits of every row of `a` differ from every row of `b`, in [0, bits].

        d_ij = #{k: a_ik != b_jk} = (n - a_i . b_j) / 2,    a, b in {-1, 1}

    One product of 8-bit integers, exact. A row with a traced value that is neither -1 nor 1 (NaN, for one) is
    n + 1 away from all rows: farther than any code, so that it is nobody's nearest.

    Args:
      a: boolean, or -1 and 1 of any dtype.
      b: as `a`, of the same number of bits; not necessarily of the same dtype.

    Raises:
      UserError: if the two are no matrices with equally many columns, at least one, or a value is known to be
        neither -1 nor 1.
    """
    if jnp.ndim(a) != 2 or jnp.ndim(b) != 2 or jnp.shape(a)[1] != jnp.shape(b)[1] or jnp.shape(a)[1] < 1:
        raise UserError(
            "a and b must have the shapes [rows, bits] and [columns, bits] with at least one bit, "
            f"got {list(jnp.shape(a))} and {list(jnp.shape(b))}."
        )
    first, second = _signs("a", a), _signs("b", b)
    bits = first.shape[1]
    distance = (bits - jnp.matmul(first, second.T, preferred_element_type=jnp.int32)) // 2
    broken = (first == 0).any(1)[:, None] | (second == 0).any(1)[None]
    return jnp.where(broken, bits + 1, distance)
