"""Bounds on the mutual information of stochastic binary codes with what they encode, and the loss made of them.

A code is L independent Bernoulli bits given its input, p(b | x) = prod_k q_k^b_k (1 - q_k)^(1 - b_k), so its likelihood
under every input of a batch is known: N^2 of them, from two products of matrices. All is in nats, over the whole
(global) batch. Hoang et al., Multi-Modal Mutual Information Maximization: A Novel Approach for Unsupervised Deep
Cross-Modal Hashing, IEEE TNNLS 2023; the forms of the bounds are ours where the paper's text leaves them open.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, logsumexp
from jaxtyping import Array, Bool, Float, Key

from jkd.checks import Scalar, Tensor
from jkd.errors import UserError
from jkd.hashing.bernoulli import (
    as_bits,
    bit_information,
    bit_probabilities,
    clip_logits,
    modality_gap,
    sample_bits,
)
from jkd.metrics.distances import rows_at_once

MAX_PAIRS = 2**24  # likelihoods held at once: 64 MiB of float32
HIGHEST = jax.lax.Precision.HIGHEST

Bits = Float[Tensor, "*samples rows bits"] | Bool[Tensor, "*samples rows bits"]
Critic = Callable[[Float[Array, "rows bits"]], Float[Array, "rows bits"]]


def bernoulli_loglik_matrix(
    bits: Float[Tensor, "rows bits"] | Bool[Tensor, "rows bits"], logits: Float[Tensor, "columns bits"]
) -> Float[Array, "rows columns"]:
    """l_ij = log p(b_i | x_j) = sum_k b_ik log q_jk + (1 - b_ik) log(1 - q_jk), q = sigmoid(logits); in nats, <= 0.

    Logits are clipped to [-15, 15]. In float32 at least, at the highest precision that products have: differences of
    sums over many bits count.

    Args:
      bits: 0 and 1, or relaxed ones between.
      logits: of the codes of all inputs.

    Raises:
      UserError: if the shapes do not fit, or the logits are not floating point.
    """
    b, z = as_bits(bits), clip_logits(logits)
    if b.ndim != 2 or z.ndim != 2 or b.shape[1] != z.shape[1]:
        raise UserError(
            f"bits and logits must be matrices of equally many columns, got {list(b.shape)} and {list(z.shape)}."
        )
    return _matrix(b, z)


def _matrix(b: Array, z: Array) -> Array:
    ones = jnp.matmul(b, log_sigmoid(z).T, precision=HIGHEST)
    return ones + jnp.matmul(1 - b, log_sigmoid(-z).T, precision=HIGHEST)


def mi_lower_bound(bits: Bits, logits: Float[Tensor, "rows bits"], *, max_pairs: int = MAX_PAIRS) -> Float[Array, ""]:
    """The information of codes about their rows: mean_i( l_ii - log sum_j e^l_ij + log N ), in nats.

    Row i's bits were drawn from row i's logits. Over draws its mean is the mutual information of codes and rows, where
    rows are uniform over this batch: in [0, min(log N, L log 2)], though that of one draw may lie outside. For N = 1 it
    is 0, with a warning: there is nothing to tell a code from. Where the logits are the prediction of something else
    (a critic's), it is a lower bound of the information that the bits have of that.

    Gradients go through the bits and through the logits, and nothing is stopped.

    Args:
      bits: float or bool [rows, bits], or several draws [samples, rows, bits], which are averaged over. Row i belongs
        to row i of the logits.
      logits: of all N rows.
      max_pairs: likelihoods held at once; a larger matrix is computed in groups of rows, in the backward pass anew,
        with the same values and gradients. Static. A group takes every n-th row, its share from each device.

    Raises:
      UserError: if the shapes do not fit, or there is no row.

    Reference: Poole et al., On Variational Bounds of Mutual Information, ICML 2019 (known conditional density).
    """
    b, z = as_bits(bits), clip_logits(logits)
    if b.ndim == 2:
        b = b[None]
    if b.ndim != 3 or b.shape[1:] != z.shape or not z.size:
        raise UserError(
            f"bits must have the shape of logits, {list(z.shape)}, or [samples, *that], and not be empty; "
            f"got {list(jnp.shape(bits))}."
        )
    if len(z) == 1:
        warnings.warn("The mutual information over a batch of 1 is 0: nothing can be learned of it.", stacklevel=2)
        return 0 * z.sum() + 0 * b.sum()  # NaN stays NaN
    own = (b * log_sigmoid(z)[None] + (1 - b) * log_sigmoid(-z)[None]).sum(-1)
    return (own - _log_marginal(b, z, max_pairs)).mean()


def _log_marginal(b: Array, z: Array, max_pairs: int) -> Array:
    """The logarithm of (1/N) sum_j e^l_ij, [samples, rows]."""
    samples, rows, _ = b.shape

    def of(some: Array) -> Array:
        return jax.vmap(lambda one: logsumexp(_matrix(one, z), axis=1))(some)

    at_once = rows_at_once(max(1, max_pairs // samples), rows, rows)
    groups = -(-rows // at_once)
    if groups == 1:
        return of(b) - math.log(rows)
    padded = jnp.pad(b, ((0, 0), (0, groups * at_once - rows), (0, 0)))
    # Row r is in group r % groups: neighbors lie on one device, and every group has some of all devices.
    grouped = padded.reshape(samples, at_once, groups, -1).transpose(2, 0, 1, 3)
    found = jax.lax.map(jax.checkpoint(of), grouped)
    return found.transpose(1, 2, 0).reshape(samples, -1)[:, :rows] - math.log(rows)


def cross_mi_lower_bound(
    bits: Bits,
    other_logits: Float[Tensor, "rows bits"],
    critic: Critic | None = None,
    *,
    max_pairs: int = MAX_PAIRS,
) -> Float[Array, ""]:
    """How well the other side predicts a side's bits: mean_i( log r(b_i | y_i) - log (1/N) sum_j r(b_i | y_j) ).

    A lower bound of the information that codes of one side have of the other side y, at most log N; nats. The critic's
    density r is Bernoulli in each bit, too:

        tied (no critic)    r = p of the other side's own code: bits must be equal to be predicted
        free                the critic maps the other side's probabilities q to logits of r: bits must be predictable

    Args:
      bits: as `mi_lower_bound`, drawn from this side.
      other_logits: of the codes of the other side; row i of both is one pair.
      critic: `critic(q [rows, bits]) -> logits [rows, bits]`, such as a `CodeCritic` with its variables.
      max_pairs: as `mi_lower_bound`.

    Raises:
      UserError: as `mi_lower_bound`.
    """
    logits = other_logits if critic is None else critic(bit_probabilities(other_logits))
    return mi_lower_bound(bits, logits, max_pairs=max_pairs)


class CmimhTerms(NamedTuple):
    """What the loss is made of; nats, but for the gap of kind "mse".

    Attributes:
      loss: the weighted sum, to be minimized.
      intra_first: I_1, of the first side's codes with their inputs.
      intra_second: I_2.
      cross_first: I_12, of the first side's codes with the second side.
      cross_second: I_21.
      gap: G, between the probabilities of both codes.
      bits_first: the per-bit form of I_1 over the number of bits: at most log 2.
      bits_second: likewise of I_2.
    """

    loss: Float[Array, ""]
    intra_first: Float[Array, ""]
    intra_second: Float[Array, ""]
    cross_first: Float[Array, ""]
    cross_second: Float[Array, ""]
    gap: Float[Array, ""]
    bits_first: Float[Array, ""]
    bits_second: Float[Array, ""]


def cmimh_terms(
    key: Key[Array, ""],
    first_logits: Float[Tensor, "rows bits"],
    second_logits: Float[Tensor, "rows bits"],
    critics: tuple[Critic, Critic] | None = None,
    *,
    intra_weight: Scalar = 1.0,
    cross_weight: Scalar = 1.0,
    gap_weight: Scalar = 0.1,
    bit_weight: Scalar = 1.0,
    gap: str = "mse",
    estimator: str = "straight_through",
    num_samples: int = 1,
    temperature: Scalar = 0.5,
    max_pairs: int = MAX_PAIRS,
) -> CmimhTerms:
    """The loss of a batch of pairs, and its parts.

        loss = -intra (I_1 + I_2) / 2 - cross (I_12 + I_21) / 2 + gap G - bit (I_bit,1 + I_bit,2) / (2 L)

    Args:
      key: draws the bits of both sides.
      first_logits: of the codes of the first side; row i of both is one pair.
      second_logits: of the second.
      critics: (predicts the first side's bits from the second's code, the other way round); None: tied.
      intra_weight: of `mi_lower_bound`, each side with itself.
      cross_weight: of `cross_mi_lower_bound`; lambda in the paper's terms.
      gap_weight: of `modality_gap`; gamma. 0 leaves private bits alone, a large one forces the codes to be equal.
      bit_weight: of `bit_information`, of each side and for each bit.
      gap: "mse" or "kl".
      estimator: see `sample_bits`.
      num_samples: likewise.
      temperature: likewise.
      max_pairs: see `mi_lower_bound`.

    Raises:
      UserError: as the functions that it is made of.
    """
    logits = clip_logits(first_logits), clip_logits(second_logits)
    if logits[0].shape != logits[1].shape or logits[0].ndim != 2:
        raise UserError(
            "first_logits and second_logits must be of one shape [rows, bits], got "
            f"{list(logits[0].shape)} and {list(logits[1].shape)}."
        )
    draws = {"estimator": estimator, "num_samples": num_samples, "temperature": temperature}
    bits = [sample_bits(k, z, **draws) for k, z in zip(jax.random.split(key), logits, strict=True)]  # type: ignore[arg-type]
    intra = [mi_lower_bound(b, z, max_pairs=max_pairs) for b, z in zip(bits, logits, strict=True)]
    cross = [
        cross_mi_lower_bound(bits[side], logits[1 - side], critics and critics[side], max_pairs=max_pairs)
        for side in (0, 1)
    ]
    q = [bit_probabilities(z) for z in logits]
    apart = modality_gap(q[0], q[1], kind=gap)
    each = [bit_information(one) / one.shape[1] for one in q]
    loss = (
        -intra_weight * (intra[0] + intra[1]) / 2
        - cross_weight * (cross[0] + cross[1]) / 2
        + gap_weight * apart
        - bit_weight * (each[0] + each[1]) / 2
    )
    return CmimhTerms(jnp.asarray(loss), intra[0], intra[1], cross[0], cross[1], apart, each[0], each[1])


def cmimh_loss(
    key: Key[Array, ""],
    first_logits: Float[Tensor, "rows bits"],
    second_logits: Float[Tensor, "rows bits"],
    critics: tuple[Critic, Critic] | None = None,
    **options: Scalar | str,
) -> Float[Array, ""]:
    """The loss alone; arguments and errors as of `cmimh_terms`."""
    return cmimh_terms(key, first_logits, second_logits, critics, **options).loss  # type: ignore[arg-type]
