"""One convention between scores and bits: a bit is 1 where its score is at least 0."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int8

from jkd.checks import Tensor, as_float, concrete
from jkd.errors import UserError


def to_bits(scores: Float[Tensor, "*rows bits"]) -> Bool[Array, "*rows bits"]:
    """The bits of scores: True where a score is >= 0, so that a score of exactly 0 has a bit too.

    A traced NaN gives False; `to_signs` keeps what it is. No gradient.

    Raises:
      UserError: if the scores are not floating point, or one is known to be NaN.
    """
    return _known(scores) >= 0


def to_signs(scores: Float[Tensor, "*rows bits"]) -> Int8[Array, "*rows bits"]:
    """The code of scores: 1 where a score is >= 0, else -1.

    A traced NaN gives 0, which `jkd.metrics.hamming_distance` holds to be farther from all codes than any code. No
    gradient.

    Raises:
      UserError: if the scores are not floating point, or one is known to be NaN.
    """
    values = _known(scores)
    return (values >= 0).astype(jnp.int8) - (values < 0).astype(jnp.int8)


def _known(scores: Tensor) -> Array:
    values = as_float("scores", scores)
    known = concrete(scores)
    if known is not None and np.isnan(known).any():
        raise UserError("scores must not be NaN: a comparison with NaN is False, which would look like a bit.")
    return values
