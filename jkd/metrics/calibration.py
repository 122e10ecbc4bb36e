"""Calibration: whether a classifier is right as often as it is confident."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from jkd.checks import Tensor, as_float
from jkd.errors import UserError
from jkd.metrics.classification import topk_correct


class CalibrationBins(NamedTuple):
    """For each bin of confidence: how many examples, how many of them correct, the sum of their confidences."""

    total: Int[Array, " bins"]
    correct: Int[Array, " bins"]
    confidence: Float[Array, " bins"]


def calibration_bins(
    probs: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    n_bins: int = 10,
    mask: Bool[Tensor, " batch"] | None = None,
) -> CalibrationBins:
    """Sums by bin of confidence: add them over batches, then call `ece` or draw a reliability diagram.

        bin i of n:    (i / n, (i + 1) / n],    confidence = max_k p_k

    correct / total and confidence / total are a bin's accuracy and mean confidence. A confidence at or below
    0 falls into the first bin, one above 1 into the last, and so does a NaN, which makes `ece` NaN. Ties
    and labels outside [0, classes) as in `topk_correct`.

    Args:
      probs: predicted probabilities (not logits).
      labels: in [0, classes).
      n_bins: number of bins of equal width; static.
      mask: False for padding; None counts every row.

    Raises:
      UserError: if the shapes do not fit, `probs` is not floating point, or `n_bins` is not positive.
    """
    if n_bins < 1:
        raise UserError(f"n_bins must be positive, got {n_bins}.")
    if jnp.ndim(probs) != 2 or jnp.shape(labels) != jnp.shape(probs)[:1]:
        raise UserError(
            "probs must have the shape [batch, classes] and labels [batch], "
            f"got {list(jnp.shape(probs))} and {list(jnp.shape(labels))}."
        )
    p = as_float("probs", probs)
    correct = topk_correct(p, labels)
    if mask is not None and jnp.shape(mask) != correct.shape:
        raise UserError(f"mask must have the shape {list(correct.shape)}, got {list(jnp.shape(mask))}.")
    counted = jnp.ones(correct.shape, bool) if mask is None else jnp.asarray(mask, bool)
    confidence = p.max(axis=1)
    # Compared with the edges themselves: 0.3 * 10 rounds to either side of 3.
    edges = jnp.asarray(np.arange(1, n_bins) / n_bins, p.dtype)
    where = jnp.searchsorted(edges, confidence, side="left")
    total, right = (
        jax.ops.segment_sum(flags.astype(jnp.int32), where, n_bins) for flags in (counted, correct & counted)
    )
    return CalibrationBins(total, right, jax.ops.segment_sum(jnp.where(counted, confidence, 0), where, n_bins))


def ece(bins: CalibrationBins) -> Float[Array, ""]:
    """The expected calibration error of bins: the gap of each, weighted by its share of the examples.

        ECE = sum_i n_i / N |accuracy_i - confidence_i|,    in [0, 1]

    NaN without examples.

    Reference: Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017.
    """
    return jnp.abs(bins.correct - bins.confidence).sum() / bins.total.sum()


def ece_unweighted(bins: CalibrationBins) -> Float[Array, ""]:
    """The plain mean over all bins of their gaps, an empty bin counting as 0.

        1/n sum_i |accuracy_i - confidence_i|

    Not the expected calibration error: it is what the code of Guo et al., Expert Systems with Applications 262,
    2025, reports under that name (there averaged over batches of 128), and is here for comparison with it.
    """
    gap = jnp.abs(bins.correct - bins.confidence) / jnp.maximum(bins.total, 1)
    return gap.mean()


def expected_calibration_error(
    probs: Float[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    n_bins: int = 10,
    mask: Bool[Tensor, " batch"] | None = None,
) -> Float[Array, ""]:
    """`ece(calibration_bins(...))`, where all examples are at hand.

    Args:
      probs: predicted probabilities (not logits).
      labels: in [0, classes).
      n_bins: number of bins (a, b] of equal width; static.
      mask: False for padding; None counts every row.

    Raises:
      UserError: as `calibration_bins`.
    """
    return ece(calibration_bins(probs, labels, n_bins, mask))
