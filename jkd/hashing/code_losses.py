"""How networks learn to predict given codes.

Reference: Hoang, Do, Nguyen and Cheung, Unsupervised Deep Cross-modality Spectral Hashing, IEEE Transactions on Image
  Processing 29, 2020, fits networks to the codes of its first step; these losses are common choices for that, not the
  paper's equations.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from jkd.checks import Tensor, as_float, concrete
from jkd.errors import UserError
from jkd.reduction import reduce


def _pair(logits: Tensor, codes: Tensor) -> tuple[Array, Array]:
    scores = as_float("logits", logits)
    if scores.ndim != 2 or scores.shape != jnp.shape(codes) or scores.size == 0:
        raise UserError(
            "logits and codes must have the shape [batch, bits] and not be empty, "
            f"got {list(scores.shape)} and {list(jnp.shape(codes))}."
        )
    known = concrete(codes)
    if known is not None and not np.isin(known, (-1, 1)).all():
        raise UserError("codes must be -1 and 1.")
    return scores, jax.lax.stop_gradient(jnp.asarray(codes).astype(scores.dtype))


def hash_bce(
    logits: Float[Tensor, "batch bits"], codes: Num[Tensor, "batch bits"], *, reduction: str = "mean"
) -> Float[Array, ""] | Float[Array, " batch"]:
    """The binary cross-entropy of codes under independent bits with these logits, as a mean over bits.

        loss_i = mean_k softplus(-b_ik l_ik)

    In float32 at least, >= 0; ln 2 at logits of 0. No gradient to the codes.

    Args:
      logits: l, of bit 1.
      codes: b, -1 and 1, of any dtype.
      reduction: over examples, "mean", "sum" or "none".

    Raises:
      UserError: if the shapes differ or are empty, the logits are not floating point, the codes are known to be
        neither -1 nor 1, or for an unknown reduction.
    """
    scores, signs = _pair(logits, codes)
    return reduce(jax.nn.softplus(-signs * scores).mean(1), reduction)


def hash_regression(
    logits: Float[Tensor, "batch bits"], codes: Num[Tensor, "batch bits"], *, reduction: str = "mean"
) -> Float[Array, ""] | Float[Array, " batch"]:
    """The squared distance of squashed logits to codes, as a mean over bits (so that it does not grow with them).

        loss_i = mean_k (tanh(l_ik) - b_ik)^2

    In float32 at least, in [0, 4]; 1 at logits of 0. No gradient to the codes.

    Takes and raises what `hash_bce` does.
    """
    scores, signs = _pair(logits, codes)
    return reduce(jnp.square(jnp.tanh(scores) - signs).mean(1), reduction)


def hash_agreement(
    first_logits: Float[Tensor, "batch bits"], second_logits: Float[Tensor, "batch bits"], *, reduction: str = "mean"
) -> Float[Array, ""] | Float[Array, " batch"]:
    """How far two modalities' squashed logits of the same examples are apart, as a mean over bits.

        loss_i = mean_k (tanh(f_ik) - tanh(g_ik))^2

    In float32 at least, in [0, 4]. Gradients go to both.

    Raises:
      UserError: if the shapes differ or are empty, one is not floating point, or for an unknown reduction.
    """
    first, second = as_float("first_logits", first_logits), as_float("second_logits", second_logits)
    if first.ndim != 2 or first.shape != second.shape or first.size == 0:
        raise UserError(
            "first_logits and second_logits must have the same shape [batch, bits] and not be empty, "
            f"got {list(first.shape)} and {list(second.shape)}."
        )
    return reduce(jnp.square(jnp.tanh(first) - jnp.tanh(second)).mean(1), reduction)
