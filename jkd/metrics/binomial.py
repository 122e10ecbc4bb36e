"""Fingerprints of bits: how many match, and how unlikely that is by chance."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Num
from scipy import special

from jkd.checks import Tensor, as_float, concrete
from jkd.errors import UserError


def matching_bits(
    logits: Float[Tensor, "batch bits"], bits: Num[Tensor, "batch bits"] | Bool[Tensor, "batch bits"]
) -> Int[Array, " batch"]:
    """How many bits of each example are read right, and -1 in a row with a NaN.

        k_b = #{i: 1[logit_bi > 0] = bit_bi}

    A logit of exactly 0 reads as bit 0.

    Args:
      logits: of bit 1.
      bits: 0 or 1, of any dtype.

    Raises:
      UserError: if the two are no matrices of one shape with at least one bit, `logits` is not floating point, or
        a bit is known to be neither 0 nor 1.
    """
    if jnp.ndim(logits) != 2 or jnp.shape(logits) != jnp.shape(bits) or jnp.shape(logits)[1] < 1:
        raise UserError(
            "logits and bits must share one shape [batch, bits] with at least one bit, "
            f"got {list(jnp.shape(logits))} and {list(jnp.shape(bits))}."
        )
    known = concrete(bits)
    if known is not None and not np.isin(known, (0, 1)).all():
        raise UserError("bits must be 0 or 1.")
    scores = as_float("logits", logits)
    matched = ((scores > 0) == (jnp.asarray(bits) == 1)).sum(axis=1)
    return jnp.where(jnp.isnan(scores).any(axis=1), -1, matched).astype(jnp.int32)


def bit_accuracy(
    logits: Float[Tensor, "batch bits"], bits: Num[Tensor, "batch bits"] | Bool[Tensor, "batch bits"]
) -> Float[Array, " batch"]:
    """The share of the bits of each example that are read right, in [0, 1]; NaN in a row with a NaN.

        matching_bits / n;    0.5 with a standard deviation of 0.5 / sqrt(n) for n bits that are guessed

    Args:
      logits: of bit 1; exactly 0 reads as bit 0.
      bits: 0 or 1, of any dtype.

    Raises:
      UserError: as `matching_bits`.
    """
    matched = matching_bits(logits, bits)
    return jnp.where(matched < 0, jnp.nan, matched / jnp.shape(logits)[1])


def _log_tails(bits: int, users: int) -> np.ndarray:
    """Ln P(any of `users` independent counts of n fair coins is >= k) for k = 0..n, in float64."""
    if bits < 1:
        raise UserError(f"bits must be positive, got {bits}.")
    if users < 1:
        raise UserError(f"users must be positive, got {users}.")
    k = np.arange(bits + 1.0)
    exact = special.gammaln(bits + 1) - special.gammaln(k + 1) - special.gammaln(bits - k + 1) - bits * np.log(2)
    one = np.minimum(np.logaddexp.accumulate(exact[::-1])[::-1], 0)
    one[0] = 0
    if users == 1:
        return one
    # 1 - (1 - p)^M = -expm1(-e^t) with t = ln M + ln(-ln(1 - p)); below e^-30 both logarithms are their argument.
    with np.errstate(divide="ignore"):
        t = np.log(users) + np.where(one < -30, one, np.log(-np.log1p(-np.exp(one))))
    return np.where(t < -30, t, np.log(-np.expm1(-np.exp(np.maximum(t, -30)))))


def match_log_pvalue(matched: Integer[Tensor, "*shape"] | int, bits: int, *, users: int = 1) -> Float[Array, "*shape"]:
    """The natural logarithm of the probability that at least so many bits match by chance: an exact binomial tail.

        p = P(X >= k) = sum_{j >= k} C(n, j) / 2^n,    X ~ Binomial(n, 1/2)
        p_M = 1 - (1 - p)^M,    the best of M fingerprints that have nothing to do with the image

    In logarithms, as 2^-128 is no normal float32; from a table of float64 that is made when the function is traced,
    so that float32 results are as exact as float32. NaN for a count outside [0, bits], such as the -1 of
    `matching_bits`. Over several images of one source, add up both counts. The bits of one image need not be
    independent: check the rate of false alarms on real images too.

    Args:
      matched: k.
      bits: n; static.
      users: M, how many fingerprints were compared with; static.

    Raises:
      UserError: if `bits` or `users` is not positive, or `matched` is not of an integer dtype.

    Reference: Yu, Skripniuk, Chen, Davis and Fritz, Responsible Disclosure of Generative Models Using Scalable
      Fingerprinting, ICLR 2022.
    """
    k = jnp.asarray(matched)
    if not jnp.issubdtype(k.dtype, jnp.integer):
        raise UserError(f"matched must be integer, got {k.dtype}.")
    table = jnp.asarray(_log_tails(bits, users))
    return jnp.where((k < 0) | (k > bits), jnp.nan, table[jnp.clip(k, 0, bits)])


def detection_threshold(bits: int, false_positive_rate: float, *, users: int = 1) -> int:
    """The fewest matching bits whose p-value (`match_log_pvalue`) is at most the rate; on the host.

    Args:
      bits: of a fingerprint.
      false_positive_rate: in (0, 1].
      users: how many fingerprints are compared with.

    Raises:
      UserError: if `bits` or `users` is not positive, the rate is not in (0, 1], or not even all bits would do.
    """
    if not 0 < false_positive_rate <= 1:
        raise UserError(f"false_positive_rate must lie in (0, 1], got {false_positive_rate}.")
    enough = _log_tails(bits, users) <= np.log(false_positive_rate)
    if not enough.any():
        raise UserError(f"{bits} bits are too few to tell at a false positive rate of {false_positive_rate}.")
    return int(enough.argmax())
